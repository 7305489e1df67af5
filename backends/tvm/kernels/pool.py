"""Largest element or mean of windows, on plain tensors and on channel blocks.

An element is in ``kernel / stride`` windows, and each takes an operation for it: 9 FLOPs for a window of 3 x 3. A maximum that keeps NaN
is five instructions. Windows of 3 x 3 with stride 2 over 64 x 112 x 112 in float32 read 3.2 MB and write 0.8 MB: 2.25 operations an
element.

On channel blocks a tile of 8 windows meets 17 columns of 3 rows: 51 loads and maxima down the columns and 16 across, where windows by
themselves take 72 of each. 1568 tiles of 67 maxima are 70 us at two instructions a cycle (3.8 GHz); reading the image from L3 takes
longer. Measured 139 us by one thread, 29 GB/s. 8 windows are what hides the latency of five instructions; more columns would leave no
registers.

On plain tensors a channel is copied into a scratch with its padding (59 KB, in L2 and partly in L1), even and odd columns apart where the
stride is 2, so that a tap of 16 windows is one load. With stride 1 the 9 maxima of a window count: predicted 330 us for 64 x 112 x 112,
measured 456. With stride 2 they are 82 us, and the copy is as much again, half a cycle for each of 940000 elements, or 124 us; reading
from L3 comes on top: measured 258 us (torch 5600, blocks 139), and 158 where a window is one element.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import IDENTITY, Buffer, BufferSpec, Dim, Epilogue, Expr
from mlec.backends.tvm.kernels.padding import Windows
from mlec.backends.tvm.kernels.result import Result
from mlec.backends.tvm.kernels.schedule import variations
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

MAXIMUM, ADDITION, MOVED = 60, 20, 14
"""What an element of a window takes, for a vector of windows, and an element that is moved by itself into a padded copy: in the unit of
`SERIAL_WORK`. Measured over 40 channels of 28 x 28, windows of 3 x 3 with stride 2: 218 ns a channel for the largest, 202 by this; of the
mean 155, 166 by this."""


@dataclass(frozen=True)
class PoolSchedule:
    """How windows are taken.

    Attributes:
        columns: windows side by side in a tile; on plain tensors, vectors of windows. 0, on channel blocks: windows are so wide that
            a tile would not fit the registers, and taken one by one.
    """

    columns: int

    @staticmethod
    def candidates(
        x_shape: Sequence[Dim],
        kernel: Sequence[int],
        geometry: Geometry,
        out: Sequence[Dim],
        dtype: str,
        target: TargetInfo,
    ) -> Iterator[PoolSchedule]:
        """By default eight, which hides the latency of the arithmetic, or as many as there are or as fit the registers."""
        rank = len(kernel)
        lanes = 1 if len(x_shape) > rank + 2 else target.lanes(bits(accumulator_dtype(dtype)))
        across = -(-out[-1] // lanes) if isinstance(out[-1], int) else 8

        def fits(schedule: PoolSchedule) -> bool:
            held = schedule.columns if lanes > 1 else len(_offsets(kernel[-1], geometry, schedule.columns))
            return 1 <= schedule.columns <= max(1, across) and held <= target.vector_registers - 4

        sizes = [PoolSchedule(columns) for columns in (8, 4, 2, 1)]
        default = next(filter(fits, sizes), PoolSchedule(0))
        return variations(default, fits, columns=(2, 4, 8, 1) if default.columns else ())


def _offsets(taps: int, geometry: Geometry, count: int) -> list[int]:
    """The columns that so many windows side by side touch, from the first one's on."""
    stride, dilation = geometry.strides[-1], geometry.dilations[-1]
    return sorted({u * stride + k * dilation for u in range(count) for k in range(taps)})


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
    schedule: PoolSchedule | None = None,
) -> tirx.PrimFunc:
    """``y[n, c, *out]`` (or ``y[n, c/b, *out, b]`` for blocked x) of windows; ``op`` is ``max_pool`` or ``avg_pool``.

    ``out`` says how many windows there are along each axis: with ceil_mode the last may hang over the end. A mean divides
    by the number of elements that are real, or real or padding, never by what lies beyond the padding. The batch and
    plain spatial extents may be symbolic. Parameters of the program: x, the epilogue's inputs, y.

    On channel blocks a vector is the block. Windows that lie side by side are a tile: columns of the image that several of them
    share are read once, and combined along the other axes first. Windows are clipped at the borders: along columns when the
    program is made, along the other axes once for each tile.

    On plain tensors vectors run along the last axis of a padded copy of one channel, split by stride so that they are plain loads.
    """
    rank = len(kernel)
    n, c, *space = x_shape[: rank + 2]
    tail = tuple(x_shape[rank + 2 :])
    windows = Windows.of(space, kernel, geometry, out)
    acc = accumulator_dtype(dtype)
    lanes = tail[0] if tail else target.lanes(bits(acc))
    schedule = schedule or next(PoolSchedule.candidates(x_shape, kernel, geometry, out, dtype, target))
    with prim_func(name) as program:
        x = parameter("x", BufferSpec(x_shape, dtype))
        y = Result.parameter("y", (n, c, *out, *tail), dtype, epilogue)
        x = flat_view(x, (product((n, c)), *windows.extent, *tail), dtype)
        y = y.viewed((product((n, c)), *windows.out, *tail))
        largest = op == "max_pool"
        pooling = _Pool(x, y, (n, c), windows, largest, count_include_pad, acc, lanes, schedule)
        *rows, columns = windows.out
        vectors = product(windows.out) if tail else product(rows) * ceildiv(columns, lanes)
        copied = 0 if tail else product(windows.extent) * (MOVED if windows.stride[2] > 1 else 1)
        work = vectors * math.prod(kernel) * (MAXIMUM if largest else ADDITION) + copied
        task = pooling.plane if not tail else pooling.plane_of_blocks if schedule.columns else pooling.plane_of_windows
        parallel_if_large(product((n, c)), work, task, c if isinstance(c, int) else 1)
    return program.func


