"""Products of narrow numbers: sums in 32 bits of u8 times i8 by whatever the processor has for them, of bf16 times bf16 by AMX or in
vectors that multiply pairs (AVX512_BF16).

Four products of bytes along the summed axis make one step: a *quad* of the first operand, 4 bytes in a row of memory, meets the quads of
many columns of the weights. Of bf16 a quad holds two numbers, and everything else is the same. Weights are packed so that this is a plain
load, the same for every processor: ``[column block of 16][segment][quad][16 columns][4]``. So a vector of 512 bits is one quad of 16
columns (VNNI), and 16 quads of a block are a tile of 1 KB (AMX).

A row of the first operand need not lie in one piece: it is some *segments* of equal length, each in one piece. That of a matrix product is
one; that of a convolution over an image with its channels last is a row of its window: ``taps * channels`` bytes, wherever the window
lies. So a convolution is a product whose rows overlap in memory, and is never unfolded.

A segment is read in whole quads, and by AMX in whole steps of up to 16 quads: the bytes beyond its end meet weights that are zero. Where
they could lie beyond the operand, the template works on a copy. Floats beyond the end may be NaN, which is NaN times zero as well: segments
of bf16 are whole steps.

The zero point of the first operand is a constant for each column: ``sum((a - z) w) = sum(a w) - z sum(w)``. Sums begin with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlec.backends.tvm.compat import T, tirx
from mlec.backends.tvm.kernels.epilogue import Buffer, Dim, Expr
from mlec.backends.tvm.kernels.result import Result
from mlec.backends.tvm.kernels.tile import UNROLL, buffer_dtype, copy_run, first_lanes, unrolled
from mlec.backends.tvm.kernels.vector import (
    LINE,
    Cell,
    broadcast,
    cast_to,
    const,
    int64,
    load,
    prefetch,
    ramp,
    share,
    store,
    wide,
)
from mlec.backends.tvm.target import TargetInfo, architecture_of
from mlec.ops.windows import Geometry

QUAD = 4
"""Products of one step."""
BLOCK = 16
"""Columns of a block of packed weights."""
STRIP = 16
"""Rows of a tile of AMX, at most; and quads of a step."""
SLACK = 64
"""Bytes behind a copy that may be read."""


@dataclass(frozen=True)
class Packed:
    """The weights of a product in blocks of columns.

    Attributes:
        groups: products side by side, each with columns and a part of the rows of its own.
        columns: of a group.
        segments, length: of a row: how many, and numbers of each.
        item: bytes of a number: 1, or 2 of bf16.
    """

    groups: int
    columns: int
    segments: int
    length: int
    item: int = 1

    @property
    def together(self) -> int:
        """Numbers of a quad."""
        return QUAD // self.item

    @property
    def sums(self) -> str:
        """Dtype of the sums."""
        return "int32" if self.item == 1 else "float32"

    @property
    def read(self) -> int:
        """Quads of a segment that hold any of it; at least one."""
        return max(1, -(-self.length // self.together))

    @property
    def step(self) -> int:
        """Quads of a step of AMX: 12 to 16 that divide a segment, or steps that are as equal as can be; of bf16 as many as divide it."""
        least = 12 if self.item == 1 else 1
        exact = [quads for quads in range(STRIP, least - 1, -1) if self.read % quads == 0]
        return exact[0] if exact else -(-self.read // -(-self.read // STRIP))

    @property
    def quads(self) -> int:
        """Quads of a packed segment: whole steps."""
        return -(-self.read // self.step) * self.step

    @property
    def blocks(self) -> int:
        """Blocks of a group."""
        return -(-self.columns // BLOCK)

    @property
    def terms(self) -> int:
        """Products of a sum."""
        return self.segments * self.length

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the packed array."""
        return self.groups * self.blocks, self.segments, self.quads, BLOCK * self.together

    @property
    def nbytes(self) -> int:
        """Of the packed array."""
        return math.prod(self.shape) * self.item

    @property
    def block_bytes(self) -> int:
        """Of a packed block of columns."""
        return self.segments * self.quads * BLOCK * QUAD

    def pack(self, weights: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """From ``[segments * length (in any number of axes), groups * columns]``; zeros in what is not there."""
        given = weights.reshape(self.segments, self.length, self.groups, self.columns)
        padded = np.zeros((self.segments, self.quads * self.together, self.groups, self.blocks * BLOCK), weights.dtype)
        padded[:, : self.length, :, : self.columns] = given
        split = padded.reshape(self.segments, self.quads, self.together, self.groups, self.blocks, BLOCK)
        return np.ascontiguousarray(split.transpose(3, 4, 0, 1, 5, 2)).reshape(self.shape)

    def offsets(self, weights: npt.NDArray[np.int8], zero_point: int) -> npt.NDArray[np.int32]:
        """What the sum of each packed column begins with."""
        sums = weights.reshape(self.terms, self.groups, self.columns).sum(axis=0, dtype=np.int32)
        padded = np.zeros((self.groups, self.blocks * BLOCK), np.int32)
        padded[:, : self.columns] = -zero_point * sums
        return padded.reshape(-1)


PAIRS = "mlec_add_pairs"
PAIRS_CODE = f"""
define linkonce_odr hidden <16 x float> @{PAIRS}(<16 x float> %sums, <16 x i32> %a, <16 x i32> %b) alwaysinline nounwind {{
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %added = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %sums, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %added
}}
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
"""
"""A function of LLVM's that becomes one instruction: this takes vectors of bfloat, which TVM makes integers of 16 bits."""


@dataclass(frozen=True)
class Dots:
    """How four products of bytes, or two of bf16, are added to each lane of a vector of sums.

    Attributes:
        kind: ``vnni``: one instruction; ``pairs``: x86 without it, two multiplications of 16-bit numbers whose sums of pairs are exact
            in 32 bits (the one of u8 by i8 saturates in 16); ``usdot``: one instruction of aarch64; ``widened``: four multiplications
            in 32 bits; ``bf16``: one instruction for two products of such floats, which takes subnormal numbers for zeros.
        lanes: of a vector of sums.
    """

    kind: str
    lanes: int

    @staticmethod
    def of(target: TargetInfo) -> Dots:
        lanes, features = target.lanes(32), target.features
        if architecture_of(target.triple) == "x86_64":
            short = lanes < 16 and ("avxvnni" in features or {"avx512vnni", "avx512vl"} <= features)
            if short or (lanes == 16 and "avx512vnni" in features):
                return Dots("vnni", lanes)
            if lanes < 16 or "avx512bw" in features:
                return Dots("pairs", lanes)
        return Dots("usdot" if "i8mm" in features and "neon" in features else "widened", lanes)

    @staticmethod
    def of_bf16(target: TargetInfo) -> Dots | None:
        """Those of bf16, on a processor where they take less time than products of float32; None elsewhere.

        AMD's cores from Zen 4 on begin as many of these instructions in a cycle as multiply-adds of float32, so twice the products: on Zen
        4 at 3.67 GHz one of 512 bits in 0.273 ns each, with a result after 6 cycles in place of 4. Those of Intel begin half as many, no
        more products than of float32, and have AMX for bf16 where that is worth anything: the name decides, not the instruction set.
        """
        amd = target.mcpu.startswith("znver")
        return Dots("bf16", STRIP) if amd and "avx512bf16" in target.features and target.lanes(32) == STRIP else None

    def in_program(self) -> AbstractContextManager[Any]:
        """What is built within may call `add`."""
        return T.attr(0, "pragma_import_llvm", PAIRS_CODE) if self.kind == "bf16" else nullcontext()

    @property
    def sums(self) -> str:
        """Dtype of the sums."""
        return "float32" if self.kind == "bf16" else "int32"

    @property
    def parts(self) -> int:
        """Vectors that a quad becomes."""
        return {"vnni": 1, "usdot": 1, "bf16": 1, "pairs": 2, "widened": 4}[self.kind]

    @property
    def products(self) -> int:
        """Products of a vector instruction that takes the time of a multiply-add of float32."""
        return self.lanes * QUAD // self.parts

    def weights(self, vector: Expr) -> list[Expr]:
        """The quads of as many columns as there are lanes, as `add` wants them."""
        if self.kind in ("vnni", "usdot"):
            return [share(vector)]
        if self.kind == "bf16":
            return [share(tirx.reinterpret(f"int32x{self.lanes}", vector))]
        if self.kind == "pairs":
            whole = share(tirx.reinterpret(f"int16x{self.lanes * 2}", vector))
            eight = const(8, "int16", self.lanes * 2)
            return [share((whole << eight) >> eight), share(whole >> eight)]
        whole = share(tirx.reinterpret(f"int32x{self.lanes}", vector))
        top = const(24, "int32", self.lanes)
        return [share((whole << const(24 - 8 * j, "int32", self.lanes)) >> top) for j in range(QUAD)]

    def row(self, quad: Expr) -> list[Expr]:
        """A quad of the first operand, an i32."""
        if self.kind in ("vnni", "usdot"):
            return [share(tirx.reinterpret(f"uint8x{self.lanes * QUAD}", share(broadcast(quad, self.lanes))))]
        if self.kind == "bf16":
            return [share(broadcast(quad, self.lanes))]
        quad = share(tirx.reinterpret("uint32", quad))
        if self.kind == "pairs":
            halves = [quad & const(0x00FF00FF, "uint32"), (quad >> const(8, "uint32")) & const(0x00FF00FF, "uint32")]
            return [
                share(tirx.reinterpret(f"int16x{self.lanes * 2}", share(broadcast(share(half), self.lanes))))
                for half in halves
            ]
        return [
            share(
                broadcast(share(cast_to("int32", (quad >> const(8 * j, "uint32")) & const(255, "uint32"))), self.lanes)
            )
            for j in range(QUAD)
        ]

    def taps(self, values: Sequence[Expr]) -> list[Expr]:
        """Up to four vectors of bytes, widened to 32 bits, as the quads of a row of which every lane has one of its own."""
        if self.kind == "widened":
            return [*values]
        shifted = [
            value if not i else share(value << const(8 * i, "int32", self.lanes)) for i, value in enumerate(values)
        ]
        if self.kind == "pairs":
            wide = [share(value << const(16, "int32", self.lanes)) for value in values[2:]]
            halves = [share(value | wide[i]) if i < len(wide) else value for i, value in enumerate(values[:2])]
            return [share(tirx.reinterpret(f"int16x{self.lanes * 2}", half)) for half in halves]
        word = shifted[0]
        for value in shifted[1:]:
            word = word | value
        return [share(tirx.reinterpret(f"uint8x{self.lanes * QUAD}", share(word)))]

    def add(self, cell: Cell, row: Sequence[Expr], weights: Sequence[Expr]) -> None:
        """One step of a vector of sums."""
        wide = f"int32x{self.lanes}"
        for a, w in zip(row, weights, strict=False):  # taps that are not there have no part of their own
            if self.kind == "vnni":
                cell.set(T.call_llvm_pure_intrin(wide, f"llvm.x86.avx512.vpdpbusd.{self.lanes * 32}", cell.value, a, w))
            elif self.kind == "bf16":
                cell.set(tirx.call_pure_extern(f"float32x{self.lanes}", PAIRS, cell.value, a, w))
            elif self.kind == "usdot":
                # The intrinsic takes the unsigned operand first.
                cell.set(T.call_llvm_pure_intrin(wide, "llvm.aarch64.neon.usdot", cell.value, a, w))
            elif self.kind == "pairs":
                name = {4: "sse2.pmadd.wd", 8: "avx2.pmadd.wd", 16: "avx512.pmaddw.d.512"}[self.lanes]
                cell.set(cell.value + T.call_llvm_pure_intrin(wide, f"llvm.x86.{name}", a, w))
            else:
                cell.set(cell.value + a * w)


AMX_PRODUCTS = 20
"""Products by AMX that take the time of one of float32, in large kernels; the tiles alone could do 30."""


def work_of(products: int, vectors: int, dots: Dots, amx: bool) -> int:
    """The work (see `SERIAL_WORK`) of so many products of bytes (one of bf16 counts as two), whose sums are finished as so many vectors."""
    return products * 16 // (16 * AMX_PRODUCTS if amx else dots.products) + 200 * vectors


def has_amx(target: TargetInfo) -> bool:
    """Whether there are tiles of bytes."""
    return {"amx-int8", "amx-tile"} <= target.features


def byte_products(target: TargetInfo) -> float:
    """How many products of bytes take the time of one of float32, as `work_of` counts them."""
    return AMX_PRODUCTS if has_amx(target) else QUAD / Dots.of(target).parts


def quad_at(buffer: Buffer, position: Expr) -> Expr:
    """Four bytes as an i32."""
    return tirx.reinterpret("int32", load(buffer, [position], QUAD))


@dataclass(frozen=True)
class Rows:
    """Rows of the first operand.

    Attributes:
        buffer: flat.
        pitch: from a row to the next one of a strip.
        segment: position of a segment in its row, given its number.
    """

    buffer: Buffer
    pitch: int
    segment: Callable[[Expr], Expr]


@dataclass(frozen=True)
class Multiplier:
    """Tiles of a product.

    Attributes:
        w, offsets: what `Packed` makes, both as one axis, the weights as bytes. Sums of bf16 have no offsets, and begin with zero.
    """

    w: Buffer
    offsets: Buffer | None
    packed: Packed
    dots: Dots

    @property
    def in_block(self) -> int:
        """Vectors of a block of columns."""
        return BLOCK // self.dots.lanes

    @property
    def vectors(self) -> int:
        """Vectors of a group that hold any of its columns."""
        return -(-self.packed.columns // self.dots.lanes)

    def sums(self, rows: Rows, start: Expr, height: int, first: Expr, count: int) -> list[list[Expr]]:
        """The sums of ``height`` rows from ``start`` on, for ``count`` vectors of columns from vector ``first`` of all groups on.

        A step loads a quad of each row and a vector of weights for each vector of columns. With VNNI, 6 rows and 4 vectors: 10 loads for
        24 instructions of 64 products, of which two go in a cycle beside two loads.
        """
        lanes, quads = self.dots.lanes, self.packed.quads
        columns = [self.column(first + v) for v in range(count)]
        first_values = [0 if self.offsets is None else load(self.offsets, [at], lanes) for at, _ in columns]
        sums = [[Cell(self.dots.sums, lanes, value) for value in first_values] for _ in range(height)]

        def segment(turn: Expr) -> None:
            number = turn // turns
            panels = [share(panel + number * (quads * BLOCK * QUAD)) for _, panel in columns]
            begin = share(wide(start + rows.segment(number)))  # the rows are then constants from it: one register

            def step(quad: Expr) -> None:
                weights = [
                    self.dots.weights(load(self.w, [panel + quad * (BLOCK * QUAD)], lanes * QUAD)) for panel in panels
                ]
                at = begin + wide(quad) * QUAD
                for i, cells in enumerate(sums):
                    row = self.dots.row(share(quad_at(rows.buffer, at + i * rows.pitch)))
                    for cell, vector in zip(cells, weights, strict=True):
                        self.dots.add(cell, row, vector)

            if apart == UNROLL:
                unrolled(self.packed.read, UNROLL, step)
            else:
                for offset in range(apart):
                    step(turn % turns * apart + offset)

        apart = self._steps_apart(rows.pitch)
        turns = self.packed.read // apart if apart < UNROLL else 1
        if self.packed.segments * turns == 1:
            segment(0)
        else:
            with T.serial(self.packed.segments * turns) as turn:
                segment(turn)
        return [[cell.value for cell in row] for row in sums]

    def _steps_apart(self, pitch: int) -> int:
        """Steps of a turn of the loop. Rows that overlap by whole quads have the same ones at different steps: LLVM, which sees that in one
        turn, would hold them for later, beyond what there are registers for (224 x 224 x 3 by 7 x 7, stride 2: 2.2 times as long)."""
        again = math.lcm(pitch, QUAD) // QUAD
        if again >= min(UNROLL, self.packed.read):
            return UNROLL
        return max(steps for steps in range(1, again + 1) if self.packed.read % steps == 0)

    def column(self, vector: Expr) -> tuple[Expr, Expr]:
        """Where a vector of columns begins: its column among the packed ones, and its first weight."""
        lanes, block, part = self.dots.lanes, vector // self.in_block, vector % self.in_block
        return vector * lanes, block * self.packed.block_bytes + part * (lanes * QUAD)


# -- AMX ---------------------------------------------------------------------------------------------------------------------

HELD = 2
"""Strips of rows, and blocks of columns, of a tile: four tiles of sums, two of each operand, of the eight that there are."""


def amx(name: str, *arguments: Expr) -> None:
    """An instruction; numbers are those of tiles."""
    values = [tirx.const(a, "int8") if isinstance(a, int) else a for a in arguments]
    T.evaluate(tirx.call_llvm_intrin("void", f"llvm.x86.{name}", *values))


def tdpbusd(sums: int, rows: int, weights: int) -> None:
    """Adds the products of 16 rows with 16 columns, 64 to a sum."""
    amx("tdpbusd", sums, rows, weights)


def tdpbf16ps(sums: int, rows: int, weights: int) -> None:
    """The same of bf16, 32 to a sum."""
    amx("tdpbf16ps", sums, rows, weights)


def in_parts(finish: Callable[[Expr], None], rows: int, ready: Expr) -> Callable[[Expr, int], None]:
    """The sums of so many rows, finished part by part while tiles multiply; nothing where none are ``ready`` yet. See `Tiles.sums`."""
    waiting = share(tirx.Select(ready, rows, 0))

    def part(step: Expr, steps: int) -> None:
        some = -(-rows // steps)
        with T.serial(tirx.max(0, tirx.min(some, waiting - step * some))) as i:
            finish(share(step * some + i))

    return part


def address(buffer: Buffer, position: Expr) -> Expr:
    """Of an element of a flat buffer."""
    return tirx.address_of(buffer[position])


def set_up_tiles(widths: Sequence[int], rows: Sequence[int], strip: Expr) -> None:
    """Sets up the eight tiles of the thread that runs this.

    Args:
        widths: bytes of a row of each.
        rows: of each; of the first six, these are added to ``strip``, which may be an expression.
    """
    config = np.zeros(64, np.uint8)
    config[0] = 1
    config[16:32:2], config[48:56] = widths, rows
    words = [tirx.const(int(word), "int64") for word in config.view(np.int64)]
    words[6] = words[6] + int64(strip) * tirx.const(0x010101010101, "int64")
    described = T.alloc_buffer((len(words),), "int64")
    for i, word in enumerate(words):
        T.buffer_store(described, word, [i])
    amx("ldtilecfg", address(described, 0))


@dataclass(frozen=True)
class Tiles:
    """The same by tiles: sums in tiles 0 to 3, rows in 4 and 5, weights in 6 and 7.

    Attributes:
        strip: rows of a tile, at most 16.
        held: where the sums go on their way to vectors: ``[2 * 16 rows, 2 * 16 columns]``, as one axis. It stays in L1.
    """

    multiplier: Multiplier
    strip: Expr
    held: Buffer

    @staticmethod
    def begin(multiplier: Multiplier, strip: Expr) -> Tiles:
        """Sets the tiles up, for the thread that runs this; `end` frees them. ``strip`` may be an expression."""
        quads = multiplier.packed.step
        set_up_tiles([*[BLOCK * QUAD] * 4, *[quads * QUAD] * 2, *[BLOCK * QUAD] * 2], [*[0] * 6, quads, quads], strip)
        return Tiles(multiplier, strip, T.alloc_buffer((HELD * STRIP * HELD * BLOCK,), multiplier.packed.sums))

    def end(self) -> None:
        """Without this, every switch of the thread would save the tiles."""
        amx("tilerelease")

    def lines_ahead(self, count: int, sharing: int) -> int:
        """Lines of the next panel of ``count`` blocks that each step of a tile asks for, where so many tiles use a panel."""
        return -(-count * self.multiplier.packed.step // sharing)

    def fetch_ahead(self, panel: Expr, count: int, done: Expr, lines: int) -> None:
        """Asks for the next lines, when so many steps on a panel are ``done``, of the one behind it: so it is in L2 when it is needed."""
        _, segments, quads, _ = self.multiplier.packed.shape
        whole, line = count * segments * quads, BLOCK * QUAD
        place = panel + (whole + tirx.min(done * lines, whole - lines)) * line
        for i in range(lines):
            prefetch(self.multiplier.w, place + i * line)

    def sums(
        self,
        rows: Rows,
        starts: Sequence[Expr],
        first: Expr,
        count: int,
        ahead: tuple[Expr, int] | None = None,
        meanwhile: Callable[[Expr, int], None] | None = None,
    ) -> None:
        """Those of strips that begin at ``starts``, for ``count`` blocks of columns from the block ``first`` of all groups on, to ``held``.

        A step of 64 products loads 4 KB for four instructions of 16 cycles each: 64 lines, of which L1 gives two in a cycle. So 64 cycles
        are predicted; measured are 79 with both operands in L1, 90 with one from L2, and 140 to 300 with both from there, which gives 14 to
        28 bytes in a cycle. Asking for lines ahead of their loads makes it slower. To finish 32 x 32 sums takes 830 instructions, 250
        cycles against 770 of 12 steps: by ``meanwhile`` they go beside each other, which is worth 12 to 22 % of a product.

        Args:
            rows, starts, first, count: which.
            ahead: number of the tile among those that share the panel of weights, and the lines that each of its steps asks for.
            meanwhile: other work, which vectors do while tiles multiply: given the number of a step, and how many there are.
        """
        packed, (_, segments, quads, _), width = self.multiplier.packed, self.multiplier.packed.shape, BLOCK * QUAD
        apart, line = tirx.const(rows.pitch, "int64"), tirx.const(width, "int64")
        panels = [share((first + b) * packed.block_bytes) for b in range(count)]
        cells = [(s, b, HELD * s + b) for s in range(len(starts)) for b in range(count)]
        multiply, offsets = tdpbusd if packed.item == 1 else tdpbf16ps, self.multiplier.offsets
        for _, b, tile in cells:
            if offsets is None:
                amx("tilezero", tile)
            else:
                amx("tileloadd64", tile, address(offsets, (first + b) * BLOCK), tirx.const(0, "int64"))
        with T.serial(segments) as number:
            begins = [share(start + rows.segment(number)) for start in starts]
            with T.serial(quads // packed.step) as step:
                if ahead is not None:
                    done = (ahead[0] * segments + number) * (quads // packed.step) + step
                    self.fetch_ahead(panels[0], count, done, ahead[1])
                for b, panel in enumerate(panels):
                    place = panel + (number * quads + step * packed.step) * width
                    amx("tileloadd64", 6 + b, address(self.multiplier.w, place), line)
                for s, begin in enumerate(begins):
                    place = begin + step * (packed.step * QUAD)
                    amx("tileloadd64", 4 + s, address(rows.buffer, place), apart)
                    for b in range(count):
                        multiply(HELD * s + b, 4 + s, 6 + b)
                if meanwhile is not None:
                    meanwhile(number * (quads // packed.step) + step, segments * (quads // packed.step))
        for s, b, tile in cells:
            place = s * STRIP * (HELD * BLOCK) + b * BLOCK
            amx("tilestored64", tile, address(self.held, place), tirx.const(HELD * BLOCK * 4, "int64"))

    def row(self, number: Expr, count: int) -> list[Expr]:
        """The sums of a row (those of the second strip from 16 on) as ``count`` blocks in vectors."""
        lanes = self.multiplier.dots.lanes
        return [load(self.held, [number * (HELD * BLOCK) + v * lanes], lanes) for v in range(count * BLOCK // lanes)]


# -- images ---------------------------------------------------------------------------------------------------------------------


def copied_rows(
    x: Buffer, at: tuple[Expr, Expr], shape: Sequence[Dim], geometry: Geometry, extent: tuple[int, int], padding: int,
    blocks: int = 1,
) -> Buffer:  # fmt: skip
    """A copy, as one axis, of part of an image with its channels last, padding included; `SLACK` bytes follow.

    Args:
        x: flat bytes, of the shape ``[n, h, w, c]``.
        at: the image, and the first row to copy, counted with padding.
        extent: rows and columns to copy; the columns from the first one on, counted with padding.
        blocks: where channels lie in several, ``[n, blocks, h, w, c]``; so they do in the copy.
    """
    (_, h, w, c), (top, left), (height, width), (image, first) = shape, geometry.before, extent, at
    before, pitch = min(left, width), width * c
    inside = min(w, width - before)
    copy = T.alloc_buffer((blocks * height * pitch + SLACK,), "uint8")
    with T.grid(blocks, height) as (block, row):
        source, to = share(first + row - top), (block * height + row) * pitch
        with T.If(tirx.And(source >= 0, source < h)):
            with T.Then():
                begin = share(((image * blocks + block) * h + source) * (w * c))
                copy_run(copy, [], to, before * c, LINE, None, padding)
                copy_run(copy, [], to + before * c, inside * c, LINE, lambda i, n: load(x, [begin + i], n))
                copy_run(copy, [], to + (before + inside) * c, pitch - (before + inside) * c, LINE, None, padding)
            with T.Else():
                copy_run(copy, [], to, pitch, LINE, None, padding)
    return copy


# -- results -----------------------------------------------------------------------------------------------------------------


def put(
    result: Result, where: tuple[Expr, ...], at: Expr, group: Expr, first: Expr, packed: Packed, values: Sequence[Expr]
) -> None:
    """Finish vectors of neighbouring columns of one row and store those columns that exist.

    Args:
        result: its buffer is ``[rows, groups * columns]``.
        where: indices of the row in the shape that the epilogue knows.
        at: number of the row.
        group: of the columns.
        first: the first vector, counted in its group.
    """
    lanes, n = int(str(values[0].ty.dtype).rpartition("x")[2]), packed.columns

    def write(value: Expr, column: Expr, width: int) -> None:
        place = group * n + column
        value = share(value if width == lanes else first_lanes(value, width))
        finished = result.epilogue.apply(value, (*where, ramp(place, width)), result.extra)
        store(result.buffer, cast_to(buffer_dtype(result.buffer), finished), [at, place])

    for v, value in enumerate(values):
        column = (first + v) * lanes
        if n % lanes == 0:
            write(value, column, lanes)
        elif isinstance(column, int):
            if column < n:
                write(value, column, min(lanes, n - column))
        else:
            with T.If(column + lanes <= n):
                with T.Then():
                    write(value, column, lanes)
                with T.Else(), T.If(column < n), T.Then():
                    write(value, column, n % lanes)
