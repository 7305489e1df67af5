"""Matrix products and distances."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlec.ir.dim import Dim
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


NARROW = (DType.I8, DType.F16, DType.BF16)
"""What weights are stored as in fewer bits than the numbers that are computed with."""
PAIRED = DType.BF16
"""Narrow weights that are packed with those of two successive k beside each other: two bf16 become two f32 by a shift and a mask, and the
matrix units of processors take them so."""


def _narrow_type(x: TensorType, w: TensorType, k: Dim) -> None:
    require(x.rank >= 2, f"needs rows, got {x}", "E_SHAPE")
    require(x.dtype in (DType.F32, DType.F16, DType.BF16), f"needs f32, f16 or bf16 rows, got {x}", "E_DTYPE")
    require(w.dtype in NARROW, f"needs weights in {', '.join(map(str, NARROW))}, got {w}", "E_DTYPE")
    same_dim(x.shape[-1], k, "the shared axis")


def _matmul_narrow_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    x, w = types
    require(w.rank == 2, f"needs a matrix of weights, got {w}", "E_SHAPE")
    _narrow_type(x, w, w.shape[0])
    return TensorType((*x.shape[:-1], w.shape[1]), DType.F32)


def _matmul_narrow(x: Array, w: Array) -> Array:
    return np.asarray(np.matmul(x.astype(np.float32), w.astype(np.float32)))


def _narrow_operands(rng: np.random.Generator) -> tuple[Array, Array]:
    dtype = DType(str(rng.choice([str(d) for d in NARROW])))
    rows = DType.F32 if dtype is DType.I8 or rng.integers(2) else dtype
    shape = [(N, 5), (2, N, 5)][int(rng.integers(2))]
    return floats(rng, *shape).astype(rows.numpy), floats(rng, 5, 13, low=-99.0, high=99.0).astype(dtype.numpy)


register(
    OpDef(
        "matmul_narrow", operands("x w"), (), _matmul_narrow_type, _matmul_narrow,
        lambda rng: Case(_narrow_operands(rng), {}), _matmul_cost, Trait.CONTRACTION, 64.0,
        "x [.., m, k] times weights [k, n] of i8, f16 or bf16, which are widened as they are read; products and sums in f32",
    )
)  # fmt: skip


def pack_narrow(w: Array, block: int) -> Array:
    """As `pack_columns`; `PAIRED` weights to ``[ceil(n / block), ceil(k / 2), block, 2]``, a zero beside an odd last one."""
    packed = pack_columns(w, block)
    if DType.of(w.dtype) is not PAIRED:
        return packed
    blocks, k, _ = packed.shape
    even = np.concatenate([packed, np.zeros((blocks, k % 2, block), w.dtype)], axis=1)
    return np.ascontiguousarray(even.reshape(blocks, -(-k // 2), 2, block).transpose(0, 1, 3, 2))


def unpack_narrow(w: Array, k: int, n: int) -> Array:
    """The weights ``[k, n]`` that `pack_narrow` packed."""
    single = w if w.ndim == 3 else w.transpose(0, 1, 3, 2).reshape(w.shape[0], -1, w.shape[2])
    return np.ascontiguousarray(single[:, :k].transpose(1, 0, 2).reshape(k, -1)[:, :n])


def _narrow_packed_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    x, w = types
    n, k, paired = attrs["n"], x.shape[-1], w.dtype is PAIRED
    shape = "[blocks, ceil(k / 2), block, 2]" if paired else "[blocks, k, block]"
    require(w.rank == 3 + paired and w.shape[3:] == (2,) * paired, f"needs weights {shape}, got {w}", "E_SHAPE")
    require(isinstance(k, int), f"the shared axis must be known, got {x}", "E_SHAPE")
    blocks, steps, block = w.shape[:3]
    _narrow_type(x, w, k if paired and steps == (k + 1) // 2 else steps)
    fits = isinstance(blocks, int) and isinstance(block, int) and 0 <= blocks * block - n < max(block, 1)
    require(fits, f"{w} does not hold {n} columns", "E_SHAPE")
    return TensorType((*x.shape[:-1], n), DType.F32)


def _matmul_narrow_packed(x: Array, w: Array, n: int) -> Array:
    return _matmul_narrow(x, unpack_narrow(w, x.shape[-1], n))


def _narrow_packed_sample(rng: np.random.Generator) -> Case:
    x, w = _narrow_operands(rng)
    return Case((x, pack_narrow(w, 8)), {"n": 13})


register(
    OpDef(
        "matmul_narrow_packed", operands("x w"), (int_attr("n"),), _narrow_packed_type, _matmul_narrow_packed,
        _narrow_packed_sample, _matmul_cost, Trait.CONTRACTION, 64.0,
        "matmul_narrow with weights stored in column blocks [blocks, k, block], of bf16 in pairs [blocks, ceil(k / 2), block, 2]",
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
