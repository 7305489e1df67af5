"""The roofline plot: each kernel against the limits of the machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlec.reporting import units
from mlec.reporting.markup import Html, element
from mlec.reporting.schema import Kernel, Roofline

WIDTH, HEIGHT = 680, 360
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 18, 46
NAMED = 4
CHARACTER = 7.2


@dataclass(frozen=True)
class _Axis:
    """The values from ``low`` to ``high``, logarithmic, on pixels from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        part = math.log10(value / self.low) / math.log10(self.high / self.low)
        return self.start + part * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Powers of ten, with 2 and 5 times those where there are few."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1, 2, 5) if self.high / self.low < 300 else (1,)
        return [v for d in decades for v in (step * 10.0**d for step in steps) if self.low <= v <= self.high * 1.001]


def limit_of(kernel: Kernel, machine: Roofline) -> str:
    """What bounds the predicted time: "compute", "memory" or "call" (the overhead of calling it)."""
    compute, memory = kernel.nominal_flops / machine.peak(kernel.bits), kernel.nominal_bytes / machine.bandwidth
    if machine.kernel_seconds > max(compute, memory):
        return "call"
    return "compute" if compute >= memory else "memory"


def roofline(kernels: Sequence[tuple[Kernel, float]], machine: Roofline | None) -> Html | None:
    """The plot: arithmetic intensity (FLOP / byte) against GFLOP/s, both logarithmic; the area of a point is its share of the time.

    Args:
        kernels: with their share of the predicted time, slowest first.
        machine: its limits.

    Returns:
        None when there is no machine, or no kernel does arithmetic.
    """
    shown = [(k, part) for k, part in kernels if k.nominal_flops and k.nominal_bytes and k.predicted_seconds]
    if machine is None or not shown or min(machine.flops, machine.bandwidth) <= 0:
        return None
    points = [
        (k, part, k.nominal_flops / k.nominal_bytes, k.nominal_flops / (k.predicted_seconds or 1)) for k, part in shown
    ]
    peaks = sorted({machine.peak(k.bits): k.bits for k, _ in shown}.items(), reverse=True)
    x = _axis([*(peak / machine.bandwidth for peak, _ in peaks), *(p[2] for p in points)], LEFT, WIDTH - RIGHT)
    y = _axis([*(peak / 1e9 for peak, _ in peaks), *(p[3] / 1e9 for p in points)], HEIGHT - BOTTOM, TOP)
    dots = [(k, part, x.at(intensity), y.at(rate / 1e9), intensity, rate) for k, part, intensity, rate in points]
    return element(
        "svg",
        _grid(x, y),
        _roof(x, y, machine.bandwidth, peaks),
        element("g", [_dot(*dot, limit_of(dot[0], machine)) for dot in reversed(dots)]),
        element("g", _names([(k, px, py, _radius(part)) for k, part, px, py, _, _ in dots]), class_="names"),
        class_="roofline", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label="roofline of the kernels",
    )  # fmt: skip


def _axis(values: Sequence[float], start: float, end: float) -> _Axis:
    """All values, with room to both sides."""
    return _Axis(min(values) / 2.5, max(values) * 2.5, start, end)


