"""fold-batch-norm: batch normalisation with constant statistics disappears into the weights before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mlec.ir import AnyOf, Const, Graph, GraphBuilder, Match, Miss, Node, P, Rule, Value, apply_rules
from mlec.ir.dim import static_dims
from mlec.ir.op import Array
from mlec.pipeline import Pass, PassContext, PassResult, Tolerance, approx

STATISTICS = (Const(bind="scale"), Const(bind="bias"), Const(bind="mean"), Const(bind="var"))


def affine(node: Node, graph: Graph) -> tuple[Array, Array] | None:
    """The factor and the offset of a normalisation for each channel, in float64; None where they are not constant."""
    known = [graph.constant_value(value) for value in node.inputs[1:]]
    arrays = [array.astype(np.float64) for array in known if array is not None]
    if len(arrays) < len(known):
        return None
    scale, bias, mean, var = arrays
    factor = scale / np.sqrt(var + node.attrs["eps"])
    return factor, bias - mean * factor


def on_channels(b: GraphBuilder, values: Array, like: Value, hint: str) -> Value:
    """A constant that broadcasts along axis 1 of a value."""
    shape = (-1, *[1] * (like.type.rank - 2))
    return b.constant(values.reshape(shape).astype(like.type.dtype.numpy), hint)


def is_per_channel(offset: Array, like: Value) -> bool:
    """Whether an array that is added to a value holds one number for each channel (axis 1), or one for all."""
    extents = (1,) * (like.type.rank - offset.ndim) + offset.shape
    return len(extents) == like.type.rank and extents[1] in (1, like.type.shape[1]) and offset.size == extents[1]


def along_outputs(product: Node, factor: Array) -> Array:
    """Of one number for each column of a matrix product or channel of a convolution, an array that multiplies its weights."""
    weights = product.inputs[1].type
    space = [1] * (weights.rank - 2)
    if product.name == "matmul":
        return factor.reshape(1, -1)
    if product.name == "conv":
        return factor.reshape(-1, 1, *space)
    channels, of_group = static_dims(weights.shape[:2])  # [c, out / groups, *space]
    groups = product.attrs["groups"]
    return np.repeat(factor.reshape(groups, of_group), channels // groups, axis=0).reshape(channels, of_group, *space)


class FoldIntoWeights(Rule):
    """batch_norm(product(x, w) + b) -> product(x, w') + b', for matrix products and convolutions"""

    _product = P("matmul|conv|conv_transpose", "x", Const(bind="w"), bind="product")
    pattern = P("batch_norm", AnyOf(_product, P("add", _product, Const(bind="offset"), bind="sum")), *STATISTICS)

    def check(self, m: Match, graph: Graph) -> Miss | None:
        product = m.nodes["product"]
        if product.name == "matmul" and (product.output.type.rank != 2 or m["w"].type.rank != 2):
            return Miss("the columns of the product are not the channels that are normalised")
        if graph.use_count(product.output) > 1:
            return Miss("the product before the normalisation has other users")
        inner = m.nodes.get("sum")
        if inner is not None and graph.use_count(inner.output) > 1:
            return Miss("the sum before the normalisation has other users")
        if inner is not None and not is_per_channel(m.constants["offset"], product.output):
            return Miss("what is added before the normalisation is not one number for each channel")
        return None

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        product, weights = m.nodes["product"], m.constants["w"]
        found = affine(m.node, graph)
        assert found is not None
        factor, offset = found
        if "offset" in m.constants:
            offset = offset + m.constants["offset"].astype(np.float64).reshape(-1) * factor
        folded = (weights.astype(np.float64) * along_outputs(product, factor)).astype(weights.dtype)
        result = b(product.op, m["x"], b.constant(folded, m["w"].hint), **product.attrs)
        return b("add", result, on_channels(b, offset, result, f"{m['bias'].hint}_folded"))


class BatchNormAsAffine(Rule):
    """batch_norm(x) -> x * factor + offset"""

    pattern = P("batch_norm", "x", *STATISTICS)

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        found = affine(m.node, graph)
        assert found is not None
        (factor, offset), x = found, m["x"]
        return b("add", b("mul", x, on_channels(b, factor, x, "factor")), on_channels(b, offset, x, "offset"))


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Folds into the convolution or matrix product before; where there is none, leaves one multiplication and one addition."""

    name: ClassVar[str] = "fold-batch-norm"
    preserves: ClassVar[Tolerance] = approx(2e-5, roundings=8)  # factors and sums of 16 bits are rounded

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        folded, edits = apply_rules(graph, context.taken((FoldIntoWeights(),)))
        rest, more = apply_rules(folded, context.taken((BatchNormAsAffine(),)))
        return PassResult.of_edits(rest, [*edits, *more])
