"""Times several implementations of one model in turn.

A `Case` is a trained model with inputs; a `Competitor` turns it into a function of the inputs. All functions of a case run in one process,
in rounds A B C A B C ..., so that a drift of the machine's speed meets all of them alike. Every figure is a ratio within such a run.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np

ROUNDS = 10
FEWEST_ROUNDS = 3
ROUND_SECONDS = 0.02
BATCH_SECONDS = 10.0
"""Time for all competitors at one batch size, after which no further round is begun (but the fewest)."""
WARM_SECONDS = 0.02
"""At the begin of a turn calls do not count (one at least): they fill the caches, wake the threads, and last until the system has spread
those over the processors."""
SETTLE_SECONDS = 0.004
MOST_SETTLE_SECONDS = 0.4
BUSY_SHARE = 0.2


@dataclass
class Case:
    """One trained model.

    Attributes:
        name, group: for the tables.
        framework: "sklearn", "xgboost", "lightgbm" or "torch".
        model: the trained object.
        inputs: makes the inputs (a list of arrays) for a batch size.
        batches: the batch sizes to time.
        method: the estimator method to time; empty for networks.
    """

    name: str
    group: str
    framework: str
    model: Any
    inputs: Callable[[int], list[Any]]
    batches: Sequence[int] = (1, 64, 1024)
    method: str = ""


Predict = Callable[[list[Any]], Any]


class UnavailableError(Exception):
    """A competitor that should run this case cannot, here; the message says why. The table shows it."""


class OtherKindError(Exception):
    """A competitor does not run models of this kind: its cell stays empty."""


class Competitor(ABC):
    """Something that runs trained models."""

    name: ClassVar[str]

    @abstractmethod
    def prepare(self, case: Case, threads: int) -> Predict:
        """The function to time; conversion and compilation happen here.

        Raises:
            OtherKindError: when it doesn't run models of this kind.
            UnavailableError: when it isn't installed, or the model is too large for it.
        """


@dataclass
class Timing:
    """Seconds of single calls of one competitor; or ``error``, the reason why there are none (batch 0: for all batches)."""

    case: str
    group: str
    batch: int
    threads: int
    competitor: str
    p50: float = 0.0
    p99: float = 0.0
    calls: int = 0
    max_difference: float = 0.0
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Lane:
    competitor: str
    predict: Predict
    seconds: list[float] = field(default_factory=list)


def run_case(
    case: Case, competitors: Sequence[Competitor], threads: int, log: Callable[[str], None] = lambda text: None
) -> list[Timing]:
    """Times every competitor that takes the case, at each batch size."""
    prepared: dict[str, Predict] = {}
    timings: list[Timing] = []
    for competitor in competitors:
        try:
            log(f"{case.name}: preparing {competitor.name}")
            prepared[competitor.name] = competitor.prepare(case, threads)
        except OtherKindError as reason:
            log(f"{case.name}: no {competitor.name}: {reason}")
        except Exception as error:
            log(f"{case.name}: {competitor.name} failed: {reason_of(error)}")
            timings.append(Timing(case.name, case.group, 0, threads, competitor.name, error=reason_of(error)))
    for batch in case.batches:
        inputs = case.inputs(batch)
        timings += _time_batch(case, batch, inputs, prepared, threads)
    return timings


def _time_batch(case: Case, batch: int, inputs: list[Any], prepared: dict[str, Predict], threads: int) -> list[Timing]:
    lanes: list[_Lane] = []
    outputs: dict[str, list[np.ndarray[Any, Any]]] = {}
    failed: list[Timing] = []
    for name, predict in prepared.items():
        try:
            outputs[name] = _floats(predict(inputs))
        except Exception as error:
            failed.append(Timing(case.name, case.group, batch, threads, name, error=reason_of(error)))
            continue
        lanes.append(_Lane(name, predict))
    end = time.perf_counter() + BATCH_SECONDS
    for turn in range(ROUNDS):
        if turn >= FEWEST_ROUNDS and time.perf_counter() > end:
            break
        for lane in lanes:
            settle()
            _repeat(lane.predict, inputs, WARM_SECONDS)
            lane.seconds += _repeat(lane.predict, inputs, ROUND_SECONDS)
    reference = outputs.get("source") or next(iter(outputs.values()), [])
    return failed + [
        Timing(
            case.name, case.group, batch, threads, lane.competitor, float(np.median(lane.seconds)), float(np.quantile(lane.seconds, 0.99)),
            len(lane.seconds), _difference(reference, outputs[lane.competitor]),
        )
        for lane in lanes
    ]  # fmt: skip


def _repeat(predict: Predict, inputs: list[Any], seconds: float) -> list[float]:
    """Calls again and again for so long, once at least.

    Returns:
        The seconds of each call.
    """
    times: list[float] = []
    begin = start = time.perf_counter()
    while start - begin < seconds:
        predict(inputs)
        now = time.perf_counter()
        times.append(now - start)
        start = now
    return times


def settle() -> None:
    """Waits until the threads of whoever had the last turn sleep: pools spin for up to tens of milliseconds after a call, on the cores
    that the next one needs.
    """
    end = time.perf_counter() + MOST_SETTLE_SECONDS
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(SETTLE_SECONDS)
        if time.process_time() - before < BUSY_SHARE * SETTLE_SECONDS:
            return


def reason_of(error: Exception) -> str:
    """In one line of moderate length: the beginning of the message, and of what caused it."""
    if isinstance(error, UnavailableError):
        return str(error)
    text = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return f"{text} (from {reason_of(error.__cause__)})" if isinstance(error.__cause__, Exception) else text


def _floats(outputs: Any) -> list[np.ndarray[Any, Any]]:
    """The numeric outputs."""
    listed = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    arrays = [np.asarray(o) for o in listed]
    return [a.astype(np.float64) for a in arrays if a.dtype.kind in "fiub"]


def _difference(expected: list[np.ndarray[Any, Any]], actual: list[np.ndarray[Any, Any]]) -> float:
    """Largest difference relative to the output's scale; NaN when the outputs are of other shapes."""
    worst = 0.0
    for a, b in zip(expected, actual, strict=False):
        if a.size != b.size:
            return float("nan")
        scale = float(np.max(np.abs(a), initial=0.0)) or 1.0
        worst = max(worst, float(np.max(np.abs(a.ravel() - b.ravel()), initial=0.0)) / scale)
    return worst
