"""Preprocessing as functions of one number: what a column of a matrix is, as a function of a column of what it is made from.

`ColumnFunctions` follows a matrix back through ops that treat each column by itself (elementwise ops with constants; slices, picks and
concatenations of columns) to its sources. The functions are evaluated by the references of the ops, so with their exact arithmetic.

They are analysed on *pieces*, intervals of floats. An interval is cut where an operand changes its sign or becomes NaN, or where
a condition changes, until each op on it is constant, or NaN, or monotone in its only operand that varies, by what is known of the op.
Floats are numbered in order, by *keys*; both zeros have 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from mlec.ir import Graph, Node, Trait, Value
from mlec.ir.op import Array
from mlec.passes.trees.arrays import Bools, Ints

MAX_CUTS = 16
"""How often pieces are cut before a function counts as too irregular."""

EXACTLY_ROUNDED = frozenset(["sign", "sqrt", "floor", "ceil", "round", "trunc", "relu", "clip"])
"""Monotone ops whose computed results are monotone, too: the exact ones, rounded. Those of others may be off by some units in the last
place, each to another side."""

CONSTANT, MONOTONE, REFUSED = range(3)
"""What a function is on a piece."""

P = ParamSpec("P")
R = TypeVar("R")
Kinds = npt.NDArray[np.int8]


def keys_of(numbers: Array) -> Ints:
    """i64: the place of each float in the order of its type; of both zeros 0."""
    kind = np.int32 if numbers.dtype == np.float32 else np.int64
    signed = numbers.view(kind).astype(np.int64)
    return np.where(signed >= 0, signed, np.iinfo(kind).min - signed)


def floats_of(keys: Ints, dtype: npt.DTypeLike) -> Array:
    """The inverse of `keys_of`."""
    kind = np.int32 if np.dtype(dtype) == np.float32 else np.int64
    return np.where(keys >= 0, keys, np.iinfo(kind).min - keys).astype(kind).view(dtype)


def last_key(holds: Callable[[Ints], Bools], low: Ints, high: Ints) -> Ints:
    """The largest key up to which a condition holds, for each interval: it must hold at ``low``, and not at ``high``."""
    while True:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        if bool((middle == low).all()):
            return low
        held = holds(middle)
        low, high = np.where(held, middle, low), np.where(held, high, middle)


@dataclass(frozen=True)
class Pieces:
    """Intervals of keys, both ends included, sorted by column and key; those of a column leave out NaN only.

    Attributes:
        dtype: of the source.
        column: i64[P], the column of the matrix that is a function on it; low, high: i64[P].
    """

    dtype: np.dtype[np.floating]
    column: Ints
    low: Ints
    high: Ints

    @staticmethod
    def whole(columns: Ints, dtype: np.dtype[np.floating]) -> Pieces:
        """From minus to plus infinity."""
        (last,) = keys_of(np.asarray([np.inf], dtype))
        return Pieces(dtype, columns, np.full(len(columns), -last), np.full(len(columns), last))

    def cut(self, at: Ints, last: Ints) -> Pieces:
        """With the pieces ``at`` cut behind the keys ``last``."""
        high = self.high.copy()
        high[at] = last
        column, low, high = (
            np.concatenate(pair)
            for pair in ((self.column, self.column[at]), (self.low, last + 1), (high, self.high[at]))
        )
        order = np.lexsort((low, column))
        return Pieces(self.dtype, column[order], low[order], high[order])

    def ends(self) -> tuple[Array, Array]:
        """The first and the last number of each."""
        return floats_of(self.low, self.dtype), floats_of(self.high, self.dtype)


class ColumnFunctions:
    """The columns of a matrix as functions of columns of its sources.

    Args:
        graph: with constants folded.
        matrix: [rows, columns], floats.
    """

    def __init__(self, graph: Graph, matrix: Value) -> None:
        self.graph = graph
        self.matrix = matrix

    # -- structure -----------------------------------------------------------------------------------------------

    def _step(self, value: Value) -> Node | None:
        """The op that makes a value column by column; None for a source."""
        node = self.graph.producer.get(value)
        if node is None or value.type.rank != 2:
            return None
        if node.name in ("concat", "slice", "gather"):
            matrices = node.inputs[:1] if node.name == "gather" else node.inputs
            static = all(v.type.rank == 2 and isinstance(v.type.shape[1], int) for v in matrices)
            known = node.name != "gather" or self.graph.constant_value(node.inputs[1]) is not None
            return node if node.attrs["axis"] in (1, -1) and static and known else None
        if not node.op.has(Trait.ELEMENTWISE):
            return None
        for operand in node.inputs:
            constant = self.graph.constant_value(operand)
            if constant is not None and constant.ndim > 1 and constant.shape[0] != 1:
                return None
            if constant is None and operand.type.shape != value.type.shape:
                return None  # a number for each row
            if constant is None and not (operand.type.dtype.is_float or operand.type.dtype.is_bool):
                return None  # integers have no keys
        return node

    def _moved(self, node: Node, columns: Ints) -> list[tuple[Value, Ints | slice, Ints]]:
        """Where the columns of a slice, gather or concatenation are: operands, which of ``columns`` they have, at which of their own."""
        if node.name == "slice":
            return [(node.inputs[0], slice(None), int(node.attrs["start"]) + int(node.attrs["step"]) * columns)]
        if node.name == "gather":
            (x, _), places, width = node.inputs, self.graph.constant_value(node.inputs[1]), node.inputs[0].type.shape[1]
            assert places is not None
            assert isinstance(width, int)
            return [(x, slice(None), np.clip(places, 0, width - 1).astype(np.int64)[columns])]
        parts: list[tuple[Value, Ints | slice, Ints]] = []
        start = 0
        for operand in node.inputs:
            width = operand.type.shape[1]
            assert isinstance(width, int)
            where = np.flatnonzero((columns >= start) & (columns < start + width))
            if where.size:
                parts.append((operand, where, columns[where] - start))
            start += width
        return parts

    def _constant(self, value: Value, columns: Ints) -> Array | None:
        """``[K]``: a constant's elements in columns."""
        constant = self.graph.constant_value(value)
        if constant is None:
            return None
        row = constant.reshape(-1)
        return np.asarray(row[columns if len(row) > 1 else np.zeros_like(columns)])

    def sources(self, columns: Ints) -> tuple[list[Value], Ints, Ints]:
        """Where columns come from: the sources, which of them each is a function of, and of which of its columns.

        A column that is not a function of exactly one has -1.
        """
        found: list[Value] = []
        unknown = -2

        def follow(value: Value, columns: Ints) -> tuple[Ints, Ints]:
            source, place = np.full(len(columns), unknown), np.full(len(columns), unknown)
            if self.graph.constant_value(value) is not None:
                return source, place
            node = self._step(value)
            if node is None:
                if value not in found:
                    found.append(value)
                return np.full(len(columns), found.index(value)), columns
            if node.op.has(Trait.ELEMENTWISE):
                for operand in dict.fromkeys(node.inputs):
                    theirs, at = walk(operand, columns)
                    differs = (theirs != unknown) & (source != unknown) & ((theirs != source) | (at != place))
                    fresh = source == unknown
                    source, place = np.where(fresh, theirs, source), np.where(fresh, at, place)
                    source = np.where(differs, -1, source)
            else:
                for operand, where, inner in self._moved(node, columns):
                    source[where], place[where] = walk(operand, inner)
            return source, place

        walk = _remembered(follow)
        source, place = walk(self.matrix, columns)
        return found, np.maximum(source, -1), np.where(source >= 0, place, -1)

    # -- evaluation ----------------------------------------------------------------------------------------------

    def __call__(self, columns: Ints, numbers: Array) -> Array:
        """``[K]``: the values of columns of the matrix where their sources have these numbers."""
        return self.value(self.matrix, columns, numbers)

    def value(
        self, value: Value, columns: Ints, numbers: Array, visit: Callable[[Node, Array, Ints], None] | None = None
    ) -> Array:
        """The same of any value on the way from the sources.

        Args:
            visit: is told, of each elementwise op, its results and which of the numbers they belong to.
        """

        def compute(value: Value, columns: Ints, index: Ints) -> Array:
            constant = self._constant(value, columns)
            if constant is not None:
                return constant
            node = self._step(value)
            if node is None:
                return numbers[index]
            if node.op.has(Trait.ELEMENTWISE):
                operands = [remembered(operand, columns, index) for operand in node.inputs]
                (result,) = node.op.evaluate(operands, node.attrs, {})
                if visit is not None:
                    visit(node, result, index)
                return result
            result = np.empty(len(columns), value.type.dtype.numpy)
            for operand, where, inner in self._moved(node, columns):
                result[where] = remembered(operand, inner, index[where])
            return result

        remembered = _remembered(compute)
        with np.errstate(all="ignore"):
            return remembered(value, columns, np.arange(len(columns)))

    # -- analysis ------------------------------------------------------------------------------------------------

    def pieces(self, columns: Ints, dtype: np.dtype[np.floating]) -> tuple[Pieces, dict[int, str]]:
        """Intervals on each of which a column is monotone, constant or NaN.

        Args:
            columns: such as are functions of one column of a source of that dtype.

        Returns:
            The pieces, and the columns of which that is not known, with the op that is in the way.
        """
        pieces = Pieces.whole(columns, dtype)
        for _ in range(MAX_CUTS):
            analysis = _Analysis(self, pieces)
            kinds = analysis.kinds()
            if not analysis.cuts:
                refused = np.flatnonzero(kinds == REFUSED)
                return pieces, {int(pieces.column[p]): analysis.reasons.get(int(p), "an op") for p in refused}
            at, last = analysis.found_cuts()
            pieces = pieces.cut(at, last)
        return pieces, {int(c): "a function of too many pieces" for c in columns}


