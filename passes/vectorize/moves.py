"""Chains of cuts and joins, as assignments to parts of a tensor leave them, become one join of what was cut first.

``out[:, i] = f(x[:, i])`` writes all of ``out`` anew each time: ``concat(out[:, :i], f(...), out[:, i + 1:])``. Of each tensor that
is read by anything but such a cut or join, the pieces are traced through all of them to where they were computed. Many pieces of few
tensors are picked by their places, and places that are picked from what was picked are places of the first tensor: all of it, or a
part at equal distances, is no gather at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlec.ir import Dim, Graph, GraphBuilder, Location, Node, Value
from mlec.ir.op import Array
from mlec.ir.printer import print_node, value_names
from mlec.pipeline import Remark

Ints = npt.NDArray[np.int64]

RULE = "resolve-moves"
MANY_PIECES = 8
"""From here on, picking pieces by their places takes less time than a loop that asks for each element which of them it is in."""


@dataclass(frozen=True)
class Piece:
    """The elements ``start`` to ``stop`` of a value along an axis."""

    value: Value
    start: Dim
    stop: Dim


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
    if node.name in ("gather", "take_along_axis"):
        return _picked(b, node, graph)
    axis = _axis(node)
    if axis is None or not _read_by_others(graph, node, axis):
        return None
    if not _extent(node.output, axis):
        return None  # of nothing, there are no pieces
    pieces = _merged(_trace(graph, node.output, axis))
    given = [Piece(v, 0, _extent(v, axis)) for v in node.inputs]
    if node.name == "slice":
        given = [Piece(node.inputs[0], node.attrs["start"], node.attrs["stop"])]
    if pieces == given:
        return None
    if node.name == "slice" or len(pieces) < len(given) or _shortens(graph, node, axis) or _are_scattered(pieces):
        return join(b, [Piece(b.resolve(p.value), p.start, p.stop) for p in pieces], axis)
    return None


def join(b: GraphBuilder, pieces: Sequence[Piece], axis: int) -> Value:
    """Pieces of values that are there, one after the other."""
    pieces = _merged(pieces)
    if not _are_scattered(pieces):
        values = [_cut(b, piece, axis) for piece in pieces]
        return values[0] if len(values) == 1 else b("concat", *values, axis=axis)
    windows = _windows(pieces)
    offset, start = {}, 0
    for window in windows:
        offset[window.value] = start - _known(window.start)
        start += _known(window.stop) - _known(window.start)
    whole = join(b, windows, axis)
    places = [np.arange(_known(p.start), _known(p.stop)) + offset[p.value] for p in pieces]
    return b("gather", whole, b.constant(np.concatenate(places), "places"), axis=axis)


def _are_scattered(pieces: Sequence[Piece]) -> bool:
    """Whether many pieces are most of what lies between the first and the last one of each of few values."""
    if len(pieces) < MANY_PIECES or not all(isinstance(end, int) for p in pieces for end in (p.start, p.stop)):
        return False
    windows = _windows(pieces)
    taken, wide = (sum(_known(p.stop) - _known(p.start) for p in found) for found in (pieces, windows))
    return 4 * len(windows) <= len(pieces) and wide <= 2 * taken


def _windows(pieces: Sequence[Piece]) -> list[Piece]:
    """For each value, from the start of the first of its pieces to the end of the last one."""
    ends: dict[Value, list[int]] = {}
    for piece in pieces:
        ends.setdefault(piece.value, []).extend((_known(piece.start), _known(piece.stop)))
    return [Piece(value, min(found), max(found)) for value, found in ends.items()]


def _known(dim: Dim) -> int:
    assert isinstance(dim, int)
    return dim


def _shortens(graph: Graph, node: Node, axis: int) -> bool:
    """Whether some operand is itself cut from, or joined of, something along the same axis."""
    producers = [graph.producer.get(v) for v in node.inputs]
    inner = [p for p in producers if p is not None and _axis(p) == axis]
    return any(p.name == "concat" or _moves(graph.producer.get(p.inputs[0]), axis) for p in inner)


def _moves(node: Node | None, axis: int) -> bool:
    return node is not None and _axis(node) == axis


def _extent(value: Value, axis: int) -> int:
    return _known(value.type.shape[axis])


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


def _trace(graph: Graph, value: Value, axis: int) -> list[Piece]:
    """The pieces that make up a value, each of a value that is neither cut nor joined along the axis."""
    found: list[Piece] = []
    waiting = [(_seen_alike(graph, value), 0, _extent(value, axis))]
    while waiting:
        value, start, stop = waiting.pop()
        node = graph.producer.get(value)
        if node is None or not _moves(node, axis):
            found.append(Piece(value, start, stop))
        elif node.name == "slice":
            offset = node.attrs["start"]
            waiting.append((_seen_alike(graph, node.inputs[0]), start + offset, stop + offset))
        else:
            inner: list[tuple[Value, int, int]] = []
            offset = 0
            for operand in node.inputs:
                extent = _extent(operand, axis)
                first, last = max(start - offset, 0), min(stop - offset, extent)
                if first < last:
                    inner.append((_seen_alike(graph, operand), first, last))
                offset += extent
            waiting += reversed(inner)
    return found


def _seen_alike(graph: Graph, value: Value) -> Value:
    """What reshapes that cancel each other made the value of, else the value."""
    first = value
    while (node := graph.producer.get(first)) is not None and node.name == "reshape":
        (first,) = node.inputs
        if first.type == value.type:
            return _seen_alike(graph, first)
    return value


def _merged(pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces that lie beside each other in the same value as one."""
    merged: list[Piece] = []
    for piece in pieces:
        if merged and merged[-1].value is piece.value and merged[-1].stop == piece.start:
            piece = Piece(piece.value, merged.pop().start, piece.stop)
        merged.append(piece)
    return merged


