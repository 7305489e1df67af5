"""Which strategy evaluates an ensemble, and the arrays it wants."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlec.backends.tvm.kernels.tree_ensemble.columns import pack_columns
from mlec.backends.tvm.kernels.tree_ensemble.ensemble import Array, TreeEnsemble
from mlec.backends.tvm.kernels.tree_ensemble.walk import LANES, pack_walk
from mlec.backends.tvm.target import TargetInfo

STEP_NS = 0.8
"""One step of one walk, several in flight (measured: 0.6 to 0.9 at 3 GHz, tree in the first-level cache)."""

DISPATCH_NS = 20_000
"""Work below which waking threads costs more than it gains."""

MAX_BLOCK = 256
"""Rows for which a tree is loaded once."""


@dataclass(frozen=True)
class Plan:
    """How an ensemble is evaluated.

    Attributes:
        ensemble: what is evaluated.
        strategy: ``"walk"``.
        packed: further arguments of the kernel, in order, between the rows and the result.
        block_rows: rows of a block; one thread works on a block at a time.
        parallel_rows: rows from which blocks are given to several threads.
        reason: why this strategy.
    """

    ensemble: TreeEnsemble
    strategy: str
    packed: dict[str, Array]
    block_rows: int
    parallel_rows: int
    reason: str

    def explain(self) -> str:
        """What was picked and why, for the report."""
        e = self.ensemble
        depth = e.layout.depth
        kilobytes = sum(a.nbytes for a in self.packed.values()) / 1024
        return (
            f"{e.trees} trees, {e.nodes} splits, {e.leaves} leaves, depth {int(depth.max(initial=0))} (mean "
            f"{float(depth.mean()) if e.trees else 0.0:.1f}), {e.columns.count} columns of {e.features} features, "
            f"{e.outputs} outputs, {e.dtype} rows: {self.strategy} ({self.reason}); {kilobytes:.0f} KiB packed, "
            f"blocks of {self.block_rows} rows, fewer than {LANES} rows one by one, threads from {self.parallel_rows} rows"
        )


def prepare(ensemble: TreeEnsemble, info: TargetInfo) -> Plan:
    """Choose a strategy for the processor ``info`` and pack the arrays for it. Linear in the number of nodes.

    Raises:
        LoweringError: ``E_TREE_ARRAYS`` for arrays that contradict each other.
    """
    packed = {**pack_columns(ensemble), **pack_walk(ensemble)}
    packed["output"] = ensemble.output.astype(np.int32)
    packed["values"] = ensemble.values
    packed["base"] = ensemble.base
    packed = {name: np.ascontiguousarray(a) for name, a in packed.items() if a.size}
    row_bytes = (ensemble.columns.count + 1) * ensemble.threshold.itemsize
    fits = info.l2_bytes // 4 // row_bytes
    block = max(2 * LANES, min(MAX_BLOCK, 1 << max(fits, 1).bit_length() - 1))
    row_ns = STEP_NS * float(ensemble.layout.depth.sum()) + ensemble.columns.count + 1
    parallel = max(2 * LANES, int(DISPATCH_NS / row_ns) + 1)
    return Plan(ensemble, "walk", packed, block, parallel, "the general strategy")
