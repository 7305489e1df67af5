"""2-d convolutions of bytes of each channel by itself, over images with their channels last.

An output of 3 x 3 is 9 products for one byte read and one written: instructions count, not bytes. With VNNI, a row of taps of 16 channels
takes a merge of three bytes into one lane and one instruction that adds their products, beside a load that widens and two shifts which
neighbouring columns share: 5 instructions a row, 15 an output of 16 channels, where float32 takes 9 FMAs and 4 loads. What is saved is
memory, a quarter of the bytes, and the casts around: the epilogue (scale, round, narrow) takes as long as the sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.conv_blocked import met_values
from mlec.backends.tvm.kernels.depthwise import DepthwiseSchedule
from mlec.backends.tvm.kernels.epilogue import IDENTITY, Buffer, BufferSpec, Dim, Epilogue, Expr
from mlec.backends.tvm.kernels.int8 import BLOCK, QUAD, Dots, Packed, copied_rows, put
from mlec.backends.tvm.kernels.result import Result
from mlec.backends.tvm.kernels.tile import flat_view, parallel_if_large, parameter, product, tasks_worth, unflatten
from mlec.backends.tvm.kernels.vector import Cell, cast_to, load, share
from mlec.backends.tvm.target import TargetInfo
from mlec.ir.dim import static_dims
from mlec.ops.windows import Geometry


def is_depthwise(w_shape: Sequence[int], groups: int) -> bool:
    """Whether each channel makes one of its own; of several."""
    return w_shape[2] == 1 and groups == w_shape[3] > 1


def pack_depthwise(weights: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    """``[r, s, 1, c]`` to ``[r, quads, channels, 4]``: the taps of a row of a channel side by side, zeros where there is none."""
    r, s, _, c = weights.shape
    quads, channels = -(-s // QUAD), -(-c // BLOCK) * BLOCK
    padded = np.zeros((r, quads * QUAD, channels), np.int8)
    padded[:, :s, :c] = weights[:, :, 0]
    return np.ascontiguousarray(padded.reshape(r, quads, QUAD, channels).transpose(0, 1, 3, 2))


def depthwise_schedules(
    x_shape: Sequence[Dim], w_shape: Sequence[int], geometry: Geometry, target: TargetInfo
) -> Iterator[DepthwiseSchedule]:
    """Tiles whose sums leave a few registers; tasks whose images stay in L2."""
    p, q = static_dims(geometry.positions(x_shape[1:3], w_shape[:2]))
    r, s, _, c = w_shape
    dots = Dots.of(target)
    most = max(1, min(12, target.vector_registers - 5 - 3 * dots.parts))
    work = p * q * r * s * -(-c // dots.lanes) * 48
    nbytes = product(x_shape[1:])
    parts = max(1, min(p, max(tasks_worth(work, target), -(-nbytes * 4 // target.l2_bytes))))
    return DepthwiseSchedule.over((p, q), most, most, parts)


def depthwise_int8(
    x_shape: Sequence[Dim],
    w_shape: Sequence[int],
    geometry: Geometry,
    zero_point: int,
    target: TargetInfo,
    epilogue: Epilogue = IDENTITY,
    name: str = "depthwise_int8",
    schedule: DepthwiseSchedule | None = None,
) -> tirx.PrimFunc:
    """``y[n, p, q, c] = epilogue(conv(x[n, h, w, c] - zero_point, w[r, s, 1, c]))``, each channel by itself; n may be symbolic.

    Parameters of the program: x, the weights as `pack_depthwise` has them, the offsets of the sums, the epilogue's inputs, y.

    A vector of sums is some neighbouring channels. The bytes of up to four taps of a row go side by side into the lanes of one vector, and
    one instruction of VNNI adds their products: of 3 x 3 with stride 1 each input vector is widened once and shifted twice, and each
    row of taps takes one merge and one such instruction, 5 for 48 products. A tile is up to 12 columns of a row. A task is some
    rows of an image, copied with the zero point around them (see `conv_int8`); its rows go through L1, the epilogue takes as long
    as the sums.
    """
    n, h, w, c = x_shape
    r, s, _, _ = w_shape
    p, q = static_dims(geometry.positions((h, w), (r, s)))
    chosen = schedule or next(depthwise_schedules(x_shape, w_shape, geometry, target))
    channels, dots = -(-c // BLOCK) * BLOCK, Dots.of(target)
    with prim_func(name) as kernel:
        x = parameter("x", BufferSpec(x_shape, "uint8"))
        weights = parameter("w", BufferSpec((r, -(-s // QUAD), channels, QUAD), "int8"))
        offsets = parameter("offsets", BufferSpec((channels,), "int32"))
        y = Result.parameter("y", (n, p, q, c), "int32", epilogue)
        x, y = flat_view(x, (product(x_shape),), "uint8"), y.viewed((n * p * q, c))
        weights = flat_view(weights, (r, -(-s // QUAD), channels * QUAD), "int8")
        rows = -(-p // chosen.parts)
        parts = -(-p // rows)
        program = _Depthwise(
            x, weights, offsets, y, x_shape, w_shape, geometry, (p, q), zero_point, chosen.columns, rows, parts, dots
        )
        work = rows * q * r * s * -(-c // dots.lanes) * 48
        parallel_if_large(product((n, parts)), work, program.task, parts)
    return kernel.func


@dataclass(frozen=True)
class _Depthwise:
    """The parts of the program, see `depthwise_int8`."""

    x: Buffer
    weights: Buffer
    offsets: Buffer
    y: Result
    x_shape: Sequence[Dim]
    w_shape: Sequence[int]
    geometry: Geometry
    extent: tuple[int, int]
    zero_point: int
    width: int
    rows: int
    parts: int
    dots: Dots

    def task(self, index: Expr) -> None:
        """Some rows of an image."""
        n, h, w, c = self.x_shape
        (p, q), (r, s), lanes = self.extent, self.w_shape[:2], self.dots.lanes
        (sh, sw), (dh, dw) = self.geometry.strides, self.geometry.dilations
        image, part = unflatten(index, (n, self.parts))
        first = share(tirx.min(part * self.rows, p - self.rows))
        if any(self.geometry.pads) or c % lanes:
            height, columns = (self.rows - 1) * sh + (r - 1) * dh + 1, (q - 1) * sw + (s - 1) * dw + 1
            buffer = copied_rows(
                self.x, (image, first * sh), self.x_shape, self.geometry, (height, columns), self.zero_point
            )
            pitch, origin = columns * c, 0
        else:
            buffer, pitch = self.x, w * c
            origin = share((image * h + first * sh) * pitch)
        with T.serial(self.rows) as row, T.serial(-(-c // lanes)) as vector:
            channel = share(vector * lanes)
            begin = share(origin + row * (sh * pitch) + channel)

            def tile(column: Expr, count: int, begin: Expr = begin, row: Expr = row, channel: Expr = channel) -> None:
                sums = self.sums(buffer, begin + column * (sw * c), pitch, channel, count)
                for j, cell in enumerate(sums):
                    at = share((image * p + first + row) * q + column + j)
                    packed = Packed(1, c, 1, 1)
                    put(self.y, (image, first + row, column + j), at, 0, vector, packed, [cell.value])

            if q >= self.width:
                with T.serial(q // self.width) as j:
                    tile(j * self.width, self.width)
            if q % self.width:
                tile(q // self.width * self.width, q % self.width)

    def sums(self, buffer: Buffer, begin: Expr, pitch: int, channel: Expr, count: int) -> list[Cell]:
        """Those of a vector of channels at ``count`` columns, the first of whose windows begins at ``begin``."""
        (r, s), c, dots = self.w_shape[:2], self.x_shape[3], self.dots
        sw, (dh, dw), lanes = self.geometry.strides[1], self.geometry.dilations, dots.lanes
        start = share(load(self.offsets, [channel], lanes))
        cells = [Cell("int32", lanes, start) for _ in range(count)]
        with T.serial(r) as i:
            line = share(begin + i * (dh * pitch))
            values = {
                offset: share(cast_to("int32", load(buffer, [line + offset * c], lanes)))
                for offset in met_values(count, s, sw, dw)
            }
            for quad in range(-(-s // QUAD)):
                weights = dots.weights(load(self.weights, [i, quad, channel * QUAD], lanes * QUAD))
                taps = range(quad * QUAD, min(s, quad * QUAD + QUAD))
                for j, cell in enumerate(cells):
                    dots.add(cell, dots.taps([values[j * sw + t * dw] for t in taps]), weights)
        return cells
