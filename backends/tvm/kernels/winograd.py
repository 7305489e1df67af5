"""3 x 3 convolutions of stride 1 on channel blocks with 16 instead of 36 products for each 2 x 2 outputs (Winograd's F(2x2, 3x3)).

Sums of inputs (4 x 4 for each 2 x 2 outputs) take the place of the inputs, sums of weights that of the weights (at compile time,
in float64); the products of both, summed over the channels, are sums of outputs. All factors in between are 1 and -1: the results
are about as exact as those of the direct convolution, with a difference of some units in the last place.

Per 2 x 2 outputs, in vectors of the machine: 16 FMAs for each input channel and block of output channels (36 in the direct
convolution), and some 40 cycles of loads, additions and stores for each block of input and of output channels. Predicted and
measured times as fractions of the direct convolution's, which runs at 0.85 to 1.0 of the FMA peak (AVX-512, one thread):

    16 channels, 32 x 32    0.92    0.9 .. 1.0
    32 channels, 16 x 16    0.73    0.73
    64 channels, 8 x 8      0.54    0.57
    64 channels, 56 x 56    0.54    0.62
    128 channels, 28 x 28   0.51    0.58
    256 channels, 14 x 14   0.49    0.50 (weights from L3)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.conv_blocked import ConvTile, prefetch, ranked_tiles
from mlec.backends.tvm.kernels.epilogue import IDENTITY, BufferSpec, Dim, Epilogue, Expr
from mlec.backends.tvm.kernels.result import Result
from mlec.backends.tvm.kernels.schedule import around, variations
from mlec.backends.tvm.kernels.tile import (
    RegisterTile,
    ceildiv,
    copy_run,
    flat_view,
    if_,
    parallel_if_large,
    parameter,
    product,
    unflatten,
)
from mlec.backends.tvm.kernels.vector import Cell, bits_as, const, load, reduce_lanes, share, store
from mlec.backends.tvm.target import TargetInfo

INFINITY = 0x7F800000
"""The bits of infinity in float32; those of NaN, without the sign, are larger."""

POSITIONS = 16
_TRANSFORM = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])


def pack_winograd(weights: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """``[k/kb, c/b, 3, b, 3, kb]`` to ``[k/kb, 16, c/b, b, kb]``: the sums of weights that take their place."""
    sums = np.einsum("ir,kcrbsv,js->kijcbv", _TRANSFORM, weights.astype(np.float64), _TRANSFORM)
    kb, _, _, cb, b, k = sums.shape
    return np.ascontiguousarray(sums.reshape(kb, POSITIONS, cb, b, k).astype(weights.dtype))


def are_summable(weights: npt.NDArray[np.generic] | None) -> bool:
    """Whether the weights are known, and so far from overflow that their sums are finite, too."""
    return weights is not None and bool((np.abs(weights.astype(np.float64)) < 1e37).all())


def _blocks(extent: tuple[int, int], w_shape: Sequence[int], target: TargetInfo) -> tuple[int, int, int]:
    """Rows and columns of 2 x 2 outputs in an image, and how many rows are worked on together.

    Some 24 squares; where the weights come from L3 for each task, as many as the sums of inputs leave room for in half of L2.
    """
    down, across = ceildiv(extent[0], 2), ceildiv(extent[1], 2)
    squares = target.l2_bytes // 2 // (POSITIONS * w_shape[1] * w_shape[3] * 4) if _from_l3(w_shape, target) else 24
    together = max(1, min(down, squares // across))
    return down, across, ceildiv(down, ceildiv(down, together))


def _weight_bytes(w_shape: Sequence[int]) -> int:
    kb, cb, _, b, _, k = w_shape
    return kb * cb * b * k * POSITIONS * 4


def _from_l3(w_shape: Sequence[int], target: TargetInfo) -> bool:
    """Whether the weights do not stay in L2 from one task to the next."""
    return _weight_bytes(w_shape) > target.l2_bytes // 2


def _product_tiles(target: TargetInfo, blocks: int, channels: int, squares: int, lanes: int) -> tuple[ConvTile, ...]:
    """Register tiles of the products at one of the 16 positions, the best first: a pointwise convolution of a row of squares."""
    return ranked_tiles(target, 1, blocks, channels, (1, squares), 1, 1, 1, lanes * 4)


@dataclass(frozen=True)
class WinogradSchedule:
    """How `conv2d_winograd` goes over an image.

    Attributes:
        rows: of 2 x 2 squares that are worked on together.
        blocks, squares: of the register tile of the products: blocks of output channels, and squares.
    """

    rows: int
    blocks: int
    squares: int

    @staticmethod
    def candidates(extent: tuple[int, int], w_shape: Sequence[int], target: TargetInfo) -> Iterator[WinogradSchedule]:
        """For an image of so many output rows and columns."""
        kb, cb, _, b, _, k = w_shape
        down, across, rows = _blocks(extent, w_shape, target)

        def tiles(rows: int) -> tuple[ConvTile, ...]:
            return _product_tiles(target, kb, cb * b, rows * across, k)

        first = tiles(rows)[0]
        return variations(
            WinogradSchedule(rows, first.blocks, first.columns),
            lambda s: (s.blocks, s.squares) in {(tile.blocks, tile.columns) for tile in tiles(s.rows)},
            rows=around(rows, most=down),
            squares=[tile.columns for tile in tiles(rows)],
            blocks=[tile.blocks for tile in tiles(rows)],
        )


def applicable(w_shape: Sequence[int], extent: tuple[int, int], dtype: str, target: TargetInfo) -> bool:
    """Whether `conv2d_winograd` computes this convolution of stride 1: for whole vectors of float32."""
    _, _, r, b, s, k = w_shape
    lanes = target.lanes(32)
    return dtype == "float32" and (r, s) == (3, 3) and b == k == lanes and min(extent) >= 2


def worthwhile(w_shape: Sequence[int], extent: tuple[int, int], dtype: str, target: TargetInfo) -> bool:
    """Whether this applies, and is predicted to take less than 0.9 of the direct convolution's time.

    Weights from L3 come at some 4 bytes a cycle, beside the sums.
    """
    if not applicable(w_shape, extent, dtype, target):
        return False
    kb, cb, r, b, s, k = w_shape
    down, across, rows = _blocks(extent, w_shape, target)
    products = _product_tiles(target, kb, cb * b, rows * across, k)[0]
    tasks = ceildiv(down, rows)
    cycles = tasks * (POSITIONS * products.cycles + rows * across * (cb + kb) * 40)
    if _from_l3(w_shape, target):
        cycles = max(cycles, tasks * _weight_bytes(w_shape) / 4)
    direct = ranked_tiles(target, 1, kb, cb * b * r, extent, s, 1, 1, k * 4)[0]
    return bool(cycles < 0.9 * direct.cycles)


def conv2d_winograd(
    x_shape: Sequence[Dim],
    w_shape: Sequence[int],
    pads: Sequence[int],
    target: TargetInfo,
    epilogue: Epilogue = IDENTITY,
    name: str = "conv2d_winograd",
    schedule: WinogradSchedule | None = None,
) -> tirx.PrimFunc:
    """``y[n, k/kb, p, q, kb] = epilogue(conv(x[n, c/b, h, w, b], w[k/kb, c/b, 3, b, 3, kb]))`` in float32; only n may be symbolic.

    Parameters of the program: x, w as `pack_winograd` makes it, the epilogue's inputs, y; the epilogue's indices are those of y
    (five). ``pads`` lists top, left, bottom, right.

    A task is some rows of 2 x 2 squares of one image: padded copy, sums of inputs, and then for some blocks of output channels
    the products at the 16 positions and the sums of these. An input that is not finite would spread to all outputs of its
    squares, and one near the largest float could overflow; where any output is not finite, the task computes these blocks of
    channels again by the definition.
    """
    n, cb, h, w, b = x_shape
    kb, _, _, _, _, k = w_shape
    top, left, bottom, right = pads
    p, q = h + top + bottom - 2, w + left + right - 2
    schedule = schedule or next(WinogradSchedule.candidates((p, q), w_shape, target))
    rows, group, width = schedule.rows, schedule.blocks, schedule.squares
    down, across = ceildiv(p, 2), ceildiv(q, 2)
    squares, columns = rows * across, (2 * across + 2) * b
    tiles = ceildiv(squares, width)
    ahead = ceildiv(group, tiles) if _from_l3(w_shape, target) else 0
    lanes = target.lanes(32)
    tasks = ceildiv(down, rows)

    with prim_func(name) as kernel:
        x_arg = parameter("x", BufferSpec(x_shape, "float32"))
        u = parameter("u", BufferSpec((kb, POSITIONS, cb, b, k), "float32"))
        y = Result.parameter("y", (n, kb, p, q, k), "float32", epilogue)
        x = flat_view(x_arg, (n, cb, h, w * b), "float32")
        stream = flat_view(u, (kb * POSITIONS * cb * b * k,), "float32")

        def task(index: Expr) -> None:
            image, part = unflatten(index, (n, tasks))
            first = share(part * (2 * rows))
            padded = T.alloc_buffer((cb, 2 * rows + 2, columns), "float32")
            # One square more than there are, lest the 16 positions lie a power of two apart and share their places in L1.
            sums = T.alloc_buffer((POSITIONS, cb, (squares + 1) * b), "float32")
            products = T.alloc_buffer((POSITIONS, group, (squares + 1) * k), "float32")

            def pad() -> None:
                before = min(left * b, columns)
                inside = min(w * b, columns - before)
                with T.grid(cb, 2 * rows + 2) as (ci, row):
                    at = share(first + row - top)
                    with T.If(tirx.And(at >= 0, at < h)):
                        with T.Then():
                            copy_run(padded, (ci, row), 0, before, lanes)
                            copy_run(
                                padded,
                                (ci, row),
                                before,
                                inside,
                                lanes,
                                lambda o, width: load(x, [image, ci, at, o], width),
                            )
                            copy_run(padded, (ci, row), before + inside, columns - before - inside, lanes)
                        with T.Else():
                            copy_run(padded, (ci, row), 0, columns, lanes)

            def sum_inputs() -> None:
                with T.grid(cb, rows, across) as (ci, i, j):
                    d = [[share(load(padded, [ci, 2 * i + r, (2 * j + s) * b], b)) for s in range(4)] for r in range(4)]
                    half = [_input_sums([d[r][s] for r in range(4)]) for s in range(4)]
                    for r in range(4):
                        for s, value in enumerate(_input_sums([half[s][r] for s in range(4)])):
                            store(sums, value, [4 * r + s, ci, (i * across + j) * b])

            def multiply(k_group: Expr, position: Expr, number: Expr, count: int) -> None:
                """Some squares at one position; the tiles together fetch the weights of the next position, each those of some blocks."""
                totals, square = RegisterTile(count, group, k, "float32"), number * width
                after = k_group * POSITIONS + position + 1
                with T.grid(cb, b) as (ci, c):
                    for i in range(ahead):
                        block = after // POSITIONS * group + (number * ahead + i) % group
                        prefetch(stream, ((block * POSITIONS + after % POSITIONS) * cb + ci) * (b * k) + c * k)
                    totals.multiply_add(
                        [sums[position, ci, (square + t) * b + c] for t in range(count)],
                        [load(u, [k_group * group + g, position, ci, c, 0], k) for g in range(group)],
                    )
                for t in range(count):
                    for g in range(group):
                        store(products, totals.value(t, g), [position, g, (square + t) * k])

            def finish(block: Expr, g: Expr, i: Expr, j: Expr, largest: Cell) -> None:
                m = [share(load(products, [at, g, (i * across + j) * k], k)) for at in range(POSITIONS)]
                half = [_output_sums(m[s:POSITIONS:4]) for s in range(4)]
                for r in range(2):
                    for s, value in enumerate(_output_sums([half[c][r] for c in range(4)])):
                        magnitude = share(bits_as("int32", value) & const(0x7FFFFFFF, "int32", k))
                        largest.set(tirx.max(largest.value, magnitude))
                        write(block, i * 2 + r, j * 2 + s, value)

            def write(block: Expr, row: Expr, column: Expr, value: Expr) -> None:
                """Unless the square hangs over the edge there."""
                at = (image, block, first + row, column)
                over = [
                    i < extent
                    for i, extent, held in ((at[2], p, tasks * 2 * rows), (at[3], q, 2 * across))
                    if held > extent
                ]
                with if_(tirx.all(*over)) if over else nullcontext():
                    y.put(at, at, 0, k, [value])

            def by_definition(block: Expr) -> None:
                with T.grid(2 * rows, 2 * across) as (i, j):
                    total = Cell("float32", k, 0)
                    with T.grid(cb, b) as (ci, c):
                        at = [share(load(u, [block, position, ci, c, 0], k)) for position in range(POSITIONS)]
                        half = [_weights_of_sums(at[s:POSITIONS:4]) for s in range(4)]
                        for r in range(3):
                            for s, weight in enumerate(_weights_of_sums([half[column][r] for column in range(4)])):
                                factor = tirx.Broadcast(padded[ci, i + r, (j + s) * b + c], k)
                                total.set(total.value + factor * weight)
                    write(block, i, j, total.value)

            pad()
            sum_inputs()
            with T.serial(kb // group) as k_group:
                with T.serial(POSITIONS) as position:
                    if squares >= width:
                        with T.serial(squares // width) as t:
                            multiply(k_group, position, t, width)
                    if squares % width:
                        multiply(k_group, position, squares // width, squares % width)
                with T.serial(group) as g:
                    block = share(k_group * group + g)
                    largest = Cell("int32", k, 0)
                    with T.grid(rows, across) as (i, j):
                        finish(block, g, i, j, largest)
                    with if_(reduce_lanes(largest.value, tirx.max) >= INFINITY):
                        by_definition(block)

        parallel_if_large(product((n, tasks)), POSITIONS * squares * cb * b * kb * k, task, tasks)
    return kernel.func


def _input_sums(d: Sequence[Expr]) -> list[Expr]:
    return [share(d[0] - d[2]), share(d[1] + d[2]), share(d[2] - d[1]), share(d[1] - d[3])]


def _output_sums(m: Sequence[Expr]) -> list[Expr]:
    return [share(m[0] + m[1] + m[2]), share(m[1] - m[2] - m[3])]


def _weights_of_sums(u: Sequence[Expr]) -> list[Expr]:
    """The three weights that `_TRANSFORM` made four sums of."""
    return [u[0], share(u[1] - u[2]), u[3]]
