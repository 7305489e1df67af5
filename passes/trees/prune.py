"""prune-trees: drop the branches that no row can reach.

On the way to a node, its ancestors have decided something of the feature that it tests: the numbers that come there lie in an
interval, the categories in a set, and NaN comes or does not. A split that sends all of them to one side is replaced by that side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mlec.ir import Graph, GraphBuilder, Node
from mlec.ir.op import Array
from mlec.ops.tree import DEFAULT_LEFT, ZERO_IS_MISSING, ZERO_LIMIT, goes_left
from mlec.passes.trees.arrays import Bools, Change, Ints, Trees, change_ensembles, followed
from mlec.pipeline import Pass, PassContext, PassResult

MAX_WORDS = 1 << 24
"""Words of category sets that are compared at a time (64 MiB)."""


@dataclass(frozen=True)
class PruneTrees(Pass):
    """Replaces splits that every row which can come there passes on the same side; exact."""

    name: ClassVar[str] = "prune-trees"
    before: ClassVar[str] = "layout"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        return change_ensembles(graph, self.name, _prune)


def _prune(b: GraphBuilder, node: Node, trees: Trees) -> Change | None:
    side = decided(trees)
    if not (side != 0).any():
        return None
    child = np.where(side < 0, trees.left, trees.right)
    target = np.where(side == 0, np.arange(trees.nodes), child)
    while not np.array_equal(target, further := followed(target, target)):  # past several that are decided
        target = further
    pruned = trees.rebuilt(*(followed(codes, target) for codes in (trees.left, trees.right, trees.roots)))
    message = f"splits: {trees.nodes} -> {pruned.nodes}, no row can take the other branches"
    return pruned, node.inputs[0], message


def decided(trees: Trees) -> Ints:
    """i64[N]: -1 where every row that can come goes left, 1 where it goes right, 0 where both can be."""
    limits = _Limits.of(trees)
    numeric = trees.numeric
    nan_left = _nan_goes_left(trees)
    only_left, only_right = np.zeros(trees.nodes, bool), np.zeros(trees.nodes, bool)
    low, high, t = limits.low, limits.high, trees.threshold
    zero_missing = numeric & ((trees.flags & ZERO_IS_MISSING) != 0)
    default_left = (trees.flags & DEFAULT_LEFT) != 0
    zero_comes = zero_missing & (low <= ZERO_LIMIT) & (high >= -ZERO_LIMIT)
    none = low > high
    below = high < t if trees.compare == "lt" else high <= t
    above = ~(low < t) if trees.compare == "lt" else ~(low <= t)  # so for a threshold of NaN
    only_left[numeric] = (none | (below & (default_left | ~zero_comes)))[numeric]
    only_right[numeric] = (none | (above & (~default_left | ~zero_comes)))[numeric]
    for nodes, allowed, other in limits.categories():
        inside = trees.categories.view(np.uint32)[trees.category[nodes]]
        only_left[nodes] = ~(allowed & ~inside).any(axis=1) & ~other
        only_right[nodes] = ~(allowed & inside).any(axis=1)
    only_left &= ~limits.nan | nan_left
    only_right &= ~limits.nan | ~nan_left
    return np.where(only_left, -1, np.where(only_right, 1, 0))


def _nan_goes_left(trees: Trees) -> Bools:
    """bool[N]: the side that a NaN takes."""
    nan = np.full(trees.nodes, np.nan, trees.threshold.dtype)
    none = np.zeros((0, 0), np.int32)
    numeric = goes_left(nan, trees.threshold, trees.flags, np.full(trees.nodes, -1), none, trees.compare)
    return np.asarray(np.where(trees.numeric, numeric, (trees.flags & DEFAULT_LEFT) != 0))


@dataclass(frozen=True)
class _Limits:
    """What can come to each node of the feature that it tests.

    Attributes:
        low, high: [N], the numbers from low to high, both included.
        nan: bool[N], whether NaN can.
        above: i64[N], each node's parent, or -1; is_left: bool[N], which of its children it is.
    """

    trees: Trees
    low: Array
    high: Array
    nan: Bools
    above: Ints
    is_left: Bools

    @staticmethod
    def of(trees: Trees) -> _Limits:
        above, is_left = np.full(trees.nodes, -1, np.int64), np.zeros(trees.nodes, bool)
        for children, side in ((trees.left, True), (trees.right, False)):
            inner = np.flatnonzero(children >= 0)
            above[children[inner]], is_left[children[inner]] = inner, side
        left_high, right_low = _bounds(trees)
        nan_left = _nan_goes_left(trees)
        low = np.full(trees.nodes, -np.inf, trees.threshold.dtype)
        limits = _Limits(trees, low, -low, np.ones(trees.nodes, bool), above, is_left)
        for node, ancestor, left in limits.walk(np.arange(trees.nodes)):
            limits.nan[node] &= nan_left[ancestor] == left
            compared = trees.numeric[ancestor]
            from_left, from_right = compared & left, compared & ~left
            at, of = node[from_left], ancestor[from_left]
            limits.high[at] = np.minimum(limits.high[at], left_high[of])
            at, of = node[from_right], ancestor[from_right]
            limits.low[at] = np.maximum(limits.low[at], right_low[of])
        return limits

    def walk(self, nodes: Ints) -> Iterator[tuple[Ints, Ints, Bools]]:
        """Of nodes, step by step towards the roots: those with an ancestor there that tests the same feature, it, and whether they
        are on its left."""
        child = nodes
        while nodes.size:
            ancestor, left = self.above[child], self.is_left[child]
            inside = ancestor >= 0
            nodes, child, left = nodes[inside], ancestor[inside], left[inside]
            same = self.trees.feature[nodes] == self.trees.feature[child]
            yield nodes[same], child[same], left[same]

    def categories(self) -> Iterator[tuple[Ints, Array, Bools]]:
        """Of the categorical nodes, some at a time: the codes that can come, as bits ``u32[nodes, W]``, and whether others can."""
        trees = self.trees
        every = np.flatnonzero(~trees.numeric)
        sets = trees.categories.view(np.uint32)
        block = max(1, MAX_WORDS // max(sets.shape[1], 1)) if len(sets) else 1
        for start in range(0, len(every), block):
            nodes = every[start : start + block]
            position = np.full(trees.nodes, -1)
            position[nodes] = np.arange(len(nodes))
            allowed = np.full((len(nodes), sets.shape[1]), np.uint32(0xFFFFFFFF))
            other = np.ones(len(nodes), bool)
            for node, ancestor, left in self.walk(nodes):
                asked = ~trees.numeric[ancestor]
                at, members = position[node[asked]], sets[trees.category[ancestor[asked]]]
                allowed[at] &= np.where(left[asked, None], members, ~members)
                other[at] &= ~left[asked]  # what is in no set goes right
            yield nodes, allowed, other


def _bounds(trees: Trees) -> tuple[Array, Array]:
    """Of each split on numbers: the largest that can go left, and the smallest that can go right."""
    t = trees.threshold
    infinity = t.dtype.type(np.inf)
    number = ~np.isnan(t)
    with np.errstate(all="ignore"):
        left_high = np.where(number, np.nextafter(t, -infinity) if trees.compare == "lt" else t, -infinity)
        right_low = np.where(number, t if trees.compare == "lt" else np.nextafter(t, infinity), -infinity)
    zero_missing = (trees.flags & ZERO_IS_MISSING) != 0
    default_left = (trees.flags & DEFAULT_LEFT) != 0
    left_high = np.where(zero_missing & default_left, np.maximum(left_high, t.dtype.type(ZERO_LIMIT)), left_high)
    right_low = np.where(zero_missing & ~default_left, np.minimum(right_low, t.dtype.type(-ZERO_LIMIT)), right_low)
    return left_high, right_low
