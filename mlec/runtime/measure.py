"""What `CompiledModel.benchmark` and `CompiledModel.profile` return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlec.errors import UsageError
from mlec.runtime.dims import evaluate
from mlec.runtime.program import KernelInfo
from mlec.wording import plural


@dataclass(frozen=True)
class BenchmarkResult:
    """Latency of one call, from the user's input to the arrays returned, in milliseconds.

    Attributes:
        num_runs: calls measured.
        rows: extent of the first axis of the first input.
        num_threads: threads that one call may use; None when the backend does not say.
        p50, p95, p99: percentiles.
        mean, std, min: of all calls.
        throughput: rows per second, at the mean latency.
    """

    num_runs: int
    rows: int
    num_threads: int | None
    p50: float
    p95: float
    p99: float
    mean: float
    std: float
    min: float
    throughput: float

    @classmethod
    def of(cls, seconds: Sequence[float], rows: int, num_threads: int | None) -> BenchmarkResult:
        """Statistics of the durations of single calls, in seconds."""
        ms = np.asarray(seconds) * 1e3
        p50, p95, p99 = (float(p) for p in np.percentile(ms, [50, 95, 99]))
        mean = float(ms.mean())
        throughput = rows / mean * 1e3 if mean else 0.0
        return cls(len(ms), rows, num_threads, p50, p95, p99, mean, float(ms.std()), float(ms.min()), throughput)

    def to_dict(self) -> dict[str, int | float | str | None]:
        """The fields, and their unit of time, ready for JSON."""
        return asdict(self) | {"unit": "ms"}

    def __str__(self) -> str:
        threads = "" if self.num_threads is None else f", {plural(self.num_threads, 'thread')}"
        head = f"{plural(self.num_runs, 'run')} of {plural(self.rows, 'row')}{threads}"
        names = ("p50", "p95", "p99", "mean", "min")
        row = [f"{getattr(self, name):.4f}" for name in names] + [f"{self.throughput:,.0f}"]
        titles = [f"{name} ms" for name in names] + ["rows/s"]
        return f"{head}\n{_table([titles, row])}"


@dataclass(frozen=True)
class KernelTime:
    """Time of one kernel in one run of the model.

    Attributes:
        kernel: what it is and where it comes from.
        calls: how often one run calls it.
        ms: milliseconds of all its calls in one run.
        share: its part of the time of all kernels, 0 to 1.
        gflops: billions of floating-point operations a second; None when the kernel states none.
    """

    kernel: KernelInfo
    calls: int
    ms: float
    share: float
    gflops: float | None


@dataclass(frozen=True)
class Profile:
    """Time per kernel, slowest first.

    Attributes:
        kernels: one entry for each kernel that ran.
        kernels_ms: milliseconds of all kernels in one run.
        total_ms: milliseconds of one whole call without the profiler, from input to output.
    """

    kernels: tuple[KernelTime, ...]
    kernels_ms: float
    total_ms: float

    @classmethod
    def of(
        cls,
        times: Mapping[str, tuple[int, float]],
        kernels: Sequence[KernelInfo],
        binding: Mapping[str, int],
        total: float,
    ) -> Profile:
        """From what `Executable.time_kernels` measured.

        Args:
            times: calls and seconds by symbol.
            kernels: descriptions; a symbol without one is listed under its own name.
            binding: values of the symbolic dims in this run.
            total: seconds of one whole call.
        """
        known = {kernel.symbol: kernel for kernel in kernels}
        whole = sum(seconds for _, seconds in times.values())
        entries = []
        for symbol, (calls, seconds) in sorted(times.items(), key=lambda item: -item[1][1]):
            kernel = known.get(symbol) or KernelInfo(symbol=symbol, op=symbol, location="")
            share = seconds / whole if whole else 0.0
            entries.append(KernelTime(kernel, calls, seconds * 1e3, share, _gflops(kernel, binding, calls, seconds)))
        return cls(tuple(entries), whole * 1e3, total * 1e3)

    def to_dict(self) -> dict[str, Any]:
        """The profile ready for JSON."""
        return {
            "unit": "ms",
            "total_ms": self.total_ms,
            "kernels_ms": self.kernels_ms,
            "kernels": [
                {
                    "symbol": entry.kernel.symbol,
                    "op": entry.kernel.op,
                    "location": entry.kernel.location,
                    "calls": entry.calls,
                    "ms": entry.ms,
                    "share": entry.share,
                    "gflops": entry.gflops,
                }
                for entry in self.kernels
            ],
        }

    def __str__(self) -> str:
        rows = [["op", "kernel", "calls", "ms", "share", "GFLOP/s", "source"]]
        rows += [
            [
                _shortened(entry.kernel.op, 20),
                _shortened(entry.kernel.symbol, 32),
                str(entry.calls),
                f"{entry.ms:.4f}",
                f"{entry.share:.1%}",
                "" if entry.gflops is None else f"{entry.gflops:.1f}",
                _shortened(entry.kernel.location, 32),
            ]
            for entry in self.kernels
        ]
        return f"one call {self.total_ms:.4f} ms, its kernels {self.kernels_ms:.4f} ms\n{_table(rows)}"


def _gflops(kernel: KernelInfo, binding: Mapping[str, int], calls: int, seconds: float) -> float | None:
    try:
        flops = evaluate(kernel.flops, binding)
    except UsageError:  # an expression that is more than a dim
        return None
    return flops * calls / seconds / 1e9 if flops and seconds else None


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in aligned columns; numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    numeric = [all(row[column][:1].isdigit() or not row[column] for row in rows[1:]) for column in range(len(widths))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in rows
    )
