"""The roofline plot: each kernel against the limits of the machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlec.reporting import units
from mlec.reporting.markup import Html, element
from mlec.reporting.runs import Run
from mlec.reporting.schema import Roofline

WIDTH, HEIGHT = 680, 360
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 18, 46
NAMED = 4
CHARACTER = 7.2
NUMBERS = {8: "bytes", 16: "bfloat16"}
"""The numbers of narrow peaks; others are floats."""


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


def limit_of(run: Run, machine: Roofline) -> str:
    """What bounds the time at best: "compute", "memory" or "call" (the overhead of calling it)."""
    compute, memory = run.flops / machine.peak(run.kernel.bits), run.bytes / machine.bandwidth
    if machine.kernel_seconds > max(compute, memory):
        return "call"
    return "compute" if compute >= memory else "memory"


def roofline(found: Sequence[Run], machine: Roofline | None) -> Html | None:
    """The plot: arithmetic intensity (FLOP / byte) against GFLOP/s, both logarithmic; the area of a point is its share of the time.

    A kernel that was measured is a point where it was measured, and a ring where it was predicted, with a line between the two.

    Args:
        found: the kernels, slowest first.
        machine: its limits.

    Returns:
        None when there is no machine, or no kernel does arithmetic.
    """
    shown = [run for run in found if run.flops and run.bytes and run.seconds]
    if machine is None or not shown or min(machine.flops, machine.bandwidth) <= 0:
        return None
    peaks = sorted({machine.peak(run.kernel.bits): run.kernel.bits for run in shown}.items(), reverse=True)
    rates = [run.flops / seconds / 1e9 for run in shown for seconds in (run.predicted, run.measured) if seconds]
    x = _axis(
        [*(peak / machine.bandwidth for peak, _ in peaks), *(run.flops / run.bytes for run in shown)],
        LEFT,
        WIDTH - RIGHT,
    )
    y = _axis([*(peak / 1e9 for peak, _ in peaks), *rates], HEIGHT - BOTTOM, TOP)
    dots = [_Dot(run, x.at(run.flops / run.bytes), y.at(run.flops / run.seconds / 1e9)) for run in shown]
    return element(
        "svg",
        _grid(x, y),
        _caches(x, y, machine),
        _roof(x, y, machine.bandwidth, peaks),
        element("g", [_ring(dot, y, limit_of(dot.run, machine)) for dot in reversed(dots)]),
        element("g", [_point(dot, limit_of(dot.run, machine)) for dot in reversed(dots)]),
        element("g", _names(dots), class_="names"),
        class_="roofline", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label="roofline of the kernels",
    )  # fmt: skip


@dataclass(frozen=True)
class _Dot:
    """A kernel and where its point is."""

    run: Run
    x: float
    y: float

    @property
    def radius(self) -> float:
        return 3.5 + 9 * math.sqrt(self.run.share)


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
                "text", f"{NUMBERS.get(bits, f'float{bits}')}, {units.count(peak, 'FLOP')}/s", x=end, y=height - 8, text_anchor="end"
            )
            for (peak, bits), (_, height) in zip(peaks, corners, strict=True)
        ],
        class_="roof",
    )  # fmt: skip


def _caches(x: _Axis, y: _Axis, machine: Roofline) -> Html | None:
    """The limit of data that is in the caches of all threads: the memory's line, further up."""
    rate = max((rate for _, rate in machine.copies), default=0.0) * machine.threads
    if rate <= machine.bandwidth:
        return None
    top = machine.peak(32)
    first, last = max(x.low, y.low * 1e9 / rate), min(x.high, top / rate)
    if first >= last:
        return None
    path = f"M{x.at(first):.1f} {y.at(first * rate / 1e9):.1f}L{x.at(last):.1f} {y.at(last * rate / 1e9):.1f}"
    at, height = x.at(math.sqrt(first * last)), y.at(rate / 1e9 * math.sqrt(first * last))
    angle = math.degrees(math.atan2(y.at(last * rate / 1e9) - y.at(first * rate / 1e9), x.at(last) - x.at(first)))
    turned = f"rotate({angle:.2f} {at:.1f} {height:.1f})"
    words = element(
        "text", f"caches, {units.count(rate, 'B')}/s", x=at, y=height - 7, text_anchor="middle", transform=turned
    )
    return element("g", element("path", d=path), words, class_="caches")


def _ring(dot: _Dot, y: _Axis, limit: str) -> Html | None:
    """Where the prediction is, beside the measurement."""
    run = dot.run
    if not run.measured or not run.predicted:
        return None
    at, px = round(y.at(run.flops / run.predicted / 1e9), 1), round(dot.x, 1)
    ring = element("circle", cx=px, cy=at, r=round(dot.radius, 1), class_=f"ring {limit}")
    return element("g", element("line", x1=px, x2=px, y1=at, y2=round(dot.y, 1), class_=f"ring {limit}"), ring)


def _point(dot: _Dot, limit: str) -> Html:
    run = dot.run
    known = [("measured", run.measured), ("predicted", run.predicted)]
    words = [
        run.kernel.symbol,
        run.kernel.location,
        *(f"{how} {units.seconds(s)}: {units.count(run.flops / s, 'FLOP')}/s" for how, s in known if s),
        f"{run.flops / run.bytes:.3g} FLOP / byte, {units.share(run.share)} of the time",
    ]
    title = element("title", "\n".join(word for word in words if word))
    return element(
        "circle", title, cx=round(dot.x, 1), cy=round(dot.y, 1), r=round(dot.radius, 1), class_=f"dot {limit}"
    )


def _names(dots: Sequence[_Dot]) -> list[Html]:
    """Names of the slowest kernels, below and beside their points, where they cover no other."""
    texts = []
    taken = [(d.x - d.radius, d.y - d.radius, d.x + d.radius, d.y + d.radius) for d in dots]
    named: set[tuple[int, int]] = set()
    for dot in dots:
        kernel, px, py, radius = dot.run.kernel, dot.x, dot.y, dot.radius
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
