"""Our own kernels against the machine: how near each comes to the peak of its arithmetic or of the memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlec
from bench.harness import Case
from bench.peak import Peak
from mlec.ir.dim import evaluate, parse_dim, symbols_of

PROFILES = 30
SHOWN_STRATEGY = 60


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


def kernel_table(timings: list[KernelTiming], peak: Peak, threads: int, least: float = 0.02) -> str:
    """One line for each kernel that takes at least the part ``least`` of its model's kernels."""
    rates = ", ".join(
        f"{flops / 1e9:.0f} GFLOP/s in {'int8' if bits == 8 else f'float{bits}'} ({peak.loaded[bits] / 1e9:.0f} with operands from L1)"
        for bits, flops in peak.flops.items()
    )
    lines = [
        f"Kernels, threads: {threads}. Peak: {rates}; {peak.bandwidth / 1e9:.1f} GB/s. "
        "Work is counted as the graph states it; data in caches moves faster than the bandwidth of the memory.",
        "",
        "| model | batch | kernel | how | time | GFLOP/s | of peak | GB/s | of bandwidth |",
        f"|{'---|' * 9}",
    ]
    whole: dict[tuple[str, int], float] = {}
    for t in timings:
        whole[t.case, t.batch] = whole.get((t.case, t.batch), 0.0) + t.seconds
    for t in timings:
        if t.seconds < least * whole[t.case, t.batch]:
            continue
        flops, rate = t.flops / t.seconds, t.bytes / t.seconds
        figures = [
            f"{t.seconds * 1e6:.1f} us",
            f"{flops / 1e9:.1f}",
            f"{flops / peak.flops.get(t.bits, peak.flops[32]):.0%}",
            f"{rate / 1e9:.1f}",
            f"{rate / peak.bandwidth:.0%}",
        ]
        how = (
            t.strategy if len(t.strategy) <= SHOWN_STRATEGY else t.strategy[:SHOWN_STRATEGY].rsplit(" ", 1)[0] + " ..."
        )
        lines.append(f"| {t.case} | {t.batch} | {t.symbol} | {how} | {' | '.join(figures)} |")
    return "\n".join(lines)
