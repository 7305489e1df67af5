"""Convolutions: on channel blocks (NCHWc) for dense and depthwise 2-d ones, on plain tensors for every other kind.

Except for depthwise ones, zero padding is a copy, by each task, of the part of its input it needs into a padded scratch that
stays in L2: the inner loops then have no borders. The copy moves each element once for some hundred to some thousand
multiply-adds.

Measured with AVX-512 on one thread, as fractions of the FMA peak (216 GFLOP/s there): pointwise 64 to 64 channels on 25 x 5
0.96, 3 x 3 on 64 channels and 56 x 56 or 8 x 8 0.92 to 1.0, 16 channels and 32 x 32 0.87, a 7 x 7 stem of stride 2 on three
channels 1.0; with weights that come from L3 (512 channels, 7 x 7) 0.72. A depthwise 3 x 3 on 64 channels and 25 x 5 takes a
fifth of the pointwise convolution that follows it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import numpy.typing as npt

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import IDENTITY, Buffer, BufferSpec, Dim, Epilogue, Expr
from mlec.backends.tvm.kernels.gemm import put
from mlec.backends.tvm.kernels.padding import Windows
from mlec.backends.tvm.kernels.schedule import around, variations
from mlec.backends.tvm.kernels.tile import (
    TASK_WORK,
    RegisterTile,
    accumulator_dtype,
    bits,
    ceildiv,
    copy_run,
    epilogue_parameters,
    flat_view,
    if_,
    parallel_if_large,
    parameter,
    product,
    unflatten,
)
from mlec.backends.tvm.kernels.vector import broadcast, cast_to, load, share
from mlec.backends.tvm.target import TargetInfo

LINE = 64
"""Bytes of a cache line."""


def prefetch(buffer: Buffer, index: Expr) -> None:
    """Ask for the line of an element of a flat buffer to be brought into L2. The index may lie beyond the end."""
    T.evaluate(tirx.call_intrin("void", "tirx.prefetch", tirx.address_of(buffer[index]), 0, 2, 1))


def pack_nchwc(weights: npt.NDArray[np.generic], in_block: int, out_block: int) -> npt.NDArray[np.generic]:
    """``[k, c, r, s]`` to ``[k / out_block, c / in_block, r, in_block, s, out_block]``, zero-padded."""
    k, c, r, s = weights.shape
    kb, cb = -(-k // out_block), -(-c // in_block)
    padded = np.zeros((kb * out_block, cb * in_block, r, s), weights.dtype)
    padded[:k, :c] = weights
    return np.ascontiguousarray(padded.reshape(kb, out_block, cb, in_block, r, s).transpose(0, 2, 4, 3, 5, 1))


def conv2d_nchwc(
    x_shape: Sequence[Dim],
    w_shape: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    dtype: str,
    target: TargetInfo,
    epilogue: Epilogue = IDENTITY,
    name: str = "conv2d_nchwc",
    schedule: ConvTile | None = None,
) -> tirx.PrimFunc:
    """``y[n, k/kb, p, q, kb] = epilogue(conv(x[n, c/b, h, w, b], w[k/kb, c/b, r, b, s, kb]))``; only n may be symbolic.

    ``pads`` lists top, left, bottom, right. Parameters of the program: x, w, the epilogue's inputs, y; the epilogue's
    indices are those of y (five).

    A tile (by default the first of `conv_tiles`) is some output positions times some blocks of output channels, its sums in
    registers. For each input channel and row of taps it loads the weights of the row and every input value that the row of taps
    meets, once: a value goes into as many sums as taps meet it. A task is an image (or part of its rows, or of its output channels).

    Small images have more weights than the caches hold (7 x 7 x 512: 9 MB for 0.23 GFLOP), and few tiles to use them for: the
    tiles of some output channels bring the weights of the next ones into L2, each its share, a line or two with each step.
    """
    n, cb, h, w, b = x_shape
    kb, _, r, _, s, k = w_shape
    (sh, sw), (dh, dw), (top, left, _, _) = strides, dilations, pads
    p, q = _extent(x_shape, (r, s), strides, pads, dilations)
    chosen = schedule or conv_tiles(x_shape, w_shape, strides, pads, dilations, dtype, target)[0]
    acc = accumulator_dtype(dtype)
    y_shape = (n, kb, p, q, k)
    padded = any(pads)
    if _is_pointwise(w_shape, strides, pads):
        h, w, p, q = 1, h * w, 1, p * q

    lanes = target.lanes(bits(acc))
    group, pt, qt, taps = chosen.blocks, chosen.rows, chosen.columns, chosen.taps

    item = bits(acc) // 8
    group_size = group * cb * r * b * s * k
    tiles, ahead = ceildiv(p, pt) * ceildiv(q, qt), 0
    if taps == s and tiles <= 8 and math.prod(w_shape) * item > target.l2_bytes // 4:
        ahead = ceildiv(group * s * k * item, LINE * tiles)
    work = k * kb * p * q * cb * b * r * s
    columns = (q - 1) * sw + (s - 1) * dw + 1
    parts = max(1, min(2 * target.cores, work // TASK_WORK))
    split_channels = kb * k * r * s > h * w
    k_parts = min(parts, kb // group) if split_channels else 1
    p_parts = 1 if split_channels else min(parts, ceildiv(p, pt))
    if padded:
        p_parts = max(p_parts, min(ceildiv(p, pt), cb * b * h * columns * item * 2 // target.l2_bytes))
    p_chunk, k_chunk = ceildiv(ceildiv(p, pt), p_parts) * pt, ceildiv(kb // group, k_parts)
    p_parts, k_parts = ceildiv(p, p_chunk), ceildiv(kb // group, k_chunk)
    rows = (p_chunk - 1) * sh + (r - 1) * dh + 1

    with prim_func(name) as kernel:
        x_arg = parameter("x", BufferSpec(x_shape, dtype))
        weights = parameter("w", BufferSpec(w_shape, dtype))
        extra = epilogue_parameters(epilogue)
        y_arg = parameter("y", BufferSpec(y_shape, epilogue.out_dtype or dtype))
        x = flat_view(x_arg, (n, cb, h, w * b), dtype)
        y = flat_view(y_arg, (n, kb, p, q, k), epilogue.out_dtype or dtype)
        stream = flat_view(weights, (math.prod(w_shape),), dtype)

        def task(index: Expr) -> None:
            image, k_part, p_part = unflatten(index, (n, k_parts, p_parts))
            first_row = share(p_part * p_chunk)
            count = share(tirx.min(p_chunk, p - first_row))
            if padded:
                source = T.alloc_buffer((cb, rows, columns * b), acc)
                pad(source, image, first_row, count)
            else:
                source = x

            def value(channel_block: Expr, row: Expr, column: Expr, channel: Expr) -> Expr:
                """Input at a row counted from the task's first, or from the image's if there is no scratch."""
                if padded:
                    return source[channel_block, row, column * b + channel]
                return cast_to(acc, x[image, channel_block, first_row * sh + row, column * b + channel])

            def tile(k_group: Expr, row: Expr, tile_rows: int, column: Expr, tile_columns: int) -> None:
                places = [(i, j) for i in range(tile_rows) for j in range(tile_columns)]
                sums = RegisterTile(len(places), group, k, acc)
                with T.grid(cb, r, s // taps, b) as (ci, ri, si, c):
                    if ahead:
                        number = row // pt * ceildiv(q, qt) + column // qt
                        step = ((number * cb + ci) * r + ri) * b + c
                        place = (k_group + 1) * group_size + step * (ahead * LINE // item)
                        for line in range(ahead):
                            prefetch(stream, place + line * (LINE // item))
                    vectors = [
                        [share(cast_to(acc, load(weights, [k_group * group + g, ci, ri, c, si + t, 0], k))) for g in range(group)]
                        for t in range(taps)
                    ]  # fmt: skip
                    for i in range(tile_rows):  # row by row: LLVM keeps this order, and spills in most others
                        for offset, meets in met_values(tile_columns, taps, sw, dw).items():
                            at = (row + i) * sh + ri * dh, column * sw + si * dw + offset
                            factor = share(broadcast(value(ci, *at, c), k))
                            for j, t in meets:
                                sums.add(i * tile_columns + j, factor, vectors[t])
                for place, (i, j) in enumerate(places):
                    at = (first_row + row + i, column + j)
                    for g in range(group):
                        block = k_group * group + g
                        where = unflatten(at[0] * q + at[1], y_shape[2:4]) if p != y_shape[2] else at
                        put(
                            y,
                            (image, block, *at),
                            (image, block, *where),
                            0,
                            k,
                            [sums.value(place, g)],
                            epilogue,
                            extra,
                        )

            def all_columns(k_group: Expr, row: Expr, tile_rows: int) -> None:
                if q >= qt:
                    with T.serial(q // qt) as j:
                        tile(k_group, row, tile_rows, j * qt, qt)
                if q % qt:
                    tile(k_group, row, tile_rows, q // qt * qt, q % qt)

            with T.serial(tirx.min(k_chunk, kb // group - k_part * k_chunk)) as kk:
                k_group = share(k_part * k_chunk + kk)
                with T.serial(count // pt) as i:
                    all_columns(k_group, i * pt, pt)
                if p % pt:
                    with if_(count % pt > 0):
                        all_columns(k_group, count // pt * pt, p % pt)

        def pad(scratch: Buffer, image: Expr, first_row: Expr, count: Expr) -> None:
            before = min(left, columns)
            inside = min(w, columns - before) * b
            with T.serial(cb) as ci, T.serial((count - 1) * sh + (r - 1) * dh + 1) as row:
                source_row = share(first_row * sh + row - top)
                with T.If(tirx.And(source_row >= 0, source_row < h)):
                    with T.Then():
                        copy_run(scratch, (ci, row), 0, before * b, lanes)
                        copy_run(
                            scratch, (ci, row), before * b, inside, lanes,
                            lambda offset, width: load(x, [image, ci, source_row, offset], width),
                        )  # fmt: skip
                        copy_run(scratch, (ci, row), before * b + inside, (columns - before) * b - inside, lanes)
                    with T.Else():
                        copy_run(scratch, (ci, row), 0, columns * b, lanes)

        parallel_if_large(product((n, k_parts, p_parts)), work // (k_parts * p_parts), task, k_parts * p_parts)
    return kernel.func


def conv_tiles(
    x_shape: Sequence[Dim],
    w_shape: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    dtype: str,
    target: TargetInfo,
) -> tuple[ConvTile, ...]:
    """The tiles that `conv2d_nchwc` may take for these arguments, those of few predicted cycles first."""
    _, cb, _, _, b = x_shape
    kb, _, r, _, s, k = w_shape
    extent = _extent(x_shape, (r, s), strides, pads, dilations)
    if _is_pointwise(w_shape, strides, pads):
        extent = (1, extent[0] * extent[1])
    width = bits(accumulator_dtype(dtype))
    registers = -(-k // target.lanes(width))
    return ranked_tiles(target, registers, kb, cb * b * r, extent, s, strides[1], dilations[1], k * width // 8)


def _extent(
    x_shape: Sequence[Dim],
    window: tuple[int, int],
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
) -> tuple[int, int]:
    """Rows and columns of the result of a convolution on channel blocks."""
    (_, _, h, w, _), (r, s) = x_shape, window
    p = (h + pads[0] + pads[2] - dilations[0] * (r - 1) - 1) // strides[0] + 1
    q = (w + pads[1] + pads[3] - dilations[1] * (s - 1) - 1) // strides[1] + 1
    return p, q


def _is_pointwise(w_shape: Sequence[int], strides: Sequence[int], pads: Sequence[int]) -> bool:
    """Whether the positions of an image are one long row."""
    return (w_shape[2], w_shape[4], *strides) == (1, 1, 1, 1) and not any(pads)


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
        strides: Sequence[int],
        pads: Sequence[int],
        dilations: Sequence[int],
        dtype: str,
        target: TargetInfo,
    ) -> Iterator[DepthwiseSchedule]:
        """Tiles of up to 12 columns, of equal width, whose sums and input vectors fit the registers."""
        b, (_, r, s, _) = x_shape[4], w_shape
        p, q = _extent(x_shape, (r, s), strides, pads, dilations)
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
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    dtype: str,
    target: TargetInfo,
    epilogue: Epilogue = IDENTITY,
    name: str = "depthwise_nchwc",
    schedule: DepthwiseSchedule | None = None,
) -> tirx.PrimFunc:
    """``y[n, c/b, p, q, b] = epilogue(conv(x[n, c/b, h, w, b], w[c/b, r, s, b]))``, each channel by itself; only n may be symbolic.

    ``pads`` lists top, left, bottom, right. Parameters of the program: x, w, the epilogue's inputs, y; the epilogue's
    indices are those of y (five).

    A vector is the block. A tile is some output columns of one row, up to 12 by default: it loads each input vector of the ``r``
    rows that it meets once, for up to ``s`` sums, so that ``r * s`` FMAs per output go with little more than ``r`` loads. There is no
    padded copy, which would cost as much as the sums: columns are known when the program is made, so tiles at the left and
    right edge leave out what lies in the padding, and rows at the top and bottom have a shorter loop over taps. An image is
    read and written once; beyond the caches that is all that counts (8 bytes for 18 operations at 3 x 3).
    """
    n, cb, h, w, b = x_shape
    _, r, s, _ = w_shape
    (sh, sw), (dh, dw), (top, left, _, _) = strides, dilations, pads
    p, q = _extent(x_shape, (r, s), strides, pads, dilations)
    acc = accumulator_dtype(dtype)
    chosen = schedule or next(DepthwiseSchedule.candidates(x_shape, w_shape, strides, pads, dilations, dtype, target))
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
        extra = epilogue_parameters(epilogue)
        y = parameter("y", BufferSpec((n, cb, p, q, b), epilogue.out_dtype or dtype))
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
                    put(y, at, at, 0, b, [sums.value(j, 0)], epilogue, extra)

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
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    groups: int,
    dtype: str,
    target: TargetInfo,
    epilogue: Epilogue = IDENTITY,
    input_dilations: Sequence[int] = (),
    name: str = "conv",
    schedule: ConvSchedule | None = None,
) -> tirx.PrimFunc:
    """``y[n, k, *out] = epilogue(conv(x[n, c, *space], w[k, c / groups, *kernel]))`` over one to three spatial axes.

    ``pads`` lists all befores, then all afters (an after may be negative: it cuts). ``input_dilations`` puts so many minus
    one zeros between the elements of x. The batch and spatial extents may be symbolic. Parameters of the program: x, w,
    the epilogue's inputs, y.

    Vectors run along the last axis; a tile is some output channels of one group times some rows times a few vectors.
    The scratch holds the padded input of one group, its last axis split by stride (position ``i`` at ``[i % stride, i //
    stride]``) so that every tap is a plain vector load whatever the stride. Depthwise convolutions are the case of one
    channel per group: the tile is then several rows of one channel.
    """
    n, c, *space = x_shape
    k, cg, *taps = w_shape
    windows = Windows.of(space, taps, strides, pads, dilations, input_dilations)
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
        extra = epilogue_parameters(epilogue)
        y_arg = parameter("y", BufferSpec(y_shape, epilogue.out_dtype or dtype))
        x = flat_view(x_arg, (n, c, *windows.extent), dtype)
        weights = flat_view(w_arg, (k, cg, kd, kh, kw), dtype)
        y = flat_view(y_arg, (n, k, od, oh, ow), epilogue.out_dtype or dtype)

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
                        put(y, at, where, column, ow, values, epilogue, extra)

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
