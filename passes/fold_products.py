"""fold-products: two constant matrices in a row become one, where that takes less arithmetic.

An infinity that the two would turn into NaN (as infinity minus infinity, in between) comes out of the one as an infinity; so that is
for those who ask for it. The named pipelines only say where it could be done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mlec.ir import AnyOf, Const, Graph, GraphBuilder, Match, Miss, P, Rule, Value, apply_rules
from mlec.pipeline import EXACT, Pass, PassContext, PassResult, Tolerance


@dataclass(frozen=True)
class FoldedPair(Rule):
    """matmul(matmul(x, a) + c, b) -> matmul(x, a b) + c b, for constant matrices"""

    specials: bool = False
    _first = P("matmul", "x", Const(bind="a"), bind="inner")
    pattern = P("matmul", AnyOf(_first, P("add", _first, Const(bind="c"), bind="sum")), Const(bind="b"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        a, b, c = m.constants["a"], m.constants["b"], m.constants.get("c")
        inner, last = m.nodes["inner"], m.nodes.get("sum", m.nodes["inner"])
        if (
            a.ndim != 2
            or b.ndim != 2
            or (c is not None and (c.size not in (1, a.shape[1]) or c.shape[-1:] not in ((), (c.size,))))
        ):
            return Miss()
        if max(graph.use_count(inner.output), graph.use_count(last.output)) > 1:
            return Miss("what is between the two products is used by others as well")
        (k, middle), n = a.shape, b.shape[1]
        if k * n > k * middle + middle * n:
            return Miss(f"one product with [{k}, {n}] takes more than those with [{k}, {middle}] and [{middle}, {n}]")
        if self.specials:
            return Miss(
                f"one product with [{k}, {n}] would take less than those with [{k}, {middle}] and [{middle}, {n}], but leave infinities "
                "what the two turn into NaN: the passes 'default,fold-products' do it"
            )
        return None

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        first, second = (m.constants[name].astype(np.float64) for name in ("a", "b"))
        kind = m.constants["a"].dtype
        result = b("matmul", m["x"], b.constant((first @ second).astype(kind), m["b"].hint))
        if "c" not in m.constants:
            return result
        offset = np.broadcast_to(m.constants["c"].reshape(-1), second.shape[:1]).astype(np.float64) @ second
        return b("add", result, b.constant(offset.astype(kind), m["c"].hint))


@dataclass(frozen=True)
class FoldProducts(Pass):
    """Multiplies constant matrices that follow each other, with the offsets in between.

    Options:
        specials: NaN and infinities stay where the two products have them: so nothing is done, and remarks say what could be.
    """

    specials: bool = False
    name: ClassVar[str] = "fold-products"
    before: ClassVar[str] = "layout"
    preserves: ClassVar[Tolerance] = Tolerance(rtol=2e-5, specials=False, roundings=8)

    def __post_init__(self) -> None:
        if self.specials:
            object.__setattr__(self, "preserves", EXACT)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        return PassResult.of_edits(*apply_rules(graph, context.taken((FoldedPair(self.specials),))))
