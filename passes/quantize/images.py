"""Images with their channels last, ``[n, h, w, c]``: what layers on 8 bits read and write.

A sequence ``[n, c, length]`` is an image of one row, a row ``[n, c]`` one of one pixel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlec.ir import GraphBuilder, Value
from mlec.ir.dim import static_dims
from mlec.ir.op import Array
from mlec.ops.windows import Geometry, lifted_windows

RANKS = (2, 3, 4)
_LAST = {2: (0, 1), 3: (0, 2, 1), 4: (0, 2, 3, 1)}
_FIRST = {2: (0, 1), 3: (0, 2, 1), 4: (0, 3, 1, 2)}
"""By rank, the axes that move the channels behind space, and back."""


def image_of(b: GraphBuilder, x: Value) -> Value:
    """The image of a tensor with its channels in front of space."""
    moved = permuted(b, x, _LAST[x.type.rank])
    n, *space, c = moved.type.shape
    ones = (1,) * (4 - x.type.rank)
    return b("reshape", moved, shape=(n, *ones, *space, c)) if ones else moved


def tensor_of(b: GraphBuilder, image: Value, rank: int) -> Value:
    """The inverse."""
    n, h, w, c = image.type.shape
    space = (h, w)[4 - rank :]
    held = b("reshape", image, shape=(n, *space, c)) if rank < 4 else image
    return permuted(b, held, _FIRST[rank])


def shape_of_image(shape: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of the image of a tensor."""
    n, c, *space = shape
    return (n, *(1,) * (2 - len(space)), *space, c)


def array_as_image(array: Array, rank: int) -> Array:
    """A constant that is broadcast with tensors of a rank."""
    full = array.reshape((1,) * (rank - array.ndim) + array.shape).transpose(_LAST[rank])
    return np.ascontiguousarray(full.reshape(full.shape[0], *(1,) * (4 - rank), *full.shape[1:]))


def permuted(b: GraphBuilder, x: Value, perm: tuple[int, ...]) -> Value:
    """The transposed tensor; a view where only axes of extent 1 move."""
    moved = [axis for axis in perm if x.type.shape[axis] != 1]
    if list(perm) == sorted(perm):
        return x
    if moved == sorted(moved):
        return b("reshape", x, shape=tuple(x.type.shape[axis] for axis in perm))
    return b("transpose", x, perm=perm)


def window_attrs(attrs: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Those of a convolution or pool over tensors of a rank, for their images."""
    return dict(attrs) if rank == 4 else lifted_windows(attrs)


def counted(
    shape: tuple[int, ...], out: tuple[int, ...], kernel: tuple[int, ...], geometry: Geometry, padding: bool
) -> Array:
    """How many elements each window of a mean counts, ``[1, p, q, 1]``: those of the image, and of the padding if that is wanted."""
    axes = []
    for axis, (size, positions, taps) in enumerate(zip(shape, out, kernel, strict=True)):
        before, after = (geometry.before[axis], geometry.after[axis]) if padding else (0, 0)
        at = np.arange(positions)[:, None] * geometry.strides[axis] - geometry.before[axis] + np.arange(taps)
        axes.append(((at >= -before) & (at < size + after)).sum(axis=1))
    return np.asarray(np.multiply.outer(*axes))[None, :, :, None]


def extents(value: Value) -> tuple[int, int]:
    """Height and width of the image of a tensor."""
    _, h, w, _ = shape_of_image(value.type.shape)
    return static_dims((h, w))  # type: ignore[return-value]
