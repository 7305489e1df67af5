"""What all frontends of tree ensembles share: trees as libraries store them become the operands of `tree_ensemble`.

```python
trees = Ensemble(n_features=4, n_outputs=1, threshold_dtype="f32", value_dtype="f64")
for t in forest:
    trees.add_tree(t.children_left, t.children_right, t.feature, round_threshold_down(t.threshold), t.value)
score = trees.emit(b, x, compare="le", base=[0.0])
```
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlec.errors import FrontendError
from mlec.ir import DType, GraphBuilder, Location, Value
from mlec.ops.tree import DEFAULT_LEFT, NAN_IS_ZERO, ZERO_IS_MISSING

__all__ = [
    "DEFAULT_LEFT", "NAN_IS_ZERO", "ZERO_IS_MISSING",
    "Ensemble", "category_words", "check_category_words", "round_threshold_down", "round_threshold_up",
]  # fmt: skip

Array = NDArray[Any]

MAX_CATEGORY_WORDS = 1 << 26
"""Bound on the size of the table of category sets, in 32-bit words (256 MiB)."""


def round_threshold_down(threshold: ArrayLike) -> Array:
    """float64 thresholds as float32, rounded towards minus infinity.

    ``x <= threshold`` then keeps its truth for every float32 x.
    """
    exact = np.asarray(threshold, np.float64)
    with np.errstate(over="ignore"):
        rounded = exact.astype(np.float32)
    return np.where(rounded > exact, np.nextafter(rounded, np.float32(-np.inf)), rounded)


def round_threshold_up(threshold: ArrayLike) -> Array:
    """float64 thresholds as float32, rounded towards plus infinity.

    ``x < threshold`` then keeps its truth for every float32 x.
    """
    return -round_threshold_down(-np.asarray(threshold, np.float64))


def category_words(codes: ArrayLike) -> Array:
    """A set of category codes as 32-bit words: bit ``c & 31`` of word ``c >> 5`` for each code c.

    Raises:
        FrontendError: a code is negative, or too large for a table.
    """
    members = np.asarray(codes, np.int64).reshape(-1)
    _require(members.min(initial=0) >= 0, f"a set of categories holds the code {members.min(initial=0)}")
    count = int(members.max(initial=-1)) // 32 + 1
    check_category_words(1, count)
    words = np.zeros(count, np.uint32)
    np.bitwise_or.at(words, members >> 5, np.uint32(1) << (members & 31).astype(np.uint32))
    return words


def check_category_words(sets: int, words: int) -> None:
    """Refuses more sets of categories than a table holds, before there is memory for them: a short file can name many, and large codes.

    Raises:
        FrontendError: so many sets of so many words are beyond `MAX_CATEGORY_WORDS`.
    """
    _require(
        sets * words <= MAX_CATEGORY_WORDS,
        f"the model's category sets, with codes up to {32 * words}, are too large for a table",
    )


class Ensemble:
    """Collects trees and emits them as one `tree_ensemble` node.

    Args:
        n_features: columns of x; every split is checked against it.
        n_outputs: columns of the result.
        threshold_dtype: dtype of the thresholds, and so of x.
        value_dtype: dtype of the leaf values, in which they are summed.
    """

    def __init__(
        self, n_features: int, n_outputs: int, *, threshold_dtype: DType | str, value_dtype: DType | str
    ) -> None:
        self.n_features = n_features
        self.n_outputs = n_outputs
        self.threshold_dtype = DType.of(threshold_dtype)
        self.value_dtype = DType.of(value_dtype)
        self._columns: dict[str, list[Array]] = {
            name: [] for name in ("feature", "threshold", "left", "right", "flags", "category")
        }
        self._values: list[Array] = []
        self._roots: list[int] = []
        self._outputs: list[int] = []
        self._sets: list[Array] = []
        self._words = 0
        self._n_nodes = 0
        self._n_leaves = 0
        self._width: int | None = None

    @property
    def n_trees(self) -> int:
        return len(self._roots)

    def add_tree(
        self,
        left: ArrayLike,
        right: ArrayLike,
        feature: ArrayLike,
        threshold: ArrayLike,
        values: ArrayLike,
        *,
        flags: ArrayLike = 0,
        categories: Mapping[int, ArrayLike] | None = None,
        output: int = 0,
    ) -> None:
        """Adds a tree given by one entry for each of its nodes; node 0 is the root.

        Args:
            left, right: (nodes,) child ids; a negative left child marks a leaf.
            feature: (nodes,) column of x that is tested; ignored at leaves.
            threshold: (nodes,) in the precision in which it is compared; ignored at leaves and categorical splits.
            values: (nodes,) or (nodes, width); the rows at the leaves are used. All trees have the same width.
            flags: (nodes,) or one for all: DEFAULT_LEFT, NAN_IS_ZERO, ZERO_IS_MISSING.
            categories: for each categorical split the set of codes that go left, as `category_words` gives it.
            output: the column of the result that the (first) value is added to.

        Raises:
            FrontendError: when the arrays do not describe one tree: a child or feature out of range, a node with two
                parents or a cycle; or when the category sets are too large. Nodes that the root does not reach (pruned
                ones) are dropped.
        """
        left_ids, right_ids = np.asarray(left, np.int64), np.asarray(right, np.int64)
        count = len(left_ids)
        leaf_values = np.asarray(values)
        leaf_values = leaf_values.reshape(len(leaf_values), -1) if leaf_values.ndim > 1 else leaf_values[:, None]
        columns = {
            "feature": np.asarray(feature, np.int64),
            "threshold": np.asarray(threshold),
            "flags": np.full(count, flags, np.uint8) if np.ndim(flags) == 0 else np.asarray(flags, np.uint8),
        }
        where = f"tree {self.n_trees}"
        _require(count > 0, f"{where} has no nodes")
        for name, column in (("right", right_ids), *columns.items(), ("values", leaf_values)):
            _require(len(column) == count, f"{where} has {count} left children but {len(column)} entries in {name}")
        width = leaf_values.shape[1]
        _require(
            self._width in (None, width), f"{where} has {width} values at a leaf, the trees before it {self._width}"
        )
        _require(
            0 <= output <= self.n_outputs - width,
            f"{where} adds to output {output}, but there are {self.n_outputs} outputs",
        )

        reached = _reached(left_ids, right_ids, where)
        is_leaf = left_ids < 0
        (inner,), (leaves,) = (~is_leaf & reached).nonzero(), (is_leaf & reached).nonzero()
        tested = columns["feature"][inner]
        least, most = (tested.min(), tested.max()) if len(tested) else (0, -1)
        if least < 0 or most >= self.n_features:
            raise _not_a_tree(
                f"{where} tests a feature out of range: the model has {self.n_features} features, the tree uses {least} .. {most}"
            )
        new_ids = np.empty(count, np.int64)
        new_ids[inner] = self._n_nodes + np.arange(len(inner))
        new_ids[leaves] = ~(self._n_leaves + np.arange(len(leaves)))
        category = np.full(count, -1, np.int64)
        for node, words in (categories or {}).items():
            _require(0 <= node < count, f"{where} has a category set for node {node} of {count}")
            category[node] = len(self._sets)
            self._sets.append(_without_zeros_at_end(words))
            self._words = max(self._words, len(self._sets[-1]))
            check_category_words(len(self._sets), self._words)
        for name, column in (columns | {"category": category}).items():
            self._columns[name].append(column[inner])
        self._columns["left"].append(new_ids[left_ids[inner]])
        self._columns["right"].append(new_ids[right_ids[inner]])
        self._values.append(leaf_values[leaves].astype(self.value_dtype.numpy))
        self._roots.append(int(new_ids[0]))
        self._outputs.append(output)
        self._width = width
        self._n_nodes += len(inner)
        self._n_leaves += len(leaves)
        _require(max(self._n_nodes, self._n_leaves) < 2**31, "the ensemble has more nodes than a 32-bit index can name")

    def operands(self) -> dict[str, Array]:
        """The arrays that `tree_ensemble` takes between x and base, by operand name."""

        def joined(parts: list[Array], dtype: Any, empty: tuple[int, ...] = (0,)) -> Array:
            return np.concatenate(parts).astype(dtype) if parts else np.zeros(empty, dtype)

        columns = self._columns
        categories = np.zeros((len(self._sets), self._words), np.uint32)
        for row, bits in zip(categories, self._sets, strict=True):
            row[: len(bits)] = bits
        return {
            "feature": joined(columns["feature"], np.int32),
            "threshold": joined(columns["threshold"], self.threshold_dtype.numpy),
            "left": joined(columns["left"], np.int32),
            "right": joined(columns["right"], np.int32),
            "flags": joined(columns["flags"], np.uint8),
            "category": joined(columns["category"] if self._sets else [], np.int32),
            "categories": categories.view(np.int32),
            "roots": np.asarray(self._roots, np.int32),
            "output": np.asarray(self._outputs, np.int32),
            "values": joined(self._values, self.value_dtype.numpy, (0, self._width or 1)),
        }

    def emit(
        self,
        b: GraphBuilder,
        x: Value,
        *,
        compare: str,
        base: ArrayLike,
        location: Location | None = None,
        hint: str = "score",
    ) -> Value:
        """Adds the ensemble as a node.

        Args:
            x: (n, n_features) of dtype ``threshold_dtype``.
            compare: ``"lt"`` or ``"le"``: what sends a row to the left.
            base: (n_outputs,) what the sums start from, in ``value_dtype``.
            location: of the nodes; the builder's current one when omitted.

        Returns:
            (n, n_outputs) of dtype ``value_dtype``.
        """
        with b.at(location) if location else nullcontext():
            start = np.broadcast_to(np.asarray(base, self.value_dtype.numpy), self.n_outputs).copy()
            operands = self.operands() | {"base": start}
            constants = [b.constant(array, f"tree_{name}") for name, array in operands.items()]
            return b("tree_ensemble", x, *constants, compare=compare, hint=hint)


def _not_a_tree(message: str) -> FrontendError:
    return FrontendError(message, code="E_TREE", hint="the model is damaged; save it again from the source library")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise _not_a_tree(message)


def _reached(left: Array, right: Array, where: str) -> Array:
    """Which nodes the root reaches, after checking that every node has one parent at most."""
    count = len(left)
    (inner,) = (left >= 0).nonzero()
    children = np.concatenate([left[inner], right[inner]])
    if len(children) == 0:
        return np.asarray(np.arange(count) == 0)
    for child in (children.min(), children.max()):
        _require(1 <= child < count, f"{where} has {count} nodes but a child {child}")
    _require(int(np.bincount(children).max()) == 1, f"{where} is not a tree: a node is the child of two nodes")
    # One parent each and none for the root: all that the root reaches is a tree. Doubled steps find it in log(depth).
    ancestor: Array = np.arange(count)
    ancestor[children] = np.concatenate([inner, inner])
    for _ in range(count.bit_length()):
        ancestor = ancestor[ancestor]
    return np.asarray(ancestor == 0)


def _without_zeros_at_end(words: ArrayLike) -> Array:
    words = np.asarray(words, np.uint32).reshape(-1)
    (used,) = words.nonzero()
    return words[: used[-1] + 1 if len(used) else 0]
