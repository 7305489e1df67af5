"""Softmax, log-softmax and log-sum-exp along one axis, without overflow.

Lines that stay in L2 are passed over three times: largest, sum of exponentials, quotient. An element of float32 is read from memory once
(4 bytes) and written there once; in between it is read three times and written twice in L1 or L2. An exponential takes some 20 cycles
for a vector of 16, the quotient 10 to 16, 0.6 ns an element at 3.8 GHz: as long as its 8 bytes at 13 GB/s.

Lines that exceed L2 twice over, alone or with those beside them (a softmax over the rows of a table), would come from memory in each
pass, and the exponentials go there and back: 4 bytes six times, as a store fetches its line first. They are cut into `Pieces`, which are
read from memory once for their largest elements and sums; what these give is joined. Results of lines side by side are computed from x
again, 4 bytes four times, for a second exponential; a piece of them is some rows of up to 512 columns or a little more, 2 KB that follow
each other however long a row is. Results are written row by row: in strips of two vectors each visit to a row would write 128 bytes of it.

A piece of a line keeps its exponentials, below its own largest element, in the result: a product with one number for each piece makes them
what they should be, in place of a quotient for each element. So lines of more than three pieces, which are worth threads, are cut even if
L2 holds them.

Measured over the rows of 100000 x 128, 51 MB: 21.7 ms by strips over all rows and 13.0 ms by pieces by one thread, 10.3 and 6.3 ms by two
(torch 35); 1.7 where bytes promise 1.5. Of the 13.0 ms 8.6 are exponentials. Of 4096 x 4096: 23 and 9.2 ms (torch 54), as strips visit a
page for every 128 bytes. One line of 150000: 68 us in whole by any number of threads, in pieces 53 by one and 35 by two (torch 80); 16 of
them: 1.60 and 1.46 ms by one, 0.80 and 0.73 by two. One of 1.5 million: 0.92 ms in whole, 0.82 in pieces and 0.41 by two (torch 1.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import Buffer, BufferSpec, Dim, Expr
from mlec.backends.tvm.kernels.mathlib import exp, log
from mlec.backends.tvm.kernels.pieces import PIECE, Pieces, column_blocks
from mlec.backends.tvm.kernels.reduce import reduced_shape
from mlec.backends.tvm.kernels.schedule import variations, vectors_across
from mlec.backends.tvm.kernels.tile import (
    Fold,
    accumulator_dtype,
    bits,
    ceildiv,
    column_parts,
    flat_view,
    otherwise,
    parallel_if_large,
    parameter,
    product,
    tile_vectors,
    unflatten,
    vector_loop,
    vectors_loop,
)
from mlec.backends.tvm.kernels.vector import Cell, cast_to, const, const_like, load, maximum, select, share, store
from mlec.backends.tvm.target import TargetInfo

SHARED = 3
"""More pieces of a line than that are worth threads: 60 us of one."""


@dataclass(frozen=True)
class SoftmaxSchedule:
    """How lines are normalised.

    Attributes:
        vectors: of exponentials at once: sums that are kept apart along the line, or neighbouring columns across lines.
        kept: the exponentials stay in the result's memory from their sum to the quotient, rather than being computed twice.
    """

    vectors: int
    kept: bool

    @staticmethod
    def candidates(
        x_shape: Sequence[Dim], axis: int, dtype: str, result: str, target: TargetInfo
    ) -> Iterator[SoftmaxSchedule]:
        """For the ``result`` ``softmax``, ``log_softmax`` or ``logsumexp``.

        Exponentials are kept where that loses nothing: in the type of their sums. Two vectors of them hide the latency of each other.
        """
        acc, axis = accumulator_dtype(dtype), axis % len(x_shape)
        inner = product(x_shape[axis + 1 :])
        last = isinstance(inner, int) and inner == 1
        most = vectors_across(x_shape[axis] if last else inner, target.lanes(bits(acc)))
        keeps = result == "softmax" and acc == dtype
        default = SoftmaxSchedule(min(2, most), keeps)
        return variations(default, lambda s: s.vectors <= most, vectors=(1, 2, 4), kept=[False])


def softmax(
    x_shape: Sequence[Dim],
    axis: int,
    dtype: str,
    target: TargetInfo,
    log_space: bool = False,
    name: str = "softmax",
    schedule: SoftmaxSchedule | None = None,
) -> tirx.PrimFunc:
    """``y = exp(x - max) / sum(exp(x - max))`` along ``axis``, or its logarithm. Parameters: x, y; extents may be symbolic.

    Three passes over a line (or over a strip of lines side by side, where the axis is not the last): largest, sum of
    exponentials, which are kept in y, quotient; or pieces of longer lines. Without a schedule, the first candidate is taken.
    """
    return _normalised(x_shape, axis, dtype, target, "log_softmax" if log_space else "softmax", False, name, schedule)


def logsumexp(
    x_shape: Sequence[Dim],
    axis: int,
    keepdims: bool,
    dtype: str,
    target: TargetInfo,
    name: str = "logsumexp",
    schedule: SoftmaxSchedule | None = None,
) -> tirx.PrimFunc:
    """``y = log(sum(exp(x)))`` along ``axis``. Parameters: x, y.

    The first two passes of `softmax`: an element is read from memory once, from L1 or L2 again, and nothing of its size is written.
    """
    return _normalised(x_shape, axis, dtype, target, "logsumexp", keepdims, name, schedule)


def are_cut(x_shape: Sequence[Dim], axis: int, dtype: str, target: TargetInfo) -> Expr:
    """Whether lines are cut into pieces: they exceed L2 twice over, with those beside them, or are each worth threads by itself."""
    axis %= len(x_shape)
    inner, far = product(x_shape[axis + 1 :]), 2 * target.l2_bytes * 8 // bits(dtype)
    along = isinstance(inner, int) and inner == 1
    return x_shape[axis] * inner > (min(far, SHARED * PIECE) if along else far)


def _normalised(
    x_shape: Sequence[Dim],
    axis: int,
    dtype: str,
    target: TargetInfo,
    result: str,
    keepdims: bool,
    name: str,
    schedule: SoftmaxSchedule | None,
) -> tirx.PrimFunc:
    schedule = schedule or next(SoftmaxSchedule.candidates(x_shape, axis, dtype, result, target))
    axis %= len(x_shape)
    outer, length, inner = product(x_shape[:axis]), x_shape[axis], product(x_shape[axis + 1 :])
    reduced = result == "logsumexp"
    kept, across = 1 if reduced else length, () if isinstance(inner, int) and inner == 1 else (inner,)
    with prim_func(name) as kernel:
        x = parameter("x", BufferSpec(x_shape, dtype))
        y = parameter("y", BufferSpec(reduced_shape(x_shape, (axis,), keepdims) if reduced else x_shape, dtype))
        program = _Softmax(
            x=flat_view(x, (outer, length, *across), dtype),
            y=flat_view(y, (outer, kept, *across), dtype),
            extents=(outer, length, inner),
            result=result,
            dtype=dtype,
            schedule=schedule,
            target=target,
        )
        otherwise([(are_cut(x_shape, axis, dtype, target), program.in_pieces)], program.at_once)
    return kernel.func


@dataclass(frozen=True)
class _Found:
    """Of some elements of a line, or of neighbouring lines in the lanes of a vector: the largest, what is subtracted, and the sum."""

    largest: Expr
    shift: Expr
    total: Expr


Finish = Callable[[list[Expr], int, int], Expr]
"""Takes the place of so many consecutive elements, and which of the vectors side by side they are; returns their results."""


@dataclass(frozen=True)
class _Softmax:
    """The parts of the program, see `softmax`.

    Attributes:
        x, y: ``[outer, length]`` where lines lie along memory, else ``[outer, length, inner]``; one of a line in y for ``logsumexp``.
        extents: outer, length, inner.
        result: ``softmax``, ``log_softmax`` or ``logsumexp``.
    """

    x: Buffer
    y: Buffer
    extents: tuple[Dim, Dim, Dim]
    result: str
    dtype: str
    schedule: SoftmaxSchedule
    target: TargetInfo

    @property
    def acc(self) -> str:
        return accumulator_dtype(self.dtype)

    @property
    def lanes(self) -> int:
        return self.target.lanes(bits(self.acc))

    @property
    def vectors(self) -> int:
        return self.schedule.vectors

    @property
    def along(self) -> bool:
        """Whether lines lie along memory, rather than side by side."""
        return len(self.x.shape) == 2

    @property
    def is_reduced(self) -> bool:
        return self.result == "logsumexp"

    def at_once(self) -> None:
        """A task is a line along memory, or some lines side by side; they stay in the caches from pass to pass."""
        outer, length, inner = self.extents
        work = length * inner * 2 * bits(self.acc)
        parts = 1 if self.along else column_parts(inner, self.vectors * self.lanes, work, self.target)

        def lines(row: Expr, start: Expr, width: int, count: int) -> None:
            starts = [start + u * width for u in range(count)]
            if self.along:
                found = [self.sums_along(row, 0, length, self.shift_of, self.schedule.kept)]
            else:
                found = self.sums_across(row, 0, length, starts, width, self.shift_of, self.schedule.kept)
            if self.is_reduced:
                for at, lane in zip(starts, found, strict=True):
                    self.write([row, 0] if self.along else [row, 0, at], log(lane.total) + lane.shift)
                return
            scales = [share(log(lane.total)) if self.result == "log_softmax" else lane.total for lane in found]

            def quotient(where: list[Expr], width: int, u: int) -> Expr:
                if self.schedule.kept:
                    return load(self.y, where, width) / scales[u]
                shifted = self.read(where, width) - found[u].shift
                return shifted - scales[u] if self.result == "log_softmax" else exp(shifted) / scales[u]

            if self.along:
                self.put_along(row, 0, length, quotient)
            else:
                self.put_across(row, 0, length, starts, width, quotient)

        def task(i: Expr) -> None:
            if self.along:
                lines(i, 0, 1, 1)
            else:
                vectors_loop(inner, self.lanes, self.vectors, partial(lines, i // parts), i % parts, parts)

        parallel_if_large(outer * parts, work // parts, task, parts)

    def in_pieces(self) -> None:
        """Of each piece the largest element and the sum, of these those of each line, and then the results of each piece.

        Exponentials of lines along memory may be kept, those of each piece below its own largest element. Sums are divided by once for
        each line.
        """
        kept = self.along and self.schedule.kept
        outer, length, inner = self.extents
        wide = 2 * tile_vectors(self.target)
        parts = 1 if self.along else column_blocks(inner, wide * self.lanes)
        pieces = Pieces(1, length) if self.along else Pieces(length, ceildiv(inner, parts), whole=True)
        tasks = (outer, pieces.number, parts)
        largest, totals = (T.alloc_buffer((outer, pieces.number, inner), self.acc) for _ in range(2))
        shifts, scales = (T.alloc_buffer((outer, inner), self.acc) for _ in range(2))

        def gather(row: Expr, number: Expr, part: Expr) -> None:
            piece = pieces.at(number)

            def keep(start: Expr, lane: _Found) -> None:
                store(largest, lane.largest, [row, number, start])
                store(totals, lane.total, [row, number, start])

            def strip(start: Expr, width: int, count: int) -> None:
                starts = [start + u * width for u in range(count)]
                found = self.sums_across(row, piece.first, piece.count, starts, width, finite_shift, False)
                for at, lane in zip(starts, found, strict=True):
                    keep(at, lane)

            if self.along:
                keep(0, self.sums_along(row, piece.start, piece.length, finite_shift, kept))
            else:
                vectors_loop(inner, self.lanes, wide, strip, part, parts)

        def join(row: Expr, start: Expr, width: int) -> None:
            most = Cell(self.acc, width, -math.inf)
            with T.serial(pieces.number) as number:
                most.set(maximum(most.value, share(load(largest, [row, number, start], width))))
            shift, total = share(self.shift_of(most.value)), Cell(self.acc, width, 0)
            with T.serial(pieces.number) as number:
                # Of a piece of nothing but minus infinity the sum is 0, and so is this factor, whatever the shift.
                factor = exp(load(largest, [row, number, start], width) - shift)
                total.set(total.value + load(totals, [row, number, start], width) * factor)
            if self.is_reduced:
                self.write([row, 0] if self.along else [row, 0, start], log(total.value) + shift)
                return
            logarithm = self.result == "log_softmax"
            store(shifts, shift, [row, start])
            store(scales, log(total.value) if logarithm else const(1, self.acc, width) / total.value, [row, start])

        def finish(where: list[Expr], width: int, shift: Expr, scale: Expr) -> None:
            shifted = self.read(where, width) - shift
            self.write(where, shifted - scale if self.result == "log_softmax" else exp(shifted) * scale)

        def put(row: Expr, number: Expr, part: Expr) -> None:
            piece = pieces.at(number)
            if self.along:
                shift, scale = share(shifts[row, 0]), share(scales[row, 0])
                factor = share(exp(largest[row, number, 0] - shift) * scale) if kept else scale

                def run(at: Expr, width: int) -> None:
                    where = [row, piece.start + at]
                    if kept:
                        self.write(where, load(self.y, where, width) * factor)
                    else:
                        finish(where, width, shift, scale)

                vector_loop(piece.length, self.lanes, run)
                return

            # Line after line, as memory lies: in strips, each visit to a line would write 128 bytes of it.
            with T.serial(piece.count) as k:

                def vectors(start: Expr, width: int, count: int) -> None:
                    for at in (start + u * width for u in range(count)):
                        both = (load(held, [row, at], width) for held in (shifts, scales))
                        finish([row, piece.first + k, at], width, *both)

                vectors_loop(inner, self.lanes, self.vectors, vectors, part, parts)

        def for_pieces(body: Callable[[Expr, Expr, Expr], None]) -> None:
            with T.parallel(product(tasks)) as i:
                body(*(share(index) for index in unflatten(i, tasks)))

        for_pieces(gather)
        with T.serial(outer) as row:
            vector_loop(inner, self.lanes, partial(join, row))
        if not self.is_reduced:
            for_pieces(put)

    def sums_along(self, row: Expr, start: Expr, length: Dim, shift_of: Callable[[Expr], Expr], kept: bool) -> _Found:
        """Of ``length`` elements of a line from ``start`` on; exponentials may be ``kept`` in y."""
        largest = Fold(self.lanes, self.acc, -math.inf, maximum)
        largest.over(length, lambda at, width: self.read([row, start + at], width))
        most = largest.result()
        shift = shift_of(most)
        total = Fold(self.lanes, self.acc, 0, lambda a, b: a + b, self.vectors)

        def power(at: Expr, width: int) -> Expr:
            done = share(exp(self.read([row, start + at], width) - shift))
            if kept:
                self.write([row, start + at], done)
            return done

        total.over(length, power)
        return _Found(most, shift, total.result())

    def sums_across(
        self,
        row: Expr,
        first: Expr,
        length: Dim,
        starts: Sequence[Expr],
        width: int,
        shift_of: Callable[[Expr], Expr],
        kept: bool,
    ) -> list[_Found]:
        """Of ``length`` elements from ``first`` on of lines side by side, some vectors of them."""
        largest = [Cell(self.acc, width, -math.inf) for _ in starts]
        totals = [Cell(self.acc, width, 0) for _ in starts]
        with T.serial(length) as k:
            for start, cell in zip(starts, largest, strict=True):
                cell.set(maximum(cell.value, share(self.read([row, first + k, start], width))))
        shifts = [shift_of(cell.value) for cell in largest]
        with T.serial(length) as k:
            for start, shift, total in zip(starts, shifts, totals, strict=True):
                power = share(exp(self.read([row, first + k, start], width) - shift))
                if kept:
                    self.write([row, first + k, start], power)
                total.set(total.value + power)
        return [_Found(a.value, b, c.value) for a, b, c in zip(largest, shifts, totals, strict=True)]

    def put_along(self, row: Expr, start: Expr, length: Dim, finish: Finish) -> None:
        def put(at: Expr, width: int) -> None:
            self.write([row, start + at], finish([row, start + at], width, 0))

        vector_loop(length, self.lanes, put)

    def put_across(
        self, row: Expr, first: Expr, length: Dim, starts: Sequence[Expr], width: int, finish: Finish
    ) -> None:
        with T.serial(length) as k:
            for u, start in enumerate(starts):
                self.write([row, first + k, start], finish([row, first + k, start], width, u))

    def read(self, where: list[Expr], width: int) -> Expr:
        return cast_to(self.acc, load(self.x, where, width))

    def write(self, where: list[Expr], value: Expr) -> None:
        store(self.y, cast_to(self.dtype, value), where)

    def shift_of(self, largest: Expr) -> Expr:
        """What is subtracted in the end."""
        return finite_shift(largest) if self.is_reduced else largest


def finite_shift(largest: Expr) -> Expr:
    """What logsumexp subtracts: the maximum, 0 for an infinite one (which is the result itself; a softmax is NaN then)."""
    largest = share(largest)
    finite = select(largest < const_like(math.inf, largest), largest, select(largest > 0.0, 0.0, largest))
    return share(select(largest > const_like(-math.inf, largest), finite, select(largest < 0.0, 0.0, largest)))
