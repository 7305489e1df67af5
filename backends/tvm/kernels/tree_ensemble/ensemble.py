"""The arrays of a tree ensemble, and the columns its splits compare."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from mlec.errors import LoweringError
from mlec.ops.tree import DEFAULT_LEFT, NAN_IS_ZERO, ZERO_IS_MISSING

Array: TypeAlias = npt.NDArray[Any]
Ints: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TreeEnsemble:
    """Operands and attribute of the ``tree_ensemble`` op as numpy arrays (see the op for their meaning).

    Attributes:
        features: columns of the rows the ensemble is applied to, F.
        feature, left, right: i32[N]; a child ``c >= 0`` is a node, ``c < 0`` the leaf ``~c``.
        threshold: f32[N] or f64[N], the dtype of the rows.
        flags: u8[N], bits of `mlec.ops.tree`.
        category: i32[N] or i32[0], row in ``categories`` or -1.
        categories: i32[C, W], bit sets.
        roots, output: i32[T].
        values: f32|f64 [L, V]; base: [K], same dtype.
        compare: ``"lt"``: left iff ``x < threshold``; ``"le"``: iff ``x <= threshold``.
    """

    features: int
    feature: Array
    threshold: Array
    left: Array
    right: Array
    flags: Array
    category: Array
    categories: Array
    roots: Array
    output: Array
    values: Array
    base: Array
    compare: Literal["lt", "le"]

    def __post_init__(self) -> None:
        self._check()

    @property
    def trees(self) -> int:
        return len(self.roots)

    @property
    def nodes(self) -> int:
        return len(self.feature)

    @property
    def leaves(self) -> int:
        return len(self.values)

    @property
    def width(self) -> int:
        """Values per leaf, V."""
        return int(self.values.shape[1])

    @property
    def outputs(self) -> int:
        """Sums per row, K."""
        return len(self.base)

    @property
    def dtype(self) -> str:
        """Dtype of rows and thresholds."""
        return str(self.threshold.dtype)

    @property
    def value_dtype(self) -> str:
        return str(self.values.dtype)

    @cached_property
    def categorical(self) -> npt.NDArray[np.bool_]:
        """bool[N]: the node asks for membership in a set."""
        if len(self.category) == 0:
            return np.zeros(self.nodes, bool)
        return np.asarray(self.category >= 0)

    @cached_property
    def layout(self) -> Layout:
        return Layout.of(self)

    @cached_property
    def columns(self) -> Columns:
        return Columns.of(self)

    @cached_property
    def distinct(self) -> tuple[Array, Ints]:
        """The leaves without those that repeat another one bit for bit, [D, V], and which of them each leaf is, i64[L].

        Forests that were grown until their leaves are pure have one for each class.
        """
        number = ~self.layout.code[self.layout.code < 0]
        rows = np.ascontiguousarray(self.values[number])
        whole = rows.view(f"V{rows.itemsize * self.width}").reshape(-1)
        _, first, which = np.unique(whole, return_index=True, return_inverse=True)
        by_appearance = np.argsort(first)
        place = np.empty(len(first), np.int64)
        place[by_appearance] = np.arange(len(first))
        row_of = np.zeros(self.leaves, np.int64)
        row_of[number] = place[which]
        return rows[first[by_appearance]], row_of

    def typical_rows(self, rows: int) -> Array:
        """[rows, F]: values between the thresholds that their feature is compared with, so that rows go all ways through the trees."""
        rng = np.random.default_rng(0)
        made = np.zeros((rows, self.features), self.dtype)
        for feature in np.unique(self.feature):
            edges = self.threshold[(self.feature == feature) & np.isfinite(self.threshold)]
            if edges.size:
                made[:, feature] = rng.choice(edges, rows)
        return made

    def _check(self) -> None:
        """Refuse what would make a kernel read outside its arrays."""
        n, leaves = self.nodes, self.leaves
        facts = [
            (self.compare in ("lt", "le"), f"compare is {self.compare!r}, expected 'lt' or 'le'"),
            (self.dtype in ("float32", "float64"), f"threshold is {self.dtype}, expected float32 or float64"),
            (self.value_dtype in ("float32", "float64"), f"values is {self.value_dtype}, expected float32 or float64"),
            (self.base.dtype == self.values.dtype, f"base is {self.base.dtype}, values is {self.values.dtype}"),
            (
                all(len(a) == n for a in (self.threshold, self.left, self.right, self.flags)),
                f"feature, threshold, left, right and flags differ in length (feature has {n})",
            ),
            (len(self.category) in (0, n), f"category has {len(self.category)} entries, expected 0 or {n}"),
            (len(self.output) == self.trees, f"output has {len(self.output)} entries for {self.trees} roots"),
            (_within(self.feature, 0, self.features), f"a feature is outside 0..{self.features - 1}"),
            (_within(self.category, -1, len(self.categories)), f"a category is outside -1..{len(self.categories) - 1}"),
            (
                all(_within(a, -leaves, n) for a in (self.left, self.right, self.roots)),
                f"a child or root is outside -{leaves}..{n - 1} ({n} nodes, {leaves} leaves)",
            ),
            (
                _within(self.output, 0, self.outputs - self.width + 1),
                f"an output offset and {self.width} values per leaf pass the end of {self.outputs} outputs",
            ),
        ]
        for holds, message in facts:
            if not holds:
                raise LoweringError(
                    f"tree_ensemble: {message}",
                    code="E_TREE_ARRAYS",
                    hint="let the frontend check what it reads: mlec.frontends.trees collects valid arrays",
                )


def narrow(a: Ints) -> Array:
    """The numbers, not negative ones, in 16 bits where these hold them, else in 32."""
    return a.astype(np.int16 if a.max(initial=0) <= np.iinfo(np.int16).max else np.int32)


def _within(a: Array, low: int, stop: int) -> bool:
    return a.size == 0 or bool(a.min() >= low and a.max() < stop)


@dataclass(frozen=True)
class Layout:
    """The slots of an ensemble: its nodes and leaves, tree by tree, each tree level by level, siblings side by side.

    Attributes:
        code: i64[S], the node (``>= 0``) or leaf (``~leaf``) in a slot.
        left: i64[S], slot of the left child (the right one is next to it); -1 for a leaf.
        first: i64[T + 1], first slot of each tree (its root).
        depth: i64[T], splits on the longest path.
        leaves: i64[T].
    """

    code: Ints
    left: Ints
    first: Ints
    depth: Ints
    leaves: Ints

    @classmethod
    def of(cls, ensemble: TreeEnsemble) -> Layout:
        left, right = ensemble.left.astype(np.int64), ensemble.right.astype(np.int64)
        code, tree = ensemble.roots.astype(np.int64), np.arange(ensemble.trees)
        codes, trees, lefts, start, seen = [], [], [], 0, 0
        depth = np.zeros(ensemble.trees, np.int64)
        for level in range(ensemble.nodes + 1):
            split = code >= 0
            inner = code[split]
            children = np.full(len(code), -1, np.int64)
            children[split] = start + len(code) + 2 * np.arange(len(inner))
            codes.append(code)
            trees.append(tree)
            lefts.append(children)
            start += len(code)
            depth[tree] = level
            seen += len(inner)
            if len(inner) == 0:
                break
            code = np.stack([left[inner], right[inner]], axis=1).reshape(-1)
            tree = np.repeat(tree[split], 2)
            if seen > ensemble.nodes:
                raise LoweringError(
                    "tree_ensemble: a node is the child of two nodes, or of itself",
                    code="E_TREE_ARRAYS",
                    hint="let the frontend check what it reads: mlec.frontends.trees collects valid arrays",
                )
        all_codes, all_trees, all_left = np.concatenate(codes), np.concatenate(trees), np.concatenate(lefts)
        order = np.argsort(all_trees, kind="stable")
        position = np.empty(len(order) + 1, np.int64)
        position[order] = np.arange(len(order))
        position[-1] = -1
        first = np.searchsorted(all_trees[order], np.arange(ensemble.trees + 1))
        leaves = np.bincount(all_trees[all_codes < 0], minlength=ensemble.trees)
        return cls(all_codes[order], position[all_left[order]], first, depth, leaves)


# What a column holds for a value x; every split then goes left iff `column < threshold` (or <=), so NaN goes right.
PLAIN = 0  # x
NAN_LOW = 1  # missing goes left: NaN -> -inf
NAN_ZERO = 2  # NaN -> 0
ZERO_NAN = 3  # zero is missing: zero -> NaN
ZERO_LOW = 4  # zero is missing, missing goes left: zero and NaN -> -inf
PRESENT = 5  # NaN -> 0, a number -> 1: for splits that send missing left and every number right
ZERO_PRESENT = 6  # the same, zero being missing
MEMBER = 7  # category in the set -> 0, else 1, NaN -> 1
MEMBER_LOW = 8  # the same, NaN -> 0

FEW_GAPS = 16
"""A gap among so many columns of a kind is filled."""


@dataclass(frozen=True)
class Columns:
    """What the splits compare: each a feature seen through one treatment of missing values, or one set of categories.

    All that differs between splits besides the threshold is moved here, so that the splits of all libraries are one
    comparison. Sorted by kind, then by feature.

    Attributes:
        kind: i64[M], one of the constants above.
        feature: i64[M].
        category: i64[M], row of ``categories`` for ``MEMBER*``, else 0.
        node_column: i64[N], the column a node compares.
        node_threshold: [N], what it compares it with.
    """

    kind: Ints
    feature: Ints
    category: Ints
    node_column: Ints
    node_threshold: Array

    @property
    def count(self) -> int:
        return len(self.kind)

    @classmethod
    def of(cls, ensemble: TreeEnsemble) -> Columns:
        flags, threshold = ensemble.flags, ensemble.threshold
        missing_left = (flags & DEFAULT_LEFT) != 0
        nan_is_zero = (flags & NAN_IS_ZERO) != 0
        zero_is_missing = (flags & ZERO_IS_MISSING) != 0
        # Minus infinity goes left, except where nothing does.
        nothing_left = np.isnan(threshold) | ((threshold == -np.inf) & (ensemble.compare == "lt"))
        kind = np.select(
            [
                ensemble.categorical & missing_left,
                ensemble.categorical,
                zero_is_missing & missing_left & nothing_left,
                zero_is_missing & missing_left,
                zero_is_missing,
                nan_is_zero,
                missing_left & nothing_left,
                missing_left,
            ],
            [MEMBER_LOW, MEMBER, ZERO_PRESENT, ZERO_LOW, ZERO_NAN, NAN_ZERO, PRESENT, NAN_LOW],
            PLAIN,
        ).astype(np.int64)
        category = np.where(ensemble.categorical, ensemble.category if len(ensemble.category) else 0, 0)
        keys = np.stack([kind, ensemble.feature.astype(np.int64), category.astype(np.int64)], axis=1)
        compared, node_column = np.unique(keys, axis=0, return_inverse=True)
        unique, place = np.unique(np.concatenate([compared, *_gaps(compared)]), axis=0, return_inverse=True)
        node_column = place.reshape(-1)[node_column.reshape(-1)]
        node_threshold = np.where(kind >= PRESENT, threshold.dtype.type(0.5), threshold)
        return cls(unique[:, 0], unique[:, 1], unique[:, 2], node_column, node_threshold)

    def consecutive(self, begin: int, end: int) -> bool:
        """Whether these columns are of features that lie side by side in a row."""
        feature = self.feature[begin:end]
        return bool(self.kind[end - 1] < PRESENT and feature[-1] - feature[0] == end - begin - 1)

    def ranges(self) -> list[tuple[int, int, int]]:
        """``(kind, first column, end)`` for each kind there is."""
        kinds, first = np.unique(self.kind, return_index=True)
        ends = np.append(first, self.count)[1:]
        return [(int(k), int(a), int(b)) for k, a, b in zip(kinds, first, ends, strict=True)]


def _gaps(columns: Ints) -> list[Ints]:
    """Columns that no split compares, of the few features between others of a kind: all of it is then copied as it lies."""
    found = []
    for kind in range(PRESENT):
        used = columns[columns[:, 0] == kind, 1]
        if len(used):
            gaps = np.setdiff1d(np.arange(used[0], used[-1]), used)
            if len(gaps) <= len(used) // FEW_GAPS:
                found.append(np.stack([np.full_like(gaps, kind), gaps, np.zeros_like(gaps)], axis=1))
    return found
