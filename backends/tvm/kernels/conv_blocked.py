"""Dense 2-d convolutions on channel blocks (NCHWc).

Zero padding is a copy, by each task, of the part of its input it needs into a padded scratch that stays in L2: the inner loops then
have no borders. The copy moves each element once for some hundred to some thousand multiply-adds.

64 x 56 x 56 by 3 x 3 to 64 channels is 231 MFLOP on 1.8 MB, 130 FLOPs a byte: FMAs count. The tile is 2 x 12 positions of one block: a
step (one input channel, one row of 3 taps) is 72 FMAs, 36 cycles, for 3 vectors of weights and 28 values, 16 cycles, whose broadcast is
part of the load. `ranked_tiles` predicts 4.04 million cycles for all tiles, 3.61 of them FMAs: 1160 us at 3.48 GHz; measured 1222 us by
one thread, 189 GFLOP/s. FMAs on registers reach 223, but with operands from L1 the clock is lower (`gemm`). The padded copy, 860 KB that
are written and read again, is not in the prediction. Of 1 x 1, 26 MFLOP on 1.6 MB, 138 us are predicted and 142 measured; of 512 x 7 x 7
by 3 x 3 to 512, whose weights, 9.4 MB, come from L3 beside the FMAs, 1196 and 1303.

A plain image is one in blocks of one channel. Each step of a tile reads another channel of it then, lines that lie some KB apart and that
nothing brings into L1 before they are asked for, where blocks of 16 are a run of lines for 16 steps: 256 x 28 x 28 by 1 x 1 to 256 takes
706 us so and 571 in blocks, 64 x 56 x 56 by 3 x 3 and stride 2 to 128 684 and 637. Images of few positions, which L1 holds, differ little
(38.4 and 36.9 us for 4 x 13). Where there is a padded copy anyway, it is made in blocks: then the 637 us are with the plain image.

Measured with AVX-512 on one thread of another processor, as fractions of its FMA peak (216 GFLOP/s): pointwise 64 to 64 channels on 25 x 5
0.96, 3 x 3 on 64 channels and 56 x 56 or 8 x 8 0.92 to 1.0, 16 channels and 32 x 32 0.87, a 7 x 7 stem of stride 2 on three
channels 1.0; with weights that come from L3 (512 channels, 7 x 7) 0.72.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import IDENTITY, Buffer, BufferSpec, Dim, Epilogue, Expr
from mlec.backends.tvm.kernels.padding import copy_padded_row
from mlec.backends.tvm.kernels.result import Result
from mlec.backends.tvm.kernels.tile import (
    RegisterTile,
    accumulator_dtype,
    bits,
    ceildiv,
    chunks,
    copy_run,
    flat_view,
    if_,
    parallel_if_large,
    parameter,
    product,
    tasks_worth,
    unflatten,
)
from mlec.backends.tvm.kernels.transpose import turn
from mlec.backends.tvm.kernels.vector import LINE, broadcast, cast_to, load, prefetch, share, store
from mlec.backends.tvm.target import TargetInfo
from mlec.ir.dim import static_dims
from mlec.ops.conv import is_pointwise
from mlec.ops.windows import Geometry


def conv2d_nchwc(
    x_shape: Sequence[Dim],
    w_shape: Sequence[int],
    geometry: Geometry,
    dtype: str,
    target: TargetInfo,
    epilogue: Epilogue = IDENTITY,
    name: str = "conv2d_nchwc",
    schedule: ConvTile | None = None,
    turned: bool = False,
) -> tirx.PrimFunc:
    """``y[n, k/kb, p, q, kb] = epilogue(conv(x[n, c/b, h, w, b], w[k/kb, c/b, r, b, s, kb]))``; only n may be symbolic.

    Parameters of the program: x, w, the epilogue's inputs, y; the epilogue's indices are those of y (five). If ``turned``, x is
    ``[n, c/b, b, h, w]`` in memory, a plain image, and comes into blocks as it is padded (see `can_turn`).

    A tile (by default the first of `conv_tiles`) is some output positions times some blocks of output channels, its sums in
    registers. For each input channel and row of taps it loads the weights of the row and every input value that the row of taps
    meets, once: a value goes into as many sums as taps meet it. A task is an image (or part of its rows, or of its output channels).

    Small images have more weights than the caches hold (7 x 7 x 512: 9 MB for 0.23 GFLOP), and few tiles to use them for: the
    tiles of some output channels bring the weights of the next ones into L2, each its share, some lines with a step or one with
    some steps. With weights that no cache holds, 1.2 MB of them for 28 x 28 x 128 by stride 2 to 256 take 0.92 of the time then, and
    9.4 MB for 7 x 7 x 512 0.75.
    """
    n, cb, h, w, b = x_shape
    kb, _, r, _, s, k = w_shape
    p, q = out_extent(x_shape, (r, s), geometry)
    y_shape = (n, kb, p, q, k)
    tile = schedule or conv_tiles(x_shape, w_shape, geometry, dtype, target)[0]
    if is_pointwise((w_shape[2], w_shape[4]), geometry):
        h = p = _rows_of_positions(p * q, w_shape, tile.columns, target)
        w = q = math.prod(y_shape[2:4]) // p
    with prim_func(name) as kernel:
        x = parameter("x", BufferSpec((n, cb, b, h, w) if turned else x_shape, dtype))
        weights = parameter("w", BufferSpec(w_shape, dtype))
        y = Result.parameter("y", y_shape, dtype, epilogue)
        x, y = x if turned else flat_view(x, (n, cb, h, w * b), dtype), y.viewed((n, kb, p, q, k))
        stream = flat_view(weights, (math.prod(w_shape),), dtype)
        shapes, acc = ((n, cb, h, w, b), w_shape, (p, q), y_shape[2:4]), accumulator_dtype(dtype)
        program = _Convolution(x, y, weights, stream, *shapes, geometry, tile, acc, target, turned)
        (_, group_parts), (_, row_parts) = program.shares
        parts = group_parts * row_parts
        parallel_if_large(product((n, group_parts, row_parts)), program.work // parts, program.task, parts)
    return kernel.func


@dataclass(frozen=True)
class _Rows:
    """What a task computes: ``count`` output rows of an image from ``first`` on.

    ``padded`` is its copy of the input, ``[cb, input rows, input columns * b]`` with padding; None where there is none, and the
    task reads the image.
    """

    image: Expr
    first: Expr
    count: Expr
    padded: Buffer | None


@dataclass(frozen=True)
class _Convolution:
    """The parts of the program, see `conv2d_nchwc`.

    Attributes:
        x, y: ``[n, cb, h, w * b]``, if ``turned`` ``[n, cb, b, h, w]``, and ``[n, kb, p, q, k]``.
        weights, stream: ``[kb, cb, r, b, s, k]``, and the same as one axis.
        x_shape, w_shape, extent: n, cb, h, w, b; kb, cb, r, b, s, k; p and q. The positions of a pointwise convolution are one row, or
            as many as tasks share.
        shown: rows and columns of the result as the epilogue knows them.
        acc: dtype of the sums.
    """

    x: Buffer
    y: Result
    weights: Buffer
    stream: Buffer
    x_shape: Sequence[Dim]
    w_shape: Sequence[int]
    extent: tuple[int, int]
    shown: tuple[int, int]
    geometry: Geometry
    chosen: ConvTile
    acc: str
    target: TargetInfo
    turned: bool

    @property
    def work(self) -> int:
        """Multiply-adds of an image."""
        return math.prod(self.extent) * math.prod(self.w_shape)

    @property
    def padded(self) -> bool:
        return any(self.geometry.pads)

    @property
    def columns(self) -> int:
        """Input columns, with padding, that an output row meets."""
        return columns_met(self.x_shape, self.w_shape, self.geometry)

    def input_rows(self, count: Dim) -> Dim:
        """Input rows, with padding, that so many output rows meet."""
        return (count - 1) * self.geometry.strides[0] + (self.w_shape[2] - 1) * self.geometry.dilations[0] + 1

    @cached_property
    def shares(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Groups of channel blocks of a task and how many parts that makes of them, and the same for rows of tiles.

        Where the weights are larger than the image, tasks share its output channels, so that each weight is read by one;
        otherwise its rows. The padded copy of a task takes half of L2 at most: a later group of channels finds it there.
        """
        _, cb, h, w, b = self.x_shape
        groups, tiles = self.w_shape[0] // self.chosen.blocks, ceildiv(self.extent[0], self.chosen.rows)
        parts, by_channel = tasks_worth(self.work, self.target), _shares_channels(self.w_shape, h * w)
        group_parts, row_parts = (min(parts, groups), 1) if by_channel else (1, min(parts, tiles))
        if self.padded:
            copied = cb * b * h * self.columns * bits(self.acc) // 8
            row_parts = max(row_parts, min(tiles, copied * 2 // self.target.l2_bytes))
        return chunks(groups, group_parts), chunks(tiles, row_parts)

    @cached_property
    def ahead(self) -> tuple[int, int]:
        """Lines of the next group's weights that a tile asks for at a time, and the steps from one time to the next: what all tiles of
        the group ask for is all of it.
        """
        (p, q), (_, cb, r, b, s, k), tile, item = self.extent, self.w_shape, self.chosen, bits(self.acc) // 8
        if tile.taps != s or math.prod(self.w_shape) * item <= self.target.l2_bytes // 4:
            return 0, 1
        steps = ceildiv(p, tile.rows) * ceildiv(q, tile.columns) * cb * r * b
        lines = ceildiv(tile.blocks * cb * r * b * s * k * item, LINE)
        apart = [every for every in range(2, b + 1) if b % every == 0 and every * lines <= steps]
        return int(ceildiv(lines, steps)), max(apart, default=1)

    def task(self, index: Expr) -> None:
        """Some output rows of an image, for some groups of output channel blocks."""
        n, cb, _, _, b = self.x_shape
        (groups, group_parts), (tiles, row_parts) = self.shares
        (p, _), height, all_groups = self.extent, self.chosen.rows, self.w_shape[0] // self.chosen.blocks
        image, group_part, row_part = unflatten(index, (n, group_parts, row_parts))
        first = share(row_part * (tiles * height))
        count = share(tirx.min(tiles * height, p - first))
        copy = (cb, self.input_rows(tiles * height), self.columns * b)
        rows = _Rows(image, first, count, T.alloc_buffer(copy, self.acc) if self.padded else None)
        if self.padded:
            self.pad(rows)
        with T.serial(tirx.min(groups, all_groups - group_part * groups)) as i:
            group = share(group_part * groups + i)
            with T.serial(count // height) as j:
                self.row_of_tiles(rows, group, j * height, height)
            if p % height:
                with if_(count % height > 0):
                    self.row_of_tiles(rows, group, count // height * height, p % height)

    def pad(self, rows: _Rows) -> None:
        """Copies the input that the rows meet."""
        _, cb, h, w, b = self.x_shape
        (top, left), lanes = self.geometry.before, self.target.lanes(bits(self.acc))
        before, inside = min(left, self.columns), columns_inside(w, self.columns, left)
        with T.serial(cb) as ci, T.serial(self.input_rows(rows.count)) as row:
            source = share(rows.first * self.geometry.strides[0] + row - top)
            if self.turned:
                with T.If(tirx.And(source >= 0, source < h)):
                    with T.Then():
                        self.turn(rows, ci, row, source)
                    with T.Else():
                        copy_run(rows.padded, (ci, row), 0, self.columns * b, lanes)
            else:
                run = (self.x, [rows.image, ci, source], before * b, inside * b)
                copy_padded_row(rows.padded, (ci, row), self.columns * b, run, h, lanes)

    def turn(self, rows: _Rows, ci: Expr, row: Expr, source: Expr) -> None:
        """Copies the row ``source`` of the image and brings it into blocks: squares of channels times columns, turned in registers."""
        (_, _, _, w, b), left = self.x_shape, self.geometry.before[1]
        lanes, padded = self.target.lanes(bits(self.acc)), rows.padded
        before, inside = min(left, self.columns), columns_inside(w, self.columns, left)
        copy_run(padded, (ci, row), 0, before * b, lanes)
        with T.serial(ceildiv(inside, b)) as j:
            column = share(tirx.min(j * b, inside - b))  # the last square may overlap the one before
            channels = [
                share(cast_to(self.acc, load(self.x, [rows.image, ci, c, source, column], b))) for c in range(b)
            ]
            for i, block in enumerate(turn(channels)):
                store(padded, block, [ci, row, (before + column + i) * b])
        copy_run(padded, (ci, row), (before + inside) * b, (self.columns - before - inside) * b, lanes)

    def row_of_tiles(self, rows: _Rows, group: Expr, row: Expr, height: int) -> None:
        """All columns of ``height`` rows; ``row`` counts from the task's first."""
        q, width = self.extent[1], self.chosen.columns
        if q >= width:
            with T.serial(q // width) as j:
                self.tile(rows, group, (row, j * width), (height, width))
        if q % width:
            self.tile(rows, group, (row, q // width * width), (height, q % width))

    def tile(self, rows: _Rows, group: Expr, corner: tuple[Expr, Expr], size: tuple[int, int]) -> None:
        """Sums of ``size`` output positions for one group of channel blocks.

        A step takes ``blocks * taps`` weight vectors and, for each row, the input values that they meet: 14 x 1 positions with
        one block and 3 taps load 3 vectors and 16 values for 42 FMAs.
        """
        (_, cb, r, b, s, k), acc, blocks, taps = self.w_shape, self.acc, self.chosen.blocks, self.chosen.taps
        (sh, sw), (dh, dw) = self.geometry.strides, self.geometry.dilations
        (row, column), (height, width) = corner, size
        sums = RegisterTile(height * width, blocks, k, acc)
        with T.grid(cb, r, s // taps, b) as (ci, ri, si, c):
            self.fetch_ahead(group, corner, (ci, ri, c))
            vectors = [
                [share(cast_to(acc, load(self.weights, [group * blocks + g, ci, ri, c, si + t, 0], k))) for g in range(blocks)]
                for t in range(taps)
            ]  # fmt: skip
            for i in range(height):  # row by row: LLVM keeps this order, and spills in most others
                for offset, meets in met_values(width, taps, sw, dw).items():
                    at = (row + i) * sh + ri * dh, column * sw + si * dw + offset
                    factor = share(broadcast(self.value(rows, ci, *at, c), k))
                    for j, t in meets:
                        sums.add(i * width + j, factor, vectors[t])
        self.finish(rows, group, corner, size, sums)

    def value(self, rows: _Rows, block: Expr, row: Expr, column: Expr, channel: Expr) -> Expr:
        """One input; its row counts from the first that the task meets."""
        place = column * self.x_shape[4] + channel
        if rows.padded is not None:
            return rows.padded[block, row, place]
        return cast_to(self.acc, self.x[rows.image, block, rows.first * self.geometry.strides[0] + row, place])

    def fetch_ahead(self, group: Expr, corner: tuple[Expr, Expr], step: tuple[Expr, Expr, Expr]) -> None:
        """Asks for the lines of the next group's weights that are this tile's share in a step (input block, row of taps, channel)."""
        (_, cb, r, b, s, k), (lines, every), line = self.w_shape, self.ahead, LINE // (bits(self.acc) // 8)
        (row, column), (ci, ri, c), (height, width) = corner, step, (self.chosen.rows, self.chosen.columns)
        if lines:
            tile = row // height * ceildiv(self.extent[1], width) + column // width
            number = ((tile * cb + ci) * r + ri) * (b // every) + c // every
            place = (group + 1) * (self.chosen.blocks * cb * r * b * s * k) + number * (lines * line)
            with if_(c % every == 0):
                for i in range(lines):
                    prefetch(self.stream, place + i * line)

    def finish(
        self, rows: _Rows, group: Expr, corner: tuple[Expr, Expr], size: tuple[int, int], sums: RegisterTile
    ) -> None:
        """Stores the sums of a tile."""
        k, blocks, (p, q) = self.w_shape[5], self.chosen.blocks, self.extent
        for place in range(size[0] * size[1]):
            i, j = divmod(place, size[1])
            at = (rows.first + corner[0] + i, corner[1] + j)
            for g in range(blocks):
                block = group * blocks + g
                where = at if p == self.shown[0] else unflatten(at[0] * q + at[1], self.shown)
                self.y.put((rows.image, block, *at), (rows.image, block, *where), 0, k, [sums.value(place, g)])


def conv_tiles(
    x_shape: Sequence[Dim],
    w_shape: Sequence[int],
    geometry: Geometry,
    dtype: str,
    target: TargetInfo,
) -> tuple[ConvTile, ...]:
    """The tiles that `conv2d_nchwc` may take for these arguments, those of few predicted cycles first."""
    _, cb, _, _, b = x_shape
    kb, _, r, _, s, k = w_shape
    extent = out_extent(x_shape, (r, s), geometry)
    if is_pointwise((w_shape[2], w_shape[4]), geometry):
        extent = (1, extent[0] * extent[1])
    width = bits(accumulator_dtype(dtype))
    registers = -(-k // target.lanes(width))
    return ranked_tiles(
        target, registers, kb, cb * b * r, extent, s, geometry.strides[1], geometry.dilations[1], k * width // 8
    )


def can_turn(x_shape: Sequence[Dim], w_shape: Sequence[int], geometry: Geometry) -> bool:
    """Whether `conv2d_nchwc` takes the image ``turned``: it is copied anyway, and has as many columns as a block has channels."""
    b, columns = x_shape[4], columns_met(x_shape, w_shape, geometry)
    return any(geometry.pads) and b > 1 and columns_inside(x_shape[3], columns, geometry.before[1]) >= b


def columns_met(x_shape: Sequence[Dim], w_shape: Sequence[int], geometry: Geometry) -> int:
    """Input columns, with padding, that an output row meets."""
    _, q = out_extent(x_shape, (w_shape[2], w_shape[4]), geometry)
    return (q - 1) * geometry.strides[1] + (w_shape[4] - 1) * geometry.dilations[1] + 1


def columns_inside(width: int, columns: int, left: int) -> int:
    """Of so many columns of the padded input, those of the image, which is so wide and lies behind so many columns of padding."""
    return min(width, columns - min(left, columns))


def out_extent(x_shape: Sequence[Dim], window: tuple[int, int], geometry: Geometry) -> tuple[int, int]:
    """Rows and columns of the result of a convolution on channel blocks."""
    p, q = static_dims(geometry.positions(x_shape[2:4], window))
    return p, q


def _shares_channels(w_shape: Sequence[int], positions: int) -> bool:
    """Whether the weights of an input channel are more than its values."""
    kb, _, r, _, s, k = w_shape
    return kb * k * r * s > positions


def _rows_of_positions(positions: int, w_shape: Sequence[int], columns: int, target: TargetInfo) -> int:
    """How many rows of equal length the positions of a pointwise convolution are: one, so that there is but one last tile; where tasks
    share the rows, as many as there are tasks or a few more, each of four tiles of ``columns`` at least.
    """
    if _shares_channels(w_shape, positions):
        return 1
    wanted = tasks_worth(positions * math.prod(w_shape), target)
    most = max(1, positions // (4 * columns))
    divisors = [rows for rows in range(1, most + 1) if positions % rows == 0]
    return next((rows for rows in divisors if rows >= wanted), divisors[-1])


@dataclass(frozen=True)
class ConvTile:
    """Register tile of a convolution on channel blocks.

    Attributes:
        blocks: output channel blocks.
        rows, columns: output positions.
        taps: taps of a row of the kernel that are unrolled: all of them, or one.
        cycles: predicted for all tiles of one image; infinite where the tile leaves too few registers.
    """

    blocks: int
    rows: int
    columns: int
    taps: int
    cycles: float = field(compare=False, repr=False)


def met_values(columns: int, taps: int, stride: int, dilation: int) -> dict[int, list[tuple[int, int]]]:
    """For each input column that a tile reads, counted from its first: the pairs (output column, tap) that meet there."""
    met: dict[int, list[tuple[int, int]]] = {}
    for offset, j, t in sorted((j * stride + t * dilation, j, t) for j in range(columns) for t in range(taps)):
        met.setdefault(offset, []).append((j, t))
    return met


@cache
def ranked_tiles(
    target: TargetInfo,
    registers: int,
    blocks: int,
    steps: int,
    extent: tuple[int, int],
    kernel_columns: int,
    stride: int,
    dilation: int,
    vector_bytes: int,
) -> tuple[ConvTile, ...]:
    """Tiles of a convolution, those with the fewest predicted cycles for an image first; at least one.

    A step (one input channel, one row of taps) of a tile of ``n`` sums does ``n * taps`` FMAs, loads ``blocks * taps`` weight
    vectors and each input value that it meets; two of either go in a cycle, and the ``taps`` FMAs of a sum wait for each other
    (4 cycles). Weights that exceed half of L1 come from L2, at about 32 bytes a cycle beside the rest.

    Args:
        registers: that a sum of one block takes.
        blocks: output channel blocks there are.
        steps: input channels times rows of the kernel.
        extent: output rows and columns.
        vector_bytes: of the weights of one block, one tap and one input channel.
    """
    p, q = extent
    tiles: list[ConvTile] = []
    for taps in sorted({1, kernel_columns}):
        for count in (1, 2, 4):
            if blocks % count:
                continue
            room = target.vector_registers * 7 // 8 // registers - count * taps
            weights = steps * kernel_columns * count * vector_bytes
            for columns in range(1, min(q, room // count) + 1):
                for rows in range(1, min(p, room // count // columns) + 1):
                    total = 0.0
                    for height, times in ((rows, p // rows), (p % rows, 1)):
                        for width, more in ((columns, q // columns), (q % columns, 1)):
                            if not height or not width:
                                continue
                            fmas = height * width * count * taps * registers / 2
                            loads = (
                                height * len(met_values(width, taps, stride, dilation)) + count * taps * registers
                            ) / 2
                            streamed = count * taps * vector_bytes / 32 if weights > target.l1_bytes // 2 else 0
                            step = max(fmas, loads, 4 * taps, streamed) + 0.15 * (loads + streamed) + 0.5
                            finish = height * width * count * registers * 2 + 20
                            total += times * more * (steps * kernel_columns // taps * step + finish)
                    tiles.append(ConvTile(count, rows, columns, taps, total * (blocks // count)))
    if not tiles:  # not even one position with all taps fits
        return (ConvTile(1, 1, 1, 1, math.inf),)
    return tuple(sorted(tiles, key=lambda tile: tile.cycles))
