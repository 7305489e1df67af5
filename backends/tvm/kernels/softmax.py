"""Softmax, log-softmax and log-sum-exp along one axis, without overflow."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import Buffer, BufferSpec, Dim, Expr
from mlec.backends.tvm.kernels.mathlib import exp, log
from mlec.backends.tvm.kernels.reduce import reduced_shape
from mlec.backends.tvm.kernels.tile import (
    Fold,
    accumulator_dtype,
    bits,
    flat_view,
    parallel_if_large,
    parameter,
    product,
    vector_loop,
)
from mlec.backends.tvm.kernels.vector import Cell, cast_to, const_like, load, maximum, select, share, store
from mlec.backends.tvm.target import TargetInfo


def softmax(
    x_shape: Sequence[Dim], axis: int, dtype: str, target: TargetInfo, log_space: bool = False, name: str = "softmax"
) -> tirx.PrimFunc:
    """``y = exp(x - max) / sum(exp(x - max))`` along ``axis``, or its logarithm. Parameters: x, y; extents may be symbolic.

    Three passes over a row (or over a strip of rows side by side, where the axis is not the last): largest, sum of
    exponentials, quotient. A row stays in L1 between them.
    """
    return _normalised(x_shape, axis, dtype, target, "log_softmax" if log_space else "softmax", False, name)


def logsumexp(
    x_shape: Sequence[Dim], axis: int, keepdims: bool, dtype: str, target: TargetInfo, name: str = "logsumexp"
) -> tirx.PrimFunc:
    """``y = log(sum(exp(x)))`` along ``axis``. Parameters: x, y."""
    return _normalised(x_shape, axis, dtype, target, "logsumexp", keepdims, name)


def _normalised(
    x_shape: Sequence[Dim], axis: int, dtype: str, target: TargetInfo, result: str, keepdims: bool, name: str
) -> tirx.PrimFunc:
    acc = accumulator_dtype(dtype)
    lanes = target.lanes(bits(acc))
    axis %= len(x_shape)
    outer, length, inner = product(x_shape[:axis]), x_shape[axis], product(x_shape[axis + 1 :])
    last = isinstance(inner, int) and inner == 1
    reduced = result == "logsumexp"
    y_shape = reduced_shape(x_shape, (axis,), keepdims) if reduced else tuple(x_shape)

    with prim_func(name) as kernel:
        x_arg = parameter("x", BufferSpec(x_shape, dtype))
        y_arg = parameter("y", BufferSpec(y_shape, dtype))
        x = flat_view(x_arg, (outer, length) if last else (outer, length, inner), dtype)
        y = flat_view(
            y_arg, (outer, 1 if reduced else length) if last else (outer, 1 if reduced else length, inner), dtype
        )

        def shift_of(largest: Expr) -> Expr:
            return finite_shift(largest) if reduced else largest

        def row(i: Expr) -> None:
            fold = Fold(lanes, acc, -math.inf, maximum)
            fold.over(length, lambda start, width: value(x, [i, start], width))
            shift = shift_of(fold.result())
            total = Fold(lanes, acc, 0, lambda a, b: a + b, partials=1)
            total.over(length, lambda start, width: exp(value(x, [i, start], width) - shift))
            whole = total.result()
            if reduced:
                store(y, cast_to(dtype, log(whole) + shift), [i, 0])
                return
            scale = log(whole) if result == "log_softmax" else whole

            def put(start: Expr, width: int) -> None:
                shifted = value(x, [i, start], width) - shift
                done = shifted - scale if result == "log_softmax" else exp(shifted) / scale
                store(y, cast_to(dtype, done), [i, start])

            vector_loop(length, lanes, put)

        def strip(i: Expr) -> None:
            def columns(start: Expr, width: int) -> None:
                largest, total = Cell(acc, width, -math.inf), Cell(acc, width, 0)
                with T.serial(length) as k:
                    largest.set(maximum(largest.value, share(value(x, [i, k, start], width))))
                shift = shift_of(largest.value)
                with T.serial(length) as k:
                    total.set(total.value + exp(value(x, [i, k, start], width) - shift))
                if reduced:
                    store(y, cast_to(dtype, log(total.value) + shift), [i, 0, start])
                    return
                scale = log(total.value) if result == "log_softmax" else total.value
                with T.serial(length) as k:
                    shifted = value(x, [i, k, start], width) - shift
                    done = shifted - scale if result == "log_softmax" else exp(shifted) / scale
                    store(y, cast_to(dtype, done), [i, k, start])

            vector_loop(inner, lanes, columns)

        def value(buffer: Buffer, where: list[Expr], width: int) -> Expr:
            return cast_to(acc, load(buffer, where, width))

        work = math.prod(extent for extent in (length, inner) if isinstance(extent, int)) * 2 * bits(acc)
        parallel_if_large(outer, work, row if last else strip)
    return kernel.func


def finite_shift(largest: Expr) -> Expr:
    """What logsumexp subtracts: the maximum, 0 for an infinite one (which is the result itself; a softmax is NaN then)."""
    largest = share(largest)
    finite = select(largest < const_like(math.inf, largest), largest, select(largest > 0.0, 0.0, largest))
    return share(select(largest > const_like(-math.inf, largest), finite, select(largest < 0.0, 0.0, largest)))
