"""Matrix products and distances."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlec.ir.dtype import DType
from mlec.ir.op import Array, Attrs, Case, Cost, OpDef, Trait, moved_bytes, register
from mlec.ir.types import TensorType
from mlec.ops.common import (
    N,
    broadcast_shapes,
    choice_attr,
    float_attr,
    float_dtype,
    floats,
    int_attr,
    operands,
    pick_dtype,
    require,
    same_dim,
    same_dtype,
)


def _matmul_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    a, b = types
    dtype = same_dtype(types)
    require(not dtype.is_bool, "needs numbers", "E_DTYPE")
    require(a.rank >= 2 and b.rank >= 2, f"needs ranks of at least 2, got {a} and {b}", "E_SHAPE")
    same_dim(a.shape[-1], b.shape[-2], "the shared axis")
    return TensorType((*broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]), dtype)


def _matmul_cost(inputs: Sequence[TensorType], results: Sequence[TensorType], attrs: Attrs) -> Cost:
    return Cost(results[0].size * inputs[0].shape[-1] * 2, moved_bytes(inputs, results))


def _matmul(a: Array, b: Array) -> Array:
    if a.dtype.itemsize == 2 and a.dtype.kind != "i":
        return np.asarray(np.matmul(a.astype(np.float32), b.astype(np.float32)), a.dtype)
    return np.asarray(np.matmul(a, b))


def _matmul_sample(rng: np.random.Generator) -> Case:
    dtype = pick_dtype(rng)
    left, right = [((N, 5), (5, 4)), ((2, N, 5), (2, 5, 4)), ((N, 3, 5), (5, 4)), ((1, N, 5), (2, 5, 4))][
        int(rng.integers(4))
    ]
    return Case((floats(rng, *left, dtype=dtype), floats(rng, *right, dtype=dtype)), {})


register(
    OpDef(
        "matmul", operands("a b"), (), _matmul_type, _matmul, _matmul_sample, _matmul_cost, Trait.CONTRACTION, 64.0,
        "matrix product of the last two axes; leading axes broadcast",
    )
)  # fmt: skip


def _packed_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    x, w = types
    n = attrs["n"]
    require(x.rank >= 2 and w.rank == 3, f"needs x [.., k] and packed [blocks, k, block], got {x} and {w}", "E_SHAPE")
    blocks, k, block = w.shape
    same_dim(x.shape[-1], k, "the shared axis")
    require(
        isinstance(blocks, int) and isinstance(block, int) and 0 <= blocks * block - n < max(block, 1),
        f"{w} does not hold {n} columns",
        "E_SHAPE",
    )
    return TensorType((*x.shape[:-1], n), same_dtype(types))


def pack_columns(w: Array, block: int) -> Array:
    """``[k, n]`` to ``[ceil(n / block), k, block]``, zeros in the columns that are not there."""
    k, n = w.shape
    blocks = -(-n // block)
    padded = np.zeros((k, blocks * block), w.dtype)
    padded[:, :n] = w
    return np.ascontiguousarray(padded.reshape(k, blocks, block).transpose(1, 0, 2))


def _matmul_packed(x: Array, w: Array, n: int) -> Array:
    flat = w.transpose(1, 0, 2).reshape(w.shape[1], -1)[:, :n]
    return _matmul(x, np.ascontiguousarray(flat))


def _packed_sample(rng: np.random.Generator) -> Case:
    dtype = pick_dtype(rng)
    return Case((floats(rng, N, 5, dtype=dtype), pack_columns(floats(rng, 5, 13, dtype=dtype), 8)), {"n": 13})


register(
    OpDef(
        "matmul_packed", operands("x w"), (int_attr("n"),), _packed_type, _matmul_packed, _packed_sample, _matmul_cost,
        Trait.CONTRACTION, 64.0, "x [.., k] times weights stored in column blocks [blocks, k, block], of which n columns are real",
    )
)  # fmt: skip


METRICS = ("sqeuclidean", "euclidean", "manhattan", "chebyshev", "minkowski")


def _distance_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    x, y = types
    require(x.rank == 2 and y.rank == 2, f"needs two matrices, got {x} and {y}", "E_SHAPE")
    float_dtype(x)
    same_dim(x.shape[1], y.shape[1], "the number of features")
    return TensorType((x.shape[0], y.shape[0]), same_dtype(types))


def _distance(x: Array, y: Array, metric: str, p: float) -> Array:
    rows = [_row_distance(row, y, metric, p) for row in x]
    return np.stack(rows).astype(x.dtype) if rows else np.zeros((0, len(y)), x.dtype)


def _row_distance(row: Array, y: Array, metric: str, p: float) -> Array:
    difference = np.abs(y - row)
    if metric in ("sqeuclidean", "euclidean"):
        squared = np.sum(difference * difference, axis=1)
        return np.sqrt(squared) if metric == "euclidean" else np.asarray(squared)
    if metric == "manhattan":
        return np.asarray(difference.sum(axis=1))
    if metric == "chebyshev":
        return np.asarray(difference.max(axis=1, initial=0))
    return np.asarray(np.power(np.power(difference, p).sum(axis=1), 1 / p))


def _distance_sample(rng: np.random.Generator) -> Case:
    dtype = pick_dtype(rng)
    metric = str(rng.choice(METRICS))
    return Case((floats(rng, N, 5, dtype=dtype), floats(rng, 6, 5, dtype=dtype)), {"metric": metric, "p": 3.0})


register(
    OpDef(
        "pairwise_distance", operands("x y"),
        (choice_attr("metric", *METRICS), float_attr("p", default=2.0)),
        _distance_type, _distance, _distance_sample,
        lambda i, r, a: Cost(r[0].size * i[0].shape[1] * 3, moved_bytes(i, r)), tolerance=64.0,
        doc="distance of each row of x [n, d] to each row of y [m, d], from the differences themselves",
    )
)  # fmt: skip


def _nearest_type(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, TensorType]:
    distances, k, points = _distance_type(types, attrs), attrs["k"], types[1].shape[0]
    require(k >= 1, f"k must be positive, got {k}", "E_SHAPE")
    require(not isinstance(points, int) or k <= points, f"k = {k} of {points} points", "E_SHAPE")
    shape = (distances.shape[0], k)
    return TensorType(shape, distances.dtype), TensorType(shape, DType.I64)


def _nearest(x: Array, y: Array, metric: str, p: float, k: int) -> tuple[Array, Array]:
    distances = _distance(x, y, metric, p)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, 1), order.astype(np.int64)


def _nearest_sample(rng: np.random.Generator) -> Case:
    sample = _distance_sample(rng)
    return Case(sample.operands, {**sample.attrs, "k": 3})


register(
    OpDef(
        "nearest", operands("x y"),
        (choice_attr("metric", *METRICS), float_attr("p", default=2.0), int_attr("k")),
        _nearest_type, _nearest, _nearest_sample,
        lambda i, r, a: Cost(i[0].shape[0] * i[1].size * 3, moved_bytes(i, r)), tolerance=64.0,
        doc="distances of each row of x [n, d] to the k nearest rows of y [m, d] in order, and which these are; the first of equals first",
    )
)  # fmt: skip
