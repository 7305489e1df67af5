"""merge-trees: drop the splits that decide nothing, and the trees that need no row.

A split both of whose sides are the same (leaves of equal value, or equal subtrees) is replaced by one of them. A tree that is a leaf
goes into what its column of the sums starts from; equal trees become one, of twice the values. As sums are rounded after each tree,
these two are done only where no result can change by a bit: the first trees of a column, zeros, and ensembles none of whose
sums are rounded at all (votes, mostly).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from mlec.ir import Graph, GraphBuilder, Node
from mlec.ir.op import Array
from mlec.passes.trees.arrays import Bools, Change, Ints, Trees, change_ensembles, followed
from mlec.pipeline import Pass, PassContext, PassResult
from mlec.wording import plural

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class MergeTrees(Pass):
    """Merges equal leaves, equal subtrees below a split, constant trees and the base, equal trees; exact."""

    name: ClassVar[str] = "merge-trees"
    before: ClassVar[str] = "layout"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        return change_ensembles(graph, self.name, _merge)


def _merge(b: GraphBuilder, node: Node, trees: Trees) -> Change | str | None:
    merged, hashes = _merge_sides(trees)
    count = None
    while count != len(merged.roots):  # without some trees, the sums of the others may be exact
        count = len(merged.roots)
        exact = sums_are_exact(merged)
        merged, kept = _fold_constant_trees(merged, exact)
        if exact and len(merged.values) == merged.nodes + len(merged.roots):  # no leaf is one of two trees
            merged = _merge_equal_trees(merged, hashes[kept])
        merged, hashes = _merge_sides(merged)
    done = []
    if merged.nodes < trees.nodes:
        done.append(f"splits: {trees.nodes} -> {merged.nodes}, the others chose between equals")
    if len(merged.roots) < len(trees.roots):
        done.append(f"trees: {len(trees.roots)} -> {len(merged.roots)}, the others are constant, or equal to one")
    if done:
        return merged, node.inputs[0], "; ".join(done)
    split = merged.roots >= 0
    different = set(zip(hashes[split].tolist(), merged.output[split].tolist(), strict=True))
    counts = {"constant": int((~split).sum()), "repeated": int(split.sum()) - len(different)}
    staying = " and ".join(plural(count, f"{kind} tree") for kind, count in counts.items() if count)
    if staying:
        return f"{staying} left in place in the sum, whose rounding depends on the order"
    return None


# -- equal sides -----------------------------------------------------------------------------------------------------


def _merge_sides(trees: Trees) -> tuple[Trees, Hashes]:
    """The trees without splits between equals, and a hash of what each computes."""
    leaf = _hashed(_bits(trees.values))
    sets = _hashed(_bits(trees.categories))
    own = _hashed(
        np.stack(
            [
                trees.feature.astype(np.uint64),
                _bits(trees.threshold + 0.0)[:, 0] * trees.numeric,  # one zero: splits do not tell -0.0 from 0.0
                trees.flags.astype(np.uint64),
                np.where(trees.numeric, 0, sets[trees.category] if len(sets) else 0).astype(np.uint64),
            ],
            axis=1,
        )
    )
    found, target = np.zeros(trees.nodes, np.uint64), np.arange(trees.nodes)

    def hash_of(codes: Ints) -> Hashes:
        inner = codes >= 0
        hashes = np.zeros(len(codes), np.uint64)
        hashes[inner], hashes[~inner] = found[codes[inner]], leaf[~codes[~inner]]
        return hashes

    for level in reversed(trees.levels):
        left, right = hash_of(trees.left[level]), hash_of(trees.right[level])
        found[level] = _hashed(np.stack([own[level], left, right], axis=1))
        for node in level[left == right]:
            a, b = int(trees.left[node]), int(trees.right[node])
            if _same(trees, a, b, target):
                target[node] = target[a] if a >= 0 else a
                found[node] = hash_of(np.asarray([a]))[0]
    if np.array_equal(target, np.arange(trees.nodes)):
        return trees, hash_of(trees.roots)
    merged = trees.rebuilt(*(followed(codes, target) for codes in (trees.left, trees.right, trees.roots)))
    return merged, hash_of(trees.roots)


def _same(trees: Trees, a: int, b: int, target: Ints) -> bool:
    """Whether two subtrees are equal bit for bit; hashes only say that they may be. ``target``: what stands in place of each node."""
    pairs = [(a, b)]
    while pairs:
        a, b = (int(target[c]) if c >= 0 else c for c in pairs.pop())
        if (a < 0) != (b < 0):
            return False
        if a < 0:
            if trees.values[~a].tobytes() != trees.values[~b].tobytes():
                return False
            continue
        if trees.feature[a] != trees.feature[b] or trees.flags[a] != trees.flags[b]:
            return False
        if trees.numeric[a] != trees.numeric[b]:
            return False
        if trees.numeric[a]:
            if not np.array_equal(trees.threshold[a], trees.threshold[b], equal_nan=True):
                return False
        elif not np.array_equal(trees.categories[trees.category[a]], trees.categories[trees.category[b]]):
            return False
        pairs += [(int(trees.left[a]), int(trees.left[b])), (int(trees.right[a]), int(trees.right[b]))]
    return True


def _bits(array: Array) -> Hashes:
    """u64[rows, ...]: the bits of each element of a row."""
    flat = np.ascontiguousarray(array).reshape(len(array), int(np.prod(array.shape[1:])))
    return flat.view({4: np.uint32, 8: np.uint64}[flat.itemsize]).astype(np.uint64)


def _hashed(rows: Hashes) -> Hashes:
    """u64[rows]: a hash of each row, that depends on the order in it."""
    state = np.full(len(rows), 0x9E3779B97F4A7C15, np.uint64)
    for column in rows.T:
        state = (state ^ column) * np.uint64(0xBF58476D1CE4E5B9)
        state ^= state >> np.uint64(29)
        state *= np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(32)
    return state


# -- constant and equal trees ----------------------------------------------------------------------------------------


def sums_are_exact(trees: Trees) -> bool:
    """Whether no sum is ever rounded: all values are multiples of one power of two, and few enough for the digits of their type."""
    numbers = np.concatenate([trees.values.reshape(-1), trees.base]).astype(np.float64)
    if not np.isfinite(numbers).all():
        return False
    digits = np.finfo(trees.values.dtype).nmant + 1
    mantissa, exponent = np.frexp(numbers[numbers != 0])
    if not mantissa.size:
        return True
    whole = (mantissa * 2.0**53).astype(np.int64)
    lowest = exponent - 53 + np.log2((whole & -whole).astype(np.float64)).astype(np.int64)
    unit = float(lowest.min())
    most = np.abs(trees.base).max(initial=0.0) + len(trees.roots) * np.abs(trees.values).max(initial=0.0)
    return bool(np.log2(float(most)) <= unit + digits - 1)


def _fold_constant_trees(trees: Trees, exact: bool) -> tuple[Trees, Bools]:
    """Without the trees that are leaves, as far as base can take them in; and which of the trees stay."""
    base, started = trees.base.copy(), np.zeros(len(trees.base), bool)
    negative_zero = (base == 0) & np.signbit(base)
    kept = np.ones(len(trees.roots), bool)
    for i, (root, column) in enumerate(zip(trees.roots, trees.output, strict=True)):
        columns = slice(column, column + trees.values.shape[1])
        if root < 0:
            row = trees.values[~root]
            idle = (row == 0) & (np.signbit(row) | ~negative_zero[columns])  # x + 0.0 is x but for -0.0
            if exact or bool((idle | ~started[columns]).all()):
                base[columns] = np.where(idle, base[columns], base[columns] + row)
                kept[i] = False
                continue
        started[columns] = True
    if kept.all():
        return trees, kept
    shorter = replace(trees, base=base, output=trees.output[kept])
    return shorter.rebuilt(trees.left, trees.right, trees.roots[kept]), kept


def _merge_equal_trees(trees: Trees, hashes: Hashes) -> Trees:
    """Trees whose sums are exact, without those that are equal to an earlier one of the same output: that one counts for both."""
    first: dict[tuple[int, int], int] = {}
    count = np.ones(len(trees.roots))
    kept = np.ones(len(trees.roots), bool)
    itself = np.arange(trees.nodes)
    for i, (root, column) in enumerate(zip(trees.roots, trees.output, strict=True)):
        j = first.setdefault((int(hashes[i]), int(column)), i)
        if j != i and _same(trees, int(trees.roots[j]), int(root), itself):
            kept[i] = False
            count[j] += 1
    if kept.all():
        return trees
    tree = np.zeros(trees.nodes, np.int64)  # of each node
    tree[trees.roots[trees.roots >= 0]] = np.flatnonzero(trees.roots >= 0)
    factor = np.ones(len(trees.values))
    factor[~trees.roots[trees.roots < 0]] = count[trees.roots < 0]
    for level in trees.levels:
        for children in (trees.left[level], trees.right[level]):
            inner = children >= 0
            tree[children[inner]] = tree[level[inner]]
            factor[~children[~inner]] = count[tree[level[~inner]]]
    values = (trees.values * factor[:, None]).astype(trees.values.dtype)
    shorter = replace(trees, values=values, output=trees.output[kept])
    return shorter.rebuilt(trees.left, trees.right, trees.roots[kept])
