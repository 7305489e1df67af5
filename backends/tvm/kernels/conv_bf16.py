"""2-d convolutions of bf16 by bf16 with sums in float32, on channel blocks (NCHWc), by the matrix unit of x86 processors (AMX) or by
vectors that multiply pairs (AVX512_BF16).

An image in blocks of 32 channels is what tiles want: a pixel of a block is the 64 bytes of a row of a tile, neighbouring positions are
neighbouring rows, and no two rows of a tile share a set of L1.

64 x 56 x 56 by 3 x 3 to 64 channels is 231 MFLOP on 0.9 MB. 28 positions by 32 channels take 18 steps, of 16 pairs of channels each: four
instructions of 14 cycles, one for each row of a tile, while 60 lines are loaded, 30 cycles. 224 such tiles are 226000 cycles, 65 us at 3.48
GHz. That is with all lines in L1; the image lies in L2, which gives 14 to 28 bytes in a cycle (`kernels.int8.Tiles.sums`): 140 to 270 us.
Measured 158 us by one thread, 1470 GFLOP/s, 7.9 times as fast as float32; 128 x 28 x 28 to 128 176 us, 6.8 times; 1 x 1 there 24 us, 5.7
times. Where sums are short, what finishes them counts: 24 to 144 channels by 1 x 1 on 56 x 56 74 us, 2 times.

Vectors multiply pairs where they do more such products than of float32, `kernels.int8.Dots.of_bf16`: 32 products in a cycle on Zen 4,
which multiplies 16 of float32. 64 x 56 x 56 by 3 x 3 with a step of 2 to 128 is 116 MFLOP: 492 us at 3.67 GHz, measured 522 by one thread,
float32 1052; 512 x 7 x 7 by 3 x 3 to 512 1093, and 2060; 256 x 14 x 14 by 1 x 1 to 256 predicted 109, measured 122, and 230. What finishes
a sum counts here, too: 64 x 56 x 56 by 1 x 1 to 64 takes 152 us, of which 109 are predicted; float32 takes 236. A copy of images in blocks
of 8 channels with all of them side by side is worth it as well: 24 to 144 by 1 x 1 on 56 x 56 take 166 us with it, 186 without it, and 224
in float32. 3 x 3 with a step of 1 by Winograd's sums takes less time in float32: `kernels.winograd.beats_bf16`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from mlec.backends.tvm.compat import T, prim_func, reach, tirx
from mlec.backends.tvm.kernels.conv_blocked import out_extent
from mlec.backends.tvm.kernels.conv_int8 import Image, NarrowConvolution, NarrowConvSchedule
from mlec.backends.tvm.kernels.epilogue import IDENTITY, Buffer, BufferSpec, Dim, Epilogue, Expr
from mlec.backends.tvm.kernels.gemm_bf16 import has_tiles
from mlec.backends.tvm.kernels.int8 import BLOCK, STRIP, Dots, Multiplier, Packed, copied_rows
from mlec.backends.tvm.kernels.result import Result
from mlec.backends.tvm.kernels.tile import buffer_dtype, copy_run, flat_view, if_, parameter, product, unflatten
from mlec.backends.tvm.kernels.vector import LINE, cast_to, lanes_of, load, ramp, share, store
from mlec.backends.tvm.target import TargetInfo
from mlec.ops.conv import paired_weights, unpaired_weights
from mlec.ops.windows import Geometry

ITEM = 2
"""Bytes of a number."""
PAIRS = 8
"""Pairs of channels of a step of AMX, at least, of an image that it reads as it lies."""
LEAST_ROW = 64
"""Positions of a row that those of a pointwise convolution are cut into, at least."""


@dataclass(frozen=True)
class NarrowConv:
    """What a convolution of bf16 is, but for the image.

    Attributes:
        w_shape: of the weights, ``[k/16, c/groups/b, r, s, ceil(b/2), 16, 2]``.
        b: channels of a block of the image.
        outputs, block: channels of the result, and of a block of it.
    """

    w_shape: Sequence[int]
    b: int
    outputs: int
    block: int
    geometry: Geometry
    groups: int

    @property
    def window(self) -> tuple[int, int]:
        return self.w_shape[2], self.w_shape[3]

    @property
    def run(self) -> int:
        """Neighbouring pixels of a window that lie in one piece."""
        return self.window[1] if self.geometry.dilations[1] == 1 else 1

    def packed(self, blocks: int, pixel: int) -> Packed:
        """The weights of pixels of so many channels in each of so many blocks."""
        r, s = self.window
        columns = self.outputs // self.groups
        return Packed(self.groups, columns, blocks * r * (s // self.run), self.run * pixel, ITEM)

    @cached_property
    def gathered(self) -> int | None:
        """Channels of a pixel in the copy that tasks make, all in one block, zeros behind the last; 0: blocks stay as they are.

        Blocks so small that steps were short, or of an odd number of channels, are copied side by side. The 3 channels of an image become
        4: two pairs for each of the 7 pixels of a window's row, so that a step has 14. None: neither makes whole steps.
        """
        cb = self.w_shape[1]
        as_it_is = self.packed(cb, self.b)
        if self.b % 2 == 0 and (as_it_is.step >= PAIRS or (cb == 1 and as_it_is.read <= STRIP)):
            return 0
        if self.groups == 1:
            channels = cb * self.b
            for width in range(channels + channels % 2, channels + 2 * STRIP + 2, 2):
                packed = self.packed(1, width)
                if packed.step >= PAIRS or packed.read <= STRIP:
                    return width
        return None

    @property
    def weights(self) -> Packed:
        """As the kernel reads them."""
        return self.packed(1, self.gathered) if self.gathered else self.packed(self.w_shape[1], self.b)

    def pack(self, weights: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Weights of ``w_shape`` as the kernel reads them: the same, unless all channels of a pixel are gathered from several blocks."""
        if not self.gathered:
            return weights
        plain = unpaired_weights(weights, self.b, self.outputs, 1)
        wide = np.zeros((self.outputs, self.gathered, *self.window), weights.dtype)
        wide[:, : plain.shape[1]] = plain
        return paired_weights(wide, self.gathered, 1)

    def rows(self, x_shape: Sequence[Dim]) -> tuple[int, int]:
        """The rows of the result, as tasks share them, and how long they are. Those of a pointwise convolution may be cut anywhere."""
        p, q = out_extent(x_shape, self.window, self.geometry)
        if (*self.window, *self.geometry.strides) != (1, 1, 1, 1) or any(self.geometry.pads):
            return p, q
        lengths = (length for length in range(LEAST_ROW, p * q, STRIP) if p * q % length == 0)
        length = next(lengths, p * q)
        return p * q // length, length

    def is_computed(self, target: TargetInfo) -> bool:
        """Whether `conv_bf16` does it on this processor."""
        whole = self.block % BLOCK == 0 or BLOCK % self.block == 0
        multiplied = has_tiles(target) or Dots.of_bf16(target) is not None
        return multiplied and whole and self.gathered is not None

    def schedules(self, x_shape: Sequence[Dim], target: TargetInfo) -> Iterator[NarrowConvSchedule]:
        """How it can be done."""
        nbytes = product(x_shape[1:]) * ITEM
        amx, rows = has_tiles(target), self.rows(x_shape)
        return NarrowConvSchedule.candidates(rows, nbytes, self.weights, _vectors(target), amx, target)


