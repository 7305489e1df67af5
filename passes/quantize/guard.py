"""What 8 bits cost the whole network, on the calibration data; where that is too much, layers go back to float32.

A layer that does well by itself may still ruin the network: what comes behind it can cancel most of its results, and leave the error. So
the outputs count, beside those of float32. Where they lose more than the budget, each layer is put on 8 bits alone: the one that moves
the outputs most goes back first. Errors of different layers have little to do with each other, so their squares add up, which
tells how many have to go; that is measured then, and more go back if it was not enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlec.difference import Difference
from mlec.ir import Graph, Value, run_graph
from mlec.ir.dim import evaluate
from mlec.passes.quantize.emit import emit
from mlec.passes.quantize.numbers import Affine
from mlec.passes.quantize.plans import Plan
from mlec.passes.quantize.statistics import Batch, Parts, runner, some_rows
from mlec.pipeline import PassContext, Tolerance

ALONE_WORK = 2e10
"""Operations that putting each layer on 8 bits alone may take together; the rows follow from it."""
MARGIN = 0.8
"""Of the tolerance, what the calibration data may use up: the examples are compared as well."""


@dataclass(frozen=True)
class Budget:
    """What may be lost.

    Attributes:
        accuracy: of outputs that are scores of classes, the part of the rows (see `Difference.accuracy_loss`).
        error: of others, the root mean square of the errors relative to that of the results.
        tolerance: the bound on each number of all.
    """

    accuracy: float
    error: float
    tolerance: Tolerance

    def spent(self, found: Difference) -> float:
        """The part of the budget that an output takes; more than 1 is too much. Infinite where results are lost."""
        bound = MARGIN * (self.tolerance.rtol * found.scale + self.tolerance.atol)
        lost, allowed = (found.accuracy_loss, self.accuracy) if found.labels else (found.error, self.error)
        return max(_part(lost, allowed), _part(found.largest, bound))


def _part(lost: float, allowed: float) -> float:
    if not math.isfinite(lost):
        return math.inf
    return lost / allowed if allowed else math.inf if lost else 0.0


@dataclass(frozen=True)
class Verdict:
    """What came out.

    Attributes:
        chosen: how many layers did well by themselves.
        kept: the plans of those that stay on 8 bits.
        alone: by how much each layer alone moves the outputs (the largest `Difference.error`); empty where that was not needed.
        before, after: the outputs with all layers on 8 bits, and with those that stay.
        graph: with those that stay.
    """

    chosen: int
    kept: Sequence[Plan]
    alone: Mapping[Plan, float]
    before: Sequence[Difference]
    after: Sequence[Difference]
    graph: Graph

    def summary(self, accuracy: float, error: float) -> dict[str, Any]:
        """For the report: what the outputs lost, the worst of them, and what they may lose."""
        found = {"before": _worst(self.before), "after": _worst(self.after)}
        return {
            "chosen": self.chosen,
            "kept": len(self.kept),
            "rows": max((seen.rows for seen in self.before), default=0),
            **found["after"],
            "max_accuracy_loss": accuracy,
            "max_error": error,
            "unguarded": found["before"],
        }


def _worst(outputs: Sequence[Difference]) -> dict[str, Any]:
    """What the worst of the outputs lost."""
    labelled = [seen for seen in outputs if seen.labels]
    errors = [seen.error for seen in outputs if seen.count]
    error = max(errors, default=math.inf)
    return {
        "accuracy_loss": max((seen.accuracy_loss for seen in labelled), default=None),
        "changed_labels": max((seen.changed for seen in labelled), default=None),
        "error": error if math.isfinite(error) else None,
    }


def guarded(
    graph: Graph, plans: Sequence[Plan], stored: Mapping[Value, Affine], parts: Parts, batches: Sequence[Batch], budget: Budget,
    context: PassContext,
) -> Verdict:  # fmt: skip
    """Keeps as many layers on 8 bits as the budget allows.

    Args:
        graph: in float32.
        plans: of the layers that do well by themselves.
        stored: what else kernels hand over in 8 bits; that goes back first.
        parts: the calibration data, with the outputs that the graph has for it.
        batches: the same, for how much work it is.
        budget: what may be lost.
        context: to run large graphs with.
    """
    eight = emit(graph, plans, stored)
    before = after = _measured(graph, eight, parts, batches, context)
    alone: dict[Plan, float] = {}
    kept = list(plans)
    while kept and (spent := max(map(budget.spent, after), default=0.0)) > 1:
        if stored:
            stored = {}
        else:
            alone = alone or _alone(graph, plans, parts)
            kept = _fewer(kept, alone, spent)
        eight = emit(graph, kept, stored) if kept else graph
        after = _measured(graph, eight, parts, batches, context)
    return Verdict(len(plans), kept, alone, before, after, eight)


def _fewer(kept: Sequence[Plan], alone: Mapping[Plan, float], spent: float) -> list[Plan]:
    """Without the layers that move the outputs most: at least one, and so many that what is left should be within the budget."""
    order = sorted(kept, key=lambda plan: alone[plan])
    powers = np.cumsum([min(alone[plan], 1e100) ** 2 for plan in order])
    staying = int(np.searchsorted(powers, powers[-1] / spent**2, side="right")) if math.isfinite(spent) else 0
    worst = set(order[min(max(staying, len(order) // 2), len(order) - 1) :])
    return [plan for plan in kept if plan not in worst]


def _measured(
    graph: Graph, eight: Graph, parts: Parts, batches: Sequence[Batch], context: PassContext
) -> list[Difference]:
    """The outputs of the graph on 8 bits beside those that the parts tell."""
    found = [Difference() for _ in graph.outputs]
    if eight is graph:
        return found
    run = runner(eight, batches, context)
    for part in parts():
        results = run([np.asarray(part[value]) for value in graph.inputs])
        for output, seen, got in zip(graph.outputs, found, results, strict=True):
            seen.add(np.asarray(part[output]), np.asarray(got))
    return found


def _alone(graph: Graph, plans: Sequence[Plan], parts: Parts) -> dict[Plan, float]:
    """By how much each layer alone moves the outputs, on some rows."""
    part = next(iter(parts()))
    work = evaluate(graph.cost.flops, dict.fromkeys(graph.symbols, 1)) * len(plans)
    given = [np.asarray(part[value]) for value in graph.inputs]
    inputs = some_rows(graph, given, max(1, int(ALONE_WORK // max(work, 1))))
    wanted = run_graph(graph, inputs)
    moved: dict[Plan, float] = {}
    for plan in plans:
        found = [Difference() for _ in wanted]
        for seen, theirs, ours in zip(found, wanted, run_graph(emit(graph, [plan]), inputs), strict=True):
            seen.add(np.asarray(theirs), np.asarray(ours))
        moved[plan] = max((seen.error if seen.count else seen.accuracy_loss for seen in found), default=0.0)
    return moved
