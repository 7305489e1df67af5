"""Windows over up to three spatial axes: their geometry, and a padded copy of the input to slide them over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlec.backends.tvm.compat import T, tirx
from mlec.backends.tvm.kernels.epilogue import Buffer, Dim, Expr
from mlec.backends.tvm.kernels.tile import buffer_dtype, copy_run
from mlec.backends.tvm.kernels.vector import cast_to, const, load, share
from mlec.ops.windows import Geometry

Triple = tuple[Dim, Dim, Dim]

Run = tuple[Buffer, Sequence[Expr], int, int]
"""Part of a row of an image: the image, the indices of the row, how much padding stands before it, and how many elements to copy."""


def copy_padded(scratch: Buffer, to: Sequence[Expr], width: int, run: Run, lanes: int, padding: float = 0) -> None:
    """Fill ``scratch[*to, :width]``: padding, the run, padding."""
    x, origin, before, count = run
    copy_run(scratch, to, 0, before, lanes, None, padding)
    copy_run(scratch, to, before, count, lanes, lambda offset, n: load(x, [*origin, offset], n))
    copy_run(scratch, to, before + count, width - before - count, lanes, None, padding)


def copy_padded_row(scratch: Buffer, to: Sequence[Expr], width: int, run: Run, height: int, lanes: int) -> None:
    """The same with zeros, for the row ``run[1][-1]`` of an image of so many: zeros only if it lies above or below the image."""
    row = run[1][-1]
    with T.If(tirx.And(row >= 0, row < height)):
        with T.Then():
            copy_padded(scratch, to, width, run, lanes)
        with T.Else():
            copy_run(scratch, to, 0, width, lanes)


@dataclass(frozen=True)
class Windows:
    """Window positions over three axes (depth, rows, columns); missing leading axes have extent one.

    ``out`` is the number of positions along each axis, ``rank`` the number of axes there really are.
    """

    rank: int
    extent: Triple
    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    before: tuple[int, int, int]
    after: tuple[int, int, int]
    dilation: tuple[int, int, int]
    input_dilation: tuple[int, int, int]
    out: Triple

    @classmethod
    def of(
        cls,
        space: Sequence[Dim],
        kernel: Sequence[int],
        geometry: Geometry,
        out: Sequence[Dim] = (),
    ) -> Windows:
        """From one entry per axis; ``out`` may say more positions than fit."""
        rank = len(space)
        ones = (1,) * (3 - rank)
        extent, taps, stride = (*ones, *space), (*ones, *kernel), (*ones, *geometry.strides)
        before, after = ((*(0 for _ in ones), *half) for half in (geometry.before, geometry.after))
        dilation, spread = (*ones, *geometry.dilations), (*ones, *geometry.input_dilations)
        fitting = tuple(
            ((extent[i] - 1) * spread[i] + before[i] + after[i] - dilation[i] * (taps[i] - 1)) // stride[i] + 1
            for i in range(3)
        )
        return cls(rank, extent, taps, stride, before, after, dilation, spread, (*ones, *out) if out else fitting)  # type: ignore[arg-type]

    def reach(self, axis: int, positions: Dim) -> Dim:
        """Elements of the padded input that so many positions along an axis touch."""
        return (positions - 1) * self.stride[axis] + (self.kernel[axis] - 1) * self.dilation[axis] + 1

    def scratch_shape(self, width: int) -> tuple[Dim, ...]:
        """Shape of a padded copy, its last axis split by stride; ``width``: what the column positions are rounded up to.

        Column ``i`` of the padded input lies at ``[.., i % stride, i // stride]``, so that the elements one tap meets at
        successive positions are neighbours in memory whatever the stride.
        """
        columns = (self.out[2] + (width - 1)) // width * width + (self.kernel[2] - 1) * self.dilation[2] // self.stride[
            2
        ]
        return (self.reach(0, self.out[0]), self.reach(1, self.out[1]), self.stride[2], columns)

    def tap_row(self, depth: Expr, plane_tap: Expr, row: Expr, row_tap: Expr) -> list[Expr]:
        """The first two indices into the copy for a tap at a position: a plane and a row."""
        return [
            depth * self.stride[0] + plane_tap * self.dilation[0],
            row * self.stride[1] + row_tap * self.dilation[1],
        ]

    def tap_column(self, tap: Expr, position: Expr) -> list[Expr]:
        """The last two indices into the copy for a tap at a column position."""
        offset = tap * self.dilation[2]
        return [offset % self.stride[2], position + offset // self.stride[2]]

    def fill(
        self, scratch: Buffer, prefix: Sequence[Expr], x: Buffer, source: Sequence[Expr], lanes: int, padding: float
    ) -> None:
        """Copy ``x[*source, depth, row, column]`` to ``scratch[*prefix, ...]``, with ``padding`` wherever there is nothing."""
        depth, height, phases, width = scratch.shape[len(prefix) :]
        dtype = buffer_dtype(scratch)
        spread, extent, before = self.input_dilation, self.extent, self.before

        def row(to: list[Expr], origin: list[Expr]) -> None:
            contiguous = phases == 1 == spread[2] and before[2] >= 0
            if contiguous and isinstance(extent[2], int) and isinstance(width, int | tirx.IntImm):
                count = min(extent[2], int(width) - before[2])
                image = (x, origin, before[2], count)
                copy_padded(scratch, [*to, 0], int(width), image, lanes, padding)
                return
            with T.serial(phases) as phase, T.serial(width) as i:
                at = share(i * phases + phase - before[2])
                inside = tirx.all(at >= 0, at < (extent[2] - 1) * spread[2] + 1, at % spread[2] == 0)
                value = tirx.if_then_else(inside, cast_to(dtype, x[(*origin, at // spread[2])]), const(padding, dtype))
                T.buffer_store(scratch, value, [*to, phase, i])

        with T.grid(depth, height) as (z, y):
            at = [share(position - before[axis]) for axis, position in ((0, z), (1, y))]
            inside = [
                test
                for axis, position in enumerate(at)
                for test in (
                    position >= 0,
                    position < (extent[axis] - 1) * spread[axis] + 1,
                    position % spread[axis] == 0,
                )
            ]
            to = [*prefix, z, y]
            with T.If(tirx.all(*inside)):
                with T.Then():
                    row(to, [*source, at[0] // spread[0], at[1] // spread[1]])
                with T.Else(), T.serial(phases) as phase, T.serial(width) as i:
                    T.buffer_store(scratch, const(padding, dtype), [*to, phase, i])
