"""What passes and the single rewrites in them are worth: graphs without them, compiled and timed in turn with the graphs that have them.

Passes are told apart by the graphs between them. The rewrites of one pass are told apart by running it again without one of them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from mlec import registry
from mlec.backends.base import CompiledModule, CompileOptions
from mlec.errors import MlecError
from mlec.ir import Graph
from mlec.measuring.cost_model import CostModel
from mlec.measuring.timing import interleaved
from mlec.packaging.recompiling import executable_of
from mlec.pipeline import PassContext, PassRecord, Remark
from mlec.report import OptimizationReport, graph_stats
from mlec.runtime import CompiledModel
from mlec.target import Target

logger = logging.getLogger("mlec")

GRAPH_SECONDS = 0.1
"""How long each graph is timed."""


class Seconds(NamedTuple):
    """Of a call."""

    predicted: float
    measured: float


Times = Mapping[str, Seconds]
"""By the digests of graphs."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where graphs are timed: on these inputs, compiled for this target, beside what the model predicts for the threads of one call."""

    inputs: list[Any]
    target: Target
    model: CostModel

    def seconds(self, graphs: Iterable[Graph]) -> Times:
        """What a call of each graph takes; nothing of those that the backend cannot lower as they are."""
        distinct = {graph.digest: graph for graph in graphs}
        made = {digest: found for digest, graph in distinct.items() if (found := self._made(graph)) is not None}
        runs = {digest: partial(compiled.run, self.inputs) for digest, (_, compiled) in made.items()}
        taken = interleaved(runs, seconds=GRAPH_SECONDS * len(runs))
        return {digest: Seconds(self._predicted(*found), min(taken[digest])) for digest, found in made.items()}

    def _made(self, graph: Graph) -> tuple[CompiledModule, CompiledModel] | None:
        try:
            module = registry.backend_of(self.target.kind).compile(graph, self.target, CompileOptions())
            return module, CompiledModel(graph.signature, executable_of(module, graph, self.model.threads))
        except MlecError as error:
            logger.debug("a graph between two passes is not timed: %s", error)
            return None

    def _predicted(self, module: CompiledModule, compiled: CompiledModel) -> float:
        executable: Any = compiled.executable
        binding = compiled.kernel_times(self.inputs, 1)[1] if hasattr(executable, "time_kernels") else {}
        return self.model.module_seconds(module, binding, self.inputs)[0]


def measure_whole(report: OptimizationReport, before: Graph, after: Graph, bench: Bench) -> None:
    """Fills ``baseline``: what all passes are worth together. Stays empty where the backend cannot lower one of the graphs as it is."""
    _add_baseline(report, before, after, bench.seconds((before, after)))


def measure_rewrites(
    report: OptimizationReport, records: Sequence[PassRecord], context: PassContext, bench: Bench
) -> None:
    """Fills ``baseline``, and ``measured_gain`` and ``rewrites`` of each pass, beside what is predicted of the same kernels.

    Args:
        report: of the model, with its passes.
        records: what they did.
        context: that they ran in.
        bench: where to time.
    """
    if not records:
        return
    times = bench.seconds(graph for record in records for graph in (record.before, record.after))
    _add_baseline(report, records[0].before, records[-1].after, times)
    for entry, record in zip(report.passes, records, strict=True):
        entry |= _gains(entry, times.get(record.before.digest), times.get(record.after.digest))
        entry["rewrites"] = _rewrites(entry, record, context, bench)


def _add_baseline(report: OptimizationReport, before: Graph, after: Graph, times: Times) -> None:
    if before.digest in times and after.digest in times:
        first, last = times[before.digest], times[after.digest]
        report.timing["baseline"] = {
            "unoptimised_ms": 1e3 * first.measured,
            "speedup": first.measured / last.measured,
            "predicted_speedup": first.predicted / last.predicted,
        }


def _rewrites(entry: dict[str, Any], record: PassRecord, context: PassContext, bench: Bench) -> list[dict[str, Any]]:
    """What each rule that a pass applied is worth: where it was the only one, what the pass is."""
    applied = Counter(_applied(record.remarks, record.name))
    if len(applied) == 1:
        worth = {key: entry[key] for key in ("before", "after", "predicted_gain", "measured_gain")}
        return [{"rule": rule, "applied": count, **worth} for rule, count in applied.items()]
    without = {rule: graph for rule in applied if (graph := _without(record, rule, context)) is not None}
    times = bench.seconds((*without.values(), record.after)) if without else {}
    made = []
    for rule, graph in without.items():
        worth = {"before": graph_stats(graph), "after": graph_stats(record.after)}
        worth |= _gains(worth, times.get(graph.digest), times.get(record.after.digest))
        made.append({"rule": rule, "applied": applied[rule], **worth})
    return made


def _without(record: PassRecord, rule: str, context: PassContext) -> Graph | None:
    """The graph as the pass leaves it without a rule; None where it does not tell its rules apart."""
    try:
        result = record.step.run(record.before, dataclasses.replace(context, left_out=frozenset({rule})))
    except MlecError as error:
        logger.debug("%s does not run without %s: %s", record.name, rule, error)
        return None
    return None if rule in _applied(result.remarks, record.name) else result.graph


def _applied(remarks: Iterable[Remark], name: str) -> list[str]:
    """The rule of each application; the pass, of this name, where it does not tell."""
    return [remark.rule or name for remark in remarks if remark.kind == "applied"]


def _gains(worth: Mapping[str, Any], before: Seconds | None, after: Seconds | None) -> dict[str, Any]:
    """Statistics and gains, with the times of the graphs where both are known."""
    if before is None or after is None:
        return {"predicted_gain": worth.get("predicted_gain"), "measured_gain": None}
    sides = {
        side: {**worth[side], "predicted_seconds": seconds.predicted, "measured_seconds": seconds.measured}
        for side, seconds in (("before", before), ("after", after))
    }
    gains = {"predicted_gain": before.predicted / after.predicted, "measured_gain": before.measured / after.measured}
    return {**sides, **gains}