def _cut(b: GraphBuilder, piece: Piece, axis: int) -> Value:
    if (piece.start, piece.stop) == (0, piece.value.type.shape[axis]):
        return piece.value
    return b("slice", piece.value, axis=axis, start=piece.start, stop=piece.stop)


def _picked(b: GraphBuilder, node: Node, graph: Graph) -> Value | None:
    """A gather by places that are known, from where they were first, as a slice if they are at equal distances."""
    x, shape = node.inputs[0], node.output.type.shape
    axis = node.attrs["axis"] % x.type.rank
    places = _same_places(graph, node, axis)
    if places is None or not places.size or not isinstance(x.type.shape[axis], int):
        return None
    picked = np.clip(places, 0, _extent(x, axis) - 1).reshape(-1).astype(np.int64)
    x, picked = _first_places(graph, x, picked, axis)
    gaps = np.unique(np.diff(picked))
    step = int(gaps[0]) if len(gaps) == 1 else int(len(picked) == 1)
    if step > 0:
        first, last = int(picked[0]), int(picked[-1])
        x = b.resolve(x)
        if (first, last, step) != (0, _extent(x, axis) - 1, 1):
            x = b("slice", x, axis=axis, start=first, stop=last + 1, step=step)
    elif x is node.inputs[0] and node.name == "gather":
        return None
    else:
        x = b("gather", b.resolve(x), b.constant(picked, "places"), axis=axis)
    return x if x.type.shape == shape else b("reshape", x, shape=shape)


def _same_places(graph: Graph, node: Node, axis: int) -> Array | None:
    """The places that are picked along the axis, if they are known, and of ``take_along_axis`` the same beside every other one."""
    indices = node.inputs[1]
    spread = graph.producer.get(indices)
    if node.name == "take_along_axis" and spread is not None and spread.name == "broadcast_to":
        indices = spread.inputs[0]
    places = graph.constant_value(indices)
    if places is None or node.name == "gather":
        return places
    along = axis - node.output.type.rank
    if places.ndim < -along or places.shape[along] != node.output.type.shape[axis] or not places.size:
        return None
    lines = np.moveaxis(places, along, 0).reshape(places.shape[along], -1)
    return None if (lines != lines[:, :1]).any() else np.asarray(lines[:, 0])


def _first_places(graph: Graph, x: Value, places: Ints, axis: int) -> tuple[Value, Ints]:
    """Where picks of picks, and of slices, come from: a value that is none, and places in it."""
    while (node := graph.producer.get(x)) is not None and node.name in ("gather", "take_along_axis", "slice"):
        (source, *_), own = node.inputs, node.attrs["axis"] % node.inputs[0].type.rank
        if own != axis or not isinstance(source.type.shape[axis], int):
            break
        if node.name == "slice":
            if not isinstance(node.attrs["start"], int):
                break
            places = node.attrs["start"] + node.attrs["step"] * places
        else:
            inner = _same_places(graph, node, axis)
            if inner is None or inner.ndim != 1:
                break
            places = np.clip(inner, 0, _extent(source, axis) - 1).astype(np.int64)[places]
        x = source
    return x, places
