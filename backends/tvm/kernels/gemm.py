"""Matrix products: with packed constant weights, and of two matrices that are both computed.

Both come down to one tile: ``rows x columns`` sums in registers, K outside, so that one step loads a few weight vectors and
one scalar per row and does ``rows * vectors`` FMAs on them. Every element of the result is one chain of FMAs over k in
order: its value depends neither on the number of threads nor on the other rows of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product as cartesian

import numpy as np
import numpy.typing as npt

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import IDENTITY, Buffer, BufferSpec, Dim, Epilogue, Expr
from mlec.backends.tvm.kernels.gemm_bf16 import STRIP, TiledGemm, pairs_of_step
from mlec.backends.tvm.kernels.result import Result
from mlec.backends.tvm.kernels.schedule import around, variations
from mlec.backends.tvm.kernels.tile import (
    SERIAL_WORK,
    UNROLL,
    RegisterTile,
    accumulator_dtype,
    bits,
    ceildiv,
    flat_view,
    if_,
    multiply_adds,
    otherwise,
    parallel_if_large,
    parameter,
    product,
    tile_rows,
    tile_vectors,
    unflatten,
    unrolled,
)
from mlec.backends.tvm.kernels.transpose import turn
from mlec.backends.tvm.kernels.vector import LINE, bits_as, cast_to, const, const_like, load, prefetch, share, store
from mlec.backends.tvm.target import TargetInfo


def pack_gemm(weights: npt.NDArray[np.generic], block: int) -> npt.NDArray[np.generic]:
    """``[k, n]`` to ``[ceil(n / block), k, block]``, zeros in the columns that are not there."""
    k, n = weights.shape
    blocks = -(-n // block)
    padded = np.zeros((k, blocks * block), weights.dtype)
    padded[:, :n] = weights
    return np.ascontiguousarray(padded.reshape(k, blocks, block).transpose(1, 0, 2))


def column_block(n: int, dtype: str, target: TargetInfo) -> int:
    """Columns in a block of packed weights: two vectors, one where the matrix is no wider."""
    lanes = target.lanes(bits(accumulator_dtype(dtype)))
    return lanes if n <= lanes else 2 * lanes


@dataclass(frozen=True)
class GemmSchedule:
    """How `gemm` goes over rows and columns.

    Attributes:
        rows, vectors: of a tile, where there are several rows.
        stream: vectors of columns of a tile, where there is one row.
        row_tiles, column_tiles: of a task, where the product is shared out.
        depth: steps over k of a task at a time; the sums of all but the last wait in memory.
    """

    rows: int
    vectors: int
    stream: int
    row_tiles: int
    column_tiles: int
    depth: int

    @staticmethod
    def candidates(
        m: Dim, n: int, k: int, dtype: str, block: int, target: TargetInfo, narrow: str | None = None
    ) -> Iterator[GemmSchedule]:
        """For ``m`` rows, which may be symbolic. Tiles that leave no register for the operands do not fit."""
        columns = _Columns.of(n, dtype, block, target)
        item = bits(dtype) // 8
        weight = bits(accumulator_dtype(dtype) if narrow else dtype) // 8
        vectors = columns.width(tile_vectors(target))
        rows = tile_rows(target, vectors)
        groups = -(-columns.vectors // vectors)
        row, panel = max(1, k * item), max(1, k * vectors * columns.lanes * weight)
        depth, most, room, tasks = k, 64, target.l2_bytes // 4, 2 * target.cores
        if narrow or groups * panel > target.l2_bytes // 2:  # weights come anew for each chunk: more rows, fewer chunks
            most, room, tasks = 132, target.l2_bytes // 2, 4 * target.cores
        if panel > target.l2_bytes // 4:
            parts = -(-panel * 16 // target.l2_bytes)
            depth = -(-k // (parts * UNROLL)) * UNROLL
            row, panel = depth * item, depth * vectors * columns.lanes * weight
        row_tiles = max(4, min(most, room // row) // rows)
        column_tiles = max(1, min(target.l2_bytes // 2 // panel, -(-groups // tasks)))
        default = GemmSchedule(rows, vectors, columns.width(8), row_tiles, column_tiles, depth)
        one, several = isinstance(m, int) and m == 1, isinstance(m, int) and m > 1

        def fits(schedule: GemmSchedule) -> bool:
            sums = schedule.rows * schedule.vectors
            return min(8, columns.vectors) <= sums < target.vector_registers - schedule.vectors

        tall = [r for r in range(2, 13) if not isinstance(m, int) or r <= m]
        return variations(
            default,
            fits,
            vectors=() if one else [columns.width(most) for most in (1, 2, 3, 4, 6)],
            rows=() if one else sorted(tall, key=lambda r: abs(r - rows)),
            stream=() if several else [columns.width(most) for most in (4, 12, 16, 2)],
            row_tiles=() if one else around(row_tiles),
            column_tiles=() if one else around(column_tiles, most=groups),
            depth=() if one else [d // UNROLL * UNROLL for d in around(depth, 8 * UNROLL, k)],
        )


@dataclass(frozen=True)
class _Columns:
    """The columns of packed weights, in vectors.

    Attributes:
        lanes: of a vector.
        in_block: vectors of a block.
        vectors: that hold any of the columns.
    """

    lanes: int
    in_block: int
    vectors: int

    @staticmethod
    def of(n: int, dtype: str, block: int, target: TargetInfo) -> _Columns:
        lanes = min(target.lanes(bits(accumulator_dtype(dtype))), block)
        return _Columns(lanes, block // lanes, max(1, -(-n // lanes)))

    def width(self, most: int) -> int:
        """Vectors of a tile, at most so many: whole blocks of them, or a fraction of a block."""
        count = min(most, self.vectors)
        if count >= self.in_block:
            return count // self.in_block * self.in_block
        return (
            count if count == self.vectors else max(part for part in range(1, count + 1) if self.in_block % part == 0)
        )


def gemm(
    lead: Sequence[Dim],
    n: int,
    k: int,
    dtype: str,
    block: int,
    target: TargetInfo,
    epilogue: Epilogue = IDENTITY,
    name: str = "gemm",
    schedule: GemmSchedule | None = None,
    program_weights: int = 0,
    narrow: str | None = None,
) -> tirx.PrimFunc:
    """``c[*lead, n] = epilogue(a[*lead, k] @ w)`` for packed weights ``w[ceil(n / block), k, block]``.

    ``narrow`` is the dtype of weights in fewer bits, packed by `pack_narrow` of the op; the result is float32. They are widened in
    registers as they are read, which takes two instructions for a vector (of bfloat16, which lie in pairs, one) beside an FMA for each row.
    Where many rows are shared out, a task widens a panel once, for all its row tiles. Rows and weights of bfloat16 are multiplied as
    they are by a matrix unit, where there is one and 16 rows or more, see `TiledGemm`.

    Parameters of the program: a, w, the epilogue's inputs, c. Extents in ``lead`` may be symbolic; their product is the
    number of rows. ``block`` is a multiple of the vector length or shorter than one vector. A tile takes vectors of columns
    from one block or from neighbours; vectors that hold only padding are left out. Without a schedule, the first candidate is taken.
    ``program_weights`` are the bytes of all weights that the program reads in turn: these are in L2 at the next call if all of them fit.

    One branch chooses by the number of rows:

    * One row (a GEMV) streams the weights once, eight vectors in flight, enough sums to hide the latency of the FMA units:
      ``k * n`` weights from wherever they are, at that memory's speed.
    * Seven or eight rows, where the tile has six and there is more than one tile of columns, are one tile of fewer columns.
    * Up to some rows (little work, or fewer rows than a tile) one thread walks the columns; all row tiles use a panel of
      weights (``k * tile columns``) before the next one is read, the last rows in a tile of exactly their number. If even
      few rows are much work, the columns are spread over the threads.
    * Beyond that a task is a chunk of row tiles times a chunk of columns. The panel, 200 KB for k = 784, stays in L2: the
      6 x 4 tile needs 256 bytes of it in 12 cycles, a third of what L2 gives. The chunk's rows stay in L2 as well. The last
      tile starts early enough to be a whole (or half) tile, so this path needs two tile sizes only. Where L2 does not hold
      all weights, the tiles on a panel ask for the lines of the next one, which then comes from L3 beside the FMAs.
    * Where a panel is more than a quarter of L2 (k > 2048 in 2 MB), a task takes an eighth of that at a time: some 500 steps of
      all its tiles, whose sums wait in L2, before the next 500. Otherwise rows and panel would come from L3 for each tile.

    Measured with AVX-512 on one thread, as parts of the rate of one tile whose operands are in L1 (0.8 to 0.9 of the rate of FMAs on
    registers alone, whatever the tile; why is not known): squares of 256 to 1024 0.92 to 1.0, of 2048 0.88; 128 x 1536 x 384 with
    weights from L3 0.87; 256 x 1024 x 8192 0.89 (0.42 with all of k at once). Times of float32 weights as multiples of those of narrow
    ones: a row times 4096 x 4096 from L3 3.5 for int8, 1.9 for 16 bits (4 and 2 by the bytes), 1024 x 1024 4.7 and 3.4 to 4.3, where
    float32 just exceeds L2 and they do not; 128 or 512 rows 0.92 to 1.0.
    """
    m = product(lead)
    schedule = schedule or next(GemmSchedule.candidates(m, n, k, dtype, block, target, narrow))
    with prim_func(name) as kernel:
        a = parameter("a", BufferSpec((*lead, k), dtype))
        paired, kind = narrow == "bfloat16", narrow or dtype
        blocks, steps, held = -(-n // block), -(-k // 2) if paired else k, "uint32" if paired else kind
        w = parameter("w", BufferSpec((blocks, steps, block, *(2,) * paired), kind))
        c = Result.parameter("c", (*lead, n), accumulator_dtype(dtype) if narrow else dtype, epilogue)
        a, c = flat_view(a, (m, k), dtype), c.viewed((m, n))
        columns = _Columns.of(n, dtype, block, target)
        w, stream = (flat_view(w, shape, held) for shape in ((blocks, steps, block), (blocks * steps * block,)))
        in_turn = max(n * k * (bits(kind) // 8), program_weights)
        _Gemm(
            a,
            w,
            stream,
            c,
            lead,
            (m, n, k),
            columns,
            in_turn,
            schedule,
            dtype,
            kind,
            narrow is not None,
            paired,
            target,
        ).all_rows()
    return kernel.func


@dataclass(frozen=True)
class _Place:
    """A tile of the result.

    Attributes:
        rows, row: how many, and the first.
        number: among the tiles of its task on the same columns; None where it is the only one.
        first, count: vectors of columns: the first, which is a number or a multiple of ``count``, and how many.
        panel: which columns of its task these are.
        wide: its weights over the steps at hand, widened before, ``[steps, columns]``; None where it reads them itself.
    """

    rows: int
    row: Expr
    number: Expr
    first: Expr
    count: int
    panel: Expr
    wide: Buffer | None = None


@dataclass(frozen=True)
class _Gemm:
    """The parts of the program, see `gemm`.

    Attributes:
        a, w, c: ``[m, k]``, ``[blocks, k, block]`` (two k in one element where they are paired) and ``[m, n]``.
        stream: w as one axis.
        lead, extents: the leading axes as the epilogue knows them; m (their product), n, k.
        in_turn: bytes of weights that are read between two reads of the same one, in successive calls.
        dtype, kind: of the rows and of the weights.
        narrow: whether the weights have to be widened.
        paired: whether those of two successive k are one element of ``w``, of twice the bits.
    """

    a: Buffer
    w: Buffer
    stream: Buffer
    c: Result
    lead: Sequence[Dim]
    extents: tuple[Dim, int, int]
    columns: _Columns
    in_turn: int
    schedule: GemmSchedule
    dtype: str
    kind: str
    narrow: bool
    paired: bool
    target: TargetInfo

    @property
    def acc(self) -> str:
        return accumulator_dtype(self.dtype)

    @property
    def together(self) -> int:
        """Successive k in one element of the weights."""
        return 2 if self.paired else 1

    @property
    def bits(self) -> int:
        """Of an element of the weights."""
        return bits(self.kind) * self.together

    @property
    def groups(self) -> int:
        """Tiles across the columns."""
        return -(-self.columns.vectors // self.schedule.vectors)

    @property
    def tallest(self) -> int:
        """Rows of the tallest tile there is: where one tile has all columns, or few registers, none is taller than the schedule's."""
        one = self.columns.vectors == self.schedule.vectors
        return self.schedule.rows if one or self.target.vector_registers < 32 else 8

    @property
    def most_for_one(self) -> int:
        """Rows that one thread computes alone, or with the columns spread over the threads."""
        _, _, k = self.extents
        row = multiply_adds(self.columns.vectors * self.columns.lanes * k, self.dtype, self.target)
        few = 4 if self.narrow else 1  # tiles of rows for which a panel is not worth widening
        return max(SERIAL_WORK // (row + 1), few * self.schedule.rows - 1)

    def all_rows(self) -> None:
        """The whole program: a choice by the number of rows."""
        (m, n, _), rows, tallest, most = self.extents, self.schedule.rows, self.tallest, self.most_for_one
        tiled = self.tiled
        share_out = self.share_out if tiled is None else tiled.all_rows
        if tiled is not None:
            most = STRIP - 1
        if n == 0:
            T.evaluate(0)
        elif not isinstance(m, int):
            tall = [(m == r, partial(self.tall, r)) for r in range(rows + 1, tallest + 1)]
            otherwise([(m == 1, self.one_row), *tall, (m <= most, self.walk)], share_out)
        elif m == 1:
            self.one_row()
        elif rows < m <= tallest:
            self.tall(m)
        elif m <= most:
            self.walk()
        else:
            share_out()

    @property
    def tiled(self) -> TiledGemm | None:
        """The product by the processor's matrix unit, if that takes it."""
        (m, n, k), block = self.extents, self.columns.in_block * self.columns.lanes
        pairs = pairs_of_step(k, self.target) if self.paired and self.dtype == "bfloat16" and block % STRIP == 0 else 0
        if not pairs:
            return None
        rows = flat_view(self.a, (m, k), "uint16")
        return TiledGemm(rows, self.w, (m, n, k), block, pairs, self.finish, self.target)

    def one_row(self) -> None:
        """Weights in the order of memory, each read once for one FMA."""
        self.across(self.schedule.stream, 1, lambda first, count: self.tile(1, 0, first, count, 2))

    def tall(self, rows: int) -> None:
        """A few more rows than a tile in one narrower tile: weights that come from memory are read once."""
        width = self.columns.width((self.target.vector_registers - 4) // rows)
        self.across(width, rows, lambda first, count: self.tile(rows, 0, first, count))

    def walk(self) -> None:
        """Some rows, on one thread unless each is much work: every row tile on a panel of weights before the next panel."""
        m, mr = self.extents[0], self.schedule.rows

        def rows(first: Expr, count: int) -> None:
            if self.most_for_one >= mr and not (isinstance(m, int) and m < mr):
                with T.serial(m // mr) as i:
                    self.tile(mr, i * mr, first, count, UNROLL)
            for r in range(1, mr):
                if not isinstance(m, int):
                    with if_(m % mr == r):
                        self.tile(r, m - r, first, count)
                elif m % mr == r:
                    self.tile(r, m - r, first, count)

        self.across(self.schedule.vectors, max(2, mr // 2), rows)

    def share_out(self) -> None:
        """At least one tile of rows, in chunks of tiles and columns for all threads."""
        (m, _, k), (vectors, wide) = self.extents, (self.columns.vectors, self.schedule.vectors)
        tiles = ceildiv(m, self.schedule.rows)
        row_chunks, some = ceildiv(tiles, self.schedule.row_tiles), self.schedule.column_tiles
        group_chunks = -(-self.groups // some)
        with T.parallel(row_chunks * group_chunks) as index:
            chunk, first_group = index // group_chunks, index % group_chunks * some
            begin, end = tiles * chunk // row_chunks, tiles * (chunk + 1) // row_chunks

            held = min(k, self.schedule.depth), wide * self.columns.lanes
            widened = T.alloc_buffer(held, self.acc) if self.narrow else None

            def tiles_of_task(body: Callable[[_Place], None], steps: tuple[Expr, int] | None = None) -> None:
                """All tiles of a task; ``steps`` are the first and the number of those over k that ``body`` reads weights for."""

                def columns(first: Expr, count: int, panel: Expr) -> None:
                    if self.narrow and steps is not None:
                        self.widen(widened, first, count, *steps)
                    place = partial(_Place, first=first, count=count, panel=panel, wide=widened)
                    self.row_tiles(begin, end, lambda rows, row, i: body(place(rows, row, i)))

                with T.serial(tirx.max(0, tirx.min(some, vectors // wide - first_group))) as g:
                    columns((first_group + g) * wide, wide, g)
                if vectors % wide:
                    with if_(first_group + some >= self.groups):
                        columns(vectors // wide * wide, vectors % wide, vectors // wide - first_group)

            if self.schedule.depth >= k:
                tiles_of_task(lambda at: self.finish(at.row, at.first, self.sums(at)), (0, k))
            else:
                self.in_parts(tiles_of_task)

    def row_tiles(self, begin: Expr, end: Expr, body: Callable[[int, Expr, Expr], None]) -> None:
        """``body(rows, first row, number)`` for some row tiles. The last begins early enough to be whole, or half a tile if that
        holds its rows.
        """
        m, mr = self.extents[0], self.schedule.rows
        half = max(1, mr // 2)
        with T.serial(end - begin) as i:
            row = (begin + i) * mr
            with T.If(m - row > half):
                with T.Then():
                    body(mr, tirx.min(row, m - mr), i)
                with T.Else():
                    body(half, m - half, i)

    def widen(self, to: Buffer, first: Expr, count: int, begin: Expr, steps: int) -> None:
        """Some steps over k of ``count`` vectors of columns in the type of the sums."""

        def step(turn: Expr, parts: int = self.together) -> None:
            for v in range(count):
                vector = share(self.weights(first, v, count, begin // self.together + turn))
                for part in range(parts):
                    store(to, self.widened(vector, part), [turn * self.together + part, v * self.columns.lanes])

        unrolled(steps // self.together, 1, step)
        if steps % self.together:
            step(steps // self.together, 1)

    def in_parts(self, tiles_of_task: Callable[..., None]) -> None:
        """A few steps over k of all tiles before the next few. Every tile has a place of its own for its sums, as tiles overlap."""
        (_, _, k), depth, lanes = self.extents, self.schedule.depth, self.columns.lanes
        tile = (self.schedule.rows, self.schedule.vectors * lanes)
        held = T.alloc_buffer((self.schedule.column_tiles, self.schedule.row_tiles, *tile), self.acc)

        def where(at: _Place, i: int, v: int) -> list[Expr]:
            return [at.panel, at.number, i, v * lanes]

        def clear(at: _Place) -> None:
            for i, v in cartesian(range(at.rows), range(at.count)):
                store(held, const(0, self.acc, lanes), where(at, i, v))

        def add(at: _Place, first_step: Expr, steps: int) -> None:
            sums = RegisterTile(at.rows, at.count, lanes, self.acc)
            for i, v in cartesian(range(at.rows), range(at.count)):
                sums.cells[i][v].set(load(held, where(at, i, v), lanes))
            self.multiply_add(sums, at, first_step, steps)
            for i, v in cartesian(range(at.rows), range(at.count)):
                store(held, sums.value(i, v), where(at, i, v))

        def finish(at: _Place) -> None:
            self.finish(
                at.row,
                at.first,
                [[load(held, where(at, i, v), lanes) for v in range(at.count)] for i in range(at.rows)],
            )

        tiles_of_task(clear)
        with T.serial(k // depth) as part:
            tiles_of_task(lambda at: add(at, part * depth, depth), (part * depth, depth))
        if k % depth:
            tiles_of_task(lambda at: add(at, k // depth * depth, k % depth), (k // depth * depth, k % depth))
        tiles_of_task(finish)

    def across(self, count: int, rows: int, body: Callable[[Expr, int], None]) -> None:
        """``body(first vector, vectors)`` for all columns, ``count`` vectors at a time, for about so many rows.

        The work of a step is that of its FMAs or of reading its weights, whichever is more: a byte takes 10 ps from L2, 30 ps from
        behind it, where they come from if more than L2 holds are read in turn.
        """
        (_, _, k), lanes, vectors = self.extents, self.columns.lanes, self.columns.vectors
        per_byte = 1 if self.in_turn <= self.target.l2_bytes else 3
        weights = k * count * lanes
        steps = rows + 1 if self.narrow else rows  # widening takes about as long as a row
        work = max(multiply_adds(steps * weights, self.dtype, self.target), per_byte * weights * (bits(self.kind) // 8))
        parallel_if_large(vectors // count, work, lambda g: body(g * count, count))
        if vectors % count:
            body(vectors // count * count, vectors % count)

    def tile(self, rows: int, row: Expr, first: Expr, count: int, unroll: int = 1) -> None:
        """``rows`` rows times ``count`` vectors of columns."""
        self.finish(row, first, self.sums(_Place(rows, row, None, first, count, 0), unroll))

    def sums(self, at: _Place, unroll: int | None = None) -> list[list[Expr]]:
        """The sums of a tile over all of k, one row after the other."""
        sums = RegisterTile(at.rows, at.count, self.columns.lanes, self.acc)
        self.multiply_add(sums, at, 0, self.extents[2], unroll)
        return [[cell.value for cell in row] for row in sums.cells]

    def multiply_add(self, sums: RegisterTile, at: _Place, begin: Expr, steps: int, unroll: int | None = None) -> None:
        """Some steps over k: each loads ``rows`` values and ``count`` vectors for their product of FMAs. ``begin`` is even."""
        together = self.together if at.wide is None else 1

        def step(turn: Expr, parts: int = together) -> None:
            if at.wide is None:
                vectors = [
                    share(self.weights(at.first, v, at.count, begin // together + turn)) for v in range(at.count)
                ]
            else:
                lanes = self.columns.lanes
                vectors = [load(at.wide, [turn, v * lanes], lanes) for v in range(at.count)]
            for part in range(parts):
                values = [cast_to(self.acc, self.a[at.row + i, begin + turn * together + part]) for i in range(at.rows)]
                sums.multiply_add(
                    values, [self.widened(vector, part) for vector in vectors] if at.wide is None else vectors
                )

        times = unroll or (UNROLL if at.rows == self.schedule.rows else 1)
        fetch = at.number is not None and times == UNROLL and self.fetches_ahead
        each_turn = partial(self.fetch_ahead, at, begin, steps) if fetch else None
        unrolled(steps // together, max(1, times // together), step, each_turn)
        if steps % together:
            step(steps // together, 1)

    def finish(self, row: Expr, first: Expr, values: Sequence[Sequence[Expr]]) -> None:
        """Stores the sums of a tile."""
        n, lanes, count = self.extents[1], self.columns.lanes, len(values[0])
        whole = not isinstance(first, int) and self.columns.vectors // count * count * lanes <= n
        for i, line in enumerate(values):
            where = unflatten(row + i, self.lead) if self.c.epilogue.inputs else (row + i,)
            self.c.put((row + i,), where, first * lanes, count * lanes if whole else n, line)

    @property
    def fetches_ahead(self) -> bool:
        """Whether weights have left L2 when they are read again, and the panels of tiles are whole blocks of whole lines."""
        wide, (in_block, lanes) = self.schedule.vectors, (self.columns.in_block, self.columns.lanes)
        lines = wide % in_block == 0 and in_block * lanes * self.bits // 8 % LINE == 0
        return lines and self.in_turn > self.target.l2_bytes // 2

    def fetch_ahead(self, at: _Place, begin: Expr, steps: int, turn: Expr) -> None:
        """Asks for some lines of the next panel of weights, so that it is in L2 when it is needed.

        The tiles of a chunk of rows, eight or more, share its lines: each asks for an eighth of what it reads itself.
        """
        together, block = self.together, self.columns.in_block * self.columns.lanes
        k, steps, each = ceildiv(self.extents[2], together), steps // together, UNROLL // together
        line = LINE * 8 // self.bits
        lines = ceildiv(each * block, line * 8)
        place = tirx.min((at.number * (steps // each) + turn) * lines, max(0, steps * block // line - lines)) * line
        for b in range(at.count // self.columns.in_block):
            start = ((at.first + at.count) // self.columns.in_block + b) * (k * block) + begin // together * block
            for i in range(lines):
                prefetch(self.stream, start + place + i * line)

    def weights(self, first: Expr, v: int, count: int, kk: Expr) -> Expr:
        """Vector ``first + v`` of a row of weights as it lies in memory; ``first`` is a number or a multiple of ``count``."""
        in_block, lanes = self.columns.in_block, self.columns.lanes
        if isinstance(first, int):
            at, offset = divmod(first + v, in_block)
        elif count % in_block == 0:
            at, offset = first // in_block + v // in_block, v % in_block
        else:
            at, offset = first // in_block, first % in_block + v
        return load(self.w, [at, kk, offset * lanes], lanes)

    def widened(self, vector: Expr, part: int) -> Expr:
        """A vector of weights in the type of the sums; of pairs the first or the second. A bfloat16 is the upper half of a float32."""
        if not self.paired:
            return cast_to(self.acc, vector)
        half = const_like(16, vector) if part == 0 else const_like(0xFFFF0000, vector)
        return bits_as("float32", vector << half if part == 0 else vector & half)


@dataclass(frozen=True)
class MatmulSchedule:
    """How `matmul` goes over one product of the batch.

    Attributes:
        rows, vectors: of a tile; the panel of the second operand is as wide.
        row_tiles: of a task.
    """

    rows: int
    vectors: int
    row_tiles: int

    @staticmethod
    def candidates(m: Dim, n: Dim, dtype: str, target: TargetInfo) -> Iterator[MatmulSchedule]:
        """For products of ``m x n``, which may be symbolic. Tiles that leave no register for the operands do not fit."""
        vectors, across = 2, 8
        if isinstance(n, int):  # as many blocks as the widest tile needs, of equal width
            across = max(1, -(-n // target.lanes(bits(accumulator_dtype(dtype)))))
            vectors = -(-across // -(-across // tile_vectors(target)))
        rows = tile_rows(target, vectors)
        default = MatmulSchedule(rows, vectors, 256 // rows)

        def fits(schedule: MatmulSchedule) -> bool:
            sums = schedule.rows * schedule.vectors
            return min(8, across) <= sums < target.vector_registers - schedule.vectors

        return variations(
            default,
            fits,
            vectors=[v for v in (1, 2, 3, 4, 6) if v <= across],
            rows=sorted((r for r in range(2, 13) if not isinstance(m, int) or r <= m), key=lambda r: abs(r - rows)),
            row_tiles=around(default.row_tiles),
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

    A task is one product of the batch, some tiles of its rows (256 rows by default) and one block of columns: it copies its
    block of ``b`` into a panel ``[k, block]`` (zeros beyond n), which makes strides, the transposition and the edge somebody
    else's problem, and walks row tiles over it as `gemm` does. The copy costs 1/128 of the products on a full chunk of rows.
    A block is as wide as a tile, by default two vectors where n is symbolic: fewer columns than that may be all there are.
    Without a schedule, the first candidate is taken.
    """
    lead = broadcast_lead(a_lead, b_lead)
    schedule = schedule or next(MatmulSchedule.candidates(m, n, dtype, target))
    with prim_func(name) as kernel:
        a = parameter("a", BufferSpec((*a_lead, m, k), dtype))
        b = parameter("b", BufferSpec((*b_lead, *((n, k) if transpose_b else (k, n))), dtype))
        c = Result.parameter("c", (*lead, m, n), dtype, epilogue)
        # All matrices of a batch below each other: indices stay short, which TVM's simplifier is grateful for.
        a = flat_view(a, (product(a_lead) * m, k), dtype)
        b = flat_view(b, (product(b_lead) * (n if transpose_b else k), k if transpose_b else n), dtype)
        c = c.viewed((product(lead) * m, n))
        acc = accumulator_dtype(dtype)
        lanes = target.lanes(bits(acc))
        program = _Matmul(a, b, c, (lead, a_lead, b_lead), (m, n, k), transpose_b, schedule, acc, lanes)
        rows = min(m, program.row_chunk) if isinstance(m, int) else tirx.min(m, program.row_chunk)
        work = multiply_adds(product((k, program.block, rows)), dtype, target)
        parallel_if_large(product(program.tasks), work, program.task)
    return kernel.func


@dataclass(frozen=True)
class _Block:
    """What a task computes: ``rows`` rows of one product of the batch, and one block of columns.

    Attributes:
        where, first, column: indices of the product along the leading axes; its first row and column.
        a_row, c_row: the first row among those of all products of a batch.
        panel: the block of the second operand, ``[k, block]``, zeros beyond n.
    """

    where: Sequence[Expr]
    first: Expr
    column: Expr
    rows: Expr
    a_row: Expr
    c_row: Expr
    panel: Buffer


@dataclass(frozen=True)
class _Matmul:
    """The parts of the program, see `matmul`.

    Attributes:
        a, b, c: ``[batch * m, k]``, ``[batch * k, n]`` (transposed ``[batch * n, k]``) and ``[batch * m, n]``.
        leads: the leading axes of c, a and b.
        extents: m, n, k.
        acc, lanes: dtype of the sums, and how many are a vector.
    """

    a: Buffer
    b: Buffer
    c: Result
    leads: tuple[Sequence[Dim], Sequence[Dim], Sequence[Dim]]
    extents: tuple[Dim, Dim, Dim]
    transposed: bool
    schedule: MatmulSchedule
    acc: str
    lanes: int

    @property
    def block(self) -> int:
        """Columns of a panel."""
        return self.lanes * self.schedule.vectors

    @property
    def row_chunk(self) -> int:
        """Rows of a task."""
        return self.schedule.row_tiles * self.schedule.rows

    @property
    def tasks(self) -> tuple[Dim, ...]:
        m, n, _ = self.extents
        return (*self.leads[0], ceildiv(m, self.row_chunk), ceildiv(n, self.block))

    def task(self, index: Expr) -> None:
        """Some rows of one product of the batch, and one block of columns."""
        (lead, a_lead, b_lead), (m, n, k), mr = self.leads, self.extents, self.schedule.rows
        *where, chunk, j = unflatten(index, self.tasks)
        first = share(chunk * self.row_chunk)
        rows = share(tirx.min(self.row_chunk, m - first))
        a_row = share(flatten(operand_indices(where, lead, a_lead), a_lead) * m + first)
        c_row = share(flatten(where, lead) * m + first)
        b_row = share(flatten(operand_indices(where, lead, b_lead), b_lead) * (n if self.transposed else k))
        column = share(j * self.block)
        panel = T.alloc_buffer((k, self.block), self.acc)
        (self.fill_turned if self.transposed else self.fill)(panel, b_row, column)
        block = _Block(where, first, column, rows, a_row, c_row, panel)
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
        vectors, k = self.schedule.vectors, self.extents[2]
        sums = RegisterTile(size, vectors, self.lanes, self.acc)
        unrolled(
            k,
            UNROLL if size == self.schedule.rows else 1,
            lambda kk: sums.multiply_add(
                [cast_to(self.acc, self.a[block.a_row + row + i, kk]) for i in range(size)],
                [load(block.panel, [kk, v * self.lanes], self.lanes) for v in range(vectors)],
            ),
        )
        for i in range(size):
            values = [sums.value(i, v) for v in range(vectors)]
            where = (*block.where, block.first + row + i)
            self.c.put((block.c_row + row + i,), where, block.column, self.extents[1], values)

    def fill(self, panel: Buffer, b_row: Expr, column: Expr) -> None:
        """Copies a block of ``b``, in vectors where all its columns are there."""
        (_, n, k), lanes = self.extents, self.lanes
        with T.If(column + self.block <= n):
            with T.Then(), T.serial(k) as kk:
                for v in range(self.schedule.vectors):
                    line = load(self.b, [b_row + kk, column + v * lanes], lanes)
                    store(panel, cast_to(self.acc, line), [kk, v * lanes])
            with T.Else(), T.serial(k) as kk, T.serial(self.block) as j:
                self.copy(panel, kk, j, column, (b_row + kk, column + j))

    def fill_turned(self, panel: Buffer, b_row: Expr, column: Expr) -> None:
        """Copies a block of transposed ``b``: squares of vectors, turned in registers, where the block is whole; the rest one by one."""
        (_, n, k), lanes = self.extents, self.lanes
        turned = k // lanes * lanes
        with T.If(column + self.block <= n):
            with T.Then(), T.serial(self.schedule.vectors) as v, T.serial(k // lanes) as kk:
                row = b_row + column + v * lanes
                lines = [share(cast_to(self.acc, load(self.b, [row + j, kk * lanes], lanes))) for j in range(lanes)]
                for i, line in enumerate(turn(lines)):
                    store(panel, line, [kk * lanes + i, v * lanes])
            with T.Else(), T.serial(self.block) as j, T.serial(turned) as kk:
                self.copy(panel, kk, j, column, (b_row + column + j, kk))
        with T.serial(self.block) as j, T.serial(k - turned) as kk:
            self.copy(panel, turned + kk, j, column, (b_row + column + j, turned + kk))

    def copy(self, panel: Buffer, kk: Expr, j: Expr, column: Expr, at: tuple[Expr, Expr]) -> None:
        """One element of the panel, from ``at`` in ``b`` unless its column is beyond n."""
        value = tirx.if_then_else(column + j < self.extents[1], cast_to(self.acc, self.b[at]), const(0, self.acc))
        T.buffer_store(panel, value, [kk, j])


def flatten(indices: Sequence[Expr], shape: Sequence[Dim]) -> Expr:
    """Row-major position of the element with these indices."""
    position: Expr = 0
    for index, extent in zip(indices, shape, strict=True):
        position = position * extent + index
    return position


def broadcast_lead(a: Sequence[Dim], b: Sequence[Dim]) -> tuple[Dim, ...]:
    """Leading axes of a product: numpy's rule; a symbolic extent equals what it stands beside unless that is 1."""
    rank = max(len(a), len(b))
    pairs = zip([1] * (rank - len(a)) + list(a), [1] * (rank - len(b)) + list(b), strict=True)
    return tuple(y if isinstance(x, int) and x == 1 else x for x, y in pairs)


def operand_indices(where: Sequence[Expr], lead: Sequence[Dim], own: Sequence[Dim]) -> tuple[Expr, ...]:
    """Indices into an operand whose leading axes broadcast to ``lead``."""
    own_where = where[len(lead) - len(own) :] if own else ()
    return tuple(0 if isinstance(extent, int) and extent == 1 else i for i, extent in zip(own_where, own, strict=True))
