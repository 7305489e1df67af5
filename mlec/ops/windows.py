"""Windows that slide over the spatial axes of an image: what convolutions and pools have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlec.ir.dim import Dim
from mlec.ir.op import Array, Attrs
from mlec.ops.common import require


@dataclass(frozen=True)
class Geometry:
    """How windows lie over an image: one number for each spatial axis.

    Attributes:
        strides: steps from one window to the next.
        before, after: padding at the two ends. Of the convolution that a transposed one equals they may be negative: they cut.
        dilations: steps from one element of a window to the next.
        input_dilations: steps from one element of the image to the next, with zeros in between; more than 1 in the convolutions that
            transposed ones equal.
    """

    strides: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    dilations: tuple[int, ...]
    input_dilations: tuple[int, ...]

    @property
    def pads(self) -> tuple[int, ...]:
        """All paddings before, then all after."""
        return (*self.before, *self.after)

    @staticmethod
    def of(attrs: Attrs, rank: int, strides: tuple[int, ...] = ()) -> Geometry:
        """From the attributes of an op over ``rank`` spatial axes; ``strides`` are those of a window that has none (by default 1).

        Raises:
            TypeRuleError: an attribute has another number of entries, or one that makes no sense.
        """
        pads = per_axis(attrs, "pads", 2 * rank, 0, least=0)
        return Geometry(
            per_axis(attrs, "strides", rank, 1) if attrs["strides"] or not strides else strides,
            pads[:rank],
            pads[rank:],
            per_axis(attrs, "dilations", rank, 1),
            (1,) * rank,
        )

    def positions(self, space: Sequence[Dim], kernel: Sequence[int], ceil_mode: bool = False) -> tuple[Dim, ...]:
        """How many windows of extents ``kernel`` there are along each axis of an image of extents ``space``.

        With ``ceil_mode`` a last window may hang over the end, but must start inside.

        Raises:
            TypeRuleError: a window does not fit.
        """
        return tuple(
            _positions(size, taps, self.strides[i], self.before[i], self.after[i], self.dilations[i], ceil_mode)
            for i, (size, taps) in enumerate(zip(space, kernel, strict=True))
        )


def lifted_windows(attrs: Attrs) -> dict[str, Any]:
    """Attributes of windows over a sequence, for those over the image of one row that it is."""
    lifted = dict(attrs)
    for name in ("kernel", "strides", "dilations"):
        if attrs.get(name):
            lifted[name] = (1, *attrs[name])
    if attrs.get("pads"):
        before, after = attrs["pads"]
        lifted["pads"] = (0, before, 0, after)
    return lifted


def per_axis(attrs: Attrs, key: str, count: int, default: int, least: int = 1) -> tuple[int, ...]:
    """An attribute with one entry for each axis, or none for the default on all.

    Raises:
        TypeRuleError: it has another number of entries, or one below ``least``.
    """
    values = tuple(attrs.get(key, ())) or (default,) * count
    require(len(values) == count, f"{key} must have {count} entries, got {list(values)}", "E_ATTR")
    require(min(values, default=least) >= least, f"{key} must be at least {least}, got {list(values)}", "E_ATTR")
    return values


def _positions(size: Dim, kernel: int, stride: int, before: int, after: int, dilation: int, ceil_mode: bool) -> Dim:
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


def patches(x: Array, kernel: Sequence[int], geometry: Geometry, out: Sequence[int]) -> Array:
    """All windows of a padded image ``[n, c, *space]``: ``[n, c, *out, *kernel]``."""
    result, rank = x, len(kernel)
    for i, (o, k, s, d) in enumerate(zip(out, kernel, geometry.strides, geometry.dilations, strict=True)):
        index = np.arange(o)[:, None] * s + np.arange(k)[None, :] * d
        result = np.take(result, index, axis=2 + 2 * i)
    return result.transpose([0, 1, *(2 + 2 * i for i in range(rank)), *(3 + 2 * i for i in range(rank))])


def from_blocked(x: Array) -> Array:
    """``[n, c/b, *space, b]`` to ``[n, c, *space]``."""
    moved = np.moveaxis(x, -1, 2)
    return moved.reshape(moved.shape[0], moved.shape[1] * moved.shape[2], *moved.shape[3:])


def to_blocked(x: Array, block: int) -> Array:
    """``[n, c, *space]`` to ``[n, ceil(c/b), *space, b]``, zeros in the channels that are not there."""
    blocks = -(-x.shape[1] // block)
    padded = np.pad(x, [(0, 0), (0, blocks * block - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])
    return np.ascontiguousarray(np.moveaxis(padded.reshape(x.shape[0], blocks, block, *x.shape[2:]), 2, -1))
