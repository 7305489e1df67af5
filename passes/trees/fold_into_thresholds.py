"""fold-into-thresholds: trees compare the numbers as they come, not as preprocessing makes them.

A split asks whether a column of its matrix is below a threshold. Where the column is a monotone function of one number of the input (a
scaler, an imputer, a cast ...), so is the answer: there is a last float for which it is the one, and from the next on it is the other.
That float is searched for, on the very arithmetic of the ops, so that every decision stays as it was: on ties, at infinities and for NaN.
Where the function falls, the sides of the split change places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from mlec.ir import DType, Graph, GraphBuilder, Node, Value
from mlec.ir.op import Array
from mlec.ops.tree import DEFAULT_LEFT, ZERO_IS_MISSING, goes_left
from mlec.passes.trees.arrays import Bools, Change, Ints, Trees, change_ensembles
from mlec.passes.trees.columns import ColumnFunctions, floats_of, is_inexact, last_key
from mlec.pipeline import Pass, PassContext, PassResult
from mlec.wording import plural

AUDIT = (256, 4096)
"""Floats to each side of a threshold that are tried where a function is not exactly rounded: so many, and if that is not enough ..."""

FAR = 16.0
"""Units in the last place that such a function must move over that distance; so far away its errors cannot matter."""

AUDIT_BLOCK = 1 << 20
"""Numbers that are tried at a time."""


@dataclass(frozen=True)
class FoldIntoThresholds(Pass):
    """Folds monotone preprocessing of single columns into the thresholds of trees; exact."""

    name: ClassVar[str] = "fold-into-thresholds"
    before: ClassVar[str] = "layout"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        return change_ensembles(graph, self.name, lambda b, node, trees: _fold(graph, b, node, trees))


class _NotFoldedError(Exception):
    """Why an ensemble is left alone."""


def _fold(graph: Graph, b: GraphBuilder, node: Node, trees: Trees) -> Change | str | None:
    matrix = node.inputs[0]
    if graph.producer.get(matrix) is None or not trees.nodes:
        return None
    functions = ColumnFunctions(graph, matrix)
    columns = np.unique(trees.feature)
    sources, source, place = functions.sources(columns)
    if matrix in sources:
        return None
    try:
        return _folded(functions, graph, b, node, trees, columns, sources, source, place)
    except _NotFoldedError as refused:
        return str(refused)


def _folded(
    functions: ColumnFunctions, graph: Graph, b: GraphBuilder, node: Node, trees: Trees, columns: Ints,
    sources: list[Value], source: Ints, place: Ints,
) -> Change:  # fmt: skip
    matrix = node.inputs[0]
    others = [user.name for user in graph.users[matrix] if user.name != "tree_ensemble"]
    if others or matrix in graph.outputs:
        raise _NotFoldedError(f"the preprocessed rows are needed anyway{f', by {others[0]}' if others else ''}")
    if (source < 0).any():
        raise _NotFoldedError(f"column {columns[source < 0][0]} is no function of one column of the input")
    if not trees.numeric.all():
        raise _NotFoldedError("splits on categories compare sets, not thresholds")
    if (trees.flags & ZERO_IS_MISSING).any():
        raise _NotFoldedError("zeros count as missing, wherever they come from")
    used = [sources[i] for i in np.unique(source)]
    for i, value in zip(np.unique(source), used, strict=True):
        if value.type.dtype not in (DType.F32, DType.F64):
            column = columns[source == i][0]
            raise _NotFoldedError(f"column {column} is computed from {value.type.dtype}, thresholds are f32 or f64")
    dtype = DType.F64 if any(value.type.dtype is DType.F64 for value in used) else DType.F32
    if dtype.bits > matrix.type.dtype.bits and (len(used) > 1 or used[0] not in graph.inputs):
        # Measured: where a kernel has to make the rows anyway, wider ones cost the trees more than the arithmetic in it.
        raise _NotFoldedError(f"the rows are computed anyway, and cost less as {matrix.type.dtype} than as {dtype}")

    feature, threshold, flags = np.empty_like(trees.feature), np.empty(trees.nodes, dtype.numpy), trees.flags.copy()
    swap = np.zeros(trees.nodes, bool)
    start = 0
    for i, value in zip(np.unique(source), used, strict=True):
        nodes = np.flatnonzero(np.isin(trees.feature, columns[source == i]))
        splits = _Splits.of(trees, nodes)
        found = _search(functions, columns[source == i], splits, trees.compare, value.type.dtype)
        at = splits.of_node
        threshold[nodes], swap[nodes] = found.threshold[at], found.swap[at]
        flags[nodes] = np.where(found.missing_left[at], DEFAULT_LEFT, 0)
        feature[nodes] = start + place[np.searchsorted(columns, trees.feature[nodes])]
        start += int(value.type.shape[1])

    parts = [value if value.type.dtype is dtype else b("cast", value, dtype=dtype) for value in used]
    x = parts[0] if len(parts) == 1 else b("concat", *parts, axis=1)
    left, right = np.where(swap, trees.right, trees.left), np.where(swap, trees.left, trees.right)
    folded = replace(trees, feature=feature, threshold=threshold, flags=flags, left=left, right=right)
    ops = _between(graph, matrix, used)
    thresholds = len(
        np.unique(np.stack([feature, threshold.view(np.int32 if dtype is DType.F32 else np.int64)]), axis=1)[0]
    )
    message = (
        f"{', '.join(ops)} before the trees: in {plural(thresholds, 'threshold')} of {plural(len(columns), 'column')}"
    )
    return folded, x, message + (f", {plural(int(swap.sum()), 'split')} with sides exchanged" if swap.any() else "")


def _between(graph: Graph, matrix: Value, sources: list[Value]) -> list[str]:
    """The ops from sources to a matrix, in order."""
    found: dict[Node, None] = {}
    pending = [matrix]
    while pending:
        node = graph.producer.get(value) if (value := pending.pop()) not in sources else None
        if node is not None and not node.is_constant and node not in found:
            found[node] = None
            pending += node.inputs
    return list(dict.fromkeys(node.name for node in graph.nodes if node in found))


@dataclass(frozen=True)
class _Splits:
    """The different splits of some nodes.

    Attributes:
        column: i64[S]; threshold: [S]; flags: u8[S].
        of_node: i64[nodes], the split of each node.
    """

    column: Ints
    threshold: Array
    flags: Array
    of_node: Ints

    @staticmethod
    def of(trees: Trees, nodes: Ints) -> _Splits:
        threshold = trees.threshold[nodes] + 0.0  # one zero
        bits = threshold.view(np.int32 if threshold.dtype == np.float32 else np.int64).astype(np.int64)
        keys = np.stack([trees.feature[nodes], bits, trees.flags[nodes].astype(np.int64)])
        _, first, of_node = np.unique(keys, axis=1, return_index=True, return_inverse=True)
        return _Splits(trees.feature[nodes][first], threshold[first], trees.flags[nodes][first], of_node.reshape(-1))

    def __len__(self) -> int:
        return len(self.column)


@dataclass(frozen=True)
class _Found:
    """Splits on the input: [S] thresholds, whether the sides change places, and whether NaN then goes left."""

    threshold: Array
    swap: Bools
    missing_left: Bools


def _search(functions: ColumnFunctions, columns: Ints, splits: _Splits, compare: str, source: DType) -> _Found:
    """The splits on the source that decide as these do on the matrix.

    Raises:
        _NotFoldedError: a split has no single threshold there, or it is not known to have one.
    """
    dtype = np.dtype(source.numpy)
    pieces, refused = functions.pieces(columns, dtype)
    if refused:
        column, reason = next(iter(refused.items()))
        raise _NotFoldedError(f"column {column} is not known to be monotone: {reason}")
    no_sets = np.zeros((0, 0), np.int32)

    def left(at: Ints, numbers: Array) -> Bools:
        """Where splits send numbers of the source."""
        x = functions(splits.column[at], numbers)
        return goes_left(x, splits.threshold[at], splits.flags[at], np.full(len(at), -1), no_sets, compare)

    every = np.arange(len(splits))
    zeros = [left(every, np.full(len(splits), zero, dtype)) for zero in (0.0, -0.0)]
    if (zeros[0] != zeros[1]).any():
        raise _NotFoldedError(f"column {splits.column[zeros[0] != zeros[1]][0]} depends on the sign of zero")

    # Of each split and each piece of its column: which side the first and the last number take.
    start, end = (np.searchsorted(pieces.column, splits.column, side) for side in ("left", "right"))
    split = np.repeat(every, end - start)
    piece = np.arange(len(split)) - np.repeat(np.cumsum(end - start) - (end - start), end - start) + start[split]
    lowest, highest = pieces.ends()
    first, last = left(split, lowest[piece]), left(split, highest[piece])
    inside = first != last
    between = np.append((split[1:] == split[:-1]) & (last[:-1] != first[1:]), False)
    changes = np.bincount(split, inside.astype(int) + between, minlength=len(splits))
    if (changes > 1).any():
        bad = int(np.argmax(changes > 1))
        raise _NotFoldedError(
            f"column {splits.column[bad]}: rows on one side of {splits.threshold[bad]:g} are not one interval of the input"
        )
    key = np.full(len(splits), pieces.high.max())
    key[split[between]] = pieces.high[piece[between]]
    at = split[inside]
    side = first[inside]
    key[at] = last_key(
        lambda keys: left(at, floats_of(keys, dtype)) == side, pieces.low[piece[inside]], pieces.high[piece[inside]]
    )

    begins_left = np.empty(len(splits), bool)
    begins_left[split[::-1]] = first[::-1]  # of a split's pieces the first is written last
    changed = changes > 0
    _audit(functions, splits, np.flatnonzero(changed), key, begins_left, dtype, left)
    nan_left = left(every, np.full(len(splits), np.nan, dtype))
    if compare == "le":
        threshold, swap = floats_of(key, dtype), ~begins_left  # without a change the key is that of infinity
    else:
        threshold = floats_of(np.where(changed, key + 1, pieces.low.min()), dtype)
        swap = np.where(changed, ~begins_left, begins_left)  # nothing is below minus infinity
    return _Found(threshold, swap, nan_left ^ swap)


def _audit(
    functions: ColumnFunctions, splits: _Splits, at: Ints, key: Ints, begins_left: Bools, dtype: np.dtype[np.floating],
    left: Callable[[Ints, Array], Bools],
) -> None:  # fmt: skip
    """Tries the floats around the thresholds of splits ``at`` whose functions are not exactly rounded.

    Raises:
        _NotFoldedError: one of them is on the wrong side, or the function moves too little to say how many must be tried.
    """
    for reach in AUDIT:
        moved = _moves(functions, splits.column[at], key[at], reach, dtype)
        near, far = at[moved < FAR], at[moved >= FAR]
        offsets = np.arange(1 - reach, reach + 1)
        for start in range(0, len(far), max(1, AUDIT_BLOCK // len(offsets))):
            block = np.repeat(far[start : start + max(1, AUDIT_BLOCK // len(offsets))], len(offsets))
            offset = np.resize(offsets, len(block))
            wrong = (left(block, floats_of(key[block] + offset, dtype)) == begins_left[block]) != (offset <= 0)
            if wrong.any():
                raise _NotFoldedError(
                    f"column {splits.column[block[np.argmax(wrong)]]} does not rise and fall steadily, as it is computed"
                )
        at = near
    if at.size:
        raise _NotFoldedError(f"column {splits.column[at[0]]} hardly changes around {splits.threshold[at[0]]:g}")


def _moves(functions: ColumnFunctions, columns: Ints, key: Ints, reach: int, dtype: np.dtype[np.floating]) -> Array:
    """``[K]``: the units in the last place by which the functions on the way that are not exactly rounded move, at least, until so many
    floats away; NaN where there is none. Where one becomes NaN or infinite, it has moved.
    """
    moved = np.full(len(columns), np.nan)

    def visit(node: Node, values: Array, index: Ints) -> None:
        if not is_inexact(node):
            return
        here, low, high = values.reshape(3, -1)
        which = index.reshape(3, -1)[0]
        for end in (low, high):
            step = np.abs(end - here) / np.spacing(np.maximum(np.abs(here), np.abs(end)))
            moved[which] = np.fmin(moved[which], np.where(np.isfinite(end) & np.isfinite(here), step, np.inf))

    numbers = floats_of(np.concatenate([key, key - reach, key + reach]), dtype)
    functions.value(functions.matrix, np.tile(columns, 3), numbers, visit)
    return moved
