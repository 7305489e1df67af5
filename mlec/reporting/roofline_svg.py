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
NAME_CHARACTERS = 24
MARGIN, STEP = 6, 24
"""How far words keep from the ends of a line, and how far they go on to the next place that might be free."""
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
    dots = [_Dot.of(run, x, y) for run in shown]
    taken = [box for dot in dots for box in dot.boxes]
    return element(
        "svg",
        _grid(x, y),
        _caches(x, y, machine, taken),
        _roof(x, y, machine.bandwidth, peaks, taken),
        element("g", [_ring(dot, limit_of(dot.run, machine)) for dot in reversed(dots)]),
        element("g", [_point(dot, limit_of(dot.run, machine)) for dot in reversed(dots)]),
        element("g", _names(dots, taken), class_="names"),
        class_="roofline", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label="roofline of the kernels",
    )  # fmt: skip


_Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@dataclass(frozen=True)
class _Dot:
    """A kernel, where its point is, and how high the ring of what was predicted; None: there is no ring."""

    run: Run
    x: float
    y: float
    ring: float | None

    @staticmethod
    def of(run: Run, x: _Axis, y: _Axis) -> _Dot:
        ring = y.at(run.flops / run.predicted / 1e9) if run.measured and run.predicted else None
        return _Dot(run, x.at(run.flops / run.bytes), y.at(run.flops / run.seconds / 1e9), ring)

    @property
    def radius(self) -> float:
        return 3.5 + 9 * math.sqrt(self.run.share)

    @property
    def boxes(self) -> list[_Box]:
        """What no words should cover: the point, the ring and the line between them."""
        radius = self.radius
        heights = [self.y] if self.ring is None else [self.y, self.ring]
        round_ones = [(self.x - radius, at - radius, self.x + radius, at + radius) for at in heights]
        return [*round_ones, (self.x - 1, min(heights), self.x + 1, max(heights))]


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


def _roof(x: _Axis, y: _Axis, bandwidth: float, peaks: Sequence[tuple[float, int]], taken: list[_Box]) -> Html:
    """The limit of the memory, and that of the arithmetic for each width of floats: ``(operations a second, bits)``, highest first."""
    slope = bandwidth / 1e9
    # The memory line enters the plot at its left or at its bottom edge.
    first = max(x.low, y.low / slope)
    start = (x.at(first), y.at(first * slope))
    corners = [(x.at(peak / bandwidth), y.at(peak / 1e9)) for peak, _ in peaks]
    corner, end = corners[0], WIDTH - RIGHT
    words = [f"{NUMBERS.get(bits, f'float{bits}')}, {units.count(peak, 'FLOP')}/s" for peak, bits in peaks]
    return element(
        "g",
        element("path", d=f"M{start[0]:.1f} {start[1]:.1f}L{corner[0]:.1f} {corner[1]:.1f}"),
        [element("path", d=f"M{left:.1f} {height:.1f}H{end}") for left, height in corners],
        [
            _along((end, height), (left, height), said, taken)
            for said, (left, height) in zip(words, corners, strict=True)
        ],
        _along(start, corner, f"memory, {units.count(bandwidth, 'B')}/s", taken),
        class_="roof",
    )


def _along(start: tuple[float, float], end: tuple[float, float], words: str, taken: list[_Box]) -> Html:
    """Words above a line, in its direction, as near to the start as nothing else is; they are added to what is taken."""
    length = math.dist(start, end)
    across, down = ((b - a) / length for a, b in zip(start, end, strict=True))
    upright = (across, down) if across > 0 else (-across, -down)  # words go from left to right
    half = len(words) * CHARACTER / 2

    def middle(far: float) -> tuple[float, float]:
        return start[0] + far * across, start[1] + far * down

    def boxes(far: float) -> list[_Box]:
        """Of the characters, the one in the middle so far along the line."""
        x, y = middle(far)
        steps = [CHARACTER * i - half for i in range(len(words) + 1)]
        places = [(x + step * upright[0] + 12 * upright[1], y + step * upright[1] - 12 * upright[0]) for step in steps]
        return [(px - 5, py - 5, px + 5, py + 5) for px, py in places]

    tried = [MARGIN + half + STEP * i for i in range(int(max(0.0, length - 2 * (MARGIN + half)) / STEP) + 1)]
    far = next((far for far in tried if not any(_overlap(a, b) for a in boxes(far) for b in taken)), tried[0])
    taken += boxes(far)
    x, y = middle(far)
    angle = math.atan2(upright[1], upright[0])
    turned = f"rotate({math.degrees(angle):.2f} {x:.1f} {y:.1f})"
    return element("text", words, x=round(x, 1), y=round(y - 8, 1), text_anchor="middle", transform=turned)


def _caches(x: _Axis, y: _Axis, machine: Roofline, taken: list[_Box]) -> Html | None:
    """The limit of data that is in the caches of all threads: the memory's line, further up."""
    rate = max((rate for _, rate in machine.copies), default=0.0) * machine.threads
    if rate <= machine.bandwidth:
        return None
    top = machine.peak(32)
    first, last = max(x.low, y.low * 1e9 / rate), min(x.high, top / rate)
    if first >= last:
        return None
    start, end = ((x.at(value), y.at(value * rate / 1e9)) for value in (first, last))
    path = f"M{start[0]:.1f} {start[1]:.1f}L{end[0]:.1f} {end[1]:.1f}"
    words = _along(start, end, f"caches, {units.count(rate, 'B')}/s", taken)
    return element("g", element("path", d=path), words, class_="caches")


def _ring(dot: _Dot, limit: str) -> Html | None:
    """Where the prediction is, beside the measurement."""
    if dot.ring is None:
        return None
    at, px = round(dot.ring, 1), round(dot.x, 1)
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


def _names(dots: Sequence[_Dot], taken: list[_Box]) -> list[Html]:
    """Names of the slowest kernels, beside their points, where they cover nothing."""
    texts = []
    named: set[tuple[int, int]] = set()
    for dot in dots:
        kernel, px, py, radius = dot.run.kernel, dot.x, dot.y, dot.radius
        spot = (round(px), round(py))
        if spot in named:  # equal kernels lie on one point
            continue
        named.add(spot)
        words = kernel.symbol
        if len(words) > NAME_CHARACTERS:  # the end tells it from others
            words = f"{words[: NAME_CHARACTERS // 2]}…{words[1 - NAME_CHARACTERS // 2 :]}"
        width = len(words) * CHARACTER
        sides = [
            (start, below) for below in (9, 26, -6 - 2 * radius) for start in (px + radius + 3, px - radius - 3 - width)
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


def _name_box(x: float, baseline: float, width: float) -> _Box:
    return (x, baseline - 11, x + width, baseline + 4)


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
