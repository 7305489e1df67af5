"""Largest element or mean of windows, on plain tensors and on channel blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import IDENTITY, Buffer, BufferSpec, Dim, Epilogue, Expr
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
    n, c, *space = x_shape[: rank + 2]
    tail = tuple(x_shape[rank + 2 :])
    windows = Windows.of(space, kernel, geometry, out)
    acc = accumulator_dtype(dtype)
    lanes = tail[0] if tail else target.lanes(bits(acc))
    with prim_func(name) as program:
        x = parameter("x", BufferSpec(x_shape, dtype))
        y = Result.parameter("y", (n, c, *out, *tail), dtype, epilogue)
        x = flat_view(x, (product((n, c)), *windows.extent, *tail), dtype)
        y = y.viewed((product((n, c)), *windows.out, *tail))
        pooling = _Pool(x, y, (n, c), windows, op == "max_pool", count_include_pad, acc, lanes)
        static = [extent for extent in windows.out if isinstance(extent, int)]
        work = math.prod(static) * math.prod(kernel) // (1 if tail else lanes) * 8
        task = pooling.plane_of_blocks if tail else pooling.plane
        parallel_if_large(product((n, c)), max(1, work), task, c if isinstance(c, int) else 1)
    return program.func


@dataclass(frozen=True)
class _Pool:
    """The parts of the program, see `pool`. A task is a plane: one channel, or block of channels, of one image.

    Attributes:
        x, y: ``[planes, depth, rows, columns]``, and on channel blocks the block as a last axis.
        batch: n, c (or c / b).
        acc: dtype of the totals.
        lanes: of a vector: the block, or consecutive columns.
    """

    x: Buffer
    y: Result
    batch: tuple[Dim, Dim]
    windows: Windows
    is_max: bool
    count_include_pad: bool
    acc: str
    lanes: int

    @property
    def neutral(self) -> float:
        """What changes no result: the padding, and totals at first."""
        return -math.inf if self.is_max else 0

    def plane_of_blocks(self, plane: Expr) -> None:
        """One block of channels: a load for each element of a window that lies in the image."""
        windows = self.windows
        with T.grid(*windows.out) as where:
            total = Cell(self.acc, self.lanes, self.neutral)
            starts = [share(p * s - b) for p, s, b in zip(where, windows.stride, windows.before, strict=True)]
            first, last = self.inside(starts)
            with (
                T.serial(first[0], last[0]) as i,
                T.serial(first[1], last[1]) as j,
                T.serial(first[2], last[2]) as k,
            ):
                at = [s + t * d for s, t, d in zip(starts, (i, j, k), windows.dilation, strict=True)]
                self.take_in(total, load(self.x, [plane, *at, 0], self.lanes))
            value = self.finished(total, where)
            self.y.put((plane, *where), self.known(plane, where), 0, self.lanes, [value])

    def inside(self, starts: Sequence[Expr]) -> tuple[list[Expr], list[Expr]]:
        """For each axis the first element of a window that lies in the image, and the one after the last, where it starts there."""
        dilation, kernel, extent = self.windows.dilation, self.windows.kernel, self.windows.extent
        first = [share(tirx.max(0, (d - 1 - at) // d)) for at, d in zip(starts, dilation, strict=True)]
        last = [
            share(tirx.min(k, (e - at + d - 1) // d))
            for at, d, k, e in zip(starts, dilation, kernel, extent, strict=True)
        ]
        return first, last

    def plane(self, plane: Expr) -> None:
        """One channel: ``lanes`` windows at once, a load for each element of a window."""
        windows, lanes = self.windows, self.lanes
        scratch = T.alloc_buffer(windows.scratch_shape(lanes), self.acc)
        windows.fill(scratch, [], self.x, [plane], lanes, self.neutral)
        with T.grid(windows.out[0], windows.out[1], ceildiv(windows.out[2], lanes)) as (z, row, block):
            total = Cell(self.acc, lanes, self.neutral)
            column = block * lanes
            with T.grid(*windows.kernel) as (i, j, k):
                at = [*windows.tap_row(z, i, row, j), *windows.tap_column(k, column)]
                self.take_in(total, load(scratch, at, lanes))
            value = self.finished(total, (z, row, ramp(column, lanes)))
            where = self.known(plane, (z, row, column))[:-1]
            self.y.put((plane, z, row), where, column, windows.out[2], [value])

    def take_in(self, total: Cell, value: Expr) -> None:
        value = share(cast_to(self.acc, value))
        total.set(maximum(total.value, value) if self.is_max else total.value + value)

    def finished(self, total: Cell, where: Sequence[Expr]) -> Expr:
        """The result of the window at these positions, which may be vectors."""
        if self.is_max:
            return total.value
        counts = [self.counted(axis, position) for axis, position in enumerate(where)]
        return share(total.value / cast_to(self.acc, counts[0] * counts[1] * counts[2]))

    def counted(self, axis: int, position: Expr) -> Expr:
        """Elements along an axis that a mean divides by."""
        windows = self.windows
        start = position * windows.stride[axis] - windows.before[axis]
        end = start + windows.kernel[axis]
        extent = windows.extent[axis]
        if self.count_include_pad:
            return _min(end, extent + windows.after[axis]) - start
        return _min(end, extent) - _max(start, 0)

    def known(self, plane: Expr, where: Sequence[Expr]) -> tuple[Expr, ...]:
        """Indices as the epilogue knows them."""
        return (*unflatten(plane, self.batch), *where[3 - self.windows.rank :])


def _min(a: Expr, b: Expr) -> Expr:
    return tirx.min(a, broadcast(_index(b, a), lanes_of(a)))


def _max(a: Expr, b: Expr) -> Expr:
    return tirx.max(a, broadcast(_index(b, a), lanes_of(a)))


def _index(b: Expr, like: Expr) -> Expr:
    kind = str(like.ty.dtype).partition("x")[0]
    return tirx.const(b, kind) if isinstance(b, int) else cast_to(kind, b)
