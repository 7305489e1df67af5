"""Distances between every row of the input and every row of a constant set (neighbours, kernels, cluster centres), and the
nearest rows by them.

The loop is that of a matrix product with packed weights: a tile of sums in registers, the features outside; one step loads a
few vectors of points and one scalar per row. It does two operations where a product does one FMA. Differences are taken
before they are squared, so that near points keep their distance (``expanded`` trades that for the speed of a product).
Every distance is one chain over the features in order: it depends neither on the threads nor on the other rows.

``n`` rows and ``m`` points of ``d`` features are ``n m d`` subtractions and FMAs, ``n m`` elements written (twice that moved, as a store
fetches its line first) and few read: points, 224 KB for 2000 x 28 in float32, stay in L2. A tile of 8 rows and 2 vectors loads 2 vectors
and 8 numbers for 32 instructions: arithmetic counts. 16 sums, 2 vectors of points and the differences are in 32 registers.

1000 rows and 2000 points of 28 features, by one thread at 3.8 GHz, two instructions a cycle: predicted 0.92 ms in float32 and 1.84 in
float64, measured 1.04 and 2.02. Roots take 11 and 22 cycles a vector, in all 1.41 and 3.47 ms (torch 17 and 18). `nearest` adds 0.4 and
0.25 ms for one neighbour, a comparison for each vector, and 1.5 ms for five: some 35 insertions a row, at 40 ns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.direct import first_elements
from mlec.backends.tvm.kernels.epilogue import IDENTITY, Buffer, BufferSpec, Dim, Epilogue, Expr
from mlec.backends.tvm.kernels.gemm import column_block, pack_gemm
from mlec.backends.tvm.kernels.mathlib import exp, log
from mlec.backends.tvm.kernels.result import Result
from mlec.backends.tvm.kernels.schedule import variations
from mlec.backends.tvm.kernels.tile import (
    RegisterTile,
    bits,
    buffer_dtype,
    ceildiv,
    if_,
    multiply_adds,
    parallel_if_large,
    parameter,
    tile_rows,
)
from mlec.backends.tvm.kernels.vector import broadcast, const_like, load, maximum, select, share, store
from mlec.backends.tvm.target import TargetInfo
from mlec.errors import LoweringError

INSERTION = 1400
"""What the insertion of a neighbour takes, in the unit of `SERIAL_WORK`: 14 ns, measured 9 for 5 of 100 and 40 for 5 of 2000."""


@dataclass(frozen=True)
class Metric:
    """A distance.

    Attributes:
        kind: ``"sqeuclidean"``, ``"euclidean"``, ``"manhattan"``, ``"chebyshev"`` or ``"minkowski"``.
        p: the exponent of ``"minkowski"``, at least 1 (1, 2 and infinity are the named distances).
        expanded: (squared) euclidean distances as ``|x|^2 - 2 x.y + |y|^2``, not below zero, as scikit-learn's
            ``euclidean_distances`` has them; inexact for near points.
    """

    kind: Literal["sqeuclidean", "euclidean", "manhattan", "chebyshev", "minkowski"]
    p: float = 2.0
    expanded: bool = False

    def __post_init__(self) -> None:
        kinds = ("sqeuclidean", "euclidean", "manhattan", "chebyshev", "minkowski")
        if self.kind not in kinds:
            raise LoweringError(
                f"unknown metric {self.kind!r}, expected one of {', '.join(kinds)}",
                code="E_METRIC",
                hint="fit the model with one of these",
            )
        if self.kind == "minkowski" and not self.p >= 1:
            raise LoweringError(
                f"minkowski distance with p = {self.p}, expected p >= 1",
                code="E_METRIC",
                hint="fit the model with p of 1 or more",
            )
        if self.expanded and not self.kind.endswith("euclidean"):
            raise LoweringError(
                f"only euclidean distances have an expanded form, got {self.kind}",
                code="E_METRIC",
                hint="leave expanded out",
            )

    @property
    def canonical(self) -> Metric:
        """Minkowski distances that have a name, by that name."""
        names: dict[float, Literal["manhattan", "euclidean", "chebyshev"]] = {
            1.0: "manhattan",
            2.0: "euclidean",
            math.inf: "chebyshev",
        }
        return Metric(names[self.p]) if self.kind == "minkowski" and self.p in names else self

    def add(self, total: Expr, x: Expr, y: Expr) -> Expr:
        """The running total after one more feature."""
        if self.expanded:
            return total + x * y
        difference = share(x - y)
        match self.kind:
            case "sqeuclidean" | "euclidean":
                return total + difference * difference
            case "manhattan":
                return total + tirx.abs(difference)
            case "chebyshev":
                return maximum(total, share(tirx.abs(difference)))
            case _:
                return total + self._power(share(tirx.abs(difference)))

    def finish(self, total: Expr) -> Expr:
        """The distance of a complete total."""
        if self.kind == "euclidean":
            return tirx.sqrt(total)
        if self.kind == "minkowski":
            return exp(log(total) * const_like(1 / self.p, total))
        return total

    def _power(self, a: Expr) -> Expr:
        if self.p == int(self.p) and self.p <= 8:
            power = a
            for _ in range(int(self.p) - 1):
                power = power * a
            return power
        return exp(log(a) * const_like(self.p, a))


@dataclass(frozen=True)
class PairwiseSchedule:
    """The tile of distances that is in registers at once.

    Attributes:
        rows: of x.
        vectors: of points, which are packed in blocks of so many.
    """

    rows: int
    vectors: int

    @staticmethod
    def candidates(n: Dim, m: int, dtype: str, target: TargetInfo) -> Iterator[PairwiseSchedule]:
        """For ``n`` rows, which may be symbolic, and ``m`` points. Tiles that leave no register for the operands do not fit."""
        lanes = target.lanes(bits(dtype))
        across = -(-m // lanes)
        vectors = column_block(m, dtype, target) // lanes
        rows = tile_rows(target, vectors + 1)  # differences take registers as well

        def fits(schedule: PairwiseSchedule) -> bool:
            sums = schedule.rows * schedule.vectors
            return min(4, across) <= sums < target.vector_registers - schedule.vectors

        return variations(
            PairwiseSchedule(rows, vectors),
            fits,
            vectors=[v for v in (1, 2, 3, 4) if v <= across],
            rows=sorted((r for r in range(1, 13) if not isinstance(n, int) or r <= n), key=lambda r: abs(r - rows)),
        )


def pack_points(
    points: npt.NDArray[np.generic], target: TargetInfo, schedule: PairwiseSchedule | None = None
) -> npt.NDArray[np.generic]:
    """``y[m, D]`` to ``[ceil(m / block), D, block]``, as `pairwise` and `nearest` read it by the same schedule."""
    tiling = _Tiling.of(1, len(points), str(points.dtype), target, schedule)
    return pack_gemm(np.ascontiguousarray(points.T), tiling.block)


def pairwise(
    n: Dim,
    m: int,
    d: int,
    dtype: str,
    metric: Metric,
    target: TargetInfo,
    epilogue: Epilogue = IDENTITY,
    name: str = "pairwise",
    schedule: PairwiseSchedule | None = None,
) -> tirx.PrimFunc:
    """``out[n, m] = epilogue(distance of x[n, d] and y[m, d])`` in float32 or float64.

    Parameters of the program: x, `pack_points` of y, the epilogue's inputs, out. ``n`` may be symbolic.
    A NaN in either point makes their distance NaN. Without a schedule, the first candidate is taken.
    """
    metric = metric.canonical
    tiling = _Tiling.of(n, m, dtype, target, schedule)
    block, blocks, mr = tiling.block, tiling.blocks, tiling.rows

    with prim_func(name) as kernel:
        x = parameter("x", BufferSpec((n, d), dtype))
        y = parameter("y", BufferSpec((blocks, d, block), dtype))
        out = Result.parameter("out", (n, m), dtype, epilogue)

        def tile(rows: int, row: Expr, b: Expr) -> None:
            """``rows`` rows times one block of points."""
            for i, values in enumerate(_distances(x, y, d, tiling, metric, rows, row, b)):
                out.put((row + i,), (row + i,), b * block, m, values)

        work = multiply_adds(2 * mr * m * d, dtype, target)
        parallel_if_large(n // mr, work, lambda t: _each(blocks, lambda b: tile(mr, t * mr, b)))
        for rest in range(1, mr):
            if not isinstance(n, int):
                with if_(n % mr == rest):
                    _each(blocks, partial(tile, rest, n - rest))
            elif n % mr == rest:
                _each(blocks, partial(tile, rest, n - rest))
    return kernel.func


def nearest(
    n: Dim,
    m: int,
    d: int,
    k: int,
    dtype: str,
    metric: Metric,
    target: TargetInfo,
    name: str = "nearest",
    schedule: PairwiseSchedule | None = None,
) -> tirx.PrimFunc:
    """The ``k`` smallest distances of each row of ``x[n, d]`` to the rows of ``y[m, d]``, and which rows these are.

    Parameters of the program: x, `pack_points` of y, the distances ``[n, k]``, the positions ``[n, k]`` (int64). ``n`` may be
    symbolic. Nearest first, of equals the first, NaN last. Without a schedule, the first candidate is taken.

    A task computes all distances of one tile of rows (some 100 KiB for 2,000 points, which stay in the L2 cache) and looks for
    the smallest right after: nothing of size ``n x m`` goes to memory. The selection reads a distance once, at a comparison
    for a vector; the distances take ``d`` times two operations for the same vector.
    """
    metric = metric.canonical
    tiling = _Tiling.of(n, m, dtype, target, schedule)
    block, lanes, blocks, mr = tiling.block, tiling.lanes, tiling.blocks, tiling.rows

    with prim_func(name) as kernel:
        x = parameter("x", BufferSpec((n, d), dtype))
        y = parameter("y", BufferSpec((blocks, d, block), dtype))
        values = parameter("values", BufferSpec((n, k), dtype))
        positions = parameter("positions", BufferSpec((n, k), "int64"))

        def task(turn: Expr) -> None:
            first = share(turn * mr)
            rows = share(tirx.min(mr, n - first))
            panel = T.alloc_buffer((mr, blocks * block), dtype)

            def tile(size: int, done: Expr, b: Expr) -> None:
                for i, found in enumerate(_distances(x, y, d, tiling, metric, size, first + done, b)):
                    for v, vector in enumerate(found):
                        store(panel, vector, [done + i, b * block + v * lanes])

            with if_(rows == mr):
                _each(blocks, lambda b: tile(mr, 0, b))
            size = 1 << (mr - 1).bit_length() - 1 if mr > 1 else 0
            while size:  # the last rows in tiles of 4, 2 and 1
                with if_(tirx.And(rows < mr, rows % (2 * size) >= size)):
                    _each(blocks, partial(tile, size, share(rows // (2 * size) * (2 * size))))
                size //= 2

            def select_row(i: Expr) -> None:
                def write(slot: Expr, value: Expr, position: Expr) -> None:
                    T.buffer_store(values, value, [first + i, slot])
                    T.buffer_store(positions, position, [first + i, slot])

                first_elements(
                    m, k, dtype, False, lambda at: panel[i, at[0]], lambda slot: values[first + i, slot],
                    lambda slot: positions[first + i, slot], write,
                    (lambda at: load(panel, [i, at], lanes)) if lanes > 1 else None,
                )  # fmt: skip

            with T.serial(rows) as i:
                select_row(i)

        inserted = k * (1 + math.log(m / k))  # of distances in any order
        work = multiply_adds(2 * mr * m * d, dtype, target) + int(mr * inserted * INSERTION)
        parallel_if_large(ceildiv(n, mr), work, task)
    return kernel.func


@dataclass(frozen=True)
class _Tiling:
    """Rows of a tile, vectors of a block, lanes of a vector, and blocks of points."""

    rows: int
    vectors: int
    lanes: int
    blocks: int

    @property
    def block(self) -> int:
        """Points of a block."""
        return self.vectors * self.lanes

    @staticmethod
    def of(n: Dim, m: int, dtype: str, target: TargetInfo, schedule: PairwiseSchedule | None) -> _Tiling:
        schedule = schedule or next(PairwiseSchedule.candidates(n, m, dtype, target))
        lanes = target.lanes(bits(dtype))
        return _Tiling(schedule.rows, schedule.vectors, lanes, -(-m // (schedule.vectors * lanes)))


def _distances(
    x: Buffer, y: Buffer, d: int, tiling: _Tiling, metric: Metric, rows: int, row: Expr, b: Expr
) -> Iterator[list[Expr]]:
    """Distances of ``rows`` rows of x, from ``row`` on, to block ``b`` of the packed points: the vectors of each row in turn."""
    dtype, vectors, lanes = buffer_dtype(x), tiling.vectors, tiling.lanes
    sums = RegisterTile(rows, vectors, lanes, dtype)
    x_norms = RegisterTile(rows if metric.expanded else 0, 1, lanes, dtype)
    y_norms = RegisterTile(1 if metric.expanded else 0, vectors, lanes, dtype)
    with T.serial(d) as k:
        points = [share(load(y, [b, k, v * lanes], lanes)) for v in range(vectors)]
        for i in range(rows):
            value = share(broadcast(x[row + i, k], lanes))
            for cell, point in zip(sums.cells[i], points, strict=True):
                cell.set(metric.add(cell.value, value, point))
            for cells in x_norms.cells[i : i + 1]:
                cells[0].set(cells[0].value + value * value)
        for cells in y_norms.cells:
            for cell, point in zip(cells, points, strict=True):
                cell.set(cell.value + point * point)
    for i in range(rows):
        totals = [sums.value(i, v) for v in range(vectors)]
        if metric.expanded:
            totals = [
                _not_negative(share(x_norms.value(i, 0) - (total + total) + y_norms.value(0, v)))
                for v, total in enumerate(totals)
            ]
        yield [share(metric.finish(total)) for total in totals]


def _each(count: int, body: Callable[[Expr], None]) -> None:
    with T.serial(count) as i:
        body(i)


def _not_negative(total: Expr) -> Expr:
    """Zero for what rounding made negative; NaN stays."""
    return select(total < const_like(0.0, total), 0.0, total)
