"""Softmax, log-softmax and log-sum-exp along one axis, without overflow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import Buffer, BufferSpec, Dim, Expr
from mlec.backends.tvm.kernels.mathlib import exp, log
from mlec.backends.tvm.kernels.reduce import reduced_shape
from mlec.backends.tvm.kernels.schedule import variations, vectors_across
from mlec.backends.tvm.kernels.tile import (
    Fold,
    accumulator_dtype,
    bits,
    column_parts,
    flat_view,
    parallel_if_large,
    parameter,
    product,
    vector_loop,
    vectors_loop,
)
from mlec.backends.tvm.kernels.vector import Cell, cast_to, const_like, load, maximum, select, share, store
from mlec.backends.tvm.target import TargetInfo


@dataclass(frozen=True)
class SoftmaxSchedule:
    """How lines are normalised.

    Attributes:
        vectors: of exponentials at once: sums that are kept apart along the line, or neighbouring columns across lines.
        kept: the exponentials stay in the result's memory from their sum to the quotient, rather than being computed twice.
    """

    vectors: int
    kept: bool

    @staticmethod
    def candidates(
        x_shape: Sequence[Dim], axis: int, dtype: str, result: str, target: TargetInfo
    ) -> Iterator[SoftmaxSchedule]:
        """For the ``result`` ``softmax``, ``log_softmax`` or ``logsumexp``.

        Exponentials are kept where that loses nothing: in the type of their sums. Two vectors of them hide the latency of each other.
        """
        acc, axis = accumulator_dtype(dtype), axis % len(x_shape)
        inner = product(x_shape[axis + 1 :])
        last = isinstance(inner, int) and inner == 1
        most = vectors_across(x_shape[axis] if last else inner, target.lanes(bits(acc)))
        keeps = result == "softmax" and acc == dtype
        default = SoftmaxSchedule(min(2, most), keeps)
        return variations(default, lambda s: s.vectors <= most, vectors=(1, 2, 4), kept=[False])


def softmax(
    x_shape: Sequence[Dim],
    axis: int,
    dtype: str,
    target: TargetInfo,
    log_space: bool = False,
    name: str = "softmax",
    schedule: SoftmaxSchedule | None = None,
) -> tirx.PrimFunc:
    """``y = exp(x - max) / sum(exp(x - max))`` along ``axis``, or its logarithm. Parameters: x, y; extents may be symbolic.

    Three passes over a row (or over a strip of rows side by side, where the axis is not the last): largest, sum of
    exponentials, which are kept in y, quotient. A row stays in L1 between them. Without a schedule, the first candidate is taken.
    """
    return _normalised(x_shape, axis, dtype, target, "log_softmax" if log_space else "softmax", False, name, schedule)


def logsumexp(
    x_shape: Sequence[Dim],
    axis: int,
    keepdims: bool,
    dtype: str,
    target: TargetInfo,
    name: str = "logsumexp",
    schedule: SoftmaxSchedule | None = None,
) -> tirx.PrimFunc:
    """``y = log(sum(exp(x)))`` along ``axis``. Parameters: x, y.

    The first two passes of `softmax`: an element is read from memory once, from L1 twice, and nothing of its size is written.
    """
    return _normalised(x_shape, axis, dtype, target, "logsumexp", keepdims, name, schedule)


def _normalised(
    x_shape: Sequence[Dim],
    axis: int,
    dtype: str,
    target: TargetInfo,
    result: str,
    keepdims: bool,
    name: str,
    schedule: SoftmaxSchedule | None,
) -> tirx.PrimFunc:
    schedule = schedule or next(SoftmaxSchedule.candidates(x_shape, axis, dtype, result, target))
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
            total = Fold(lanes, acc, 0, lambda a, b: a + b, schedule.vectors)

            def power(start: Expr, width: int) -> Expr:
                done = share(exp(value(x, [i, start], width) - shift))
                if schedule.kept:
                    store(y, done, [i, start])
                return done

            total.over(length, power)
            whole = total.result()
            if reduced:
                store(y, cast_to(dtype, log(whole) + shift), [i, 0])
                return
            scale = log(whole) if result == "log_softmax" else whole

            def put(start: Expr, width: int) -> None:
                store(y, cast_to(dtype, quotient([i, start], width, shift, scale)), [i, start])

            vector_loop(length, lanes, put)

        def strip(i: Expr, part: Expr) -> None:
            def columns(first: Expr, width: int, count: int) -> None:
                starts = [first + u * width for u in range(count)]
                largest = [Cell(acc, width, -math.inf) for _ in starts]
                totals = [Cell(acc, width, 0) for _ in starts]
                with T.serial(length) as k:
                    for start, cell in zip(starts, largest, strict=True):
                        cell.set(maximum(cell.value, share(value(x, [i, k, start], width))))
                shifts = [shift_of(cell.value) for cell in largest]
                with T.serial(length) as k:
                    for start, shift, total in zip(starts, shifts, totals, strict=True):
                        power = share(exp(value(x, [i, k, start], width) - shift))
                        if schedule.kept:
                            store(y, power, [i, k, start])
                        total.set(total.value + power)
                if reduced:
                    for start, shift, total in zip(starts, shifts, totals, strict=True):
                        store(y, cast_to(dtype, log(total.value) + shift), [i, 0, start])
                    return
                scales = [share(log(total.value)) if result == "log_softmax" else total.value for total in totals]
                with T.serial(length) as k:
                    for start, shift, scale in zip(starts, shifts, scales, strict=True):
                        store(y, cast_to(dtype, quotient([i, k, start], width, shift, scale)), [i, k, start])

            vectors_loop(inner, lanes, schedule.vectors, columns, part, parts)

        def quotient(where: list[Expr], width: int, shift: Expr, scale: Expr) -> Expr:
            if schedule.kept:
                return load(y, where, width) / scale
            shifted = value(x, where, width) - shift
            return shifted - scale if result == "log_softmax" else exp(shifted) / scale

        def value(buffer: Buffer, where: list[Expr], width: int) -> Expr:
            return cast_to(acc, load(buffer, where, width))

        work = length * inner * 2 * bits(acc)
        parts = 1 if last else column_parts(inner, schedule.vectors * lanes, work, target)
        parallel_if_large(outer * parts, work // parts, row if last else lambda i: strip(i // parts, i % parts), parts)
    return kernel.func


def finite_shift(largest: Expr) -> Expr:
    """What logsumexp subtracts: the maximum, 0 for an infinite one (which is the result itself; a softmax is NaN then)."""
    largest = share(largest)
    finite = select(largest < const_like(math.inf, largest), largest, select(largest > 0.0, 0.0, largest))
    return share(select(largest > const_like(-math.inf, largest), finite, select(largest < 0.0, 0.0, largest)))
