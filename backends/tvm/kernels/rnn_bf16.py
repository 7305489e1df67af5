"""Recurrent layers whose products are of bf16 by bf16, by the matrix unit of x86 processors (AMX)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import Buffer, BufferSpec, Expr
from mlec.backends.tvm.kernels.gemm_bf16 import RATE, STRIP
from mlec.backends.tvm.kernels.int8 import address, amx
from mlec.backends.tvm.kernels.rnn_layer import Cells, Layer, Operands, Place, pack_recurrent
from mlec.backends.tvm.kernels.schedule import even
from mlec.backends.tvm.kernels.tile import bits, buffer_dtype, first_lanes, flat_view, vector_loop
from mlec.backends.tvm.kernels.vector import (
    bits_as,
    cast_to,
    const,
    const_like,
    dtype_of,
    int64,
    is_nan,
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
    vectors take at least 64 x 55 cycles by either. So 3.7 times is the most that can be hoped for. Measured on one core, as multiples of
    float32: 0.9 for one sequence (weights are read once for each step, not for six), 1.8 for 4, 2.3 for 16 or 1024, 2.5 for 64; with 32
    inputs and 128 units 1.3, 1.9, 2.6, 3.4 and 3.1; with 256 and 256, whose weights of float32 exceed L2, 1.4, 4, 4.7, 3.9 and 4.1.

    Attributes:
        operands: x of float32 or bf16, matrices packed by `pack_tiled`.
    """

    rate = RATE

    @property
    def width(self) -> int:
        """Blocks of a tile."""
        return even(self.blocks, HELD // self.cells.slots)

    def all_rows(self) -> None:
        self.share_out(TASK_ROWS)

    def task(self, first: Expr, rows: Expr, most: int) -> None:
        c = self.cells
        strip = share(tirx.min(rows, STRIP))
        configure(strip)
        task = self.begin(first, rows, most)
        inputs = T.alloc_buffer((most, whole_steps(c.features)), "uint16")
        narrow = T.alloc_buffer((2, most, whole_steps(c.hidden)), "uint16")
        with T.serial(rows) as i:
            fill(inputs, [i], c.features)
            for half in range(2):
                fill(narrow, [half, i], c.hidden)
            with T.serial(self.blocks) as block:
                store(narrow, rounded(load(task.state[0], [0, i, block * STRIP], STRIP)), [0, i, block * STRIP])
        sums = T.alloc_buffer((STRIP, self.width, c.slots * STRIP), "float32")

        def strips(place: Place, block: Expr, blocks: int) -> None:
            def keep(row: Expr, unit: Expr, h: Expr) -> None:
                """What there is of a block: zeros of weights times zeros are zeros, times what is not finite they are not."""
                some, value = c.hidden % STRIP, share(rounded(h))
                if some == 0:
                    store(narrow, value, [place.new, row, unit])
                    return
                with T.If(unit + STRIP <= c.hidden):
                    with T.Then():
                        store(narrow, value, [place.new, row, unit])
                    with T.Else():
                        store(narrow, first_lanes(value, some), [place.new, row, unit])

            with T.serial(-(-rows // STRIP)) as number:  # the last begins early enough to be a whole one
                row = share(tirx.min(number * STRIP, rows - strip))
                self.products(inputs, narrow, place, sums, row, block, blocks)
                self.update(task, place, sums, row, strip, block, blocks, keep)

        with T.serial(c.steps) as turn:
            place = self.place(turn)
            with T.serial(rows) as i:
                vector_loop(c.features, STRIP, partial(self.round_inputs, inputs, i, first + i, place.time))
            self.across(self.width, lambda block, blocks: strips(place, block, blocks))
            self.give(task, place)
        self.end(task)
        amx("tilerelease")

    def round_inputs(self, inputs: Buffer, i: Expr, sequence: Expr, time: Expr, at: Expr, width: int) -> None:
        """Some numbers of one input."""
        value = load(self.operands.x, [sequence, time, at], width)
        store(inputs, rounded(value) if dtype_of(value) == "float32" else bits_as("uint16", value), [i, at])

    def products(
        self, inputs: Buffer, narrow: Buffer, place: Place, sums: Buffer, row: Expr, block: Expr, blocks: int
    ) -> None:
        """The sums of a strip of sequences and some blocks of units."""
        c, last = self.cells, self.cells.gates - 1
        slots = [(b, slot) for b in range(blocks) for slot in range(c.slots)]
        for tile, (b, slot) in enumerate(slots):
            bias = self.operands.bias[1 if c.kind == "gru" and slot == last else 0]
            place_of = bias[block + b, 0, min(slot, last) * STRIP]
            amx("tileloadd64", tile, tirx.address_of(place_of), tirx.const(0, "int64"))
        into = c.slots - 1  # what the input gives the last gate

        def add(rows: Buffer, where: list[Expr], weights: Buffer, slot_of_last: int) -> None:
            _, k, wide, _ = weights.shape
            w = flat_view(weights, (self.blocks, k, wide), "uint32")
            with T.serial(int(k) // STRIP) as step:
                amx("tileloadd64", ROWS, tirx.address_of(rows[(*where, step * STEP)]), pitch(rows))
                for b in range(blocks):
                    for gate in range(c.gates):
                        tile = slots.index((b, slot_of_last if gate == last else gate))
                        part = WEIGHTS + tile % 2
                        amx("tileloadd64", part, tirx.address_of(w[block + b, step * STRIP, gate * STRIP]), pitch(w))
                        amx("tdpbf16ps", tile, ROWS, part)

        add(inputs, [row], self.operands.w_ih, into)
        add(narrow, [place.old, row], self.operands.w_hh, last)
        for tile, (b, slot) in enumerate(slots):
            amx(
                "tilestored64",
                tile,
                tirx.address_of(sums[0, b, slot * STRIP]),
                tirx.const(4 * self.width * c.slots * STRIP, "int64"),
            )


def configure(strip: Expr) -> None:
    """Sets the tiles up, for the thread that runs this: sums and rows of so many sequences, weights of 16 pairs."""
    config = np.zeros(64, np.uint8)
    config[0] = 1
    for tile in range(8):
        config[16 + 2 * tile] = 4 * STRIP
        config[48 + tile] = STRIP if tile >= WEIGHTS else 0
    words = [tirx.const(int(word), "int64") for word in config.view(np.int64)]
    words[6] = words[6] + int64(strip) * tirx.const(0x010101010101, "int64")  # rows of tiles 0 to 5
    described = T.alloc_buffer((len(words),), "int64")
    for i, word in enumerate(words):
        T.buffer_store(described, word, [i])
    amx("ldtilecfg", address(described, 0))


def fill(buffer: Buffer, where: list[Expr], first: int) -> None:
    """Zeros from some element of a row on."""
    width = int(buffer.shape[-1])
    if first < width:
        store(buffer, const(0, "uint16", width - first), [*where, first])


def pitch(buffer: Buffer) -> Expr:
    """Bytes from one row of the last but one axis to the next."""
    return tirx.const(int(buffer.shape[-1]) * bits(buffer_dtype(buffer)) // 8, "int64")


def rounded(x: Expr) -> Expr:
    """The bits of the nearest bf16, ties to even; of no number a quiet one."""
    bits_of = share(bits_as("uint32", x))
    odd = (bits_of >> const_like(16, bits_of)) & const_like(1, bits_of)
    up = (bits_of + (odd + const_like(0x7FFF, bits_of))) >> const_like(16, bits_of)
    return cast_to("uint16", select(is_nan(x), const_like(0x7FC0, bits_of), up))
