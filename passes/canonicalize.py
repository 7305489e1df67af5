"""canonicalize: one spelling for each computation, and no work that does nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mlec.ir import Const, DType, Graph, GraphBuilder, Match, Miss, P, Rule, Trait, Value, apply_rules
from mlec.pipeline import Pass, PassContext, PassResult, Tolerance


def _keeps_type(m: Match) -> bool:
    """The result has the type of operand x: nothing was broadcast."""
    return m["x"].type == m.node.output.type


class _Identity(Rule):
    """An op that gives back its operand x."""

    def check(self, m: Match, graph: Graph) -> Miss | None:
        return None if _keeps_type(m) else Miss("the constant also broadcasts")

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return m["x"]


class DropAddZero(_Identity):
    """add(x, 0) -> x"""

    pattern = P("add", "x", Const(0))


class DropSubZero(_Identity):
    """sub(x, 0) -> x"""

    pattern = P("sub", "x", Const(0))


class DropMulOne(_Identity):
    """mul(x, 1) -> x"""

    pattern = P("mul", "x", Const(1))


class DropDivOne(_Identity):
    """div(x, 1) -> x"""

    pattern = P("div", "x", Const(1))


class DropPowOne(_Identity):
    """pow(x, 1) -> x"""

    pattern = P("pow", "x", Const(1))


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


class DropWideningCast(Rule):
    """cast(cast(x, wider), dtype of x) -> x"""

    pattern = P("cast", P("cast", "x", bind="inner"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        start, middle, end = m["x"].type.dtype, m.nodes["inner"].output.type.dtype, m.node.output.type.dtype
        return None if start is end and _holds(middle, start) else Miss("the cast in between loses bits")

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
    DropAddZero(), DropSubZero(), DropMulOne(), DropDivOne(), DropPowOne(), PowTwo(), RecogniseRelu(), RecogniseSilu(),
    CancelInvolution(), MergeIdempotent(), DropIdentityView(), MergeReshapes(), MergeTransposes(), TransposeAsReshape(),
    DropWideningCast(),
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
