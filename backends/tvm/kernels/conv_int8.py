"""2-d convolutions of bytes over images with their channels last."""

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
class Int8ConvSchedule:
    """How a convolution of bytes goes over an image.

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
        x_shape: Sequence[Dim], w_shape: Sequence[int], geometry: Geometry, packed: Packed, target: TargetInfo
    ) -> Iterator[Int8ConvSchedule]:
        """For an image whose extents but the first are numbers."""
        p, q = static_dims(geometry.positions(x_shape[1:3], w_shape[:2]))

        def shares(amx: bool) -> tuple[int, int]:
            tasks = tasks_worth(_work(p * q, packed, Dots.of(target), amx), target)
            nbytes = product(x_shape[1:])
            by_channel = math.prod(packed.shape) > nbytes
            least = -(-nbytes * 2 // target.l2_bytes)
            parts = max(1, min(p, 1 if by_channel else tasks))
            return max(parts, min(p, least)), max(
                1, min(tasks if by_channel else 1, packed.groups * packed.blocks // HELD)
            )

        strip = even(q, STRIP)
        columns, vectors = vector_tile(q, packed, target)
        plain = Int8ConvSchedule(False, columns, vectors, *shares(False))
        widths = even_widths(q, range(2, 15), columns)

        def possible(s: Int8ConvSchedule) -> bool:
            return s.amx or fits(s.columns, s.vectors, target)

        if has_amx(target) and min(strip * p, 16) >= 4:
            tiles = Int8ConvSchedule(True, strip, min(HELD, packed.blocks), *shares(True))
            yield from variations(
                tiles, possible, parts=around(tiles.parts, most=p), channel_parts=around(tiles.channel_parts)
            )
        yield from variations(
            plain, possible, columns=widths, vectors=range(1, 5), parts=around(plain.parts, most=p),
            channel_parts=around(plain.channel_parts, most=packed.groups * packed.blocks),
        )  # fmt: skip


def conv_int8(
    x_shape: Sequence[Dim],
    w_shape: Sequence[int],
    geometry: Geometry,
    groups: int,
    zero_point: int,
    target: TargetInfo,
    epilogue: Epilogue = IDENTITY,
    name: str = "conv_int8",
    schedule: Int8ConvSchedule | None = None,
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
    n, _, _, c = x_shape
    p, q = static_dims(geometry.positions(x_shape[1:3], w_shape[:2]))
    outputs = w_shape[3]
    chosen = schedule or next(Int8ConvSchedule.candidates(x_shape, w_shape, geometry, packed, target))
    with prim_func(name) as kernel:
        x = parameter("x", BufferSpec(x_shape, "uint8"))
        w = parameter("w", BufferSpec(packed.shape, "int8"))
        offsets = parameter("offsets", BufferSpec((groups * packed.blocks * 16,), "int32"))
        y = Result.parameter("y", (n, p, q, outputs), "int32", epilogue)
        x, y = flat_view(x, (product(x_shape),), "uint8"), y.viewed((n * p * q, outputs))
        multiplier = Multiplier(flat_view(w, (math.prod(packed.shape),), "int8"), offsets, packed, Dots.of(target))
        far = max(program_weights, math.prod(packed.shape)) > target.l2_bytes // 2
        program = _Convolution(x, multiplier, y, x_shape, w_shape, geometry, (p, q), zero_point, chosen, c, far)
        if outputs == 0:
            T.evaluate(0)
        else:
            tasks = program.parts * program.channel_parts
            work = _work(p * q, packed, multiplier.dots, chosen.amx)
            parallel_if_large(product((n, program.channel_parts, program.parts)), work // tasks, program.task, tasks)
    return kernel.func


def _work(positions: int, packed: Packed, dots: Dots, amx: bool) -> int:
    """Of all channels at so many positions."""
    vectors = positions * packed.groups * -(-packed.columns // dots.lanes)
    return work_of(positions * math.prod(packed.shape), vectors, dots, amx)


@dataclass(frozen=True)
class _Convolution:
    """The parts of the program, see `conv_int8`. ``far``: weights are no longer in L2 when they are read again."""

    x: Buffer
    multiplier: Multiplier
    y: Result
    x_shape: Sequence[Dim]
    w_shape: Sequence[int]
    geometry: Geometry
    extent: tuple[int, int]
    zero_point: int
    chosen: Int8ConvSchedule
    channels: int
    far: bool

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
        (sh, sw), (dh, dw), (kh, kw) = self.geometry.strides, self.geometry.dilations, self.w_shape[:2]
        return (self.rows - 1) * sh + (kh - 1) * dh + 1, (self.extent[1] - 1) * sw + (kw - 1) * dw + 1

    @property
    def copies(self) -> bool:
        """Whether a task works on a copy of its input."""
        read = (self.packed.quads if self.chosen.amx else self.packed.read) * QUAD
        return any(self.geometry.pads) or read > self.packed.length

    def task(self, index: Expr) -> None:
        """Some output rows of an image, for some panels of channels."""
        n, h, w, c = self.x_shape
        (sh, sw), (dh, dw), (kh, kw) = self.geometry.strides, self.geometry.dilations, self.w_shape[:2]
        image, channel_part, part = unflatten(index, (n, self.channel_parts, self.parts))
        first = share(tirx.min(part * self.rows, self.extent[0] - self.rows))
        if self.copies:
            pitch = self.reach[1] * c
            corner = image, first * sh
            buffer, origin = copied_rows(self.x, corner, self.x_shape, self.geometry, self.reach, self.zero_point), 0
        else:
            pitch, buffer = w * c, self.x
            origin = share((image * h + first * sh) * pitch)
        across = kw if self.packed.segments == kh * kw else 1
        rows = Rows(buffer, sw * c, lambda number: number // across * (dh * pitch) + number % across * (dw * c))
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
                return row, column, share(origin + row * (sh * pitch) + column * (sw * c) + group * self.packed.length)

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
        starts = [share(start + i * rows.pitch) for i in range(self.chosen.columns)]
        base = group * (self.packed.blocks * self.multiplier.in_block)
        for i, line in enumerate(self.multiplier.sums(rows, starts, base + first, width)):
            self.put((image, row, column + i), group, first, line)

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
        self.put(where, group, block * self.multiplier.in_block, line[: self.multiplier.vectors])

    def put(self, where: tuple[Expr, Expr, Expr], group: Expr, first: Expr, values: Sequence[Expr]) -> None:
        """Stores the sums of a position."""
        image, row, column = where
        at = share((image * self.extent[0] + row) * self.extent[1] + column)
        put(self.y, where, at, group, first, self.packed, values)
