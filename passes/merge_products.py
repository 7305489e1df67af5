"""merge-products: products of one operand by several narrow matrices become one product, whose columns are cut apart.

The columns of a product are computed in blocks of vectors, and a narrow product fills its last block with zeros. Side by side, several
share it: two products with one column each cost as much as one with two. Wide products gain nothing from company: reading the
operand once more is nothing beside their arithmetic, and cutting the result apart costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mlec.ir import Graph, GraphBuilder, Location, Node, Value
from mlec.ir.dim import static
from mlec.ops.rows import most_columns, rows_of
from mlec.passes.layout import padded_columns
from mlec.passes.split_products import only_attention_reads
from mlec.pipeline import Pass, PassContext, PassResult, Remark, Tolerance, ulp
from mlec.wording import plural

CUT = 16
"""What it costs to copy an element of the result, in terms of multiplications: measured."""


@dataclass(frozen=True)
class MergeProducts(Pass):
    """Products of the same operand by constant matrices become one where that saves more padding than the cuts cost."""

    name: ClassVar[str] = "merge-products"
    before: ClassVar[str] = "layout"
    preserves: ClassVar[Tolerance] = ulp(16)  # a library may sum in another order for another number of columns

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        together: dict[Value, list[Node]] = {}
        wide: dict[Value, list[Node]] = {}
        for node in graph.nodes:
            if node.name == "matmul" and _may_merge(node, graph):
                narrow = _is_narrow(node, context.target.vector_bytes)
                (together if narrow else wide).setdefault(node.inputs[0], []).append(node)
        merged: dict[Node, list[Node]] = {}
        remarks = [_stay_apart(nodes, "their columns fill vectors") for nodes in wide.values() if len(nodes) > 1]
        for nodes in together.values():
            if len(nodes) < 2:
                continue
            loc, widths = Location.merged((n.loc for n in nodes), self.name), _widths(nodes)
            reason = _reason_against(nodes, widths, context.target.vector_bytes)
            if reason:
                remarks.append(_stay_apart(nodes, reason))
                continue
            remarks.append(
                Remark("applied", f"products with {_listed(widths)} columns become one with {sum(widths)}", loc)
            )
            merged[nodes[0]] = nodes
        if not merged:
            return PassResult(graph, tuple(remarks))
        return PassResult(_rewritten(graph, merged), tuple(remarks))


def _listed(widths: Sequence[int]) -> str:
    return ", ".join(map(str, widths))


def _widths(nodes: Sequence[Node]) -> list[int]:
    return [static(n.output.type.shape[-1]) for n in nodes]


def _stay_apart(nodes: Sequence[Node], reason: str) -> Remark:
    message = f"products with {_listed(_widths(nodes))} columns stay apart: {reason}"
    return Remark("missed", message, Location.merged((n.loc for n in nodes), MergeProducts.name))


def _may_merge(node: Node, graph: Graph) -> bool:
    """Whether a product is one by a constant matrix. What attention reads must lie by itself."""
    weights = graph.constant_value(node.inputs[1])
    matrix = weights is not None and weights.ndim == 2 and node.output.type.dtype.is_float
    return matrix and not only_attention_reads(graph, node.output)


def _is_narrow(node: Node, vector_bytes: int) -> bool:
    """Whether a product has zeros in its last block."""
    kind, columns = node.output.type, static(node.output.type.shape[-1])
    return padded_columns(columns, vector_bytes // kind.dtype.itemsize) > columns > 0


def _reason_against(nodes: Sequence[Node], widths: Sequence[int], vector_bytes: int) -> str:
    """Why products stay apart; empty if they do not."""
    kind = nodes[0].output.type
    lanes, depth = vector_bytes // kind.dtype.itemsize, static(nodes[0].inputs[1].type.shape[0])
    rows = [rows_of(node) for node in nodes]
    if all(n is not None and sum(widths) > most_columns(n) for n in rows):
        return "each of them is narrow enough for a kernel with what is around it, and together they are not"
    apart, one = sum(padded_columns(width, lanes) for width in widths), padded_columns(sum(widths), lanes)
    if (apart - one) * depth <= CUT * sum(widths):
        return f"{plural(apart - one, 'column')} of padding less: not worth the cuts"
    return ""


def _rewritten(graph: Graph, merged: dict[Node, list[Node]]) -> Graph:
    b = GraphBuilder(graph.name)
    b.adopt_interface(graph)
    for node in graph.nodes:
        if node in merged:
            _merge(b, graph, merged[node])
        elif all(b.resolve(v) is v for v in node.outputs):
            b.keep(node)
    return b.finish(graph.outputs, signature=graph.given_signature)


def _merge(b: GraphBuilder, graph: Graph, nodes: Sequence[Node]) -> None:
    matrices = [array for n in nodes if (array := graph.constant_value(n.inputs[1])) is not None]
    with b.at(Location.merged((n.loc for n in nodes), MergeProducts.name)):
        whole = b("matmul", nodes[0].inputs[0], b.constant(np.concatenate(matrices, axis=1), nodes[0].inputs[1].hint))
        start = 0
        for node, matrix in zip(nodes, matrices, strict=True):
            stop = start + matrix.shape[1]
            part = b("slice", whole, axis=whole.type.rank - 1, start=start, stop=stop, hint=node.output.hint)
            b.replace(node.output, part)
            start = stop
