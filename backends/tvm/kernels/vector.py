"""Scalar or vector expressions: the few operations TIR's operators do not give.

Templates write vector code with explicit vectors: an index that is a ``ramp`` makes a load, and with it every
expression above it, a vector of so many lanes; scalars broadcast. Scalar code is the same code with a plain index. A
count of lanes need not be a power of two: LLVM splits ``float32x10`` into what the machine has, so the tail of a row
is one short vector. (``T.vectorized`` loops are not used: their bodies cannot hold the statements that `share` adds.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import numpy as np

from mlec.backends.tvm.compat import T, tirx
from mlec.backends.tvm.kernels.epilogue import Buffer, Expr

LINE = 64
"""Bytes of a cache line."""


def dtype_of(x: Expr) -> str:
    """Element dtype: ``float32`` for an expression of type ``float32x16``."""
    return str(x.ty.dtype).partition("x")[0]


def lanes_of(x: Expr) -> int:
    """Number of lanes: 1 for a scalar."""
    return int(str(x.ty.dtype).partition("x")[2] or 1)


def vector_type(dtype: str, lanes: int) -> str:
    """``float32x16``; a single lane is the scalar type."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def ramp(base: Expr, lanes: int, stride: int = 1) -> Expr:
    """Indices ``base, base + stride, ...``; the base itself for one lane."""
    return base if lanes == 1 else tirx.Ramp(base, stride, lanes)


def const(value: Any, dtype: str, lanes: int = 1) -> Expr:
    """The Python or numpy scalar ``value``, rounded once to ``dtype``."""
    return broadcast(tirx.const(value.item() if isinstance(value, np.generic) else value, dtype), lanes)


def int64(index: Expr) -> Expr:
    """An index or extent as an expression of 64 bits: an int by itself would become one of 32, and all indices must have one type."""
    return tirx.const(index, "int64") if isinstance(index, int) else index


def wide(index: Expr) -> Expr:
    """The same index in 64 bits: what is added to it later can become part of an address."""
    return int64(index) if isinstance(index, int) else cast_to("int64", index)


def const_like(value: Any, x: Expr) -> Expr:
    """``value`` with the dtype and lanes of ``x``."""
    return const(value, dtype_of(x), lanes_of(x))


def broadcast(x: Expr, lanes: int) -> Expr:
    """A scalar expression in every lane; a vector is returned as it is."""
    return tirx.Broadcast(x, lanes) if lanes > 1 and lanes_of(x) == 1 else x


def cast_to(dtype: str, x: Expr) -> Expr:
    """Numeric conversion, lane by lane."""
    return x if dtype_of(x) == dtype else tirx.Cast(vector_type(dtype, lanes_of(x)), x)


def bits_as(dtype: str, x: Expr) -> Expr:
    """The same bits read as ``dtype``, which has the same width."""
    return tirx.reinterpret(vector_type(dtype, lanes_of(x)), x)


def share(x: Expr) -> Expr:
    """Compute ``x`` here, once, and return a name for it.

    TVM visits a shared subexpression once for each use (and its ``Let`` and ``Bind`` are inlined or visited again by
    several passes), so an expression that uses its operand twice must name it or programs grow exponentially. The
    name is a `Cell`. Needs an open builder; not inside ``T.vectorized``.
    """
    scalar = x.value if isinstance(x, tirx.Broadcast) else x
    if not hasattr(x, "ty") or isinstance(scalar, tirx.FloatImm | tirx.IntImm):
        return x
    return Cell(dtype_of(x), lanes_of(x), x).value


class Cell:
    """A local variable: a vector (or scalar) the program assigns more than once. LLVM keeps it in a register.

    It is a buffer of scalars read and written by a ramp: TVM reuses the memory of buffers that are no longer needed, and
    does so wrongly between buffers of vectors of different lengths. Booleans are held as bytes: a vector of them would be
    stored as bits.
    """

    def __init__(self, dtype: str, lanes: int = 1, value: Any = None) -> None:
        self.dtype, self.lanes = dtype, lanes
        held = "int8" if dtype == "bool" else dtype
        # Without a layout, as by default: for that, TVM walks through all open loops.
        self._buffer = T.alloc_buffer((lanes,), held, scope=CELL_SCOPE.get(), layout=None)
        if value is not None:
            self.set(value)

    @property
    def value(self) -> Expr:
        """The present value."""
        held = self._buffer[ramp(0, self.lanes)]
        return tirx.NE(held, const_like(0, held)) if self.dtype == "bool" else held

    def set(self, value: Any) -> None:
        """Assign an expression of the cell's type, or a Python number for every lane."""
        given = value if hasattr(value, "ty") else const(value, self.dtype)
        if self.dtype == "bool":
            given = select(given, const(1, "int8"), const(0, "int8"))
        T.buffer_store(self._buffer, broadcast(given, self.lanes), [ramp(0, self.lanes)])


