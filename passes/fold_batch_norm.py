"""fold-batch-norm: batch normalisation with constant statistics disappears into the weights before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mlec.ir import Const, Graph, GraphBuilder, Match, Miss, P, Rule, Value, apply_rules
from mlec.ir.op import Array
from mlec.pipeline import Pass, PassContext, PassResult, Tolerance, approx

STATISTICS = (Const(bind="scale"), Const(bind="bias"), Const(bind="mean"), Const(bind="var"))


def affine(m: Match) -> tuple[Array, Array]:
    """The factor and the offset for each channel, in float64."""
    scale, bias, mean, var = (m.constants[k].astype(np.float64) for k in ("scale", "bias", "mean", "var"))
    factor = scale / np.sqrt(var + m.node.attrs["eps"])
    return factor, bias - mean * factor


def on_channels(b: GraphBuilder, values: Array, like: Value, hint: str) -> Value:
    """A constant that broadcasts along axis 1 of a value."""
    shape = (-1, *[1] * (like.type.rank - 2))
    return b.constant(values.reshape(shape).astype(like.type.dtype.numpy), hint)


def is_per_channel(offset: Array, like: Value) -> bool:
    """Whether an array that is added to a value holds one number for each channel (axis 1), or one for all."""
    extents = (1,) * (like.type.rank - offset.ndim) + offset.shape
    return len(extents) == like.type.rank and extents[1] in (1, like.type.shape[1]) and offset.size == extents[1]


class _IntoWeights(Rule):
    """Shared by the folds: which axis of the weights is the output channel."""

    channel_axis: ClassVar[int] = 0

    def check(self, m: Match, graph: Graph) -> Miss | None:
        product = m.nodes["product"]
        if product.name == "matmul" and product.output.type.rank != 2:
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
        factor, offset = affine(m)
        weights = m.constants["w"]
        along = [1] * weights.ndim
        along[self.channel_axis] = -1
        if "offset" in m.constants:
            offset = offset + m.constants["offset"].astype(np.float64).reshape(-1) * factor
        folded = (weights.astype(np.float64) * factor.reshape(along)).astype(weights.dtype)
        product = m.nodes["product"]
        result = b(product.op, m["x"], b.constant(folded, m["w"].hint), **product.attrs)
        return b("add", result, on_channels(b, offset, result, f"{m['bias'].hint}_folded"))


class FoldIntoConv(_IntoWeights):
    """batch_norm(conv(x, w)) -> conv(x, w') + b'"""

    pattern = P("batch_norm", P("conv", "x", Const(bind="w"), bind="product"), *STATISTICS)


class FoldIntoBiasedConv(_IntoWeights):
    """batch_norm(conv(x, w) + b) -> conv(x, w') + b'"""

    pattern = P(
        "batch_norm",
        P("add", P("conv", "x", Const(bind="w"), bind="product"), Const(bind="offset"), bind="sum"),
        *STATISTICS,
    )


class FoldIntoMatmul(_IntoWeights):
    """batch_norm(matmul(x, w)) -> matmul(x, w') + b'"""

    channel_axis = 1
    pattern = P("batch_norm", P("matmul", "x", Const(bind="w"), bind="product"), *STATISTICS)


class FoldIntoBiasedMatmul(_IntoWeights):
    """batch_norm(matmul(x, w) + b) -> matmul(x, w') + b'"""

    channel_axis = 1
    pattern = P(
        "batch_norm",
        P("add", P("matmul", "x", Const(bind="w"), bind="product"), Const(bind="offset"), bind="sum"),
        *STATISTICS,
    )


class BatchNormAsAffine(Rule):
    """batch_norm(x) -> x * factor + offset"""

    pattern = P("batch_norm", "x", *STATISTICS)

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        factor, offset = affine(m)
        x = m["x"]
        return b("add", b("mul", x, on_channels(b, factor, x, "factor")), on_channels(b, offset, x, "offset"))


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Folds into the convolution or matrix product before; where there is none, leaves one multiplication and one addition."""

    name: ClassVar[str] = "fold-batch-norm"
    preserves: ClassVar[Tolerance] = approx(2e-5)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        into_weights = (FoldIntoConv(), FoldIntoBiasedConv(), FoldIntoMatmul(), FoldIntoBiasedMatmul())
        folded, edits = apply_rules(graph, into_weights)
        rest, more = apply_rules(folded, (BatchNormAsAffine(),))
        return PassResult.of_edits(rest, [*edits, *more])
