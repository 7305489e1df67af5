"""Tables of which rows are looked up, as those of embeddings: each row in 8 bits, with a scale of its own.

A row is what a product with the table transposed has for a column. So where an output layer has the weights of the embedding, both
have the same numbers of 8 bits.
"""

from __future__ import annotations

from mlec.ir import Graph, GraphBuilder, Node, Value
from mlec.ir.dtype import DType
from mlec.ir.op import Array

LEAST_BYTES = 1 << 14
"""Of a table in float32 that is worth rounding: of a smaller one less is saved than the scales of a few layers take."""


def table_of(graph: Graph, node: Node) -> Array | None:
    """What a node looks up rows of: float32 ``[rows, columns]``, or None."""
    table = graph.constant_value(node.inputs[0]) if node.name == "gather" else None
    if table is None or table.ndim != 2 or table.dtype != DType.F32.numpy or node.attrs["axis"] % 2:
        return None
    return table


def rows_of(b: GraphBuilder, weights: Value, scales: Value, picks: Value) -> Value:
    """What picked rows of 8 bits stand for, as f32.

    Args:
        b: writes it.
        weights: i8 ``[rows, columns]``.
        scales: f32 ``[rows, 1]``.
        picks: numbers of rows.
    """
    rows = b("cast", b("gather", weights, picks, axis=0), dtype=DType.F32)
    return b("mul", rows, b("gather", scales, picks, axis=0))
