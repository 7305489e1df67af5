"""Images with other spatial extents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlec.ir.op import REQUIRED, Array, Attr, AttrKind, Attrs, Case, OpDef, register
from mlec.ir.types import TensorType
from mlec.ops.common import N, bool_attr, choice_attr, float_dtype, floats, operands, per_element, require, wide_float


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


def nearest_positions(size: int, source: int) -> Array:
    """For each output position, the position in the source that it takes its number from."""
    return np.asarray(np.minimum(np.floor(np.arange(size) * (source / size)), source - 1).astype(np.int64))


def _resize(x: Array, size: tuple[int, ...], mode: str, align_corners: bool) -> Array:
    result = wide_float(x)
    for axis, extent in enumerate(size, start=2):
        source = x.shape[axis]
        if mode == "nearest":
            result = np.take(result, nearest_positions(extent, source), axis)
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
        per_element(8),
        tolerance=64.0,
        doc="other spatial extents, nearest or linear between neighbours",
    )
)
