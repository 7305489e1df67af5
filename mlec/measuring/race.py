"""A compiled model against its source: in turn, with as many threads each, and with a word on how quiet the machine was.

Threads that wait for each other take many times as long where others have the processors. There, the two are timed again with one thread
each, by the time that they have a processor: that one is the same on a busy machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

from mlec.frontends.base import Oracle
from mlec.frontends.source_process import SourceProcess
from mlec.frontends.source_threads import limited_threads
from mlec.measuring.timing import OtherWork, disturbance, interleaved, spread

Actions = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Race:
    """What a race showed.

    Attributes:
        seconds: of each call, by name.
        spreads: of these, as of `spread`.
        threads: of the compiled model; None where it has none of its own.
        source_threads: that the source was held to; None where it takes what it wants, or was not run.
        disturbance: a sentence when the machine was busy and the times say little, else empty.
        least: seconds of a call of the compiled model with all its threads.
        processor_time: whether the times are those on a processor, as the machine was busy.
    """

    seconds: Mapping[str, list[float]]
    spreads: Mapping[str, Mapping[str, float]]
    threads: int | None
    source_threads: int | None
    disturbance: str
    least: float
    processor_time: bool = False


def race(
    actions: Actions,
    threads: int | None,
    oracle: Oracle | None,
    seconds: float = 0.3,
    hold: Callable[[int], None] | None = None,
) -> Race:
    """Times the actions against each other.

    Args:
        actions: the calls of the models, by name: ``"compiled"``, and ``"source"`` if that is to run.
        threads: of the compiled model; None where it has none of its own.
        oracle: what the source's calls ask.
        seconds: to spend, on all together; twice, where the machine is busy.
        hold: gives the compiled model another number of threads, for a machine that is busy; None where it has no such number, or does not
            work on processors.
    """
    found = _race(actions, threads, oracle, seconds)
    if not found.disturbance or hold is None or threads is None or found.source_threads is None:
        return found
    hold(1)
    try:
        alone = _race({name: _on_processor(action) for name, action in actions.items()}, 1, oracle, seconds)
    finally:
        hold(threads)
    ticks = any(min(times) <= 0 for times in alone.seconds.values())  # in which the system counts a processor's time
    if ticks or disturbance(alone.spreads):
        return found
    return replace(alone, disturbance="", least=found.least, processor_time=True)


def _race(actions: Actions, threads: int | None, oracle: Oracle | None, seconds: float) -> Race:
    source_threads = None
    with ExitStack() as limits:
        if threads is not None and "source" in actions:
            held = limits.enter_context(limited_threads(threads))
            if isinstance(oracle, SourceProcess):
                held = oracle.limit_threads(threads)
            source_threads = threads if held else None
        others = OtherWork()
        times = interleaved(actions, seconds)
        busy = others.processors()
    spreads = {name: spread(values) for name, values in times.items()}
    return Race(
        times, spreads, threads, source_threads, disturbance(spreads, busy, threads or 1), min(times["compiled"])
    )


def _on_processor(action: Callable[[], object]) -> Callable[[], float]:
    """The action, of this thread alone, as one that tells how long it took; without the time that it waited for a processor."""

    def timed() -> float:
        worked, begin = time.thread_time(), time.perf_counter()
        took = action()
        seconds = time.perf_counter() - begin
        return took if isinstance(took, float) else min(seconds, time.thread_time() - worked)

    return timed
