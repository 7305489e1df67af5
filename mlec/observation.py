"""What one run of a compiled model shows, for its report: the time of each kernel beside its prediction, the memory at each call."""

from __future__ import annotations

import time
from typing import Any

from mlec.backends.base import CompiledModule
from mlec.cost_model import CostModel
from mlec.ir.dim import evaluate, parse_dim, symbols_of
from mlec.report import OptimizationReport
from mlec.runtime import CompiledModel
from mlec.runtime.timeline import live_by_call

SECONDS = 0.1
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
    predicted, kernels = model.module_seconds(module, binding)
    report.profile = {
        "rows": report.timing["measured"]["rows"],
        "extents": binding,
        "seconds": report.timing["measured"]["compiled_ms"] / 1e3,
        "predicted_seconds": predicted,
        "kernels": [
            {
                "symbol": kernel.symbol,
                "seconds": seconds[kernel.symbol],
                "predicted_seconds": kernels.get(kernel.symbol),
                "flops": _value(kernel.flops, binding),
                "bytes": _value(kernel.bytes, binding),
            }
            for kernel in module.program.kernels
            if kernel.symbol in seconds
        ],
    }
    if (plan := compiled.memory_plan(inputs)) is not None:
        steps = live_by_call(module.program, plan)
        report.memory["timeline"] = [{"symbol": symbol, "live_bytes": live} for symbol, live in steps]


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


def _value(work: int | str, binding: dict[str, int]) -> int:
    dim = parse_dim(work)
    return evaluate(dim, {name: binding.get(name, 1) for name in symbols_of(dim)})
