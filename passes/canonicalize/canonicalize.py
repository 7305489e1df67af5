"""canonicalize: one spelling for each computation, and no work that does nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mlec.ir import Const, DType, Graph, GraphBuilder, Match, Miss, Node, P, Rule, Trait, Value, apply_rules
from mlec.ir.dim import product
from mlec.ir.types import Shape
from mlec.pipeline import Pass, PassContext, PassResult, Tolerance


def _keeps_type(m: Match) -> bool:
    """The result has the type of operand x: nothing was broadcast."""
    return m["x"].type == m.node.output.type


NEUTRAL = {
    "add": 0, "sub": 0, "mul": 1, "div": 1, "pow": 1, "maximum": -math.inf, "minimum": math.inf, "logical_and": True,
    "logical_or": False, "logical_xor": False,
}  # fmt: skip
"""The second operand with which an op gives back the first one; of commutative ops also the other way round."""


class DropNeutral(Rule):
    """f(x, neutral element of f) -> x, such as x + 0, x * 1, x and true"""

    pattern = P("|".join(NEUTRAL), "x", Const(bind="constant"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        constant = m.constants["constant"]
        if not constant.size or not np.all(constant == NEUTRAL[m.node.name]):
            return Miss()
        return None if _keeps_type(m) else Miss("the constant also broadcasts")

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return m["x"]


class PowTwo(Rule):
    """pow(x, 2) -> mul(x, x)"""

    pattern = P("pow", "x", Const(2))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        return None if _keeps_type(m) else Miss("the exponent also broadcasts")

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("mul", m["x"], m["x"])


class RecogniseRelu(Rule):
    """maximum(x, 0) -> relu(x)"""

    pattern = P("maximum", "x", Const(0))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        return None if _keeps_type(m) else Miss("the zero also broadcasts")

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("relu", m["x"])


class MergeBounds(Rule):
    """clip(clip(x)) -> clip(x), relu being a clip at 0"""

    pattern = P("clip|relu", P("clip|relu", "x", bind="inner"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        ordered = all(lo <= hi for lo, hi in (_bounds(m.node), _bounds(m.nodes["inner"])))
        return None if ordered and m["x"].type.dtype.is_float else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        (lo, hi), bounds = _bounds(m.node), _bounds(m.nodes["inner"])
        least, most = (min(max(bound, lo), hi) for bound in bounds)
        return b("relu", m["x"]) if (least, most) == (0, math.inf) else b("clip", m["x"], lo=least, hi=most)


def _bounds(node: Node) -> tuple[float, float]:
    return (0.0, math.inf) if node.name == "relu" else (node.attrs["lo"], node.attrs["hi"])


class RecogniseSilu(Rule):
    """mul(x, sigmoid(x)) -> silu(x)"""

    pattern = P("mul", "x", P("sigmoid", "x"))

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("silu", m["x"])


class CancelInvolution(Rule):
    """f(f(x)) -> x, for every op that is its own inverse"""

    pattern = P(Trait.INVOLUTION, P(Trait.INVOLUTION, "x", bind="inner"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        inner = m.nodes["inner"]
        same = inner.name == m.node.name and dict(inner.attrs) == dict(m.node.attrs)
        return None if same else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return m["x"]


class MergeIdempotent(Rule):
    """f(f(x)) -> f(x), for every idempotent op"""

    pattern = P(Trait.IDEMPOTENT, P(Trait.IDEMPOTENT, "x", bind="inner"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        inner = m.nodes["inner"]
        same = inner.name == m.node.name and dict(inner.attrs) == dict(m.node.attrs)
        return None if same else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return m.nodes["inner"].output


class DropIdentityView(Rule):
    """reshape / transpose / broadcast_to / slice / pad / cast / concat that changes nothing -> x"""

    pattern = P("reshape|broadcast_to|cast|transpose|slice|pad|concat")

    def check(self, m: Match, graph: Graph) -> Miss | None:
        node = m.node
        if len(node.inputs) != 1 or node.inputs[0].type != node.output.type:
            return Miss()
        if node.name == "transpose" and list(node.attrs["perm"]) != sorted(node.attrs["perm"]):
            return Miss()
        return None

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return m.node.inputs[0]


class MergeReshapes(Rule):
    """reshape(reshape(x)) -> reshape(x)"""

    pattern = P("reshape", P("reshape", "x"))

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("reshape", m["x"], shape=m.node.attrs["shape"])


class MergeTransposes(Rule):
    """transpose(transpose(x)) -> transpose(x)"""

    pattern = P("transpose", P("transpose", "x", bind="inner"))

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        inner = m.nodes["inner"].attrs["perm"]
        return b("transpose", m["x"], perm=tuple(inner[p] for p in m.node.attrs["perm"]))


class TransposeAsReshape(Rule):
    """transpose that moves only axes of extent 1 -> reshape"""

    pattern = P("transpose", "x")

    def check(self, m: Match, graph: Graph) -> Miss | None:
        shape = m["x"].type.shape
        moved = [p for p in m.node.attrs["perm"] if shape[p] != 1]
        return None if moved == sorted(moved) else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("reshape", m["x"], shape=m.node.output.type.shape)


class ReshapeTransposed(Rule):
    """reshape(transpose(x)) -> transpose(reshape(x)), where the reshape only adds or drops axes of extent 1"""

    pattern = P("reshape", P("transpose", "x", bind="inner"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        turned, shape = m.nodes["inner"].output.type.shape, m.node.output.type.shape
        return None if [d for d in turned if d != 1] == [d for d in shape if d != 1] else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        perm, before, after = m.nodes["inner"].attrs["perm"], m["x"].type.shape, m.node.output.type.shape
        # Extents of 1 go in front, so that the last axis stays the last one where the transpose leaves it there.
        units = [axis for axis, extent in enumerate(after) if extent == 1]
        own = [axis for axis, extent in enumerate(before) if extent != 1]
        place = {axis: len(units) + i for i, axis in enumerate(own)}
        moved = iter([place[axis] for axis in perm if before[axis] != 1])
        reshaped = b("reshape", m["x"], shape=(*[1] * len(units), *(before[axis] for axis in own)))
        order = [units.index(axis) if axis in units else next(moved) for axis in range(len(after))]
        return b("transpose", reshaped, perm=tuple(order))


class KeepReducedAxes(Rule):
    """reshape(reduction(x)) -> reduction(x) with keepdims = true, where the reshape puts back the axes that are gone"""

    pattern = P("reshape", P(Trait.REDUCTION, "x", bind="reduction"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        node, x = m.nodes["reduction"], m["x"].type
        if graph.use_count(node.output) > 1 or node.attrs.get("keepdims", True) or "axes" not in node.attrs:
            return Miss()
        axes = {axis % x.rank for axis in node.attrs["axes"]}
        kept = tuple(1 if axis in axes else extent for axis, extent in enumerate(x.shape))
        return None if m.node.output.type.shape == kept else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        node = m.nodes["reduction"]
        return b(node.op, m["x"], **{**node.attrs, "keepdims": True})


class SumAsMean(Rule):
    """sum(x) / n -> mean(x), for as many elements"""

    pattern = P("div", P("sum", "x", bind="sum"), Const(bind="n"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        total, x, n = m.nodes["sum"], m["x"].type, m.constants["n"]
        count = product(tuple(x.shape[axis] for axis in total.attrs["axes"]))
        wide = x.dtype.is_float and x.dtype.bits >= 32  # narrower sums are rounded, means are not
        same = wide and n.size == 1 and isinstance(count, int) and count > 0 and float(n.reshape(())) == count
        return (
            None if same and total.output.type == m.node.output.type and graph.use_count(total.output) == 1 else Miss()
        )

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("mean", m["x"], **m.nodes["sum"].attrs)


class DropBroadcast(Rule):
    """f(broadcast_to(x), y) -> f(x, y), where f broadcasts by itself"""

    pattern = P(Trait.ELEMENTWISE | Trait.CONTRACTION)

    def check(self, m: Match, graph: Graph) -> Miss | None:
        return None if self.narrowed(m.node, graph) is not None else Miss()

    def narrowed(self, node: Node, graph: Graph) -> list[Value] | None:
        """The operands with one broadcast less."""
        if not node.op.has(Trait.ELEMENTWISE) and node.name not in ("matmul", "attention"):
            return None
        fixed = 0 if node.op.has(Trait.ELEMENTWISE) else 2
        for place, value in enumerate(node.inputs):
            producer = graph.producer.get(value)
            if producer is None or producer.name != "broadcast_to":
                continue
            (x,) = producer.inputs
            if (
                x.type.shape[x.type.rank - fixed :] != value.type.shape[value.type.rank - fixed :]
                or x.type.rank < fixed
            ):
                continue
            operands = [*node.inputs[:place], x, *node.inputs[place + 1 :]]
            stated = tuple(v.type for v in node.outputs)
            if node.op.result_types([v.type for v in operands], node.attrs) == stated:
                return operands
        return None

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        operands = self.narrowed(m.node, graph)
        assert operands is not None
        return b(m.node.op, *operands, **m.node.attrs)


class ReshapeProduct(Rule):
    """reshape(matmul(a, b)) -> matmul(reshape(a), reshape(b)), where only leading axes change and operands were reshaped to them"""

    pattern = P("reshape", P("matmul", "a", "b", bind="product"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        product, (a, w) = m.nodes["product"].output, (m["a"], m["b"])
        lead = self.lead(m)
        was_reshaped = any(v in graph.producer and graph.producer[v].name == "reshape" for v in (a, w))
        if lead is None or not was_reshaped or graph.use_count(product) > 1 or lead == product.type.shape[:-2]:
            return Miss()
        return None if a.type.shape[:-2] == w.type.shape[:-2] else Miss()

    def lead(self, m: Match) -> Shape | None:
        """The new leading axes; None where the matrices change too. Further axes of extent 1 among them do no harm."""
        shape, matrix = list(m.node.output.type.shape), m.nodes["product"].output.type.shape[-2:]
        for extent in matrix[::-1]:
            while shape and shape[-1] == 1 != extent:
                shape.pop()
            if not shape or shape.pop() != extent:
                return None
        return tuple(shape) if shape else None

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        lead = self.lead(m)
        assert lead is not None
        operands = [b("reshape", v, shape=(*lead, *v.type.shape[-2:])) for v in (m["a"], m["b"])]
        return b("reshape", b("matmul", *operands), shape=m.node.output.type.shape)


class NotEqual(Rule):
    """not (a == b) -> a != b, and the other way round"""

    pattern = P("logical_not", P("eq|ne", "a", "b", bind="inner"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        return None if graph.use_count(m.nodes["inner"].output) == 1 else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("ne" if m.nodes["inner"].name == "eq" else "eq", m["a"], m["b"])


class DropWideningCast(Rule):
    """cast(cast(x, wider), dtype of x) -> x"""

    pattern = P("cast", P("cast", "x", bind="inner"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        start, middle, end = m["x"].type.dtype, m.nodes["inner"].output.type.dtype, m.node.output.type.dtype
        if start is not end:
            return Miss()
        return None if _holds(middle, start) else Miss("the cast in between loses bits")

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return m["x"]


def _holds(wide: DType, narrow: DType) -> bool:
    """Every value of ``narrow`` is one of ``wide``."""
    if narrow.is_bool:
        return True
    if narrow.is_float and wide.is_float:
        return (wide.eps <= narrow.eps and wide.bits > narrow.bits) or wide is narrow
    if narrow.is_int and wide.is_int:
        return wide.bits > narrow.bits
    return narrow.is_int and wide.is_float and narrow.bits <= {DType.F64: 32, DType.F32: 16}.get(wide, 8)


RULES: tuple[Rule, ...] = (
    DropNeutral(), PowTwo(), RecogniseRelu(), RecogniseSilu(),
    CancelInvolution(), MergeIdempotent(), MergeBounds(), DropIdentityView(), MergeReshapes(), MergeTransposes(), TransposeAsReshape(),
    DropWideningCast(), ReshapeTransposed(), KeepReducedAxes(), SumAsMean(), DropBroadcast(), ReshapeProduct(), NotEqual(),
)  # fmt: skip


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Algebraic identities, cancelling views and casts, recognition of relu and silu; to fixpoint."""

    name: ClassVar[str] = "canonicalize"
    preserves: ClassVar[Tolerance] = Tolerance(
        signed_zeros=False
    )  # of maximum(-0.0, 0.0), relu may give the other zero
    rules: ClassVar[Sequence[Rule]] = RULES

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        return PassResult.of_edits(*apply_rules(graph, self.rules))
