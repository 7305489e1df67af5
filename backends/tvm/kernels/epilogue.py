"""What happens to an accumulator between the inner loop of a kernel and the store of its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Expr: TypeAlias = Any
"""A scalar TIR expression (``tvm.ir.PrimExpr``)."""
Dim: TypeAlias = Any
"""An extent: ``int``, or a ``tirx.Var`` or expression of them where it is symbolic."""
Buffer: TypeAlias = Any
"""A ``tirx.Buffer``: index it to load."""


@dataclass(frozen=True)
class BufferSpec:
    """Shape and dtype of a parameter buffer (compact, row-major)."""

    shape: Sequence[Dim]
    dtype: str


def _identity(accumulator: Expr, indices: tuple[Expr, ...], extra: tuple[Buffer, ...]) -> Expr:
    return accumulator


@dataclass(frozen=True)
class Epilogue:
    """Elementwise work on the result of a kernel while it is still in registers.

    Attributes:
        inputs: further parameter buffers of the kernel, placed between its own inputs and its output.
        apply: ``(accumulator, output indices, extra buffers) -> value``. Called while the program is built, once for
            each store. The accumulator is a scalar or a vector; in the second case the last index is a ramp of as many
            lanes, so ``extra[0][indices[-1]]`` loads a vector of biases. Use arithmetic, `vector` and `mathlib`,
            nothing that calls a scalar function. The indices are those of the output buffer (five on channel blocks);
            without ``inputs`` nobody needs them and they may be fewer.
        out_dtype: dtype of the output; ``None``: the accumulator's.
    """

    inputs: tuple[BufferSpec, ...] = ()
    apply: Callable[[Expr, tuple[Expr, ...], tuple[Buffer, ...]], Expr] = _identity
    out_dtype: str | None = None


IDENTITY = Epilogue()
"""Stores the accumulator as it is."""


@dataclass(frozen=True)
class Prologue:
    """Elementwise work on the operand of a kernel as it is read, so that the operand itself is never in memory.

    Attributes:
        inputs: parameter buffers of the kernel in the place of the operand.
        value: ``(indices, width, inputs) -> value`` of the operand at ``width`` consecutive elements of the last axis.
    """

    inputs: tuple[BufferSpec, ...]
    value: Callable[[tuple[Expr, ...], int, tuple[Buffer, ...]], Expr]
