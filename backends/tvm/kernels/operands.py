"""Operands of products: their extents, and the leading axes along which there are several of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlec.backends.tvm.kernels.epilogue import Dim, Expr


@dataclass(frozen=True)
class Extents:
    """Of a product ``[m, k]`` times ``[k, n]``."""

    m: Dim
    n: Dim
    k: Dim


def flatten(indices: Sequence[Expr], shape: Sequence[Dim]) -> Expr:
    """Row-major position of the element with these indices."""
    position: Expr = 0
    for index, extent in zip(indices, shape, strict=True):
        position = position * extent + index
    return position


def broadcast_lead(a: Sequence[Dim], b: Sequence[Dim]) -> tuple[Dim, ...]:
    """Leading axes of a product: numpy's rule; a symbolic extent equals what it stands beside unless that is 1."""
    rank = max(len(a), len(b))
    pairs = zip([1] * (rank - len(a)) + list(a), [1] * (rank - len(b)) + list(b), strict=True)
    return tuple(y if isinstance(x, int) and x == 1 else x for x, y in pairs)


def operand_indices(where: Sequence[Expr], lead: Sequence[Dim], own: Sequence[Dim]) -> tuple[Expr, ...]:
    """Indices into an operand whose leading axes broadcast to ``lead``."""
    own_where = where[len(lead) - len(own) :] if own else ()
    return tuple(0 if isinstance(extent, int) and extent == 1 else i for i, extent in zip(own_where, own, strict=True))
