"""Watching a model at work: calls, rows, errors, latency, memory."""

from __future__ import annotations

import bisect
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from mlec.errors import MlecError, RuntimeUnavailableError, UsageError
from mlec.runtime.model import CompiledModel
from mlec.runtime.program import Array

BOUNDS: Final = tuple(float(f"{step}e{power}") for power in range(-6, 2) for step in (1, 2, 5))
"""Upper bounds of the buckets of latency in seconds, 1 us to 50 s."""

FORMATS: Final = ("dict", "prometheus")


class Metrics:
    """What one model did since it was loaded. Calling it gives the numbers, see `__call__`; any number of threads may count.

    It is a collector as ``prometheus_client`` has them: ``prometheus_client.REGISTRY.register(model.metrics)`` puts it beside the other
    metrics of a process.

    Args:
        name: of the model, the label of its metrics.
        memory: gives the bytes that the model needs for the largest inputs so far.
    """

    def __init__(self, name: str, memory: Callable[[], int]) -> None:
        self.name = name
        self._memory = memory
        self._lock = threading.Lock()
        self._rows = 0
        self._seconds = 0.0
        self._buckets = [0] * (len(BOUNDS) + 1)
        self._errors: Counter[str] = Counter()

    def count(self, seconds: float, result: object) -> None:
        """A call that gave a result; of its first array, the first axis are rows."""
        first = result[0] if isinstance(result, (list, tuple)) and result else result
        shape = getattr(first, "shape", ())
        with self._lock:
            self._rows += int(shape[0]) if shape else 1
            self._seconds += seconds
            self._buckets[bisect.bisect_left(BOUNDS, seconds)] += 1

    def count_error(self, error: BaseException) -> None:
        """A call that raised; by our code, or the name of another library's exception."""
        with self._lock:
            self._errors[error.code if isinstance(error, MlecError) else type(error).__name__] += 1

    def __call__(self, format: str = "dict") -> Any:
        """The numbers so far.

        Args:
            format: ``"dict"``, or ``"prometheus"``: text as Prometheus reads it, by ``prometheus_client`` (the extra ``metrics``).

        Returns:
            A dict: ``inferences`` (calls that gave a result), ``rows``, ``errors`` (calls that raised, by code), ``peak_memory_bytes``
            (weights and buffers for the largest inputs so far), and ``latency_seconds`` of the calls that gave a result: ``sum``,
            ``mean``, ``p50``, ``p95``, ``p99`` (within the bucket, evenly spread; None before the first call) and ``buckets``: for each
            upper bound, the calls that took at most so long; the last one is infinity.

        Raises:
            UsageError: for another format.
            RuntimeUnavailableError: ``E_MISSING_PACKAGE``: ``prometheus_client`` is not installed.
        """
        if format not in FORMATS:
            raise UsageError(
                f"there are no metrics in the form of {format!r}", hint=f"ask for {' or '.join(map(repr, FORMATS))}"
            )
        if format == "prometheus":
            client = _prometheus()
            registry = client.CollectorRegistry()
            registry.register(self)
            return client.generate_latest(registry).decode()
        rows, seconds, buckets, errors = self._snapshot()
        calls = sum(buckets)
        cumulative = _cumulative(buckets)
        return {
            "inferences": calls,
            "rows": rows,
            "errors": errors,
            "peak_memory_bytes": self._memory(),
            "latency_seconds": {
                "sum": seconds,
                "mean": seconds / calls if calls else None,
                **{f"p{percent}": _quantile(cumulative, percent / 100) for percent in (50, 95, 99)},
                "buckets": dict(cumulative),
            },
        }

    def collect(self) -> Iterator[Any]:
        """The numbers as metric families of ``prometheus_client``."""
        core = _prometheus().core
        rows, seconds, buckets, errors = self._snapshot()
        label, name = ["model"], [self.name]
        calls = core.CounterMetricFamily("mlec_inferences", "Calls that gave a result.", labels=label)
        calls.add_metric(name, sum(buckets))
        yield calls
        all_rows = core.CounterMetricFamily("mlec_rows", "Rows of their results.", labels=label)
        all_rows.add_metric(name, rows)
        yield all_rows
        failed = core.CounterMetricFamily("mlec_errors", "Calls that raised.", labels=[*label, "code"])
        for code, number in errors.items():
            failed.add_metric([*name, code], number)
        yield failed
        latency = core.HistogramMetricFamily("mlec_latency_seconds", "Time of calls that gave a result.", labels=label)
        bounds = [("+Inf" if bound == float("inf") else repr(bound), number) for bound, number in _cumulative(buckets)]
        latency.add_metric(name, bounds, seconds)
        yield latency
        memory = core.GaugeMetricFamily(
            "mlec_peak_memory_bytes", "Weights and buffers for the largest inputs.", labels=label
        )
        memory.add_metric(name, self._memory())
        yield memory

    def _snapshot(self) -> tuple[int, float, list[int], dict[str, int]]:
        """Numbers of one moment: rows, seconds, calls by bucket, errors by code."""
        with self._lock:
            return self._rows, self._seconds, list(self._buckets), dict(self._errors)


class WatchedModel(CompiledModel):
    """A model whose calls are counted: ``run``, calling it, and the methods of its source; also by `benchmark` and `profile`."""

    def __init__(self, *arguments: Any, name: str, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._metrics = Metrics(name, self.peak_memory_usage)

    @property
    def metrics(self) -> Metrics:
        """What was counted."""
        return self._metrics

    def run(self, inputs: object, out: Sequence[Array] | None = None) -> list[Array]:
        return self._counted(super().run, inputs, out)  # type: ignore[no-any-return]

    def source_method(self, name: str) -> Callable[[object], Any]:
        method = super().source_method(name)
        return lambda X: self._counted(method, X)

    def _counted(self, call: Callable[..., Any], *arguments: object) -> Any:
        begin = time.perf_counter()
        try:
            result = call(*arguments)
        except Exception as error:
            self._metrics.count_error(error)
            raise
        self._metrics.count(time.perf_counter() - begin, result)
        return result


def _cumulative(buckets: Sequence[int]) -> list[tuple[float, int]]:
    """For each upper bound, how many calls took at most so long."""
    total, result = 0, []
    for bound, number in zip((*BOUNDS, float("inf")), buckets, strict=True):
        total += number
        result.append((bound, total))
    return result


def _quantile(cumulative: Sequence[tuple[float, int]], part: float) -> float | None:
    """The time that this part of the calls took at most; of those above the last bound nothing is known but that."""
    wanted, below, lower = part * cumulative[-1][1], 0, 0.0
    if not wanted:
        return None
    for bound, number in cumulative:
        if number >= wanted:
            return lower if bound == float("inf") else lower + (bound - lower) * (wanted - below) / (number - below)
        below, lower = number, bound
    return lower


def _prometheus() -> Any:
    try:
        import prometheus_client
        import prometheus_client.core
    except ImportError as error:
        raise RuntimeUnavailableError(
            "metrics for Prometheus need the package prometheus-client", code="E_MISSING_PACKAGE",
            hint="pip install 'mlec[metrics]', or metrics() for a dict",
        ) from error  # fmt: skip
    return prometheus_client
