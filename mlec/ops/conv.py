"""Convolutions: of channels in front of space (``[n, c, *space]``), and of images in channel blocks (``[n, c/b, h, w, b]``)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlec.ir.dim import Dim, static, static_dims
from mlec.ir.dtype import DType
from mlec.ir.op import Array, Attrs, Case, Cost, OpDef, Trait, moved_bytes, register
from mlec.ir.types import TensorType
from mlec.ops.common import N, floats, int_attr, ints_attr, operands, require, same_dim, same_dtype
from mlec.ops.windows import Geometry, from_blocked, patches, per_axis, to_blocked


def _conv_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    x, w = types
    require(
        x.rank == w.rank and x.rank >= 3, f"x and w must have equal ranks of at least 3, got {x} and {w}", "E_SHAPE"
    )
    rank, groups = x.rank - 2, attrs["groups"]
    require(groups >= 1, f"groups must be at least 1, got {groups}", "E_ATTR")
    same_dim(x.shape[1], w.shape[1] * groups, "channels of x and of w times groups")
    outputs = w.shape[0]
    require(
        isinstance(outputs, int) and outputs % groups == 0, f"{outputs} output channels in {groups} groups", "E_SHAPE"
    )
    space = Geometry.of(attrs, rank).positions(x.shape[2:], static_dims(w.shape[2:]))
    return TensorType((x.shape[0], outputs, *space), same_dtype(types))


def _conv_cost(inputs: Sequence[TensorType], results: Sequence[TensorType], attrs: Attrs) -> Cost:
    taps: Dim = 2
    for dim in inputs[1].shape[1:]:
        taps = taps * dim
    return Cost(results[0].size * taps, moved_bytes(inputs, results))


def is_pointwise(window: Sequence[int], geometry: Geometry) -> bool:
    """Whether each output position takes one input position, the same one: how they lie in space does not matter."""
    return {*window, *geometry.strides, *geometry.input_dilations} == {1} and not any(geometry.pads)


def conv(
    x: Array, w: Array, strides: tuple[int, ...], pads: tuple[int, ...], dilations: tuple[int, ...], groups: int
) -> Array:
    """Cross-correlation, accumulated in at least float32."""
    rank = x.ndim - 2
    geometry, kernel = Geometry.of({"strides": strides, "pads": pads, "dilations": dilations}, rank), w.shape[2:]
    out = static_dims(geometry.positions(x.shape[2:], kernel))
    accumulate = np.promote_types(x.dtype, np.float32)
    padded = np.pad(x.astype(accumulate), [(0, 0), (0, 0), *zip(geometry.before, geometry.after, strict=True)])
    n, per_group = x.shape[0], w.shape[0] // groups
    results = []
    for g in range(groups):
        channels = padded[:, g * w.shape[1] : (g + 1) * w.shape[1]]
        columns = np.moveaxis(patches(channels, kernel, geometry, out), 1, 1 + rank).reshape(
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
    space = Geometry.of(attrs, 2).positions(x.shape[2:4], static_dims((w.shape[2], w.shape[4])))
    return TensorType((x.shape[0], w.shape[0], *space, w.shape[5]), same_dtype(types))


def _blocked_cost(inputs: Sequence[TensorType], results: Sequence[TensorType], attrs: Attrs) -> Cost:
    _, cb, r, b, s, _ = inputs[1].shape
    return Cost(results[0].size * cb * r * s * b * 2, moved_bytes(inputs, results))


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


NARROW_COLUMNS = 16
"""Output channels of a block of weights of bf16: those of a tile of the matrix units of x86."""


def _narrow_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    x, w = types
    groups, outputs, block = attrs["groups"], attrs["outputs"], attrs["block"]
    require(x.dtype is DType.BF16 and w.dtype is DType.BF16, f"needs bf16, got {x} and {w}", "E_DTYPE")
    require(
        x.rank == 5 and w.rank == 7 and w.shape[5:] == (NARROW_COLUMNS, 2),
        f"needs x [n, c/b, h, w, b] and w [blocks, c/groups/b, r, s, ceil(b/2), 16, 2], got {x} and {w}",
        "E_SHAPE",
    )
    fits = groups >= 1 and block >= 1 and outputs >= 0 and outputs % (groups * block) == 0
    require(fits, f"{outputs} output channels in {groups} groups and blocks of {block}", "E_ATTR")
    same_dim(w.shape[0], groups * -(-outputs // groups // NARROW_COLUMNS), "blocks of output channels")
    same_dim(x.shape[1], w.shape[1] * groups, "channel blocks")
    same_dim((static(x.shape[4]) + 1) // 2, w.shape[4], "pairs of channels")
    space = Geometry.of(attrs, 2).positions(x.shape[2:4], static_dims(w.shape[2:4]))
    return TensorType((x.shape[0], outputs // block, *space, block), DType.F32)


def paired_weights(w: Array, block: int, groups: int) -> Array:
    """``[k, c / groups, r, s]`` to ``[k/16, c/groups/b, r, s, ceil(b/2), 16, 2]``: two successive channels of 16 outputs side by side.

    Zeros where a group has no 16 outputs more, and beside an odd last channel of a block.
    """
    k, c, r, s = w.shape
    columns, blocks, pairs = k // groups, -(-k // groups // NARROW_COLUMNS), -(-block // 2)
    wide = np.zeros((groups, blocks * NARROW_COLUMNS, c // block, pairs * 2, r, s), w.dtype)
    wide[:, :columns, :, :block] = w.reshape(groups, columns, c // block, block, r, s)
    split = wide.reshape(groups * blocks, NARROW_COLUMNS, c // block, pairs, 2, r, s)
    return np.ascontiguousarray(split.transpose(0, 2, 5, 6, 3, 1, 4))


def unpaired_weights(w: Array, block: int, outputs: int, groups: int) -> Array:
    """The weights ``[k, c / groups, r, s]`` that `paired_weights` packed."""
    blocks, cb, r, s, pairs, columns, two = w.shape
    wide = w.transpose(0, 5, 1, 4, 6, 2, 3).reshape(groups, blocks // groups * columns, cb, pairs * two, r, s)
    return np.ascontiguousarray(wide[:, : outputs // groups, :, :block]).reshape(outputs, cb * block, r, s)


def _conv_narrow(
    x: Array, w: Array, strides: tuple[int, ...], pads: tuple[int, ...], dilations: tuple[int, ...], groups: int,
    outputs: int, block: int,
) -> Array:  # fmt: skip
    plain = unpaired_weights(w, x.shape[4], outputs, groups).astype(np.float32)
    return to_blocked(conv(from_blocked(x.astype(np.float32)), plain, strides, pads, dilations, groups), block)


def _narrow_sample(rng: np.random.Generator) -> Case:
    groups, block, half = int(rng.choice([1, 1, 2])), int(rng.choice([3, 8])), DType.BF16.numpy
    x, w = floats(rng, N, 2 * block, 6, 5).astype(half), floats(rng, 40, 2 * block // groups, 3, 3).astype(half)
    attrs = {"pads": (1, 1, 1, 0), "strides": (int(rng.integers(1, 3)),) * 2, "groups": groups}
    return Case((to_blocked(x, block), paired_weights(w, block, groups)), {**attrs, "outputs": 40, "block": 4})


def _narrow_cost(inputs: Sequence[TensorType], results: Sequence[TensorType], attrs: Attrs) -> Cost:
    _, cb, r, s, *_ = inputs[1].shape
    return Cost(results[0].size * cb * r * s * inputs[0].shape[4] * 2, moved_bytes(inputs, results))


register(
    OpDef(
        "conv2d_narrow", operands("x w"), (*_CONV_ATTRS, int_attr("outputs"), int_attr("block")), _narrow_type, _conv_narrow,
        _narrow_sample, _narrow_cost, Trait.CONTRACTION, 128.0,
        "2-d convolution of bf16 with products and sums in f32: x [n, c/b, h, w, b], w [k/16, c/groups/b, r, s, ceil(b/2), 16, 2]",
    )
)  # fmt: skip


def _depthwise_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    x, w = types
    require(x.rank == 5 and w.rank == 4, f"needs x [n, c/b, h, w, b] and w [c/b, r, s, b], got {x} and {w}", "E_SHAPE")
    same_dim(x.shape[1], w.shape[0], "channel blocks")
    same_dim(x.shape[4], w.shape[3], "channel block")
    space = Geometry.of(attrs, 2).positions(x.shape[2:4], static_dims(w.shape[1:3]))
    widened = x.dtype is DType.BF16 and w.dtype is DType.F32
    return TensorType((*x.shape[:2], *space, x.shape[4]), DType.F32 if widened else same_dtype(types))


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
    return to_blocked(conv(from_blocked(x.astype(w.dtype)), plain, strides, pads, dilations, cb * b), b)


def _depthwise_sample(rng: np.random.Generator) -> Case:
    dtype = DType(str(rng.choice(["f32", "f32", "bf16"]))).numpy
    x, w = to_blocked(floats(rng, N, 8, 6, 5).astype(dtype), 4), blocked_depthwise_weights(floats(rng, 8, 1, 3, 2), 4)
    return Case((x, w), {"pads": (1, 1, 1, 0), "strides": (int(rng.integers(1, 3)), 1)})


register(
    OpDef(
        "depthwise2d_nchwc", operands("x w"), _CONV_ATTRS[:3], _depthwise_type, _depthwise_blocked,
        _depthwise_sample, _depthwise_cost, Trait.CONTRACTION, 128.0,
        "2-d convolution of each channel by itself: x [n, c/b, h, w, b], w [c/b, r, s, b]; x may be bf16 where w is f32",
    )
)  # fmt: skip


def _transposed_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    x, w = types
    require(
        x.rank == w.rank and x.rank >= 3, f"x and w must have equal ranks of at least 3, got {x} and {w}", "E_SHAPE"
    )
    rank, groups = x.rank - 2, attrs["groups"]
    geometry, extra = Geometry.of(attrs, rank), per_axis(attrs, "output_padding", rank, 0, least=0)
    require(groups >= 1, f"groups must be at least 1, got {groups}", "E_ATTR")
    same_dim(x.shape[1], w.shape[0], "channels of x and w")
    channels, kernel = static(w.shape[0]), static_dims(w.shape[2:])
    require(channels % groups == 0, f"{channels} channels in {groups} groups", "E_SHAPE")
    full = _spread_extents(x.shape[2:], kernel, geometry, extra)
    space = [f - b - a for f, b, a in zip(full, geometry.before, geometry.after, strict=True)]
    return TensorType((x.shape[0], w.shape[1] * groups, *space), same_dtype(types))


def _spread_extents(
    space: Sequence[Dim], kernel: Sequence[int], geometry: Geometry, extra: Sequence[int]
) -> tuple[Dim, ...]:
    """Extents of what a transposed convolution spreads the image to, before the padding is cut off."""
    axes = zip(space, kernel, geometry.strides, geometry.dilations, extra, strict=True)
    return tuple((size + -1) * s + (d * (k - 1) + e + 1) for size, k, s, d, e in axes)


def _conv_transpose(
    x: Array, w: Array, strides: tuple[int, ...], pads: tuple[int, ...], dilations: tuple[int, ...], groups: int,
    output_padding: tuple[int, ...],
) -> Array:  # fmt: skip
    rank = x.ndim - 2
    geometry = Geometry.of({"strides": strides, "pads": pads, "dilations": dilations}, rank)
    kernel, per_group = w.shape[2:], w.shape[1]
    accumulate = np.promote_types(x.dtype, np.float32)
    full = static_dims(_spread_extents(x.shape[2:], kernel, geometry, output_padding or (0,) * rank))
    out = np.zeros((x.shape[0], per_group * groups, *full), accumulate)
    step = x.shape[1] // groups
    for g in range(groups):
        channels = x[:, g * step : (g + 1) * step].astype(accumulate)
        for tap in itertools.product(*map(range, kernel)):
            taps: Any = (..., *tap)
            weights = w[g * step : (g + 1) * step][taps].astype(accumulate)
            where = tuple(
                slice(t * d, t * d + (x.shape[2 + i] - 1) * s + 1, s)
                for i, (t, d, s) in enumerate(zip(tap, geometry.dilations, geometry.strides, strict=True))
            )
            out[:, g * per_group : (g + 1) * per_group][(slice(None), slice(None), *where)] += np.einsum(
                "nc...,co->no...", channels, weights
            )
    crop = tuple(slice(b, f - a) for b, a, f in zip(geometry.before, geometry.after, full, strict=True))
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
