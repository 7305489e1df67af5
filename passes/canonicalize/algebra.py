"""Algebraic identities: of neutral elements, of ops that undo or repeat each other, of conditions."""

from __future__ import annotations

import math

import numpy as np

from mlec.ir import AnyOf, Const, Graph, GraphBuilder, Match, Miss, Node, P, Rule, Trait, Value
from mlec.ir.dim import product


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
    rounds_once = True

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("silu", m["x"])


def _is_twice(m: Match) -> bool:
    """The inner op is the same one, with the same attributes."""
    inner = m.nodes["inner"]
    return inner.name == m.node.name and dict(inner.attrs) == dict(m.node.attrs)


class CancelInvolution(Rule):
    """f(f(x)) -> x, for every op that is its own inverse"""

    pattern = P(Trait.INVOLUTION, P(Trait.INVOLUTION, "x", bind="inner"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        return None if _is_twice(m) else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return m["x"]


class MergeIdempotent(Rule):
    """f(f(x)) -> f(x), for every idempotent op"""

    pattern = P(Trait.IDEMPOTENT, P(Trait.IDEMPOTENT, "x", bind="inner"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        return None if _is_twice(m) else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return m.nodes["inner"].output


class NotEqual(Rule):
    """not (a == b) -> a != b, and the other way round"""

    pattern = P("logical_not", P("eq|ne", "a", "b", bind="inner"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        return None if graph.use_count(m.nodes["inner"].output) == 1 else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("ne" if m.nodes["inner"].name == "eq" else "eq", m["a"], m["b"])


class SumAsMean(Rule):
    """sum(x) / n -> mean(x), for as many elements"""

    pattern = P("div", P("sum", "x", bind="sum"), Const(bind="n"))
    rounds_once = True

    def check(self, m: Match, graph: Graph) -> Miss | None:
        total, x, n = m.nodes["sum"], m["x"].type, m.constants["n"]
        count = product(tuple(x.shape[axis] for axis in total.attrs["axes"]))
        same = (
            x.dtype.is_float and n.size == 1 and isinstance(count, int) and count > 0 and float(n.reshape(())) == count
        )
        return (
            None if same and total.output.type == m.node.output.type and graph.use_count(total.output) == 1 else Miss()
        )

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("mean", m["x"], **m.nodes["sum"].attrs)


class SameOperand(Rule):
    """f(x, x) -> x, for maximum, minimum, and, or; where(c, x, x) -> x"""

    pattern = AnyOf(P("maximum|minimum|logical_and|logical_or", "x", "x"), P("where", "condition", "x", "x"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        return None if _keeps_type(m) else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return m["x"]


class KnownCondition(Rule):
    """where(true, x, y) -> x; where(false, y, x) -> x"""

    pattern = AnyOf(P("where", Const(True), "x", "y"), P("where", Const(False), "y", "x"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        return None if _keeps_type(m) else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return m["x"]


class SwapChoices(Rule):
    """where(not c, x, y) -> where(c, y, x)"""

    pattern = P("where", P("logical_not", "c"), "x", "y")

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("where", m["c"], m["y"], m["x"])


class AddNegative(Rule):
    """x + -y -> x - y"""

    pattern = P("add", "x", P("neg", "y"))

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("sub", m["x"], m["y"])


class SubtractNegative(Rule):
    """x - -y -> x + y"""

    pattern = P("sub", "x", P("neg", "y"))

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("add", m["x"], m["y"])


class InverseRoot(Rule):
    """1 / sqrt(x) -> rsqrt(x)"""

    pattern = P("div", Const(1), P("sqrt", "x", bind="root"))
    rounds_once = True

    def check(self, m: Match, graph: Graph) -> Miss | None:
        return None if _keeps_type(m) and graph.use_count(m.nodes["root"].output) == 1 else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("rsqrt", m["x"])


RULES: tuple[Rule, ...] = (
    DropNeutral(), PowTwo(), RecogniseRelu(), RecogniseSilu(), CancelInvolution(), MergeIdempotent(), MergeBounds(), SumAsMean(),
    NotEqual(), SameOperand(), KnownCondition(), SwapChoices(), AddNegative(), SubtractNegative(), InverseRoot(),
)  # fmt: skip
