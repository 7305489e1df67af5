"""Which nodes a row program can hold: those that compute each row of a narrow result from the same row of narrow operands.

Passes form row programs by this rule and backends compile them by it, so what one puts together the other takes.
"""

from __future__ import annotations

from mlec.ir.dim import Dim, SymDim, static, symbols_of
from mlec.ir.graph import Node
from mlec.ir.op import Trait
from mlec.ir.types import TensorType

MAX_COLUMNS = 128
"""Of any value: a block of so many columns fits the L1 cache."""
MAX_PRODUCT = 16
"""Columns of a product; wider ones are better off with the tiles of a matrix product."""

PRODUCTS = frozenset({"matmul", "matmul_packed"})
MOVES = frozenset({"reshape", "gather", "concat", "slice", "broadcast_to"})
OVER_COLUMNS = frozenset({"sum", "mean", "max", "min", "argmax", "argmin", "softmax", "log_softmax", "logsumexp"})
"""Reductions and normalisations whose axis may be the columns."""


def rows_of(node: Node) -> SymDim | None:
    """The extent over whose rows the node works one by one; None if it does not, or rows are wide."""
    if len(node.outputs) != 1 or node.output.type.rank not in (1, 2):
        return None
    n = node.output.type.shape[0]
    if not isinstance(n, SymDim) or str(n) not in symbols_of(n) or not has_rows(node.output.type, n):
        return None
    rows = [v for v in node.inputs if v.type.symbols]
    fixed = [v for v in node.inputs if not v.type.symbols]
    if not all(has_rows(v.type, n) for v in rows):
        return None
    rank = node.output.type.rank
    if node.op.has(Trait.ELEMENTWISE):
        aligned = all(v.type.rank == rank for v in rows) and all(v.type.rank <= rank for v in fixed)
        fits = aligned and not node.op.has(Trait.LIBRARY_CALL)
    elif node.name in OVER_COLUMNS:
        x = node.inputs[0].type
        fits = x.rank == 2 and x.dtype.is_float and _over_columns(node)
    elif node.name in PRODUCTS:
        fits = rank == 2 and columns_of(node.output.type) <= MAX_PRODUCT and rows == [node.inputs[0]]
    elif node.name == "gather":
        fits = _over_columns(node) and rows == [node.inputs[0]] and node.inputs[1].type.rank == 1
    elif node.name in ("concat", "slice"):
        fits = _over_columns(node) and rank == 2 and not fixed
    else:
        fits = node.name == "broadcast_to" or (node.name == "reshape" and columns_of(node.output.type) == 1)
    return n if fits else None


def has_rows(kind: TensorType, n: Dim) -> bool:
    """Whether a value is ``n`` rows of few columns, of a type that lanes hold."""
    if kind.rank not in (1, 2) or kind.shape[0] != n or (kind.dtype.is_float and kind.dtype.bits < 32):
        return False
    return all(isinstance(d, int) and d <= MAX_COLUMNS for d in kind.shape[1:])


def columns_of(kind: TensorType) -> int:
    """Columns of a value with rows; a vector has one."""
    return static(kind.shape[1]) if kind.rank == 2 else 1


def _over_columns(node: Node) -> bool:
    """Whether the axis of a matrix that the node works along is that of its columns, and no other."""
    axes = node.attrs["axes"] if "axes" in node.attrs else (node.attrs["axis"],)
    return len(axes) == 1 and axes[0] % 2 == 1
