"""A compiled model against its source: in turn, with as many threads each, and with a word on how quiet the machine was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from mlec.frontends.base import Oracle
from mlec.frontends.source_process import SourceProcess
from mlec.frontends.source_threads import limited_threads
from mlec.measuring.timing import OtherWork, disturbance, interleaved, spread


@dataclass(frozen=True)
class Race:
    """What a race showed.

    Attributes:
        seconds: of each call, by name.
        spreads: of these, as of `spread`.
        source_threads: that the source was held to; None where it takes what it wants, or was not run.
        disturbance: a sentence when the machine was busy, else empty.
    """

    seconds: Mapping[str, list[float]]
    spreads: Mapping[str, Mapping[str, float]]
    source_threads: int | None
    disturbance: str


def race(
    actions: Mapping[str, Callable[[], object]], threads: int | None, oracle: Oracle | None, seconds: float = 0.3
) -> Race:
    """Times the actions against each other.

    Args:
        actions: the calls of the models, by name: ``"compiled"``, and ``"source"`` if that is to run.
        threads: of the compiled model; None where it has none of its own.
        oracle: what the source's calls ask.
        seconds: to spend, on all together.
    """
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
    return Race(times, spreads, source_threads, disturbance(spreads, busy, threads or 1))
