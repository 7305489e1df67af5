"""Layer, root-mean-square and group normalisation: each row is read twice or three times from L1 and written once.

Of an element of float32, 4 bytes come from memory and 4 go there. The mean takes an addition, the variance a subtraction and a
multiply-add, the result three operations more (scale and bias included): at 6 to 8 for 8 bytes all of it waits for memory as soon as
the tensor is larger than L2, and for L1 before that, from which a vector is loaded three times and the factors once. The sums go over
`FoldSchedule.vectors` partial sums: one alone would add a vector in the 4 cycles that an addition takes, four add one a cycle, which is
half of what L1 gives. A sum of squares in the same pass as the mean would cancel where the mean is large.

A row of 768 is 48 vectors of AVX-512: 96 cycles for both sums, 72 for three loads of each vector of the result, some 120 until sums are
joined across lanes and root and quotient are there: 39 us for 512 rows at 3.8 GHz. Their 4.7 MB (a store fetches its line first) come from
L3 and go there: measured 100 us by one thread (torch 150), which is 47 GB/s, 33 by two.

Rows that are worth threads by themselves (175000 elements of float32; a group of many channels) are cut into `Pieces`: the sum of each and
that of the squares of distances from its own mean, which are joined exactly, while it is in L2; then the results. So x comes from memory
twice rather than three times, 4 * 4 bytes of an element instead of 5 * 4. One line of 2 million: 1.62 ms in whole and 1.40 in pieces by
one thread, 0.72 by two (torch 1.40); one group of 64 x 256 x 256: 2.30, 1.83 and 0.92 (torch 2.09).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import IDENTITY, BufferSpec, Dim, Epilogue, Expr, Prologue
from mlec.backends.tvm.kernels.pieces import Piece, Pieces
from mlec.backends.tvm.kernels.schedule import FoldSchedule
from mlec.backends.tvm.kernels.tile import (
    Fold,
    accumulator_dtype,
    bits,
    epilogue_parameters,
    flat_view,
    otherwise,
    parallel_if_large,
    parameter,
    product,
    unflatten,
    vector_loop,
    worth_threads,
)
from mlec.backends.tvm.kernels.vector import Cell, cast_to, const, load, ramp, share, store
from mlec.backends.tvm.target import TargetInfo

DEFAULT = FoldSchedule(4)
"""Partial sums hide the latency of additions."""


def line_schedules(length: Dim, dtype: str, target: TargetInfo) -> Iterator[FoldSchedule]:
    """Candidates for lines, or groups, of so many elements."""
    return FoldSchedule.candidates(DEFAULT.vectors, length, target.lanes(bits(accumulator_dtype(dtype))))


def layer_norm(
    x_shape: Sequence[Dim],
    axis: int,
    eps: float,
    dtype: str,
    target: TargetInfo,
    epilogue: Epilogue = IDENTITY,
    name: str = "layer_norm",
    schedule: FoldSchedule = DEFAULT,
    prologue: Prologue | None = None,
) -> tirx.PrimFunc:
    """``y = (x - mean) / sqrt(variance + eps) * scale + bias`` over the axes from ``axis`` on.

    Parameters of the program: x, scale and bias (shape of those axes), the epilogue's inputs, y. Extents may be symbolic.

    With a ``prologue``, x is what it computes from its own inputs, which take the place of x among the parameters. Only the last axis can
    be normalised then, and y has the type of x: each line of x is computed once, and waits in y.
    """
    return _line_norm(x_shape, axis, eps, dtype, target, epilogue, True, name, schedule, prologue)


def rms_norm(
    x_shape: Sequence[Dim],
    axis: int,
    eps: float,
    dtype: str,
    target: TargetInfo,
    epilogue: Epilogue = IDENTITY,
    name: str = "rms_norm",
    schedule: FoldSchedule = DEFAULT,
    prologue: Prologue | None = None,
) -> tirx.PrimFunc:
    """``y = x / sqrt(mean(x²) + eps) * scale`` over the axes from ``axis`` on, see `layer_norm`. Parameters: x, scale, extra, y."""
    return _line_norm(x_shape, axis, eps, dtype, target, epilogue, False, name, schedule, prologue)


def _line_norm(
    x_shape: Sequence[Dim],
    axis: int,
    eps: float,
    dtype: str,
    target: TargetInfo,
    epilogue: Epilogue,
    centred: bool,
    name: str,
    schedule: FoldSchedule,
    prologue: Prologue | None,
) -> tirx.PrimFunc:
    acc = accumulator_dtype(dtype)
    lanes = target.lanes(bits(acc))
    axis %= len(x_shape)
    rows, length = product(x_shape[:axis]), product(x_shape[axis:])

    with prim_func(name, noalias=False) as kernel:
        specs = prologue.inputs if prologue else (BufferSpec(x_shape, dtype),)
        sources = tuple(parameter(f"x{i}", spec) for i, spec in enumerate(specs))
        factors = [parameter(label, BufferSpec(x_shape[axis:], dtype)) for label in ("scale", "bias")[: 1 + centred]]
        extra = epilogue_parameters(epilogue)
        out_dtype = epilogue.out_dtype or dtype
        y_arg = parameter("y", BufferSpec(x_shape, out_dtype))
        y = flat_view(y_arg, (rows, length), out_dtype)
        x = y if prologue else flat_view(sources[0], (rows, length), dtype)
        scale, *bias = (flat_view(buffer, (length,), dtype) for buffer in factors)

        def value(row: Expr, start: Expr, width: int) -> Expr:
            return cast_to(acc, load(x, [row, start], width))

        def made(row: Expr, start: Expr, width: int) -> Expr:
            assert prologue is not None
            computed = share(prologue.value((*unflatten(row, x_shape[:-1]), start), width, sources))
            store(y, computed, [row, start])
            return cast_to(acc, computed)

        def put(row: Expr, piece: Piece, mean: Expr, inverse: Expr) -> None:
            def run(offset: Expr, width: int) -> None:
                start = piece.start + offset
                element = value(row, start, width)
                done = (element - mean if centred else element) * inverse * cast_to(acc, load(scale, [start], width))
                if bias:
                    done = done + cast_to(acc, load(bias[0], [start], width))
                where: tuple[Expr, ...] = ()
                if epilogue.inputs:
                    first = unflatten(row * length + start, x_shape)
                    where = (*first[:-1], ramp(first[-1], width))
                store(y, cast_to(out_dtype, epilogue.apply(share(done), where, extra)), [row, start])

            vector_loop(piece.length, lanes, run)

        reading = (made, value) if prologue else (value, value)
        _Norm(rows, 1, length, acc, lanes, eps, centred, schedule.vectors, *reading, put).program()
    return kernel.func


def group_norm(
    x_shape: Sequence[Dim],
    groups: int,
    eps: float,
    dtype: str,
    target: TargetInfo,
    name: str = "group_norm",
    schedule: FoldSchedule = DEFAULT,
) -> tirx.PrimFunc:
    """``y = (x - mean) / sqrt(variance + eps) * scale + bias`` over each group of channels of ``x[n, c, *space]``.

    Parameters of the program: x, scale[c], bias[c], y. The batch and spatial extents may be symbolic.
    """
    acc = accumulator_dtype(dtype)
    lanes = target.lanes(bits(acc))
    n, c, *space = x_shape
    size, per_group = product(space), c // groups

    with prim_func(name) as kernel:
        x_arg = parameter("x", BufferSpec(x_shape, dtype))
        scale, bias = (parameter(label, BufferSpec((c,), dtype)) for label in ("scale", "bias"))
        y_arg = parameter("y", BufferSpec(x_shape, dtype))
        x, y = (flat_view(b, (product((n, groups)), per_group * size), dtype) for b in (x_arg, y_arg))

        def value(row: Expr, start: Expr, width: int) -> Expr:
            return cast_to(acc, load(x, [row, start], width))

        def put(row: Expr, piece: Piece, mean: Expr, inverse: Expr) -> None:
            with T.serial(piece.count) as j:
                line = share(piece.first + j)
                channel = share(row % groups * per_group + line)
                factor = share(cast_to(acc, scale[channel]) * inverse)
                shift = share(cast_to(acc, bias[channel]))

                def run(start: Expr, width: int) -> None:
                    at = line * size + piece.start + start
                    store(y, cast_to(dtype, (value(row, at, width) - mean) * factor + shift), [row, at])

                vector_loop(piece.length, lanes, run)

        rows = product((n, groups))
        _Norm(rows, per_group, size, acc, lanes, eps, True, schedule.vectors, value, value, put).program(groups)
    return kernel.func


Element = Callable[[Expr, Expr, int], Expr]
"""Consecutive elements of a row, from a place on."""


@dataclass(frozen=True)
class _Norm:
    """A program that normalises ``rows`` of ``lines`` times ``length`` elements.

    Attributes:
        acc, lanes: dtype of the sums, and how many are a vector.
        centred: whether the mean is subtracted.
        vectors: partial sums, see `Fold`.
        first, again: reads elements for the first time, and later.
        put: writes the results of a piece of a row from its mean and ``1 / sqrt(variance + eps)``.
    """

    rows: Dim
    lines: Dim
    length: Dim
    acc: str
    lanes: int
    eps: float
    centred: bool
    vectors: int
    first: Element
    again: Element
    put: Callable[[Expr, Piece, Expr, Expr], None]

    @property
    def work(self) -> Dim:
        """Of a row, in the unit of `SERIAL_WORK`."""
        return 12 * self.lines * self.length * bits(self.acc) // 32

    def program(self, multiple: int = 1) -> None:
        """By rows, whose number is known to be a ``multiple`` of something, or by pieces of rows that are worth threads by themselves."""
        otherwise(
            [(worth_threads(self.work), self.in_pieces)],
            lambda: parallel_if_large(self.rows, self.work, self.row, multiple),
        )

    def row(self, row: Expr) -> None:
        """Both sums in turn, and the results, while the row is in L1."""
        whole = Piece(0, self.lines, 0, self.length)
        total, squares = self.sums(row, whole)
        self.put(row, whole, *self.statistics(total, squares))

    def in_pieces(self) -> None:
        """The sum of each piece, and that of the squares of distances from its own mean; those of the row; then the results."""
        pieces = Pieces(self.lines, self.length)
        totals, squares = (T.alloc_buffer((self.rows, pieces.number), self.acc) for _ in range(2))
        means, inverses = (T.alloc_buffer((self.rows,), self.acc) for _ in range(2))

        def for_pieces(body: Callable[[Expr, Expr], None]) -> None:
            with T.parallel(self.rows * pieces.number) as i:
                body(share(i // pieces.number), share(i % pieces.number))

        def gather(row: Expr, number: Expr) -> None:
            for held, value in zip((totals, squares), self.sums(row, pieces.at(number)), strict=True):
                T.buffer_store(held, value, [row, number])

        def join(row: Expr) -> None:
            total, square = Cell(self.acc, 1, 0), Cell(self.acc, 1, 0)
            with T.serial(pieces.number) as number:
                total.set(total.value + totals[row, number])
            mean = share(total.value / self.number(self.lines * self.length))
            with T.serial(pieces.number) as number:
                if self.centred:
                    count = self.count(pieces.at(number))
                    away = share(totals[row, number] / count - mean)
                    square.set(square.value + count * away * away)
                square.set(square.value + squares[row, number])
            for held, value in zip((means, inverses), self.statistics(total.value, square.value), strict=True):
                T.buffer_store(held, value, [row])

        def put(row: Expr, number: Expr) -> None:
            self.put(row, pieces.at(number), share(means[row]), share(inverses[row]))

        for_pieces(gather)
        with T.serial(self.rows) as row:
            join(row)
        for_pieces(put)

    def sums(self, row: Expr, piece: Piece) -> tuple[Expr, Expr]:
        """Of the elements of a piece (0 if not ``centred``), and of the squares of their distances from its mean."""
        reading, begin = iter((self.first, self.again)), piece.first * self.length + piece.start

        def fold(term: Callable[[Expr], Expr]) -> Expr:
            found, element = Fold(self.lanes, self.acc, 0, lambda a, b: a + b, self.vectors), next(reading)
            found.over(piece.count * piece.length, lambda start, width: term(element(row, begin + start, width)))
            return found.result()

        total = fold(lambda value: value) if self.centred else const(0, self.acc)
        mean = share(total / self.count(piece)) if self.centred else total

        def square(value: Expr) -> Expr:
            difference = share(value - mean if self.centred else value)
            return difference * difference

        return total, fold(square)

    def statistics(self, total: Expr, squares: Expr) -> tuple[Expr, Expr]:
        """The mean (0 if not ``centred``), and ``1 / sqrt(variance + eps)``, from the sums over a row."""
        count = self.number(self.lines * self.length)
        mean = share(total / count) if self.centred else total
        return mean, share(const(1, self.acc) / tirx.sqrt(squares / count + const(self.eps, self.acc)))

    def count(self, piece: Piece) -> Expr:
        """Elements of a piece, in the type of the sums."""
        return self.number(piece.count * piece.length)

    def number(self, count: Dim) -> Expr:
        return const(count, self.acc) if isinstance(count, int) else cast_to(self.acc, count)
