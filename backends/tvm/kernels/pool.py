"""Largest element or mean of windows, on plain tensors and on channel blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import IDENTITY, BufferSpec, Dim, Epilogue, Expr
from mlec.backends.tvm.kernels.padding import Windows
from mlec.backends.tvm.kernels.result import Result
from mlec.backends.tvm.kernels.tile import (
    accumulator_dtype,
    bits,
    ceildiv,
    flat_view,
    parallel_if_large,
    parameter,
    product,
    unflatten,
)
from mlec.backends.tvm.kernels.vector import Cell, broadcast, cast_to, lanes_of, load, maximum, ramp, share
from mlec.backends.tvm.target import TargetInfo
from mlec.ops.windows import Geometry


def pool(
    op: str,
    x_shape: Sequence[Dim],
    kernel: Sequence[int],
    geometry: Geometry,
    out: Sequence[Dim],
    count_include_pad: bool,
    dtype: str,
    target: TargetInfo,
    epilogue: Epilogue = IDENTITY,
    name: str = "pool",
) -> tirx.PrimFunc:
    """``y[n, c, *out]`` (or ``y[n, c/b, *out, b]`` for blocked x) of windows; ``op`` is ``max_pool`` or ``avg_pool``.

    ``out`` says how many windows there are along each axis: with ceil_mode the last may hang over the end. A mean divides
    by the number of elements that are real, or real or padding, never by what lies beyond the padding. The batch and
    plain spatial extents may be symbolic. Parameters of the program: x, the epilogue's inputs, y.

    On channel blocks a vector is the block and windows are clipped at the borders. On plain tensors vectors run along
    the last axis of a padded copy of one channel, split by stride so that they are plain loads.
    """
    rank = len(kernel)
    blocked = len(x_shape) == rank + 3
    n, c, *space = x_shape[: rank + 2]
    windows = Windows.of(space, kernel, geometry, out)
    acc = accumulator_dtype(dtype)
    is_max = op == "max_pool"
    neutral = -math.inf if is_max else 0
    lanes = x_shape[-1] if blocked else target.lanes(bits(acc))
    tail = tuple(x_shape[rank + 2 :])
    y_shape = (n, c, *out, *tail)

    with prim_func(name) as program:
        x_arg = parameter("x", BufferSpec(x_shape, dtype))
        result = Result.parameter("y", y_shape, dtype, epilogue)
        x = flat_view(x_arg, (product((n, c)), *windows.extent, *tail), dtype)
        y = result.viewed((product((n, c)), *windows.out, *tail))

        def combine(total: Cell, value: Expr) -> None:
            value = share(cast_to(acc, value))
            total.set(maximum(total.value, value) if is_max else total.value + value)

        def counted(axis: int, position: Expr) -> Expr:
            """Elements along an axis that a mean divides by."""
            start = position * windows.stride[axis] - windows.before[axis]
            end = start + windows.kernel[axis]
            extent = windows.extent[axis]
            if count_include_pad:
                return _min(end, extent + windows.after[axis]) - start
            return _min(end, extent) - _max(start, 0)

        def finished(total: Cell, where: Sequence[Expr]) -> Expr:
            if is_max:
                return total.value
            counts = [counted(axis, position) for axis, position in enumerate(where)]
            return share(total.value / cast_to(acc, counts[0] * counts[1] * counts[2]))

        def logical(plane: Expr, where: Sequence[Expr]) -> tuple[Expr, ...]:
            return (*unflatten(plane, (n, c)), *where[3 - rank :])

        def on_blocks(plane: Expr) -> None:
            with T.grid(*windows.out) as where:
                total = Cell(acc, lanes, neutral)
                starts = [share(p * s - b) for p, s, b in zip(where, windows.stride, windows.before, strict=True)]
                first = [share(tirx.max(0, (d - 1 - at) // d)) for at, d in zip(starts, windows.dilation, strict=True)]
                last = [
                    share(tirx.min(k, (e - at + d - 1) // d))
                    for at, d, k, e in zip(starts, windows.dilation, windows.kernel, windows.extent, strict=True)
                ]
                with (
                    T.serial(first[0], last[0]) as i,
                    T.serial(first[1], last[1]) as j,
                    T.serial(first[2], last[2]) as k,
                ):
                    at = [s + t * d for s, t, d in zip(starts, (i, j, k), windows.dilation, strict=True)]
                    combine(total, load(x, [plane, *at, 0], lanes))
                value = finished(total, where)
                y.put((plane, *where), logical(plane, where), 0, lanes, [value])

        def on_rows(plane: Expr) -> None:
            scratch = T.alloc_buffer(windows.scratch_shape(lanes), acc)
            windows.fill(scratch, [], x, [plane], lanes, neutral)
            with T.grid(windows.out[0], windows.out[1], ceildiv(windows.out[2], lanes)) as (z, row, block):
                total = Cell(acc, lanes, neutral)
                column = block * lanes
                with T.grid(*windows.kernel) as (i, j, k):
                    depth = z * windows.stride[0] + i * windows.dilation[0]
                    line = row * windows.stride[1] + j * windows.dilation[1]
                    combine(total, load(scratch, [depth, line, *windows.tap_column(k, column)], lanes))
                value = finished(total, (z, row, ramp(column, lanes)))
                where = logical(plane, (z, row, column))[:-1]
                y.put((plane, z, row), where, column, windows.out[2], [value])

        static = [extent for extent in windows.out if isinstance(extent, int)]
        work = math.prod(static) * math.prod(kernel) // (1 if blocked else lanes) * 8
        parallel_if_large(
            product((n, c)), max(1, work), on_blocks if blocked else on_rows, c if isinstance(c, int) else 1
        )
    return program.func


def _min(a: Expr, b: Expr) -> Expr:
    return tirx.min(a, broadcast(_index(b, a), lanes_of(a)))


def _max(a: Expr, b: Expr) -> Expr:
    return tirx.max(a, broadcast(_index(b, a), lanes_of(a)))


def _index(b: Expr, like: Expr) -> Expr:
    kind = str(like.ty.dtype).partition("x")[0]
    return tirx.const(b, kind) if isinstance(b, int) else cast_to(kind, b)
