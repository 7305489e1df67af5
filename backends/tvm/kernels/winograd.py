"""3 x 3 convolutions of stride 1 on channel blocks with fewer products, by Winograd's sums: F(2x2, 3x3) and F(4x4, 3x3).

Sums of inputs (4 x 4 for each square of 2 x 2 outputs, 6 x 6 for each of 4 x 4) take the place of the inputs, sums of weights that of
the weights (at compile time, in float64); the products of both, summed over the channels, are sums of outputs. For each output,
input and output channel that is 4 products with squares of 2 x 2, and 2.25 with squares of 4 x 4, where the definition has 9.

For squares of 2 x 2 all factors in between are 1 and -1: the results are about as exact as those of the direct convolution. For those of
4 x 4 they are up to 8, and the errors some times those of the direct convolution: below `TOLERANCE` of the largest output.

Cycles for a square are those of its products, ``positions * channels in * channels out / lanes / 2``, and for each block of input and
of output channels those of loads, additions and stores (`_SQUARE_CYCLES`).

On 64 channels and 56 x 56, 231 MFLOP by the definition are 196 squares of 4 x 4: 36 positions of 64 x 64 products for each, 58 MFLOP or
290 us at 200 GFLOP/s, and (4 + 4) * 130 cycles, 54 us at 3.8 GHz. A square reads 36 and writes 16 elements of each channel, and its sums
of inputs and its products, 36 elements each, go through L2: 280 KB for a row of 14 squares, which a task keeps there beside 576 KB of
weights; 24 squares or so make tiles of the products whole. Predicted and measured by one thread, in us (by the definition): 64 x 56 x 56
343, 465 (1158); 128 x 28 x 28 305, 424 (1104); 256 x 14 x 14 in squares of 2 x 2 523, 653 (1143). All three take a quarter to a third
longer than predicted, the definition a twentieth.

Where the weights come from L3, a task has a whole image, if half of L2 holds its sums. A lone image is then shared by output channels, and
each task sums the inputs anew: 14 x 14 x 256 takes 390 us on two threads instead of 710, and 720 on one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.conv_blocked import ConvTile, ranked_tiles
from mlec.backends.tvm.kernels.epilogue import IDENTITY, Buffer, BufferSpec, Dim, Epilogue, Expr
from mlec.backends.tvm.kernels.gemm_bf16 import has_tiles
from mlec.backends.tvm.kernels.padding import copy_padded_row
from mlec.backends.tvm.kernels.result import Result
from mlec.backends.tvm.kernels.schedule import alternating, around, variations
from mlec.backends.tvm.kernels.tile import (
    RegisterTile,
    ceildiv,
    flat_view,
    if_,
    parallel_if_large,
    parameter,
    product,
    unflatten,
)
from mlec.backends.tvm.kernels.vector import (
    Cell,
    bits_as,
    const,
    const_like,
    dtype_of,
    load,
    prefetch,
    reduce_lanes,
    share,
    store,
)
from mlec.backends.tvm.target import TargetInfo

INFINITY = 0x7F800000
"""The bits of infinity in float32; those of NaN, without the sign, are larger."""

TOLERANCE = {2: 2e-6, 4: 2e-5}
"""Largest error, as a part of the largest output, of squares of so many outputs a side, for up to `MOST_CHANNELS`. Seen where all inputs
have one sign, with 16, 64 and 576 channels: 2e-7, 3e-7 and 7e-7; 3e-6, 4e-6 and 1.5e-5 (by the definition 3e-7)."""

MOST_CHANNELS = 576
"""Input channels up to which squares of 4 x 4 are taken."""

_SQUARE_CYCLES = {2: 40, 4: 130}
"""For each square and block of channels, besides the products."""

_TRANSFORMS = {
    2: np.array([[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]]),
    4: np.array(
        [
            *([1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6]),
            *([1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]),
        ]
    ),
}
"""What makes sums of three weights in a line, by outputs of a square in a line."""


def positions_of(outputs: int) -> int:
    """Sums of inputs, and products, of a square of ``outputs x outputs``."""
    return (outputs + 2) ** 2


def pack_winograd(weights: npt.NDArray[np.generic], outputs: int) -> npt.NDArray[np.generic]:
    """``[k/kb, c/b, 3, b, 3, kb]`` to ``[k/kb, positions, c/b, b, kb]``: the sums of weights that take their place."""
    transform = np.kron(_TRANSFORMS[outputs], _TRANSFORMS[outputs])
    kb, cb, _, b, _, k = weights.shape
    squares = weights.transpose(0, 2, 4, 1, 3, 5).reshape(kb, 9, cb * b * k)
    sums = transform @ squares.astype(np.float64)
    return sums.astype(weights.dtype).reshape(kb, positions_of(outputs), cb, b, k)


def are_summable(weights: npt.NDArray[np.generic] | None) -> bool:
    """Whether the weights are known, and so far from overflow that their sums are finite, too."""
    return weights is not None and bool((np.abs(weights) < 1e37).all())


def _sizes(w_shape: Sequence[int]) -> tuple[int, ...]:
    """Outputs of a square, in a line, that keep the tolerance."""
    return (2, 4) if w_shape[1] * w_shape[3] <= MOST_CHANNELS else (2,)


def _squares(extent: tuple[int, int], w_shape: Sequence[int], outputs: int, target: TargetInfo) -> tuple[int, int, int]:
    """Rows and columns of squares in an image, and how many rows are worked on together.

    Some 24 squares; where the weights come from L3 for each task, as many as the sums of inputs leave room for in half of L2.
    """
    down, across = ceildiv(extent[0], outputs), ceildiv(extent[1], outputs)
    squares = 24
    if _from_l3(w_shape, outputs, target):
        squares = target.l2_bytes // 2 // (positions_of(outputs) * w_shape[1] * w_shape[3] * 4)
    together = max(1, min(down, squares // across))
    return down, across, ceildiv(down, ceildiv(down, together))


def _weight_bytes(w_shape: Sequence[int], outputs: int) -> int:
    kb, cb, _, b, _, k = w_shape
    return kb * cb * b * k * positions_of(outputs) * 4


def _from_l3(w_shape: Sequence[int], outputs: int, target: TargetInfo) -> bool:
    """Whether the weights do not stay in L2 from one task to the next."""
    return _weight_bytes(w_shape, outputs) > target.l2_bytes // 2


def _product_tiles(target: TargetInfo, blocks: int, channels: int, squares: int, lanes: int) -> tuple[ConvTile, ...]:
    """Register tiles of the products at one of the positions, the best first: a pointwise convolution of a row of squares."""
    return ranked_tiles(target, 1, blocks, channels, (1, squares), 1, 1, 1, lanes * 4)


@dataclass(frozen=True)
class WinogradSchedule:
    """How `conv2d_winograd` goes over an image.

    Attributes:
        outputs: of a square, in a line: 2 or 4.
        rows: of squares that are worked on together.
        blocks, squares: of the register tile of the products: blocks of output channels, and squares.
    """

    outputs: int
    rows: int
    blocks: int
    squares: int

    @staticmethod
    def candidates(extent: tuple[int, int], w_shape: Sequence[int], target: TargetInfo) -> Iterator[WinogradSchedule]:
        """For an image of so many output rows and columns."""
        sizes = sorted(_sizes(w_shape), key=lambda outputs: _cycles(extent, w_shape, outputs, target))
        return alternating(*(WinogradSchedule._of_size(outputs, extent, w_shape, target) for outputs in sizes))

    @staticmethod
    def _of_size(
        outputs: int, extent: tuple[int, int], w_shape: Sequence[int], target: TargetInfo
    ) -> Iterator[WinogradSchedule]:
        kb, cb, _, b, _, k = w_shape
        down, across, rows = _squares(extent, w_shape, outputs, target)

        def tiles(rows: int) -> tuple[ConvTile, ...]:
            return _product_tiles(target, kb, cb * b, rows * across, k)

        first = tiles(rows)[0]
        return variations(
            WinogradSchedule(outputs, rows, first.blocks, first.columns),
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
    """Whether this applies, and is predicted to take less than 0.9 of the direct convolution's time."""
    if not applicable(w_shape, extent, dtype, target):
        return False
    kb, cb, r, b, s, k = w_shape
    direct = ranked_tiles(target, 1, kb, cb * b * r, extent, s, 1, 1, k * 4)[0]
    return min(_cycles(extent, w_shape, outputs, target) for outputs in _sizes(w_shape)) < 0.9 * direct.cycles


