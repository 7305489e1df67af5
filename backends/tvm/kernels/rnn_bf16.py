"""Recurrent layers whose products are of bf16 by bf16, by the matrix unit of x86 processors (AMX).

A step of an lstm of 64 inputs and 256 units on 64 sequences is 42 MFLOP, 41000 cycles at 1024 FLOP each, 12 us at 3.48 GHz. Its weights,
0.66 MB in 16 bits, stay in L2 from step to step: 14 to 28 bytes in a cycle, 7 to 13 us each time that a tile of sequences reads them, of
which there are four. The gate functions of 1024 vectors of units take 60 cycles or more each, 18 us. Measured 60 us for a step by one
thread, 700 GFLOP/s, 4.2 times as fast as float32. Of 128 inputs and 512 units the weights are 2.6 MB, more than L2: 16 sequences, again
42 MFLOP, take 173 us for a step, which is 15 GB/s, 2.7 times as fast as float32, whose weights are twice that. One sequence has no rows
to share weights, 64 inputs and 256 units take 8.3 us a step, and 7.7 in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import Buffer, BufferSpec, Expr
from mlec.backends.tvm.kernels.gemm_bf16 import RATE
from mlec.backends.tvm.kernels.int8 import STRIP, amx, set_up_tiles
from mlec.backends.tvm.kernels.rnn_layer import Cells, Layer, Operands, Place, Task, pack_recurrent, weight_bytes
from mlec.backends.tvm.kernels.schedule import even
from mlec.backends.tvm.kernels.tile import (
    SERIAL_WORK,
    bits,
    buffer_dtype,
    first_lanes,
    flat_view,
    otherwise,
    vector_loop,
)
from mlec.backends.tvm.kernels.vector import (
    bits_as,
    cast_to,
    const,
    const_like,
    dtype_of,
    is_nan,
    lanes_of,
    load,
    select,
    share,
    store,
)
from mlec.backends.tvm.target import TargetInfo

STEP = 2 * STRIP
"""Summed numbers of one instruction, to which features and units are filled up with zeros."""
HELD, ROWS, WEIGHTS = 4, 4, 6
"""Tiles of sums at once; the tile of rows; the first of two of weights."""
TASK_ROWS = 64
FEW = 4
"""Sequences for which weights of the inputs are read for several steps at once; twice as many where weights are not in L2."""


def whole_steps(k: int) -> int:
    """As many summed numbers as whole instructions take."""
    return -(-k // STEP) * STEP


def pack_tiled(weights: npt.NDArray[np.generic], gates: int) -> npt.NDArray[np.generic]:
    """Weights ``[gates * h, k]`` as ``[ceil(h / 16), k / 2, gates * 16, 2]``: as `pack_recurrent`, two successive k side by side.

    Zeros fill k up to `whole_steps`.
    """
    packed = pack_recurrent(weights, gates, STRIP)
    blocks, k, wide = packed.shape
    filled = np.zeros((blocks, whole_steps(k), wide), packed.dtype)
    filled[:, :k] = packed
    return np.ascontiguousarray(filled.reshape(blocks, -1, 2, wide).transpose(0, 1, 3, 2))


def recurrent_bf16(cells: Cells, target: TargetInfo, name: str = "", rows: str = "float32") -> tirx.PrimFunc:
    """As `mlec.backends.tvm.kernels.rnn.recurrent` of float32, with matrices of bfloat16 packed by `pack_tiled`, and x so or of float32."""

    def weights(blocks: int, k: int) -> BufferSpec:
        return BufferSpec((blocks, whole_steps(k) // 2, cells.gates * STRIP, 2), "bfloat16")

    with prim_func(name or cells.kind) as kernel:
        operands = Operands.declare(cells, STRIP, weights, rows)
        TiledLayer(cells, operands, STRIP, target).all_rows()
    return kernel.func


@dataclass(frozen=True)
class TiledLayer(Layer):
    """Products by tiles: 16 sequences or fewer times four vectors of sums, the gates of 16 units or four blocks of a single gate.

    Sums begin with the bias, then come inputs, then state. States stay in float32; beside them lies what products read, the same in
    bf16, filled up to whole steps.

    An instruction multiplies 16 x 32 by 32 x 16 in 16 cycles; four of them load five tiles, 80 lines in 40 cycles. Of an lstm of 64 inputs
    and 64 units, a step of 16 sequences takes 64 of them, 1024 cycles, as 16 x 1024 are those of float32; the gate functions of 64
    vectors take at least 64 x 60 cycles by either. So 4 times is the most that can be hoped for. Measured on one core, as multiples of
    float32, for 1, 4, 16, 64 and 1024 sequences: 1.1, 1.8, 2.5, 2.9, 2.7; with 32 inputs and 128 units 1.2, 1.8, 2.6, 3.6, 3.8; with 256
    and 256, whose weights of float32 exceed L2, 2.2, 4.7, 5.0, 5.4, 4.8; a gru of 64 0.8, 1.7, 2.2, 2.7, 2.2; a plain recurrence of 64
    0.7, 1.3, 2.5, 2.0, 1.7. A sequence by itself is bound by latencies: 52 cycles for each instruction of a chain, and the way of sums
    through memory to the vectors.

    Attributes:
        operands: x of float32 or bf16, matrices packed by `pack_tiled`.
    """

    rate = RATE

    @property
    def width(self) -> int:
        """Blocks of a tile."""
        return even(self.blocks, HELD // self.cells.slots)

    @property
    def from_memory(self) -> bool:
        """Whether weights have left L2 when they are read again."""
        return weight_bytes(self.cells) // 2 > self.target.l2_bytes

    def all_rows(self) -> None:
        """The whole program: a choice by the number of sequences."""
        n, few = self.cells.n, 2 * FEW if self.from_memory else FEW

        def many() -> None:
            self.share_out(TASK_ROWS)

        if isinstance(n, int):
            (many if n == 0 or n > few else self.ahead)()
        else:
            otherwise([(n < 1, lambda: None), (n <= few, self.ahead)], many)

    def task(self, first: Expr, rows: Expr, most: int) -> None:
        c, strip = self.cells, share(tirx.min(rows, STRIP))
        task = self.begin(first, rows, most)
        narrow, inputs = self.rounded_state(task, most), self.inputs(most)
        sums = self.scratch()
        configure(strip)

        def strips(place: Place, block: Expr, blocks: int) -> None:
            with T.serial(-(-rows // STRIP)) as number:  # the last begins early enough to be a whole one
                row = share(tirx.min(number * STRIP, rows - strip))
                self.begin_sums(block, blocks)
                self.add(inputs, [row], self.operands.w_ih, block, blocks, c.slots - 1)
                self.add_state(task, place, narrow, sums, row, strip, block, blocks)

        with T.serial(c.steps) as turn:
            place = self.place(turn)
            with T.serial(rows) as i:
                self.round_input(inputs, i, first + i, place.time)
            self.across(self.width, lambda block, blocks: strips(place, block, blocks))
            self.give(task, place)
        self.end(task)
        amx("tilerelease")

    def ahead(self) -> None:
        """Few sequences at once: a tile of inputs is all that they read in several steps. Threads share units where a step is much work."""
        c = self.cells
        task = self.begin(0, c.n, STRIP)
        narrow, inputs = self.rounded_state(task, STRIP), self.inputs(STRIP)
        fed = T.alloc_buffer((STRIP, self.blocks, c.slots * STRIP), "float32")
        some = share(STRIP // c.n)

        def feed(block: Expr, blocks: int) -> None:
            self.begin_sums(block, blocks)
            self.add(inputs, [0], self.operands.w_ih, block, blocks, c.slots - 1)
            self.move("tilestored64", fed, [0, block], blocks)

        def advance(place: Place, row: Expr, block: Expr, blocks: int) -> None:
            self.move("tileloadd64", fed, [row, block], blocks)
            self.add_state(task, place, narrow, self.scratch(), 0, c.n, block, blocks)

        with T.serial(-(-c.steps // some)) as chunk:
            begin = share(chunk * some)
            count = share(tirx.min(some, c.steps - begin))
            with T.grid(count, c.n) as (s, i):
                self.round_input(inputs, s * c.n + i, i, self.time(begin + s))
            self.across_threads(count * c.n, c.features, feed)
            with T.serial(count) as s:
                place = self.place(share(begin + s))
                self.across_threads(c.n, c.hidden, partial(advance, place, s * c.n))
                self.give(task, place)
        self.end(task)

    def across_threads(self, rows: Expr, k: int, body: Callable[[Expr, int], None]) -> None:
        """`across` with tiles of so many rows, by several threads where reading the weights is enough work."""
        each = self.width * self.cells.gates * STRIP * 2 * whole_steps(k) * (3 if self.from_memory else 1)
        groups = self.blocks // self.width

        def configured(*place: Any) -> None:
            configure(rows)
            body(*place)
            amx("tilerelease")

        if groups > 1 and groups * each >= SERIAL_WORK:
            self.across(self.width, configured, SERIAL_WORK)
        else:
            configure(rows)
            self.across(self.width, body)
            amx("tilerelease")

    # -- what products read ----------------------------------------------------------------------------------------

    def inputs(self, most: int) -> Buffer:
        """For inputs in bf16; zeros where there are none."""
        inputs = T.alloc_buffer((most, whole_steps(self.cells.features)), "uint16")
        with T.serial(most) as i:
            fill(inputs, [i], self.cells.features)
        return inputs

    def round_input(self, inputs: Buffer, i: Expr, sequence: Expr, time: Expr) -> None:
        """What one sequence reads in one step."""

        def part(at: Expr, width: int) -> None:
            value = load(self.operands.x, [sequence, time, at], width)
            store(
                inputs,
                rounded(value, self.target) if dtype_of(value) == "float32" else bits_as("uint16", value),
                [i, at],
            )

        vector_loop(self.cells.features, STRIP, part)

    def rounded_state(self, task: Task, most: int) -> Buffer:
        """The first state in bf16, one half of two; zeros where there are no units."""
        narrow = T.alloc_buffer((2, most, whole_steps(self.cells.hidden)), "uint16")
        with T.serial(task.rows) as i:
            for half in range(2):
                fill(narrow, [half, i], self.cells.hidden)
            with T.serial(self.blocks) as block:
                store(
                    narrow,
                    rounded(load(task.state[0], [0, i, block * STRIP], STRIP), self.target),
                    [0, i, block * STRIP],
                )
        return narrow

    def keep(self, narrow: Buffer, half: Expr, row: Expr, unit: Expr, h: Expr) -> None:
        """What there is of a block of units, in bf16: zeros of weights times zeros are zeros, times what is not finite they are not."""
        some, value = self.cells.hidden % STRIP, share(rounded(h, self.target))
        if some == 0:
            store(narrow, value, [half, row, unit])
            return
        with T.If(unit + STRIP <= self.cells.hidden):
            with T.Then():
                store(narrow, value, [half, row, unit])
            with T.Else():
                store(narrow, first_lanes(value, some), [half, row, unit])

    # -- tiles -------------------------------------------------------------------------------------------------------

    def slots(self, blocks: int) -> list[tuple[int, int]]:
        """Of each tile of sums the block and the slot, see `Cells.slots`."""
        return [(b, slot) for b in range(blocks) for slot in range(self.cells.slots)]

    def scratch(self) -> Buffer:
        """For the sums of a strip of sequences."""
        return T.alloc_buffer((STRIP, self.width, self.cells.slots * STRIP), "float32")

    def begin_sums(self, block: Expr, blocks: int) -> None:
        """The biases, the same for all sequences."""
        last = self.cells.gates - 1
        for tile, (b, slot) in enumerate(self.slots(blocks)):
            bias = self.operands.bias[1 if self.cells.kind == "gru" and slot == last else 0]
            place = bias[block + b, 0, min(slot, last) * STRIP]
            amx("tileloadd64", tile, tirx.address_of(place), tirx.const(0, "int64"))

    def add(
        self, rows: Buffer, where: list[Expr], weights: Buffer, block: Expr, blocks: int, slot_of_last: int
    ) -> None:
        """Products of a strip of rows; those by the last gate go into the slot that is given."""
        slots, gates, (_, k, wide, _) = self.slots(blocks), self.cells.gates, weights.shape
        w = flat_view(weights, (self.blocks, k, wide), "uint32")
        with T.serial(int(k) // STRIP) as step:
            amx("tileloadd64", ROWS, tirx.address_of(rows[(*where, step * STEP)]), pitch(rows))
            for b in range(blocks):
                for gate in range(gates):
                    tile = slots.index((b, slot_of_last if gate == gates - 1 else gate))
                    part = WEIGHTS + tile % 2
                    amx("tileloadd64", part, tirx.address_of(w[block + b, step * STRIP, gate * STRIP]), pitch(w))
                    amx("tdpbf16ps", tile, ROWS, part)

    def move(self, instruction: str, buffer: Buffer, where: list[Expr], blocks: int) -> None:
        """Loads or stores tiles of sums, from or to the rows and blocks of a buffer."""
        row, block = where
        apart = tirx.const(4 * int(buffer.shape[1] * buffer.shape[2]), "int64")
        for tile, (b, slot) in enumerate(self.slots(blocks)):
            amx(instruction, tile, tirx.address_of(buffer[row, block + b, slot * STRIP]), apart)

    def add_state(
        self, task: Task, place: Place, narrow: Buffer, sums: Buffer, row: Expr, count: Expr, block: Expr, blocks: int
    ) -> None:
        """Products of the state, then the next state of these sequences and units."""
        self.add(narrow, [place.old, row], self.operands.w_hh, block, blocks, self.cells.gates - 1)
        self.move("tilestored64", sums, [0, 0], blocks)
        self.update(task, place, sums, row, count, block, blocks, partial(self.keep, narrow, place.new))


def configure(strip: Expr) -> None:
    """Sets the tiles up: sums and rows of so many sequences, weights of 16 pairs."""
    set_up_tiles([4 * STRIP] * 8, [STRIP if tile >= WEIGHTS else 0 for tile in range(8)], strip)


def fill(buffer: Buffer, where: list[Expr], first: int) -> None:
    """Zeros from some element of a row on."""
    width = int(buffer.shape[-1])
    if first < width:
        store(buffer, const(0, "uint16", width - first), [*where, first])


def pitch(buffer: Buffer) -> Expr:
    """Bytes from one row of the last but one axis to the next."""
    return tirx.const(int(buffer.shape[-1]) * bits(buffer_dtype(buffer)) // 8, "int64")


def rounded(x: Expr, target: TargetInfo) -> Expr:
    """The bits of the nearest bf16, ties to even; of no number a quiet one. An instruction that does it takes subnormal numbers for zeros,
    as products do."""
    if lanes_of(x) == STRIP and "avx512bf16" in target.features:
        return T.call_llvm_pure_intrin(f"uint16x{STRIP}", "llvm.x86.avx512bf16.cvtneps2bf16.512", x)
    bits_of = share(bits_as("uint32", x))
    odd = (bits_of >> const_like(16, bits_of)) & const_like(1, bits_of)
    up = (bits_of + (odd + const_like(0x7FFF, bits_of))) >> const_like(16, bits_of)
    return cast_to("uint16", select(is_nan(x), const_like(0x7FC0, bits_of), up))
