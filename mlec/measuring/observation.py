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


def measure_graphs(
    report: OptimizationReport, graphs: Sequence[Graph], inputs: list[Any], target: Target, model: CostModel, each: bool
) -> None:
    """Fills ``measured_gain`` and ``baseline``: compiles graphs of before, and times them in turn, beside what is predicted of the same
    kernels at the same extents. A graph that the backend cannot lower as it is leaves them empty.

    Args:
        report: of the model, with its passes.
        graphs: before each pass, and after the last.
        inputs: to run them on.
        target: to compile them for.
        model: predicts, for the threads of one call.
        each: compile the graphs before and after each pass; else only the first and the last one.
    """  # fmt: skip
    distinct = dict.fromkeys(graphs if each else (graphs[0], graphs[-1]))
    made = {graph: found for graph in distinct if (found := _made(graph, target, model.threads)) is not None}
    runs = {str(i): partial(compiled.run, inputs) for i, (_, compiled) in enumerate(made.values())}
    least = [min(times) for times in interleaved(runs, seconds=PASS_SECONDS * len(runs)).values()]
    seconds = dict(zip(made, least, strict=True))
    predicted = {graph: _predicted(*found, inputs, model) for graph, found in made.items()}
    first, last = graphs[0], graphs[-1]
    if first in made and last in made:
        report.timing["baseline"] = {
            "unoptimised_ms": 1e3 * seconds[first],
            "speedup": seconds[first] / seconds[last],
            "predicted_speedup": predicted[first] / predicted[last],
        }
    if not each:
        return
    for entry, before, after in zip(report.passes, graphs, graphs[1:], strict=False):
        if before in made and after in made:
            for side, graph in (("before", before), ("after", after)):
                entry[side] |= {"predicted_seconds": predicted[graph], "measured_seconds": seconds[graph]}
            entry["predicted_gain"] = predicted[before] / predicted[after]
            entry["measured_gain"] = seconds[before] / seconds[after]


def _made(graph: Graph, target: Target, num_threads: int | None) -> tuple[CompiledModule, CompiledModel] | None:
    try:
        module = registry.backend_of(target.kind).compile(graph, target, CompileOptions())
        return module, CompiledModel(graph.signature, executable_of(module, graph, num_threads))
    except MlecError as error:
        logger.debug("a graph between two passes is not timed: %s", error)
        return None


def _predicted(module: CompiledModule, compiled: CompiledModel, inputs: list[Any], model: CostModel) -> float:
    """Seconds of a call on these inputs."""
    executable: Any = compiled.executable
    binding = compiled.kernel_times(inputs, 1)[1] if hasattr(executable, "time_kernels") else {}
    return model.module_seconds(module, binding, inputs)[0]


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
