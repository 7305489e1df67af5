"""Numbers in 8 bits: between them and floats, and the products, convolutions and pools that work on them.

A tensor of 8 bits stands for ``(q - zero_point) * scale``. Activations are u8 with one scale and zero point for each tensor, weights are
i8 with one scale for each output channel and no zero point. Products accumulate in i32, exactly; what their sums stand for (the scales),
biases and the way back to 8 bits are plain elementwise ops behind them. Images have their channels last: ``[n, h, w, c]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mlec.ir.dim import static_dims
from mlec.ir.dtype import DType
from mlec.ir.op import Array, Attr, AttrKind, Attrs, Case, Cost, OpDef, Trait, moved_bytes, register
from mlec.ir.types import TensorType
from mlec.ops.common import (
    N,
    bool_attr,
    float_attr,
    floats,
    int_attr,
    ints_attr,
    operands,
    per_element,
    require,
    same_dim,
)
from mlec.ops.windows import Geometry, patches

LIMITS = {DType.U8: (0, 255), DType.I8: (-128, 127)}
"""Smallest and largest number of each quantised element type."""

MAX_TERMS = (2**31 - 1) // (255 * 128)
"""Products of two numbers of 8 bits whose sum always fits an i32."""


# -- between floats and 8 bits -------------------------------------------------------------------------------------------


def _check_scale(attrs: Attrs, dtype: DType) -> None:
    """Refuses a scale that float32 cannot divide by, and a zero point that the element type cannot hold."""
    require(dtype in LIMITS, f"quantised numbers are {' or '.join(map(str, LIMITS))}, got {dtype}", "E_DTYPE")
    scale, (low, high) = attrs["scale"], LIMITS[dtype]
    require(2.0**-120 <= scale <= 2.0**120, f"scale must be between 2**-120 and 2**120, got {scale}", "E_ATTR")
    _check_zero_point(attrs, low, high)


def _check_zero_point(attrs: Attrs, low: int = 0, high: int = 255) -> None:
    zero_point = attrs["zero_point"]
    require(low <= zero_point <= high, f"zero_point must be between {low} and {high}, got {zero_point}", "E_ATTR")


def _quantize_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    (x,) = types
    require(x.dtype is DType.F32, f"needs f32, got {x}", "E_DTYPE")
    _check_scale(attrs, attrs["dtype"])
    return TensorType(x.shape, attrs["dtype"])


def quantize(x: Array, scale: float, zero_point: int, dtype: DType) -> Array:
    """The nearest number of 8 bits, of two the even one; saturates, and NaN becomes the zero point. In float32 throughout."""
    low, high = LIMITS[dtype]
    steps = np.rint(x * np.float32(1 / scale))
    inside = np.clip(np.where(np.isnan(steps), 0, steps), low - zero_point, high - zero_point)
    return (inside + np.float32(zero_point)).astype(dtype.numpy)


def _quantize_sample(rng: np.random.Generator) -> Case:
    dtype = DType(str(rng.choice(["u8", "i8"])))
    zero_point = int(rng.integers(100)) + LIMITS[dtype][0]
    return Case((floats(rng, N, 5, high=9.0),), {"scale": 0.03, "zero_point": zero_point, "dtype": dtype})


register(
    OpDef(
        "quantize", operands("x"), (float_attr("scale"), int_attr("zero_point", default=0), Attr("dtype", AttrKind.DTYPE, DType.U8)),
        _quantize_type, quantize, _quantize_sample, per_element(5), Trait.ELEMENTWISE,
        doc="f32 in 8 bits: round(x * (1 / scale)) + zero_point, ties to even, saturating; NaN becomes zero_point",
    )
)  # fmt: skip


def _dequantize_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    (x,) = types
    _check_scale(attrs, x.dtype)
    return TensorType(x.shape, DType.F32)


def dequantize(x: Array, scale: float, zero_point: int) -> Array:
    """What numbers of 8 bits stand for."""
    return np.asarray((x.astype(np.int32) - zero_point).astype(np.float32) * np.float32(scale))


def _eight_bits(rng: np.random.Generator, dtype: DType, *shape: int) -> Array:
    low, high = LIMITS[dtype]
    return rng.integers(low, high + 1, shape).astype(dtype.numpy)


def _dequantize_sample(rng: np.random.Generator) -> Case:
    dtype = DType(str(rng.choice(["u8", "i8"])))
    return Case((_eight_bits(rng, dtype, N, 5),), {"scale": 0.03, "zero_point": int(rng.integers(100))})


register(
    OpDef(
        "dequantize", operands("x"), (float_attr("scale"), int_attr("zero_point", default=0)),
        _dequantize_type, dequantize, _dequantize_sample, per_element(2), Trait.ELEMENTWISE,
        doc="f32 that numbers of 8 bits stand for: (x - zero_point) * scale",
    )
)  # fmt: skip


# -- products ------------------------------------------------------------------------------------------------------------


def _check_terms(count: object) -> None:
    require(
        isinstance(count, int) and count <= MAX_TERMS,
        f"sums of at most {MAX_TERMS} products fit an i32, got {count}",
        "E_SHAPE",
    )


def _check_operands(x: TensorType, w: TensorType) -> None:
    require(x.dtype is DType.U8 and w.dtype is DType.I8, f"needs u8 and i8, got {x} and {w}", "E_DTYPE")


def _matmul_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    a, w = types
    _check_operands(a, w)
    _check_zero_point(attrs)
    require(a.rank >= 2 and w.rank == 2, f"needs a [.., m, k] and w [k, n], got {a} and {w}", "E_SHAPE")
    same_dim(a.shape[-1], w.shape[0], "the shared axis")
    _check_terms(w.shape[0])
    return TensorType((*a.shape[:-1], w.shape[1]), DType.I32)


def _matmul(a: Array, w: Array, zero_point: int) -> Array:
    """In float64, which holds such sums exactly and which numpy multiplies fast."""
    return np.asarray((a.astype(np.float64) - zero_point) @ w.astype(np.float64)).astype(np.int32)


def _matmul_sample(rng: np.random.Generator) -> Case:
    left = [(N, 5), (2, N, 5), (N, 3, 5)][int(rng.integers(3))]
    a, w = _eight_bits(rng, DType.U8, *left), _eight_bits(rng, DType.I8, 5, 4)
    return Case((a, w), {"zero_point": int(rng.integers(256))})


register(
    OpDef(
        "matmul_int8", operands("a w"), (int_attr("zero_point", default=0),), _matmul_type, _matmul, _matmul_sample,
        lambda i, r, a: Cost(r[0].size * i[1].shape[0] * 2, moved_bytes(i, r)), Trait.CONTRACTION,
        doc="sums in i32 of (a - zero_point) * w, for a u8 [.., m, k] and w i8 [k, n]",
    )
)  # fmt: skip


def _conv_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    x, w = types
    _check_operands(x, w)
    _check_zero_point(attrs)
    require(x.rank == 4 and w.rank == 4, f"needs x [n, h, w, c] and w [kh, kw, c, out], got {x} and {w}", "E_SHAPE")
    groups, outputs = attrs["groups"], w.shape[3]
    require(groups >= 1, f"groups must be at least 1, got {groups}", "E_ATTR")
    same_dim(x.shape[3], w.shape[2] * groups, "channels of x and of w times groups")
    require(
        isinstance(outputs, int) and outputs % groups == 0, f"{outputs} output channels in {groups} groups", "E_SHAPE"
    )
    kh, kw, channels = static_dims(w.shape[:3])
    _check_terms(kh * kw * channels)
    space = Geometry.of(attrs, 2).positions(x.shape[1:3], (kh, kw))
    return TensorType((x.shape[0], *space, outputs), DType.I32)


def _conv(
    x: Array, w: Array, strides: tuple[int, ...], pads: tuple[int, ...], dilations: tuple[int, ...], groups: int,
    zero_point: int,
) -> Array:  # fmt: skip
    """In float64, as `_matmul`. Padding stands for 0, so it is the zero point."""
    geometry = Geometry.of({"strides": strides, "pads": pads, "dilations": dilations}, 2)
    kernel, channels, per_group = w.shape[:2], w.shape[2], w.shape[3] // groups
    out = static_dims(geometry.positions(x.shape[1:3], kernel))
    widths = [(0, 0), (0, 0), *zip(geometry.before, geometry.after, strict=True)]
    padded = np.pad(np.moveaxis(x.astype(np.float64) - zero_point, -1, 1), widths)
    weights = w.astype(np.float64)
    results = []
    for g in range(groups):
        windows = patches(padded[:, g * channels : (g + 1) * channels], kernel, geometry, out)
        mine = weights[..., g * per_group : (g + 1) * per_group]
        results.append(np.tensordot(windows, mine, axes=((1, 4, 5), (2, 0, 1))))
    return np.concatenate(results, axis=-1).astype(np.int32)


def _conv_sample(rng: np.random.Generator) -> Case:
    groups = int(rng.choice([1, 1, 2, 4]))
    attrs = {
        "strides": (int(rng.integers(1, 3)), 1),
        "pads": (1, 0, 1, 2),
        "dilations": (1, int(rng.integers(1, 3))),
        "groups": groups,
        "zero_point": int(rng.integers(256)),
    }
    return Case((_eight_bits(rng, DType.U8, N, 8, 9, 4), _eight_bits(rng, DType.I8, 3, 2, 4 // groups, 8)), attrs)


register(
    OpDef(
        "conv_int8", operands("x w"),
        (
            ints_attr("strides", default=()), ints_attr("pads", default=()), ints_attr("dilations", default=()),
            int_attr("groups", default=1), int_attr("zero_point", default=0),
        ),
        _conv_type, _conv, _conv_sample,
        lambda i, r, a: Cost(r[0].size * math.prod(static_dims(i[1].shape[:3])) * 2, moved_bytes(i, r)), Trait.CONTRACTION,
        doc="sums in i32 of (x - zero_point) * w over windows of x u8 [n, h, w, c], w i8 [kh, kw, c / groups, out]; pads with zero_point",
    )
)  # fmt: skip


def _unpack_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    (x,) = types
    shape, groups = static_dims(attrs["shape"]), attrs["groups"]
    require(x.dtype is DType.I8 and x.rank == 4, f"needs i8 [blocks, segments, quads, 64], got {x}", "E_SHAPE")
    require(len(shape) >= 2 and min(shape) >= 1 and groups >= 1, f"needs extents, got {list(shape)}", "E_ATTR")
    blocks, segments, quads, lanes = static_dims(x.shape)
    rows, columns = math.prod(shape[:-1]), shape[-1]
    fits = not columns % groups and blocks == groups * -(-columns // groups // 16) and lanes == 64
    fits = fits and segments >= 1 and not rows % segments and rows // segments <= 4 * quads
    require(fits, f"{x} does not hold {list(shape)} in {groups} groups", "E_SHAPE")
    return TensorType(shape, DType.I8)


def unpack(x: Array, shape: tuple[int, ...], groups: int) -> Array:
    """Weights ``[..., columns]`` from blocks of 16 columns, in each of which four successive rows lie beside each other."""
    blocks, segments, quads, _ = x.shape
    split = x.reshape(groups, blocks // groups, segments, quads, 16, 4).transpose(2, 3, 5, 0, 1, 4)
    padded = split.reshape(segments, 4 * quads, groups, -1)
    kept = padded[:, : math.prod(shape[:-1]) // segments, :, : shape[-1] // groups]
    return np.ascontiguousarray(kept).reshape(shape)


def _unpack_sample(rng: np.random.Generator) -> Case:
    groups = int(rng.choice([1, 2]))
    return Case((_eight_bits(rng, DType.I8, 2 * groups, 3, 2, 64),), {"shape": (3, 6, 20 * groups), "groups": groups})


register(
    OpDef(
        "unpack_int8", operands("x"), (ints_attr("shape"), int_attr("groups", default=1)), _unpack_type, unpack, _unpack_sample,
        lambda i, r, a: Cost(0, moved_bytes(i, r)), doc="i8 weights out of the order that kernels read: [blocks, segments, quads, 64]",
    )
)  # fmt: skip


# -- pools ---------------------------------------------------------------------------------------------------------------


def pool_geometry(attrs: Attrs) -> Geometry:
    """Of windows over the axes 1 and 2; those without strides lie side by side."""
    kernel = tuple(attrs["kernel"])
    require(len(kernel) == 2 and min(kernel) >= 1, f"kernel must be two positive extents, got {list(kernel)}", "E_ATTR")
    return Geometry.of(attrs, 2, strides=kernel)


def _pool_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    (x,) = types
    require(x.rank == 4 and x.dtype is DType.U8, f"needs u8 [n, h, w, c], got {x}", "E_SHAPE")
    space = pool_geometry(attrs).positions(x.shape[1:3], attrs["kernel"], attrs["ceil_mode"])
    return TensorType((x.shape[0], *space, x.shape[3]), x.dtype)


def _sum_pool_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    _check_zero_point(attrs)
    _check_terms(math.prod(attrs["kernel"]))
    return TensorType(_pool_type(types, attrs).shape, DType.I32)


def _windows(x: Array, kernel: tuple[int, ...], ceil_mode: bool, **window: tuple[int, ...]) -> Array:
    """All of them, ``[n, c, p, q, *kernel]``; padding is 0."""
    geometry = pool_geometry({"kernel": kernel, **window})
    out = static_dims(geometry.positions(x.shape[1:3], kernel, ceil_mode))
    axes = zip(out, geometry.strides, geometry.dilations, kernel, strict=True)
    reach = [(o - 1) * s + d * (k - 1) + 1 for o, s, d, k in axes]
    before = geometry.before
    widths = [(b, max(0, r - b - size)) for b, r, size in zip(before, reach, x.shape[1:3], strict=True)]
    padded = np.pad(np.moveaxis(x, -1, 1), [(0, 0), (0, 0), *widths])
    return patches(padded, kernel, geometry, out)


def _max_pool(x: Array, kernel: tuple[int, ...], ceil_mode: bool, **window: tuple[int, ...]) -> Array:
    largest = _windows(x, kernel, ceil_mode, **window).max(axis=(-2, -1))
    return np.ascontiguousarray(np.moveaxis(largest, 1, -1))


def _sum_pool(x: Array, kernel: tuple[int, ...], ceil_mode: bool, zero_point: int, **window: tuple[int, ...]) -> Array:
    sums = _windows(x.astype(np.int32) - zero_point, kernel, ceil_mode, **window).sum(axis=(-2, -1), dtype=np.int32)
    return np.ascontiguousarray(np.moveaxis(sums, 1, -1))


def _pool_sample(rng: np.random.Generator, **attrs: int) -> Case:
    window = {"kernel": (3, 2), "strides": (2, 1), "pads": (1, 0, 1, 1), "ceil_mode": bool(rng.integers(2))}
    return Case((_eight_bits(rng, DType.U8, N, 8, 5, 4),), window | attrs)


def _pool_cost(inputs: Sequence[TensorType], results: Sequence[TensorType], attrs: Attrs) -> Cost:
    return Cost(results[0].size * math.prod(attrs["kernel"]), moved_bytes(inputs, results))


_POOL_ATTRS = (
    ints_attr("kernel"), ints_attr("strides", default=()), ints_attr("pads", default=()), ints_attr("dilations", default=()),
    bool_attr("ceil_mode"),
)  # fmt: skip
register(
    OpDef(
        "max_pool_int8", operands("x"), _POOL_ATTRS, _pool_type, _max_pool, _pool_sample, _pool_cost, Trait.REDUCTION,
        doc="largest element of each window of u8 [n, h, w, c]; padding is 0, which no element is below",
    )
)  # fmt: skip
register(
    OpDef(
        "sum_pool_int8", operands("x"), (*_POOL_ATTRS, int_attr("zero_point", default=0)), _sum_pool_type, _sum_pool,
        lambda rng: _pool_sample(rng, zero_point=int(rng.integers(256))), _pool_cost, Trait.REDUCTION,
        doc="sums in i32 of x - zero_point over each window of u8 [n, h, w, c]; padding counts as 0",
    )
)  # fmt: skip
