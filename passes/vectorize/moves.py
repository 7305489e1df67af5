"""Chains of cuts and joins, as assignments to parts of a tensor leave them, become one join of what was cut first.

``out[:, i] = f(x[:, i])`` writes all of ``out`` anew each time: ``concat(out[:, :i], f(...), out[:, i + 1:])``. Of each tensor that
is read by anything but such a cut or join, the pieces are traced through all of them to where they were computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlec.ir import Graph, GraphBuilder, Location, Node, Value
from mlec.ir.printer import print_node, value_names
from mlec.pipeline import Remark

RULE = "resolve-moves"


@dataclass(frozen=True)
class _Piece:
    """The elements ``start`` to ``stop`` of a value along an axis."""

    value: Value
    start: int
    stop: int


def resolve_moves(graph: Graph) -> tuple[Graph, list[Remark]]:
    """The graph (the same object if nothing changed) without chains of cuts, joins and constant indices."""
    b = GraphBuilder(graph.name)
    b.adopt_interface(graph)
    names = value_names(graph)
    remarks: list[Remark] = []
    for node in graph.nodes:
        with b.at(Location.merged([node.loc], RULE)):
            found = _resolved(b, node, graph)
        if found is None:
            b.keep(node)
            continue
        b.replace(node.output, found)
        text = print_node(node, names).splitlines()[0]
        shown = text if len(text) <= 100 else f"{text[:97]}..."
        remarks.append(Remark("applied", f"reads its elements from where they were computed: {shown}", node.loc, RULE))
    return (b.finish(graph.outputs, signature=graph.given_signature), remarks) if remarks else (graph, [])


def _resolved(b: GraphBuilder, node: Node, graph: Graph) -> Value | None:
    if node.name == "gather":
        return _as_slice(b, node, graph)
    axis = _axis(node)
    if axis is None or not _read_by_others(graph, node, axis):
        return None
    if not _extent(node.output, axis):
        return None  # of nothing, there are no pieces
    pieces = _merged(_trace(graph, node.output, axis))
    given = [_Piece(v, 0, _extent(v, axis)) for v in node.inputs]
    if node.name == "slice":
        given = [_Piece(node.inputs[0], node.attrs["start"], node.attrs["stop"])]
    if pieces == given or (len(pieces) >= len(given) and node.name == "concat" and not _shortens(graph, node, axis)):
        return None
    values = [_cut(b, piece, axis) for piece in pieces]
    return values[0] if len(values) == 1 else b("concat", *values, axis=axis)


def _shortens(graph: Graph, node: Node, axis: int) -> bool:
    """Whether some operand is itself cut from, or joined of, something along the same axis."""
    producers = [graph.producer.get(v) for v in node.inputs]
    inner = [p for p in producers if p is not None and _axis(p) == axis]
    return any(p.name == "concat" or _moves(graph.producer.get(p.inputs[0]), axis) for p in inner)


def _moves(node: Node | None, axis: int) -> bool:
    return node is not None and _axis(node) == axis


def _extent(value: Value, axis: int) -> int:
    extent = value.type.shape[axis]
    assert isinstance(extent, int)
    return extent


def _axis(node: Node) -> int | None:
    """The axis along which a node cuts or joins, all places known; None for other nodes."""
    if node.name not in ("slice", "concat"):
        return None
    axis = int(node.attrs["axis"] % node.output.type.rank)
    if not all(isinstance(v.type.shape[axis], int) for v in node.inputs):
        return None
    if node.name == "concat":
        return axis
    places = node.attrs["start"], node.attrs["stop"]
    return axis if node.attrs["step"] == 1 and all(isinstance(p, int) for p in places) else None


def _read_by_others(graph: Graph, node: Node, axis: int) -> bool:
    users = graph.users.get(node.output, ())
    reads = sum(user.inputs.count(node.output) for user in users)
    return graph.use_count(node.output) > reads or any(not _moves(user, axis) for user in users)


def _trace(graph: Graph, value: Value, axis: int) -> list[_Piece]:
    """The pieces that make up a value, each of a value that is neither cut nor joined along the axis."""
    found: list[_Piece] = []
    waiting = [_Piece(value, 0, _extent(value, axis))]
    while waiting:
        piece = waiting.pop()
        node = graph.producer.get(piece.value)
        if node is None or not _moves(node, axis):
            found.append(piece)
        elif node.name == "slice":
            offset = node.attrs["start"]
            waiting.append(_Piece(node.inputs[0], piece.start + offset, piece.stop + offset))
        else:
            inner: list[_Piece] = []
            offset = 0
            for operand in node.inputs:
                extent = _extent(operand, axis)
                start, stop = max(piece.start - offset, 0), min(piece.stop - offset, extent)
                if start < stop:
                    inner.append(_Piece(operand, start, stop))
                offset += extent
            waiting += reversed(inner)
    return found


def _merged(pieces: Sequence[_Piece]) -> list[_Piece]:
    """Pieces that lie beside each other in the same value as one."""
    merged: list[_Piece] = []
    for piece in pieces:
        if merged and merged[-1].value is piece.value and merged[-1].stop == piece.start:
            piece = _Piece(piece.value, merged.pop().start, piece.stop)
        merged.append(piece)
    return merged


def _cut(b: GraphBuilder, piece: _Piece, axis: int) -> Value:
    value = b.resolve(piece.value)
    if (piece.start, piece.stop) == (0, _extent(value, axis)):
        return value
    return b("slice", value, axis=axis, start=piece.start, stop=piece.stop)


def _as_slice(b: GraphBuilder, node: Node, graph: Graph) -> Value | None:
    """gather by constant indices at equal distances, as a slice."""
    x, places = b.resolve(node.inputs[0]), graph.constant_value(node.inputs[1])
    axis = node.attrs["axis"] % x.type.rank
    extent = x.type.shape[axis]
    if places is None or places.ndim > 1 or not places.size or not isinstance(extent, int):
        return None
    clipped = np.clip(places.reshape(-1), 0, extent - 1)
    gaps = np.unique(np.diff(clipped))
    step = int(gaps[0]) if len(gaps) == 1 else 1
    if len(gaps) > 1 or step == 0:
        return None
    low, high = int(clipped.min()), int(clipped.max())
    value = (
        x
        if (low, high, abs(step)) == (0, extent - 1, 1)
        else b("slice", x, axis=axis, start=low, stop=high + 1, step=abs(step))
    )
    if step < 0:
        value = b("flip", value, axes=(axis,))
    return value if places.ndim else b("reshape", value, shape=node.output.type.shape)
