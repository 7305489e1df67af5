"""Scaled dot-product attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mlec.ir.op import Array, Attrs, Case, Cost, OpDef, Trait, moved_bytes, register
from mlec.ir.types import TensorType
from mlec.ops.common import (
    N,
    bool_attr,
    broadcast_shapes,
    float_attr,
    floats,
    operands,
    require,
    same_dim,
    same_dtype,
    wide_float,
)
from mlec.ops.norm import softmax


def _attention_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    q, k, v, *mask = types
    dtype = same_dtype((q, k, v))
    require(dtype.is_float and min(q.rank, k.rank, v.rank) >= 2, f"needs float matrices, got {q}, {k}, {v}", "E_SHAPE")
    same_dim(q.shape[-1], k.shape[-1], "depth of q and k")
    same_dim(k.shape[-2], v.shape[-2], "length of k and v")
    batch = broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    scores = (*batch, q.shape[-2], k.shape[-2])
    for m in mask:
        require(m.dtype.is_bool or m.dtype is dtype, f"the mask must be bool or {dtype}, got {m}", "E_DTYPE")
        require(
            broadcast_shapes(m.shape, scores) == scores,
            f"the mask {m} does not broadcast to the scores {list(scores)}",
            "E_SHAPE",
        )
    return TensorType((*batch, q.shape[-2], v.shape[-1]), dtype)


def _attention(
    q: Array, k: Array, v: Array, mask: Array | None = None, *, scale: float, causal: bool, fill: float
) -> Array:
    scores = np.matmul(wide_float(q) * scale, np.swapaxes(wide_float(k), -1, -2))
    if mask is not None:
        scores = np.where(mask, scores, np.asarray(fill, scores.dtype)) if mask.dtype == bool else scores + mask
    if causal:
        scores = np.where(np.tri(*scores.shape[-2:]) > 0, scores, -np.inf)
    return np.asarray(np.matmul(softmax(scores, -1), wide_float(v)), q.dtype)


def _attention_sample(rng: np.random.Generator) -> Case:
    q, k, v = floats(rng, N, 2, 5, 4), floats(rng, N, 2, 6, 4), floats(rng, N, 2, 6, 3)
    kind = int(rng.integers(3))
    if kind == 0:
        return Case((q, k, v), {"scale": 0.5, "causal": bool(rng.integers(2))})
    keep = np.asarray(rng.random((5, 6)) < 0.7)
    keep[:, 0] = True
    return Case((q, k, v, keep if kind == 1 else np.where(keep, 0, -2).astype(np.float32)), {"scale": 0.5})


_ATTRS = (float_attr("scale"), bool_attr("causal"), float_attr("fill", default=-math.inf))
register(
    OpDef(
        "attention", operands("q k v mask?"), _ATTRS, _attention_type, _attention, _attention_sample,
        lambda i, r, a: Cost(r[0].size * i[1].shape[-2] * 4, moved_bytes(i, r)), Trait.CONTRACTION, 256.0,
        "softmax(q k^T * scale + mask) v; a bool mask keeps where true, what it hides is `fill`; causal hides later positions",
    )
)  # fmt: skip
