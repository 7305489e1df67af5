"""Matrix products of bytes with packed constant weights; pointwise convolutions over channels last are the same.

Vector tiles as `gemm` has them, where the processor has no tiles of its own or there are few rows; tiles of AMX else. The sums are
exact, so that results are the same bits whatever computes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import IDENTITY, Buffer, BufferSpec, Dim, Epilogue, Expr
from mlec.backends.tvm.kernels.int8 import (
    HELD,
    QUAD,
    SLACK,
    STRIP,
    Dots,
    Multiplier,
    Packed,
    Rows,
    Tiles,
    has_amx,
    in_parts,
    put,
    work_of,
)
from mlec.backends.tvm.kernels.result import Result
from mlec.backends.tvm.kernels.schedule import around, variations
from mlec.backends.tvm.kernels.tile import (
    SERIAL_WORK,
    ceildiv,
    copy_run,
    flat_view,
    if_,
    otherwise,
    parameter,
    product,
    unflatten,
)
from mlec.backends.tvm.kernels.vector import load, share
from mlec.backends.tvm.target import TargetInfo

LEAST_ROWS = 4
"""From so many on, a tile of AMX beats vectors."""
STREAM = 8
"""Vectors of columns of a tile of one row: enough loads in flight for the speed of the memory."""


@dataclass(frozen=True)
class Int8Schedule:
    """How a product of bytes goes over rows and columns.

    Attributes:
        amx: whether by tiles, which are 2 x 2 of 16 x 16; then ``rows`` and ``vectors`` are those of what is too little for them.
        rows, vectors: of a vector tile.
        task_rows: of a task, at most.
        task_columns: vectors (of AMX: blocks) of columns of a task, at most.
    """

    amx: bool
    rows: int
    vectors: int
    task_rows: int
    task_columns: int

    @staticmethod
    def candidates(m: Dim, packed: Packed, target: TargetInfo) -> Iterator[Int8Schedule]:
        """For ``m`` rows, which may be symbolic."""
        dots = Dots.of(target)
        rows, vectors = (
            vector_tile(m, packed, dots, target)
            if isinstance(m, int)
            else vector_tile(1 << 20, packed, dots, target, 6)
        )
        tiles = has_amx(target) and not (isinstance(m, int) and m < LEAST_ROWS)
        tall = max(64, min(256, target.l2_bytes // 4 // max(1, packed.terms)) // 32 * 32)
        columns = packed.blocks if tiles else -(-packed.columns // target.lanes(32))
        few = HELD if tiles else vectors
        share_out = -(-columns // (2 * target.cores))
        fitting = target.l2_bytes // 2 // max(1, packed.terms * (16 if tiles else target.lanes(32)))
        wide = max(few, min(fitting, share_out) // few * few)
        return variations(
            Int8Schedule(tiles, rows, vectors, tall, wide),
            lambda s: fits(s.rows, s.vectors, dots, target),
            amx=(False, True) if tiles else (),
            task_rows=around(tall, 32, 512),
            task_columns=around(wide, few, columns),
            rows=range(2, 13),
            vectors=range(1, 5),
        )


def fits(rows: int, vectors: int, dots: Dots, target: TargetInfo) -> bool:
    """Whether a vector tile leaves registers for its operands."""
    return rows * vectors + (vectors + 1) * dots.parts < target.vector_registers


def vector_tile(rows: int, packed: Packed, dots: Dots, target: TargetInfo, most: int = 14) -> tuple[int, int]:
    """Rows (at most so many) and vectors of the tile by which so many rows take the fewest predicted cycles.

    Two multiplications or two loads go in a cycle; a sum waits 5 cycles for its last step.
    """
    best = math.inf, 1, 1
    all_vectors = max(1, -(-packed.columns // dots.lanes))
    for vectors in range(1, min(4, all_vectors) + 1):
        for height in range(1, min(most, max(1, rows)) + 1):
            if not fits(height, vectors, dots, target) and (height, vectors) != (1, 1):
                continue
            tiles = -(-rows // height) * -(-all_vectors // vectors)
            loads = (height + vectors) / 2
            step = max(height * vectors * dots.parts / 2, loads, 5) + 0.15 * loads + 0.5
            best = min(
                best, (tiles * (packed.segments * packed.read * step + 2 * height * vectors + 20), height, vectors)
            )
    return best[1:]


def gemm_int8(
    lead: Sequence[Dim],
    packed: Packed,
    target: TargetInfo,
    epilogue: Epilogue = IDENTITY,
    name: str = "gemm_int8",
    schedule: Int8Schedule | None = None,
    program_weights: int = 0,
) -> tirx.PrimFunc:
    """``c[*lead, n] = epilogue((a[*lead, k] - zero_point) @ w)`` for u8 by i8, summed in i32; ``packed`` has one group and one segment.

    Parameters of the program: a, the packed weights, their offsets (which know the zero point), the epilogue's inputs, c. Extents in
    ``lead`` may be symbolic; their product is the number of rows.

    By the number of rows:

    * Fewer than four (without AMX: than the vector tile has): one vector tile of that many; columns are shared out. Weights are read once,
      ``k * n`` bytes at the speed of the memory that holds them: of a single row, eight vectors of columns at a time.
    * Else a task is a chunk of rows times a chunk of columns: its rows (``k`` bytes each) stay in L2 and are read again for each panel of
      columns, whose weights (``64 k`` bytes with 4 vectors, ``32 k`` with AMX) stay in L1 or L2 for all rows of the task. The last tile
      starts early enough to be whole, and so does the last panel.

    Rows whose length is not a multiple of what a step reads are copied for each task: ``k`` bytes read and written for ``k * n`` products.

    Where all weights of the program (``program_weights`` bytes) do not stay in L2 from call to call, the tiles of AMX on a panel ask for
    the lines of the next one, which then comes from L3 beside their products: a tenth to a fifth faster where L3 gives 10 GB/s.

    One core: two VNNI instructions of 64 products go in a cycle, or an AMX instruction of 16384 in 16. Of the peak of AMX, 45 to 47 % are
    measured: the operand that does not stay in L1 comes from L2, see `Tiles.sums`; weights that do not stay in L2 bound a product to the
    rate of L3 (128 x 768 by 768 x 3072: 2.4 MB at 10 GB/s are 236 us, of 243).
    """
    m, n, k = product(lead), packed.columns, packed.length
    chosen = schedule or next(Int8Schedule.candidates(m, packed, target))
    with prim_func(name) as kernel:
        a = parameter("a", BufferSpec((*lead, k), "uint8"))
        w = parameter("w", BufferSpec(packed.shape, "int8"))
        offsets = parameter("offsets", BufferSpec((packed.blocks * 16,), "int32"))
        c = Result.parameter("c", (*lead, n), "int32", epilogue)
        a, c = flat_view(a, (m * k,), "uint8"), c.viewed((m, n))
        multiplier = Multiplier(flat_view(w, (math.prod(packed.shape),), "int8"), offsets, packed, Dots.of(target))
        far = max(program_weights, math.prod(packed.shape)) > target.l2_bytes // 2
        _Gemm(a, multiplier, c, lead, m, chosen, target, far).all_rows()
    return kernel.func


@dataclass(frozen=True)
class _Gemm:
    """The parts of the program, see `gemm_int8`. ``far``: weights are no longer in L2 when they are read again."""

    a: Buffer
    multiplier: Multiplier
    c: Result
    lead: Sequence[Dim]
    m: Dim
    schedule: Int8Schedule
    target: TargetInfo
    far: bool

    @property
    def packed(self) -> Packed:
        return self.multiplier.packed

    def all_rows(self) -> None:
        """The whole program: a choice by the number of rows."""
        m, rows = self.m, self.schedule.rows
        if self.packed.columns == 0:
            T.evaluate(0)
            return
        amx = self.schedule.amx
        least = LEAST_ROWS if amx else rows
        if not isinstance(m, int):
            few = [(m == r, partial(self.few_rows, r)) for r in range(1, least)]
            otherwise([(m >= least, lambda: self.share_out(amx)), *few], lambda: T.evaluate(0))
        elif m >= least:
            self.share_out(amx)
        elif m > 0:
            self.few_rows(m)
        else:
            T.evaluate(0)

    @property
    def streaming(self) -> int:
        """The work of reading the weights once: a byte takes 10 ps from L2, 30 ps from behind it."""
        nbytes = math.prod(self.packed.shape)
        return nbytes * (1 if nbytes <= self.target.l2_bytes else 3)

    def few_rows(self, m: int) -> None:
        """One tile of all rows."""
        dots = self.multiplier.dots
        most = max(v for v in range(1, STREAM + 1) if v == 1 or fits(m, v, dots, self.target))
        count = min(self.multiplier.vectors, most)
        tiles = -(-self.multiplier.vectors // count)
        rows, start = self.rows(0, m, m, self.packed.read)
        work = self.streaming + work_of(m * math.prod(self.packed.shape), m * self.multiplier.vectors, dots, False)

        def tile(index: Expr) -> None:
            first = self.first(index, count, self.multiplier.vectors)
            self.tile(rows, start, m, 0, first, count)

        with (T.parallel if work >= SERIAL_WORK and tiles > 1 else T.serial)(tiles) as index:
            tile(index)

    @staticmethod
    def first(index: Expr, count: int, all_of_them: int) -> Expr:
        """Where run ``index`` of ``count`` things begins; the last one early enough to be whole."""
        if all_of_them <= count:
            return 0
        return index * count if all_of_them % count == 0 else share(tirx.min(index * count, all_of_them - count))

    def share_out(self, amx: bool) -> None:
        """At least one tile of rows, in chunks of rows and columns."""
        m, task_columns = self.m, self.schedule.task_columns
        # Chunks of whole tiles, none of which reaches into rows of another task: a copy lacks these.
        whole = HELD * STRIP if amx else self.schedule.rows
        task_rows = max(self.schedule.task_rows // whole, 1) * whole
        if isinstance(m, int):  # chunks of equal size, some for each thread
            parts = max(-(-m // task_rows), 1)
            task_rows = min(task_rows, -(-m // parts // whole) * whole)
        width = min(HELD, self.packed.blocks) if amx else min(self.schedule.vectors, self.multiplier.vectors)
        panels = -(-(self.packed.blocks if amx else self.multiplier.vectors) // width)
        some = max(1, task_columns // width)
        row_chunks, column_chunks = ceildiv(m, task_rows), -(-panels // some)
        row_work = work_of(math.prod(self.packed.shape), self.multiplier.vectors, self.multiplier.dots, amx)

        def task(index: Expr) -> None:
            begin, first = index // column_chunks * task_rows, index % column_chunks * some
            tile = self.strip if amx else self.schedule.rows
            begin = share(tirx.min(begin, m - tile))
            end = share(tirx.min(m, index // column_chunks * task_rows + task_rows))
            quads = self.packed.quads if amx else self.packed.read
            rows, start = self.rows(begin, end - begin, task_rows, quads)
            body = self.tiles if amx else self.vector_tiles
            body(rows, start, begin, end, (first, tirx.min(some, panels - first), width))

        def tasks(parallel: bool) -> None:
            with (T.parallel if parallel else T.serial)(row_chunks * column_chunks) as index:
                task(index)

        if isinstance(m, int):
            tasks(m * row_work + self.streaming >= SERIAL_WORK and row_chunks * column_chunks > 1)
        else:
            otherwise([(m * row_work + self.streaming < SERIAL_WORK, lambda: tasks(False))], lambda: tasks(True))

    @property
    def strip(self) -> Expr:
        """Rows of a tile of AMX."""
        return min(STRIP, self.m) if isinstance(self.m, int) else share(tirx.min(self.m, STRIP))

    def rows(self, begin: Expr, count: Expr, most: int, quads: int) -> tuple[Rows, Expr]:
        """``count`` rows from ``begin`` on and where the first one begins: as they lie or, if they end within what a step reads, a copy."""
        k, reach = self.packed.length, quads * QUAD
        if reach == k:
            return Rows(self.a, k, lambda segment: 0), begin * k
        copy = T.alloc_buffer((most * reach + SLACK,), "uint8")
        with T.serial(count) as i:
            source = (begin + i) * k
            copy_run(copy, [], i * reach, k, 64, lambda offset, width: load(self.a, [source + offset], width))
        return Rows(copy, reach, lambda segment: 0), 0

    def vector_tiles(self, rows: Rows, start: Expr, begin: Expr, end: Expr, columns: tuple[Expr, Expr, int]) -> None:
        """The rows of a task, a panel of columns after the other."""
        height, (first, panels, width) = self.schedule.rows, columns
        with T.serial(panels) as panel:
            at = self.first(first + panel, width, self.multiplier.vectors)
            with T.serial(ceildiv(end - begin, height)) as i:
                row = share(tirx.min(i * height, self.m - height - begin))
                self.tile(rows, share(start + row * rows.pitch), height, begin + row, at, width)

    def tile(self, rows: Rows, start: Expr, height: int, row: Expr, first: Expr, count: int) -> None:
        """The sums of ``height`` rows, the first of which is ``row`` and begins at ``start``, and some vectors of columns."""
        for i, line in enumerate(self.multiplier.sums(rows, start, height, first, count)):
            self.put(row + i, first, line)

    def tiles(self, rows: Rows, start: Expr, begin: Expr, end: Expr, columns: tuple[Expr, Expr, int]) -> None:
        """The same by AMX: two strips of rows at a time, and one where the last is alone.

        While the tiles of two strips are multiplied, vectors finish the sums of the two before.
        """
        tiles, (first, panels, width) = Tiles.begin(self.multiplier, self.strip), columns
        strips = share(ceildiv(end - begin, STRIP))
        task_rows = min(self.m, self.schedule.task_rows) if isinstance(self.m, int) else 8 * HELD * STRIP
        lines = tiles.lines_ahead(width, -(-task_rows // (HELD * STRIP)))

        pairs = share(strips // HELD)

        def place(row: Expr) -> Expr:
            """The row of the task, as a strip that begins there has to be whole."""
            return share(tirx.min(row, self.m - tiles.strip - begin))

        def multiply(number: Expr, count: int, block: Expr, meanwhile: Callable[[Expr, int], None] | None) -> None:
            at = [place((number + s) * STRIP) for s in range(count)]
            ahead = (number // HELD, lines) if self.far else None
            tiles.sums(rows, [start + row * rows.pitch for row in at], block, width, ahead, meanwhile)

        def finish(number: Expr, block: Expr, held: Expr) -> None:
            """A row of the sums that are held, whose first strip has this number."""
            row = place((number + held // STRIP) * STRIP) + held % STRIP
            self.put(begin + row, block * self.multiplier.in_block, tiles.row(held, width)[: self.multiplier.vectors])

        def panel_of(number: Expr) -> Expr:
            return self.first(first + number, width, self.packed.blocks)

        def order(unit: Expr) -> tuple[Expr, Expr]:
            """Panel and pair of strips: weights that are in L2 stream past the rows, in L1; else rows past the weights."""
            return (unit // pairs, unit % pairs) if self.far else (unit % panels, unit // panels)

        with if_(pairs > 0):
            with T.serial(panels * pairs) as unit:
                (panel, pair), (held_panel, held_pair) = order(unit), order(share(tirx.max(unit - 1, 0)))
                block, held_block = panel_of(panel), panel_of(held_panel)
                ready = partial(finish, share(held_pair * HELD), held_block)
                multiply(share(pair * HELD), HELD, block, in_parts(ready, HELD * STRIP, unit > 0))
            last = panel_of(panels - 1)
            with T.serial(HELD * STRIP) as i:
                finish((pairs - 1) * HELD, last, i)
        with if_(strips % HELD > 0), T.serial(panels) as panel:
            block = panel_of(panel)
            multiply(strips - 1, 1, block, None)
            with T.serial(tiles.strip) as i:
                finish(strips - 1, block, i)
        tiles.end()

    def put(self, row: Expr, first: Expr, values: Sequence[Expr]) -> None:
        """Stores the sums of a row."""
        row = share(row)
        where = unflatten(row, self.lead) if self.c.epilogue.inputs else (row,)
        put(self.c, where, row, 0, first, self.packed, values)
