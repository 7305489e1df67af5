"""Numbers for people."""

from __future__ import annotations

import math

_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def count(value: float, unit: str = "") -> str:
    """``3350656 -> "3.35 M"``, with a unit ``"3.35 MFLOP"``."""
    return _scaled(value, 1000, _PREFIXES, unit)


def size(value: float) -> str:
    """Bytes: ``526888 -> "515 KiB"``."""
    return _scaled(value, 1024, ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"), "B")


def seconds(value: float) -> str:
    """``3.1e-5 -> "31.0 µs"``."""
    if not math.isfinite(value):
        return str(value)
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if abs(value) * factor >= 0.9995:
            return f"{_digits(value * factor)} {unit}"
    return f"{_digits(value * 1e9)} ns"


def times(gain: float | None) -> str:
    """A ratio of times: ``1.31 -> "1.31x"``; a dash for None."""
    return "–" if gain is None else f"{_digits(gain)}x"


def share(part: float) -> str:
    """``0.123 -> "12.3%"``; what would be rounded to nothing is ``"<0.1%"``."""
    return "<0.1%" if 0 < part < 0.0005 else f"{100 * part:.1f}%"


def error(value: float) -> str:
    """An error bound or a deviation: ``0`` or two digits of precision."""
    return "0" if value == 0 else f"{value:.2g}"


def _scaled(value: float, base: int, prefixes: tuple[str, ...], unit: str) -> str:
    if not math.isfinite(value):
        return f"{value} {unit}".strip()
    scaled, index = float(value), 0
    while abs(scaled) >= base * 0.9995 and index < len(prefixes) - 1:
        scaled, index = scaled / base, index + 1
    text = str(int(scaled)) if index == 0 and scaled == int(scaled) else _digits(scaled)
    return f"{text} {prefixes[index]}{unit}".strip()


def _digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")
    decimals = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{value:,.{min(decimals, 6)}f}"
