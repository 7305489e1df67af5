"""Timing several things against each other on a machine that is busy with other work too."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def interleaved(
    actions: Mapping[str, Callable[[], object]], seconds: float = 0.3, least: int = 3, most: int = 10_000
) -> dict[str, list[float]]:
    """Runs the actions in turn, so that whatever disturbs the machine disturbs all of them.

    Args:
        actions: what to time, by name; each is run once before.
        seconds: time to spend, on all together.
        least, most: rounds, whatever the time.

    Returns:
        The seconds that each run took, by name.
    """
    for action in actions.values():
        action()
    times: dict[str, list[float]] = {name: [] for name in actions}
    until = time.perf_counter() + seconds
    rounds = 0
    while rounds < least or (time.perf_counter() < until and rounds < most):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return times
