"""Tree ensembles as one op: structure, not arithmetic.

All trees' inner nodes lie in one array each (``feature``, ``threshold``, ``left``, ``right``, ``flags``). A child or root ``c >= 0`` is
a node; ``c < 0`` is leaf ``~c``, a row of ``values``. Positions are i32, or as narrow as they can be.
The routing of row ``x`` at a node:

* numeric: left iff ``x < threshold`` (``compare = "lt"``) or ``x <= threshold`` (``"le"``);
* a missing value (NaN) goes left iff flag `DEFAULT_LEFT` is set; with `NAN_IS_ZERO`, NaN counts as 0.0 and is not missing;
  with `ZERO_IS_MISSING`, values of magnitude up to 1e-35 are missing too;
* categorical (``category[node] >= 0``): NaN is missing; else ``c = trunc(x)`` goes left iff bit ``c & 31`` of word ``c >> 5`` of row
  ``category[node]`` of ``categories`` is set; a code outside the row goes right.

The result starts at ``base``; then, tree by tree in order, the leaf's row is added to columns ``output[t] ..`` of the result. The sum
is taken in the values' dtype, in tree order, so that it can equal the source library's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlec.ir.dtype import DType
from mlec.ir.op import Array, Attrs, Case, Cost, OpDef, Trait, moved_bytes, register
from mlec.ir.types import TensorType
from mlec.ops.common import N, choice_attr, float_dtype, operands, require, same_dim

DEFAULT_LEFT = 1
NAN_IS_ZERO = 2
ZERO_IS_MISSING = 4
ZERO_LIMIT = float(np.float32(1e-35))
"""LightGBM's bound, a float32 constant: 1.00000002e-35."""

OPERANDS = "x feature threshold left right flags category categories roots output values base"
POSITIONS = ("feature", "left", "right", "category", "roots", "output")
"""Operands that can also be of `NARROW` types."""
NARROW = (DType.U8, DType.I8, DType.I16)


def _type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    x, feature, threshold, left, right, flags, category, _, roots, output, values, base = types
    require(x.rank == 2, f"x must be [rows, features], got {x}", "E_SHAPE")
    require(
        threshold.dtype is float_dtype(x),
        f"thresholds must have the dtype of x ({x.dtype}), got {threshold.dtype}",
        "E_DTYPE",
    )
    for name, t in zip(OPERANDS.split()[1:10], types[1:10], strict=True):
        wanted = {"threshold": x.dtype, "flags": DType.U8}.get(name, DType.I32)
        narrower = name in POSITIONS and t.dtype in NARROW
        require(
            (t.dtype is wanted or narrower) and t.rank == (2 if name == "categories" else 1),
            f"{name} must be {wanted} of rank 1, got {t}",
            "E_DTYPE",
        )
    for name, t in (("threshold", threshold), ("left", left), ("right", right), ("flags", flags)):
        same_dim(feature.shape[0], t.shape[0], f"length of feature and {name}")
    if category.shape[0] != 0:
        same_dim(feature.shape[0], category.shape[0], "length of feature and category")
    same_dim(roots.shape[0], output.shape[0], "length of roots and output")
    require(
        values.rank == 2 and base.rank == 1,
        f"values must have rank 2 and base rank 1, got {values} and {base}",
        "E_SHAPE",
    )
    require(
        values.dtype is base.dtype and values.dtype.is_float,
        f"values and base must share a float dtype, got {values} and {base}",
        "E_DTYPE",
    )
    return TensorType((x.shape[0], base.shape[0]), values.dtype)


def _cost(inputs: Sequence[TensorType], results: Sequence[TensorType], attrs: Attrs) -> Cost:
    """A balanced tree's depth in comparisons, for each row and tree."""
    trees, nodes = inputs[8].shape[0], inputs[1].shape[0]
    depth = 1
    if isinstance(trees, int) and isinstance(nodes, int) and trees:
        depth = max(1, int(np.ceil(np.log2(nodes / trees + 1))))
    return Cost(inputs[0].shape[0] * trees * (2 * depth + 1), moved_bytes(inputs, results))


