"""fold-scales: what the columns of a product's operand are divided or multiplied by goes into its weights.

A scaler before a model divides every element of every row; the weights it can be folded into are divided once. The offset that it
subtracts stays where it is: folded, it would cancel against the sum of the others, and cost digits where the mean of a column
is large beside its deviation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mlec.ir import Const, Graph, GraphBuilder, Match, Miss, P, Rule, Value, apply_rules
from mlec.ir.op import Array
from mlec.pipeline import Pass, PassContext, PassResult, Tolerance, approx

SAFE = 1e12
"""Scales between this and its inverse: neither the scaled elements nor the folded weights leave the range of float32 where the
others would not."""


class _IntoWeights(Rule):
    """Shared by the folds: the weights, and when they can be folded.

    Attributes:
        scaled_by: what the scale does to an element, and so to the weights in its place.
    """

    scaled_by: ClassVar[np.ufunc]

    def fold(self, m: Match) -> Array:
        """The weights for the operand as it is before scaling, in float64."""
        weights, scale = (m.constants[name].astype(np.float64) for name in ("w", "scale"))
        return np.asarray(self.scaled_by(weights, scale.reshape(-1, 1)))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        scale, weights = m.constants["scale"], m.constants["w"]
        if weights.ndim != 2 or scale.size not in (1, weights.shape[0]) or scale.shape[-1:] not in ((), (scale.size,)):
            return Miss()
        if graph.use_count(m.nodes["scaled"].output) > 1 or m["x"].type != m.nodes["scaled"].output.type:
            return Miss()
        size = np.abs(scale.astype(np.float64))
        if not np.all((size > 1 / SAFE) & (size < SAFE)):
            return Miss("a column is scaled by zero, or by a number that is very large or very small")
        folded = self.fold(m).astype(weights.dtype)
        if not np.array_equal(_normal(folded), _normal(weights)):
            return Miss("the scaled weights leave the range of their type")
        return None

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        weights = self.fold(m).astype(m.constants["w"].dtype)
        return b("matmul", m["x"], b.constant(weights, m["w"].hint))


def _normal(weights: Array) -> Array:
    """Which weights are finite and not too small for full precision."""
    size = np.abs(weights)
    return np.asarray(np.isfinite(size) & (size >= np.finfo(weights.dtype).tiny))


class Divided(_IntoWeights):
    """matmul(x / s, w) -> matmul(x, w / s)"""

    pattern = P("matmul", P("div", "x", Const(bind="scale"), bind="scaled"), Const(bind="w"))
    scaled_by = np.divide


class Multiplied(_IntoWeights):
    """matmul(x * s, w) -> matmul(x, w * s)"""

    pattern = P("matmul", P("mul", "x", Const(bind="scale"), bind="scaled"), Const(bind="w"))
    scaled_by = np.multiply


@dataclass(frozen=True)
class FoldScales(Pass):
    """Folds scales of the columns of a product's operand into its constant weights."""

    name: ClassVar[str] = "fold-scales"
    preserves: ClassVar[Tolerance] = approx(2e-5)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        return PassResult.of_edits(*apply_rules(graph, (Divided(), Multiplied())))
