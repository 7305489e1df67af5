"""Reductions axis by axis, as a mean over an image is often written."""

from __future__ import annotations

from mlec.ir import Graph, GraphBuilder, Match, Miss, P, Rule, Value
from mlec.passes.canonicalize.views import merged_axes


class MergeSums(Rule):
    """mean(mean(x)) -> mean(x), over the axes of both; as well sum"""

    pattern = P("mean|sum", P("mean|sum", "x", bind="inner"))
    rounds_once = True

    def check(self, m: Match, graph: Graph) -> Miss | None:
        inner = m.nodes["inner"]
        alike = inner.name == m.node.name and inner.attrs["keepdims"] == m.node.attrs["keepdims"]
        return None if alike and m["x"].type.dtype.is_float and graph.use_count(inner.output) == 1 else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b(m.node.op, m["x"], axes=merged_axes(m.nodes["inner"], m.node), keepdims=m.node.attrs["keepdims"])


RULES: tuple[Rule, ...] = (MergeSums(),)
