"""Products of bf16 by bf16 with sums in float32, by the matrix unit of x86 processors (AMX).

512 x 768 by 768 x 768 is 604 MFLOP on 0.8 MB of rows and 1.2 MB of weights in 16 bits, and 1.6 MB of results. Sums of 32 by 32 in tiles
take, of 32 of the summed numbers, four instructions of 16 cycles, 1024 FLOP a cycle: 590000 cycles, 170 us at 3.48 GHz. That is with all
in L1; the 2 KB of rows of such a step come from L2, which gives 14 to 28 bytes in a cycle: 190 to 390 us. Rows of float32 are rounded
before, 1.6 MB read and 0.8 written. Measured 548 us with that by one thread, 1100 GFLOP/s, 5.6 times as fast as float32; 64 x 512 by 512
x 2048, 134 MFLOP, 150 us and 4.8 times; 16 x 256 by 256 x 256 4.9 us and 2.6 times, calling included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from mlec.backends.tvm.compat import T, tirx
from mlec.backends.tvm.kernels.epilogue import Buffer, Dim, Expr
from mlec.backends.tvm.kernels.int8 import STRIP, Dots, amx, in_parts, set_up_tiles
from mlec.backends.tvm.kernels.tile import SERIAL_WORK, ceildiv, if_, otherwise
from mlec.backends.tvm.kernels.vector import load, share
from mlec.backends.tvm.target import TargetInfo

HELD = 2
"""Strips of rows, and of columns, at once: four tiles of sums, two of each operand, of the eight that there are."""
RATE = 6
"""Multiply-adds that take the time of one of float32, as this kernel does them; the tiles alone could do 15."""
TASK_ROWS = 256


def has_tiles(target: TargetInfo) -> bool:
    """Whether there are tiles of bf16, and vectors as long as their rows."""
    return {"amx-bf16", "amx-tile"} <= target.features and target.lanes(32) == STRIP


def bf16_products(target: TargetInfo) -> float:
    """How many products of bf16 take the time of one of float32."""
    return RATE if has_tiles(target) else 1.0 if Dots.of_bf16(target) is None else 2.0


def pairs_of_step(k: int, target: TargetInfo) -> int:
    """Pairs of successive k that one instruction takes; 0 where the processor has none, there are none, or they do not divide ``k``."""
    if not has_tiles(target) or not k or k % 2:
        return 0
    return next((pairs for pairs in range(STRIP, STRIP // 2, -1) if k // 2 % pairs == 0), 0)


def least_rows(n: int, k: int) -> int:
    """Rows from which on tiles take less time than vectors.

    Measured on one core: tiles take 0.28 us, 5 ns for a column and 16 ps for a column and k, whatever the rows are up to 16; vectors, which
    widen what they read, 16 ps for a row, column and k. With one row both take the time of reading the weights.
    """
    return max(2, math.ceil(1 + (18000 / max(n, 1) + 320) / max(k, 1)))


@dataclass(frozen=True)
class TiledGemm:
    """``a[m, k] @ w`` for `least_rows` or more.

    A task is some rows and some columns. It takes 32 columns at a time, whose weights, 64 k bytes, all its rows share: 32 by 32 sums in
    tiles, k outside. An instruction multiplies 16 x 32 by 32 x 16 in 16 cycles; four of them load four tiles, 64 lines in 64 cycles.

    While tiles multiply, vectors finish the sums of the 32 rows before: a quarter to a third faster than one after the other. Measured on
    one core, as multiples of the rate of float32: 6 to 6.6, of 15 at most. The loop over k by itself makes 12 with operands in L1 and 9
    from L2, from which the rows of a task come for each 32 columns: `mlec.backends.tvm.kernels.int8.Tiles.sums` says what L2 gives.

    Attributes:
        a: ``[m, k]`` in 16 bits.
        w: ``[blocks, k / 2, block]``, two k in one element of 32 bits; a block is one or two vectors of 16 columns.
        pairs: of a step, see `pairs_of_step`.
        reading: the work (see `SERIAL_WORK`) of reading the weights once.
        finish: ``(row, first vector of columns, rows of vectors)`` stores sums.
    """

    a: Buffer
    w: Buffer
    extents: tuple[Dim, int, int]
    block: int
    pairs: int
    reading: int
    finish: Callable[[Expr, Expr, Sequence[Sequence[Expr]]], None]
    target: TargetInfo

    @property
    def vectors(self) -> int:
        """Of columns."""
        return -(-self.extents[1] // STRIP)

    @property
    def strip(self) -> Expr:
        """Rows of a tile: 16, or all that there are."""
        m = self.extents[0]
        return min(STRIP, m) if isinstance(m, int) else share(tirx.min(m, STRIP))

    def all_rows(self) -> None:
        """Chunks of rows times chunks of columns, for all threads if there is enough to do."""
        (m, n, k), groups = self.extents, -(-self.vectors // HELD)
        some = max(1, groups // (4 * self.target.cores))
        rows, columns = ceildiv(m, TASK_ROWS), -(-groups // some)

        def tasks(parallel: bool) -> None:
            with (T.parallel if parallel else T.serial)(rows * columns) as index:
                self.task(index // columns * TASK_ROWS, index % columns * some, some)

        work = m * -(-n * k // RATE) + self.reading
        if isinstance(m, int):
            tasks(work >= SERIAL_WORK)
        else:
            otherwise([(work < SERIAL_WORK, lambda: tasks(False))], lambda: tasks(True))

    def task(self, begin: Expr, first: Expr, some: int) -> None:
        """Up to `TASK_ROWS` rows, and ``some`` groups of columns from ``first`` on."""
        m, whole = self.extents[0], self.vectors // HELD
        strips = share(ceildiv(tirx.min(m - begin, TASK_ROWS), STRIP))
        widths = [4 * (self.pairs if tile in (4, 5) else STRIP) for tile in range(8)]
        strip = self.strip
        set_up_tiles(widths, [*[0] * 6, self.pairs, self.pairs], strip)
        held, m, pairs = T.alloc_buffer((HELD * STRIP, HELD * STRIP), "float32"), self.extents[0], share(strips // HELD)

        def columns(vector: Expr, count: int) -> None:
            def finish(first: Expr, i: Expr) -> None:
                """A row of the sums that are held, whose first strip begins with this row."""
                row = tirx.min(first + i // STRIP * STRIP, m - strip) + i % STRIP
                self.finish(share(row), vector, [[load(held, [i, v * STRIP], STRIP) for v in range(count)]])

            with if_(pairs > 0):
                with T.serial(pairs) as pair:
                    ready = partial(finish, share(begin + tirx.max(pair - 1, 0) * (HELD * STRIP)))
                    meanwhile = in_parts(ready, HELD * STRIP, pair > 0)
                    self.tile(held, begin + pair * (HELD * STRIP), HELD, vector, count, meanwhile)
                with T.serial(HELD * STRIP) as i:
                    finish(begin + (pairs - 1) * (HELD * STRIP), i)
            with if_(strips % HELD > 0):
                self.tile(held, begin + (strips - 1) * STRIP, 1, vector, count, None)
                with T.serial(strip) as i:
                    finish(begin + (strips - 1) * STRIP, i)

        with T.serial(tirx.max(0, tirx.min(some, whole - first))) as group:
            columns((first + group) * HELD, HELD)
        if self.vectors % HELD:
            with if_(first + some > whole):
                columns(whole * HELD, self.vectors % HELD)
        amx("tilerelease")

    def tile(
        self, held: Buffer, row: Expr, strips: int, vector: Expr, count: int,
        meanwhile: Callable[[Expr, int], None] | None,
    ) -> None:  # fmt: skip
        """The sums of ``strips`` times 16 rows, the last of which begin early enough to be 16, and ``count`` vectors of columns.

        ``meanwhile``: see `mlec.backends.tvm.kernels.int8.Tiles.sums`.
        """
        (m, _, k), in_block, strip = self.extents, self.block // STRIP, self.strip
        rows = [share(tirx.min(row + s * STRIP, m - strip)) for s in range(strips)]
        cells = [(s, v, HELD * s + v) for s in range(strips) for v in range(count)]
        apart, line = tirx.const(2 * k, "int64"), tirx.const(4 * self.block, "int64")
        for _, _, tile in cells:
            amx("tilezero", tile)
        with T.serial(k // 2 // self.pairs) as step:
            for v in range(count):
                block, part = (vector + v) // in_block, (vector + v) % in_block
                place = self.w[block, step * self.pairs, part * STRIP]
                amx("tileloadd64", 6 + v, tirx.address_of(place), line)
            for s, first in enumerate(rows):
                amx("tileloadd64", 4 + s, tirx.address_of(self.a[first, step * (2 * self.pairs)]), apart)
                for v in range(count):
                    amx("tdpbf16ps", HELD * s + v, 4 + s, 6 + v)
            if meanwhile is not None:
                meanwhile(step, k // 2 // self.pairs)
        for s, v, tile in cells:
            amx(
                "tilestored64", tile, tirx.address_of(held[s * STRIP, v * STRIP]), tirx.const(4 * HELD * STRIP, "int64")
            )
