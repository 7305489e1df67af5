"""fold-lookups: what is computed of each row that is looked up in a constant table is computed of the table, once.

The norm after an embedding, and an activation or a scale on it, then cost nothing: a row of the new table is the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mlec.ir import Const, Graph, GraphBuilder, Match, Miss, Node, P, Rule, Trait, Value, apply_rules
from mlec.ir.dim import product
from mlec.ir.pattern import match
from mlec.pipeline import Pass, PassContext, PassResult, Tolerance, ulp


class NormOfRows(Rule):
    """f(gather(table, i)) -> gather(f(table), i), for f that works on each row by itself"""

    pattern = P(Trait.ELEMENTWISE | Trait.NORMALISATION)

    def check(self, m: Match, graph: Graph) -> Miss | None:
        found = _lookup(m.node, graph)
        if found is None:
            return Miss()
        if graph.use_count(found.nodes["lookup"].output) > 1:
            return Miss("the rows that are looked up are used by others as well, so the table would be stored twice")
        if graph.use_count(found["table"]) > 1:
            return Miss("the table is used by others as well, and would be stored twice")
        return None

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        node, found = m.node, _lookup(m.node, graph)
        assert found is not None
        operands = [
            found.constants["table"] if v is found.nodes["lookup"].output else graph.constant_value(v)
            for v in node.inputs
        ]
        arrays = [a for a in operands if a is not None]
        with np.errstate(all="ignore"):
            (table,) = node.op.evaluate(arrays, node.attrs, {})
        return b("gather", b.constant(table, found["table"].hint), found["i"], **found.nodes["lookup"].attrs)


LOOKUP = P("gather", Const(bind="table"), "i", bind="lookup")


def _lookup(node: Node, graph: Graph) -> Match | None:
    """The rows of a table of floats that a node works on one by one, its other operands being constants that are the same for each."""
    if len(node.outputs) != 1 or node.name == "group_norm":
        return None
    found: Match | None = None
    for value in node.inputs:
        producer = graph.producer.get(value)
        m = None if producer is None or producer.name != "gather" else match(LOOKUP, producer, graph)
        if m is not None and (found is None or m.node is found.node):
            found = m
        elif graph.constant_value(value) is None or value.type.rank > 1:
            return None
    if (
        found is None
        or found.node.attrs["axis"] % found.constants["table"].ndim != 0
        or found.constants["table"].ndim != 2
    ):
        return None
    row = found.node.output.type
    if node.output.type.shape != row.shape or not _on_last_axis(node) or product(row.shape[-1:]) == 1:
        return None
    return found


def _on_last_axis(node: Node) -> bool:
    """Whether the node works on elements, or on the last axis only."""
    return node.op.has(Trait.ELEMENTWISE) or node.attrs["axis"] % node.output.type.rank == node.output.type.rank - 1


@dataclass(frozen=True)
class FoldLookups(Pass):
    """Computes of a constant table what would be computed of each row that is looked up in it."""

    name: ClassVar[str] = "fold-lookups"
    before: ClassVar[str] = "layout"
    preserves: ClassVar[Tolerance] = ulp(4)  # a library may round otherwise at the end of a vector than in its middle

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        return PassResult.of_edits(*apply_rules(graph, context.taken((NormOfRows(),))))
