"""Matrix products that are written for turned or flattened operands. Sums may be taken in another order."""

from __future__ import annotations

import numpy as np

from mlec.ir import Const, Graph, GraphBuilder, Match, Miss, P, Rule, Value
from mlec.passes.canonicalize.views import is_of_rows


class RowsInAxes(Rule):
    """reshape(matmul(reshape(x), w)) -> matmul(x, w), where the reshapes make rows of several axes, and axes of rows again"""

    pattern = P("reshape", P("matmul", P("reshape", "x"), Const(bind="w"), bind="product"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        product = m.nodes["product"]
        return (
            None
            if is_of_rows(product, m.node.output.type.shape, graph) and graph.use_count(product.output) == 1
            else Miss()
        )

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("matmul", m["x"], m["w"])


class TurnedProduct(Rule):
    """transpose(matmul(w, transpose(x))) -> matmul(x, transpose(w)), for a constant matrix w"""

    pattern = P("transpose", P("matmul", Const(bind="w"), P("transpose", "x", bind="turned"), bind="product"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        product = m.nodes["product"]
        turns = all(tuple(node.attrs["perm"]) == (1, 0) for node in (m.node, m.nodes["turned"]))
        return None if turns and graph.use_count(product.output) == 1 else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("matmul", m["x"], b.constant(np.ascontiguousarray(m.constants["w"].T), m["w"].hint))


RULES: tuple[Rule, ...] = (RowsInAxes(), TurnedProduct())
