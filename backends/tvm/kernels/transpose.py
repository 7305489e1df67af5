"""Permutations of axes that move the last axis: squares of vectors turned in registers.

Each element is read once and written once, 8 bytes of float32 (12 from memory, as a store fetches its line first), and nothing is
computed. A square of 16 x 16 is 16 loads and 16 stores of whole lines of 64 bytes, so that none is touched twice whatever lies between
them, and 4 * 16 shuffles of two vectors, of which a cycle takes one: 64 cycles, 16 bytes a cycle in and out. Squares of 8 x 8 take
half as many shuffles again an element, and half of each line.

256 x 256 (0.5 MB, in L2): predicted 4.3 us at 3.8 GHz, measured 7.3 (torch 36). 1024 x 1024 (8 MB): 12.6 MB from and to L3, and 32 pages
for each square: measured 530 us, 24 GB/s (torch 950). Heads of attention, 128 x 12 x 64 to 12 x 64 x 128: predicted 6.5, measured 11 us
(torch 87).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.elementwise import memory_type
from mlec.backends.tvm.kernels.epilogue import BufferSpec, Dim, Expr
from mlec.backends.tvm.kernels.schedule import variations
from mlec.backends.tvm.kernels.tile import (
    bits,
    ceildiv,
    flat_view,
    if_,
    parallel_if_large,
    parameter,
    product,
    unflatten,
)
from mlec.backends.tvm.kernels.vector import load, share, store
from mlec.backends.tvm.target import TargetInfo


@dataclass(frozen=True)
class TransposeSchedule:
    """How squares are taken.

    Attributes:
        side: elements of a square's side.
        down: whether one square follows the other along the last axis of x, rather than along that of y.
    """

    side: int
    down: bool = False

    @staticmethod
    def candidates(dtype: str, target: TargetInfo) -> Iterator[TransposeSchedule]:
        """By default whole vectors, in the order in which they are written."""
        lanes = min(16, target.lanes(bits(memory_type(dtype))))
        sides = [side for side in (16, 8, 4) if side <= lanes]
        return variations(TransposeSchedule(lanes), lambda s: True, side=sides, down=(True,))


def transpose(
    x_shape: Sequence[Dim],
    perm: Sequence[int],
    dtype: str,
    target: TargetInfo,
    name: str = "transpose",
    schedule: TransposeSchedule | None = None,
) -> tirx.PrimFunc:
    """``y[i_perm[0], i_perm[1], ...] = x[i_0, i_1, ...]``; extents may be symbolic. Parameters: x, y.

    ``perm`` must not leave the last axis where it is. A task is a square of ``side x side`` elements: as many vectors are
    loaded along the last axis of x, turned by shuffles, and stored along the last axis of y. Squares that hang over an edge
    are copied element by element.
    """
    shape, order = merged_axes(x_shape, perm)
    if len(shape) == 1:  # only axes of extent 1 move: one of them stands for the other side of the squares
        shape, order = [1, *shape], [1, 0]
    held = memory_type(dtype)
    schedule = schedule or next(TransposeSchedule.candidates(dtype, target))
    lanes = schedule.side
    y_shape = [shape[p] for p in order]
    turned = order.index(len(shape) - 1)  # the axis of y along which x is contiguous
    squares = list(y_shape)
    squares[turned], squares[-1] = ceildiv(y_shape[turned], lanes), ceildiv(y_shape[-1], lanes)
    walk = [*(axis for axis in range(len(y_shape)) if axis != turned), turned] if schedule.down else range(len(y_shape))

    with prim_func(name) as kernel:
        x_arg = parameter("x", BufferSpec(x_shape, dtype))
        y_arg = parameter("y", BufferSpec([x_shape[p] for p in perm], dtype))
        x, y = flat_view(x_arg, shape, held), flat_view(y_arg, y_shape, held)

        def source(where: Sequence[Expr]) -> list[Expr]:
            index: list[Expr] = [None] * len(shape)
            for position, axis in zip(where, order, strict=True):
                index[axis] = position
            return index

        def moved(where: Sequence[Expr], down: Expr, across: Expr) -> list[Expr]:
            index = list(where)
            index[turned], index[-1] = index[turned] + down, index[-1] + across
            return index

        def square(number: Expr) -> None:
            where: list[Expr] = [None] * len(squares)
            for axis, index in zip(walk, unflatten(number, [squares[axis] for axis in walk]), strict=True):
                where[axis] = index
            where[turned], where[-1] = share(where[turned] * lanes), share(where[-1] * lanes)
            whole = tirx.And(where[turned] + lanes <= y_shape[turned], where[-1] + lanes <= y_shape[-1])
            with T.If(whole):
                with T.Then():
                    rows = [share(load(x, source(moved(where, 0, j)), lanes)) for j in range(lanes)]
                    for i, row in enumerate(turn(rows)):
                        store(y, row, moved(where, i, 0))
                with T.Else(), T.serial(lanes) as i, T.serial(lanes) as j:
                    at = moved(where, i, j)
                    with if_(tirx.And(at[turned] < y_shape[turned], at[-1] < y_shape[-1])):
                        T.buffer_store(y, x[tuple(source(at))], at)

        parallel_if_large(product(squares), 10 * lanes * lanes, square)
    return kernel.func


def turn(rows: Sequence[Expr]) -> list[Expr]:
    """The columns of a square given by rows (a power of two of them): blocks of 1, 2, 4 ... elements change places."""
    lanes = len(rows)
    found = list(rows)
    distance = 1
    while distance < lanes:
        for i in range(lanes):
            if i & distance:
                continue
            a, b = found[i], found[i + distance]
            low = [k if not k & distance else lanes + k - distance for k in range(lanes)]
            high = [k + distance if not k & distance else lanes + k for k in range(lanes)]
            found[i], found[i + distance] = share(tirx.Shuffle([a, b], low)), share(tirx.Shuffle([a, b], high))
        distance *= 2
    return found


def merged_axes(shape: Sequence[Dim], perm: Sequence[int]) -> tuple[list[Dim], list[int]]:
    """The same permutation of fewer axes: those that stay neighbours are one, those of extent 1 are none."""
    kept = [p for p in perm if not (isinstance(shape[p], int) and shape[p] == 1)]
    groups: list[list[int]] = []
    for p in kept:
        # Axes between two neighbours of the result that are of extent 1 do not part them.
        if (
            groups
            and all(isinstance(shape[q], int) and shape[q] == 1 for q in range(groups[-1][-1] + 1, p))
            and p > groups[-1][-1]
        ):
            groups[-1].append(p)
        else:
            groups.append([p])
    by_source = sorted(groups)
    return [product([shape[p] for p in group]) for group in by_source], [by_source.index(group) for group in groups]
