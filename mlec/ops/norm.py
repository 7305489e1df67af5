"""Normalisations: a reduction and its use on each element. Channels are axis 1."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mlec.ir.op import Array, Attrs, Case, OpDef, Trait, register
from mlec.ir.types import TensorType
from mlec.ops.common import (
    N,
    float_attr,
    float_dtype,
    floats,
    int_attr,
    normal_axis,
    operands,
    per_element,
    require,
    wide_float,
)


def _axis_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    float_dtype(types[0])
    normal_axis(attrs["axis"], types[0].rank)
    return types[0]


def softmax(x: Array, axis: int) -> Array:
    wide = wide_float(x)
    e = np.exp(wide - wide.max(axis=axis, keepdims=True, initial=-np.inf))
    return np.asarray(e / e.sum(axis=axis, keepdims=True)).astype(x.dtype)


def _log_softmax(x: Array, axis: int) -> Array:
    wide = wide_float(x)
    shifted = wide - wide.max(axis=axis, keepdims=True, initial=-np.inf)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))).astype(x.dtype)


for _name, _function in (("softmax", softmax), ("log_softmax", _log_softmax)):
    register(
        OpDef(
            _name, operands("x"), (int_attr("axis", default=-1),), _axis_type, _function,
            lambda rng: Case((floats(rng, N, 5, 6),), {"axis": int(rng.choice([-1, 1]))}), per_element(12), Trait.NORMALISATION, 64.0,
            f"{_name.replace('_', ' ')} along an axis, without overflow",
        )
    )  # fmt: skip


def _layer_norm_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    x = types[0]
    float_dtype(x)
    axis = normal_axis(attrs["axis"], x.rank)
    for t in types[1:]:
        require(
            t.shape == x.shape[axis:] and t.dtype is x.dtype,
            f"scale and bias must be {TensorType(x.shape[axis:], x.dtype)}, got {t}",
            "E_SHAPE",
        )
    return x


def _layer_norm(x: Array, scale: Array, bias: Array, axis: int, eps: float) -> Array:
    wide = wide_float(x)
    axes = tuple(range(axis % x.ndim, x.ndim))
    centred = wide - wide.mean(axis=axes, keepdims=True)
    variance = (centred * centred).mean(axis=axes, keepdims=True)
    return np.asarray(centred / np.sqrt(variance + eps) * scale + bias).astype(x.dtype)


def _rms_norm(x: Array, scale: Array, axis: int, eps: float) -> Array:
    wide = wide_float(x)
    axes = tuple(range(axis % x.ndim, x.ndim))
    return np.asarray(wide / np.sqrt((wide * wide).mean(axis=axes, keepdims=True) + eps) * scale).astype(x.dtype)


_NORM_ATTRS = (int_attr("axis", default=-1), float_attr("eps", default=1e-5))
register(
    OpDef(
        "layer_norm", operands("x scale bias"), _NORM_ATTRS, _layer_norm_type, _layer_norm,
        lambda rng: Case((floats(rng, N, 5, 6), floats(rng, 6), floats(rng, 6)), {}), per_element(8), Trait.NORMALISATION, 128.0,
        "zero mean, unit variance over the axes from `axis` on, then scale and bias",
    )
)  # fmt: skip
register(
    OpDef(
        "rms_norm", operands("x scale"), _NORM_ATTRS, _layer_norm_type, _rms_norm,
        lambda rng: Case((floats(rng, N, 5, 6), floats(rng, 6)), {}), per_element(6), Trait.NORMALISATION, 128.0,
        "divided by the root mean square over the axes from `axis` on, then scaled",
    )
)  # fmt: skip


def _channel_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    x = types[0]
    float_dtype(x)
    require(x.rank >= 2, f"needs [n, c, ...], got {x}", "E_SHAPE")
    for t in types[1:]:
        require(
            t.shape == (x.shape[1],) and t.dtype is x.dtype,
            f"statistics must be {TensorType((x.shape[1],), x.dtype)}, got {t}",
            "E_SHAPE",
        )
    return x


def _on_channels(v: Array, rank: int) -> Array:
    return v.reshape(1, -1, *[1] * (rank - 2))


def _batch_norm(x: Array, scale: Array, bias: Array, mean: Array, var: Array, eps: float) -> Array:
    factor = scale / np.sqrt(var + np.asarray(eps, var.dtype))
    return np.asarray(
        (x - _on_channels(mean, x.ndim)) * _on_channels(factor, x.ndim) + _on_channels(bias, x.ndim)
    ).astype(x.dtype)


register(
    OpDef(
        "batch_norm", operands("x scale bias mean var"), (float_attr("eps", default=1e-5),), _channel_type, _batch_norm,
        lambda rng: Case((floats(rng, N, 4, 5), *(floats(rng, 4) for _ in range(3)), floats(rng, 4, low=0.1)), {}), per_element(2),
        tolerance=64.0, doc="(x - mean) / sqrt(var + eps) * scale + bias, for each channel (axis 1)",
    )
)  # fmt: skip


def _group_norm_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    x = _channel_type(types, attrs)
    channels, groups = x.shape[1], attrs["groups"]
    require(
        isinstance(channels, int) and groups > 0 and channels % groups == 0,
        f"{channels} channels in {groups} groups",
        "E_SHAPE",
    )
    return x


def _group_norm(x: Array, scale: Array, bias: Array, groups: int, eps: float) -> Array:
    grouped = wide_float(x).reshape(x.shape[0], groups, math.prod(x.shape[1:]) // groups)
    centred = grouped - grouped.mean(axis=2, keepdims=True)
    normal = (centred / np.sqrt((centred * centred).mean(axis=2, keepdims=True) + eps)).reshape(x.shape)
    return np.asarray(normal * _on_channels(scale, x.ndim) + _on_channels(bias, x.ndim)).astype(x.dtype)


register(
    OpDef(
        "group_norm", operands("x scale bias"), (int_attr("groups"), float_attr("eps", default=1e-5)), _group_norm_type, _group_norm,
        lambda rng: Case((floats(rng, N, 4, 3, 3), floats(rng, 4), floats(rng, 4)), {"groups": 2}), per_element(8),
        Trait.NORMALISATION, 128.0, "zero mean, unit variance over each group of channels, then scale and bias",
    )
)  # fmt: skip
