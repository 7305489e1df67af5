"""Products of computed rows and constant weights, which are packed beforehand. `matmul` has those of two computed matrices.

The tile is ``mr x nr`` sums in registers, k outside, so that one step loads a few weight vectors and one scalar per row and does
``mr * nr / lanes`` FMAs on them. Every element of the result is one chain of FMAs over k in order: its value depends neither on the
number of threads nor on the other rows of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product as cartesian

import numpy as np
import numpy.typing as npt

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import IDENTITY, Buffer, BufferSpec, Dim, Epilogue, Expr
from mlec.backends.tvm.kernels.gemm_bf16 import TiledGemm, least_rows, pairs_of_step
from mlec.backends.tvm.kernels.int8 import STRIP, Dots
from mlec.backends.tvm.kernels.operands import Extents
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


def unit_pairs(dtype: str, narrow: str | None, k: int, block: int, target: TargetInfo) -> int:
    """Pairs of successive k that one instruction of a matrix unit takes of such rows and weights; 0 where vectors multiply them."""
    return pairs_of_step(k, target) if _both_bf16(dtype, narrow, block) else 0


def vector_dots(dtype: str, narrow: str | None, block: int, target: TargetInfo) -> Dots | None:
    """How vectors multiply such rows and weights as they are; None where these are widened."""
    return Dots.of_bf16(target) if _both_bf16(dtype, narrow, block) else None


def _both_bf16(dtype: str, narrow: str | None, block: int) -> bool:
    return dtype == narrow == "bfloat16" and block % STRIP == 0


@dataclass(frozen=True)
class GemmSchedule:
    """How `gemm` goes over rows and columns. The letters are those of BLIS; all are counted in elements.

    Attributes:
        mr, nr: rows and columns of a tile of sums, where there are several rows.
        stream: columns of a tile, where there is one row.
        mc, nc: rows and columns of a task, where the product is shared out: whole tiles.
        kc: steps over k of a task at a time; the sums of all but the last wait in memory.
    """

    mr: int
    nr: int
    stream: int
    mc: int
    nc: int
    kc: int

    @staticmethod
    def candidates(
        m: Dim, n: int, k: int, dtype: str, block: int, target: TargetInfo, narrow: str | None = None
    ) -> Iterator[GemmSchedule]:
        """For ``m`` rows, which may be symbolic. Tiles that leave no register for the operands do not fit."""
        columns = _Columns.of(n, dtype, block, target)
        lanes, item = columns.lanes, bits(dtype) // 8
        widened = narrow is not None and vector_dots(dtype, narrow, block, target) is None
        weight = bits(accumulator_dtype(dtype) if widened else dtype) // 8
        vectors = columns.width(tile_vectors(target))
        mr, nr = tile_rows(target, vectors), vectors * lanes
        groups = -(-columns.vectors // vectors)
        row, panel = max(1, k * item), max(1, k * nr * weight)
        kc, most, room, tasks = k, 64, target.l2_bytes // 4, 2 * target.cores
        anew = widened or groups * panel > target.l2_bytes // 2
        if anew:  # weights come anew for each chunk: more rows, fewer chunks
            most, room, tasks = 132, target.l2_bytes // 2, 4 * target.cores
        if panel > target.l2_bytes // 4:
            parts = -(-panel * 16 // target.l2_bytes)
            kc = -(-k // (parts * UNROLL)) * UNROLL
            row, panel = kc * item, kc * nr * weight
        tall = max(4, min(most, room // row) // mr)
        wide = max(1, min(target.l2_bytes // 2 // panel, -(-groups // tasks)))
        default = GemmSchedule(mr, nr, columns.width(8) * lanes, tall * mr, wide * nr, kc)
        one, several = isinstance(m, int) and m == 1, isinstance(m, int) and m > 1

        def fits(schedule: GemmSchedule) -> bool:
            width = schedule.nr // lanes
            return min(8, columns.vectors) <= schedule.mr * width < target.vector_registers - width

        heights = [r for r in range(2, 13) if not isinstance(m, int) or r <= m]
        return variations(
            default,
            fits,
            nr=() if one else [columns.width(most) * lanes for most in (1, 2, 3, 4, 6)],
            mr=() if one else sorted(heights, key=lambda r: abs(r - mr)),
            stream=() if several else [columns.width(most) * lanes for most in (4, 12, 16, 2)],
            mc=() if one else [tiles * mr for tiles in around(tall)],
            nc=() if one else [tiles * nr for tiles in around(wide, most=groups)],
            kc=() if one else [steps // UNROLL * UNROLL for steps in around(kc, 8 * UNROLL, k)],
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
    they are by a matrix unit, where there is one and there are rows enough, see `TiledGemm`, or by vectors, two products for each sum
    in one instruction, where these do more of them than of float32, see `Dots.of_bf16`: all below then holds with half as many steps.

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

    Measured with AVX-512 on one thread, as parts of the rate of one tile whose operands are in L1: squares of 256 to 1024 0.92 to 1.0,
    of 2048 0.88; 128 x 1536 x 384 with weights from L3 0.87; 256 x 1024 x 8192 0.89 (0.42 with all of k at once). That rate is 0.8 to 0.9
    of the rate of FMAs on registers alone, whatever the tile, as the processor runs at a lower clock then: rates of hand-written loops move
    in steps of 6.4 GFLOP/s, 100 MHz times 64 FLOP, and reach 198 to 210 so, where FMAs on registers reach 217 to 230 in the same process.
    Times of float32 weights as multiples of those of narrow ones: a row times 4096 x 4096 from L3 3.5 for int8, 1.9 for 16 bits (4 and 2
    by the bytes), 1024 x 1024 4.7 and 3.4 to 4.3, where float32 just exceeds L2 and they do not; 128 or 512 rows 0.92 to 1.0. Of bf16
    by bf16 in vectors, on Zen 4, where 512 x 768 x 768 is predicted to take 2.6 ms and takes 2.7: 2.3 for a row times 512 x 512 from L2,
    2.2 for two rows, 2.0 to 2.15 for 4 to 256, 1.5 for 4 x 64 x 64.
    """
    m = product(lead)
    schedule = schedule or next(GemmSchedule.candidates(m, n, k, dtype, block, target, narrow))
    with prim_func(name) as kernel:
        a = parameter("a", BufferSpec((*lead, k), dtype))
        paired, kind = narrow == "bfloat16", narrow or dtype
        blocks, steps, held = -(-n // block), -(-k // 2) if paired else k, "uint32" if paired else kind
        w = parameter("w", BufferSpec((blocks, steps, block, *(2,) * paired), kind))
        c = Result.parameter("c", (*lead, n), accumulator_dtype(dtype) if narrow else dtype, epilogue)
        dots = vector_dots(dtype, narrow, block, target)
        rows, c = _Rows(flat_view(a, (m, k), dtype if dots is None else "uint16"), lead, dtype), c.viewed((m, n))
        w, stream = (flat_view(w, shape, held) for shape in ((blocks, steps, block), (blocks * steps * block,)))
        weights = _Weights(
            packed=w,
            stream=stream,
            columns=_Columns.of(n, dtype, block, target),
            kind=kind,
            narrow=narrow is not None and dots is None,
            paired=paired,
            dots=dots,
            acc=rows.acc,
            in_turn=max(n * k * (bits(kind) // 8), program_weights),
        )
        with nullcontext() if dots is None else dots.in_program():
            _Gemm(rows, weights, c, Extents(m, n, k), schedule, target).all_rows()
    return kernel.func


@dataclass(frozen=True)
class _Rows:
    """The first operand: ``[m, k]`` (bits, where pairs are multiplied), the leading axes as the epilogue knows them, its dtype."""

    buffer: Buffer
    lead: Sequence[Dim]
    dtype: str

    @property
    def acc(self) -> str:
        """Dtype of the sums."""
        return accumulator_dtype(self.dtype)

    def pair(self, row: Expr, k: Expr, count: int) -> Expr:
        """Two numbers from ``k`` on in one of 32 bits; of a single one, which is the lower half, the other is zero."""
        if count == 1:
            return cast_to("int32", self.buffer[row, k])
        return tirx.reinterpret("int32", load(self.buffer, [row, k], 2))


@dataclass(frozen=True)
class _Weights:
    """The second operand.

    Attributes:
        packed: ``[blocks, k, block]``; two successive k in one element of twice the bits where they are ``paired``.
        stream: the same as one axis.
        kind: dtype of a weight.
        narrow: whether they have to be widened to ``acc``, the dtype of the sums.
        dots: how pairs are multiplied by those of rows as they are; None: by FMAs.
        in_turn: bytes of weights that are read between two reads of the same one, in successive calls.
    """

    packed: Buffer
    stream: Buffer
    columns: _Columns
    kind: str
    narrow: bool
    paired: bool
    dots: Dots | None
    acc: str
    in_turn: int

    @property
    def together(self) -> int:
        """Successive k in one element."""
        return 2 if self.paired else 1

    @property
    def bits(self) -> int:
        """Of an element."""
        return bits(self.kind) * self.together

    @property
    def block(self) -> int:
        """Columns of a block."""
        return self.columns.in_block * self.columns.lanes

    def vector(self, first: Expr, v: int, count: int, kk: Expr) -> Expr:
        """Vector ``first + v`` of a row of weights as it lies in memory; ``first`` is a number or a multiple of ``count``."""
        in_block, lanes = self.columns.in_block, self.columns.lanes
        if isinstance(first, int):
            at, offset = divmod(first + v, in_block)
        elif count % in_block == 0:
            at, offset = first // in_block + v // in_block, v % in_block
        else:
            at, offset = first // in_block, first % in_block + v
        return load(self.packed, [at, kk, offset * lanes], lanes)

    def widened(self, vector: Expr, part: int) -> Expr:
        """A vector of weights in the type of the sums; of pairs the first or the second. A bfloat16 is the upper half of a float32."""
        if not self.paired:
            return cast_to(self.acc, vector)
        half = const_like(16, vector) if part == 0 else const_like(0xFFFF0000, vector)
        return bits_as("float32", vector << half if part == 0 else vector & half)


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
    """The parts of the program, see `gemm`; ``c`` is ``[m, n]``."""

    a: _Rows
    w: _Weights
    c: Result
    extents: Extents
    schedule: GemmSchedule
    target: TargetInfo

    @property
    def vectors(self) -> int:
        """Of a row of a tile."""
        return self.schedule.nr // self.w.columns.lanes

    @property
    def row_tiles(self) -> int:
        """Of a task, at most."""
        return max(1, self.schedule.mc // self.schedule.mr)

    @property
    def column_tiles(self) -> int:
        """Of a task, at most."""
        return max(1, self.schedule.nc // self.schedule.nr)

    @property
    def groups(self) -> int:
        """Tiles across the columns."""
        return -(-self.w.columns.vectors // self.vectors)

    @property
    def tallest(self) -> int:
        """Rows of the tallest tile there is: where one tile has all columns, or few registers, none is taller than the schedule's."""
        one = self.w.columns.vectors == self.vectors
        return self.schedule.mr if one or self.target.vector_registers < 32 else 8

    @property
    def most_for_one(self) -> int:
        """Rows that one thread computes alone, or with the columns spread over the threads."""
        columns = self.w.columns
        row = self.work(columns.vectors * columns.lanes * self.extents.k)
        few = 4 if self.w.narrow else 1  # tiles of rows for which a panel is not worth widening
        return max(SERIAL_WORK // (row + 1), few * self.schedule.mr - 1)

    def all_rows(self) -> None:
        """The whole program: a choice by the number of rows."""
        m, mr, tallest, most = self.extents.m, self.schedule.mr, self.tallest, self.most_for_one
        tiled = self.tiled
        share_out = self.share_out if tiled is None else tiled.all_rows
        if tiled is not None:
            most = least_rows(self.extents.n, self.extents.k) - 1
            tallest = min(tallest, most)
        if self.extents.n == 0:
            T.evaluate(0)
        elif not isinstance(m, int):
            tall = [(m == r, partial(self.tall, r)) for r in range(mr + 1, tallest + 1)]
            walk = [(m <= most, partial(self.walk, most))] if most > 1 else []
            otherwise([(m == 1, self.one_row), *tall, *walk], share_out)
        elif m == 1:
            self.one_row()
        elif mr < m <= tallest:
            self.tall(m)
        elif m <= most:
            self.walk(most)
        else:
            share_out()

    @property
    def tiled(self) -> TiledGemm | None:
        """The product by the processor's matrix unit, if that takes it."""
        m, n, k, block = self.extents.m, self.extents.n, self.extents.k, self.w.block
        pairs = unit_pairs(self.a.dtype, self.w.kind if self.w.narrow else None, k, block, self.target)
        if not pairs:
            return None
        rows = flat_view(self.a.buffer, (m, k), "uint16")
        return TiledGemm(rows, self.w.packed, (m, n, k), block, pairs, self.reading(n * k), self.finish, self.target)

    def one_row(self) -> None:
        """Weights in the order of memory, each read once for one FMA."""
        stream = self.schedule.stream // self.w.columns.lanes
        self.across(stream, 1, lambda first, count: self.tile(1, 0, first, count, 2))

    def tall(self, rows: int) -> None:
        """A few more rows than a tile in one narrower tile: weights that come from memory are read once."""
        operands = 8 if self.w.paired and self.w.narrow else 4
        width = self.w.columns.width((self.target.vector_registers - operands) // rows)
        self.across(width, rows, lambda first, count: self.tile(rows, 0, first, count))

    def walk(self, most: int) -> None:
        """At most ``most`` rows, on one thread unless each is much work: every row tile on a panel of weights before the next panel."""
        m, mr = self.extents.m, self.schedule.mr

        def rows(first: Expr, count: int) -> None:
            if most >= mr and not (isinstance(m, int) and m < mr):
                with T.serial(m // mr) as i:
                    self.tile(mr, i * mr, first, count, UNROLL)
            for r in range(1, min(mr, most + 1)):
                if not isinstance(m, int):
                    with if_(m % mr == r):
                        self.tile(r, m - r, first, count)
                elif m % mr == r:
                    self.tile(r, m - r, first, count)

        self.across(self.vectors, max(2, mr // 2), rows)

    def share_out(self) -> None:
        """At least one tile of rows, in chunks of tiles and columns for all threads."""
        m, k, vectors, wide = self.extents.m, self.extents.k, self.w.columns.vectors, self.vectors
        tiles = ceildiv(m, self.schedule.mr)
        row_chunks, some = ceildiv(tiles, self.row_tiles), self.column_tiles
        group_chunks = -(-self.groups // some)
        with T.parallel(row_chunks * group_chunks) as index:
            chunk, first_group = index // group_chunks, index % group_chunks * some
            begin, end = tiles * chunk // row_chunks, tiles * (chunk + 1) // row_chunks

            held = min(k, self.schedule.kc), self.schedule.nr
            widened = T.alloc_buffer(held, self.a.acc) if self.w.narrow else None

            def tiles_of_task(body: Callable[[_Place], None], steps: tuple[Expr, int] | None = None) -> None:
                """All tiles of a task; ``steps`` are the first and the number of those over k that ``body`` reads weights for."""

                def columns(first: Expr, count: int, panel: Expr) -> None:
                    if self.w.narrow and steps is not None:
                        self.widen(widened, first, count, *steps)
                    place = partial(_Place, first=first, count=count, panel=panel, wide=widened)
                    self.tiles_of_rows(begin, end, lambda rows, row, i: body(place(rows, row, i)))

                with T.serial(tirx.max(0, tirx.min(some, vectors // wide - first_group))) as g:
                    columns((first_group + g) * wide, wide, g)
                if vectors % wide:
                    with if_(first_group + some >= self.groups):
                        columns(vectors // wide * wide, vectors % wide, vectors // wide - first_group)

            if self.schedule.kc >= k:
                tiles_of_task(lambda at: self.finish(at.row, at.first, self.sums(at)), (0, k))
            else:
                self.in_parts(tiles_of_task)

    def tiles_of_rows(self, begin: Expr, end: Expr, body: Callable[[int, Expr, Expr], None]) -> None:
        """``body(rows, first row, number)`` for some row tiles. The last begins early enough to be whole, or half a tile if that
        holds its rows.
        """
        m, mr = self.extents.m, self.schedule.mr
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
        w, lanes, together = self.w, self.w.columns.lanes, self.w.together

        def step(turn: Expr, parts: int = together) -> None:
            for v in range(count):
                vector = share(w.vector(first, v, count, begin // together + turn))
                for part in range(parts):
                    store(to, w.widened(vector, part), [turn * together + part, v * lanes])

        unrolled(steps // together, 1, step)
        if steps % together:
            step(steps // together, 1)

    def in_parts(self, tiles_of_task: Callable[..., None]) -> None:
        """A few steps over k of all tiles before the next few. Every tile has a place of its own for its sums, as tiles overlap."""
        k, kc, lanes, acc = self.extents.k, self.schedule.kc, self.w.columns.lanes, self.a.acc
        tile = (self.schedule.mr, self.schedule.nr)
        held = T.alloc_buffer((self.column_tiles, self.row_tiles, *tile), acc)

        def where(at: _Place, i: int, v: int) -> list[Expr]:
            return [at.panel, at.number, i, v * lanes]

        def clear(at: _Place) -> None:
            for i, v in cartesian(range(at.rows), range(at.count)):
                store(held, const(0, acc, lanes), where(at, i, v))

        def add(at: _Place, first_step: Expr, steps: int) -> None:
            sums = RegisterTile(at.rows, at.count, lanes, acc)
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
        with T.serial(k // kc) as part:
            tiles_of_task(lambda at: add(at, part * kc, kc), (part * kc, kc))
        if k % kc:
            tiles_of_task(lambda at: add(at, k // kc * kc, k % kc), (k // kc * kc, k % kc))
        tiles_of_task(finish)

    def across(self, count: int, rows: int, body: Callable[[Expr, int], None]) -> None:
        """``body(first vector, vectors)`` for all columns, ``count`` vectors at a time, for about so many rows.

        The work of a step is that of its FMAs or of reading its weights, whichever is more.
        """
        lanes, vectors = self.w.columns.lanes, self.w.columns.vectors
        weights = self.extents.k * count * lanes
        steps = rows + 1 if self.w.narrow else rows  # widening takes about as long as a row
        work = max(self.work(steps * weights), self.reading(weights))
        parallel_if_large(vectors // count, work, lambda g: body(g * count, count))
        if vectors % count:
            body(vectors // count * count, vectors % count)

    def work(self, products: int) -> int:
        """The work of so many products."""
        found: int = multiply_adds(products, self.a.dtype, self.target)
        return found if self.w.dots is None else found // 2

    def reading(self, weights: int) -> int:
        """The work of reading so many weights: a byte takes 10 ps from L2, 30 ps from behind it, where they come from if more than L2
        holds are read in turn.
        """
        return weights * (bits(self.w.kind) // 8) * (1 if self.w.in_turn <= self.target.l2_bytes else 3)

    def tile(self, rows: int, row: Expr, first: Expr, count: int, unroll: int = 1) -> None:
        """``rows`` rows times ``count`` vectors of columns."""
        self.finish(row, first, self.sums(_Place(rows, row, None, first, count, 0), unroll))

    def sums(self, at: _Place, unroll: int | None = None) -> list[list[Expr]]:
        """The sums of a tile over all of k, one row after the other."""
        sums = RegisterTile(at.rows, at.count, self.w.columns.lanes, self.a.acc)
        self.multiply_add(sums, at, 0, self.extents.k, unroll)
        return [[cell.value for cell in row] for row in sums.cells]

    def multiply_add(self, sums: RegisterTile, at: _Place, begin: Expr, steps: int, unroll: int | None = None) -> None:
        """Some steps over k: each loads ``rows`` values and ``count`` vectors for their product of FMAs. ``begin`` is even."""
        a, w, lanes = self.a, self.w, self.w.columns.lanes
        together = w.together if at.wide is None else 1

        def step(turn: Expr, parts: int = together) -> None:
            if w.dots is not None:
                self.add_pairs(w.dots, sums, at, begin // together + turn, parts)
                return
            if at.wide is None:
                vectors = [share(w.vector(at.first, v, at.count, begin // together + turn)) for v in range(at.count)]
            else:
                vectors = [load(at.wide, [turn, v * lanes], lanes) for v in range(at.count)]
            for part in range(parts):
                values = [cast_to(a.acc, a.buffer[at.row + i, begin + turn * together + part]) for i in range(at.rows)]
                sums.multiply_add(
                    values, [w.widened(vector, part) for vector in vectors] if at.wide is None else vectors
                )

        times = unroll or (UNROLL if at.rows == self.schedule.mr else 1)
        fetch = at.number is not None and times == UNROLL and self.fetches_ahead
        each_turn = partial(self.fetch_ahead, at, begin, steps) if fetch else None
        unrolled(steps // together, max(1, times // together), step, each_turn)
        if steps % together:
            step(steps // together, 1)

    def add_pairs(self, dots: Dots, sums: RegisterTile, at: _Place, pair: Expr, count: int) -> None:
        """One step over two k, or over the last one of an odd sum, beside which both operands have zeros."""
        weights = [dots.weights(self.w.vector(at.first, v, at.count, pair)) for v in range(at.count)]
        for i, cells in enumerate(sums.cells):
            row = dots.row(share(self.a.pair(at.row + i, pair * 2, count)))
            for cell, vector in zip(cells, weights, strict=True):
                dots.add(cell, row, vector)

    def finish(self, row: Expr, first: Expr, values: Sequence[Sequence[Expr]]) -> None:
        """Stores the sums of a tile."""
        n, columns, count = self.extents.n, self.w.columns, len(values[0])
        whole = not isinstance(first, int) and columns.vectors // count * count * columns.lanes <= n
        for i, line in enumerate(values):
            where = unflatten(row + i, self.a.lead) if self.c.epilogue.inputs else (row + i,)
            self.c.put((row + i,), where, first * columns.lanes, count * columns.lanes if whole else n, line)

    @property
    def fetches_ahead(self) -> bool:
        """Whether weights have left L2 when they are read again, and the panels of tiles are whole blocks of whole lines."""
        w = self.w
        lines = self.vectors % w.columns.in_block == 0 and w.block * w.bits // 8 % LINE == 0
        return lines and w.in_turn > self.target.l2_bytes // 2

    def fetch_ahead(self, at: _Place, begin: Expr, steps: int, turn: Expr) -> None:
        """Asks for some lines of the next panel of weights, so that it is in L2 when it is needed.

        The tiles of a chunk of rows, eight or more, share its lines: each asks for an eighth of what it reads itself.
        """
        together, in_block, block = self.w.together, self.w.columns.in_block, self.w.block
        k, steps, each = ceildiv(self.extents.k, together), steps // together, UNROLL // together
        line = LINE * 8 // self.w.bits
        lines = ceildiv(each * block, line * 8)
        place = tirx.min((at.number * (steps // each) + turn) * lines, max(0, steps * block // line - lines)) * line
        for b in range(at.count // in_block):
            start = ((at.first + at.count) // in_block + b) * (k * block) + begin // together * block
            for i in range(lines):
                prefetch(self.w.stream, start + place + i * line)
