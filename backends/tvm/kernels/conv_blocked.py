"""Dense 2-d convolutions on channel blocks (NCHWc).

Zero padding is a copy, by each task, of the part of its input it needs into a padded scratch that stays in L2: the inner loops then
have no borders. The copy moves each element once for some hundred to some thousand multiply-adds.

Measured with AVX-512 on one thread, as fractions of the FMA peak (216 GFLOP/s there): pointwise 64 to 64 channels on 25 x 5
0.96, 3 x 3 on 64 channels and 56 x 56 or 8 x 8 0.92 to 1.0, 16 channels and 32 x 32 0.87, a 7 x 7 stem of stride 2 on three
channels 1.0; with weights that come from L3 (512 channels, 7 x 7) 0.72.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import IDENTITY, Buffer, BufferSpec, Dim, Epilogue, Expr
from mlec.backends.tvm.kernels.gemm import put
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
from mlec.ir.dim import static_dims
from mlec.ops.windows import Geometry

LINE = 64
"""Bytes of a cache line."""


def prefetch(buffer: Buffer, index: Expr) -> None:
    """Ask for the line of an element of a flat buffer to be brought into L2. The index may lie beyond the end."""
    T.evaluate(tirx.call_intrin("void", "tirx.prefetch", tirx.address_of(buffer[index]), 0, 2, 1))


def conv2d_nchwc(
    x_shape: Sequence[Dim],
    w_shape: Sequence[int],
    geometry: Geometry,
    dtype: str,
    target: TargetInfo,
    epilogue: Epilogue = IDENTITY,
    name: str = "conv2d_nchwc",
    schedule: ConvTile | None = None,
) -> tirx.PrimFunc:
    """``y[n, k/kb, p, q, kb] = epilogue(conv(x[n, c/b, h, w, b], w[k/kb, c/b, r, b, s, kb]))``; only n may be symbolic.

    Parameters of the program: x, w, the epilogue's inputs, y; the epilogue's indices are those of y (five).

    A tile (by default the first of `conv_tiles`) is some output positions times some blocks of output channels, its sums in
    registers. For each input channel and row of taps it loads the weights of the row and every input value that the row of taps
    meets, once: a value goes into as many sums as taps meet it. A task is an image (or part of its rows, or of its output channels).

    Small images have more weights than the caches hold (7 x 7 x 512: 9 MB for 0.23 GFLOP), and few tiles to use them for: the
    tiles of some output channels bring the weights of the next ones into L2, each its share, a line or two with each step.
    """
    n, cb, h, w, b = x_shape
    kb, _, r, _, s, k = w_shape
    (sh, sw), (dh, dw), (top, left) = geometry.strides, geometry.dilations, geometry.before
    p, q = out_extent(x_shape, (r, s), geometry)
    chosen = schedule or conv_tiles(x_shape, w_shape, geometry, dtype, target)[0]
    acc = accumulator_dtype(dtype)
    y_shape = (n, kb, p, q, k)
    padded = any(geometry.pads)
    if _is_pointwise(w_shape, geometry):
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
    geometry: Geometry,
    dtype: str,
    target: TargetInfo,
) -> tuple[ConvTile, ...]:
    """The tiles that `conv2d_nchwc` may take for these arguments, those of few predicted cycles first."""
    _, cb, _, _, b = x_shape
    kb, _, r, _, s, k = w_shape
    extent = out_extent(x_shape, (r, s), geometry)
    if _is_pointwise(w_shape, geometry):
        extent = (1, extent[0] * extent[1])
    width = bits(accumulator_dtype(dtype))
    registers = -(-k // target.lanes(width))
    return ranked_tiles(
        target, registers, kb, cb * b * r, extent, s, geometry.strides[1], geometry.dilations[1], k * width // 8
    )


def out_extent(x_shape: Sequence[Dim], window: tuple[int, int], geometry: Geometry) -> tuple[int, int]:
    """Rows and columns of the result of a convolution on channel blocks."""
    p, q = static_dims(geometry.positions(x_shape[2:4], window))
    return p, q


def _is_pointwise(w_shape: Sequence[int], geometry: Geometry) -> bool:
    """Whether the positions of an image are one long row."""
    return (w_shape[2], w_shape[4], *geometry.strides) == (1, 1, 1, 1) and not any(geometry.pads)


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
