"""2-d convolutions of each channel by itself, on channel blocks (NCHWc).

An output of 3 x 3 is 18 FLOPs for 4 bytes read and 4 written, so memory counts beyond L2 and the FMAs within. On 64 x 56 x 56 in float32,
3.6 MFLOP on 1.6 MB: a tile of 12 columns takes 108 FMAs, 54 cycles, for 51 loads, 26 cycles, and 12 stores. 12544 vectors of outputs by 9
FMAs are 15 us at the 242 GFLOP/s of FMAs on registers; 2.4 MB through L2 (a store fetches its line first) take as long. Measured 28 us by
one thread, 131 GFLOP/s (torch 184); 512 x 14 x 14, where tiles are 7 columns, 11.5 us, 157 GFLOP/s; 64 x 25 x 5 1.3 us, 111 GFLOP/s, a
quarter of the pointwise convolution that follows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.conv_blocked import met_values, out_extent
from mlec.backends.tvm.kernels.epilogue import IDENTITY, Buffer, BufferSpec, Dim, Epilogue, Expr
from mlec.backends.tvm.kernels.result import Result
from mlec.backends.tvm.kernels.schedule import around, even, even_widths, variations
from mlec.backends.tvm.kernels.tile import (
    RegisterTile,
    accumulator_dtype,
    bits,
    ceildiv,
    chunks,
    flat_view,
    parallel_if_large,
    parameter,
    product,
    tasks_worth,
    unflatten,
)
from mlec.backends.tvm.kernels.vector import cast_to, load, share
from mlec.backends.tvm.target import TargetInfo
from mlec.ops.windows import Geometry


@dataclass(frozen=True)
class DepthwiseSchedule:
    """How a depthwise convolution goes over an image (of one block of channels, in `depthwise_nchwc`).

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
        parts = max(1, min(p, tasks_worth(r * s * q * b * 2 * p, target)))
        return DepthwiseSchedule.over((p, q), most, min(16, (target.vector_registers - 2) // registers - s), parts)

    @staticmethod
    def over(extent: tuple[int, int], most: int, widest: int, parts: int) -> Iterator[DepthwiseSchedule]:
        """For results of rows and columns: tiles of equal width, by default at most ``most`` wide, and so many tasks."""
        rows, columns = extent
        default = DepthwiseSchedule(even(columns, most), parts)
        return variations(
            default,
            lambda schedule: True,
            columns=even_widths(columns, range(1, widest + 1), default.columns),
            parts=around(parts, most=rows),
        )


def depthwise_nchwc(
    x_shape: Sequence[Dim],
    w_shape: Sequence[int],
    geometry: Geometry,
    dtype: str,
    target: TargetInfo,
    epilogue: Epilogue = IDENTITY,
    name: str = "depthwise_nchwc",
    schedule: DepthwiseSchedule | None = None,
    w_dtype: str = "",
) -> tirx.PrimFunc:
    """``y[n, c/b, p, q, b] = epilogue(conv(x[n, c/b, h, w, b], w[c/b, r, s, b]))``, each channel by itself; only n may be symbolic.

    Parameters of the program: x, w, the epilogue's inputs, y; the epilogue's indices are those of y (five). The weights and the result are
    of ``w_dtype``, by default that of x.

    A vector is the block. A tile is some output columns of one row, up to 12 by default: it loads each input vector of the ``r``
    rows that it meets once, for up to ``s`` sums, so that ``r * s`` FMAs per output go with little more than ``r`` loads. There is no
    padded copy, which would cost as much as the sums: columns are known when the program is made, so tiles at the left and
    right edge leave out what lies in the padding, and rows at the top and bottom have a shorter loop over taps. An image is
    read and written once; beyond the caches that is all that counts (8 bytes for 18 operations at 3 x 3).
    """
    n, cb, h, w, b = x_shape
    _, r, s, _ = w_shape
    p, q = out_extent(x_shape, (r, s), geometry)
    chosen = schedule or next(DepthwiseSchedule.candidates(x_shape, w_shape, geometry, dtype, target))
    with prim_func(name) as kernel:
        x = parameter("x", BufferSpec(x_shape, dtype))
        weights = parameter("w", BufferSpec(w_shape, w_dtype or dtype))
        y = Result.parameter("y", (n, cb, p, q, b), w_dtype or dtype, epilogue)
        x = flat_view(x, (n, cb, h, w * b), dtype)
        rows, parts = chunks(p, chosen.parts)
        program = _Depthwise(
            x, weights, y, x_shape, (r, s), (p, q), geometry, chosen.columns, rows, parts, accumulator_dtype(dtype)
        )
        parallel_if_large(product((n, cb, parts)), r * s * q * b * 2 * rows, program.task, cb * parts)
    return kernel.func


@dataclass(frozen=True)
class _Depthwise:
    """The parts of the program, see `depthwise_nchwc`.

    Attributes:
        x, weights, y: ``[n, cb, h, w * b]``, ``[cb, r, s, b]`` and ``[n, cb, p, q, b]``.
        x_shape, kernel, extent: n, cb, h, w, b; r and s; p and q.
        width: columns of a tile.
        rows, parts: of a task, and how many tasks share the rows.
        acc: dtype of the sums.
    """

    x: Buffer
    weights: Buffer
    y: Result
    x_shape: Sequence[Dim]
    kernel: tuple[int, int]
    extent: tuple[int, int]
    geometry: Geometry
    width: int
    rows: int
    parts: int
    acc: str

    @cached_property
    def columns(self) -> tuple[list[int], list[int]]:
        """Where tiles begin: those that meet no padding, which follow each other, and the others."""
        (sw, dw, left), w, (q, width) = self._along(1), self.x_shape[3], (self.extent[1], self.width)

        def is_inner(j: int) -> bool:
            return j + width <= q and j * sw >= left and (j + width - 1) * sw + (self.kernel[1] - 1) * dw - left < w

        begins = range(0, q, width)
        return [j for j in begins if is_inner(j)], [j for j in begins if not is_inner(j)]

    def _along(self, axis: int) -> tuple[int, int, int]:
        """Stride, dilation and padding before, along rows (0) or columns (1)."""
        geometry = self.geometry
        return geometry.strides[axis], geometry.dilations[axis], geometry.before[axis]

    def task(self, index: Expr) -> None:
        """Some rows of a block of channels of an image."""
        n, cb, h, _, _ = self.x_shape
        (sh, dh, top), r = self._along(0), self.kernel[0]
        image, block, part = unflatten(index, (n, cb, self.parts))
        first = share(part * self.rows)
        with T.serial(tirx.min(self.rows, self.extent[0] - first)) as i:
            row = share(first + i)
            with T.If(tirx.And(row * sh >= top, row * sh + (r - 1) * dh < h + top)):
                with T.Then():
                    self.row_of_tiles((image, block, row), True)
                with T.Else():
                    self.row_of_tiles((image, block, row), False)

    def row_of_tiles(self, at: tuple[Expr, Expr, Expr], whole: bool) -> None:
        """All columns of a row ``at`` image, block, row; ``whole``: no tap of it meets padding above or below."""
        inner, edges = self.columns
        if inner:
            with T.serial(len(inner)) as i:
                self.tile(at, inner[0] + i * self.width, self.width, whole)
        for column in edges:
            self.tile(at, column, min(self.width, self.extent[1] - column), whole)

    def tile(self, at: tuple[Expr, Expr, Expr], column: Expr, columns: int, whole: bool) -> None:
        """The sums of some columns of a row."""
        (sh, dh, top), (r, _), h, b = self._along(0), self.kernel, self.x_shape[2], self.x_shape[4]
        sums = RegisterTile(columns, 1, b, self.acc)
        if whole:
            for ri in range(r):
                self.row_of_taps(sums, at, ri, column, columns)
        else:
            start = at[2] * sh
            begin = share((tirx.max(0, top - start) + (dh - 1)) // dh)
            end = share(tirx.min(r, (tirx.max(0, h + top - start) + (dh - 1)) // dh))
            with T.serial(begin, end) as ri:
                self.row_of_taps(sums, at, ri, column, columns)
        for j in range(columns):
            where = (*at, column + j)
            self.y.put(where, where, 0, b, [sums.value(j, 0)])

    def row_of_taps(
        self, sums: RegisterTile, at: tuple[Expr, Expr, Expr], ri: Expr, column: Expr, columns: int
    ) -> None:
        """One row of taps: 3 weight vectors and 14 inputs for the 36 FMAs of a tile of 12 columns at 3 x 3 and stride 1.

        ``column`` is a number where the tile lies at an edge: inputs that lie in the padding are then left out.
        """
        (_, _, _, w, b), s, acc = self.x_shape, self.kernel[1], self.acc
        (sh, dh, top), (sw, dw, left), (image, block, row) = self._along(0), self._along(1), at
        taps = [share(cast_to(acc, load(self.weights, [block, ri, t, 0], b))) for t in range(s)]
        for offset, meets in met_values(columns, s, sw, dw).items():
            source = column * sw + (offset - left)
            if isinstance(source, int) and not 0 <= source < w:
                continue
            value = share(cast_to(acc, load(self.x, [image, block, row * sh + ri * dh - top, source * b], b)))
            for j, t in meets:
                sums.add(j, value, [taps[t]])