class _Analysis:
    """What the ops do on pieces, and where pieces must be cut before that can be said."""

    def __init__(self, functions: ColumnFunctions, pieces: Pieces) -> None:
        self.functions = functions
        self.pieces = pieces
        self.reasons: dict[int, str] = {}
        self.cuts: list[tuple[Ints, Value, Ints, _Test]] = []
        self._kinds = _remembered(self._kinds_of)

    def kinds(self) -> Kinds:
        """What the function of the matrix is on each piece; not to be read where ``cuts`` are asked for."""
        return self._kinds(self.functions.matrix, self.pieces.column, np.arange(len(self.pieces.column)))

    def found_cuts(self) -> tuple[Ints, Ints]:
        """One cut for each piece that needs any: the pieces, and the last keys before the cuts."""
        at: list[Ints] = []
        last: list[Ints] = []
        cut = np.zeros(len(self.pieces.column), bool)
        for index, value, columns, test in self.cuts:
            fresh = ~cut[index]
            where, columns = index[fresh], columns[fresh]
            cut[where] = True
            low, high = self.pieces.low[where], self.pieces.high[where]

            def answer(keys: Ints, value: Value = value, columns: Ints = columns, test: _Test = test) -> Bools:
                return test(self.functions.value(value, columns, floats_of(keys, self.pieces.dtype)))

            first = answer(low)
            at.append(where)
            last.append(last_key(lambda keys, answer=answer, first=first: answer(keys) == first, low, high))  # type: ignore[misc]
        return np.concatenate(at), np.concatenate(last)

    def _kinds_of(self, value: Value, columns: Ints, index: Ints) -> Kinds:
        functions = self.functions
        if functions.graph.constant_value(value) is not None:
            return np.full(len(columns), CONSTANT, np.int8)
        node = functions._step(value)
        if node is None:
            return np.full(len(columns), MONOTONE, np.int8)
        if not node.op.has(Trait.ELEMENTWISE):
            kinds = np.empty(len(columns), np.int8)
            for operand, where, inner in functions._moved(node, columns):
                kinds[where] = self._kinds(operand, inner, index[where])
            return kinds
        operands = np.stack([self._kinds(operand, columns, index) for operand in node.inputs])
        rule = self._chosen if node.name == "where" else self._applied
        kinds = rule(node, operands, columns, index)
        for piece in index[(kinds == REFUSED) & ~(operands == REFUSED).any(axis=0)]:
            self.reasons.setdefault(int(piece), node.name)
        return kinds

    def _ends(self, value: Value, columns: Ints, index: Ints) -> tuple[Array, Array]:
        """A value at both ends of pieces."""
        low, high = self.pieces.ends()
        return self.functions.value(value, columns, low[index]), self.functions.value(value, columns, high[index])

    def _constant_test(self, value: Value, columns: Ints, index: Ints, kinds: Kinds, test: _Test) -> Bools:
        """Which pieces a test that changes once at most divides; they are marked to be cut."""
        low, high = (test(end) for end in self._ends(value, columns, index))
        divided = (kinds == MONOTONE) & (low != high)
        if divided.any():
            self.cuts.append((index[divided], value, columns[divided], test))
        return np.asarray(divided)

    def _chosen(self, node: Node, operands: Kinds, columns: Ints, index: Ints) -> Kinds:
        """``where``: one of two, on pieces on which the condition is constant."""
        condition = node.inputs[0]
        kinds = operands[0]
        if self._is_rounded(condition):
            kinds = np.where(kinds == MONOTONE, REFUSED, kinds).astype(np.int8)
        divided = self._constant_test(condition, columns, index, kinds, _truth)
        holds = self._ends(condition, columns, index)[0].astype(bool)
        chosen = np.where(holds, operands[1], operands[2])
        return np.where(kinds == REFUSED, REFUSED, np.where(divided, CONSTANT, chosen)).astype(np.int8)

    def _applied(self, node: Node, operands: Kinds, columns: Ints, index: Ints) -> Kinds:
        """Any other op: monotone where one operand is, and the op is in that."""
        varies = operands == MONOTONE
        if node.name == "isnan":  # no piece holds both NaN and numbers
            return np.where(operands[0] == REFUSED, REFUSED, CONSTANT).astype(np.int8)
        if node.name == "abs":
            self._constant_test(node.inputs[0], columns, index, operands[0], _negative)
        alone = varies.sum(axis=0) == 1
        known = np.zeros(len(columns), bool)
        for i in range(len(node.inputs)):
            others = [self.functions.value(v, columns, self._some(index)) for j, v in enumerate(node.inputs) if j != i]
            known |= alone & varies[i] & _is_monotone(node, i, others)
        kinds = np.where(known, MONOTONE, np.where(varies.any(axis=0), REFUSED, CONSTANT))
        kinds = np.where((operands == REFUSED).any(axis=0), REFUSED, kinds).astype(np.int8)
        if node.output.type.dtype.is_float and (kinds == MONOTONE).any():
            low, high = (np.isnan(end) for end in self._ends(node.output, columns, index))
            if (low != high)[kinds == MONOTONE].any() and any(map(self._is_rounded, node.inputs)):
                kinds = np.where((kinds == MONOTONE) & (low != high), REFUSED, kinds).astype(np.int8)
            divided = self._constant_test(node.output, columns, index, kinds, np.isnan)
            kinds = np.where((kinds == MONOTONE) & (divided | low), CONSTANT, kinds).astype(np.int8)
        return kinds

    def _some(self, index: Ints) -> Array:
        """A number of each piece."""
        return self.pieces.ends()[0][index]

    def _is_rounded(self, value: Value) -> bool:
        """Whether a function that is not exactly rounded takes part in a value."""
        if self.functions.graph.constant_value(value) is not None:
            return False
        node = self.functions._step(value)
        return node is not None and (is_inexact(node) or any(map(self._is_rounded, node.inputs)))