def goes_left(x: Array, threshold: Array, flags: Array, category: Array, categories: Array, compare: str) -> Array:
    """Routing decisions, element by element (all arguments broadcast; ``category`` -1 means a numeric split)."""
    nan_is_zero, zero_is_missing = (flags & NAN_IS_ZERO) != 0, (flags & ZERO_IS_MISSING) != 0
    numeric = category < 0
    x = np.where(np.isnan(x) & nan_is_zero & numeric, 0, x)
    missing = np.isnan(x) | (zero_is_missing & numeric & (np.abs(x) <= ZERO_LIMIT))
    decided = x < threshold if compare == "lt" else x <= threshold
    if categories.size:
        bits = 32 * categories.shape[1]
        known = np.isfinite(x) & (x > -1) & (x < bits)
        code = np.where(known, x, 0).astype(np.int64)
        word = categories.view(np.uint32)[np.maximum(category, 0), code >> 5]
        decided = np.where(numeric, decided, known & ((word >> (code & 31).astype(np.uint32)) & 1 == 1))
    return np.where(missing, (flags & DEFAULT_LEFT) != 0, decided)


def tree_ensemble(
    x: Array, feature: Array, threshold: Array, left: Array, right: Array, flags: Array, category: Array, categories: Array,
    roots: Array, output: Array, values: Array, base: Array, compare: str,
) -> Array:  # fmt: skip
    """The reference: all rows walk one tree at a time."""
    rows = np.arange(len(x))
    result = np.repeat(base[None, :], len(x), axis=0)
    width = values.shape[1]
    kinds = category if category.size else np.full(feature.shape, -1, np.int32)
    for root, column in zip(roots, output, strict=True):
        at = np.full(len(x), root, np.int64)
        while (active := at >= 0).any():
            node = np.where(active, at, 0)
            left_turn = goes_left(
                x[rows, feature[node]], threshold[node], flags[node], kinds[node], categories, compare
            )
            at = np.where(active, np.where(left_turn, left[node], right[node]), at)
        result[:, int(column) : int(column) + width] += values[~at]
    return result


def sample_ensemble(
    rng: np.random.Generator, dtype: str, *, trees: int = 5, features: int = 4, outputs: int = 1
) -> tuple[Array, ...]:
    """Random operands (without x), with categorical splits, every flag and single-leaf trees."""
    columns: dict[str, list[float]] = {
        name: [] for name in ("feature", "threshold", "left", "right", "flags", "category")
    }
    leaves = 0
    roots: list[int] = []

    def grow(depth: int) -> int:
        nonlocal leaves
        if depth == 0 or rng.random() < 0.2:
            leaves += 1
            return ~(leaves - 1)
        node = len(columns["feature"])
        for name in columns:
            columns[name].append(0)
        columns["feature"][node] = int(rng.integers(features))
        columns["threshold"][node] = float(np.round(rng.uniform(-2, 2), 1))
        columns["flags"][node] = int(rng.integers(8))
        columns["category"][node] = int(rng.integers(3)) if rng.random() < 0.2 else -1
        columns["left"][node], columns["right"][node] = grow(depth - 1), grow(depth - 1)
        return node

    roots = [grow(int(rng.integers(0, 5))) for _ in range(trees)]
    arrays = {name: np.asarray(column, np.int32) for name, column in columns.items()}
    arrays["threshold"] = np.asarray(columns["threshold"], dtype)
    arrays["flags"] = np.asarray(columns["flags"], np.uint8)
    categories = rng.integers(-(2**31), 2**31, (3, 2)).astype(np.int32)
    output = rng.integers(0, outputs, trees).astype(np.int32)
    values = rng.normal(size=(leaves, 1)).astype(dtype)
    base = rng.normal(size=outputs).astype(dtype)
    return (*arrays.values(), categories, np.asarray(roots, np.int32), output, values, base)


def _sample(rng: np.random.Generator) -> Case:
    dtype = str(rng.choice(["float32", "float64"]))
    x = np.round(rng.uniform(-2, 70, (N, 4)), 1).astype(dtype)
    x[rng.random(x.shape) < 0.5] *= 0.03
    x[rng.random(x.shape) < 0.15] = np.nan
    x.flat[:3] = [0.0, -0.0, np.inf]
    operand_arrays = sample_ensemble(rng, dtype, trees=6, outputs=int(rng.integers(1, 4)))
    if rng.random() < 0.5:
        names = zip(OPERANDS.split()[1:], operand_arrays, strict=True)
        operand_arrays = tuple(a.astype(np.int8) if name in POSITIONS else a for name, a in names)
    return Case((x, *operand_arrays), {"compare": str(rng.choice(["lt", "le"]))})


register(
    OpDef(
        "tree_ensemble", operands(OPERANDS), (choice_attr("compare", "le", "lt"),), _type, tree_ensemble, _sample, _cost,
        Trait.NONE, 4.0, "sum over decision trees, with missing values, category sets and vector leaves",
    )
)  # fmt: skip
