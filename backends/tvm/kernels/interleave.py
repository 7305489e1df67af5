"""Concatenation along a last axis of single elements: those of two operands in turn, as of a complex number its parts.

Two loads, two shuffles and two stores make two vectors: each element is read once and written once, and a cycle takes one shuffle. Two
times 33000 floats, in L2, on one thread: predicted 1.4 us of shuffles and 5 of moving, measured 6; four times as many, which with the
result are as large as L2, 34, and element by element 88.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.elementwise import CHEAP, CHUNK, memory_type
from mlec.backends.tvm.kernels.epilogue import BufferSpec, Dim, Expr
from mlec.backends.tvm.kernels.tile import bits, ceildiv, flat_view, parallel_if_large, parameter, product
from mlec.backends.tvm.kernels.vector import lanes_of, load, share, store
from mlec.backends.tvm.target import TargetInfo


def interleave(shape: Sequence[Dim], dtype: str, target: TargetInfo, name: str = "interleave") -> tirx.PrimFunc:
    """``y[..., k] = x_k[..., 0]`` for k of 0 and 1; extents may be symbolic, the last is 1. Parameters: x0, x1, y.

    A task is `CHUNK` elements of either; the last has what is left.
    """
    held = memory_type(dtype)
    lanes, count = target.lanes(bits(held)), product(shape)
    with prim_func(name) as kernel:
        x_args = [parameter(f"x{k}", BufferSpec(shape, dtype)) for k in range(2)]
        y_arg = parameter("y", BufferSpec((*shape[:-1], 2), dtype))
        x = [flat_view(b, (count,), held) for b in x_args]
        y = flat_view(y_arg, (count * 2,), held)

        def chunk(number: Expr) -> None:
            first = share(number * CHUNK)
            own = share(tirx.min(CHUNK, count - first))
            with T.serial(own // lanes) as i:
                at = share(first + i * lanes)
                for half, mixed in enumerate(in_turn(*(share(load(part, [at], lanes)) for part in x))):
                    store(y, mixed, [at * 2 + half * lanes])
            with T.serial(own % lanes) as i:
                at = share(first + own // lanes * lanes + i)
                for k, part in enumerate(x):
                    T.buffer_store(y, part[at], [at * 2 + k])

        parallel_if_large(ceildiv(count, CHUNK), 2 * CHEAP * CHUNK // lanes, chunk)
    return kernel.func


def in_turn(a: Expr, b: Expr) -> list[Expr]:
    """The elements of two vectors in turn, as two others."""
    lanes = lanes_of(a)
    turns = [range(half * lanes // 2, (half + 1) * lanes // 2) for half in range(2)]
    return [share(tirx.Shuffle([a, b], [lane for k in turn for lane in (k, lanes + k)])) for turn in turns]
