"""Which nodes a row program can hold: those that compute each row of a narrow result from the same row of narrow operands.

Passes form row programs by this rule and backends compile them by it, so what one puts together the other takes.
"""

from __future__ import annotations

from mlec.ir.dim import Dim, evaluate_at, static
from mlec.ir.graph import Node
from mlec.ir.op import Trait
from mlec.ir.types import TensorType

MAX_COLUMNS = 128
"""Of any value: a block of so many columns fits the L1 cache."""
MAX_PRODUCT, MAX_PRODUCT_OF_MANY = 16, 32
"""Columns of a product, also of surely many rows or in a short program; wider ones are better off with the tiles of a matrix product."""

MANY_ROWS = 64
"""Fill the lanes of all blocks but one. With fewer, the empty lanes of wide products are work that a matrix product has not."""

PRODUCTS = frozenset({"matmul", "matmul_packed"})
MOVES = frozenset({"reshape", "gather", "concat", "slice", "broadcast_to"})
OVER_COLUMNS = frozenset({"sum", "mean", "max", "min", "argmax", "argmin", "softmax", "log_softmax", "logsumexp"})
"""Reductions and normalisations whose axis may be the columns."""


LEAST_ROWS = 16
"""Of a number of rows that is known: fewer leave most lanes of a block empty."""


def rows_of(node: Node, short: bool = False) -> Dim | None:
    """The extent over whose rows the node works one by one; None if it does not, or rows are wide, or known to be few.

    A ``short`` program has few products: it may hold wide ones whatever the number of rows.
    """
    if len(node.outputs) != 1 or node.output.type.rank not in (1, 2):
        return None
    kind = node.output.type
    n, rank = kind.shape[0], kind.rank
    if not has_rows(kind, n) or (isinstance(n, int) and n < LEAST_ROWS):
        return None
    rows = row_operands(node)
    fixed = [v for i, v in enumerate(node.inputs) if i not in rows]
    if any(v.type.symbols for v in fixed) or not all(has_rows(node.inputs[i].type, n) for i in rows):
        return None
    first = node.inputs[0].type if node.inputs else kind
    if node.op.has(Trait.ELEMENTWISE):
        fits = not node.op.has(Trait.LIBRARY_CALL)
    elif node.name in OVER_COLUMNS:
        fits = first.rank == 2 and first.dtype.is_float and _over_columns(node)
    elif node.name in PRODUCTS:
        fits = first.rank == rank == 2 and columns_of(kind) <= most_columns(n, short)
    elif node.name == "gather":
        fits = first.rank == 2 and _over_columns(node) and node.inputs[1].type.rank == 1
    elif node.name in ("concat", "slice"):
        fits = rank == 2 and _over_columns(node)
    else:
        fits = node.name == "broadcast_to" or (node.name == "reshape" and columns_of(kind) == columns_of(first) == 1)
    return n if fits else None


def most_columns(n: Dim, short: bool = False) -> int:
    """Of a product of ``n`` rows, none of whose symbols is 0."""
    many = evaluate_at(n, 1) >= MANY_ROWS or (short and not isinstance(n, int))
    return MAX_PRODUCT_OF_MANY if many else MAX_PRODUCT


def row_operands(node: Node) -> frozenset[int]:
    """The positions of the operands that have the rows of the result, if it has rows; the others are the same for all of them.

    An operand that is broadcast has the result's rows if it has its axes and its rows; another one only fits if it is fixed.
    """
    if node.op.has(Trait.ELEMENTWISE) or node.name == "broadcast_to":
        shape = node.output.type.shape
        return frozenset(
            i for i, v in enumerate(node.inputs) if v.type.rank == len(shape) and v.type.shape[0] == shape[0]
        )
    if node.name in PRODUCTS or node.name == "gather":
        return frozenset({0})
    return frozenset(range(len(node.inputs)))


def has_rows(kind: TensorType, n: Dim) -> bool:
    """Whether a value is ``n`` rows of few columns, and of some, of a type that lanes hold."""
    if kind.rank not in (1, 2) or kind.shape[0] != n or (kind.dtype.is_float and kind.dtype.bits < 32):
        return False
    return all(isinstance(d, int) and 0 < d <= MAX_COLUMNS for d in kind.shape[1:])


def columns_of(kind: TensorType) -> int:
    """Columns of a value with rows; a vector has one."""
    return static(kind.shape[1]) if kind.rank == 2 else 1


def _over_columns(node: Node) -> bool:
    """Whether the axis of a matrix that the node works along is that of its columns, and no other."""
    axes = node.attrs["axes"] if "axes" in node.attrs else (node.attrs["axis"],)
    return len(axes) == 1 and axes[0] % 2 == 1
