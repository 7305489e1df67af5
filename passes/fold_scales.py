"""fold-scales: what the columns of a product's operand, or of its result, are divided or multiplied by goes into its weights.

A scaler before a model divides every element of every row; the weights it can be folded into are divided once. The offset that it
subtracts stays where it is: folded, it would cancel against the sum of the others, and cost digits where the mean of a column
is large beside its deviation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mlec.ir import AnyOf, Const, Graph, GraphBuilder, Match, Miss, Node, P, Rule, Value, apply_rules
from mlec.ir.dim import static
from mlec.ir.op import Array
from mlec.passes.fold_batch_norm import along_outputs
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

    def fold(self, m: Match) -> Array | None:
        """The weights for the operand as it is before scaling; None where it is not scaled by one number for each column or channel."""
        weights, scale = (m.constants[name].astype(np.float64) for name in ("w", "scale"))
        if m.node.name == "matmul":
            if (
                weights.ndim != 2
                or scale.size not in (1, weights.shape[0])
                or scale.shape[-1:] not in ((), (scale.size,))
            ):
                return None
            factors = np.broadcast_to(scale.reshape(-1), weights.shape[:1]).reshape(-1, 1)
        else:
            (outputs, of_group), groups = weights.shape[:2], m.node.attrs["groups"]
            full = scale.reshape((1,) * (weights.ndim - scale.ndim) + scale.shape)
            if full.ndim != weights.ndim or full.size != full.shape[1] or full.size not in (1, of_group * groups):
                return None
            factors = np.broadcast_to(full.reshape(-1), (of_group * groups,)).reshape(groups, of_group)
            factors = np.repeat(factors, outputs // groups, axis=0).reshape(
                *weights.shape[:2], *[1] * (weights.ndim - 2)
            )
        return np.asarray(self.scaled_by(weights, factors).astype(m.constants["w"].dtype))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        with np.errstate(all="ignore"):
            folded = self.fold(m) if _has_float_weights(m) else None
        if (
            folded is None
            or graph.use_count(m.nodes["scaled"].output) > 1
            or m["x"].type != m.nodes["scaled"].output.type
        ):
            return Miss()
        size = np.abs(m.constants["scale"].astype(np.float64))
        if not np.all((size > 1 / SAFE) & (size < SAFE)):
            return Miss("a column is scaled by zero, or by a number that is very large or very small")
        if not np.array_equal(_normal(folded), _normal(m.constants["w"])):
            return Miss("the scaled weights leave the range of their type")
        return None

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        weights = self.fold(m)
        assert weights is not None
        return b(m.node.op, m["x"], b.constant(weights, m["w"].hint), **m.node.attrs)


def _has_float_weights(m: Match) -> bool:
    """Whether weights are floats: sums of integers wrap around, which those in float64 do not. Of bf16, folding costs the digits."""
    return m.constants["w"].dtype.kind == "f"


def _normal(weights: Array) -> Array:
    """Which weights are finite and not too small for full precision."""
    size = np.abs(weights)
    return np.asarray(np.isfinite(size) & (size >= np.finfo(weights.dtype).tiny))


class Divided(_IntoWeights):
    """product(x / s, w) -> product(x, w / s), for a number for each column or channel of x"""

    pattern = P("matmul|conv", P("div", "x", Const(bind="scale"), bind="scaled"), Const(bind="w"))
    scaled_by = np.divide


class Multiplied(_IntoWeights):
    """product(x * s, w) -> product(x, w * s), for a number for each column or channel of x"""

    pattern = P("matmul|conv", P("mul", "x", Const(bind="scale"), bind="scaled"), Const(bind="w"))
    scaled_by = np.multiply


PRODUCT = P("matmul|conv|conv_transpose", "x", Const(bind="w"), bind="product")
SHIFTED = AnyOf(PRODUCT, P("add|sub", PRODUCT, Const(bind="offset"), bind="shifted"))


class ScaledResult(Rule):
    """(product(x, w) + b) * s -> product(x, w * s) + b * s, for a number for each column or channel"""

    pattern = AnyOf(P("mul", SHIFTED, Const(bind="scale")), P("div", SHIFTED, Const(bind="scale")))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        product, shifted = m.nodes["product"], m.nodes.get("shifted", m.nodes["product"])
        kind, weights = m.node.output.type, m.constants["w"]
        is_matrix = product.name != "matmul" or weights.ndim == 2
        if {product.output.type, shifted.output.type} != {kind} or not is_matrix or not _has_float_weights(m):
            return Miss()
        if any(_of_columns(m, name) is None for name in ("scale", "offset") if name in m.constants):
            return Miss()
        if max(graph.use_count(product.output), graph.use_count(shifted.output)) > 1:
            return Miss("what is scaled has other users")
        size = np.abs(m.constants["scale"].astype(np.float64))
        if not np.all((size > 1 / SAFE) & (size < SAFE)):
            return Miss("a column is scaled by zero, or by a number that is very large or very small")
        folded, _ = self.fold(m)
        return (
            None
            if np.array_equal(_normal(folded), _normal(weights))
            else Miss("the scaled weights leave the range of their type")
        )

    def fold(self, m: Match) -> tuple[Array, Array | None]:
        """The weights, and what is added to the product."""
        factors, weights = _of_columns(m, "scale"), m.constants["w"]
        assert factors is not None
        if m.node.name == "div":
            factors = 1 / factors
        folded = (weights.astype(np.float64) * along_outputs(m.nodes["product"], factors)).astype(weights.dtype)
        offset = _of_columns(m, "offset") if "offset" in m.constants else None
        if offset is None:
            return folded, None
        return folded, np.asarray(offset * factors * (-1 if m.nodes["shifted"].name == "sub" else 1))

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        product = m.nodes["product"]
        weights, offset = self.fold(m)
        result = b(product.op, m["x"], b.constant(weights, m["w"].hint), **product.attrs)
        return result if offset is None else b("add", result, _spread(b, offset, m))


class MergedOffsets(Rule):
    """product(x, w) + a + b -> product(x, w) + (a + b)"""

    pattern = P("add|sub", P("add|sub", PRODUCT, Const(bind="offset"), bind="shifted"), Const(bind="scale"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        product, shifted = m.nodes["product"], m.nodes["shifted"]
        alike = {product.output.type, shifted.output.type} == {m.node.output.type} and _has_float_weights(m)
        if not alike or max(graph.use_count(product.output), graph.use_count(shifted.output)) > 1:
            return Miss()
        if any(_of_columns(m, name) is None for name in ("scale", "offset")):
            return Miss()
        finite = all(np.all(np.isfinite(m.constants[name])) for name in ("scale", "offset"))
        return None if finite else Miss("an offset is not finite")

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        first, second = _of_columns(m, "offset"), _of_columns(m, "scale")
        assert first is not None
        assert second is not None
        total = np.asarray(first * _sign(m.nodes["shifted"]) + second * _sign(m.node))
        return b("add", m.nodes["product"].output, _spread(b, total, m))


def _sign(node: Node) -> int:
    return -1 if node.name == "sub" else 1


def _of_columns(m: Match, name: str) -> Array | None:
    """A constant that is one number for each column of a matrix product or channel of a convolution, or one for all: as float64."""
    product, array = m.nodes["product"], m.constants[name]
    rank = product.output.type.rank
    axis = rank - 1 if product.name == "matmul" else 1
    count = static(product.output.type.shape[axis])
    if array.ndim > rank:
        return None
    full = array.reshape((1,) * (rank - array.ndim) + array.shape)
    if full.size not in (1, full.shape[axis]):
        return None
    return np.broadcast_to(full.reshape(-1), (count,)).astype(np.float64)


def _spread(b: GraphBuilder, offset: Array, m: Match) -> Value:
    """A constant that adds a number to each column or channel."""
    product = m.nodes["product"]
    shape = (-1,) if product.name == "matmul" else (-1, *[1] * (product.output.type.rank - 2))
    return b.constant(offset.reshape(shape).astype(product.output.type.dtype.numpy), "offset")


@dataclass(frozen=True)
class FoldScales(Pass):
    """Folds scales of the columns of a product's operand or result into its constant weights, and offsets of the result into one."""

    name: ClassVar[str] = "fold-scales"
    preserves: ClassVar[Tolerance] = approx(2e-5, roundings=8)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        return PassResult.of_edits(
            *apply_rules(graph, context.taken((Divided(), Multiplied(), ScaledResult(), MergedOffsets())))
        )
