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
    q, k, v, *masks = types
    dtype = same_dtype((q, k, v))
    require(dtype.is_float and min(q.rank, k.rank, v.rank) >= 2, f"needs float matrices, got {q}, {k}, {v}", "E_SHAPE")
    same_dim(q.shape[-1], k.shape[-1], "depth of q and k")
    same_dim(k.shape[-2], v.shape[-2], "length of k and v")
    batch = broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    scores = (*batch, q.shape[-2], k.shape[-2])
    require(attrs["cap"] > 0, f"cap must be above 0, got {attrs['cap']}", "E_ATTR")
    for m in masks:
        require(m.dtype.is_bool or m.dtype is dtype, f"the mask must be bool or {dtype}, got {m}", "E_DTYPE")
        require(
            broadcast_shapes(m.shape, scores) == scores,
            f"the mask {m} does not broadcast to the scores {list(scores)}",
            "E_SHAPE",
        )
    return TensorType((*batch, q.shape[-2], v.shape[-1]), dtype)


def _attention(
    q: Array, k: Array, v: Array, *masks: Array, scale: float, causal: bool, fill: float, cap: float
) -> Array:
    scores = np.matmul(wide_float(q) * scale, np.swapaxes(wide_float(k), -1, -2))
    if np.isfinite(cap):
        scores = np.tanh(scores / np.asarray(cap, scores.dtype)) * np.asarray(cap, scores.dtype)
    for mask in masks:
        scores = np.where(mask, scores, np.asarray(fill, scores.dtype)) if mask.dtype == bool else scores + mask
    if causal:
        scores = np.where(np.tri(*scores.shape[-2:]) > 0, scores, -np.inf)
    return np.asarray(np.matmul(softmax(scores, -1), wide_float(v)), q.dtype)


def _attention_sample(rng: np.random.Generator) -> Case:
    q, k, v = floats(rng, N, 2, 5, 4), floats(rng, N, 2, 6, 4), floats(rng, N, 2, 6, 3)
    kind = int(rng.integers(4))
    cap = {"cap": 2.0} if rng.random() < 0.3 else {}
    if kind == 0:
        return Case((q, k, v), {"scale": 0.5, "causal": bool(rng.integers(2)), **cap})
    keep = np.asarray(rng.random((5, 6)) < 0.7)
    keep[:, 0] = True
    added = np.where(keep, 0, -2).astype(np.float32)
    masks = {1: (keep,), 2: (added,), 3: (keep, added[::-1].copy())}[kind]
    return Case((q, k, v, *masks), {"scale": 0.5, **cap})


_ATTRS = (
    float_attr("scale"),
    bool_attr("causal"),
    float_attr("fill", default=-math.inf),
    float_attr("cap", default=math.inf),
)
register(
    OpDef(
        "attention", operands("q k v masks*"), _ATTRS, _attention_type, _attention, _attention_sample,
        lambda i, r, a: Cost(r[0].size * i[1].shape[-2] * 4, moved_bytes(i, r)), Trait.CONTRACTION, 256.0,
        "softmax(cap * tanh(q k^T * scale / cap) + masks in turn) v; where a bool mask is false, scores are `fill`; causal: later ones too",
    )
)  # fmt: skip
