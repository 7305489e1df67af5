"""The memory of intermediate values while the kernels run, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

from mlec.reporting import units
from mlec.reporting.markup import Html, element
from mlec.reporting.schema import MemoryStep, Timeline
from mlec.wording import plural

WIDTH, HEIGHT = 860, 200
LEFT, RIGHT, TOP, BOTTOM = 74, 12, 14, 34
TICKS = 4


def timeline(memory: Timeline) -> Html | None:
    """A column for each call of a kernel, as high as what is alive then; None where nothing is known, or nothing is kept."""
    steps = memory.steps
    top = max((step.live_bytes for step in steps), default=0)
    if not top:
        return None
    top = max(top, memory.arena_bytes)
    width = (WIDTH - LEFT - RIGHT) / len(steps)
    return element(
        "svg",
        _grid(top, len(steps)),
        element("path", d=_outline(steps, top, width), class_="area"),
        element("g", [_column(i, step, width) for i, step in enumerate(steps)], class_="columns"),
        _arena(memory.arena_bytes, top),
        class_="timeline", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img",
        aria_label=f"memory of intermediate values over {plural(len(steps), 'kernel call')}",
    )  # fmt: skip


def _y(live: float, top: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * live / top


def _outline(steps: Sequence[MemoryStep], top: int, width: float) -> str:
    """Up and down along the steps, closed at the bottom; equal neighbours are one line."""
    path = [f"M{LEFT} {HEIGHT - BOTTOM}"]
    level = -1
    for i, step in enumerate(steps):
        if step.live_bytes != level:
            level = step.live_bytes
            path.append(f"H{LEFT + i * width:.1f}V{_y(level, top):.1f}")
    return "".join(path) + f"H{WIDTH - RIGHT}V{HEIGHT - BOTTOM}Z"


def _column(i: int, step: MemoryStep, width: float) -> Html:
    words = f"{i + 1}: {step.symbol}\n{units.size(step.live_bytes)}"
    return element(
        "rect", element("title", words), x=round(LEFT + i * width, 1), y=TOP, width=round(width, 2), height=HEIGHT - TOP - BOTTOM,
    )  # fmt: skip


def _arena(arena: int, top: int) -> Html | None:
    if not arena:
        return None
    y = round(_y(arena, top), 1)
    return element(
        "g",
        element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y),
        element("text", f"arena, {units.size(arena)}", x=WIDTH - RIGHT - 4, y=y - 4, text_anchor="end"),
        class_="limit",
    )


def _grid(top: int, calls: int) -> Html:
    lines, texts = [], []
    for i in range(TICKS + 1):
        y = round(_y(top * i / TICKS, top), 1)
        lines.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
        texts.append(element("text", units.size(top * i / TICKS), x=LEFT - 8, y=y + 4, text_anchor="end"))
    texts.append(
        element("text", f"kernel calls, 1 to {calls:,}", x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 10, text_anchor="middle")
    )  # fmt: skip
    return element("g", lines, texts, class_="grid")
