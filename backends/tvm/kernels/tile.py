"""The register tile: the block of accumulators every contraction keeps in vector registers while it walks the summed axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from mlec.backends.tvm.compat import T, reach, tirx
from mlec.backends.tvm.kernels.epilogue import Buffer, BufferSpec, Dim, Epilogue, Expr
from mlec.backends.tvm.kernels.vector import Cell, broadcast, cast_to, const, reduce_lanes, share, store
from mlec.backends.tvm.target import TargetInfo

SERIAL_WORK = 1 << 21
"""Work below which waking other threads costs more than it gains: 20 us of one core.

Whoever wakes a thread waits for it: a few microseconds where it still spins, some ten where it sleeps, and a slice of the scheduler's
time where another program has its core.

The unit is a multiply-add of float32 in vectors of 512 bits, or what takes as long, 10 ps. `multiply_adds` counts those of other types
and vectors, `elementwise.CHEAP` is what a vector of an expression over elements takes. All templates decide by this one number.
"""

TASK_WORK = SERIAL_WORK // 4
"""Work that is worth a task of its own, once threads are woken."""

UNROLL = 4
"""Steps of a contraction in one turn of its loop. A 6 x 4 tile of AVX-512 vectors reaches 0.92 of the FMA peak so, and 0.87 with one."""

PARAMETER_ALIGNMENT = 8
"""Bytes that the address of a parameter is a multiple of: what any array of 8-byte numbers has, so that few inputs need a copy.
Vector loads from addresses that happen to be aligned better are as fast as if that were known."""


class RegisterTile:
    """``rows x vectors`` accumulators of ``lanes`` lanes each, zero at first.

    Each accumulator is a buffer of its own: one buffer for all would exceed what TVM puts on the stack, and LLVM would
    not keep it in registers.
    """

    def __init__(self, rows: int, vectors: int, lanes: int, dtype: str) -> None:
        self.lanes = lanes
        self.cells = [[Cell(dtype, lanes, 0) for _ in range(vectors)] for _ in range(rows)]

    def multiply_add(self, row_values: Sequence[Expr], vectors: Sequence[Expr]) -> None:
        """Add the outer product: a scalar (or vector) per row times a vector per column of accumulators."""
        named = [share(vector) for vector in vectors]
        for row, value in zip(self.cells, row_values, strict=True):
            factor = share(broadcast(value, self.lanes))
            for cell, vector in zip(row, named, strict=True):
                cell.set(cell.value + factor * vector)

    def add(self, row: int, factor: Expr, vectors: Sequence[Expr]) -> None:
        """Add ``factor`` (a vector) times a vector per column to one row of accumulators."""
        for cell, vector in zip(self.cells[row], vectors, strict=True):
            cell.set(cell.value + factor * vector)

    def value(self, row: int, vector: int, lanes: int | None = None) -> Expr:
        """An accumulator, or its first ``lanes`` lanes."""
        whole = self.cells[row][vector].value
        return whole if lanes in (None, self.lanes) else first_lanes(whole, lanes or 0)


def first_lanes(x: Expr, lanes: int) -> Expr:
    """The first lanes of a vector, as a shorter vector or a scalar."""
    return tirx.Shuffle([x], list(range(lanes)))


def accumulator_dtype(dtype: str) -> str:
    """Sums of 16-bit floats are kept in float32."""
    return "float32" if dtype in ("float16", "bfloat16") else dtype


def bits(dtype: str) -> int:
    """Width of an element."""
    return int("".join(c for c in dtype if c.isdigit()))


def multiply_adds(count: Dim, dtype: str, target: TargetInfo) -> Dim:
    """The work (see `SERIAL_WORK`) of so many multiply-adds."""
    return count * bits(accumulator_dtype(dtype)) * 16 // target.vector_bits


def unrolled(
    extent: Dim, times: int, body: Callable[[Expr], None], each_turn: Callable[[Expr], None] | None = None
) -> None:
    """``body(i)`` for each i below ``extent`` in order, so many to a turn of the loop (what is left: one to a turn).

    ``each_turn(number)`` comes before the steps of a turn of so many.
    """
    if not isinstance(extent, int) or extent >= times:
        with T.serial(extent // times) as turn:
            if each_turn is not None:
                each_turn(turn)
            for step in range(times):
                body(turn * times + step)
    if isinstance(extent, int):
        for step in range(extent // times * times, extent):
            body(step)
    else:
        with T.serial(extent % times) as rest:
            body(extent // times * times + rest)


def tile_rows(target: TargetInfo, vectors: int) -> int:
    """Rows of accumulators that fit the register file beside the operands.

    Eight or more independent sums hide the latency of two FMA units; a tile of ``rows x vectors`` loads ``rows + vectors``
    values for ``rows * vectors`` FMAs, two loads beside two FMAs in a cycle. 32 registers: 6 x 4, 8 x 3, 8 x 2 or 12 x 1; 16
    registers: 6 x 2 or 12 x 1. Without FMA each product takes a register of its own before it is added: 5 x 2.
    """
    budget = target.vector_registers - (4 if target.fma else 6)
    return max(1, min(budget // vectors, {1: 12, 2: 8, 3: 8}.get(vectors, 6)))


def tile_vectors(target: TargetInfo) -> int:
    """Vectors across the widest tile: those that six rows of accumulators leave room for."""
    return 4 if target.vector_registers >= 32 else 2


def parameter(name: str, spec: BufferSpec) -> Buffer:
    """Declare the next parameter of the program.

    Raises:
        ValueError: the program has begun: its parameters come before any view, cell, loop or branch.
    """
    reach(product(spec.shape))
    try:
        return T.arg(name, T.buffer(spec.shape, spec.dtype, align=PARAMETER_ALIGNMENT))
    except ValueError as error:
        if "at the top of a PrimFunc" not in str(error):
            raise
        raise ValueError(
            f"parameter {name!r} is declared too late: first all parameters, then flat_view, Cell, share, loops and branches"
        ) from error


def buffer_dtype(buffer: Buffer) -> str:
    """Element dtype of a buffer."""
    return str(buffer.ty.dtype.dtype)


def epilogue_parameters(epilogue: Epilogue) -> tuple[Buffer, ...]:
    """Declare the parameters an epilogue reads."""
    return tuple(parameter(f"extra{i}", spec) for i, spec in enumerate(epilogue.inputs))


def flat_view(buffer: Buffer, shape: Sequence[Dim], dtype: str) -> Buffer:
    """The memory of a compact buffer under another shape of as many elements."""
    return T.decl_buffer(tuple(shape), dtype, data=buffer.data)


def product(dims: Sequence[Dim]) -> Dim:
    """Product of extents; 1 for none."""
    return math.prod(dims)


def unflatten(index: Expr, shape: Sequence[Dim]) -> tuple[Expr, ...]:
    """The position ``index`` in row-major order, as one index for each axis of ``shape``."""
    parts: list[Expr] = []
    for extent in reversed(shape[1:]):
        parts.append(index % extent)
        index = index // extent
    return (*([index] if shape else []), *reversed(parts))


@contextmanager
def if_(condition: Expr) -> Iterator[None]:
    """A branch without an alternative."""
    with T.If(condition), T.Then():
        yield


def otherwise(choices: Sequence[tuple[Expr, Callable[[], None]]], last: Callable[[], None]) -> None:
    """The first of ``(condition, program)`` that holds; the last one if none does. What is known not to hold is left out."""
    if not choices:
        last()
        return
    (condition, program), *rest = choices
    if isinstance(condition, bool):
        program() if condition else otherwise(rest, last)
        return
    with T.If(condition):
        with T.Then():
            program()
        with T.Else():
            otherwise(rest, last)


def ceildiv(a: Dim, b: Dim) -> Dim:
    """Quotient rounded up, of extents."""
    return (a + (b - 1)) // b


def worth_threads(work: Dim) -> Expr:
    """Whether so much work (see `SERIAL_WORK`) is; known where the work is, else under a name (see `parallel_if_large`)."""
    enough = work >= SERIAL_WORK
    return enough if isinstance(enough, bool) else share(enough)


def tasks_worth(work: int, target: TargetInfo) -> int:
    """Tasks that so much work (see `SERIAL_WORK`) is worth, at most two for each thread."""
    return max(1, min(2 * target.cores, work // TASK_WORK))


def chunks(extent: int, parts: int) -> tuple[int, int]:
    """An extent in at most so many chunks of equal size (the last may be shorter): their size, and how many there are."""
    size = ceildiv(extent, parts)
    return size, ceildiv(extent, size)


def parallel_if_large(count: Dim, work: float | Expr, body: Callable[[Expr], None], multiple: int = 1) -> None:
    """Run ``body(i)`` for each i below ``count``, on all threads if there is enough to do.

    ``work`` is that of one i, in the unit of `SERIAL_WORK`; an expression where only the run tells it. A symbolic count is known to be a
    ``multiple`` of something; unless that alone is enough work for threads, the program holds both loops.
    """
    if isinstance(work, (int, float)):
        enough = max(2, math.ceil(SERIAL_WORK / max(work, 1)))
        if isinstance(count, int) or multiple >= enough:
            large = max(count if isinstance(count, int) else 0, multiple) >= enough
            with (T.parallel if large else T.serial)(count) as i:
                body(i)
            return
        small = count < enough
    elif isinstance(count, int) and count < 2:
        with T.serial(count) as i:
            body(i)
        return
    else:
        small = count * work < SERIAL_WORK
        if not isinstance(count, int):
            small = tirx.Or(count < 2, small)
    # Under a name: else the simplifier concludes from 1000 n < 820 that n is 0, and stops at a division by it.
    with T.If(share(small)):
        with T.Then(), T.serial(count) as i:
            body(i)
        with T.Else(), T.parallel(count) as i:
            body(i)


def copy_run(
    buffer: Buffer,
    prefix: Sequence[Expr],
    start: Expr,
    count: int,
    lanes: int,
    source: Callable[[Expr, int], Expr] | None = None,
    otherwise: float = 0,
) -> None:
    """Store ``source(offset, width)`` (without one: the constant) for ``count`` consecutive elements of the last axis."""
    dtype = buffer_dtype(buffer)

    def piece(offset: Expr, width: int) -> None:
        value = const(otherwise, dtype, width) if source is None else cast_to(dtype, source(offset, width))
        store(buffer, value, [*prefix, start + offset])

    if count >= lanes:
        with T.serial(count // lanes) as i:
            piece(i * lanes, lanes)
    if count % lanes:
        piece(count // lanes * lanes, count % lanes)


def vector_loop(extent: Dim, lanes: int, body: Callable[[Expr, int], None]) -> None:
    """``body(start, width)`` for runs that cover ``extent``: whole vectors, then one short one (scalars if it is symbolic)."""
    if not isinstance(extent, int):
        with T.serial(extent // lanes) as i:
            body(i * lanes, lanes)
        with T.serial(extent % lanes) as i:
            body(extent // lanes * lanes + i, 1)
        return
    if extent >= lanes:
        with T.serial(extent // lanes) as i:
            body(i * lanes, lanes)
    if extent % lanes:
        body(extent // lanes * lanes, extent % lanes)


def column_parts(extent: Dim, wide: int, work: Dim, target: TargetInfo) -> int:
    """In how many parts tasks share the columns of a row, in whole runs of ``wide``; one if the extent is symbolic.

    ``work`` is that of the row (see `SERIAL_WORK`). Where only the run tells it, there is a part for each task that it could be worth.
    """
    if not isinstance(extent, int) or extent < 2 * wide:
        return 1
    worth = tasks_worth(work, target) if isinstance(work, int) else 2 * target.cores
    return chunks(extent // wide, min(worth, extent // wide))[1]


def vectors_loop(
    extent: Dim, lanes: int, vectors: int, body: Callable[[Expr, int, int], None], part: Expr = 0, parts: int = 1
) -> None:
    """``body(start, width, count)`` for runs of ``count`` vectors that cover ``extent``: as many as ``vectors``, then one by one.

    Of several ``parts`` (see `column_parts`), one is covered; the last has what is left beside whole runs.
    """
    wide = vectors * lanes
    if parts > 1:
        runs, left = divmod(extent, wide)
        size = ceildiv(runs, parts)
        with T.serial(tirx.min(size, runs - part * size)) as i:
            body((part * size + i) * wide, lanes, vectors)
        if left:
            with if_(part == parts - 1):
                vectors_loop(left, lanes, 1, lambda start, width, count: body(extent - left + start, width, count))
        return
    whole = extent // wide * wide if vectors > 1 else 0
    if vectors > 1 and (not isinstance(extent, int) or extent >= wide):
        with T.serial(extent // wide) as i:
            body(i * wide, lanes, vectors)
    vector_loop(extent - whole, lanes, lambda start, width: body(whole + start, width, 1))


class Fold:
    """A reduction along consecutive elements: a few vectors of partial results, joined in a fixed order at the end.

    Several partial results hide the latency of a short term; one is enough (and a smaller program) where the term is long.
    """

    def __init__(
        self, lanes: int, dtype: str, identity: float, combine: Callable[[Expr, Expr], Expr], partials: int = 4
    ) -> None:
        self.lanes, self.combine = lanes, combine
        self.cells = [Cell(dtype, lanes, identity) for _ in range(partials)]
        self.scalar = Cell(dtype, 1, identity)

    def _add(self, cell: Cell, value: Expr) -> None:
        cell.set(self.combine(cell.value, share(value)))

    def over(self, extent: Dim, term: Callable[[Expr, int], Expr]) -> None:
        """Take in ``term(start, width)`` for runs that cover ``extent``."""
        wide = self.lanes * len(self.cells) if len(self.cells) > 1 else 1
        whole = extent // wide * wide if wide > 1 else 0
        if wide > 1 and (not isinstance(extent, int) or extent >= wide):
            with T.serial(extent // wide) as i:
                for u, cell in enumerate(self.cells):
                    self._add(cell, term(i * wide + u * self.lanes, self.lanes))

        def rest(start: Expr, width: int) -> None:
            value = term(whole + start, width)
            if width == self.lanes:
                self._add(self.cells[0], value)
            else:
                self._add(self.scalar, reduce_lanes(value, self.combine))

        vector_loop(
            extent - whole if isinstance(extent, int) else extent % wide if wide > 1 else extent, self.lanes, rest
        )

    def result(self) -> Expr:
        """The scalar result."""
        cells = [cell.value for cell in self.cells]
        while len(cells) > 1:
            half = len(cells) // 2
            cells = [share(self.combine(cells[i], cells[i + half])) for i in range(half)]
        return share(self.combine(self.scalar.value, reduce_lanes(share(cells[0]), self.combine)))