_Test = Callable[[Array], Bools]


def _truth(values: Array) -> Bools:
    return values.astype(bool)


def _negative(values: Array) -> Bools:
    return np.asarray(values < 0)


def is_inexact(node: Node) -> bool:
    """Whether results may be off by some units in the last place, so that neighbours may be in another order than they should."""
    return node.op.has(Trait.MONOTONE) and node.name not in EXACTLY_ROUNDED


def _is_monotone(node: Node, i: int, others: list[Array]) -> Bools | bool:
    """Whether an op is monotone in its operand ``i``, rising or falling, where the others are as given.

    The operand holds no NaN, and numbers of one sign if the op is ``abs``.
    """
    if node.op.has(Trait.MONOTONE) or node.name in ("neg", "abs", "logical_not"):
        return True
    match node.name:
        case "cast":
            return node.output.type.dtype.is_float or node.inputs[0].type.dtype.is_bool
        case "add" | "sub":
            return np.asarray(np.isfinite(others[0]))
        case "mul":
            return np.asarray(np.isfinite(others[0]) & (others[0] != 0))
        case "div":
            return np.asarray(np.isfinite(others[0]) & (others[0] != 0) & (i == 0))
        case "maximum" | "minimum":
            return np.asarray(~np.isnan(others[0]))
        case "lt" | "le" | "gt" | "ge" | "logical_and" | "logical_or":
            return True
        case _:
            return False


def _remembered(function: Callable[P, R]) -> Callable[P, R]:
    """Calls it once for the same arguments, which are told apart by identity."""
    known: dict[tuple[int, ...], tuple[R, object]] = {}

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        key = tuple(map(id, args))
        if key not in known:
            known[key] = (function(*args, **kwargs), args)  # kept, so that no other argument has their identity
        return known[key][0]

    return call
