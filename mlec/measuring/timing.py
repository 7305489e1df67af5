"""Timing several things against each other on a machine that is busy with other work too.

What disturbs a run only adds to its time, and can multiply it: a library whose threads wait for each other stands still when one of
them has no processor. The least of many short runs is what the code itself takes, and what ratios are made of; the spread tells how
much the machine was disturbed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import quantiles

BUSY = 5.0
"""From this ratio of the 95th percentile to the least on, a machine was busy."""


def interleaved(
    actions: Mapping[str, Callable[[], object]],
    seconds: float = 0.3,
    least: int = 3,
    most: int = 10_000,
    enough: int = 20,
    patience: float = 2.0,
) -> dict[str, list[float]]:
    """Runs the actions in turn, so that whatever disturbs the machine disturbs all of them.

    Args:
        actions: what to time, by name; each is run once before. One that returns a float took so many seconds, wherever it ran.
        seconds: time to spend, on all together.
        least, most: rounds, whatever the time.
        enough: rounds that the least of them can be trusted of; for fewer the time may grow
        patience: by this factor.

    Returns:
        The seconds that each run took, by name.
    """
    for action in actions.values():
        action()
    times: dict[str, list[float]] = {name: [] for name in actions}
    begin = time.perf_counter()
    rounds = 0
    while rounds < least or (
        rounds < most and time.perf_counter() - begin < seconds * (patience if rounds < enough else 1)
    ):
        for name, action in actions.items():
            start = time.perf_counter()
            took = action()
            times[name].append(took if isinstance(took, float) else time.perf_counter() - start)
        rounds += 1
    return times


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Of the times of single runs ``min``, ``p50`` and ``p95``, in milliseconds."""
    cuts = quantiles(seconds, n=20, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 19
    return {"min": min(seconds) * 1e3, "p50": cuts[9] * 1e3, "p95": cuts[18] * 1e3}


def disturbance(spreads: Mapping[str, Mapping[str, float]]) -> str:
    """A sentence on how busy the machine was while things were timed, each that was disturbed by name; empty when it was quiet."""
    ratios = {name: found["p95"] / found["min"] for name, found in spreads.items() if found["min"] > 0}
    disturbed = {name: ratio for name, ratio in ratios.items() if ratio >= BUSY}
    if not disturbed:
        return ""
    calls = ", ".join(f"{ratio:.0f}x for the {name} model" for name, ratio in disturbed.items())
    return f"the machine was busy, times and ratio are not reliable: p95 of the calls is a multiple of their minimum, {calls}"
