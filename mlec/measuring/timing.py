"""Timing several things against each other on a machine that is busy with other work too.

What disturbs a run only adds to its time, and can multiply it: a library whose threads wait for each other stands still when one of
them has no processor. The least of many short runs is what the code itself takes, and what ratios are made of; the spread tells how
much the machine was disturbed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import quantiles

import psutil

from mlec.wording import plural

BUSY = 5.0
"""From this ratio of the 95th percentile to the least on, a machine was busy."""
SPARE = 0.25
"""Processors that may be missing to give each thread one, before a machine counts as busy."""
NOT_WORK = ("idle", "iowait", "guest", "guest_nice")
"""Of a processor's times those in which it does nothing, and those that are part of another one."""
TURN_SECONDS, TURN_CALLS = 0.002, 10
"""What an action gets before it is another one's turn. Threads of libraries go on looking for work for a while when theirs is done: the
first of several calls, which they disturb, is not counted."""


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
        actions: what to time, by name; each is run once before. One that returns a float took so many seconds, wherever it ran. A short
            one is run several times in turn.
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
            turn = [_seconds(action)]
            end = time.perf_counter() + TURN_SECONDS - turn[0]
            while len(turn) < TURN_CALLS and time.perf_counter() < end:
                turn.append(_seconds(action))
            times[name] += turn[1:] or turn
        rounds += 1
    return times


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    took = action()
    return took if isinstance(took, float) else time.perf_counter() - start


class OtherWork:
    """How many processors work for others, from when this was made on."""

    def __init__(self) -> None:
        self._processors = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._begin = self._now()

    def processors(self) -> tuple[float, int]:
        """Processors that were busy with other things than this process and its children, and how many it may use; nothing where the
        system does not tell."""
        begin, end = self._begin, self._now()
        seconds = end[0] - begin[0]
        if seconds <= 0 or not self._processors:
            return 0.0, len(self._processors)
        return max(0.0, (end[1] - begin[1] - (end[2] - begin[2])) / seconds), len(self._processors)

    def _now(self) -> tuple[float, float, float]:
        """The time; seconds that the processors were busy, and with what is ours."""
        try:
            of_each = psutil.cpu_times(percpu=True)
            busy = sum(
                sum(of_each[i]) - sum(getattr(of_each[i], name, 0.0) for name in NOT_WORK) for i in self._processors
            )
            # Of children only those that still run: there is one at most, and it answers questions.
            ours = sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))
        except (psutil.Error, OSError, IndexError):
            return 0.0, 0.0, 0.0
        return time.perf_counter(), busy, ours + time.process_time()


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Of the times of single runs ``min``, ``p50`` and ``p95``, in milliseconds."""
    cuts = quantiles(seconds, n=20, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 19
    return {"min": min(seconds) * 1e3, "p50": cuts[9] * 1e3, "p95": cuts[18] * 1e3}


def disturbance(
    spreads: Mapping[str, Mapping[str, float]], others: tuple[float, int] = (0.0, 0), threads: int = 1
) -> str:
    """A sentence on how busy the machine was while things were timed, each that was disturbed by name; empty when it was quiet.

    Args:
        spreads: of what was timed, by name.
        others: as `OtherWork` tells.
        threads: of what was timed.
    """
    signs = []
    busy, usable = others
    if busy > max(usable - threads, 0) + SPARE:
        signs.append(f"others kept {busy:.1f} of its {plural(usable, 'processor')} at work")
    ratios = {name: found["p95"] / found["min"] for name, found in spreads.items() if found["min"] > 0}
    disturbed = {name: ratio for name, ratio in ratios.items() if ratio >= BUSY}
    if disturbed:
        calls = ", ".join(f"{ratio:.0f}x for the {name} model" for name, ratio in disturbed.items())
        signs.append(f"p95 of the calls is a multiple of their minimum, {calls}")
    return f"the machine was busy, so that times and ratio are not reliable: {'; '.join(signs)}" if signs else ""
