"""2-d convolutions of narrow numbers, whose windows are some runs of bytes: of bytes over images with their channels last, and what
`mlec.backends.tvm.kernels.conv_bf16` shares with them.

64 x 56 x 56 by 3 x 3 to 64 channels is 116 million products on 0.2 MB of image and 37 KB of weights, which give 0.8 MB of sums:
instructions count. 28 positions by 32 channels take 9 steps of AMX, four instructions of 14 cycles each: 224 such tiles are 113000
cycles, 32 us at 3.48 GHz, if operands are in L1; the image is in L2, from which the 1792 bytes of a step take 64 to 128 cycles
(`kernels.int8.Tiles.sums`): 37 to 74 us. Measured 77 by one thread, 3000 Gop/s; 128 x 28 x 28 to 128 73. Vectors of VNNI do 128 products
in a cycle: predicted 259 us, measured 302, and 305.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import IDENTITY, Buffer, BufferSpec, Dim, Epilogue, Expr
from mlec.backends.tvm.kernels.gemm_int8 import fits, vector_tile
from mlec.backends.tvm.kernels.int8 import (
    HELD,
    QUAD,
    STRIP,
    Dots,
    Multiplier,
    Packed,
    Rows,
    Tiles,
    copied_rows,
    has_amx,
    in_parts,
    put,
    work_of,
)
from mlec.backends.tvm.kernels.result import Result
from mlec.backends.tvm.kernels.schedule import around, even, even_widths, variations
from mlec.backends.tvm.kernels.tile import (
    flat_view,
    parallel_if_large,
    parameter,
    product,
    tasks_worth,
    unflatten,
)
from mlec.backends.tvm.kernels.vector import share
from mlec.backends.tvm.target import TargetInfo
from mlec.ir.dim import static_dims
from mlec.ops.windows import Geometry

MOST_SHARING = 16
"""Tiles on a panel of weights; where there are more, the panel is small beside what they compute."""


def conv_packing(w_shape: Sequence[int], geometry: Geometry, groups: int) -> Packed:
    """How weights ``[kh, kw, c / groups, o]`` are packed: a window is ``kh`` rows of ``kw * c`` bytes where these lie in one piece."""
    kh, kw, channels, outputs = w_shape
    whole = groups == 1 and (geometry.dilations[1] == 1 or kw == 1)
    segments, length = (kh, kw * channels) if whole else (kh * kw, channels)
    return Packed(groups, outputs // groups, segments, length)


def is_pointwise(w_shape: Sequence[int], geometry: Geometry, groups: int) -> bool:
    """Whether the convolution is a product of the pixels, as they lie, with a matrix."""
    return (*w_shape[:2], *geometry.strides, groups) == (1, 1, 1, 1, 1) and not any(geometry.pads)


@dataclass(frozen=True)
class NarrowConvSchedule:
    """How a convolution of narrow numbers goes over an image.

    Attributes:
        amx: whether by tiles of 16 columns of outputs and up to 16 positions of a row; ``columns`` are those positions.
        columns, vectors: of a tile: output positions of a row, vectors of channels (of AMX: blocks).
        parts: tasks that share the rows.
        channel_parts: tasks that share the channels.
    """

    amx: bool
    columns: int
    vectors: int
    parts: int
    channel_parts: int

    @staticmethod
    def candidates(
        extent: tuple[int, int], nbytes: Dim, packed: Packed, dots: Dots, amx: bool, target: TargetInfo
    ) -> Iterator[NarrowConvSchedule]:
        """For results of so many rows and columns, of images of ``nbytes`` bytes.

        Vectors multiply what there are ``dots`` for, tiles what there is ``amx`` for.
        """
        (p, q), on_vectors = extent, dots.sums == packed.sums

        def shares(amx: bool) -> tuple[int, int]:
            tasks = tasks_worth(_work(p * q, packed, dots, amx), target)
            by_channel = packed.nbytes > nbytes
            least = -(-nbytes * 2 // target.l2_bytes)
            parts = max(1, min(p, 1 if by_channel else tasks))
            return max(parts, min(p, least)), max(
                1, min(tasks if by_channel else 1, packed.groups * packed.blocks // HELD)
            )

        strip = even(q, STRIP)
        if amx and (not on_vectors or min(strip * p, STRIP) >= 4):
            tiles = NarrowConvSchedule(True, strip, min(HELD, packed.blocks), *shares(True))
            yield from variations(
                tiles, lambda s: True, parts=around(tiles.parts, most=p), channel_parts=around(tiles.channel_parts)
            )
        if on_vectors:
            columns, vectors = vector_tile(q, packed, dots, target)
            plain = NarrowConvSchedule(False, columns, vectors, *shares(False))
            yield from variations(
                plain, lambda s: fits(s.columns, s.vectors, dots, target),
                columns=even_widths(q, range(2, 15), columns), vectors=range(1, 5), parts=around(plain.parts, most=p),
                channel_parts=around(plain.channel_parts, most=packed.groups * packed.blocks),
            )  # fmt: skip


def conv_schedules(
    x_shape: Sequence[Dim], w_shape: Sequence[int], geometry: Geometry, packed: Packed, target: TargetInfo
) -> Iterator[NarrowConvSchedule]:
    """Those of `conv_int8`, for an image whose extents but the first are numbers."""
    extent = geometry.positions(x_shape[1:3], w_shape[:2])
    sizes = static_dims(extent), product(x_shape[1:])
    return NarrowConvSchedule.candidates(*sizes, packed, Dots.of(target), has_amx(target), target)  # type: ignore[arg-type]


def conv_int8(
    x_shape: Sequence[Dim],
    w_shape: Sequence[int],
    geometry: Geometry,
    groups: int,
    zero_point: int,
    target: TargetInfo,
    epilogue: Epilogue = IDENTITY,
    name: str = "conv_int8",
    schedule: NarrowConvSchedule | None = None,
    program_weights: int = 0,
) -> tirx.PrimFunc:
    """``y[n, p, q, o] = epilogue(conv(x[n, h, w, c] - zero_point, w[kh, kw, c / groups, o]))``, u8 by i8 in i32; n may be symbolic.

    Parameters of the program: x, the weights as `conv_packing` has them, their offsets, the epilogue's inputs, y.

    A tile is some neighbouring positions of an output row times some vectors of channels: a product whose rows begin ``stride * c`` bytes
    apart and overlap. A task is an image, or some of its rows, or some of its channels; it copies the input rows that it meets, with the
    zero point around them, into a scratch that stays in L2 (one byte for ``kh * kw * o`` products), unless there is no padding and
    no window ends within what a step reads. For each panel of channels it then goes over all positions, so the panel's weights stay in L1.

    With AMX the positions of a row are strips of equal length, at most 16: the time of a tile goes with its rows. Where all weights of the
    program (``program_weights`` bytes) do not stay in L2 from call to call, the few tiles of a small image ask for the next panel's.
    """
    packed = conv_packing(w_shape, geometry, groups)
    n, h, w, c = x_shape
    p, q = static_dims(geometry.positions(x_shape[1:3], w_shape[:2]))
    outputs = w_shape[3]
    chosen = schedule or next(conv_schedules(x_shape, w_shape, geometry, packed, target))
    with prim_func(name) as kernel:
        x = parameter("x", BufferSpec(x_shape, "uint8"))
        weights = parameter("w", BufferSpec(packed.shape, "int8"))
        offsets = parameter("offsets", BufferSpec((groups * packed.blocks * 16,), "int32"))
        y = Result.parameter("y", (n, p, q, outputs), "int32", epilogue)
        x, y = flat_view(x, (product(x_shape),), "uint8"), y.viewed((n * p * q, outputs))
        multiplier = Multiplier(flat_view(weights, (packed.nbytes,), "int8"), offsets, packed, Dots.of(target))

        def copy(at: tuple[Expr, Expr], extent: tuple[int, int]) -> Buffer:
            return copied_rows(x, at, x_shape, geometry, extent, zero_point)

        def store(where: tuple[Expr, Expr, Expr], group: Expr, first: Expr, values: Sequence[Expr]) -> None:
            image, row, column = where
            put(y, where, share((image * p + row) * q + column), group, first, packed, values)

        read = (packed.quads if chosen.amx else packed.read) * QUAD
        copies = copy if any(geometry.pads) or read > packed.length else None
        far = max(program_weights, packed.nbytes) > target.l2_bytes // 2
        seen = Image((n, 1, h, w, c), c // groups)
        NarrowConvolution(x, multiplier, seen, w_shape[:2], geometry, (p, q), chosen, far, copies, store).all_tasks()
    return kernel.func


def _work(positions: int, packed: Packed, dots: Dots, amx: bool) -> int:
    """Of all channels at so many positions."""
    vectors = positions * packed.groups * -(-packed.columns // dots.lanes)
    return work_of(positions * packed.nbytes, vectors, dots, amx)


@dataclass(frozen=True)
class Image:
    """How an image that windows slide over lies in memory.

    Attributes:
        shape: ``[n, blocks, h, w, bytes]``: of a pixel, the channels of a block. Channels last are one block.
        apart: bytes from the channels of a group to those of the next one, in the only block; of several blocks, a group has whole ones.
    """

    shape: tuple[Dim, int, int, int, int]
    apart: int = 0


@dataclass(frozen=True)
class NarrowConvolution:
    """A convolution, see `conv_int8`.

    Attributes:
        x: the image as bytes, as one axis.
        seen: the image as it lies, or as ``copy`` makes it, without its padding.
        kernel, extent: rows and columns of a window, and of the result.
        far: weights are no longer in L2 when they are read again.
        copy: ``((image, first row), (rows, columns))`` makes a part of the image, with padding, that a task works on; None: on the image.
        store: ``((image, row, column), group, first vector, vectors)`` finishes and stores neighbouring columns of a position.
    """

    x: Buffer
    multiplier: Multiplier
    seen: Image
    kernel: Sequence[int]
    geometry: Geometry
    extent: tuple[int, int]
    chosen: NarrowConvSchedule
    far: bool
    copy: Callable[[tuple[Expr, Expr], tuple[int, int]], Buffer] | None
    store: Callable[[tuple[Expr, Expr, Expr], Expr, Expr, Sequence[Expr]], None]

    def all_tasks(self) -> None:
        """The whole program."""
        if self.packed.columns == 0:
            T.evaluate(0)
            return
        tasks = self.parts * self.channel_parts
        work = _work(math.prod(self.extent), self.packed, self.multiplier.dots, self.chosen.amx)
        parallel_if_large(
            product((self.seen.shape[0], self.channel_parts, self.parts)), work // tasks, self.task, tasks
        )

    @property
    def packed(self) -> Packed:
        return self.multiplier.packed

    @property
    def rows(self) -> int:
        """Output rows of a task: the last one begins early enough to have as many."""
        return -(-self.extent[0] // self.chosen.parts)

    @property
    def parts(self) -> int:
        return -(-self.extent[0] // self.rows)

    @cached_property
    def panels(self) -> tuple[int, int, int]:
        """Panels of channels: vectors (of AMX: blocks) of each, how many a group has, and how many a task takes of all groups."""
        all_of_them = self.packed.blocks if self.chosen.amx else self.multiplier.vectors
        width = min(self.chosen.vectors, all_of_them)
        each = -(-all_of_them // width)
        return width, each, -(-each * self.packed.groups // self.chosen.channel_parts)

    @property
    def channel_parts(self) -> int:
        _, each, some = self.panels
        return -(-each * self.packed.groups // some)

    @property
    def reach(self) -> tuple[int, int]:
        """Input rows and columns, with padding, that the output rows of a task meet."""
        (sh, sw), (dh, dw), (kh, kw) = self.geometry.strides, self.geometry.dilations, self.kernel
        return (self.rows - 1) * sh + (kh - 1) * dh + 1, (self.extent[1] - 1) * sw + (kw - 1) * dw + 1

    def task(self, index: Expr) -> None:
        """Some output rows of an image, for some panels of channels."""
        n, blocks, h, w, pixel = self.seen.shape
        (sh, sw), (dh, dw), (kh, kw) = self.geometry.strides, self.geometry.dilations, self.kernel
        image, channel_part, part = unflatten(index, (n, self.channel_parts, self.parts))
        first = share(tirx.min(part * self.rows, self.extent[0] - self.rows))
        if self.copy is not None:
            height, pitch = self.reach[0], self.reach[1] * pixel
            buffer, origin = self.copy((image, first * sh), self.reach), 0
        else:
            height, pitch, buffer = h, w * pixel, self.x
            origin = share((image * (blocks * h) + first * sh) * pitch)
        in_block = self.packed.segments * self.packed.groups // blocks if blocks > 1 else self.packed.segments
        across = kw if in_block == kh * kw else 1
        apart = self.seen.apart if blocks == 1 else blocks // self.packed.groups * height * pitch

        def segment(number: Expr) -> Expr:
            block, tap = number // in_block, number % in_block
            return block * (height * pitch) + tap // across * (dh * pitch) + tap % across * (dw * pixel)

        rows = Rows(buffer, sw * pixel, segment)
        width, each, some = self.panels
        strips = -(-self.extent[1] // self.chosen.columns)
        tiles = Tiles.begin(self.multiplier, self.chosen.columns) if self.chosen.amx else None
        count = share(tirx.min(some, each * self.packed.groups - channel_part * some))
        with T.serial(count) as i:
            group, panel = (part_of for part_of in unflatten(channel_part * some + i, (self.packed.groups, each)))
            all_of_them = self.packed.blocks if self.chosen.amx else self.multiplier.vectors
            at = share(tirx.min(panel * width, all_of_them - width)) if each > 1 else 0
            group = share(group) if self.packed.groups > 1 else 0

            def strip(number: Expr, at: Expr = at, group: Expr = group) -> tuple[Expr, Expr, Expr]:
                """Row and column of a strip, and where its first window begins."""
                row, column = (
                    number // strips,
                    tirx.min(number % strips * self.chosen.columns, self.extent[1] - self.chosen.columns),
                )
                row, column = share(row), share(column)
                return row, column, share(origin + row * (sh * pitch) + column * (sw * pixel) + group * apart)

            if tiles is None:
                with T.serial(self.rows * strips) as number:
                    row, column, start = strip(number)
                    self.vectors(rows, start, (image, first + row, column), (group, at, width))
            else:
                pairs, columns = self.rows * strips // HELD, (group, at, width)

                def finish(number: Expr, held: Expr, columns: tuple[Expr, Expr, int] = columns) -> None:
                    """A row of the sums that are held, whose first strip has this number."""
                    each = self.chosen.columns
                    row, column, _ = strip(share(number + held // each))
                    self.finish(tiles, (image, first + row, column + held % each), held, columns)

                with T.serial(pairs) as pair:
                    both = [strip(pair * HELD + s)[2] for s in range(HELD)]
                    ready = partial(finish, share(tirx.max(pair - 1, 0) * HELD))
                    self.tiles(tiles, rows, both, pair, columns, in_parts(ready, HELD * self.chosen.columns, pair > 0))
                if pairs:
                    with T.serial(HELD * self.chosen.columns) as held:
                        finish((pairs - 1) * HELD, held)
                if self.rows * strips % HELD:
                    self.tiles(tiles, rows, [strip(self.rows * strips - 1)[2]], pairs, columns, None)
                    with T.serial(self.chosen.columns) as held:
                        finish(self.rows * strips - 1, held)
        if tiles is not None:
            tiles.end()

    def vectors(self, rows: Rows, start: Expr, at: tuple[Expr, Expr, Expr], columns: tuple[Expr, Expr, int]) -> None:
        """A tile of vectors at an output row and column of an image."""
        image, row, column = at
        group, first, width = columns
        base = group * (self.packed.blocks * self.multiplier.in_block)
        for i, line in enumerate(self.multiplier.sums(rows, start, self.chosen.columns, base + first, width)):
            self.store((image, row, column + i), group, first, line)

    def tiles(
        self, tiles: Tiles, rows: Rows, starts: Sequence[Expr], number: Expr, columns: tuple[Expr, Expr, int],
        meanwhile: Callable[[Expr, int], None] | None,
    ) -> None:  # fmt: skip
        """One or two strips by AMX; ``number``: of the tile on its panel."""
        group, block, width = columns
        sharing = -(-self.rows * -(-self.extent[1] // self.chosen.columns) // HELD)
        ahead = (number, tiles.lines_ahead(width, sharing)) if self.far and sharing <= MOST_SHARING else None
        tiles.sums(rows, starts, group * self.packed.blocks + block, width, ahead, meanwhile)

    def finish(self, tiles: Tiles, where: tuple[Expr, Expr, Expr], held: Expr, columns: tuple[Expr, Expr, int]) -> None:
        """Stores the sums of a position, which is number ``held`` of those of two strips."""
        group, block, width = columns
        each = self.chosen.columns
        line = tiles.row(held if each == STRIP else held // each * STRIP + held % each, width)
        self.store(where, group, block * self.multiplier.in_block, line[: self.multiplier.vectors])