def _vectors(target: TargetInfo) -> Dots:
    """What multiplies bf16 in vectors; with tiles, those into which their sums go."""
    return Dots.of_bf16(target) or Dots.of(target)


def conv_bf16(
    x_shape: Sequence[Dim],
    conv: NarrowConv,
    target: TargetInfo,
    epilogue: Epilogue = IDENTITY,
    name: str = "conv_bf16",
    schedule: NarrowConvSchedule | None = None,
    program_weights: int = 0,
) -> tirx.PrimFunc:
    """``y[n, k/block, p, q, block] = epilogue(conv(x[n, c/b, h, w, b], w))``, sums in float32; n may be symbolic.

    Parameters of the program: x, the weights as `NarrowConv.pack` has them, the epilogue's inputs, y, whose indices the epilogue is given.

    It is `mlec.backends.tvm.kernels.conv_int8` on numbers of two bytes: a tile is up to 16 neighbouring positions of a row times 16
    channels, a step up to 16 pairs of channels. The positions of a pointwise convolution are one row, or as many as tasks share.
    """
    n, cb, h, w, b = x_shape
    packed, geometry, extent = conv.weights, conv.geometry, conv.rows(x_shape)
    shown = out_extent(x_shape, conv.window, geometry)
    if extent != shown:
        h, w = extent
    shape, width = (n, cb, h, w, b), conv.gathered
    chosen = schedule or next(conv.schedules(x_shape, target))
    w_shape = conv.w_shape if not width else (conv.w_shape[0], 1, *conv.window, width // 2, BLOCK, 2)
    with prim_func(name) as kernel:
        x = parameter("x", BufferSpec(x_shape, "bfloat16"))
        weights = parameter("w", BufferSpec(w_shape, "bfloat16"))
        y_shape = (n, conv.outputs // conv.block)
        y = Result.parameter("y", (*y_shape, *shown, conv.block), "float32", epilogue)
        reach(product(x_shape) * ITEM)  # as bytes
        multiplier = Multiplier(flat_view(weights, (packed.nbytes,), "int8"), None, packed, _vectors(target))
        source = flat_view(x, (product(x_shape) * ITEM,), "uint8")
        elements = flat_view(x, (product(x_shape),), "uint16")
        blocks = y_shape[1] // conv.groups
        place = _Blocks(y.viewed((*y_shape, *extent, conv.block)), blocks, conv.block, extent, shown)

        def copy(at: tuple[Expr, Expr], met: tuple[int, int]) -> Buffer:
            if width:
                return gathered_rows(elements, at, shape, geometry, met, width)
            return copied_rows(source, at, (n, h, w, b * ITEM), geometry, met, 0, cb)

        seen = Image((n, 1, h, w, width * ITEM) if width else (n, cb, h, w, b * ITEM))
        copies = copy if width or any(geometry.pads) else None
        far = max(program_weights, packed.nbytes) > target.l2_bytes // 2
        with multiplier.dots.in_program():
            NarrowConvolution(
                source, multiplier, seen, conv.window, geometry, extent, chosen, far, copies, place.store
            ).all_tasks()
    return kernel.func


@dataclass(frozen=True)
class _Blocks:
    """The result in channel blocks.

    Attributes:
        result: ``[n, k/kb, p, q, kb]``.
        blocks, block: of a group, and the channels of one.
        extent, shown: p and q, and as the epilogue knows them.
    """

    result: Result
    blocks: int
    block: int
    extent: tuple[int, int]
    shown: tuple[int, int]

    def store(self, where: tuple[Expr, Expr, Expr], group: Expr, first: Expr, values: Sequence[Expr]) -> None:
        """Finishes vectors of neighbouring columns of a position and stores what there is of them, in one block each or in several."""
        image, row, column = where
        inside = row, column
        if self.extent != self.shown and self.result.epilogue.inputs:
            inside = tuple(map(share, unflatten(share(row * self.extent[1] + column), self.shown)))
        for v, value in enumerate(values):
            lanes = lanes_of(value)
            width, channel = min(lanes, self.block), (first + v) * lanes
            for part in range(lanes // width):
                at = channel + part * width
                number = at // self.block
                taken = (
                    value if width == lanes else tirx.Shuffle([value], list(range(part * width, (part + 1) * width)))
                )

                def put(number: Expr = number, at: Expr = at, taken: Expr = taken, width: int = width) -> None:
                    block, lane = share(group * self.blocks + number), at % self.block
                    finished = self.result.epilogue.apply(
                        share(taken), (image, block, *inside, ramp(lane, width)), self.result.extra
                    )
                    place = [image, block, row, column, lane]
                    store(self.result.buffer, cast_to(buffer_dtype(self.result.buffer), finished), place)

                if self.blocks * self.block % lanes == 0 or (isinstance(number, int) and number < self.blocks):
                    put()
                elif not isinstance(number, int):
                    with if_(number < self.blocks):
                        put()


def gathered_rows(
    x: Buffer, at: tuple[Expr, Expr], shape: Sequence[Dim], geometry: Geometry, extent: tuple[int, int], width: int
) -> Buffer:
    """A copy, as bytes, of part of an image in channel blocks with all channels of a pixel side by side, padding included.

    Args:
        x: flat, two bytes an element, of the shape ``[n, blocks, h, w, b]``.
        at: the image, and the first row to copy, counted with padding.
        extent: rows and columns to copy; the columns from the first one on, counted with padding.
        width: elements of a pixel of the copy, zeros behind the channels.
    """
    (_, blocks, h, w, b), (top, left), (height, columns), (image, first) = shape, geometry.before, extent, at
    before = min(left, columns)
    inside, length = min(w, columns - before), columns * width
    copy = T.alloc_buffer((height * length,), "uint16")
    copy_run(copy, [], 0, height * length, LINE // ITEM)
    with T.serial(height) as row:
        source = share(first + row - top)
        with if_(tirx.And(source >= 0, source < h)), T.grid(blocks, inside) as (block, column):
            value = load(x, [(((image * blocks + block) * h + source) * w + column) * b], b)
            store(copy, value, [row * length + (before + column) * width + block * b])
    return flat_view(copy, (height * length * ITEM,), "uint8")
