"""Which strategy evaluates an ensemble, and the arrays it wants."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlec.backends.tvm.kernels.tree_ensemble.columns import pack_columns
from mlec.backends.tvm.kernels.tree_ensemble.ensemble import Array, TreeEnsemble
from mlec.backends.tvm.kernels.tree_ensemble.sliced import LISTED, Sliced
from mlec.backends.tvm.kernels.tree_ensemble.walk import LANES, pack_walk
from mlec.backends.tvm.target import TargetInfo

# Measured on a 3 GHz AVX-512 processor with the tree in the first-level cache.
STEP_NS = 0.7  # one step of one walk, several in flight
COLUMN_NS = 0.6  # copying a value into its column
RANK_LEVEL_NS = 0.5  # one level of the search for a rank

DISPATCH_NS = 20_000
"""Work below which waking threads costs more than it gains."""

MAX_BLOCK = 256
"""Rows for which a tree is loaded once by walks."""


@dataclass(frozen=True)
class Plan:
    """How an ensemble is evaluated.

    Attributes:
        ensemble: what is evaluated.
        sliced: the networks that evaluate blocks of rows; None: blocks are evaluated by walks.
        packed: further arguments of the kernel, in order, between the rows and the result.
        block: rows of a block; one thread works on a block at a time.
        block_rows: rows from which blocks are used; fewer go one by one.
        parallel_rows: rows from which blocks are given to several threads.
        walk_ns, sliced_ns: expected time per row in blocks (``sliced_ns`` is infinite where it is impossible).
    """

    ensemble: TreeEnsemble
    sliced: Sliced | None
    packed: dict[str, Array]
    block: int
    block_rows: int
    parallel_rows: int
    walk_ns: float
    sliced_ns: float

    @property
    def strategy(self) -> str:
        """``"walk"`` or ``"sliced"``."""
        return "walk" if self.sliced is None else "sliced"

    def explain(self) -> str:
        """What was picked and why, for the report."""
        e = self.ensemble
        depth = e.layout.depth
        shape = (
            f"{e.trees} trees, {e.nodes} splits, {e.leaves} leaves, depth {int(depth.max(initial=0))} (mean "
            f"{float(depth.mean()) if e.trees else 0.0:.1f}), {e.columns.count} columns of {e.features} features, "
            f"{e.outputs} outputs, {e.dtype} rows"
        )
        if self.sliced is None:
            other = "no ranks" if np.isinf(self.sliced_ns) else f"bit-sliced {self.sliced_ns:.0f}"
            choice = f"interleaved walks, {self.walk_ns:.0f} ns a row expected ({other})"
        else:
            complete = int((self.sliced.form != LISTED).sum())
            choice = (
                f"bit-sliced on {self.sliced.ranks.dtype} ranks, {self.sliced_ns:.0f} ns a row expected (walks "
                f"{self.walk_ns:.0f}), {complete} complete and {e.trees - complete} listed trees"
            )
        kilobytes = sum(a.nbytes for a in self.packed.values()) / 1024
        return (
            f"{shape}: {choice}; fewer than {self.block_rows} rows one by one, then blocks of {self.block} rows, threads "
            f"from {self.parallel_rows} rows; {kilobytes:.0f} KiB packed"
        )


def prepare(ensemble: TreeEnsemble, info: TargetInfo, strategy: str | None = None) -> Plan:
    """Choose a strategy for the processor ``info`` and pack the arrays for it. Linear in the number of nodes.

    Args:
        strategy: ``"walk"`` or ``"sliced"`` where it is not to be chosen by expected time.

    Raises:
        LoweringError: ``E_TREE_ARRAYS`` for arrays that contradict each other.
    """
    steps = float(ensemble.layout.depth.sum())
    columns = ensemble.columns.count
    walk_ns = STEP_NS * steps + COLUMN_NS * columns + 1
    sliced = Sliced.of(ensemble, info) if ensemble.trees else None
    sliced_ns = float("inf")
    lanes = info.lanes(np.dtype(ensemble.dtype).itemsize * 8)
    if sliced is not None:
        sliced_ns = sliced.row_ns + RANK_LEVEL_NS * columns * sliced.ranks.levels(ensemble, lanes) + 1
    if strategy == "walk" or (strategy is None and walk_ns <= sliced_ns):
        sliced = None

    packed = {**pack_columns(ensemble), **pack_walk(ensemble)}
    packed["output"] = ensemble.output.astype(np.int32)
    packed["values"] = ensemble.values
    packed["base"] = ensemble.base
    if sliced is None:
        row_bytes = (columns + 1) * ensemble.threshold.itemsize
        block = max(2 * LANES, min(MAX_BLOCK, _power_of_two(info.l2_bytes // 4 // row_bytes)))
        block_rows, row_ns = LANES, walk_ns
    else:
        packed |= sliced.ranks.pack(ensemble, lanes) | sliced.pack()
        block, row_ns = sliced.block, sliced_ns
        block_rows = 1 + int(sliced_ns * sliced.lanes / walk_ns)  # what one vector of rows costs, in rows
    packed = {name: np.ascontiguousarray(a) for name, a in packed.items() if a.size}
    parallel = max(block_rows, 2 * LANES, int(DISPATCH_NS / row_ns) + 1)
    return Plan(ensemble, sliced, packed, block, block_rows, parallel, walk_ns, sliced_ns)


def _power_of_two(n: int) -> int:
    """The largest power of two up to ``n`` (1 for less)."""
    return 1 << max(n, 1).bit_length() - 1
