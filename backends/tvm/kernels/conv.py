"""Convolutions over one to three spatial axes of plain tensors: those that no kernel on channel blocks computes.

Zero padding is a copy, by each task, of its input into a padded scratch that stays in L2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import IDENTITY, BufferSpec, Dim, Epilogue, Expr
from mlec.backends.tvm.kernels.padding import Windows
from mlec.backends.tvm.kernels.result import Result
from mlec.backends.tvm.kernels.schedule import variations
from mlec.backends.tvm.kernels.tile import (
    TASK_WORK,
    RegisterTile,
    accumulator_dtype,
    bits,
    ceildiv,
    flat_view,
    parallel_if_large,
    parameter,
    product,
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
) -> tirx.PrimFunc:
    """``y[n, k, *out] = epilogue(conv(x[n, c, *space], w[k, c / groups, *kernel]))`` over one to three spatial axes.

    The batch and spatial extents may be symbolic. Parameters of the program: x, w, the epilogue's inputs, y.

    Vectors run along the last axis; a tile is some output channels of one group times some rows times a few vectors.
    The scratch holds the padded input of one group, its last axis split by stride (position ``i`` at ``[i % stride, i //
    stride]``) so that every tap is a plain vector load whatever the stride. Depthwise convolutions are the case of one
    channel per group: the tile is then several rows of one channel.
    """
    n, c, *space = x_shape
    k, cg, *taps = w_shape
    windows = Windows.of(space, taps, geometry)
    rank, (od, oh, ow), (_, sh, _), (_, dh, _) = windows.rank, windows.out, windows.stride, windows.dilation
    kd, kh, kw = windows.kernel
    y_shape = (n, k, *windows.out[3 - rank :])

    acc = accumulator_dtype(dtype)
    lanes = target.lanes(bits(acc))
    if isinstance(ow, int):
        lanes = min(lanes, 1 << (ow - 1).bit_length())
    per_group = k // groups
    chosen = schedule or next(ConvSchedule.candidates(per_group, oh, ow, dtype, target))
    kt, ht, vectors = chosen.channels, chosen.rows, chosen.vectors

    static = [extent for extent in (od, oh, ow) if isinstance(extent, int)]
    work = per_group * cg * math.prod(taps) * math.prod(static) * 32 ** (3 - len(static))
    parts = max(1, min(2 * target.cores, work // TASK_WORK))
    k_parts = min(parts, per_group // kt)
    k_chunk = ceildiv(per_group // kt, k_parts)
    k_parts = ceildiv(per_group // kt, k_chunk)
    with prim_func(name) as kernel:
        x_arg = parameter("x", BufferSpec(x_shape, dtype))
        w_arg = parameter("w", BufferSpec(w_shape, dtype))
        result = Result.parameter("y", y_shape, dtype, epilogue)
        x = flat_view(x_arg, (n, c, *windows.extent), dtype)
        weights = flat_view(w_arg, (k, cg, kd, kh, kw), dtype)
        y = result.viewed((n, k, od, oh, ow))

        def task(index: Expr) -> None:
            image, g, k_part = unflatten(index, (n, groups, k_parts))
            scratch = T.alloc_buffer((cg, *windows.scratch_shape(lanes * vectors)), acc)
            with T.serial(cg) as ci:
                windows.fill(scratch, [ci], x, [image, g * cg + ci], lanes, 0)

            def tile(channel: Expr, z: Expr, row: Expr, rows: int, column: Expr) -> None:
                sums = RegisterTile(kt, rows * vectors, lanes, acc)
                with T.grid(cg, kd, kh, kw) as (ci, di, ri, si):
                    sums.multiply_add(
                        [cast_to(acc, weights[channel + j, ci, di, ri, si]) for j in range(kt)],
                        [
                            load(
                                scratch,
                                [ci, *tap_row(z, di, row + i, ri), *windows.tap_column(si, column + v * lanes)],
                                lanes,
                            )
                            for i in range(rows)
                            for v in range(vectors)
                        ],
                    )
                for j in range(kt):
                    for i in range(rows):
                        at = (image, channel + j, z, row + i)
                        where = (image, channel + j, *at[5 - rank :])
                        values = [sums.value(j, i * vectors + v) for v in range(vectors)]
                        y.put(at, where, column, ow, values)

            with T.serial(tirx.min(k_chunk, per_group // kt - k_part * k_chunk)) as kk:
                channel = share(g * per_group + (k_part * k_chunk + kk) * kt)
                with T.serial(od) as z:
                    with T.serial(oh // ht) as i, T.serial(ceildiv(ow, lanes * vectors)) as j:
                        tile(channel, z, i * ht, ht, j * (lanes * vectors))
                    if not isinstance(oh, int) or oh % ht:
                        with T.serial(oh % ht) as i, T.serial(ceildiv(ow, lanes * vectors)) as j:
                            tile(channel, z, oh // ht * ht + i, 1, j * (lanes * vectors))

        def tap_row(z: Expr, di: Expr, row: Expr, ri: Expr) -> list[Expr]:
            return [z * windows.stride[0] + di * windows.dilation[0], row * sh + ri * dh]

        parallel_if_large(product((n, groups, k_parts)), work // k_parts, task, groups * k_parts)
    return kernel.func
