"""Convolutions over one to three spatial axes of plain tensors: those that no kernel on channel blocks computes.

Zero padding is a copy, by each task, of its input into a padded scratch that stays in L2.

An output takes two FLOPs for each tap of each input channel, for 4 bytes read and 4 written, so the FMAs count. 5 taps on 64 x 1000 to 64
channels are 41 MFLOP on 600 KB: a step (one tap of one input channel) of a tile of 8 channels and 2 vectors of positions is 16 FMAs, 8
cycles, for 8 single weights and 2 vectors, 5 cycles, or 6 as a vector at an odd tap crosses a line. With 1000 positions in 32 vectors of
two that is 188 us at the 223 GFLOP/s of FMAs on registers; measured 275 us by one thread, 149 GFLOP/s. Rows of 28 fill 28 lanes of 32: 3 x
3 x 3 on 16 x 12 x 28 x 28 to 16 channels, 130 MFLOP, is predicted at 667 us, and measured at 900, 145 GFLOP/s. Why it takes a third to a
half longer is not known; on channel blocks it is a tenth (`conv_blocked`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import IDENTITY, Buffer, BufferSpec, Dim, Epilogue, Expr
from mlec.backends.tvm.kernels.padding import Windows
from mlec.backends.tvm.kernels.result import Result
from mlec.backends.tvm.kernels.schedule import variations
from mlec.backends.tvm.kernels.tile import (
    RegisterTile,
    accumulator_dtype,
    bits,
    ceildiv,
    chunks,
    flat_view,
    multiply_adds,
    parallel_if_large,
    parameter,
    product,
    tasks_worth,
    unflatten,
)
from mlec.backends.tvm.kernels.vector import cast_to, load, share
from mlec.backends.tvm.target import TargetInfo
from mlec.ops.windows import Geometry


def pack_transposed(weights: npt.NDArray[np.generic], groups: int) -> npt.NDArray[np.generic]:
    """Weights ``[c, k / groups, *kernel]`` of a transposed convolution as those of the convolution it equals.

    That convolution has ``input_dilations`` where the transposed one has strides, and pads ``dilation * (kernel - 1) - pad``.
    """
    c, per_group, *kernel = weights.shape
    grouped = weights.reshape(groups, c // groups, per_group, *kernel).swapaxes(1, 2)
    flipped = np.flip(grouped, tuple(range(3, 3 + len(kernel))))
    return np.ascontiguousarray(flipped.reshape(groups * per_group, c // groups, *kernel))


@dataclass(frozen=True)
class ConvSchedule:
    """The register tile of `conv`.

    Attributes:
        channels: of the result, which divide those of a group.
        rows, vectors: output positions; one row at a time where their number is symbolic.
    """

    channels: int
    rows: int
    vectors: int

    @staticmethod
    def candidates(per_group: int, rows: Dim, columns: Dim, dtype: str, target: TargetInfo) -> Iterator[ConvSchedule]:
        """For so many output channels of a group, output rows and columns. Two thirds of the registers hold sums, at most all but four."""
        lanes = target.lanes(bits(accumulator_dtype(dtype)))
        budget = (target.vector_registers - 4) * 2 // 3
        vectors = 2 if not isinstance(columns, int) or columns > lanes else 1
        channels = next(t for t in range(min(8, budget // vectors), 0, -1) if per_group % t == 0)
        tallest = min(4, rows) if isinstance(rows, int) else 1
        default = ConvSchedule(channels, max(1, min(tallest, budget // (channels * vectors))), vectors)
        return variations(
            default,
            lambda s: s.channels * s.rows * s.vectors <= target.vector_registers - 4,
            channels=[t for t in range(min(12, per_group), 0, -1) if per_group % t == 0],
            rows=range(1, tallest + 1),
            vectors=range(1, 4) if vectors > 1 else (),
        )


def conv(
    x_shape: Sequence[Dim],
    w_shape: Sequence[int],
    geometry: Geometry,
    groups: int,
    dtype: str,
    target: TargetInfo,
    epilogue: Epilogue = IDENTITY,
    name: str = "conv",
    schedule: ConvSchedule | None = None,
    out: Sequence[Dim] = (),
) -> tirx.PrimFunc:
    """``y[n, k, *out] = epilogue(conv(x[n, c, *space], w[k, c / groups, *kernel]))`` over one to three spatial axes.

    The batch and spatial extents may be symbolic; ``out`` says those of y then, in variables that may occur by themselves nowhere else
    (of ``t + 2`` positions, three taps leave ``t``). Parameters of the program: x, w, the epilogue's inputs, y.

    Vectors run along the last axis; a tile is some output channels of one group times some rows times a few vectors.
    The scratch holds the padded input of one group, its last axis split by stride (position ``i`` at ``[i % stride, i //
    stride]``) so that every tap is a plain vector load whatever the stride. Depthwise convolutions are the case of one
    channel per group: the tile is then several rows of one channel.
    """
    n, c, *space = x_shape
    k, cg, *taps = w_shape
    windows = Windows.of(space, taps, geometry, out)
    y_shape = (n, k, *windows.out[3 - windows.rank :])
    _, oh, ow = windows.out
    chosen = schedule or next(ConvSchedule.candidates(k // groups, oh, ow, dtype, target))
    acc = accumulator_dtype(dtype)
    lanes = target.lanes(bits(acc))
    if isinstance(ow, int):
        lanes = min(lanes, 1 << (ow - 1).bit_length())
    with prim_func(name) as kernel:
        x = parameter("x", BufferSpec(x_shape, dtype))
        weights = parameter("w", BufferSpec(w_shape, dtype))
        y = Result.parameter("y", y_shape, dtype, epilogue)
        x = flat_view(x, (n, c, *windows.extent), dtype)
        weights = flat_view(weights, (k, cg, *windows.kernel), dtype)
        y = y.viewed((n, k, *windows.out))
        program = _Convolution(x, weights, y, (n, k, cg), groups, windows, chosen, acc, lanes, target)
        parts = program.channel_parts
        parallel_if_large(product((n, groups, parts)), program.work // parts, program.task, groups * parts)
    return kernel.func


@dataclass(frozen=True)
class _Convolution:
    """The parts of the program, see `conv`.

    Attributes:
        x, weights, y: ``[n, c, depth, rows, columns]``, ``[k, cg, *kernel]`` and ``[n, k, depth, rows, columns]``.
        extents: n, k, and cg: input channels of a group.
        acc: dtype of the sums.
        lanes: of a vector; fewer than the machine has where a row of the result is shorter.
    """

    x: Buffer
    weights: Buffer
    y: Result
    extents: tuple[Dim, int, int]
    groups: int
    windows: Windows
    chosen: ConvSchedule
    acc: str
    lanes: int
    target: TargetInfo

    @property
    def width(self) -> int:
        """Columns of a tile."""
        return self.lanes * self.chosen.vectors

    @property
    def per_group(self) -> int:
        """Output channels of a group."""
        return self.extents[1] // self.groups

    @property
    def work(self) -> Dim:
        """Of one group of an image, in the unit of `SERIAL_WORK`."""
        return self.work_of(product(self.windows.out))

    def work_of(self, positions: Dim) -> Dim:
        """Of so many positions of a group."""
        terms = self.extents[2] * math.prod(self.windows.kernel)
        return multiply_adds(self.per_group * terms * positions, self.acc, self.target)

    @property
    def shares(self) -> tuple[int, int]:
        """Tiles of output channels of a task, and in how many parts that divides a group. An extent that is not known counts as 32."""
        tiles = self.per_group // self.chosen.channels
        work = self.work_of(math.prod(extent if isinstance(extent, int) else 32 for extent in self.windows.out))
        return chunks(tiles, min(tasks_worth(work, self.target), tiles))

    @property
    def channel_parts(self) -> int:
        return self.shares[1]

    def task(self, index: Expr) -> None:
        """Some output channels of one group of an image."""
        (n, _, cg), (share_of_tiles, parts), kt = self.extents, self.shares, self.chosen.channels
        image, group, part = unflatten(index, (n, self.groups, parts))
        scratch = T.alloc_buffer((cg, *self.windows.scratch_shape(self.width)), self.acc)
        with T.serial(cg) as ci:
            self.windows.fill(scratch, [ci], self.x, [image, group * cg + ci], self.lanes, 0)
        with T.serial(tirx.min(share_of_tiles, self.per_group // kt - part * share_of_tiles)) as i:
            channel = share(group * self.per_group + (part * share_of_tiles + i) * kt)
            self.channels(scratch, image, channel)

    def channels(self, scratch: Buffer, image: Expr, channel: Expr) -> None:
        """All positions of the output channels of a tile: whole tiles of rows, then the last rows one by one."""
        (od, oh, ow), height, width = self.windows.out, self.chosen.rows, self.width
        with T.serial(od) as z:
            with T.serial(oh // height) as i, T.serial(ceildiv(ow, width)) as j:
                self.tile(scratch, image, channel, (z, i * height, j * width), height)
            if not isinstance(oh, int) or oh % height:
                with T.serial(oh % height) as i, T.serial(ceildiv(ow, width)) as j:
                    self.tile(scratch, image, channel, (z, oh // height * height + i, j * width), 1)

    def tile(self, scratch: Buffer, image: Expr, channel: Expr, corner: tuple[Expr, Expr, Expr], height: int) -> None:
        """The sums of some channels at ``height`` rows times some vectors of columns, from a position on.

        A step is one tap of one input channel: a weight for each channel, a vector for each row and vector of columns.
        """
        windows, acc, lanes = self.windows, self.acc, self.lanes
        kt, vectors = self.chosen.channels, self.chosen.vectors
        z, row, column = corner
        sums = RegisterTile(kt, height * vectors, lanes, acc)
        with T.grid(self.extents[2], *windows.kernel) as (ci, di, ri, si):
            places = [
                [ci, *windows.tap_row(z, di, row + i, ri), *windows.tap_column(si, column + v * lanes)]
                for i in range(height)
                for v in range(vectors)
            ]
            sums.multiply_add(
                [cast_to(acc, self.weights[channel + j, ci, di, ri, si]) for j in range(kt)],
                [load(scratch, place, lanes) for place in places],
            )
        for j in range(kt):
            for i in range(height):
                at = (image, channel + j, z, row + i)
                where = (image, channel + j, *at[5 - windows.rank :])
                values = [sums.value(j, i * vectors + v) for v in range(vectors)]
                self.y.put(at, where, column, windows.out[2], values)
