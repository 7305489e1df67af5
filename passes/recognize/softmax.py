"""Softmax and its logarithm with the largest element subtracted, as careful people write them.

Without that, a softmax by hand overflows where ours does not: that is for `mlec.passes.stability`.
"""

from __future__ import annotations

from mlec.ir import AnyOf, Const, Graph, GraphBuilder, Match, Miss, P, Rule, Value
from mlec.ir.pattern import match

SHIFTED = P("sub", "x", P("max", "x", bind="max"))


def _shifted(value: Value, graph: Graph) -> Match | None:
    node = graph.producer.get(value)
    return None if node is None else match(SHIFTED, node, graph)


def _axis(m: Match, shifted: Match | None) -> int | None:
    """The axis along which both the largest and the sum are taken."""
    total = m.nodes["sum"]
    if shifted is None or shifted.nodes["max"].attrs != total.attrs:
        return None
    axes = total.attrs["axes"]
    return axes[0] if len(axes) == 1 and total.attrs["keepdims"] else None


class Softmax(Rule):
    """e / sum(e) with e = exp(x - max(x)) -> softmax(x)"""

    _sum = P("sum", "e", bind="sum")
    pattern = AnyOf(P("div", "e", _sum), P("mul", "e", P("div", Const(1), _sum)))
    rounds_once = True

    def shifted(self, m: Match, graph: Graph) -> Match | None:
        node = graph.producer.get(m["e"])
        return _shifted(node.inputs[0], graph) if node is not None and node.name == "exp" else None

    def check(self, m: Match, graph: Graph) -> Miss | None:
        keeps = m["e"].type == m.node.output.type
        return None if keeps and _axis(m, self.shifted(m, graph)) is not None else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        shifted = self.shifted(m, graph)
        assert shifted is not None
        return b("softmax", shifted["x"], axis=_axis(m, shifted))


class LogSoftmax(Rule):
    """s - log(sum(exp(s))) with s = x - max(x) -> log_softmax(x)"""

    pattern = P("sub", "s", P("log", P("sum", P("exp", "s"), bind="sum")))
    rounds_once = True

    def check(self, m: Match, graph: Graph) -> Miss | None:
        return None if _axis(m, _shifted(m["s"], graph)) is not None else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        shifted = _shifted(m["s"], graph)
        assert shifted is not None
        return b("log_softmax", shifted["x"], axis=_axis(m, shifted))


class LogSoftmaxOfLogSum(Rule):
    """x - (max(x) + log(sum(exp(x - max(x))))) -> log_softmax(x)"""

    pattern = P(
        "sub", "x", P("add", P("max", "x", bind="max"), P("log", P("sum", P("exp", SHIFTED), bind="sum"))),
    )  # fmt: skip
    rounds_once = True

    def check(self, m: Match, graph: Graph) -> Miss | None:
        same = m.nodes["max"].attrs == m.nodes["sum"].attrs
        return None if same and len(m.nodes["sum"].attrs["axes"]) == 1 and m.nodes["sum"].attrs["keepdims"] else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("log_softmax", m["x"], axis=m.nodes["sum"].attrs["axes"][0])


RULES: tuple[Rule, ...] = (Softmax(), LogSoftmax(), LogSoftmaxOfLogSum())
