"""Largest element or mean of windows, of images ``[n, c, *space]`` or in channel blocks ``[n, c/b, *space, b]``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlec.ir.dim import Dim, static_dims
from mlec.ir.op import Array, Attrs, Case, Cost, OpDef, Trait, moved_bytes, register
from mlec.ir.types import TensorType
from mlec.ops.common import N, bool_attr, float_dtype, floats, ints_attr, operands, require
from mlec.ops.windows import Geometry, from_blocked, patches, to_blocked

_POOL_ATTRS = (
    ints_attr("kernel"), ints_attr("strides", default=()), ints_attr("pads", default=()), ints_attr("dilations", default=()),
    bool_attr("ceil_mode"),
)  # fmt: skip


def pool_geometry(attrs: Attrs) -> Geometry:
    """Windows without strides lie side by side."""
    kernel = tuple(attrs["kernel"])
    require(min(kernel, default=0) >= 1, f"kernel must be positive extents, got {list(kernel)}", "E_ATTR")
    return Geometry.of(attrs, len(kernel), strides=kernel)


def _positions(shape: Sequence[Dim], attrs: Attrs) -> tuple[Dim, ...]:
    """Windows along each spatial axis of ``[n, c, *space]``, or of ``[n, c/b, *space, b]``."""
    kernel, geometry = attrs["kernel"], pool_geometry(attrs)
    rank = len(kernel)
    require(
        len(shape) in (rank + 2, rank + 3),
        f"a window over {rank} axes needs rank {rank + 2} (or {rank + 3} for channel blocks)",
        "E_SHAPE",
    )
    return geometry.positions(shape[2 : 2 + rank], kernel, attrs["ceil_mode"])


def _pool_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    (x,) = types
    float_dtype(x)
    space = _positions(x.shape, attrs)
    return TensorType((*x.shape[:2], *space, *x.shape[2 + len(space) :]), x.dtype)


def _pool_cost(inputs: Sequence[TensorType], results: Sequence[TensorType], attrs: Attrs) -> Cost:
    return Cost(results[0].size * math.prod(attrs["kernel"]), moved_bytes(inputs, results))


def _windows(x: Array, fill: float, attrs: Attrs) -> tuple[Array, Array]:
    """All windows ``[n, c, *out, *kernel]`` and, for each of their elements, whether it is real, padding or beyond both (2, 1, 0)."""
    geometry, out, kernel = pool_geometry(attrs), static_dims(_positions(x.shape, attrs)), attrs["kernel"]
    before, after = geometry.before, geometry.after
    axes = zip(out, geometry.strides, geometry.dilations, kernel, strict=True)
    reach = [(o - 1) * s + d * (k - 1) + 1 for o, s, d, k in axes]
    widths = [(b, max(0, r - b - size)) for b, r, size in zip(before, reach, x.shape[2:], strict=True)]
    padded = np.pad(x, [(0, 0), (0, 0), *widths], constant_values=fill)
    real = np.pad(
        np.full((1, 1, *x.shape[2:]), 2), [(0, 0), (0, 0), *zip(before, after, strict=True)], constant_values=1
    )
    beyond = [(0, max(0, w[0] + w[1] - b - a)) for w, b, a in zip(widths, before, after, strict=True)]
    real = np.pad(real, [(0, 0), (0, 0), *beyond])
    return patches(padded, kernel, geometry, out), patches(real, kernel, geometry, out)


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