@dataclass(frozen=True)
class _Pool:
    """The parts of the program, see `pool`. A task is a plane: one channel, or block of channels, of one image.

    Attributes:
        x, y: ``[planes, depth, rows, columns]``, and on channel blocks the block as a last axis.
        batch: n, c (or c / b).
        acc: dtype of the totals.
        lanes: of a vector: the block, or consecutive columns.
        schedule: see there.
    """

    x: Buffer
    y: Result
    batch: tuple[Dim, Dim]
    windows: Windows
    is_max: bool
    count_include_pad: bool
    acc: str
    lanes: int
    schedule: PoolSchedule

    @property
    def neutral(self) -> float:
        """What changes no result: the padding, and totals at first."""
        return -math.inf if self.is_max else 0

    def plane_of_blocks(self, plane: Expr) -> None:
        """One block of channels, in tiles of windows side by side: those in the middle in a loop, those at the borders one by one."""
        windows, width = self.windows, self.schedule.columns
        columns, stride, before = windows.out[2], windows.stride[2], windows.before[2]
        reach = (windows.kernel[2] - 1) * windows.dilation[2]
        # The first window that begins in the image, and the first that ends beyond it.
        first = min(columns, -(-before // stride))
        last = max(first, min(columns, (windows.extent[2] - 1 - reach + before) // stride + 1))
        tiles = (last - first) // width
        with T.grid(windows.out[0], windows.out[1]) as (z, row):
            starts = [share(p * windows.stride[axis] - windows.before[axis]) for axis, p in enumerate((z, row))]
            lines = starts, *self.inside(starts)
            self.border(plane, (z, row), lines, 0, first)
            if tiles:
                with T.serial(tiles) as tile:
                    self.tile(plane, (z, row), lines, first + tile * width, width)
            self.border(plane, (z, row), lines, first + tiles * width, columns)

    def border(self, plane: Expr, where: tuple[Expr, Expr], lines: Lines, first: int, last: int) -> None:
        """The windows between two columns, which are known."""
        for column in range(first, last, self.schedule.columns):
            self.tile(plane, where, lines, column, min(self.schedule.columns, last - column))

    def tile(self, plane: Expr, where: tuple[Expr, Expr], lines: Lines, column: Expr, count: int) -> None:
        """``count`` windows side by side: each column of the image along the other axes, then the columns of each window.

        They are clipped along columns where ``column`` is a number, else they lie in the image.
        """
        windows, is_known = self.windows, isinstance(column, int)
        stride, dilation, taps = windows.stride[2], windows.dilation[2], range(windows.kernel[2])
        begin = column * stride - windows.before[2]
        touched = sorted({u * stride + k * dilation for u in range(count) for k in taps})
        inside = [offset for offset in touched if not is_known or 0 <= begin + offset < windows.extent[2]]
        totals = {offset: Cell(self.acc, self.lanes, self.neutral) for offset in inside}
        starts, firsts, lasts = lines
        with T.serial(firsts[0], lasts[0]) as i, T.serial(firsts[1], lasts[1]) as j:
            at = [start + tap * d for start, tap, d in zip(starts, (i, j), windows.dilation, strict=False)]
            for offset, total in totals.items():
                self.take_in(total, load(self.x, [plane, *at, begin + offset, 0], self.lanes))
        for u in range(count):
            own = [totals[u * stride + k * dilation].value for k in taps if u * stride + k * dilation in totals]
            # With a dilation, a window may meet nothing but padding.
            value = functools.reduce(self.combined, own or [Cell(self.acc, self.lanes, self.neutral).value])
            self.store_block(plane, (*where, column + u), value, None if is_known else windows.kernel[2])

    def store_block(self, plane: Expr, where: tuple[Expr, ...], value: Expr, columns: int | None = None) -> None:
        """Finish a window of a block of channels; ``columns`` are those that count, where they are known."""
        self.y.put((plane, *where), self.known(plane, where), 0, self.lanes, [self.finished(value, where, columns)])

    def plane_of_windows(self, plane: Expr) -> None:
        """One block of channels, window by window: a load for each element that lies in the image."""
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
            self.store_block(plane, where, total.value)

    def inside(self, starts: Sequence[Expr]) -> tuple[list[Expr], list[Expr]]:
        """For each of the first axes the first element in the image of a window that starts there, and the one after the last."""
        dilation, kernel, extent = self.windows.dilation, self.windows.kernel, self.windows.extent
        first = [share(tirx.max(0, (d - 1 - at) // d)) for at, d in zip(starts, dilation, strict=False)]
        last = [
            share(tirx.min(k, (e - at + d - 1) // d))
            for at, d, k, e in zip(starts, dilation, kernel, extent, strict=False)
        ]
        return first, last

    def plane(self, plane: Expr) -> None:
        """One channel: some vectors of windows at once, a load for each element of a window."""
        windows, lanes, block = self.windows, self.lanes, self.lanes * self.schedule.columns
        scratch = T.alloc_buffer(windows.scratch_shape(block), self.acc)
        windows.fill(scratch, [], self.x, [plane], lanes, self.neutral)
        with T.grid(windows.out[0], windows.out[1], ceildiv(windows.out[2], block)) as (z, row, number):
            column = number * block
            places = [column + v * lanes for v in range(self.schedule.columns)]
            totals = [Cell(self.acc, lanes, self.neutral) for _ in places]
            with T.grid(*windows.kernel) as (i, j, k):
                for total, place in zip(totals, places, strict=True):
                    at = [*windows.tap_row(z, i, row, j), *windows.tap_column(k, place)]
                    self.take_in(total, load(scratch, at, lanes))
            values = [
                self.finished(total.value, (z, row, ramp(place, lanes)))
                for total, place in zip(totals, places, strict=True)
            ]
            where = self.known(plane, (z, row, column))[:-1]
            self.y.put((plane, z, row), where, column, windows.out[2], values)

    def take_in(self, total: Cell, value: Expr) -> None:
        total.set(self.combined(total.value, cast_to(self.acc, value)))

    def combined(self, a: Expr, b: Expr) -> Expr:
        b = share(b)
        return share(maximum(a, b) if self.is_max else a + b)

    def finished(self, total: Expr, where: Sequence[Expr], columns: int | None = None) -> Expr:
        """The result of the window at these positions, which may be vectors."""
        if self.is_max:
            return total
        counts = [self.counted(axis, position) for axis, position in enumerate(where)]
        if columns is not None:
            counts[2] = columns
        return share(total / cast_to(self.acc, counts[0] * counts[1] * counts[2]))

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


Lines = tuple[list[Expr], list[Expr], list[Expr]]
"""Where windows begin along all axes but columns, and their first element in the image and the one after the last along these."""


def _min(a: Expr, b: Expr) -> Expr:
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    return tirx.min(a, broadcast(_index(b, a), lanes_of(a)))


def _max(a: Expr, b: Expr) -> Expr:
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)
    return tirx.max(a, broadcast(_index(b, a), lanes_of(a)))


def _index(b: Expr, like: Expr) -> Expr:
    kind = str(like.ty.dtype).partition("x")[0]
    return tirx.const(b, kind) if isinstance(b, int) else cast_to(kind, b)
