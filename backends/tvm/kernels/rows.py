"""Blocks of rows held by columns: a vector is one column of so many rows.

What a program does to a row (scale, pick and multiply columns, a product with few columns, activations, labels) is then
vertical work on whole vectors, however few columns there are, and nothing leaves the L1 cache between two steps: a block
is ``lanes * columns`` elements, some KB. Rows are turned into columns by shuffles in registers (24 for 64 elements of 8
bytes), which costs less than one pass over them from memory would.

What is left beside whole blocks goes in blocks of one vector. Of one or two rows, as a request has them, most lanes would be empty: their
block has two, and in its products the lanes are columns of one row.

A scaler and a logistic regression on 30 features of float64 read 240 bytes of a row, write 32, and take 104 operations. A block of 16
rows is 180 cycles of shuffles, 60 of differences and FMAs (two vectors for each column), 70 for two vectors of sigmoids and some 40 for
the results. 1024 rows, from L2: predicted 6.4 us at 3.48 GHz if nothing overlaps, measured 6.5 by one thread; 64 rows 0.49.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mlec.backends.tvm.compat import T, tirx
from mlec.backends.tvm.kernels.epilogue import Buffer, Dim, Expr
from mlec.backends.tvm.kernels.mathlib import exp, log
from mlec.backends.tvm.kernels.schedule import around, variations
from mlec.backends.tvm.kernels.softmax import finite_shift
from mlec.backends.tvm.kernels.tile import SERIAL_WORK, TASK_WORK, ceildiv
from mlec.backends.tvm.kernels.transpose import turn
from mlec.backends.tvm.kernels.vector import (
    Cell,
    broadcast,
    const,
    int64,
    is_nan,
    load,
    maximum,
    minimum,
    ramp,
    select,
    share,
    store,
)

VECTORS = 2
"""Vector registers that hold one column of a block by default: as many independent chains of sums, which are as long as a row."""

FEW_ROWS = 2
"""Rows of the narrowest block. (One row would be scalars: LLVM puts these into vectors of its own, and may round them differently.)"""

CHUNK_ROWS = 1024
"""Rows of a task at most, by default: scratch memory is taken once for each."""


@dataclass(frozen=True)
class RowSchedule:
    """How a row program goes over the rows.

    Attributes:
        vectors: that hold one column of a block, of the program's widest elements.
        chunk: rows of a task, in vectors of them.
    """

    vectors: int
    chunk: int

    @staticmethod
    def candidates(lanes: int, work: int) -> Iterator[RowSchedule]:
        """For vectors of so many rows, and so much work for each row, in the unit of `SERIAL_WORK`."""
        block = VECTORS * lanes
        default = RowSchedule(VECTORS, max(1, min(CHUNK_ROWS, TASK_WORK // max(1, work)) // block) * VECTORS)
        return variations(
            default, lambda s: s.chunk % s.vectors == 0, vectors=(1, 4), chunk=around(default.chunk, most=64 * VECTORS)
        )


Run = Callable[[Expr, int, bool], None]
"""Computes a block: ``(first row, rows, whole)``. One that is not whole may end beyond the last row."""


def over_blocks(n: Dim, block: int, lanes: int, chunk: int, work: int, prepare: Callable[[], Run]) -> None:
    """Run ``prepare()(first row, rows, whole)`` for blocks that cover ``n`` rows, ``chunk`` rows of them in a task.

    They are of ``block`` rows; what is left goes in blocks of ``lanes``, or in one of `FEW_ROWS` if that is enough.
    ``work`` is that of one row, in the unit of `SERIAL_WORK`. ``prepare`` is called once for each task, to take memory.
    """

    def task(begin: Expr, end: Expr) -> None:
        run = prepare()
        with T.serial((end - begin) // block) as i:
            run(begin + i * block, block, True)
        left = share((end - begin) % block)
        narrow = min(lanes, FEW_ROWS)
        with T.If(left <= narrow):
            with T.Then(), T.If(left > 0), T.Then():
                run(share(end - left), narrow, False)
            with T.Else(), T.serial(ceildiv(left, lanes)) as i:
                run(share(end - left + i * lanes), lanes, False)

    with T.If(n * work < SERIAL_WORK):
        with T.Then():
            task(int64(0), n)
        with T.Else(), T.parallel(ceildiv(n, chunk)) as c:
            task(share(c * chunk), share(tirx.min(n, (c + 1) * chunk)))


def read_columns(
    x: Buffer, columns: int, first: Expr, n: Dim, whole: bool, scratch: Buffer, block: int, lanes: int
) -> None:
    """``scratch[column * block + r] = x[first + r, column]`` for a block of rows of the flat matrix ``x``.

    Rows beyond n repeat the last one. ``lanes`` elements of this type fill a vector.
    """
    lanes = min(lanes, block, 16)

    def start(row: Expr) -> Expr:
        """Where a row of the block begins."""
        return share((first + row if whole else tirx.min(first + row, n - 1)) * columns)

    def by_element() -> None:
        with T.serial(block) as r:
            begin = start(r)
            for column in range(columns):
                T.buffer_store(scratch, x[begin + column], [column * block + r])

    def square(row: Expr, column: Expr) -> None:
        rows = [share(load(x, [start(row + j) + column], lanes)) for j in range(lanes)]
        for i, turned in enumerate(turn(rows)):
            store(scratch, turned, [(column + i) * block + row])

    def all_rows() -> None:
        if columns < lanes:
            by_element()
        else:
            _squares(block, columns, lanes, square)

    if whole and columns == 1:
        store(scratch, load(x, [first], block), [0])
    else:
        all_rows()


def _squares(rows: int, columns: int, lanes: int, square: Callable[[Expr, Expr], None]) -> None:
    """``square(row, column)`` for squares that cover a matrix; the last ones begin early enough to end with it."""
    with T.serial(rows // lanes) as down:
        with T.serial(columns // lanes) as across:
            square(down * lanes, across * lanes)
        if columns % lanes:
            square(down * lanes, columns - lanes)


def write_columns(
    y: Buffer, columns: int, first: Expr, n: Dim, whole: bool, scratch: Buffer, block: int, lanes: int
) -> None:
    """The inverse of `read_columns`; writes nothing beyond row n."""
    lanes = min(lanes, block, 16)
    if whole and columns == 1:
        store(y, load(scratch, [0], block), [first])
    elif whole and columns <= 4:
        order = [column * lanes + row for row in range(lanes) for column in range(columns)]
        for down in range(0, block, lanes):
            parts = [share(load(scratch, [column * block + down], lanes)) for column in range(columns)]
            y_index = ramp((first + down) * columns, lanes * columns)
            T.buffer_store(y, tirx.Shuffle(parts, order), [y_index])
    elif whole and columns >= lanes:

        def square(row: Expr, column: Expr) -> None:
            parts = [share(load(scratch, [(column + j) * block + row], lanes)) for j in range(lanes)]
            for i, turned in enumerate(turn(parts)):
                store(y, turned, [(first + row + i) * columns + column])

        _squares(block, columns, lanes, square)
    else:
        with T.serial(block if whole else tirx.min(block, n - first)) as r, T.serial(columns) as column:
            T.buffer_store(y, scratch[column * block + r], [(first + r) * columns + column])


Column = Callable[[Expr], Expr]
"""A column of the operand, by its number: a vector of a block's rows."""
Put = Callable[[Expr, Expr], None]
"""Takes ``(number, vector)`` of a column of the result."""

