"""Sums of products by constants, as the gates of recurrent cells are: what they are sums of, however the source wrote them.

A gate may be a column range of one wide product, a product of its own, or one product of the input and the state side by side; the
product with the input may be in the loop or have been made for the whole sequence before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mlec.ir import Dim, Graph, Node, Value
from mlec.ir.dim import static
from mlec.ir.op import Array

Range = tuple[int, int]


@dataclass(frozen=True)
class Source:
    """What a product reads: a value ``[n, k]``, or one place of a sequence.

    Attributes:
        value: that value, or the sequence, of three axes.
        axis: of the sequence, that of the steps; None for a value by itself.
        place: along this axis.
    """

    value: Value
    axis: int | None = None
    place: int = 0

    @property
    def rows(self) -> Dim:
        """n"""
        return self.value.type.shape[1 if self.axis == 0 else 0]

    @property
    def features(self) -> int:
        """k"""
        return static(self.value.type.shape[-1])


@dataclass(frozen=True)
class Term:
    """``source @ weights[rows, columns]``, or the columns of a constant that is added.

    Attributes:
        nodes: that of the product, and what joins the source with others before it; none for a product of a whole sequence.
    """

    source: Source | None
    weights: Value
    rows: Range
    columns: Range
    nodes: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Affine:
    """A sum of terms.

    Attributes:
        width: columns.
        terms: in the order of the formula.
        nodes: those that compute it from the sources, other than those of whole sequences.
    """

    width: int
    terms: tuple[Term, ...]
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class _Part:
    """Columns of a value, or of one place of a sequence."""

    source: Source
    columns: Range


def affine(graph: Graph, *summands: Value, columns: Range | None = None) -> Affine | None:
    """The sum of values ``[n, k]``, or of some columns; None where it is of anything else than products by constants and constants."""
    terms: list[Term] = []
    nodes: list[Node] = []
    waiting = [_Part(Source(v), columns or (0, _width(v))) for v in reversed(summands)]
    while waiting:
        part = waiting.pop()
        value, at = part.source.value, part.source
        array = graph.constant_value(value)
        if array is not None:
            if at.axis is not None or array.size not in (1, _width(value)):
                return None
            terms.append(Term(None, value, (0, 1), part.columns if array.size > 1 else (0, 1)))
            continue
        node = graph.producer.get(value)
        if node is None or len(node.outputs) != 1:
            return None
        inner = _inner(graph, node, part)
        if at.axis is None and not isinstance(inner, Source):
            nodes.append(node)
        if isinstance(inner, Source):  # a step of a sequence
            waiting.append(_Part(inner, part.columns))
        elif inner is not None:
            waiting += reversed(inner)
        elif node.name == "matmul" and (found := _products(graph, node, part)) is not None:
            terms += found
            nodes += found[0].nodes[1:]
        else:
            return None
    width = max(map(_width, summands)) if columns is None else columns[1] - columns[0]
    return Affine(width, tuple(terms), tuple(nodes))


def source_of(graph: Graph, value: Value) -> Source:
    """Where a value ``[n, k]`` comes from: itself, or a place of a sequence of which it is a step."""
    view = graph.producer.get(value)
    cut = graph.producer.get(view.inputs[0]) if view is not None and view.name == "reshape" else None
    if cut is None or cut.name != "slice" or cut.output.type.rank != 3 or value.type.rank != 2:
        return Source(value)
    axis, start = cut.attrs["axis"] % 3, cut.attrs["start"]
    shape = cut.output.type.shape
    whole = isinstance(cut.inputs[0].type.shape[axis], int) and isinstance(start, int)
    if axis == 2 or shape[axis] != 1 or not whole or value.type.shape != (shape[1 - axis], shape[2]):
        return Source(value)
    return Source(cut.inputs[0], axis, start)


def _inner(graph: Graph, node: Node, part: _Part) -> list[_Part] | Source | None:
    """The parts of which a sum or a range of columns consists, or the sequence that it is a step of; None for anything else."""
    at, rank = part.source, node.output.type.rank
    last = node.output.type.shape[-1]
    if node.name == "add":
        low, high = part.columns
        if any(v.type.shape[-1:] not in ((), (1,), (last,)) for v in node.inputs):
            return None
        varying = [v for v in node.inputs if graph.constant_value(v) is None]
        if any(v.type != node.output.type for v in varying):
            return None
        return [_Part(Source(v, at.axis, at.place) if v in varying else Source(v), (low, high)) for v in node.inputs]
    if node.name == "slice" and node.attrs["axis"] % rank == rank - 1 and node.attrs["step"] == 1:
        start, low, high = node.attrs["start"], *part.columns
        if not isinstance(start, int) or not isinstance(node.inputs[0].type.shape[-1], int):
            return None
        return [_Part(Source(node.inputs[0], at.axis, at.place), (start + low, start + high))]
    if node.name == "reshape" and at.axis is None:
        found = source_of(graph, node.output)
        return found if found.axis is not None else None
    return None


def _products(graph: Graph, node: Node, part: _Part) -> list[Term] | None:
    """One for each piece of what is multiplied: it may be joined of several values."""
    x, w = node.inputs
    weights = graph.constant_value(w)
    if weights is None or weights.ndim != 2 or x.type.rank != node.output.type.rank:
        return None
    joined = graph.producer.get(x)
    last = x.type.rank - 1
    pieces: tuple[Value, ...] = (x,)
    nodes: tuple[Node, ...] = (node,)
    if joined is not None and joined.name == "concat" and joined.attrs["axis"] % x.type.rank == last:
        pieces, nodes = joined.inputs, (node, joined)
    at, start = part.source, 0
    terms: list[Term] = []
    for piece in pieces:
        stop = start + static(piece.type.shape[last])
        source = source_of(graph, piece) if at.axis is None else Source(piece, at.axis, at.place)
        terms.append(Term(source, w, (start, stop), part.columns, nodes if at.axis is None else ()))
        start = stop
    return terms


def weights_of(graph: Graph, terms: Iterable[Term], source: Source) -> Array:
    """What a source is multiplied by in a sum, turned: ``[columns, rows]``."""
    found = (
        _array(graph, t)[t.rows[0] : t.rows[1], t.columns[0] : t.columns[1]].T for t in terms if t.source == source
    )
    return np.asarray(sum(found))


def offset_of(graph: Graph, terms: Iterable[Term]) -> Array:
    """The sum of the constants that are added: ``[columns]``, or one number."""
    found = (_array(graph, t).reshape(-1)[t.columns[0] : t.columns[1]] for t in terms if t.source is None)
    return np.asarray(sum(found))


def _array(graph: Graph, term: Term) -> Array:
    array = graph.constant_value(term.weights)
    assert array is not None
    return array


def _width(value: Value) -> int:
    return static(value.type.shape[-1]) if value.type.rank and isinstance(value.type.shape[-1], int) else 1