CELL_SCOPE: ContextVar[str] = ContextVar("CELL_SCOPE", default="global")
"""Where cells live. On a CPU only buffers of global scope are put on the stack (others are heap workspaces); on a GPU it is
``local`` that means registers."""


@contextmanager
def cells_in(scope: str) -> Iterator[None]:
    """Cells made within live in this scope."""
    token = CELL_SCOPE.set(scope)
    try:
        yield
    finally:
        CELL_SCOPE.reset(token)


def select(condition: Expr, when_true: Any, when_false: Any) -> Expr:
    """``when_true if condition else when_false`` per lane; either value may be a Python number. Both are evaluated."""
    like = when_true if hasattr(when_true, "ty") else when_false
    a, b = (value if hasattr(value, "ty") else const_like(value, like) for value in (when_true, when_false))
    lanes = max(lanes_of(condition), lanes_of(a), lanes_of(b))
    return tirx.Select(broadcast(condition, lanes), broadcast(a, lanes), broadcast(b, lanes))


def is_nan(x: Expr) -> Expr:
    """True where ``x`` is NaN. Looks at the bits: TVM's simplifier takes ``x != x`` for false."""
    integer, magnitude, infinity = _NAN_TEST[dtype_of(x)]
    bits = bits_as(integer, x) & const(magnitude, integer, lanes_of(x))
    return bits > const(infinity, integer, lanes_of(x))


_NAN_TEST = {
    "float16": ("int16", 0x7FFF, 0x7C00),
    "bfloat16": ("int16", 0x7FFF, 0x7F80),
    "float32": ("int32", 0x7FFFFFFF, 0x7F800000),
    "float64": ("int64", 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
}


def lanes_all(mask: Expr) -> Expr:
    """Whether every lane of a vector of booleans is true."""
    return T.call_llvm_pure_intrin("bool", "llvm.vector.reduce.and", mask) if lanes_of(mask) > 1 else mask


def maximum(a: Expr, b: Any) -> Expr:
    """The larger value, NaN if either is NaN (numpy's rule). Name operands that are large expressions."""
    return _extremum(a, b, lambda x, y: x < y)


def minimum(a: Expr, b: Any) -> Expr:
    """The smaller value, NaN if either is NaN (numpy's rule). Name operands that are large expressions."""
    return _extremum(a, b, lambda x, y: y < x)


def _extremum(a: Expr, b: Any, b_wins: Any) -> Expr:
    # Ordered comparisons are false for NaN: a NaN in a stays, one in b must be asked for.
    if not hasattr(b, "ty"):
        return select(b_wins(a, const_like(b, a)), b, a)
    winner = select(b_wins(a, b), b, a)
    return select(is_nan(b), b, winner) if dtype_of(b).startswith(("float", "bfloat")) else winner


def load(buffer: Buffer, indices: list[Expr], lanes: int) -> Expr:
    """``lanes`` consecutive elements along the last axis, from ``indices`` on."""
    return buffer[(*indices[:-1], ramp(indices[-1], lanes))]


def store(buffer: Buffer, value: Expr, indices: list[Expr]) -> None:
    """Store consecutive elements along the last axis, as many as ``value`` has lanes."""
    T.buffer_store(buffer, value, [*indices[:-1], ramp(indices[-1], lanes_of(value))])


def prefetch(buffer: Buffer, index: Expr) -> None:
    """Ask for the line of an element of a flat buffer to be brought into L2. The index may lie beyond the end."""
    T.evaluate(tirx.call_intrin("void", "tirx.prefetch", tirx.address_of(buffer[index]), 0, 2, 1))


def reduce_lanes(x: Expr, combine: Any) -> Expr:
    """Combine the lanes of a vector into a scalar, as a tree (halves first), in the same order on every machine."""
    name, lanes = share(x), lanes_of(x)
    while lanes > 1 and lanes % 2 == 0:
        half = lanes // 2
        low, high = (share(tirx.Shuffle([name], list(range(i * half, (i + 1) * half)))) for i in range(2))
        name, lanes = share(combine(low, high)), half
    parts = [tirx.Shuffle([name], [lane]) for lane in range(lanes)] if lanes > 1 else [name]
    while len(parts) > 1:
        half = (len(parts) + 1) // 2
        parts = [share(combine(parts[i], parts[i + half])) if i + half < len(parts) else parts[i] for i in range(half)]
    return cast(Expr, parts[0])
