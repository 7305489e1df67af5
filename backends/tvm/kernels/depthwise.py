"""2-d convolutions of each channel by itself, on channel blocks (NCHWc).

A depthwise 3 x 3 on 64 channels and 25 x 5 takes a fifth of the pointwise convolution that follows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.conv_blocked import met_values, out_extent
from mlec.backends.tvm.kernels.epilogue import IDENTITY, BufferSpec, Dim, Epilogue, Expr
from mlec.backends.tvm.kernels.result import Result
from mlec.backends.tvm.kernels.schedule import around, variations
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


@dataclass(frozen=True)
class DepthwiseSchedule:
    """How `depthwise_nchwc` goes over an image of one block of channels.

    Attributes:
        columns: of a tile.
        parts: tasks that share the rows.
    """

    columns: int
    parts: int

    @staticmethod
    def candidates(
        x_shape: Sequence[Dim],
        w_shape: Sequence[int],
        geometry: Geometry,
        dtype: str,
        target: TargetInfo,
    ) -> Iterator[DepthwiseSchedule]:
        """Tiles of up to 12 columns, of equal width, whose sums and input vectors fit the registers."""
        b, (_, r, s, _) = x_shape[4], w_shape
        p, q = out_extent(x_shape, (r, s), geometry)
        registers = ceildiv(b, target.lanes(bits(accumulator_dtype(dtype))))
        most = max(1, min(12, target.vector_registers * 3 // 4 // registers - s))
        parts = max(1, min(2 * target.cores, p, r * s * q * b * 2 * p // TASK_WORK))
        default = DepthwiseSchedule(_even(q, most), parts)
        widest = min(16, (target.vector_registers - 2) // registers - s)
        return variations(
            default,
            lambda schedule: True,
            columns=sorted({_even(q, width) for width in range(1, widest + 1)}, key=lambda c: abs(c - default.columns)),
            parts=around(parts, most=p),
        )


def _even(extent: int, most: int) -> int:
    """Width of as few tiles as cover an extent, each at most so wide, when they are as equal as can be."""
    return -(-extent // -(-extent // most))


def depthwise_nchwc(
    x_shape: Sequence[Dim],
    w_shape: Sequence[int],
    geometry: Geometry,
    dtype: str,
    target: TargetInfo,
    epilogue: Epilogue = IDENTITY,
    name: str = "depthwise_nchwc",
    schedule: DepthwiseSchedule | None = None,
) -> tirx.PrimFunc:
    """``y[n, c/b, p, q, b] = epilogue(conv(x[n, c/b, h, w, b], w[c/b, r, s, b]))``, each channel by itself; only n may be symbolic.

    Parameters of the program: x, w, the epilogue's inputs, y; the epilogue's indices are those of y (five).

    A vector is the block. A tile is some output columns of one row, up to 12 by default: it loads each input vector of the ``r``
    rows that it meets once, for up to ``s`` sums, so that ``r * s`` FMAs per output go with little more than ``r`` loads. There is no
    padded copy, which would cost as much as the sums: columns are known when the program is made, so tiles at the left and
    right edge leave out what lies in the padding, and rows at the top and bottom have a shorter loop over taps. An image is
    read and written once; beyond the caches that is all that counts (8 bytes for 18 operations at 3 x 3).
    """
    n, cb, h, w, b = x_shape
    _, r, s, _ = w_shape
    (sh, sw), (dh, dw), (top, left) = geometry.strides, geometry.dilations, geometry.before
    p, q = out_extent(x_shape, (r, s), geometry)
    acc = accumulator_dtype(dtype)
    chosen = schedule or next(DepthwiseSchedule.candidates(x_shape, w_shape, geometry, dtype, target))
    width, parts = chosen.columns, chosen.parts
    inner = [
        j for j in range(0, q - width + 1, width) if j * sw >= left and (j + width - 1) * sw + (s - 1) * dw - left < w
    ]  # tiles that meet no padding: they follow each other
    edges = [j for j in range(0, q, width) if j not in inner]
    row_work = r * s * q * b * 2
    chunk = ceildiv(p, parts)
    parts = ceildiv(p, chunk)

    with prim_func(name) as kernel:
        x_arg = parameter("x", BufferSpec(x_shape, dtype))
        weights = parameter("w", BufferSpec(w_shape, dtype))
        y = Result.parameter("y", (n, cb, p, q, b), dtype, epilogue)
        x = flat_view(x_arg, (n, cb, h, w * b), dtype)

        def task(index: Expr) -> None:
            image, block, part = unflatten(index, (n, cb, parts))
            first = share(part * chunk)

            def row_of_taps(sums: RegisterTile, row: Expr, ri: Expr, column: Expr, columns: int) -> None:
                taps = [share(cast_to(acc, load(weights, [block, ri, t, 0], b))) for t in range(s)]
                for offset, meets in met_values(columns, s, sw, dw).items():
                    at = column * sw + (offset - left)
                    if isinstance(at, int) and not 0 <= at < w:
                        continue
                    value = share(cast_to(acc, load(x, [image, block, row * sh + ri * dh - top, at * b], b)))
                    for j, t in meets:
                        sums.add(j, value, [taps[t]])

            def tile(row: Expr, column: Expr, columns: int, whole: bool) -> None:
                sums = RegisterTile(columns, 1, b, acc)
                if whole:
                    for ri in range(r):
                        row_of_taps(sums, row, ri, column, columns)
                else:
                    begin = share((tirx.max(0, top - row * sh) + (dh - 1)) // dh)
                    end = share(tirx.min(r, (tirx.max(0, h + top - row * sh) + (dh - 1)) // dh))
                    with T.serial(begin, end) as ri:
                        row_of_taps(sums, row, ri, column, columns)
                for j in range(columns):
                    at = (image, block, row, column + j)
                    y.put(at, at, 0, b, [sums.value(j, 0)])

            def all_columns(row: Expr, whole: bool) -> None:
                if inner:
                    with T.serial(len(inner)) as i:
                        tile(row, inner[0] + i * width, width, whole)
                for column in edges:
                    tile(row, column, min(width, q - column), whole)

            with T.serial(tirx.min(chunk, p - first)) as i:
                row = share(first + i)
                with T.If(tirx.And(row * sh >= top, row * sh + (r - 1) * dh < h + top)):
                    with T.Then():
                        all_columns(row, True)
                    with T.Else():
                        all_columns(row, False)

        parallel_if_large(product((n, cb, parts)), row_work * chunk, task, cb * parts)
    return kernel.func
