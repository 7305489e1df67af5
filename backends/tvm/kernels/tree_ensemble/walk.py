"""Walks: follow a row from the root to a leaf, several independent walks interleaved to hide the latency of the loads.

A step is two loads from a slot of 16 bytes (threshold; column and child), the load of the column's value, and a comparison
without a branch. A leaf is its own child, so that all walks of a tile take as many steps as the deepest tree needs. Nothing
is gathered into vectors: gathers are slower than scalar loads on many processors (and one load per lane in any case).

A row's columns are copied first, 0.6 ns for each one that is looked up by itself. Wide rows spend most of their time on that, hence
columns side by side are copied in vectors. Expected of 100 trees of depth 8, 4096 rows: 968 features 1281 -> 900 ns a row, 2000 features
2174 -> 1400; measured: 951 and 1203. One row in the first-level cache, 968 features: expected 1115 -> 600, measured 951: what is left
is the latency of the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from mlec.backends.tvm.compat import T, tirx
from mlec.backends.tvm.kernels.tree_ensemble.columns import fill_columns
from mlec.backends.tvm.kernels.tree_ensemble.ensemble import Array, Ints, TreeEnsemble
from mlec.backends.tvm.kernels.tree_ensemble.sums import RowSums, add_values, in_groups
from mlec.backends.tvm.kernels.vector import load
from mlec.backends.tvm.target import TargetInfo

Expr: TypeAlias = Any
Buffer: TypeAlias = Any

LANES = 16
"""Walks in flight. Some of their positions then live on the stack, which costs less than the waiting it saves (8: 1.3 times
the time, 24 and more: no gain unless the trees lie far out in memory)."""

_BITS = {"float32": "int32", "float64": "int64"}


def pack_walk(ensemble: TreeEnsemble, rows: Ints) -> dict[str, Array]:
    """``slots`` i64[2 S]: threshold (bits), then column | left child << 32; ``root`` i64[T]; ``depth`` i32[T].

    A child is the index of its first word; the right child follows the left one. A leaf compares the column that is always
    NaN, hence goes right, and its right child is itself; its row in the table ``leaves`` stands where a node has its threshold.

    Args:
        rows: i64[L], where each leaf is in the table.
    """
    layout, columns = ensemble.layout, ensemble.columns
    leaf = layout.code < 0
    position = np.arange(len(leaf), dtype=np.int64)
    words = np.empty((len(leaf), 2), np.int64)
    words[leaf, 0] = rows[~layout.code[leaf]]
    words[leaf, 1] = columns.count | ((position[leaf] - 1) * 2 << 32)
    node = layout.code[~leaf]
    words[~leaf, 0] = columns.node_threshold.view(_BITS[ensemble.dtype])[node]
    words[~leaf, 1] = columns.node_column[node] | (layout.left[~leaf] * 2 << 32)
    return {
        "slots": words.reshape(-1),
        "root": layout.first[:-1] * 2,
        "depth": layout.depth.astype(np.int32),
    }


def row_tiles(
    ensemble: TreeEnsemble, packed: dict[str, Buffer], x: Buffer, out: Buffer, first: Expr, rows: Expr, block: int,
    info: TargetInfo,
) -> None:  # fmt: skip
    """Emit the evaluation of ``rows`` rows (at most ``block``, a multiple of `LANES`) from ``first``: trees outermost, so
    that each tree is loaded once per block, then tiles of `LANES` rows."""
    rows = T.bind(rows)
    pitch, outputs = ensemble.columns.count + 1, ensemble.outputs
    scratch = T.alloc_buffer((block * pitch,), ensemble.dtype)
    sums = T.alloc_buffer((block * outputs,), ensemble.value_dtype)
    lanes = info.lanes(np.dtype(ensemble.value_dtype).itemsize * 8)
    tiles = T.bind((rows + (LANES - 1)) // LANES)
    with T.serial(tiles * LANES) as r:  # the last tile is filled up with copies of the last row
        _fill_row(ensemble, packed, x, tirx.min(first + r, first + rows - 1), scratch, r * pitch, info)
        with T.serial(outputs) as k:
            T.buffer_store(sums, packed["base"][k], [r * outputs + k])
    if ensemble.trees:
        with T.serial(ensemble.trees) as tree:
            root, depth, output = (T.bind(packed[name][tree]) for name in ("root", "depth", "output"))
            with T.serial(tiles) as tile:
                row = T.bind(tile * LANES)
                at = [(row + lane) * pitch for lane in range(LANES)]
                leaves = _walk(ensemble, packed["slots"], scratch, [root] * LANES, at, depth)
                for lane, leaf in enumerate(leaves):
                    values = partial(_leaf_values, packed["leaves"], leaf)
                    add_values(sums, (row + lane) * outputs + output, ensemble.width, lanes, values)
    with T.serial(rows) as r, T.serial(outputs) as k:
        T.buffer_store(out, sums[r * outputs + k], [first + r, k])


def _leaf_values(values: Buffer, leaf: Expr, first: Expr, count: int) -> Expr:
    return load(values, [leaf, first], count)


def one_row(
    ensemble: TreeEnsemble, packed: dict[str, Buffer], x: Buffer, out: Buffer, row: Expr, info: TargetInfo
) -> None:
    """Emit the evaluation of one row: `LANES` trees side by side."""
    scratch = T.alloc_buffer((ensemble.columns.count + 1,), ensemble.dtype)
    _fill_row(ensemble, packed, x, row, scratch, 0, info)
    sums = RowSums(ensemble, packed, info)

    def group(trees: Sequence[Expr]) -> None:
        roots = [packed["root"][tree] for tree in trees]
        steps = packed["depth"][trees[0]]
        for tree in trees[1:]:
            steps = tirx.max(steps, packed["depth"][tree])
        leaves = _walk(ensemble, packed["slots"], scratch, roots, [0] * len(trees), T.bind(steps))
        for tree, leaf in zip(trees, leaves, strict=True):
            sums.add("leaves", leaf, tree)

    in_groups(ensemble.trees, LANES, group)
    sums.finish(out, row)


def _fill_row(
    ensemble: TreeEnsemble, packed: dict[str, Buffer], x: Buffer, row: Expr, scratch: Buffer, at: Expr, info: TargetInfo
) -> None:
    fill_columns(ensemble, packed, x, row, scratch, at, info.lanes(np.dtype(ensemble.dtype).itemsize * 8))
    T.buffer_store(scratch, tirx.const(np.nan, ensemble.dtype), [at + ensemble.columns.count])


def _walk(
    ensemble: TreeEnsemble, slots: Buffer, scratch: Buffer, roots: Sequence[Expr], rows: Sequence[Expr], steps: Expr
) -> list[Expr]:
    """Emit walks from ``roots[i]`` over the columns at ``scratch[rows[i]:]``; returns the row of ``leaves`` each ends at."""
    at = T.alloc_buffer((len(roots),), "int64", scope="local")
    for lane, root in enumerate(roots):
        T.buffer_store(at, root, [lane])
    with T.serial(steps):
        for lane, row in enumerate(rows):
            word = T.bind(slots[at[lane] + 1])
            value = scratch[row + (word & tirx.const(0xFFFFFFFF, "int64"))]
            threshold = slots[at[lane]]
            if ensemble.dtype == "float32":
                threshold = tirx.Cast("int32", threshold)
            threshold = tirx.reinterpret(ensemble.dtype, threshold)
            left = value < threshold if ensemble.compare == "lt" else value <= threshold
            # A select, not the negated comparison: the simplifier would turn that round, which is wrong for NaN.
            right = tirx.Select(left, tirx.const(0, "int64"), tirx.const(2, "int64"))
            T.buffer_store(at, opaque((word >> 32) + right), [lane])
    return [T.bind(slots[at[lane]]) for lane in range(len(roots))]


def opaque(value: Expr) -> Expr:
    """The same int64. The annotation keeps LLVM from merging the lanes into vectors whose elements it then has to gather,
    insert and extract (half the speed)."""
    null = tirx.reinterpret("handle", tirx.const(0, "int64"))
    return T.call_llvm_intrin("int64", "llvm.annotation.i64.p0", value, null, null, tirx.const(0, "int32"))