def _grid(x: _Axis, y: _Axis) -> Html:
    lines, texts = [], []
    for tick in x.ticks:
        lines.append(element("line", x1=x.at(tick), x2=x.at(tick), y1=TOP, y2=HEIGHT - BOTTOM))
        texts.append(element("text", f"{tick:g}", x=x.at(tick), y=HEIGHT - BOTTOM + 18, text_anchor="middle"))
    for tick in y.ticks:
        lines.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y.at(tick), y2=y.at(tick)))
        texts.append(element("text", f"{tick:g}", x=LEFT - 8, y=y.at(tick) + 4, text_anchor="end"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    texts.append(
        element(
            "text",
            "arithmetic intensity, FLOP / byte",
            x=(LEFT + WIDTH - RIGHT) / 2,
            y=HEIGHT - 8,
            text_anchor="middle",
        )
    )
    texts.append(
        element("text", "GFLOP/s", x=16, y=middle, text_anchor="middle", transform=f"rotate(-90 16 {middle:g})")
    )
    return element("g", lines, texts, class_="grid")


def _roof(x: _Axis, y: _Axis, bandwidth: float, peaks: Sequence[tuple[float, int]]) -> Html:
    """The limit of the memory, and that of the arithmetic for each width of floats: ``(operations a second, bits)``, highest first."""
    slope = bandwidth / 1e9
    # The memory line enters the plot at its left or at its bottom edge.
    first = max(x.low, y.low / slope)
    start = (x.at(first), y.at(first * slope))
    corners = [(x.at(peak / bandwidth), y.at(peak / 1e9)) for peak, _ in peaks]
    corner, end = corners[0], WIDTH - RIGHT
    angle = math.degrees(math.atan2(corner[1] - start[1], corner[0] - start[0]))
    middle = (0.7 * start[0] + 0.3 * corner[0], 0.7 * start[1] + 0.3 * corner[1] - 8)
    return element(
        "g",
        element("path", d=f"M{start[0]:.1f} {start[1]:.1f}L{corner[0]:.1f} {corner[1]:.1f}"),
        [element("path", d=f"M{left:.1f} {height:.1f}H{end}") for left, height in corners],
        element(
            "text", f"memory, {units.count(bandwidth, 'B')}/s", x=middle[0], y=middle[1], text_anchor="middle",
            transform=f"rotate({angle:.2f} {middle[0]:.1f} {middle[1] + 8:.1f})",
        ),
        [
            element(
                "text", f"float{bits}, {units.count(peak, 'FLOP')}/s", x=end, y=height - 8, text_anchor="end"
            )
            for (peak, bits), (_, height) in zip(peaks, corners, strict=True)
        ],
        class_="roof",
    )  # fmt: skip


def _radius(part: float) -> float:
    return 3.5 + 9 * math.sqrt(part)


def _dot(kernel: Kernel, part: float, px: float, py: float, intensity: float, rate: float, limit: str) -> Html:
    words = [
        kernel.symbol,
        kernel.location,
        f"{units.count(rate, 'FLOP')}/s predicted, {intensity:.3g} FLOP / byte",
        f"{units.seconds(kernel.predicted_seconds or 0)}, {units.share(part)} of the time",
    ]
    title = element("title", "\n".join(word for word in words if word))
    return element("circle", title, cx=round(px, 1), cy=round(py, 1), r=round(_radius(part), 1), class_=f"dot {limit}")


def _names(dots: Sequence[tuple[Kernel, float, float, float]]) -> list[Html]:
    """Names of the slowest kernels, below and beside their points, where they cover no other."""
    texts = []
    taken = [(px - r, py - r, px + r, py + r) for _, px, py, r in dots]
    named: set[tuple[int, int]] = set()
    for kernel, px, py, radius in dots:
        spot = (round(px), round(py))
        if spot in named:  # equal kernels lie on one point
            continue
        named.add(spot)
        words = kernel.symbol if len(kernel.symbol) <= 30 else f"{kernel.symbol[:29]}…"
        width = len(words) * CHARACTER
        sides = [
            (px + radius + 3, 9),
            (px + radius + 3, 26),
            (px - radius - 3 - width, 9),
            (px - radius - 3 - width, 26),
        ]
        free = [
            (start, below)
            for start, below in sides
            if LEFT <= start <= WIDTH - RIGHT - width
            and not any(_overlap(_name_box(start, py + radius + below, width), b) for b in taken)
        ]
        if not free:
            continue
        start, below = free[0]
        taken.append(_name_box(start, py + radius + below, width))
        texts.append(element("text", words, x=round(start, 1), y=round(py + radius + below, 1)))
        if len(texts) == NAMED:
            break
    return texts


_Box = tuple[float, float, float, float]


def _name_box(x: float, baseline: float, width: float) -> _Box:
    return (x, baseline - 11, x + width, baseline + 4)


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
