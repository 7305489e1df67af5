"""Reductions over any axes of a compact tensor, with numpy's treatment of NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import IDENTITY, Buffer, BufferSpec, Dim, Epilogue, Expr, Prologue
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
    parallel_if_large,
    parameter,
    product,
    unflatten,
    vectors_loop,
)
from mlec.backends.tvm.kernels.vector import (
    Cell,
    broadcast,
    cast_to,
    const,
    const_like,
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
    is a result of its own, summed in the order of memory. Without a schedule, the first candidate is taken.
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
        y = y.viewed((rows, 1 if dims[-1][1] else dims[-1][0]))
        operand = prologue or Prologue((), lambda where, width, views: load(views[0], list(where), width))
        program = _Reduce(sources, operand, y, dims, y_shape, op, acc, target.lanes(bits(acc)), schedule.vectors)
        if program.inner_kept:
            parts = column_parts(program.inner, program.vectors * program.lanes, program.work, target)
            parallel_if_large(
                rows * parts,
                program.work // parts,
                lambda i: program.across_memory(i // parts, i % parts, parts),
                parts,
            )
        else:
            parallel_if_large(rows, program.work, program.along_memory)
    return kernel.func


def fold_schedules(
    x_shape: Sequence[Dim], axes: Sequence[int], dtype: str, target: TargetInfo
) -> Iterator[FoldSchedule]:
    """Candidates for `reduce`. Four vectors of columns are read from the same page of memory."""
    last = len(x_shape) - 1
    inner_kept = not any(axis % len(x_shape) == last for axis in axes)
    lanes = target.lanes(bits("int8" if dtype == "bool" else accumulator_dtype(dtype)))
    inner = x_shape[-1] if x_shape else 1
    return FoldSchedule.candidates(min(4, vectors_across(inner, lanes)) if inner_kept else 4, inner, lanes)


@dataclass(frozen=True)
class _Reduce:
    """The parts of the program, see `reduce`. A task is one row: a single result, or a part of those along the last axis if that is kept.

    Attributes:
        sources, operand: what x is read from, and how.
        y: ``[rows, columns]``; of one column if the last axis is reduced.
        dims: the axes of x, and which are reduced.
        y_shape: the result's as the epilogue knows it.
    """

    sources: tuple[Buffer, ...]
    operand: Prologue
    y: Result
    dims: Sequence[tuple[Dim, bool]]
    y_shape: Sequence[Dim]
    op: str
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
    def reduced(self) -> list[Dim]:
        return [extent for extent, reduced in self.dims if reduced]

    @property
    def work(self) -> Dim:
        """Of a row, in the unit of `SERIAL_WORK`: an element counts as two multiply-adds, being read for just one step."""
        row = [*self.reduced, self.inner] if self.inner_kept else self.reduced
        return product(row) * bits(self.acc) // 16

    def along_memory(self, row: Expr) -> None:
        """One result: its terms are neighbours."""
        rule, where = REDUCTIONS[self.op], unflatten(row, self.kept)
        fold = Fold(self.lanes, self.acc, rule.identity(self.acc), rule.combine, self.vectors)
        with _loops(self.reduced[:-1]) as outer:
            fold.over(self.inner, lambda start, width: self.read(where, outer, start, width))
        self.finish(row, 0, fold.result())

    def across_memory(self, row: Expr, part: Expr, parts: int) -> None:
        """Results along a part of the last axis, each in a lane."""
        rule, where = REDUCTIONS[self.op], unflatten(row, self.kept)

        def columns(start: Expr, width: int, count: int) -> None:
            cells = [Cell(self.acc, width, rule.identity(self.acc)) for _ in range(count)]
            with _loops(self.reduced) as outer:
                for u, cell in enumerate(cells):
                    value = share(self.read(where, outer, start + u * width, width))
                    cell.set(rule.combine(cell.value, value))
            for u, cell in enumerate(cells):
                self.finish(row, start + u * width, cell.value)

        vectors_loop(self.inner, self.lanes, self.vectors, columns, part, parts)

    def read(self, kept: Sequence[Expr], reduced: Sequence[Expr], start: Expr, width: int) -> Expr:
        """Consecutive elements of x, from indices along the axes of either kind and ``start`` along the last."""
        kept_left, reduced_left = iter(kept), iter(reduced)
        at = [next(reduced_left if gone else kept_left) for _, gone in self.dims[:-1]]
        return cast_to(self.acc, self.operand.value((*at, start), width, self.sources))

    def finish(self, row: Expr, column: Expr, value: Expr) -> None:
        """Stores results; the epilogue is given their indices if it reads anything."""
        if self.op == "mean":
            count = product(self.reduced)
            if isinstance(count, int):  # TVM does not build a division by a constant 0
                value = share(value / const(count, self.acc)) if count else const_like(math.nan, value)
            else:
                value = share(value / cast_to(self.acc, count))
        where: tuple[Expr, ...] = ()
        if self.y.epilogue.inputs:
            first = unflatten(row * self.inner + column if self.inner_kept else row, self.y_shape)
            where = (*first[:-1], ramp(first[-1], lanes_of(value))) if first else ()
        finished = self.y.epilogue.apply(value, where, self.y.extra)
        store(self.y.buffer, cast_to(buffer_dtype(self.y.buffer), finished), [row, column])


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
    together, in vectors as long as those of the indices, which have 32 bits where the axis is known to be short enough. A long line alone
    is found by lanes: each keeps its own best, and among equal ones the lowest index wins in the end. There a vector waits some 8 cycles
    for the one before it: 2 elements of float32 a cycle on vectors of 16, where one after the other takes as long for each.
    """
    acc = accumulator_dtype(dtype)
    axis %= len(x_shape)
    outer, length, inner = product(x_shape[:axis]), x_shape[axis], product(x_shape[axis + 1 :])

    with prim_func(name) as kernel:
        x_arg = parameter("x", BufferSpec(x_shape, dtype))
        y_arg = parameter("y", BufferSpec(reduced_shape(x_shape, (axis,), keepdims), "int64"))
        x = flat_view(x_arg, (outer, length, inner), dtype)
        y = flat_view(y_arg, (outer, inner), "int64")

        def wins(value: Expr, best: Cell) -> Expr:
            one, zero = const(1, "int32", lanes_of(value)), const(0, "int32", lanes_of(value))
            gain = select(value > best.value if op == "argmax" else value < best.value, one, zero)
            if acc in FLOATS:
                gain = select(is_nan(best.value), zero, select(is_nan(value), one, gain))
            return share(gain) > zero

        def columns(i: Expr, part: Expr) -> None:
            def column(start: Expr, width: int, count: int) -> None:
                starts = [start + u * width for u in range(count)]
                bests = [Cell(acc, width, cast_to(acc, load(x, [i, 0, at], width))) for at in starts]
                places = [Cell(index, width, 0) for _ in starts]
                with T.serial(1, length) as k:
                    for at, best, place in zip(starts, bests, places, strict=True):
                        value = share(cast_to(acc, load(x, [i, k, at], width)))
                        better = wins(value, best)
                        place.set(select(better, cast_to(index, k), place.value))
                        best.set(select(better, value, best.value))
                for at, place in zip(starts, places, strict=True):
                    store(y, cast_to("int64", place.value), [i, at])

            vectors_loop(inner, lanes, COLUMNS, column, part, parts)

        def line(i: Expr) -> None:
            flat = flat_view(x_arg, (outer, length), dtype)
            best = Cell(acc, lanes, cast_to(acc, load(flat, [i, 0], lanes)))
            where = Cell(index, lanes, ramp(tirx.const(0, index), lanes))
            with T.serial(1, ceildiv(length, lanes)) as k:
                start = share(
                    tirx.min(k * lanes, length - lanes)
                )  # the last vector overlaps: its indices are true all the same
                value = share(cast_to(acc, load(flat, [i, start], lanes)))
                better = wins(value, best)
                where.set(select(better, ramp(cast_to(index, start), lanes), where.value))
                best.set(select(better, value, best.value))

            def first(found: Expr) -> Expr:
                return share(reduce_lanes(select(found, where.value, last), lambda a, b: select(b < a, b, a)))

            last = const(length, index, lanes)
            extreme = reduce_lanes(
                best.value, lambda a, b: select(a < b if op == "argmax" else b < a, b, a)
            )  # of any value where there is a NaN
            result = first(tirx.EQ(best.value, broadcast(extreme, lanes)))
            if acc in FLOATS:
                nan = first(is_nan(best.value))
                result = select(nan < tirx.const(length, index), nan, result)
            store(y, cast_to("int64", result), [i, 0])

        short = isinstance(length, int) and length < 1 << 31
        index = "int32" if short and bits(acc) <= 32 else "int64"
        lanes = target.lanes(bits(index))
        if isinstance(inner, int) and inner == 1 and short and 2 * lanes <= length:
            parallel_if_large(outer, 4 * length, line)
        else:
            element = 256 if isinstance(inner, int) and inner == 1 else 32  # one after the other, or some in a vector
            work = length * inner * element
            parts = column_parts(inner, COLUMNS * lanes, work, target)
            parallel_if_large(outer * parts, work // parts, lambda i: columns(i // parts, i % parts), parts)
    return kernel.func


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