COMBINE: dict[str, tuple[Callable[[Expr, Expr], Expr], float]] = {
    "sum": (lambda a, b: a + b, 0),
    "mean": (lambda a, b: a + b, 0),
    "max": (maximum, -math.inf),
    "min": (minimum, math.inf),
}


def reduce_columns(op: str, columns: int, column: Column, put: Put, back: Column, dtype: str, lanes: int) -> None:
    """``sum``, ``mean``, ``max`` or ``min`` (NaN if there is one) of the columns."""
    combine, identity = COMBINE[op]
    total = Cell(dtype, lanes, identity)
    with T.serial(columns) as k:
        total.set(combine(total.value, share(column(k))))
    put(0, total.value / const(columns, dtype, lanes) if op == "mean" else total.value)


def search_columns(op: str, columns: int, column: Column, put: Put, back: Column, dtype: str, lanes: int) -> None:
    """``argmax`` or ``argmin``: the number of the first such column; the first NaN wins."""
    best, where = Cell(dtype, lanes, column(0)), Cell("int64", lanes, 0)
    one, zero = const(1, "int32", lanes), const(0, "int32", lanes)
    with T.serial(columns - 1) as k:
        value = share(column(k + 1))
        gain = select(value > best.value if op == "argmax" else value < best.value, one, zero)
        wins = share(select(is_nan(best.value), zero, select(is_nan(value), one, gain))) > zero
        where.set(select(wins, broadcast(tirx.Cast("int64", k + 1), lanes), where.value))
        best.set(select(wins, value, best.value))
    put(0, where.value)


def normalise_columns(op: str, columns: int, column: Column, put: Put, back: Column, dtype: str, lanes: int) -> None:
    """``softmax``, ``log_softmax`` or ``logsumexp`` over the columns, without overflow."""
    largest, total = Cell(dtype, lanes, -math.inf), Cell(dtype, lanes, 0)
    with T.serial(columns) as k:
        largest.set(maximum(largest.value, share(column(k))))
    shift = finite_shift(largest.value) if op == "logsumexp" else largest.value
    with T.serial(columns) as k:
        power = exp(column(k) - shift)
        if op == "softmax":
            put(k, power)
        total.set(total.value + power)
    if op == "logsumexp":
        put(0, log(total.value) + shift)
    elif op == "log_softmax":
        scale = log(total.value)
        with T.serial(columns) as k:
            put(k, column(k) - shift - scale)
    else:
        factor = share(const(1, dtype, lanes) / total.value)
        with T.serial(columns) as k:
            put(k, back(k) * factor)


VERTICAL = {
    **dict.fromkeys(COMBINE, reduce_columns),
    **dict.fromkeys(("argmax", "argmin"), search_columns),
    **dict.fromkeys(("softmax", "log_softmax", "logsumexp"), normalise_columns),
}
"""What is computed from all columns of a row: ``(op, columns, column, put, back, dtype, lanes)``, where ``back`` reads what was put."""
