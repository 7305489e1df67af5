"""What running a compiled model shows, for its report: the time of each kernel beside its prediction, the memory at each call, and what
the passes are worth.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from mlec import registry
from mlec.backends.base import CompiledModule, CompileOptions
from mlec.errors import MlecError
from mlec.ir import Graph
from mlec.ir.dim import parse_dim
from mlec.measuring.cost_model import CostModel, value_of
from mlec.measuring.timing import interleaved
from mlec.packaging.recompiling import executable_of
from mlec.report import OptimizationReport
from mlec.runtime import CompiledModel
from mlec.target import Target

logger = logging.getLogger("mlec")

SECONDS = 0.03
"""How long kernels are timed; more where that is not enough for `FEWEST` runs."""
FEWEST, MOST = 3, 30
PASS_SECONDS = 0.1
"""How long each of the graphs between passes is timed."""


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


def measure_graphs(
    report: OptimizationReport, graphs: Sequence[Graph], inputs: list[Any], target: Target, num_threads: int | None, each: bool
) -> None:  # fmt: skip
    """Fills ``measured_gain`` and ``baseline``: compiles graphs of before, and times them in turn.

    A graph that the backend cannot lower as it is leaves them empty: most trees, for one, are constants only after a pass.

    Args:
        report: of the model, with its passes.
        graphs: before each pass, and after the last.
        inputs: to run them on.
        target: to compile them for.
        num_threads: of one call.
        each: compile the graphs before and after each pass; else only the first and the last one.
    """
    distinct = dict.fromkeys(graphs if each else (graphs[0], graphs[-1]))
    made = {graph: _made(graph, target, num_threads) for graph in distinct}
    runs = {str(i): partial(model.run, inputs) for i, model in enumerate(made.values()) if model is not None}
    least = {name: min(times) for name, times in interleaved(runs, seconds=PASS_SECONDS * len(runs)).items()}
    seconds = {graph: least.get(str(i)) for i, graph in enumerate(made)}
    first, last = seconds[graphs[0]], seconds[graphs[-1]]
    if first and last:
        report.timing["baseline"] = {"unoptimised_ms": 1e3 * first, "speedup": first / last}
    if not each:
        return
    for entry, before, after in zip(report.passes, graphs, graphs[1:], strict=False):
        old, new = seconds[before], seconds[after]
        entry["before"]["measured_seconds"], entry["after"]["measured_seconds"] = old, new
        entry["measured_gain"] = old / new if old and new else None


def _made(graph: Graph, target: Target, num_threads: int | None) -> CompiledModel | None:
    try:
        module = registry.backend_of(target.kind).compile(graph, target, CompileOptions())
        return CompiledModel(graph.signature, executable_of(module, graph, num_threads))
    except MlecError as error:
        logger.debug("a graph between two passes is not timed: %s", error)
        return None


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
