"""A number that is divided or multiplied by a constant and then quantised, is quantised in other steps: `hardswish` ends so."""

from __future__ import annotations

from abc import abstractmethod

from mlec.ir import Const, Graph, GraphBuilder, Match, Miss, P, Rule, Value


class _IntoSteps(Rule):
    """Shared by both: the steps are those that `quantize` takes, and nothing else reads the number."""

    def check(self, m: Match, graph: Graph) -> Miss | None:
        scaled = m.node.inputs[0]
        alone = list(graph.users[scaled]) == [m.node] and scaled not in graph.outputs
        if not alone or m.constants["c"].size != 1 or m["x"].type != scaled.type:
            return Miss()
        return None if 2.0**-120 <= self.step(m) <= 2.0**120 else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("quantize", m["x"], **{**m.node.attrs, "scale": self.step(m)})

    @abstractmethod
    def step(self, m: Match) -> float:
        """The new scale."""


class Quotient(_IntoSteps):
    """quantize(x / c, scale) -> quantize(x, scale * c)"""

    pattern = P("quantize", P("div", "x", Const(bind="c")))

    def step(self, m: Match) -> float:
        return float(m.node.attrs["scale"]) * float(m.constants["c"].reshape(()))


class Product(_IntoSteps):
    """quantize(x * c, scale) -> quantize(x, scale / c)"""

    pattern = P("quantize", P("mul", "x", Const(bind="c")))

    def step(self, m: Match) -> float:
        c = float(m.constants["c"].reshape(()))
        return float(m.node.attrs["scale"]) / c if c else 0.0


RULES = [Quotient(), Product()]