def beats_bf16(before: int, after: int, extent: Sequence[int], target: TargetInfo) -> bool:
    """Whether the sums of a convolution by 3 x 3 take less time in float32 than its products do in bf16, as the processor multiplies that.

    Vectors that multiply pairs do twice as many products: measured on one core, they take 1.4 to 1.6 times as long as squares of 4 x 4,
    and 0.95 times as long as those of 2 x 2. Tiles do six times as many.

    Args:
        before, after: channels of the image and of the result.
        extent: of the result.
    """
    lanes = target.lanes(32)
    if has_tiles(target) or before % lanes or after % lanes:
        return False
    down, across = extent
    return worthwhile((after // lanes, before // lanes, 3, lanes, 3, lanes), (down, across), "float32", target)


def _cycles(extent: tuple[int, int], w_shape: Sequence[int], outputs: int, target: TargetInfo) -> float:
    """Predicted cycles of an image. Weights from L3 come at some 4 bytes a cycle, beside the sums."""
    kb, cb, _, b, _, k = w_shape
    down, across, rows = _squares(extent, w_shape, outputs, target)
    products = _product_tiles(target, kb, cb * b, rows * across, k)[0]
    tasks, each = ceildiv(down, rows), _SQUARE_CYCLES[outputs] * 32 // target.vector_registers
    cycles: float = tasks * (positions_of(outputs) * products.cycles + rows * across * (cb + kb) * each)
    streams = _from_l3(w_shape, outputs, target)
    return max(cycles, tasks * _weight_bytes(w_shape, outputs) / 4) if streams else cycles


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

    A task is some rows of squares of one image: padded copy, sums of inputs, and then for some blocks of output channels
    the products at all positions and the sums of these. An input that is not finite would spread to all outputs of its
    squares, and one near the largest float could overflow; where any output is not finite, the task computes these blocks of
    channels again by the definition.
    """
    n, cb, h, w, b = x_shape
    kb, _, _, _, _, k = w_shape
    top, left, bottom, right = pads
    p, q = h + top + bottom - 2, w + left + right - 2
    schedule = schedule or next(WinogradSchedule.candidates((p, q), w_shape, target))
    with prim_func(name) as kernel:
        x = parameter("x", BufferSpec(x_shape, "float32"))
        positions = positions_of(schedule.outputs)
        u = parameter("u", BufferSpec((kb, positions, cb, b, k), "float32"))
        y = Result.parameter("y", (n, kb, p, q, k), "float32", epilogue)
        x = flat_view(x, (n, cb, h, w * b), "float32")
        stream = flat_view(u, (kb * positions * cb * b * k,), "float32")
        program = _Winograd(x, u, stream, y, x_shape, w_shape, (p, q), (top, left), schedule, target)
        least = program.tasks * program.most_shares
        parallel_if_large(
            product((n, program.tasks)) * program.shares, program.work // program.most_shares, program.task, least
        )
    return kernel.func


@dataclass(frozen=True)
class _Squares:
    """What a task works on: the squares of an image from output row ``first`` on.

    Attributes:
        padded: the input that they meet, ``[cb, input rows, input columns * b]``.
        sums: of inputs, ``[positions, cb, squares * b]``: 221 KB for 64 channels and 24 squares of 4 x 4, which stay in L2.
        products: ``[positions, blocks, squares * k]``, of one group of output channel blocks.
    """

    image: Expr
    first: Expr
    padded: Buffer
    sums: Buffer
    products: Buffer


@dataclass(frozen=True)
class _Winograd:
    """The parts of the program, see `conv2d_winograd`.

    Attributes:
        x, y: ``[n, cb, h, w * b]`` and ``[n, kb, p, q, k]``.
        u, stream: ``[kb, positions, cb, b, k]``, and the same as one axis.
        x_shape, w_shape, extent, corner: n, cb, h, w, b; kb, cb, 3, b, 3, k; p and q; padding at the top and left.
    """

    x: Buffer
    u: Buffer
    stream: Buffer
    y: Result
    x_shape: Sequence[Dim]
    w_shape: Sequence[int]
    extent: tuple[int, int]
    corner: tuple[int, int]
    schedule: WinogradSchedule
    target: TargetInfo

    @property
    def outputs(self) -> int:
        """Outputs of a square, in a line."""
        return self.schedule.outputs

    @property
    def positions(self) -> int:
        return positions_of(self.outputs)

    @property
    def rows(self) -> int:
        """Output rows of a task."""
        return self.outputs * self.schedule.rows

    @property
    def columns(self) -> int:
        """Output columns of all squares."""
        return self.outputs * self.across

    @property
    def across(self) -> int:
        """Squares in a row."""
        return -(-self.extent[1] // self.outputs)

    @property
    def squares(self) -> int:
        """Squares of a task."""
        return self.schedule.rows * self.across

    @property
    def tasks(self) -> int:
        """Of an image, if all output channels are those of one task."""
        return -(-self.extent[0] // self.rows)

    @property
    def groups(self) -> int:
        """Of blocks of output channels."""
        return self.w_shape[0] // self.schedule.blocks

    @cached_property
    def shares(self) -> Dim:
        """Tasks that some rows of squares are split into by output channels: where cores would be idle, as each sums the inputs anew."""
        n = self.x_shape[0]
        if isinstance(n, int):
            return self._shares_of(max(n, 1))
        if self.most_shares == 1:
            return 1
        images, cores = tirx.max(n, const(1, dtype_of(n))), const(self.target.cores, dtype_of(n))
        return share(tirx.min(const(self.groups, dtype_of(n)), ceildiv(cores, images * self.tasks)))

    @property
    def most_shares(self) -> int:
        """The same for a lone image."""
        return self._shares_of(1)

    def _shares_of(self, images: int) -> int:
        return min(self.groups, -(-self.target.cores // (images * self.tasks)))

    @property
    def work(self) -> int:
        """Multiply-adds of some rows of squares and all output channels."""
        kb, cb, _, b, _, k = self.w_shape
        return self.positions * self.squares * cb * b * kb * k

    @property
    def blocks_ahead(self) -> int:
        """Blocks of the next position's weights that each register tile fetches: all of them over the tiles of a position."""
        if not _from_l3(self.w_shape, self.outputs, self.target):
            return 0
        return -(-self.schedule.blocks // -(-self.squares // self.schedule.squares))

    def task(self, index: Expr) -> None:
        """Some rows of squares of one image, and some output channels."""
        (n, cb, _, _, b), k = self.x_shape, self.w_shape[-1]
        blocks, squares = self.schedule.blocks, self.squares
        image, part, channels = unflatten(index, (n, self.tasks, self.shares))
        first = share(part * self.rows)
        groups = ceildiv(self.groups, self.shares)
        padded = T.alloc_buffer((cb, self.rows + 2, (self.columns + 2) * b), "float32")
        # One square more than there are, lest the positions lie a power of two apart and share their places in L1.
        sums = T.alloc_buffer((self.positions, cb, (squares + 1) * b), "float32")
        products = T.alloc_buffer((self.positions, blocks, (squares + 1) * k), "float32")
        work = _Squares(image, first, padded, sums, products)
        self.pad(work)
        self.sum_inputs(work)
        with T.serial(tirx.min(groups, self.groups - channels * groups)) as i:
            group = share(channels * groups + i)
            self.multiply(work, group)
            with T.serial(blocks) as g:
                block = share(group * blocks + g)
                largest = Cell("int32", k, 0)
                with T.grid(self.schedule.rows, self.across) as (row, column):
                    self.sum_products(work, block, g, row, column, largest)
                with if_(reduce_lanes(largest.value, tirx.max) >= INFINITY):
                    self.by_definition(work, block)

    def pad(self, work: _Squares) -> None:
        """Copies the input that the squares meet: two rows and columns more than their outputs."""
        (_, cb, h, w, b), (top, left) = self.x_shape, self.corner
        width = (self.columns + 2) * b
        before = min(left * b, width)
        inside = min(w * b, width - before)
        with T.grid(cb, self.rows + 2) as (ci, row):
            at = share(work.first + row - top)
            run = (self.x, [work.image, ci, at], before, inside)
            copy_padded_row(work.padded, (ci, row), width, run, h, self.target.lanes(32))

    def sum_inputs(self, work: _Squares) -> None:
        """The sums of the inputs of each square: 4 x 4 with 32 additions of vectors, or 6 x 6."""
        cb, b, m = self.x_shape[1], self.x_shape[4], self.outputs
        side = range(m + 2)
        with T.grid(cb, self.schedule.rows, self.across) as (ci, i, j):
            d = [[share(load(work.padded, [ci, m * i + r, (m * j + s) * b], b)) for s in side] for r in side]
            half = [_input_sums([d[r][s] for r in side]) for s in side]
            for r in side:
                for s, value in enumerate(_input_sums([half[s][r] for s in side])):
                    store(work.sums, value, [(m + 2) * r + s, ci, (i * self.across + j) * b])

    def multiply(self, work: _Squares, group: Expr) -> None:
        """The products of a group of output channel blocks at all positions."""
        width = self.schedule.squares
        with T.serial(self.positions) as position:
            if self.squares >= width:
                with T.serial(self.squares // width) as tile:
                    self.tile(work, group, position, tile, width)
            if self.squares % width:
                self.tile(work, group, position, self.squares // width, self.squares % width)

    def tile(self, work: _Squares, group: Expr, position: Expr, number: Expr, count: int) -> None:
        """The products of ``count`` squares at one position, the register tile of that number.

        The tiles together fetch the weights of the next position, each those of some blocks.
        """
        (_, cb, _, b, _, k), blocks = self.w_shape, self.schedule.blocks
        totals, square = RegisterTile(count, blocks, k, "float32"), number * self.schedule.squares
        after = group * self.positions + position + 1
        with T.grid(cb, b) as (ci, c):
            for i in range(self.blocks_ahead):
                block = after // self.positions * blocks + (number * self.blocks_ahead + i) % blocks
                place = (block * self.positions + after % self.positions) * cb + ci
                prefetch(self.stream, place * (b * k) + c * k)
            totals.multiply_add(
                [work.sums[position, ci, (square + t) * b + c] for t in range(count)],
                [load(self.u, [group * blocks + g, position, ci, c, 0], k) for g in range(blocks)],
            )
        for t in range(count):
            for g in range(blocks):
                store(work.products, totals.value(t, g), [position, g, (square + t) * k])

    def sum_products(self, work: _Squares, block: Expr, g: Expr, i: Expr, j: Expr, largest: Cell) -> None:
        """The outputs of the square at ``i, j``; ``largest`` takes in their magnitudes, as bits."""
        k, m = self.w_shape[5], self.outputs
        square = (i * self.across + j) * k
        products = [share(load(work.products, [at, g, square], k)) for at in range(self.positions)]
        half = [_output_sums(products[s :: m + 2]) for s in range(m + 2)]
        for r in range(m):
            for s, value in enumerate(_output_sums([column[r] for column in half])):
                magnitude = share(bits_as("int32", value) & const(0x7FFFFFFF, "int32", k))
                largest.set(tirx.max(largest.value, magnitude))
                self.write(work, block, i * m + r, j * m + s, value)

    def by_definition(self, work: _Squares, block: Expr) -> None:
        """The outputs of one block of channels with nine products each; the weights are taken back out of their sums."""
        _, cb, _, b, _, k = self.w_shape
        side = self.outputs + 2
        with T.grid(self.rows, self.columns) as (i, j):
            total = Cell("float32", k, 0)
            with T.grid(cb, b) as (ci, c):
                at = [share(load(self.u, [block, position, ci, c, 0], k)) for position in range(self.positions)]
                half = [_weights_of_sums(at[s::side]) for s in range(side)]
                for r in range(3):
                    for s, weight in enumerate(_weights_of_sums([column[r] for column in half])):
                        factor = tirx.Broadcast(work.padded[ci, i + r, (j + s) * b + c], k)
                        total.set(total.value + factor * weight)
            self.write(work, block, i, j, total.value)

    def write(self, work: _Squares, block: Expr, row: Expr, column: Expr, value: Expr) -> None:
        """Stores an output, the row being counted from the task's first, unless the square hangs over the edge there."""
        at = (work.image, block, work.first + row, column)
        held = (self.tasks * self.rows, self.columns)
        over = [i < extent for i, extent, most in zip(at[2:], self.extent, held, strict=True) if most > extent]
        with if_(tirx.all(*over)) if over else nullcontext():
            self.y.put(at, at, 0, self.w_shape[5], [value])


def _input_sums(d: Sequence[Expr]) -> list[Expr]:
    """Of the four or six inputs in a line that a square meets."""
    if len(d) == 4:
        return [share(d[0] - d[2]), share(d[1] + d[2]), share(d[2] - d[1]), share(d[1] - d[3])]
    even, odd = share(d[4] - _times(4, d[2])), share(d[3] - _times(4, d[1]))
    near, far = share(d[4] - d[2]), share(_times(2, d[3] - d[1]))
    first, last = _times(4, d[0]) - _times(5, d[2]) + d[4], _times(4, d[1]) - _times(5, d[3]) + d[5]
    return [share(first), share(even + odd), share(even - odd), share(near + far), share(near - far), share(last)]


def _output_sums(m: Sequence[Expr]) -> list[Expr]:
    """The two or four outputs of four or six products in a line."""
    if len(m) == 4:
        return [share(m[0] + m[1] + m[2]), share(m[1] - m[2] - m[3])]
    ones, ones_apart, twos, twos_apart = (
        share(x) for x in (m[1] + m[2], m[1] - m[2], m[3] + m[4], m[3] - m[4])
    )  # fmt: skip
    first, last = m[0] + ones + twos, ones_apart + _times(8, twos_apart) + m[5]
    return [share(first), share(ones_apart + _times(2, twos_apart)), share(ones + _times(4, twos)), share(last)]


def _weights_of_sums(u: Sequence[Expr]) -> list[Expr]:
    """The three weights that a line of `_TRANSFORMS` made four or six sums of."""
    if len(u) == 4:
        return [u[0], share(u[1] - u[2]), u[3]]
    return [share(_times(4, u[0])), share(_times(3, u[2] - u[1])), u[5]]


def _times(factor: int, x: Expr) -> Expr:
    return x * const_like(float(factor), x)
