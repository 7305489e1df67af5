"""Recurrent layers (LSTM, GRU, plain) over a whole sequence in one kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import Buffer, BufferSpec, Dim, Expr
from mlec.backends.tvm.kernels.rnn_layer import (
    GATES,
    Cells,
    Layer,
    Operands,
    Place,
    Task,
    larger,
    smaller,
    weight_bytes,
)
from mlec.backends.tvm.kernels.schedule import even, variations
from mlec.backends.tvm.kernels.tile import (
    UNROLL,
    RegisterTile,
    bits,
    ceildiv,
    if_,
    multiply_adds,
    otherwise,
    tile_rows,
    tile_vectors,
    unrolled,
)
from mlec.backends.tvm.kernels.vector import cast_to, load, share, store
from mlec.backends.tvm.target import TargetInfo

CHAINS = 8
"""Of dependent multiply-adds that keep the units busy: two of them, for a latency of four cycles."""
FEW = 2
"""Sequences for which weights of the inputs are read for several steps at once: more use a weight as often as it takes time to read."""

Picked: TypeAlias = "Sequence[tuple[int, int]]"
"""Vectors of sums: of which block of units, counted from the first of the tile, and which gate."""


@dataclass(frozen=True)
class RecurrentSchedule:
    """How `recurrent` goes over sequences, steps and units.

    Attributes:
        rows: sequences of a tile.
        vectors: of a tile: all gates of a block of units or of several, or a part of the gates of one.
        tiles: of a task.
        steps: whose input products are computed at once, where there are few sequences.
        group: blocks of units at once, of a sequence by itself.
    """

    rows: int
    vectors: int
    tiles: int
    steps: int
    group: int

    @staticmethod
    def candidates(
        kind: str, n: Dim, steps: Dim, hidden: int, dtype: str, target: TargetInfo
    ) -> Iterator[RecurrentSchedule]:
        """For ``n`` sequences of ``steps``, which may be symbolic. Tiles that leave no register for the operands do not fit.

        By default the tile of a matrix product: all gates of a block, 6 x 4 of an lstm, 8 x 3 of a gru, or of 16 registers 6 x 2 and 4 x 3;
        of a single gate as many blocks. Of a sequence by itself as many as make enough independent sums.
        """
        gates, blocks = GATES[kind], -(-hidden // recurrent_lanes(dtype, target))
        most = tile_vectors(target)
        vectors = even(blocks, most) if gates == 1 else gates if gates <= max(most, 3) else most
        rows = tile_rows(target, vectors)
        default = RecurrentSchedule(rows, vectors, 4, rows, -(-CHAINS // gates))

        def fits(s: RecurrentSchedule) -> bool:
            tiles = ((s.rows, s.vectors), (s.steps, s.vectors), (1, s.group * gates))
            return all(rows * vectors < target.vector_registers - vectors for rows, vectors in tiles)

        widths = {1: range(1, blocks + 1), 3: (3,), 4: (4, 2)}[gates]
        return variations(
            default,
            fits,
            rows=[r for r in (4, 8, 6, 3, 2, 12) if not isinstance(n, int) or r <= n],
            vectors=[v for v in widths if v <= 4],
            tiles=(2, 8, 16),
            steps=[s for s in (4, 12, 6, 2, 8) if not isinstance(steps, int) or s <= steps],
            group=[g for g in (1, 2, 3, 4, 8) if g <= blocks],
        )


def recurrent_lanes(dtype: str, target: TargetInfo) -> int:
    """Units in a block of packed weights."""
    return target.lanes(bits(dtype))


def recurrent(
    cells: Cells,
    target: TargetInfo,
    name: str = "",
    schedule: RecurrentSchedule | None = None,
    rows: str = "",
) -> tirx.PrimFunc:
    """One direction of one layer, in float32 or float64.

    Parameters of the program: x ``[n, steps, features]`` (of the dtype ``rows``, if given), h0 ``[n, hidden]`` (lstm: c0 too), w_ih and
    w_hh packed by `pack_recurrent`, the biases packed (gru: `joined_biases` and b_hh; else one), y ``[n, steps, hidden]``, h_n (lstm:
    c_n too).

    A task is up to 24 sequences. Step by step it takes one block of units after the other: tiles of ``rows x vectors`` sums, those of a
    matrix product, begin with the bias, run over the inputs and then over the previous state, and their gate functions follow at once.
    The sums are one chain of FMAs in this order however the tiles lie: results depend neither on the batch nor on threads.

    An example: an lstm of 64 inputs and 64 units in float32, AVX-512, 1024 sequences. A step of a sequence takes 4 gates x 128 weights x 4
    vectors = 2048 FMAs, 1024 cycles of two units. A tile of 6 x 4 loads 6 + 4 values for 24 FMAs: 5 cycles of loads beside 12. The weights
    of a block, 128 x 256 bytes = 32 KB, are in L1 for all tiles of a task but the first; where they are more, a tile needs 256 bytes of L2
    in 12 cycles, less than half of what that gives. Gate functions of a vector take three divisions of 16 cycles beside about 110
    other instructions, 55 cycles: 220 for a step, so 1244 cycles or 480 ns at 2.6 GHz are predicted; measured are 440 to 460 ns, and 390
    to 430 with 64 sequences, whose x and y do not come from L3. A plain recurrence has one gate: a tile is four blocks of units, so 6 x 4
    as well; a gru has 8 x 3. Tiles of one vector across, eight rows for a single gate, would load nine values for eight FMAs.

    Where there are one or two sequences, a step is bound by its weights: ``gates * hidden²`` of them are read for as many FMAs. So the
    products of inputs come ahead, for six steps at once; those weights are read once for these. Where all weights exceed L2, that is done
    for as many sequences as a tile has, and where a step takes 20 us or more, threads share its units: an lstm of 512 units 59 us with
    two threads, 176 with one, as half of the weights does fit into the L2 of a core; 1024 units 370 and 720 us, 320 units 11 and 31 us.
    With threads that wait for nothing else it would pay from 160 units on (3.3 and 4.4 us; 128 units 2.6 and 2.7 us): they meet at the
    end of each step, and one whose core another program has holds up all the others for a slice of the scheduler's time.
    """
    c, lanes = cells, recurrent_lanes(cells.dtype, target)
    schedule = schedule or next(RecurrentSchedule.candidates(c.kind, c.n, c.steps, c.hidden, c.dtype, target))
    with prim_func(name or c.kind) as kernel:
        operands = Operands.declare(
            c, lanes, lambda blocks, k: BufferSpec((blocks, k, c.gates * lanes), c.dtype), rows or c.dtype
        )
        _Vectors(cells, operands, lanes, target, schedule).all_rows()
    return kernel.func


@dataclass(frozen=True)
class _Vectors(Layer):
    """Products by vectors, see `recurrent`."""

    schedule: RecurrentSchedule

    @property
    def width(self) -> int:
        """Blocks of a tile of several sequences."""
        return min(self.blocks, max(1, self.schedule.vectors // self.cells.gates))

    @property
    def from_memory(self) -> bool:
        """Whether weights have left L2 when they are read again."""
        return weight_bytes(self.cells) > self.target.l2_bytes

    @property
    def few(self) -> int:
        """Sequences that one task advances together, its input products ahead."""
        return self.schedule.rows if self.from_memory else min(FEW, self.schedule.rows)

    def all_rows(self) -> None:
        """The whole program: a choice by the number of sequences."""
        n = self.cells.n

        def many() -> None:
            self.share_out(self.schedule.rows * self.schedule.tiles)

        if isinstance(n, int):
            (self.ahead if n <= self.few else many)()
        else:
            otherwise([(n <= self.few, self.ahead)], many)

    def task(self, first: Expr, rows: Expr, most: int) -> None:
        height = self.schedule.rows
        task = self.begin(first, rows, most)
        sums = self.scratch(height, self.width)

        def tiles(place: Place, block: Expr, blocks: int) -> None:
            def tile(row: Expr, count: int) -> None:
                times = [(first + row + i, place.time) for i in range(count)]
                self.tile(
                    task, place, sums, row, count, block, blocks, lambda t, p: self.add_inputs(t, times, block, p)
                )

            with T.serial(rows // height) as i:
                tile(i * height, height)
            for left in range(1, height):
                with if_(rows % height == left):
                    tile(rows - left, left)

        with T.serial(self.cells.steps) as turn:
            place = self.place(turn)
            self.across(self.width, partial(tiles, place))
            self.give(task, place)
        self.end(task)

    def ahead(self) -> None:
        """Few sequences at once. Weights of the inputs are read once for several steps; threads share units where these are much work."""
        c, lanes = self.cells, self.lanes
        most = max(c.n, 1) if isinstance(c.n, int) else self.few
        some = max(1, smaller(self.schedule.steps, c.steps)) if isinstance(c.steps, int) else self.schedule.steps
        task = self.begin(0, c.n, most)
        fed = T.alloc_buffer((most, some, self.blocks, c.gates * lanes), c.dtype)

        def feed(start: Expr, count: int, place: Expr, block: Expr, blocks: int) -> None:
            with T.serial(c.n) as i:
                self.feed(fed, i, start, count, place, block, blocks)

        def advance(rows: int, place: Place, s: Expr, block: Expr, blocks: int) -> None:
            def begin(tile: RegisterTile, picked: Picked) -> None:
                _set(tile, picked, lambda i, b, g: load(fed, [i, s, block + b, g * lanes], lanes))

            self.tile(task, place, self.scratch(rows, blocks), 0, rows, block, blocks, begin)

        def all_rows(place: Place, s: Expr, rows: int) -> None:
            width = min(self.blocks, self.schedule.group) if rows == 1 else self.width
            self.across(width, partial(advance, rows, place, s), self.work(width, rows, c.hidden))

        with T.serial(ceildiv(c.steps, some)) as chunk:
            begin = share(chunk * some)
            count = share(smaller(some, c.steps - begin))
            start = share(larger(0, smaller(begin, c.steps - some)))  # the last ones anew rather than one by one
            every = partial(self.across, self.width, work=self.work(self.width, most * some, c.features))

            def one_by_one() -> None:
                with T.serial(count) as s:
                    every(partial(feed, start + s, 1, s))

            def together() -> None:
                every(partial(feed, start, some, 0))

            if isinstance(c.steps, int):
                together()
            else:
                otherwise([(c.steps < some, one_by_one)], together)
            with T.serial(count) as turn:
                place, s = self.place(share(begin + turn)), share(begin - start + turn)
                if isinstance(c.n, int):
                    all_rows(place, s, most)
                else:
                    for rows in range(1, most + 1):
                        with if_(c.n == rows):
                            all_rows(place, s, rows)
                self.give(task, place)
        self.end(task)

    def work(self, blocks: int, times: int, k: int) -> int:
        """Of products by the weights of some blocks (see `SERIAL_WORK`), or of reading them: a byte takes 10 ps from L2, 30 from behind."""
        weights = blocks * self.cells.gates * self.lanes * k
        read = (3 if self.from_memory else 1) * weights * bits(self.cells.dtype) // 8
        return max(int(multiply_adds(times * weights, self.cells.dtype, self.target)), read)

    # -- tiles ---------------------------------------------------------------------------------------------------

    def parts(self, blocks: int) -> list[Picked]:
        """The vectors of sums for so many blocks, as far as they go into registers at once."""
        every = [(b, g) for b in range(blocks) for g in range(self.cells.gates)]
        size = len(every) if blocks > 1 else min(len(every), self.schedule.vectors)
        return [every[i : i + size] for i in range(0, len(every), size)]

    def scratch(self, rows: int, blocks: int) -> Buffer:
        """For the sums of a tile."""
        return T.alloc_buffer((rows, blocks, self.cells.slots * self.lanes), self.cells.dtype)

    def tile(
        self, task: Task, place: Place, sums: Buffer, first: Expr, count: int, block: Expr, blocks: int,
        begin: Callable[[RegisterTile, Picked], None],
    ) -> None:  # fmt: skip
        """From one state to the next: ``count`` sequences of a task and some blocks of units; sums begin with what the inputs give."""
        c, lanes = self.cells, self.lanes
        for picked in self.parts(blocks):
            tile = RegisterTile(count, len(picked), lanes, c.dtype)
            begin(tile, picked)
            for v, (b, g) in enumerate(picked):
                if c.kind == "gru" and g == c.gates - 1:
                    for i in range(count):
                        store(sums, tile.value(i, v), [i, b, c.gates * lanes])
                        tile.cells[i][v].set(load(self.operands.bias[1], [block + b, 0, g * lanes], lanes))

            def step(k: Expr, tile: RegisterTile = tile, picked: Picked = picked) -> None:
                tile.multiply_add(
                    [task.state[0][place.old, first + i, k] for i in range(count)],
                    [load(self.operands.w_hh, [block + b, k, g * lanes], lanes) for b, g in picked],
                )

            unrolled(c.hidden, self.unroll(count), step)
            for i in range(count):
                for v, (b, g) in enumerate(picked):
                    store(sums, tile.value(i, v), [i, b, g * lanes])
        self.update(task, place, sums, first, count, block, blocks)

    def feed(self, fed: Buffer, i: Expr, start: Expr, count: int, place: Expr, block: Expr, blocks: int) -> None:
        """What the inputs of ``count`` steps of one sequence give some blocks of units."""
        for picked in self.parts(blocks):
            tile = RegisterTile(count, len(picked), self.lanes, self.cells.dtype)
            self.add_inputs(tile, [(i, self.time(start + r)) for r in range(count)], block, picked)
            for r in range(count):
                for v, (b, g) in enumerate(picked):
                    store(fed, tile.value(r, v), [i, place + r, block + b, g * self.lanes])

    def add_inputs(self, tile: RegisterTile, rows: Sequence[tuple[Expr, Expr]], block: Expr, picked: Picked) -> None:
        """Biases, then the products of inputs: ``rows`` are those of x, sequence and step."""
        c, lanes, (x, w) = self.cells, self.lanes, (self.operands.x, self.operands.w_ih)
        _set(tile, picked, lambda i, b, g: load(self.operands.bias[0], [block + b, 0, g * lanes], lanes))

        def step(k: Expr) -> None:
            values = [cast_to(c.dtype, x[row, time, k]) for row, time in rows]
            tile.multiply_add(values, [load(w, [block + b, k, g * lanes], lanes) for b, g in picked])

        unrolled(c.features, self.unroll(len(rows)), step)

    def unroll(self, rows: int) -> int:
        return UNROLL if rows == self.schedule.rows else 2 if rows == 1 else 1


def _set(tile: RegisterTile, picked: Picked, value: Callable[[int, int, int], Expr]) -> None:
    """Begin the sums with ``value(row, block, gate)``."""
    for i, row in enumerate(tile.cells):
        for cell, (b, g) in zip(row, picked, strict=True):
            cell.set(value(i, b, g))
