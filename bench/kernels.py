"""Our own kernels against the machine: how near each comes to the peak of its arithmetic or of the memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlec
from bench.harness import Case
from bench.peak import Peak
from bench.table import seconds_text
from mlec.ir.dim import evaluate, parse_dim, symbols_of

PROFILES = 30
SHOWN_STRATEGY = 60
LEAST_SHARE = 0.05
"""Of the time of a model's kernels, below which a kernel is not shown."""


@dataclass(frozen=True)
class KernelTiming:
    """The shortest time of one kernel.

    Attributes:
        case, batch: where it runs.
        symbol, strategy: which kernel, and how it was made.
        seconds: of all its calls in one run of the model.
        flops, bytes: of these calls; bytes are those of operands and results, each once.
        bits: width of its floats; 8 of products of bytes.
    """

    case: str
    batch: int
    symbol: str
    strategy: str
    seconds: float
    flops: int
    bytes: int
    bits: int


def time_kernels(case: Case, threads: int, log: Callable[[str], None] = lambda text: None) -> list[KernelTiming]:
    """Profiles the compiled model at each batch size of the case; slowest kernels first."""
    log(f"{case.name}: kernels")
    example = tuple(case.inputs(4)) if case.framework == "torch" else None
    model = mlec.compile(case.model, example, validate=False, progress=False, num_threads=threads)
    notes = {entry["symbol"]: entry for entry in model.report.kernels}
    timings = []
    for batch in case.batches:
        inputs, shortest = case.inputs(batch), dict[str, tuple[float, int]]()
        for _ in range(PROFILES):
            for entry in model.profile(*inputs).kernels:
                symbol = entry.kernel.symbol
                best = shortest.get(symbol, (float("inf"), entry.calls))
                shortest[symbol] = min(best, (entry.ms / 1e3, entry.calls))
        for symbol, (seconds, calls) in sorted(shortest.items(), key=lambda item: -item[1][0]):
            if (note := notes.get(symbol)) is None:
                continue
            flops, moved = (_number(note[key], batch) * calls for key in ("flops", "bytes"))
            timings.append(
                KernelTiming(case.name, batch, symbol, note["strategy"], seconds, flops, moved, note["bits"])
            )
    return timings


def _number(work: int | str, extent: int) -> int:
    dim = parse_dim(work)
    return evaluate(dim, dict.fromkeys(symbols_of(dim), extent))


def kernel_table(timings: Sequence[KernelTiming], peak: Peak, threads: int, least: float = LEAST_SHARE) -> str:
    """One line for each kernel that takes at least the part ``least`` of its model's kernels; kernels that do the same work share one."""
    rates = ", ".join(
        f"{flops / 1e9:.0f} GFLOP/s in {'int8' if bits == 8 else f'float{bits}'} ({peak.loaded[bits] / 1e9:.0f} with operands from L1)"
        for bits, flops in peak.flops.items()
    )
    lines = [
        f"Kernels, threads: {threads}. Peak: {rates}; {peak.bandwidth / 1e9:.1f} GB/s. "
        "Work is counted as the graph states it (a Winograd convolution does less); data in caches moves faster than the bandwidth of "
        "the memory.",
        "",
        "| model | batch | kernel | how | time | GFLOP/s | of peak | of that from L1 | GB/s | of bandwidth |",
        f"|{'---|' * 10}",
    ]
    whole: dict[tuple[str, int], float] = defaultdict(float)
    alike: dict[tuple[str, int, str, int, int, int], list[KernelTiming]] = defaultdict(list)
    for t in timings:
        whole[t.case, t.batch] += t.seconds
        alike[t.case, t.batch, t.strategy, t.flops, t.bytes, t.bits].append(t)
    for (case, batch, strategy, *_, bits), group in alike.items():
        seconds, first = sum(t.seconds for t in group), group[0]
        if seconds < least * whole[case, batch]:
            continue
        flops, rate = (sum(work) / seconds for work in ((t.flops for t in group), (t.bytes for t in group)))
        best, loaded = (peaks.get(bits, peaks[32]) for peaks in (peak.flops, peak.loaded))
        figures = [
            seconds_text(seconds / len(group)),
            f"{flops / 1e9:.1f}",
            f"{flops / best:.0%}",
            f"{flops / loaded:.0%}",
            f"{rate / 1e9:.1f}",
            f"{rate / peak.bandwidth:.0%}",
        ]
        name = first.symbol + (f" and {len(group) - 1} alike" if len(group) > 1 else "")
        how = strategy if len(strategy) <= SHOWN_STRATEGY else strategy[:SHOWN_STRATEGY].rsplit(" ", 1)[0] + " ..."
        lines.append(f"| {case} | {batch} | {name} | {how} | {' | '.join(figures)} |")
    return "\n".join(lines)
