"""Products of two matrices that are both computed: neither is packed beforehand, and a task packs what it reads.

A task is some rows (`MatmulSchedule.mc`, at most some 256 by default) of one product of the batch times one block of columns. It
copies its block of ``b`` into a panel ``[k, nr]``, zeros beyond n, which makes strides, the transposition and the edge somebody
else's problem, and walks tiles of ``mr x nr`` sums over it as `gemm` does: a step over k loads nr / lanes vectors and mr numbers for
mr * nr / lanes FMAs. Every element of the result is one chain of FMAs over k in order.

Scores of attention, 128 queries times 128 keys of 64 numbers in float32 (AVX-512: mr = 6, nr = 64): 2 * 128 * 128 * 64 = 2.1 MFLOP on
64 KB that are read and 64 KB that are written, 16 FLOP a byte: FMAs count, not memory. Each of two tasks copies 64 keys: 256 vectors are
loaded, turned in squares (four shuffles each) and stored, some 1500 instructions beside 128 * 64 * 64 / 16 = 32768 FMAs. For m rows it is
6 instructions in m; the panel, 16 KB, and the rows, 32 KB, are what L1 holds.

Convolutions of 1 x 1 on plain images are such products, too: their weights, [256, 256], times the 256 channels of 28 x 28 positions. That
is 103 MFLOP on 1.9 MB; a block of 64 positions is a panel of 64 KB, of which a step of 6 rows reads 256 bytes in 12 cycles, from L2 mostly.
Measured 566 us by one thread, 181 GFLOP/s: what tiles reach with operands from L1 (`gemm`). 512 x 28 x 28 to 128: 569 us; 1024 x 14 x 14 to
1024, whose weights, 4 MB, come from L3 for each block of positions, 2490 us, 165 GFLOP/s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import IDENTITY, Buffer, BufferSpec, Dim, Epilogue, Expr
from mlec.backends.tvm.kernels.operands import Extents, broadcast_lead, flatten, operand_indices
from mlec.backends.tvm.kernels.result import Result
from mlec.backends.tvm.kernels.schedule import around, variations
from mlec.backends.tvm.kernels.tile import (
    UNROLL,
    RegisterTile,
    accumulator_dtype,
    bits,
    ceildiv,
    chunks,
    flat_view,
    if_,
    multiply_adds,
    parallel_if_large,
    parameter,
    product,
    tile_rows,
    tile_vectors,
    unflatten,
    unrolled,
)
from mlec.backends.tvm.kernels.transpose import turn
from mlec.backends.tvm.kernels.vector import cast_to, const, load, share, store
from mlec.backends.tvm.target import TargetInfo

CHUNK = 256
"""Rows of a task, about."""


@dataclass(frozen=True)
class MatmulSchedule:
    """How `matmul` goes over one product of the batch.

    Attributes:
        mr, nr: rows and columns of a tile of sums; the panel of the second operand is as wide.
        mc: rows of a task, in whole tiles.
    """

    mr: int
    nr: int
    mc: int

    @staticmethod
    def candidates(m: Dim, n: Dim, dtype: str, target: TargetInfo) -> Iterator[MatmulSchedule]:
        """For products of ``m x n``, which may be symbolic. Tiles that leave no register for the operands do not fit."""
        lanes = target.lanes(bits(accumulator_dtype(dtype)))
        vectors, across = 2, 8
        if isinstance(n, int):  # as many blocks as the widest tile needs, of equal width
            across = max(1, -(-n // lanes))
            vectors = -(-across // -(-across // tile_vectors(target)))
        mr = tile_rows(target, vectors)
        chunk = chunks(m, ceildiv(m, CHUNK))[0] if isinstance(m, int) and m > 0 else CHUNK
        default = MatmulSchedule(mr, vectors * lanes, ceildiv(chunk, mr) * mr)

        def fits(schedule: MatmulSchedule) -> bool:
            width = schedule.nr // lanes
            return min(8, across) <= schedule.mr * width < target.vector_registers - width

        return variations(
            default,
            fits,
            nr=[v * lanes for v in (1, 2, 3, 4, 6) if v <= across],
            mr=sorted((r for r in range(2, 13) if not isinstance(m, int) or r <= m), key=lambda r: abs(r - mr)),
            mc=[tiles * mr for tiles in around(default.mc // mr)],
        )


def matmul(
    a_lead: Sequence[Dim],
    b_lead: Sequence[Dim],
    m: Dim,
    n: Dim,
    k: Dim,
    dtype: str,
    target: TargetInfo,
    transpose_b: bool = False,
    epilogue: Epilogue = IDENTITY,
    name: str = "matmul",
    schedule: MatmulSchedule | None = None,
) -> tirx.PrimFunc:
    """``c[.., m, n] = epilogue(a[*a_lead, m, k] @ b[*b_lead, k, n])``, leading axes broadcast; any extent may be symbolic.

    With ``transpose_b`` the second operand is ``b[*b_lead, n, k]``. Parameters of the program: a, b, the epilogue's inputs, c.
    A block is as wide as a tile, by default two vectors where n is symbolic: fewer columns than that may be all there are.
    Without a schedule, the first candidate is taken.
    """
    lead = broadcast_lead(a_lead, b_lead)
    schedule = schedule or next(MatmulSchedule.candidates(m, n, dtype, target))
    with prim_func(name) as kernel:
        a = parameter("a", BufferSpec((*a_lead, m, k), dtype))
        b = parameter("b", BufferSpec((*b_lead, *((n, k) if transpose_b else (k, n))), dtype))
        c = Result.parameter("c", (*lead, m, n), dtype, epilogue)
        multiply((a, a_lead), (b, b_lead), (c, lead), Extents(m, n, k), dtype, target, transpose_b, schedule)
    return kernel.func


def pointwise(
    x_shape: Sequence[Dim],
    k: int,
    groups: int,
    dtype: str,
    target: TargetInfo,
    epilogue: Epilogue = IDENTITY,
    name: str = "pointwise",
    schedule: MatmulSchedule | None = None,
) -> tirx.PrimFunc:
    """``y[n, k, *space] = epilogue(sum over c of w[k, c / groups, 1 ...] x[n, c, *space])``; all but the channels may be symbolic.

    The image of one group is a matrix of channels times positions, and so is what becomes of it: neither is turned. Parameters of the
    program: x, w, the epilogue's inputs, y. The epilogue is given positions as columns of row 0: it must read rows and columns alike.
    """
    n, c, *space = x_shape
    extents = Extents(k // groups, product(space), c // groups)
    lead, w_lead = ((n, groups), (groups,)) if groups > 1 else ((n,), ())

    def apply(accumulator: Expr, where: tuple[Expr, ...], extra: tuple[Buffer, ...]) -> Expr:
        image, *group, channel, position = where
        channel = group[0] * extents.m + channel if group else channel
        return epilogue.apply(accumulator, (image, channel, *[0] * (len(space) - 1), position), extra)

    schedule = schedule or next(MatmulSchedule.candidates(extents.m, extents.n, dtype, target))
    with prim_func(name) as kernel:
        x = parameter("x", BufferSpec(x_shape, dtype))
        w = parameter("w", BufferSpec((k, extents.k, *[1] * len(space)), dtype))
        y = Result.parameter("y", (n, k, *space), dtype, replace(epilogue, apply=apply))
        multiply((w, w_lead), (x, lead), (y, lead), extents, dtype, target, False, schedule)
    return kernel.func


def multiply(
    a: tuple[Buffer, Sequence[Dim]],
    b: tuple[Buffer, Sequence[Dim]],
    c: tuple[Result, Sequence[Dim]],
    extents: Extents,
    dtype: str,
    target: TargetInfo,
    transpose_b: bool,
    schedule: MatmulSchedule,
) -> None:
    """The program of `matmul`, on operands that have been declared, each with the axes before its matrices."""
    m, n, k = extents.m, extents.n, extents.k
    (a_buffer, a_lead), (b_buffer, b_lead), (result, lead) = a, b, c
    acc = accumulator_dtype(dtype)
    # All matrices of a batch below each other: indices stay short, which TVM's simplifier is grateful for.
    b_shape = (product(b_lead) * (n if transpose_b else k), k if transpose_b else n)
    program = _Matmul(
        a=_Batch(flat_view(a_buffer, (product(a_lead) * m, k), dtype), a_lead),
        b=_Batch(flat_view(b_buffer, b_shape, dtype), b_lead),
        c=result.viewed((product(lead) * m, n)),
        lead=lead,
        extents=extents,
        transposed=transpose_b,
        schedule=schedule,
        acc=acc,
        lanes=target.lanes(bits(acc)),
    )
    rows = min(m, program.chunk) if isinstance(m, int) else tirx.min(m, program.chunk)
    work = multiply_adds(product((k, schedule.nr, rows)), dtype, target)
    parallel_if_large(product(program.tasks), work, program.task)


@dataclass(frozen=True)
class _Batch:
    """Matrices below each other in ``rows``, as many as the axes of ``lead`` say."""

    rows: Buffer
    lead: Sequence[Dim]

    def first_row(self, where: Sequence[Expr], lead: Sequence[Dim], height: Dim) -> Expr:
        """Of the matrix, so many rows high, that belongs to ``where`` along the leading axes of the result."""
        return flatten(operand_indices(where, lead, self.lead), self.lead) * height


@dataclass(frozen=True)
class _Block:
    """What a task computes: ``rows`` rows of one product of the batch, and one block of columns.

    Attributes:
        where, first, column: indices of the product along the leading axes; its first row and column.
        a_row, c_row: the first row among those of all products of a batch.
        panel: the block of the second operand, ``[k, nr]``, zeros beyond n.
        vectors: of a row of the panel that hold columns.
    """

    where: Sequence[Expr]
    first: Expr
    column: Expr
    rows: Expr
    a_row: Expr
    c_row: Expr
    panel: Buffer
    vectors: int


@dataclass(frozen=True)
class _Matmul:
    """The parts of the program, see `matmul`.

    Attributes:
        a, b: matrices of ``[m, k]`` and ``[k, n]``, which may be ``transposed``.
        c: ``[batch * m, n]``, of which ``lead`` are the leading axes.
        acc, lanes: dtype of the sums, and how many are a vector.
    """

    a: _Batch
    b: _Batch
    c: Result
    lead: Sequence[Dim]
    extents: Extents
    transposed: bool
    schedule: MatmulSchedule
    acc: str
    lanes: int

    @property
    def vectors(self) -> int:
        """Of a row of a tile."""
        return self.schedule.nr // self.lanes

    @property
    def chunk(self) -> int:
        """Rows of a task: whole tiles."""
        return max(1, self.schedule.mc // self.schedule.mr) * self.schedule.mr

    @property
    def tasks(self) -> tuple[Dim, ...]:
        return (*self.lead, ceildiv(self.extents.m, self.chunk), ceildiv(self.extents.n, self.schedule.nr))

    def task(self, index: Expr) -> None:
        """Some rows of one product of the batch, and one block of columns."""
        m, n, k = self.extents.m, self.extents.n, self.extents.k
        *where, chunk, j = unflatten(index, self.tasks)
        first = share(chunk * self.chunk)
        rows = share(tirx.min(self.chunk, m - first))
        a_row = share(self.a.first_row(where, self.lead, m) + first)
        c_row = share(flatten(where, self.lead) * m + first)
        b_row = share(self.b.first_row(where, self.lead, n if self.transposed else k))
        column = share(j * self.schedule.nr)
        panel = T.alloc_buffer((k, self.schedule.nr), self.acc)
        (self.fill_turned if self.transposed else self.fill)(panel, b_row, column)
        block = _Block(where, first, column, rows, a_row, c_row, panel, self.vectors)
        narrow = ceildiv(n % self.schedule.nr, self.lanes) if isinstance(n, int) else 0
        if not narrow or narrow == self.vectors:
            self.rows(block)
            return
        with T.If(column + self.schedule.nr <= n):
            with T.Then():
                self.rows(block)
            with T.Else():
                self.rows(replace(block, column=n // self.schedule.nr * self.schedule.nr, vectors=narrow))

    def rows(self, block: _Block) -> None:
        """All rows of a task."""
        rows, mr = block.rows, self.schedule.mr
        with T.serial(rows // mr) as i:
            self.tile(block, mr, i * mr)
        rest, size = share(rows // mr * mr), 1 << ((mr - 1).bit_length() - 1) if mr > 1 else 0
        while size:  # the last rows in tiles of 4, 2 and 1
            left = rows - rest
            with if_(left % (2 * size) >= size):
                self.tile(block, size, share(rest + left // (2 * size) * (2 * size)))
            size //= 2

    def tile(self, block: _Block, size: int, row: Expr) -> None:
        """``size`` rows times the panel: a step over k loads so many values and ``vectors`` vectors for their product of FMAs."""
        sums = RegisterTile(size, block.vectors, self.lanes, self.acc)
        unrolled(
            self.extents.k,
            UNROLL if size == self.schedule.mr else 1,
            lambda kk: sums.multiply_add(
                [cast_to(self.acc, self.a.rows[block.a_row + row + i, kk]) for i in range(size)],
                [load(block.panel, [kk, v * self.lanes], self.lanes) for v in range(block.vectors)],
            ),
        )
        for i in range(size):
            values = [sums.value(i, v) for v in range(block.vectors)]
            where = (*block.where, block.first + row + i)
            self.c.put((block.c_row + row + i,), where, block.column, self.extents.n, values)

    def fill(self, panel: Buffer, b_row: Expr, column: Expr) -> None:
        """Copies a block of ``b``, in vectors where all its columns are there."""
        (n, k), (nr, lanes) = (self.extents.n, self.extents.k), (self.schedule.nr, self.lanes)
        with T.If(column + nr <= n):
            with T.Then(), T.serial(k) as kk:
                for v in range(self.vectors):
                    line = load(self.b.rows, [b_row + kk, column + v * lanes], lanes)
                    store(panel, cast_to(self.acc, line), [kk, v * lanes])
            with T.Else(), T.serial(k) as kk, T.serial(nr) as j:
                self.copy(panel, kk, j, column, (b_row + kk, column + j))

    def fill_turned(self, panel: Buffer, b_row: Expr, column: Expr) -> None:
        """Copies a block of transposed ``b``: squares of vectors, turned in registers, where the block is whole; the rest one by one."""
        (n, k), (nr, lanes) = (self.extents.n, self.extents.k), (self.schedule.nr, self.lanes)
        turned = k // lanes * lanes
        with T.If(column + nr <= n):
            with T.Then(), T.serial(self.vectors) as v, T.serial(k // lanes) as kk:
                row = b_row + column + v * lanes
                lines = [
                    share(cast_to(self.acc, load(self.b.rows, [row + j, kk * lanes], lanes))) for j in range(lanes)
                ]
                for i, line in enumerate(turn(lines)):
                    store(panel, line, [kk * lanes + i, v * lanes])
            with T.Else(), T.serial(nr) as j, T.serial(turned) as kk:
                self.copy(panel, kk, j, column, (b_row + column + j, kk))
        with T.serial(nr) as j, T.serial(k - turned) as kk:
            self.copy(panel, turned + kk, j, column, (b_row + column + j, turned + kk))

    def copy(self, panel: Buffer, kk: Expr, j: Expr, column: Expr, at: tuple[Expr, Expr]) -> None:
        """One element of the panel, from ``at`` in ``b`` unless its column is beyond n."""
        value = tirx.if_then_else(column + j < self.extents.n, cast_to(self.acc, self.b.rows[at]), const(0, self.acc))
        T.buffer_store(panel, value, [kk, j])
