"""The arrays of a `tree_ensemble` node, as passes change them (see `mlec.ops.tree` for their meaning)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mlec.ir import Graph, GraphBuilder, Location, Node, Value
from mlec.ir.op import Array
from mlec.ops.tree import OPERANDS, POSITIONS
from mlec.pipeline import PassResult, Remark

_OF_NUMBERS = [OPERANDS.split().index(name) for name in ("threshold", "values")]

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Trees:
    """An ensemble of N inner nodes, L leaves and T trees.

    Attributes:
        feature: i64[N]; threshold: [N], the dtype of the rows; flags: u8[N].
        left, right: i64[N]; a child ``c >= 0`` is a node, ``c < 0`` the leaf ``~c``.
        category: i64[N], row of ``categories`` or -1; categories: i32[C, W].
        roots, output: i64[T].
        values: [L, V]; base: [K], the same dtype.
        compare: ``"lt"`` or ``"le"``.
        levels: the nodes of each level, roots first; every node is in one of them, once.
    """

    feature: Ints
    threshold: Array
    left: Ints
    right: Ints
    flags: Array
    category: Ints
    categories: Array
    roots: Ints
    output: Ints
    values: Array
    base: Array
    compare: str
    levels: tuple[Ints, ...]

    @property
    def nodes(self) -> int:
        return len(self.feature)

    @property
    def numeric(self) -> Bools:
        """bool[N]: the node compares a number with its threshold."""
        return np.asarray(self.category < 0)

    @staticmethod
    def of(node: Node, graph: Graph) -> Trees | None:
        """None where the operands are not constant, or do not describe trees: backends refuse those by name. Numbers of 16 bits, which
        no source compares, are left as they are too.
        """
        if any(node.inputs[0].type.dtype.bits < 32 or node.inputs[at].type.dtype.bits < 32 for at in _OF_NUMBERS):
            return None
        arrays = {}
        for name, value in zip(OPERANDS.split()[1:], node.inputs[1:], strict=True):
            array = graph.constant_value(value)
            if array is None:
                return None
            arrays[name] = array.astype(np.int64) if name in POSITIONS else array
        count, leaves, features = len(arrays["feature"]), len(arrays["values"]), node.inputs[0].type.shape[1]
        if not arrays["category"].size:
            arrays["category"] = np.full(count, -1, np.int64)
        children = [arrays[name] for name in ("left", "right", "roots")]
        bounds = [
            *((a, -leaves, count) for a in children), (arrays["feature"], 0, features),
            (arrays["category"], -1, len(arrays["categories"])),
            (arrays["output"], 0, len(arrays["base"]) - arrays["values"].shape[1] + 1),
        ]  # fmt: skip
        if not all(isinstance(stop, int) and _within(a, low, stop) for a, low, stop in bounds):
            return None
        levels = _levels(*children)
        if levels is None or sum(map(len, levels)) != count:
            return None
        return Trees(**arrays, compare=node.attrs["compare"], levels=levels)

    def rebuilt(self, left: Ints, right: Ints, roots: Ints) -> Trees:
        """The trees with other children and roots, without the nodes, leaves and sets that no root reaches any more."""
        levels = _levels(left, right, roots)
        assert levels is not None, "a node has two parents"
        kept = np.sort(np.concatenate([*levels, np.zeros(0, np.int64)]))
        at = np.full(self.nodes, -1, np.int64)
        at[kept] = np.arange(len(kept))
        codes = np.concatenate([left[kept], right[kept], roots])
        used, leaf = np.unique(~codes[codes < 0], return_inverse=True)
        renamed = np.empty_like(codes)
        renamed[codes >= 0] = at[codes[codes >= 0]]
        renamed[codes < 0] = ~leaf
        sets, category = np.unique(self.category[kept], return_inverse=True)
        known = sets[sets >= 0]
        split = len(kept)
        return replace(
            self, feature=self.feature[kept], threshold=self.threshold[kept], flags=self.flags[kept],
            category=category.astype(np.int64) - int(len(sets) > len(known)), categories=self.categories[known],
            left=renamed[:split], right=renamed[split : 2 * split], roots=renamed[2 * split :], values=self.values[used],
            levels=tuple(at[level] for level in levels),
        )  # fmt: skip

    def emit(self, b: GraphBuilder, graph: Graph, node: Node, x: Value) -> Value:
        """The op on these arrays and the rows ``x``, in place of ``node``; of the arrays that are as they were, the same constants."""
        constants = []
        for name, old in zip(OPERANDS.split()[1:], node.inputs[1:], strict=True):
            array = getattr(self, name)
            if name == "category" and not len(self.categories):
                array = array[:0]
            array = np.ascontiguousarray(array, np.int32 if array.dtype == np.int64 else None)
            before = graph.constant_value(old)
            same = before is not None and (array.dtype, array.shape) == (before.dtype, before.shape)
            same = same and array.tobytes() == np.asarray(before).tobytes()
            constants.append(old if same else b.constant(array, old.hint))
        return b("tree_ensemble", x, *constants, hint=node.output.hint, compare=self.compare)


def followed(codes: Ints, target: Ints) -> Ints:
    """Children or roots with ``target`` (i64[N], a child each) in place of the nodes among them."""
    ends = codes.copy()
    ends[codes >= 0] = target[codes[codes >= 0]]
    return ends


def _within(array: Array, low: int, stop: int) -> bool:
    return not array.size or bool(array.min() >= low and array.max() < stop)


def _levels(left: Ints, right: Ints, roots: Ints) -> tuple[Ints, ...] | None:
    """The nodes that the roots reach, level by level; None where one of them has two parents or is its own ancestor."""
    levels, seen = [], np.zeros(len(left), bool)
    level = roots[roots >= 0]
    while level.size:
        if seen[level].any() or len(np.unique(level)) < len(level):
            return None
        seen[level] = True
        levels.append(level)
        children = np.stack([left[level], right[level]], axis=1).reshape(-1)
        level = children[children >= 0]
    return tuple(levels)


Change = tuple[Trees, Value, str]
"""New arrays, the rows that they are applied to, and what was done."""


def change_ensembles(
    graph: Graph, rule: str, change: Callable[[GraphBuilder, Node, Trees], Change | str | None]
) -> PassResult:
    """Replaces the ensembles of a graph.

    Args:
        rule: name for the new nodes and the remarks.
        change: what becomes of an ensemble; a text says why nothing does, for a missed remark, None that there is nothing to do.
    """
    b = GraphBuilder(graph.name)
    b.adopt_interface(graph)
    remarks: list[Remark] = []
    for node in graph.nodes:
        trees = Trees.of(node, graph) if node.name == "tree_ensemble" else None
        with b.at(Location.merged([node.loc], rule)):
            done = None if trees is None else change(b, node, trees)
            if isinstance(done, tuple):
                b.replace(node.output, done[0].emit(b, graph, node, done[1]))
                remarks.append(Remark("applied", done[2], node.loc, rule))
                continue
        if isinstance(done, str):
            remarks.append(Remark("missed", done, node.loc, rule))
        b.keep(node)
    if not any(remark.kind == "applied" for remark in remarks):
        return PassResult(graph, tuple(remarks))
    return PassResult(b.finish(graph.outputs, signature=graph.given_signature), tuple(remarks))
