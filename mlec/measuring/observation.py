"""What running a compiled model shows, for its report: the time of each kernel beside its prediction, and the memory at each call."""

from __future__ import annotations

import time
from typing import Any

from mlec.backends.base import CompiledModule
from mlec.ir.dim import parse_dim
from mlec.measuring.cost_model import CostModel, value_of
from mlec.report import OptimizationReport
from mlec.runtime import CompiledModel

SECONDS = 0.03
"""How long kernels are timed; more where that is not enough for `FEWEST` runs."""
FEWEST, MOST = 3, 30


def observe(
    report: OptimizationReport, compiled: CompiledModel, inputs: list[Any], module: CompiledModule, model: CostModel
) -> None:
    """Fills ``profile`` and the timeline of ``memory``; leaves them empty where the backend tells neither.

    Args:
        report: of the model, with its times measured.
        compiled: the model.
        inputs: on which it was measured.
        module: what it was made of.
        model: predicts, for the threads that it runs with.
    """
    executable: Any = compiled.executable
    if not hasattr(executable, "time_kernels"):
        return
    seconds, binding = _least(compiled, inputs)
    predicted, kernels = model.module_seconds(module, binding, inputs)
    report.profile = {
        "rows": report.timing["measured"]["rows"],
        "extents": binding,
        "seconds": report.timing["measured"]["all_threads_ms"] / 1e3,
        "predicted_seconds": predicted,
        "kernels": [
            {
                "symbol": kernel.symbol,
                "seconds": seconds[kernel.symbol],
                "predicted_seconds": kernels.get(kernel.symbol),
                "flops": value_of(parse_dim(kernel.flops), binding),
                "bytes": value_of(parse_dim(kernel.bytes), binding),
            }
            for kernel in module.program.kernels
            if kernel.symbol in seconds
        ],
    }
    if (plan := compiled.memory_plan(inputs)) is not None:
        symbols = [kernel.symbol for kernel in module.program.kernels]
        report.memory["timeline"] = {
            "rows": report.timing["measured"]["rows"],
            "arena_bytes": plan.arena_nbytes,
            "steps": [{"symbol": s, "live_bytes": live} for s, live in zip(symbols, plan.live, strict=True)],
        }


def _least(compiled: CompiledModel, inputs: list[Any]) -> tuple[dict[str, float], dict[str, int]]:
    """By symbol the least seconds of a call of the kernel; and the extents of the symbolic dims."""
    least: dict[str, float] = {}
    end = time.perf_counter() + SECONDS
    for run in range(MOST):
        times, binding = compiled.kernel_times(inputs, 1)
        for symbol, (_, seconds) in times.items():
            least[symbol] = min(seconds, least.get(symbol, seconds))
        if run + 1 >= FEWEST and time.perf_counter() > end:
            break
    return least, binding
