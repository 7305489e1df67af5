"""A package as a third party would write it: one pass with one rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mlec.ir import Graph, GraphBuilder, Match, P, Rule, Value, apply_rules
from mlec.pipeline import Pass, PassContext, PassResult


class FlipSubtraction(Rule):
    """neg(sub(a, b)) -> sub(b, a)"""

    pattern = P("neg", P("sub", "a", "b"))

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("sub", m["b"], m["a"])


@dataclass(frozen=True)
class FlipSubtractions(Pass):
    """Turns negated differences around."""

    name: ClassVar[str] = "flip-subtractions"
    before: ClassVar[str] = "layout"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        return PassResult.of_edits(*apply_rules(graph, [FlipSubtraction()]))
