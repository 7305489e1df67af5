"""Ops of neural networks: convolution, pooling, normalisation, attention, recurrence, resizing. Layout is batch, channels, space."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlec.ir.dim import Dim
from mlec.ir.op import REQUIRED, Array, Attr, AttrKind, Attrs, Case, Cost, OpDef, Trait, moved_bytes, register
from mlec.ir.types import TensorType
from mlec.ops.common import (
    N,
    bool_attr,
    broadcast_shapes,
    choice_attr,
    float_attr,
    float_dtype,
    floats,
    int_attr,
    ints_attr,
    normal_axis,
    operands,
    require,
    same_dim,
    same_dtype,
)

# -- windows ---------------------------------------------------------------------------------------------------------


def window_extent(
    size: Dim, kernel: int, stride: int, before: int, after: int, dilation: int, ceil_mode: bool = False
) -> Dim:
    """Number of window positions along one axis; with ``ceil_mode`` a last window may hang over the end, but must start inside."""
    span = size + before + after - dilation * (kernel - 1) - 1
    require(
        not isinstance(span, int) or span >= 0,
        f"a window of {dilation * (kernel - 1) + 1} does not fit {size}",
        "E_SHAPE",
    )
    count = (span + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and isinstance(count, int) and isinstance(size, int) and (count - 1) * stride >= size + before:
        count -= 1
    return count


def _spatial(attrs: Attrs, key: str, rank: int, default: int) -> tuple[int, ...]:
    values = tuple(attrs[key]) or (default,) * rank
    require(len(values) == rank, f"{key} must have {rank} entries, got {list(values)}", "E_ATTR")
    return values


def _pads(attrs: Attrs, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    pads = tuple(attrs["pads"]) or (0,) * (2 * rank)
    require(
        len(pads) == 2 * rank and min(pads) >= 0,
        f"pads must be {2 * rank} non-negative ints, got {list(pads)}",
        "E_ATTR",
    )
    return pads[:rank], pads[rank:]


def _conv_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    x, w = types
    require(
        x.rank == w.rank and x.rank >= 3, f"x and w must have equal ranks of at least 3, got {x} and {w}", "E_SHAPE"
    )
    rank, groups = x.rank - 2, attrs["groups"]
    before, after = _pads(attrs, rank)
    strides, dilations = _spatial(attrs, "strides", rank, 1), _spatial(attrs, "dilations", rank, 1)
    same_dim(x.shape[1], w.shape[1] * groups, "channels of x and of w times groups")
    outputs = w.shape[0]
    require(
        isinstance(outputs, int) and outputs % groups == 0, f"{outputs} output channels in {groups} groups", "E_SHAPE"
    )
    space = [
        window_extent(x.shape[2 + i], _static(w.shape[2 + i]), strides[i], before[i], after[i], dilations[i])
        for i in range(rank)
    ]
    return TensorType((x.shape[0], outputs, *space), same_dtype(types))


def _static(dim: Dim) -> int:
    require(isinstance(dim, int), f"must be static, got {dim}", "E_SHAPE")
    return int(dim)  # type: ignore[arg-type]


def _conv_cost(inputs: Sequence[TensorType], results: Sequence[TensorType], attrs: Attrs) -> Cost:
    taps: Dim = 2
    for dim in inputs[1].shape[1:]:
        taps = taps * dim
    return Cost(results[0].size * taps, moved_bytes(inputs, results))


def _patches(
    x: Array, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], out: Sequence[int]
) -> Array:
    """All windows of a padded input: ``[n, c, *out, *kernel]``."""
    picked = [
        np.arange(o)[:, None] * s + np.arange(k)[None, :] * d
        for o, k, s, d in zip(out, kernel, strides, dilations, strict=True)
    ]
    result = x
    rank = len(kernel)
    for i, index in enumerate(picked):
        result = np.take(result, index, axis=2 + 2 * i)
    return result.transpose([0, 1, *(2 + 2 * i for i in range(rank)), *(3 + 2 * i for i in range(rank))])


def conv(
    x: Array, w: Array, strides: tuple[int, ...], pads: tuple[int, ...], dilations: tuple[int, ...], groups: int
) -> Array:
    """Cross-correlation, accumulated in at least float32."""
    rank = x.ndim - 2
    attrs = {"strides": strides, "pads": pads, "dilations": dilations}
    before, after = _pads(attrs, rank)
    strides, dilations = _spatial(attrs, "strides", rank, 1), _spatial(attrs, "dilations", rank, 1)
    kernel = w.shape[2:]
    out = [
        _static(window_extent(x.shape[2 + i], kernel[i], strides[i], before[i], after[i], dilations[i]))
        for i in range(rank)
    ]
    accumulate = np.promote_types(x.dtype, np.float32)
    padded = np.pad(x.astype(accumulate), [(0, 0), (0, 0), *zip(before, after, strict=True)])
    n, per_group = x.shape[0], w.shape[0] // groups
    results = []
    for g in range(groups):
        channels = padded[:, g * w.shape[1] : (g + 1) * w.shape[1]]
        columns = np.moveaxis(_patches(channels, kernel, strides, dilations, out), 1, 1 + rank).reshape(
            n, math.prod(out), math.prod(w.shape[1:])
        )
        weights = w[g * per_group : (g + 1) * per_group].reshape(per_group, -1).astype(accumulate)
        results.append((columns @ weights.T).transpose(0, 2, 1).reshape(n, per_group, *out))
    return np.concatenate(results, axis=1).astype(x.dtype)


_CONV_ATTRS = (
    ints_attr("strides", default=()), ints_attr("pads", default=()), ints_attr("dilations", default=()), int_attr("groups", default=1),
)  # fmt: skip


def _conv_sample(rng: np.random.Generator) -> Case:
    groups = int(rng.choice([1, 1, 2, 4]))
    if rng.random() < 0.25:
        return Case((floats(rng, N, 4, 9), floats(rng, 8, 4 // groups, 3)), {"pads": (1, 1), "groups": groups})
    attrs = {
        "strides": (int(rng.integers(1, 3)), 1),
        "pads": (1, 0, 1, 2),
        "dilations": (1, int(rng.integers(1, 3))),
        "groups": groups,
    }
    return Case((floats(rng, N, 4, 8, 9), floats(rng, 8, 4 // groups, 3, 2)), attrs)


register(
    OpDef(
        "conv", operands("x w"), _CONV_ATTRS, _conv_type, conv, _conv_sample, _conv_cost, Trait.CONTRACTION, 128.0,
        "convolution of x [n, c, *space] with w [out, c / groups, *kernel]; pads lists all befores, then all afters",
    )
)  # fmt: skip


def _blocked_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    x, w = types
    require(
        x.rank == 5 and w.rank == 6,
        f"needs x [n, c/b, h, w, b] and w [k/kb, c/b, r, b, s, kb], got {x} and {w}",
        "E_SHAPE",
    )
    same_dim(x.shape[1], w.shape[1], "channel blocks")
    same_dim(x.shape[4], w.shape[3], "channel block")
    before, after = _pads(attrs, 2)
    strides, dilations = _spatial(attrs, "strides", 2, 1), _spatial(attrs, "dilations", 2, 1)
    space = [
        window_extent(x.shape[2 + i], _static(w.shape[2 + 2 * i]), strides[i], before[i], after[i], dilations[i])
        for i in (0, 1)
    ]
    return TensorType((x.shape[0], w.shape[0], *space, w.shape[5]), same_dtype(types))


def _blocked_cost(inputs: Sequence[TensorType], results: Sequence[TensorType], attrs: Attrs) -> Cost:
    _, cb, r, b, s, _ = inputs[1].shape
    return Cost(results[0].size * cb * r * s * b * 2, moved_bytes(inputs, results))


def from_blocked(x: Array) -> Array:
    """``[n, c/b, *space, b]`` to ``[n, c, *space]``."""
    moved = np.moveaxis(x, -1, 2)
    return moved.reshape(moved.shape[0], moved.shape[1] * moved.shape[2], *moved.shape[3:])


def to_blocked(x: Array, block: int) -> Array:
    """``[n, c, *space]`` to ``[n, ceil(c/b), *space, b]``, zeros in the channels that are not there."""
    blocks = -(-x.shape[1] // block)
    padded = np.pad(x, [(0, 0), (0, blocks * block - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])
    return np.ascontiguousarray(np.moveaxis(padded.reshape(x.shape[0], blocks, block, *x.shape[2:]), 2, -1))


def blocked_weights(w: Array, in_block: int, out_block: int) -> Array:
    """``[k, c, r, s]`` to ``[k/kb, c/b, r, b, s, kb]``, zero-padded: the order in which a tile of outputs reads them."""
    k, c, r, s = w.shape
    kb, cb = -(-k // out_block), -(-c // in_block)
    padded = np.zeros((kb * out_block, cb * in_block, r, s), w.dtype)
    padded[:k, :c] = w
    return np.ascontiguousarray(padded.reshape(kb, out_block, cb, in_block, r, s).transpose(0, 2, 4, 3, 5, 1))


def _conv_blocked(
    x: Array, w: Array, strides: tuple[int, ...], pads: tuple[int, ...], dilations: tuple[int, ...]
) -> Array:
    kb, cb, r, b, s, k = w.shape
    plain = w.transpose(0, 5, 1, 3, 2, 4).reshape(kb * k, cb * b, r, s)
    return to_blocked(conv(from_blocked(x), plain, strides, pads, dilations, 1), k)


def _blocked_sample(rng: np.random.Generator) -> Case:
    x, w = floats(rng, N, 8, 6, 5), floats(rng, 16, 8, 3, 3)
    return Case(
        (to_blocked(x, 4), blocked_weights(w, 4, 8)), {"pads": (1, 1, 1, 1), "strides": (int(rng.integers(1, 3)),) * 2}
    )


register(
    OpDef(
        "conv2d_nchwc", operands("x w"), _CONV_ATTRS[:3], _blocked_type, _conv_blocked, _blocked_sample, _blocked_cost,
        Trait.CONTRACTION, 128.0, "2-d convolution on channel blocks: x [n, c/b, h, w, b], w [k/kb, c/b, r, b, s, kb]",
    )
)  # fmt: skip


def _depthwise_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    x, w = types
    require(x.rank == 5 and w.rank == 4, f"needs x [n, c/b, h, w, b] and w [c/b, r, s, b], got {x} and {w}", "E_SHAPE")
    same_dim(x.shape[1], w.shape[0], "channel blocks")
    same_dim(x.shape[4], w.shape[3], "channel block")
    before, after = _pads(attrs, 2)
    strides, dilations = _spatial(attrs, "strides", 2, 1), _spatial(attrs, "dilations", 2, 1)
    space = [
        window_extent(x.shape[2 + i], _static(w.shape[1 + i]), strides[i], before[i], after[i], dilations[i])
        for i in (0, 1)
    ]
    return TensorType((*x.shape[:2], *space, x.shape[4]), same_dtype(types))


def _depthwise_cost(inputs: Sequence[TensorType], results: Sequence[TensorType], attrs: Attrs) -> Cost:
    _, r, s, _ = inputs[1].shape
    return Cost(results[0].size * r * s * 2, moved_bytes(inputs, results))


def blocked_depthwise_weights(w: Array, block: int) -> Array:
    """``[c, 1, r, s]`` to ``[c/b, r, s, b]``; the channels divide into blocks."""
    c, _, r, s = w.shape
    return np.ascontiguousarray(w.reshape(c // block, block, r, s).transpose(0, 2, 3, 1))


def _depthwise_blocked(
    x: Array, w: Array, strides: tuple[int, ...], pads: tuple[int, ...], dilations: tuple[int, ...]
) -> Array:
    cb, r, s, b = w.shape
    plain = w.transpose(0, 3, 1, 2).reshape(cb * b, 1, r, s)
    return to_blocked(conv(from_blocked(x), plain, strides, pads, dilations, cb * b), b)


register(
    OpDef(
        "depthwise2d_nchwc", operands("x w"), _CONV_ATTRS[:3], _depthwise_type, _depthwise_blocked,
        lambda rng: Case(
            (to_blocked(floats(rng, N, 8, 6, 5), 4), blocked_depthwise_weights(floats(rng, 8, 1, 3, 2), 4)),
            {"pads": (1, 1, 1, 0), "strides": (int(rng.integers(1, 3)), 1)},
        ),
        _depthwise_cost, Trait.CONTRACTION, 128.0, "2-d convolution of each channel by itself: x [n, c/b, h, w, b], w [c/b, r, s, b]",
    )
)  # fmt: skip


def _transposed_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    x, w = types
    require(
        x.rank == w.rank and x.rank >= 3, f"x and w must have equal ranks of at least 3, got {x} and {w}", "E_SHAPE"
    )
    rank = x.rank - 2
    before, after = _pads(attrs, rank)
    strides, dilations = _spatial(attrs, "strides", rank, 1), _spatial(attrs, "dilations", rank, 1)
    extra = _spatial(attrs, "output_padding", rank, 0)
    same_dim(x.shape[1], w.shape[0], "channels of x and w")
    require(_static(w.shape[0]) % attrs["groups"] == 0, f"{w.shape[0]} channels in {attrs['groups']} groups", "E_SHAPE")
    space = [
        (x.shape[2 + i] + -1) * strides[i]
        + (dilations[i] * (_static(w.shape[2 + i]) - 1) + extra[i] + 1 - before[i] - after[i])
        for i in range(rank)
    ]
    return TensorType((x.shape[0], w.shape[1] * attrs["groups"], *space), same_dtype(types))


def _conv_transpose(
    x: Array, w: Array, strides: tuple[int, ...], pads: tuple[int, ...], dilations: tuple[int, ...], groups: int,
    output_padding: tuple[int, ...],
) -> Array:  # fmt: skip
    rank = x.ndim - 2
    attrs = {"strides": strides, "pads": pads, "dilations": dilations, "output_padding": output_padding}
    before, after = _pads(attrs, rank)
    strides, dilations = _spatial(attrs, "strides", rank, 1), _spatial(attrs, "dilations", rank, 1)
    extra = _spatial(attrs, "output_padding", rank, 0)
    kernel, per_group = w.shape[2:], w.shape[1]
    accumulate = np.promote_types(x.dtype, np.float32)
    full = [(x.shape[2 + i] - 1) * strides[i] + dilations[i] * (kernel[i] - 1) + 1 + extra[i] for i in range(rank)]
    out = np.zeros((x.shape[0], per_group * groups, *full), accumulate)
    step = x.shape[1] // groups
    for g in range(groups):
        channels = x[:, g * step : (g + 1) * step].astype(accumulate)
        for tap in itertools.product(*map(range, kernel)):
            taps: Any = (..., *tap)
            weights = w[g * step : (g + 1) * step][taps].astype(accumulate)
            where = tuple(
                slice(t * d, t * d + (x.shape[2 + i] - 1) * s + 1, s)
                for i, (t, d, s) in enumerate(zip(tap, dilations, strides, strict=True))
            )
            out[:, g * per_group : (g + 1) * per_group][(slice(None), slice(None), *where)] += np.einsum(
                "nc...,co->no...", channels, weights
            )
    crop = tuple(slice(b, f - a) for b, a, f in zip(before, after, full, strict=True))
    return out[(slice(None), slice(None), *crop)].astype(x.dtype)


register(
    OpDef(
        "conv_transpose", operands("x w"), (*_CONV_ATTRS, ints_attr("output_padding", default=())), _transposed_type, _conv_transpose,
        lambda rng: Case(
            (floats(rng, N, 4, 5, 4), floats(rng, 4, 3, 3, 2)),
            {"strides": (2, 1), "pads": (1, 0, 1, 0), "output_padding": (1, 0), "groups": int(rng.choice([1, 2]))},
        ),
        _conv_cost, Trait.CONTRACTION, 128.0, "transposed convolution with w [c, out / groups, *kernel]",
    )
)  # fmt: skip

# -- pooling ---------------------------------------------------------------------------------------------------------

_POOL_ATTRS = (
    ints_attr("kernel"), ints_attr("strides", default=()), ints_attr("pads", default=()), ints_attr("dilations", default=()),
    bool_attr("ceil_mode"),
)  # fmt: skip


def _pool_geometry(
    shape: Sequence[Dim], attrs: Attrs
) -> tuple[list[Dim], tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    kernel = attrs["kernel"]
    rank = len(kernel)
    require(
        len(shape) in (rank + 2, rank + 3),
        f"a window over {rank} axes needs rank {rank + 2} (or {rank + 3} for channel blocks)",
        "E_SHAPE",
    )
    before, after = _pads(attrs, rank)
    strides = tuple(attrs["strides"]) or tuple(kernel)
    dilations = _spatial(attrs, "dilations", rank, 1) if "dilations" in attrs else (1,) * rank
    space = [
        window_extent(shape[2 + i], kernel[i], strides[i], before[i], after[i], dilations[i], attrs["ceil_mode"])
        for i in range(rank)
    ]
    return space, strides, dilations, before, after


def _pool_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    (x,) = types
    float_dtype(x)
    space = _pool_geometry(x.shape, attrs)[0]
    return TensorType((*x.shape[:2], *space, *x.shape[2 + len(space) :]), x.dtype)


def _pool_cost(inputs: Sequence[TensorType], results: Sequence[TensorType], attrs: Attrs) -> Cost:
    return Cost(results[0].size * math.prod(attrs["kernel"]), moved_bytes(inputs, results))


def _windows(x: Array, fill: float, attrs: Attrs) -> tuple[Array, Array]:
    """All windows ``[n, c, *out, *kernel]`` and, for each of their elements, whether it is real, padding or beyond both (2, 1, 0)."""
    space, strides, dilations, before, after = _pool_geometry(x.shape, attrs)
    out = [int(e) for e in space]  # type: ignore[arg-type]
    kernel = attrs["kernel"]
    reach = [(o - 1) * s + d * (k - 1) + 1 for o, s, d, k in zip(out, strides, dilations, kernel, strict=True)]
    widths = [(b, max(0, r - b - size)) for b, r, size in zip(before, reach, x.shape[2:], strict=True)]
    padded = np.pad(x, [(0, 0), (0, 0), *widths], constant_values=fill)
    real = np.pad(
        np.full((1, 1, *x.shape[2:]), 2), [(0, 0), (0, 0), *zip(before, after, strict=True)], constant_values=1
    )
    beyond = [(0, max(0, w[0] + w[1] - b - a)) for w, b, a in zip(widths, before, after, strict=True)]
    real = np.pad(real, [(0, 0), (0, 0), *beyond])
    return _patches(padded, kernel, strides, dilations, out), _patches(real, kernel, strides, dilations, out)


def _unblocked(function: Callable[..., Array]) -> Callable[..., Array]:
    """Pools channel blocks by treating the block axis as more channels."""

    def reference(x: Array, **attrs: Any) -> Array:
        if x.ndim == len(attrs["kernel"]) + 2:
            return function(x, attrs)
        return to_blocked(function(from_blocked(x), attrs), x.shape[-1])

    return reference


@_unblocked
def _max_pool(x: Array, attrs: Attrs) -> Array:
    windows, _ = _windows(x, -np.inf, attrs)
    return np.asarray(windows.max(axis=tuple(range(-len(attrs["kernel"]), 0))))


@_unblocked
def _avg_pool(x: Array, attrs: Attrs) -> Array:
    axes = tuple(range(-len(attrs["kernel"]), 0))
    windows, real = _windows(x, 0.0, attrs)
    counted = (real >= (1 if attrs["count_include_pad"] else 2)).sum(axis=axes)
    return np.asarray(windows.sum(axis=axes, dtype=np.promote_types(x.dtype, np.float32)) / counted).astype(x.dtype)


def _pool_sample(rng: np.random.Generator, **attrs: bool) -> Case:
    window = {"kernel": (3, 2), "strides": (2, 1), "pads": (1, 0, 1, 1), "ceil_mode": bool(rng.integers(2))}
    return Case((floats(rng, N, 4, 8, 5),), window | attrs)


register(
    OpDef(
        "max_pool", operands("x"), _POOL_ATTRS, _pool_type, _max_pool, _pool_sample, _pool_cost, Trait.REDUCTION,
        doc="largest element of each window; NaN wins",
    )
)  # fmt: skip
register(
    OpDef(
        "avg_pool", operands("x"), (*_POOL_ATTRS[:3], _POOL_ATTRS[4], bool_attr("count_include_pad", True)), _pool_type, _avg_pool,
        lambda rng: _pool_sample(rng, count_include_pad=bool(rng.integers(2))), _pool_cost,
        Trait.REDUCTION, 64.0, "mean of each window, with or without counting the padding",
    )
)  # fmt: skip

# -- normalisation ---------------------------------------------------------------------------------------------------


def _axis_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    float_dtype(types[0])
    normal_axis(attrs["axis"], types[0].rank)
    return types[0]


def _wide(x: Array) -> Array:
    return x.astype(np.promote_types(x.dtype, np.float32)) if x.dtype.name != "bfloat16" else x.astype(np.float32)


def softmax(x: Array, axis: int) -> Array:
    wide = _wide(x)
    e = np.exp(wide - wide.max(axis=axis, keepdims=True, initial=-np.inf))
    return np.asarray(e / e.sum(axis=axis, keepdims=True)).astype(x.dtype)


def _log_softmax(x: Array, axis: int) -> Array:
    wide = _wide(x)
    shifted = wide - wide.max(axis=axis, keepdims=True, initial=-np.inf)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))).astype(x.dtype)


def _several(per_element: int) -> Callable[..., Cost]:
    return lambda i, r, a: Cost(r[0].size * per_element, moved_bytes(i, r))


for _name, _function in (("softmax", softmax), ("log_softmax", _log_softmax)):
    register(
        OpDef(
            _name, operands("x"), (int_attr("axis", default=-1),), _axis_type, _function,
            lambda rng: Case((floats(rng, N, 5, 6),), {"axis": int(rng.choice([-1, 1]))}), _several(12), Trait.NORMALISATION, 64.0,
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
    wide = _wide(x)
    axes = tuple(range(axis % x.ndim, x.ndim))
    centred = wide - wide.mean(axis=axes, keepdims=True)
    variance = (centred * centred).mean(axis=axes, keepdims=True)
    return np.asarray(centred / np.sqrt(variance + eps) * scale + bias).astype(x.dtype)


def _rms_norm(x: Array, scale: Array, axis: int, eps: float) -> Array:
    wide = _wide(x)
    axes = tuple(range(axis % x.ndim, x.ndim))
    return np.asarray(wide / np.sqrt((wide * wide).mean(axis=axes, keepdims=True) + eps) * scale).astype(x.dtype)


_NORM_ATTRS = (int_attr("axis", default=-1), float_attr("eps", default=1e-5))
register(
    OpDef(
        "layer_norm", operands("x scale bias"), _NORM_ATTRS, _layer_norm_type, _layer_norm,
        lambda rng: Case((floats(rng, N, 5, 6), floats(rng, 6), floats(rng, 6)), {}), _several(8), Trait.NORMALISATION, 128.0,
        "zero mean, unit variance over the axes from `axis` on, then scale and bias",
    )
)  # fmt: skip
register(
    OpDef(
        "rms_norm", operands("x scale"), _NORM_ATTRS, _layer_norm_type, _rms_norm,
        lambda rng: Case((floats(rng, N, 5, 6), floats(rng, 6)), {}), _several(6), Trait.NORMALISATION, 128.0,
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
        lambda rng: Case((floats(rng, N, 4, 5), *(floats(rng, 4) for _ in range(3)), floats(rng, 4, low=0.1)), {}), _several(2),
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
    grouped = _wide(x).reshape(x.shape[0], groups, math.prod(x.shape[1:]) // groups)
    centred = grouped - grouped.mean(axis=2, keepdims=True)
    normal = (centred / np.sqrt((centred * centred).mean(axis=2, keepdims=True) + eps)).reshape(x.shape)
    return np.asarray(normal * _on_channels(scale, x.ndim) + _on_channels(bias, x.ndim)).astype(x.dtype)


register(
    OpDef(
        "group_norm", operands("x scale bias"), (int_attr("groups"), float_attr("eps", default=1e-5)), _group_norm_type, _group_norm,
        lambda rng: Case((floats(rng, N, 4, 3, 3), floats(rng, 4), floats(rng, 4)), {"groups": 2}), _several(8), Trait.NORMALISATION, 128.0,
        "zero mean, unit variance over each group of channels, then scale and bias",
    )
)  # fmt: skip

# -- attention -------------------------------------------------------------------------------------------------------


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


def _attention(q: Array, k: Array, v: Array, mask: Array | None = None, *, scale: float, causal: bool) -> Array:
    scores = np.matmul(_wide(q) * scale, np.swapaxes(_wide(k), -1, -2))
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    if causal:
        scores = np.where(np.tri(*scores.shape[-2:]) > 0, scores, -np.inf)
    return np.asarray(np.matmul(softmax(scores, -1), _wide(v)), q.dtype)


def _attention_sample(rng: np.random.Generator) -> Case:
    q, k, v = floats(rng, N, 2, 5, 4), floats(rng, N, 2, 6, 4), floats(rng, N, 2, 6, 3)
    kind = int(rng.integers(3))
    if kind == 0:
        return Case((q, k, v), {"scale": 0.5, "causal": bool(rng.integers(2))})
    keep = np.asarray(rng.random((5, 6)) < 0.7)
    keep[:, 0] = True
    return Case((q, k, v, keep if kind == 1 else np.where(keep, 0, -2).astype(np.float32)), {"scale": 0.5})


register(
    OpDef(
        "attention", operands("q k v mask?"), (float_attr("scale"), bool_attr("causal")), _attention_type, _attention, _attention_sample,
        lambda i, r, a: Cost(r[0].size * i[1].shape[-2] * 4, moved_bytes(i, r)), Trait.CONTRACTION, 256.0,
        "softmax(q k^T * scale + mask) v; a bool mask keeps where true; causal hides later positions",
    )
)  # fmt: skip

# -- recurrence ------------------------------------------------------------------------------------------------------


def _recurrent_type(gates: int, states: int) -> Callable[[Sequence[TensorType], Attrs], Sequence[TensorType]]:
    def infer(types: Sequence[TensorType], attrs: Attrs) -> Sequence[TensorType]:
        x, h0 = types[0], types[1]
        same_dtype(types)
        require(x.rank == 3 and h0.rank == 2, f"needs x [n, t, i] and h0 [n, h], got {x} and {h0}", "E_SHAPE")
        hidden = h0.shape[1]
        w_ih, w_hh, *biases = types[1 + states :]
        for t in types[1 : 1 + states]:
            require(t.shape == (x.shape[0], hidden), f"states must be [{x.shape[0]}, {hidden}], got {t}", "E_SHAPE")
        require(
            w_ih.shape == (hidden * gates, x.shape[2]),
            f"w_ih must be [{hidden * gates}, {x.shape[2]}], got {w_ih}",
            "E_SHAPE",
        )
        require(
            w_hh.shape == (hidden * gates, hidden), f"w_hh must be [{hidden * gates}, {hidden}], got {w_hh}", "E_SHAPE"
        )
        for b in biases:
            require(b.shape == (hidden * gates,), f"biases must be [{hidden * gates}], got {b}", "E_SHAPE")
        return [TensorType((x.shape[0], x.shape[1], hidden), x.dtype), *types[1 : 1 + states]]

    return infer


def _recurrent_cost(inputs: Sequence[TensorType], results: Sequence[TensorType], attrs: Attrs) -> Cost:
    x, states = inputs[0], len(results) - 1
    w_ih, w_hh = inputs[1 + states : 3 + states]
    return Cost(x.shape[0] * x.shape[1] * (w_ih.size + w_hh.size) * 2, moved_bytes(inputs, results))


def _sigmoid(x: Array) -> Array:
    z = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1 / (1 + z), z / (1 + z)), x.dtype)


def _steps(x: Array, reverse: bool) -> range:
    return range(x.shape[1] - 1, -1, -1) if reverse else range(x.shape[1])


def _lstm(
    x: Array, h0: Array, c0: Array, w_ih: Array, w_hh: Array, b: Array, reverse: bool
) -> tuple[Array, Array, Array]:
    h, c, hidden = h0, c0, h0.shape[1]
    y = np.zeros((*x.shape[:2], hidden), x.dtype)
    for t in _steps(x, reverse):
        gates = x[:, t] @ w_ih.T + h @ w_hh.T + b
        i, f, g, o = (gates[:, k * hidden : (k + 1) * hidden] for k in range(4))
        c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
        h = _sigmoid(o) * np.tanh(c)
        y[:, t] = h
    return y, h, c


def _gru(x: Array, h0: Array, w_ih: Array, w_hh: Array, b_ih: Array, b_hh: Array, reverse: bool) -> tuple[Array, Array]:
    h, hidden = h0, h0.shape[1]
    y = np.zeros((*x.shape[:2], hidden), x.dtype)
    for t in _steps(x, reverse):
        xi, hi = x[:, t] @ w_ih.T + b_ih, h @ w_hh.T + b_hh
        r = _sigmoid(xi[:, :hidden] + hi[:, :hidden])
        z = _sigmoid(xi[:, hidden : 2 * hidden] + hi[:, hidden : 2 * hidden])
        candidate = np.tanh(xi[:, 2 * hidden :] + r * hi[:, 2 * hidden :])
        h = (1 - z) * candidate + z * h
        y[:, t] = h
    return y, h


def _rnn(
    x: Array, h0: Array, w_ih: Array, w_hh: Array, b: Array, activation: str, reverse: bool
) -> tuple[Array, Array]:
    h = h0
    y = np.zeros((*x.shape[:2], h0.shape[1]), x.dtype)
    for t in _steps(x, reverse):
        total = x[:, t] @ w_ih.T + h @ w_hh.T + b
        h = np.tanh(total) if activation == "tanh" else np.maximum(total, 0)
        y[:, t] = h
    return y, h


def _recurrent_sample(
    gates: int, states: int, biases: int, activations: Sequence[str] = ()
) -> Callable[[np.random.Generator], Case]:
    def sample(rng: np.random.Generator) -> Case:
        h, i = 4, 3
        weights = (floats(rng, gates * h, i, low=-1, high=1), floats(rng, gates * h, h, low=-1, high=1))
        state = tuple(floats(rng, N, h) for _ in range(states))
        bias = tuple(floats(rng, gates * h) for _ in range(biases))
        attrs = {"activation": str(rng.choice(activations))} if activations else {}
        return Case((floats(rng, N, 5, i), *state, *weights, *bias), {"reverse": bool(rng.integers(2)), **attrs})

    return sample


_REVERSE = bool_attr("reverse")
register(
    OpDef(
        "lstm", operands("x h0 c0 w_ih w_hh b"), (_REVERSE,), _recurrent_type(4, 2), _lstm, _recurrent_sample(4, 2, 1), _recurrent_cost,
        Trait.CONTRACTION, 512.0, "long short-term memory over axis 1; gates in the order i f g o; gives all h, last h, last c",
    )
)  # fmt: skip
register(
    OpDef(
        "gru", operands("x h0 w_ih w_hh b_ih b_hh"), (_REVERSE,), _recurrent_type(3, 1), _gru, _recurrent_sample(3, 1, 2), _recurrent_cost,
        Trait.CONTRACTION, 512.0, "gated recurrent unit over axis 1; gates in the order r z n; gives all h, last h",
    )
)  # fmt: skip
register(
    OpDef(
        "rnn", operands("x h0 w_ih w_hh b"), (choice_attr("activation", "tanh", "relu"), _REVERSE), _recurrent_type(1, 1), _rnn,
        _recurrent_sample(1, 1, 1, ("tanh", "relu")), _recurrent_cost,
        Trait.CONTRACTION, 512.0, "plain recurrence over axis 1; gives all h, last h",
    )
)  # fmt: skip

# -- resizing --------------------------------------------------------------------------------------------------------


def _resize_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    (x,) = types
    float_dtype(x)
    require(
        x.rank == len(attrs["size"]) + 2, f"size must have {x.rank - 2} entries, got {len(attrs['size'])}", "E_SHAPE"
    )
    return TensorType((*x.shape[:2], *attrs["size"]), x.dtype)


def source_positions(size: int, source: int, align_corners: bool) -> Array:
    """For each output position, the (fractional) position in the source that it samples."""
    at = np.arange(size, dtype=np.float64)
    if align_corners:
        return at * ((source - 1) / (size - 1)) if size > 1 else at * 0
    return np.maximum((at + 0.5) * (source / size) - 0.5, 0)


def _resize(x: Array, size: tuple[int, ...], mode: str, align_corners: bool) -> Array:
    result = _wide(x)
    for axis, extent in enumerate(size, start=2):
        source = x.shape[axis]
        if mode == "nearest":
            index = np.minimum(np.floor(np.arange(extent) * (source / extent)), source - 1).astype(np.int64)
            result = np.take(result, index, axis)
            continue
        position = source_positions(extent, source, align_corners)
        low = np.minimum(np.floor(position), source - 1).astype(np.int64)
        high = np.minimum(low + 1, source - 1)
        weight = (position - low).astype(result.dtype).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
        result = np.take(result, low, axis) * (1 - weight) + np.take(result, high, axis) * weight
    return result.astype(x.dtype)


def _resize_sample(rng: np.random.Generator) -> Case:
    mode = str(rng.choice(["nearest", "linear"]))
    return Case((floats(rng, N, 2, 4, 5),), {"size": (8, 7), "mode": mode, "align_corners": bool(rng.integers(2))})


register(
    OpDef(
        "resize",
        operands("x"),
        (Attr("size", AttrKind.DIMS, REQUIRED), choice_attr("mode", "nearest", "linear"), bool_attr("align_corners")),
        _resize_type,
        _resize,
        _resize_sample,
        _several(8),
        tolerance=64.0,
        doc="other spatial extents, nearest or linear between neighbours",
    )
)
