"""Walks over ranks: the walks of `walk` for rows whose columns are known by their ranks (see `ranks`).

Column, rank and child of a split then fit in four bytes (eight, where ranks are two bytes or there are many columns or leaves): a step
loads one word and one rank, and a tree of 256 leaves is 2 KiB, so that four times as many trees stay in the caches.

A row alone, by 100 trees of depth 6 on 28 features: 600 steps and 56 levels of ranks, predicted 374 ns at 3 GHz, measured 534 at 3.48
(walks over numbers: predicted 630); by 500 trees of depth 8, whose words leave the first-level cache, 2513 and 2630 (5755).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from mlec.backends.tvm.compat import T, tirx
from mlec.backends.tvm.kernels.tree_ensemble.ensemble import Array, Ints, TreeEnsemble, narrow
from mlec.backends.tvm.kernels.tree_ensemble.ranks import Ranks, fill_ranks
from mlec.backends.tvm.kernels.tree_ensemble.sums import RowSums, in_groups
from mlec.backends.tvm.kernels.tree_ensemble.walk import opaque
from mlec.backends.tvm.kernels.vector import Cell, const
from mlec.backends.tvm.target import TargetInfo

Expr: TypeAlias = Any
Buffer: TypeAlias = Any

LANES = 12
"""Walks in flight: 1.2 times as fast as 8; 16 are not faster."""

STEP_NS = 0.45
"""Measured at 3 GHz: one step of one walk."""


@dataclass(frozen=True)
class Ranked:
    """Trees whose splits compare ranks.

    Attributes:
        ensemble, ranks: what is evaluated.
        field: bits of a column and of a rank; a child has twice as many.
        row_ns: expected time of one row, without that of the ranks.
    """

    ensemble: TreeEnsemble
    ranks: Ranks
    field: int
    row_ns: float

    @classmethod
    def of(cls, ensemble: TreeEnsemble, ranks: Ranks | None) -> Ranked | None:
        """None if there are more thresholds or columns than 16 bits count."""
        if ranks is None or ensemble.trees == 0 or ensemble.columns.count > np.iinfo(np.uint16).max:
            return None
        layout = ensemble.layout
        small = (
            ranks.dtype == "uint8"
            and ensemble.columns.count <= np.iinfo(np.uint8).max
            and 2 * int(layout.leaves.max()) - 1 <= np.iinfo(np.uint16).max
        )
        longest = np.pad(layout.depth, (0, -ensemble.trees % LANES)).reshape(-1, LANES).max(axis=1)
        return cls(ensemble, ranks, 8 if small else 16, STEP_NS * LANES * float(longest.sum()))

    @property
    def word(self) -> str:
        """Dtype of a split."""
        return f"int{4 * self.field}"

    def pack(self, rows: Ints) -> dict[str, Array]:
        """``ranked`` i32|i64[S]: column, rank, and the left child's place in the tree (the right one is next to it); a leaf compares
        the column that always is 0, hence goes left, to itself. ``ranked_root`` i32[T + 1]; ``ranked_depth`` i32[T]; ``ranked_leaf``
        i16|i32[S], the row in the table ``leaves`` of the leaf in a slot, or for single values ``ranked_values`` [S, 1], its value.

        Args:
            rows: i64[L], where each leaf is in the table.
        """
        e, layout = self.ensemble, self.ensemble.layout
        leaf = layout.code < 0
        first = np.repeat(layout.first[:-1], np.diff(layout.first))
        place = np.arange(len(leaf)) - first
        column, rank = np.full(len(leaf), e.columns.count), np.ones(len(leaf), np.int64)
        if e.nodes:
            node = layout.code[~leaf]
            column[~leaf], rank[~leaf] = e.columns.node_column[node], self.ranks.node_rank[node]
        child = np.where(leaf, place, layout.left - first)
        words = (column | rank << self.field | child << 2 * self.field).astype(np.uint64)
        number = np.where(leaf, ~layout.code, 0)
        return {
            "ranked": words.astype(f"uint{4 * self.field}").view(self.word),
            "ranked_root": layout.first.astype(np.int32),
            "ranked_depth": layout.depth.astype(np.int32),
            **({"ranked_values": e.values[number]} if e.width == 1 else {"ranked_leaf": narrow(rows[number])}),
        }

    def emit(self, packed: dict[str, Buffer], x: Buffer, out: Buffer, row: Expr, info: TargetInfo) -> None:
        """Emit the evaluation of one row: `LANES` trees side by side."""
        e, ranks = self.ensemble, self.ranks
        codes = T.alloc_buffer((e.columns.count + 1,), ranks.dtype)
        fill_ranks(e, ranks, packed, info.lanes(np.dtype(e.dtype).itemsize * 8), x, row, 1, codes, 1)
        T.buffer_store(codes, tirx.const(0, ranks.dtype), [e.columns.count])
        sums = RowSums(e, packed, info)

        def group(trees: Sequence[Expr]) -> None:
            roots = [T.bind(packed["ranked_root"][tree]) for tree in trees]
            steps = packed["ranked_depth"][trees[0]]
            for tree in trees[1:]:
                steps = tirx.max(steps, packed["ranked_depth"][tree])
            at = [Cell("int64", 1, const(0, "int64")) for _ in trees]
            with T.serial(T.bind(steps)):
                for cell, root in zip(at, roots, strict=True):
                    cell.set(self._step(T.bind(packed["ranked"][root + cell.value]), codes))
            for tree, root, cell in zip(trees, roots, at, strict=True):
                slot = root + cell.value
                if e.width == 1:
                    sums.add("ranked_values", slot, tree)
                else:
                    sums.add("leaves", T.bind(tirx.Cast("int32", packed["ranked_leaf"][slot])), tree)

        in_groups(e.trees, LANES, group)
        sums.finish(out, row)

    def _step(self, word: Expr, codes: Buffer) -> Expr:
        """The place a split sends the row to."""
        field = self.field
        unsigned = tirx.reinterpret(f"uint{4 * field}", word)

        def part(begin: int, bits: int) -> Expr:
            mask = tirx.const((1 << bits) - 1, f"uint{4 * field}")
            return (unsigned >> tirx.const(begin, f"uint{4 * field}")) & mask

        code = codes[tirx.Cast("int64", part(0, field))]
        left = code < tirx.Cast(self.ranks.dtype, part(field, field))
        right = tirx.Select(left, const(0, "int64"), const(1, "int64"))
        return opaque(tirx.Cast("int64", part(2 * field, 2 * field)) + right)
