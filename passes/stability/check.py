"""stability: find where finite precision loses the result, show it on an input, and rewrite it if asked to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mlec.ir import Graph, GraphBuilder, Node, Value, apply_rules
from mlec.ir.dim import evaluate
from mlec.ir.extents import extents_near
from mlec.passes.stability.findings import Finding, Severity, listed
from mlec.passes.stability.hazards import Hazard, find_hazards
from mlec.passes.stability.input_ranges import InputRange, input_ranges
from mlec.passes.stability.intervals import value_intervals
from mlec.passes.stability.probes import ROWS, probes
from mlec.passes.stability.rewrites import RULES
from mlec.passes.stability.tree_inputs import tree_findings
from mlec.passes.stability.wide import wider
from mlec.passes.stability.witnesses import Effect, Search, Witness
from mlec.pipeline import Pass, PassContext, PassResult, Remark, Tolerance
from mlec.wording import plural

STABILIZED = Tolerance(rtol=1e-4, atol=1e-6, specials=False, roundings=32)
"""How far stable spellings may move results."""

MAX_PROBES = 96
MAX_RARE_PROBES = 32
MIN_PROBES = 8


@dataclass(frozen=True)
class CheckNumerics(Pass):
    """Looks for numbers that get lost: overflow, cancellation, division by zero, formulas that have a stable spelling.

    Attributes:
        stabilize: also rewrite what has a stable spelling. Results may then be numbers where they were not.
        effort: how much longer than usual it may look for inputs, and then follow what hazards do to the outputs. Usual are for each 50 ms
            and 0.5 ms for each node, 1 s at most, by an estimate, so that each run finds the same. Of a model that cannot be executed a few
            times in that, and of hazards that cannot be followed in that, findings are notes.
    """

    name: ClassVar[str] = "stability"
    before: ClassVar[str] = "layout"

    stabilize: bool = False
    effort: float = 1.0

    def __post_init__(self) -> None:
        if self.stabilize:  # looking changes nothing
            object.__setattr__(self, "preserves", STABILIZED)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        ranges = input_ranges(graph, context.given_ranges, context.seen_ranges)
        known = value_intervals(graph, {value: r.interval for value, r in ranges.items()})
        hazards = find_hazards(graph, known)
        findings = tree_findings(graph)
        result = graph
        remarks: tuple[Remark, ...] = ()
        if any(hazard.stable is not None for hazard in hazards):
            result, edits = apply_rules(graph, context.taken(RULES))
            named = {hazard.rule for hazard in hazards}  # parts of a larger formula are gone with it
            remarks = PassResult.of_edits(result, [edit for edit in edits if edit.rule in named]).remarks
        witnesses, unjudged = self._search(graph, result, hazards, ranges)
        for hazard in hazards:
            finding = _finding(hazard, graph, witnesses.get(hazard), unjudged.get(hazard, ""), ranges, self.stabilize)
            if finding is not None:
                findings.append(finding)
        if not self.stabilize:
            result = graph
            remarks = tuple(
                Remark("missed", f"{f.rewrite} is not put in its place without stabilize", f.location, f.rule)
                for f in findings
                if f.rewrite
            )
        if unjudged:
            rules, reasons = (
                ", ".join(dict.fromkeys(words)) for words in ((h.rule for h in unjudged), unjudged.values())
            )
            remarks += (Remark("missed", f"nothing is known of {plural(len(unjudged), 'place')} ({rules}): {reasons}"),)
        return PassResult(result, remarks, tuple(finding.to_dict() for finding in findings))

    def _search(
        self, graph: Graph, stable: Graph, hazards: Sequence[Hazard], ranges: Mapping[Value, InputRange]
    ) -> tuple[Mapping[Hazard, Witness], Mapping[Hazard, str]]:
        """Witnesses, and why nothing can be said of hazards that have none: what was not done."""
        if not hazards:
            return {}, {}
        reached = _reached(graph, [v for hazard in hazards for v in hazard.node.outputs])
        places = [i for i, output in enumerate(graph.outputs) if output in reached]
        if not places:
            return {}, {}
        part, stable_part = (_with_outputs(g, [g.outputs[i] for i in places]) for g in (graph, stable))
        rare = all(
            hazard.kind == "cancellation" for hazard in hazards
        )  # wherever something is added, and hardly ever real
        usual = min(1.0, 0.05 + 0.0005 * len(graph.nodes))
        seconds, costs = self.effort * usual, _seconds(part)
        count = min(MAX_RARE_PROBES if rare else MAX_PROBES, int(seconds / sum(costs.values())))
        if count < MIN_PROBES:
            needed = math.ceil(MIN_PROBES * sum(costs.values()) / usual)
            return {}, dict.fromkeys(
                hazards, f"not executed: the model is too large; stability{{effort={needed}}} executes it"
            )
        search = Search(part, stable_part if stable is not graph else part, wider(part), seconds, costs)
        intervals = {value: r.interval for value, r in ranges.items()}
        try:
            witnesses = search.find(hazards, probes(part, intervals, count))
        except (
            Exception
        ):  # an op of a plugin whose reference takes no wider floats: there is nothing to compare with then
            return {}, dict.fromkeys(hazards, "not executed: an op cannot be computed in a wider precision")
        lost = [hazard for hazard in hazards if hazard in search.unjudged and hazard not in witnesses]
        return witnesses, dict.fromkeys(
            lost,
            "not followed to the outputs: there are too many such places; stability{effort=10} follows more of them",
        )


def _reached(graph: Graph, start: Sequence[Value]) -> set[Value]:
    """The values that are computed from some others, and these."""
    found = set(start)
    for node in graph.nodes:
        if any(value in found for value in node.inputs):
            found.update(node.outputs)
    return found


def _with_outputs(graph: Graph, outputs: Sequence[Value]) -> Graph:
    """The part of a graph that some values need; its inputs stay."""
    b = GraphBuilder(graph.name)
    b.adopt_interface(graph)
    for node in graph.nodes:
        b.keep(node)
    return b.finish(outputs, signature=graph.signature)


def _seconds(graph: Graph) -> dict[Node, float]:
    """What executing each node on the reference interpreter, in both precisions, takes at least: measured on ordinary machines."""
    binding = extents_near(graph, ROWS)
    speed = 5e7 if wider(graph) == np.longdouble else 1e9
    found = {}
    for node in graph.nodes:
        found[node] = 4e-5 + (0.0 if node.is_constant else evaluate(node.cost.flops, binding) / speed)
        if node.name == "tree_ensemble":
            trees = node.inputs[8].type.shape[0]
            found[node] += 5e-4 * (trees if isinstance(trees, int) else 1000)
    return found


_SEVERITY: Mapping[str, Severity] = {
    "not finite": "error", "undefined": "warning", "inaccurate": "warning", "different": "warning", "wraps": "warning",
    "by zero": "warning",
}  # fmt: skip


def _finding(
    hazard: Hazard,
    graph: Graph,
    witness: Witness | None,
    unjudged: str,
    ranges: Mapping[Value, InputRange],
    applied: bool,
) -> Finding | None:
    """What to say of a hazard; nothing if many inputs did not show it. ``unjudged``: why nothing is known of it, if so."""
    node = hazard.node
    rewrite = hazard.stable.stable if hazard.stable is not None else ""
    named = {v: spec.name for v, spec in zip(graph.inputs, graph.signature.inputs, strict=True)}
    within = "; ".join(f"{named[v]} in {r.interval} ({r.origin})" for v, r in ranges.items())
    done = applied and hazard.stable is not None
    if witness is None:
        if not unjudged or hazard.stable is None:
            return None
        danger = f"{hazard.danger} ({unjudged})"
        return Finding(hazard.rule, "note", node.name, node.loc, danger, rewrite=rewrite, applied=done, ranges=within)
    effect = witness.effect
    assumed = any(r.origin == "assumed" for r in ranges.values())
    unexpected: Severity = (
        "note" if assumed else "warning"
    )  # no program could give a result that the element type has not
    severity = _SEVERITY.get(effect.kind, unexpected)
    if witness.is_slight:
        severity = "note"
    elif hazard.kind == "overflow" and effect.kind == "undefined" and math.isinf(effect.got):
        severity = unexpected
    arrays = dict(zip(named.values(), witness.probe.arrays, strict=True))
    return Finding(
        hazard.rule, severity, node.name, node.loc, hazard.danger, witness.probe.text,
        {name: listed(array) for name, array in arrays.items()}, _shown(effect, graph, node.outputs[0]), witness.error, witness.error_after,
        rewrite, done, within,
    )  # fmt: skip


def _shown(effect: Effect, graph: Graph, value: Value) -> str:
    if effect.kind == "wraps":
        return f"the result is {effect.got:.0f} instead of {effect.right:.0f}"
    if effect.kind == "by zero":
        return f"{effect.right:.0f} is divided by 0"
    spec = graph.signature.outputs[effect.output]
    if effect.kind == "undefined":
        return f"{spec.name} is {effect.got:g}"
    return f"{spec.name} is {effect.got:.6g} instead of {effect.right:.6g}"
