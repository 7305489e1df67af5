"""Reductions over any axes of a compact tensor, with numpy's treatment of NaN.

An element is read once, for one operation: 4 bytes of float32 for 1 FLOP, so reading is what counts wherever they come from. An addition
waits 4 cycles for the one before it (a maximum 2 or 3, and asks for NaN); four partial results along a line, or four vectors of columns
side by side, take in a vector a cycle, 64 bytes, which is more than L2 gives. Four vectors of columns are 256 bytes of each row: the
pages that are open at a time are a quarter of those for one vector.

A row that is worth threads by itself (420000 of float32) is cut into `Pieces`, whatever else there is. Of 5 million elements, 20 MB
from L3, that is 153 pieces and as many numbers to join. Predicted from 27 GB/s that one thread reads: 370 us by two threads; measured
370 (742 by one; torch 370), the largest 405 (torch 440), and where it is 460 (torch 6300). 625000 x 8 summed over the rows: 680 us by
one thread, 356 by two (torch 674).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import IDENTITY, Buffer, BufferSpec, Dim, Epilogue, Expr, Prologue
from mlec.backends.tvm.kernels.pieces import Piece, Pieces, column_blocks
from mlec.backends.tvm.kernels.result import Result
from mlec.backends.tvm.kernels.schedule import FoldSchedule, vectors_across
from mlec.backends.tvm.kernels.tile import (
    Fold,
    accumulator_dtype,
    bits,
    buffer_dtype,
    ceildiv,
    column_parts,
    flat_view,
    otherwise,
    parallel_if_large,
    parameter,
    product,
    unflatten,
    vector_loop,
    vectors_loop,
    worth_threads,
)
from mlec.backends.tvm.kernels.vector import (
    Cell,
    broadcast,
    cast_to,
    const,
    const_like,
    int64,
    is_nan,
    lanes_of,
    load,
    maximum,
    minimum,
    ramp,
    reduce_lanes,
    select,
    share,
    store,
)
from mlec.backends.tvm.target import TargetInfo

FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Reduction:
    """How two partial results become one, and the value that changes nothing."""

    combine: Callable[[Expr, Expr], Expr]
    identity: Callable[[str], float]


def _lowest(dtype: str) -> float:
    return -math.inf if dtype in FLOATS else 0 if dtype.startswith("u") else -(2 ** (bits(dtype) - 1))


def _highest(dtype: str) -> float:
    return math.inf if dtype in FLOATS else 2 ** (bits(dtype) - (0 if dtype.startswith("u") else 1)) - 1


REDUCTIONS = {
    "sum": Reduction(lambda a, b: a + b, lambda dtype: 0),
    "mean": Reduction(lambda a, b: a + b, lambda dtype: 0),
    "prod": Reduction(lambda a, b: a * b, lambda dtype: 1),
    "max": Reduction(maximum, _lowest),
    "min": Reduction(minimum, _highest),
    "any": Reduction(maximum, lambda dtype: 0),
    "all": Reduction(minimum, lambda dtype: 1),
}


def reduce(
    op: str,
    x_shape: Sequence[Dim],
    axes: Sequence[int],
    keepdims: bool,
    dtype: str,
    target: TargetInfo,
    epilogue: Epilogue = IDENTITY,
    prologue: Prologue | None = None,
    name: str = "reduce",
    schedule: FoldSchedule | None = None,
) -> tirx.PrimFunc:
    """``y = epilogue(op(x, axes))`` for ``op`` in `REDUCTIONS`. Any extent may be symbolic. Parameters: x, extra, y.

    With a ``prologue``, x is what it computes from its own inputs, which take the place of x among the parameters.

    If the last axis is reduced, each result is one `Fold` along memory. If it is kept, vectors run along it and every lane
    is a result of its own, summed in the order of memory. Terms that are worth threads by themselves are taken in as `Pieces`, and what
    these give is reduced again. Without a schedule, the first candidate is taken.
    """
    schedule = schedule or next(fold_schedules(x_shape, axes, dtype, target))
    acc = "int8" if dtype == "bool" else accumulator_dtype(dtype)
    dims = _collapse(x_shape, axes, merge=prologue is None)
    y_shape = reduced_shape(x_shape, axes, keepdims)
    with prim_func(name) as kernel:
        specs = prologue.inputs if prologue else (BufferSpec(x_shape, dtype),)
        sources = tuple(parameter(f"x{i}", spec) for i, spec in enumerate(specs))
        y = Result.parameter("y", y_shape, dtype, epilogue)
        if prologue is None:
            # Booleans are bytes in memory; a vector of them is loaded as such.
            sources = (flat_view(sources[0], [extent for extent, _ in dims], "int8" if dtype == "bool" else dtype),)
        rows = product([extent for extent, reduced in dims[:-1] if not reduced])
        program = _Reduce(
            sources=sources,
            operand=prologue or AS_IT_IS,
            y=y.viewed((rows, 1 if dims[-1][1] else dims[-1][0])),
            dims=dims,
            y_shape=y_shape,
            op=op,
            terms=product([extent for extent, reduced in dims if reduced]),
            acc=acc,
            lanes=target.lanes(bits(acc)),
            vectors=schedule.vectors,
        )
        otherwise([(program.is_long, program.in_pieces)], lambda: program.by_rows(target))
    return kernel.func


AS_IT_IS = Prologue((), lambda where, width, views: load(views[0], list(where), width))


def fold_schedules(
    x_shape: Sequence[Dim], axes: Sequence[int], dtype: str, target: TargetInfo
) -> Iterator[FoldSchedule]:
    """Candidates for `reduce`. Four vectors of columns are read from the same page of memory."""
    last = len(x_shape) - 1
    inner_kept = not any(axis % len(x_shape) == last for axis in axes)
    lanes = target.lanes(bits("int8" if dtype == "bool" else accumulator_dtype(dtype)))
    inner = x_shape[-1] if x_shape else 1
    return FoldSchedule.candidates(min(4, vectors_across(inner, lanes)) if inner_kept else 4, inner, lanes)


Put = Callable[[Expr, Expr], None]
"""Takes the results of a row from a column on, which is 0 where there is one."""


@dataclass(frozen=True)
class _Reduce:
    """The parts of the program, see `reduce`. A row is one result, or those along the last axis if that is kept. A task is a row or a part.

    Attributes:
        sources, operand: what x is read from, and how.
        y: ``[rows, columns]``; of one column if the last axis is reduced.
        dims: the axes of x, and which are reduced.
        y_shape: the result's as the epilogue knows it.
        terms: of a result.
    """

    sources: tuple[Buffer, ...]
    operand: Prologue
    y: Result
    dims: Sequence[tuple[Dim, bool]]
    y_shape: Sequence[Dim]
    op: str
    terms: Dim
    acc: str
    lanes: int
    vectors: int

    @property
    def inner(self) -> Dim:
        """Extent of the last axis."""
        return self.dims[-1][0]

    @property
    def inner_kept(self) -> bool:
        return not self.dims[-1][1]

    @property
    def kept(self) -> list[Dim]:
        """Extents of the axes that are kept, less the last axis."""
        return [extent for extent, reduced in self.dims[:-1] if not reduced]

    @property
    def outer(self) -> list[Dim]:
        """Extents of the axes that are reduced, less the last axis."""
        return [extent for extent, reduced in self.dims[:-1] if reduced]

    @property
    def work(self) -> Dim:
        """Of a row, in the unit of `SERIAL_WORK`: 4 bytes count as five multiply-adds, as measured where L2 holds them."""
        return product([*self.outer, self.inner]) * bits(self.acc) * 5 // 32

    @property
    def is_long(self) -> Expr:
        """Whether a row is worth threads by itself, rather than by its columns: where these are more than their terms, they are shared."""
        enough = worth_threads(self.work)
        if not self.inner_kept or enough is False:
            return enough
        tall = self.terms >= self.inner
        return tirx.And(tall, enough) if not isinstance(tall, bool) else enough if tall else False

    def by_rows(self, target: TargetInfo) -> None:
        """Tasks of whole rows, or of a part of their columns."""
        rows, parts = product(self.kept), 1
        if self.inner_kept:
            parts = column_parts(self.inner, self.vectors * self.lanes, self.work, target)

        def task(i: Expr) -> None:
            self.fold(i // parts, None, partial(self.finish, i // parts), i % parts, parts)

        parallel_if_large(rows * parts, self.work // parts, task, parts)

    def in_pieces(self) -> None:
        """A task for each piece of each row, and then the same over what these gave: few numbers, which are in L1 or L2."""
        rows, columns = product(self.kept), [(self.inner, False)] if self.inner_kept else []
        parts = column_blocks(self.inner, self.vectors * self.lanes) if columns else 1
        pieces = Pieces(product(self.outer), ceildiv(self.inner, parts), self.inner_kept)
        held = T.alloc_buffer((rows, pieces.number, *(extent for extent, _ in columns)), self.acc)
        tasks = (rows, pieces.number, parts)
        with T.parallel(product(tasks)) as i:
            row, number, part = (share(index) for index in unflatten(i, tasks))

            def keep(column: Expr, value: Expr) -> None:
                store(held, value, [row, number, column] if columns else [row, number])

            self.fold(row, pieces.at(number), keep, part, parts)
        dims = [(rows, False), (pieces.number, True), *columns]
        joined = replace(self, sources=(held,), operand=AS_IT_IS, dims=dims)
        with T.serial(rows) as row:
            joined.fold(row, None, partial(self.finish, row))

    def fold(self, row: Expr, piece: Piece | None, put: Put, part: Expr = 0, parts: int = 1) -> None:
        """The results of a row, or of one of its pieces, and along the last axis, if that is kept, of a part of it."""
        if self.inner_kept:
            self.across_memory(row, piece, put, part, parts)
        else:
            self.along_memory(row, piece, put)

    @contextmanager
    def lines(self, piece: Piece | None) -> Iterator[tuple[Sequence[Expr], Expr, Dim]]:
        """Loops over lines along the last axis: indices along the other reduced axes, and from where to take how many elements."""
        if piece is None:
            with _loops(self.outer) as at:
                yield at, 0, self.inner
        elif not self.outer:
            yield (), piece.start, piece.length
        else:
            with T.serial(piece.count) as i:
                yield unflatten(piece.first + i, self.outer), piece.start, piece.length

    def along_memory(self, row: Expr, piece: Piece | None, put: Put) -> None:
        """One result: its terms are neighbours."""
        rule, where = REDUCTIONS[self.op], unflatten(row, self.kept)
        fold = Fold(self.lanes, self.acc, rule.identity(self.acc), rule.combine, self.vectors)
        with self.lines(piece) as (outer, start, length):
            fold.over(length, lambda at, width: self.read(where, outer, start + at, width))
        put(0, fold.result())

    def across_memory(self, row: Expr, piece: Piece | None, put: Put, part: Expr = 0, parts: int = 1) -> None:
        """Results along a part of the last axis, each in a lane. Pieces are of whole lines."""
        rule, where = REDUCTIONS[self.op], unflatten(row, self.kept)

        def columns(start: Expr, width: int, count: int) -> None:
            cells = [Cell(self.acc, width, rule.identity(self.acc)) for _ in range(count)]
            with self.lines(piece) as (outer, _, _):
                for u, cell in enumerate(cells):
                    value = share(self.read(where, outer, start + u * width, width))
                    cell.set(rule.combine(cell.value, value))
            for u, cell in enumerate(cells):
                put(start + u * width, cell.value)

        vectors_loop(self.inner, self.lanes, self.vectors, columns, part, parts)

    def read(self, kept: Sequence[Expr], reduced: Sequence[Expr], start: Expr, width: int) -> Expr:
        """Consecutive elements of x, from indices along the axes of either kind and ``start`` along the last."""
        kept_left, reduced_left = iter(kept), iter(reduced)
        at = [next(reduced_left if gone else kept_left) for _, gone in self.dims[:-1]]
        return cast_to(self.acc, self.operand.value((*at, start), width, self.sources))

    def finish(self, row: Expr, column: Expr, value: Expr) -> None:
        """Stores results; the epilogue is given their indices if it reads anything."""
        if self.op == "mean":
            if isinstance(self.terms, int):  # TVM does not build a division by a constant 0
                value = share(value / const(self.terms, self.acc)) if self.terms else const_like(math.nan, value)
            else:
                value = share(value / cast_to(self.acc, self.terms))
        where: tuple[Expr, ...] = ()
        if self.y.epilogue.inputs:
            first = unflatten(row * self.inner + column if self.inner_kept else row, self.y_shape)
            where = (*first[:-1], ramp(first[-1], lanes_of(value))) if first else ()
        finished = self.y.epilogue.apply(value, where, self.y.extra)
        store(self.y.buffer, cast_to(buffer_dtype(self.y.buffer), finished), [row, column])


COMPARED = 14
"""What an element of a line takes, in the unit of `SERIAL_WORK`, where the place of an extremum is looked for in vectors."""
COLUMNS = 4
"""Vectors of neighbouring columns whose first extremum is found together: the wider, the fewer pages are visited for it."""


def arg_reduce(
    op: str,
    x_shape: Sequence[Dim],
    axis: int,
    keepdims: bool,
    dtype: str,
    target: TargetInfo,
    name: str = "arg_reduce",
) -> tirx.PrimFunc:
    """``y`` = int64 index of the first maximum (``op = "argmax"``) or minimum along an axis; the first NaN wins.

    One pass, and no second for the position: the best value and its index are kept in registers side by side, a comparison and two
    selections (for floats the question for NaN, too) for a vector that is read from memory once. Columns that are neighbours are found
    together, in vectors as long as those of the indices, which have 32 bits where the axis is known to be short enough. A line alone
    is found by lanes: each keeps its own best, and among equal ones the lowest index wins in the end. There a vector waits some 8 cycles
    for the one before it: 2 elements of float32 a cycle on vectors of 16, where one after the other takes as long for each. A line that
    is worth threads by itself is cut into `Pieces`, and so are lines side by side that are longer than there are of them: 20000 x 100 over
    its rows takes 357 us by one thread and 196 by two (torch 3560 and 1810), 3 million x 2 take 12.8 and 7.0 ms (torch 18.8 and 8.5).
    """
    axis %= len(x_shape)
    outer, length, inner = product(x_shape[:axis]), x_shape[axis], product(x_shape[axis + 1 :])
    with prim_func(name) as kernel:
        x = parameter("x", BufferSpec(x_shape, dtype))
        y = parameter("y", BufferSpec(reduced_shape(x_shape, (axis,), keepdims), "int64"))
        program = _ArgReduce(op, x, y, (outer, length, inner), dtype, target)
        if isinstance(inner, int) and inner == 1:
            shorter: Expr = length < 2 * program.lanes
            otherwise([(shorter, program.columns), (worth_threads(COMPARED * length), program.pieces)], program.lines)
        else:
            otherwise([(program.is_tall, program.pieces_of_columns)], program.columns)
    return kernel.func


@dataclass(frozen=True)
class _ArgReduce:
    """The parts of the program, see `arg_reduce`; ``extents`` are those before the axis, along it and after it."""

    op: str
    x: Buffer
    y: Buffer
    extents: tuple[Dim, Dim, Dim]
    dtype: str
    target: TargetInfo

    @property
    def acc(self) -> str:
        return accumulator_dtype(self.dtype)

    @property
    def index(self) -> str:
        """Dtype of positions in a line, or a piece of it: as wide as the values are, 32 bits or 64."""
        return "int32" if bits(self.acc) <= 32 else "int64"

    @property
    def lanes(self) -> int:
        """Elements of a line that are looked at together."""
        return self.target.lanes(bits(self.index))

    def wins(self, value: Expr, best: Cell) -> Expr:
        """Where a value takes the place of the best one before it."""
        one, zero = const(1, "int32", lanes_of(value)), const(0, "int32", lanes_of(value))
        gain = select(value > best.value if self.op == "argmax" else value < best.value, one, zero)
        if self.acc in FLOATS:
            gain = select(is_nan(best.value), zero, select(is_nan(value), one, gain))
        return share(gain) > zero

    def columns(self) -> None:
        """Lines side by side, or too short for vectors: each in a lane."""
        outer, length, inner = self.extents
        index = self.index if isinstance(length, int) and length < 1 << 31 else "int64"
        lanes = self.target.lanes(bits(index))
        x, y = flat_view(self.x, self.extents, self.dtype), flat_view(self.y, (outer, inner), "int64")

        def task(i: Expr, part: Expr) -> None:
            def column(start: Expr, width: int, count: int) -> None:
                starts = [start + u * width for u in range(count)]
                for at, (_, place) in zip(starts, self.firsts(x, i, 0, length, starts, width, index), strict=True):
                    store(y, cast_to("int64", place.value), [i, at])

            vectors_loop(inner, lanes, COLUMNS, column, part, parts)

        element = 256 if isinstance(inner, int) and inner == 1 else 32  # one after the other, or some in a vector
        work = length * inner * element
        parts = column_parts(inner, COLUMNS * lanes, work, self.target)
        parallel_if_large(outer * parts, work // parts, lambda i: task(i // parts, i % parts), parts)

    @property
    def is_tall(self) -> Expr:
        """Whether lines side by side are worth threads by themselves, and longer than there are of them."""
        _, length, inner = self.extents
        enough = worth_threads(4 * length * inner)
        tall = length >= inner
        if enough is False or tall is False:
            return False
        return tirx.And(tall, enough) if not isinstance(tall, bool) else enough

    def pieces_of_columns(self) -> None:
        """A task for each piece of lines side by side, some rows of a part of the columns; what these give is compared in their order."""
        outer, length, inner = self.extents
        lanes = self.target.lanes(bits(self.index))
        x, y = flat_view(self.x, self.extents, self.dtype), flat_view(self.y, (outer, inner), "int64")
        parts = column_blocks(inner, COLUMNS * lanes)
        pieces = Pieces(length, ceildiv(inner, parts), whole=True)
        bests = T.alloc_buffer((outer, pieces.number, inner), self.acc)
        places = T.alloc_buffer((outer, pieces.number, inner), "int64")
        tasks = (outer, pieces.number, parts)
        with T.parallel(product(tasks)) as i:
            row, number, part = (share(index) for index in unflatten(i, tasks))
            piece = pieces.at(number)

            def column(start: Expr, width: int, count: int) -> None:
                starts = [start + u * width for u in range(count)]
                found = self.firsts(x, row, piece.first, piece.count, starts, width, self.index)
                for at, (best, place) in zip(starts, found, strict=True):
                    store(bests, best.value, [row, number, at])
                    store(
                        places, cast_to("int64", place.value) + broadcast(int64(piece.first), width), [row, number, at]
                    )

            vectors_loop(inner, lanes, COLUMNS, column, part, parts)

        def join(row: Expr, start: Expr, width: int) -> None:
            best = Cell(self.acc, width, load(bests, [row, 0, start], width))
            place = Cell("int64", width, load(places, [row, 0, start], width))
            with T.serial(1, pieces.number) as number:
                value = share(load(bests, [row, number, start], width))
                better = self.wins(value, best)
                place.set(select(better, load(places, [row, number, start], width), place.value))
                best.set(select(better, value, best.value))
            store(y, place.value, [row, start])

        with T.serial(outer) as row:
            vector_loop(inner, lanes, partial(join, row))

    def firsts(
        self, x: Buffer, row: Expr, first: Expr, count: Dim, starts: Sequence[Expr], width: int, index: str
    ) -> list[tuple[Cell, Cell]]:
        """The first extrema of ``count`` elements from ``first`` on of lines side by side, and where after ``first`` they are."""
        bests = [Cell(self.acc, width, cast_to(self.acc, load(x, [row, first, at], width))) for at in starts]
        places = [Cell(index, width, 0) for _ in starts]
        with T.serial(1, count) as k:
            for at, best, place in zip(starts, bests, places, strict=True):
                value = share(cast_to(self.acc, load(x, [row, first + k, at], width)))
                better = self.wins(value, best)
                place.set(select(better, cast_to(index, k), place.value))
                best.set(select(better, value, best.value))
        return list(zip(bests, places, strict=True))

    def lines(self) -> None:
        """A task for each line."""
        outer, length, _ = self.extents
        x, y = flat_view(self.x, (outer, length), self.dtype), flat_view(self.y, (outer, 1), "int64")
        parallel_if_large(outer, COMPARED * length, lambda i: store(y, self.first(x, i, 0, length), [i, 0]))

    def pieces(self) -> None:
        """A task for each piece of each line; the first extremum of a line is one of those of its pieces."""
        outer, length, _ = self.extents
        x, y = flat_view(self.x, (outer, length), self.dtype), flat_view(self.y, (outer, 1), "int64")
        pieces = Pieces(1, length)
        found = T.alloc_buffer((outer, pieces.number), "int64")
        with T.parallel(outer * pieces.number) as i:
            row, number = share(i // pieces.number), share(i % pieces.number)
            piece = pieces.at(number)
            store(found, self.first(x, row, piece.start, piece.length), [row, number])
        with T.serial(outer) as row:
            place = Cell("int64", 1, found[row, 0])
            best = Cell(self.acc, 1, cast_to(self.acc, x[row, place.value]))
            with T.serial(1, pieces.number) as number:
                at = share(found[row, number])
                value = share(cast_to(self.acc, x[row, at]))
                better = self.wins(value, best)
                place.set(select(better, at, place.value))
                best.set(select(better, value, best.value))
            store(y, place.value, [row, 0])

    def first(self, x: Buffer, row: Expr, start: Expr, count: Dim) -> Expr:
        """Where the first extremum of ``count`` elements from ``start`` on is, in a line of a vector or more.

        The last vector overlaps what came before: its indices are true all the same.
        """
        acc, index, lanes = self.acc, self.index, self.lanes
        begin = 0 if isinstance(count, int) and count >= lanes else share(tirx.min(0, count - lanes))
        best = Cell(acc, lanes, cast_to(acc, load(x, [row, start + begin], lanes)))
        where = Cell(index, lanes, ramp(cast_to(index, int64(begin)), lanes))
        with T.serial(1, ceildiv(count, lanes)) as k:
            at = share(tirx.min(k * lanes, count - lanes))
            value = share(cast_to(acc, load(x, [row, start + at], lanes)))
            better = self.wins(value, best)
            where.set(select(better, ramp(cast_to(index, at), lanes), where.value))
            best.set(select(better, value, best.value))
        last = share(cast_to(index, int64(count)))

        def lowest(found: Expr) -> Expr:
            held = select(found, where.value, broadcast(last, lanes))
            return share(reduce_lanes(held, lambda a, b: select(b < a, b, a)))

        # Any value where there is a NaN.
        extreme = reduce_lanes(best.value, lambda a, b: select(a < b if self.op == "argmax" else b < a, b, a))
        result = lowest(tirx.EQ(best.value, broadcast(extreme, lanes)))
        if acc in FLOATS:
            nan = lowest(is_nan(best.value))
            result = select(nan < last, nan, result)
        return start + cast_to("int64", result)


def reduced_shape(shape: Sequence[Dim], axes: Sequence[int], keepdims: bool) -> tuple[Dim, ...]:
    """Shape after a reduction."""
    gone = {axis % len(shape) for axis in axes}
    if keepdims:
        return tuple(1 if i in gone else extent for i, extent in enumerate(shape))
    return tuple(extent for i, extent in enumerate(shape) if i not in gone)


def _collapse(shape: Sequence[Dim], axes: Sequence[int], merge: bool = True) -> list[tuple[Dim, bool]]:
    """Runs of axes of one kind as ``(extent, reduced)``; each axis by itself unless they may ``merge``."""
    gone = {axis % len(shape) for axis in axes}
    dims: list[tuple[Dim, bool]] = []
    for i, extent in enumerate(shape):
        if merge and dims and dims[-1][1] == (i in gone):
            dims[-1] = (dims[-1][0] * extent, i in gone)
        else:
            dims.append((extent, i in gone))
    return dims


@contextmanager
def _loops(extents: Sequence[Dim]) -> Iterator[list[Expr]]:
    """Nested serial loops."""
    with ExitStack() as stack:
        yield [stack.enter_context(T.serial(extent)) for extent in extents]
