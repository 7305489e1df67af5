"""Ranks: what a split needs to know of a number is how many thresholds of its column lie below it.

With at most 255 thresholds in a column that count is a byte, and one vector instruction compares 64 rows. The comparison stays
exact: for ascending thresholds t, ``x < t[k]`` is ``count(t <= x) < k + 1``, and ``x <= t[k]`` is ``count(t < x) < k + 1``. A
missing value that goes right has the highest rank; one that goes left is minus infinity, rank 0, already in its column.

The count is a search in a tree whose nodes hold as many thresholds as a vector has lanes: one comparison and a population
count per level, 255 float32 thresholds in two levels of 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np

from mlec.backends.tvm.compat import T, tirx
from mlec.backends.tvm.kernels.tree_ensemble import ensemble as e
from mlec.backends.tvm.kernels.tree_ensemble.columns import column_value
from mlec.backends.tvm.kernels.tree_ensemble.ensemble import Array, Ints, TreeEnsemble
from mlec.backends.tvm.kernels.vector import broadcast, const, load, share

Expr: TypeAlias = Any
Buffer: TypeAlias = Any


@dataclass(frozen=True)
class Ranks:
    """The thresholds of each column in order, and where every split stands among them.

    Attributes:
        node_rank: i64[N]; a split goes left iff the rank of its column is below.
        thresholds: the ascending thresholds of each column of numbers (the other columns hold 0 or 1).
        dtype: ``"uint8"`` or ``"uint16"``, what holds a rank.
    """

    node_rank: Ints
    thresholds: list[Array]
    dtype: str

    @classmethod
    def of(cls, ensemble: TreeEnsemble) -> Ranks | None:
        """None if a column has more thresholds than a uint16 can count."""
        columns = ensemble.columns
        order = np.lexsort((columns.node_threshold, columns.node_column))
        column, threshold = columns.node_column[order], columns.node_threshold[order]
        number = ~np.isnan(threshold)
        first = np.r_[True, (column[1:] != column[:-1]) | (threshold[1:] != threshold[:-1])][: len(order)]
        distinct = np.cumsum(first & number)
        start = np.searchsorted(column, np.arange(columns.count + 1))
        before = np.r_[0, distinct][start]  # thresholds of the columns before
        node_rank = np.empty(len(order), np.int64)
        node_rank[order] = np.where(number, distinct - before[column], 0)  # nothing is below NaN: always right
        kept = threshold[first & number]
        thresholds = [kept[a:b] for a, b in pairwise(before)]
        most = max((len(t) for t in thresholds), default=0)
        if most > np.iinfo(np.uint16).max:
            return None
        return cls(node_rank, thresholds, "uint8" if most <= np.iinfo(np.uint8).max else "uint16")

    def pack(self, ensemble: TreeEnsemble, lanes: int) -> dict[str, Array]:
        """``rank_levels``: the search trees of all columns; ``rank_at`` i32[columns, levels]: where each level begins.

        A node of the level with stride s holds thresholds ``s - 1, 2 s - 1, ...`` of its part; NaN where there is none.
        """
        numbers = self._numbers(ensemble)
        levels = self.levels(ensemble, lanes)
        parts, at, end = [], np.zeros((max(1, numbers), levels), np.int32), 0
        for column, thresholds in enumerate(self.thresholds[:numbers]):
            padded = np.append(thresholds, thresholds.dtype.type(np.nan))
            for level in range(levels):
                stride = lanes ** (levels - 1 - level)
                nodes = len(thresholds) // (stride * lanes) + 1
                index = np.arange(1, nodes * lanes + 1) * stride - 1
                parts.append(padded[np.minimum(index, len(thresholds))])
                at[column, level] = end
                end += nodes * lanes
        return {"rank_levels": np.concatenate(parts), "rank_at": at.reshape(-1)} if parts else {}

    def levels(self, ensemble: TreeEnsemble, lanes: int) -> int:
        """Levels that count the thresholds of any column."""
        most = max((len(t) for t in self.thresholds[: self._numbers(ensemble)]), default=0)
        levels = 1
        while lanes**levels <= most:
            levels += 1
        return levels

    @staticmethod
    def _numbers(ensemble: TreeEnsemble) -> int:
        """Columns that hold numbers; those with 0 or 1 come after."""
        return int(np.searchsorted(ensemble.columns.kind, e.PRESENT))


def fill_ranks(
    ensemble: TreeEnsemble, ranks: Ranks, packed: dict[str, Buffer], lanes: int, x: Buffer, first: Expr, rows: Expr,
    codes: Buffer, pitch: int,
) -> None:  # fmt: skip
    """Emit ``codes[m * pitch + r] = rank of column m of x[first + r]`` for every column and ``r < rows``."""
    levels = ranks.levels(ensemble, lanes)
    for kind, begin, end in ensemble.columns.ranges():
        with T.serial(end - begin) as i, T.serial(rows) as r:
            m = i + begin
            value = share(column_value(ensemble, packed, x, first + r, m, kind))
            if kind >= e.PRESENT:
                code = tirx.Cast(ranks.dtype, value)
            else:
                count = _count_below(ensemble, packed, value, m * levels, levels, lanes)
                code = tirx.Cast(ranks.dtype, count)
                if kind in (e.PLAIN, e.ZERO_NAN):
                    highest = tirx.const(int(np.iinfo(ranks.dtype).max), ranks.dtype)
                    code = tirx.Select(T.isnan(value), highest, code)
            T.buffer_store(codes, code, [m * pitch + r])


def _count_below(
    ensemble: TreeEnsemble, packed: dict[str, Buffer], value: Expr, at: Expr, levels: int, lanes: int
) -> Expr:
    """Thresholds ``<= value`` (``< value`` where splits compare with <=)."""
    values = share(broadcast(value, lanes))
    count: Expr = tirx.const(0, "int32")
    for level in range(levels):
        node = load(packed["rank_levels"], [packed["rank_at"][at + level] + count * lanes], lanes)
        below = node <= values if ensemble.compare == "lt" else node < values
        ones = tirx.Select(below, const(1, "int32", lanes), const(0, "int32", lanes))
        # LLVM makes this a comparison into a mask and the number of its bits.
        count = share(count * lanes + T.call_llvm_pure_intrin("int32", "llvm.vector.reduce.add", ones))
    return count
