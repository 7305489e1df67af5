"""Reductions over any axes of a compact tensor, with numpy's treatment of NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import IDENTITY, BufferSpec, Dim, Epilogue, Expr, Prologue
from mlec.backends.tvm.kernels.tile import (
    Fold,
    accumulator_dtype,
    bits,
    epilogue_parameters,
    flat_view,
    parallel_if_large,
    parameter,
    product,
    unflatten,
    vector_loop,
)
from mlec.backends.tvm.kernels.vector import (
    Cell,
    cast_to,
    const,
    is_nan,
    lanes_of,
    load,
    maximum,
    minimum,
    ramp,
    select,
    share,
    store,
)
from mlec.backends.tvm.target import TargetInfo

FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Reduction:
    """How two partial results become one, and the value that changes nothing."""

    combine: Callable[[Expr, Expr], Expr]
    identity: Callable[[str], float]


def _lowest(dtype: str) -> float:
    return -math.inf if dtype in FLOATS else 0 if dtype.startswith("u") else -(2 ** (bits(dtype) - 1))


def _highest(dtype: str) -> float:
    return math.inf if dtype in FLOATS else 2 ** (bits(dtype) - (0 if dtype.startswith("u") else 1)) - 1


REDUCTIONS = {
    "sum": Reduction(lambda a, b: a + b, lambda dtype: 0),
    "mean": Reduction(lambda a, b: a + b, lambda dtype: 0),
    "prod": Reduction(lambda a, b: a * b, lambda dtype: 1),
    "max": Reduction(maximum, _lowest),
    "min": Reduction(minimum, _highest),
    "any": Reduction(maximum, lambda dtype: 0),
    "all": Reduction(minimum, lambda dtype: 1),
}


def reduce(
    op: str,
    x_shape: Sequence[Dim],
    axes: Sequence[int],
    keepdims: bool,
    dtype: str,
    target: TargetInfo,
    epilogue: Epilogue = IDENTITY,
    prologue: Prologue | None = None,
    name: str = "reduce",
) -> tirx.PrimFunc:
    """``y = epilogue(op(x, axes))`` for ``op`` in `REDUCTIONS`. Any extent may be symbolic. Parameters: x, extra, y.

    With a ``prologue``, x is what it computes from its own inputs, which take the place of x among the parameters.

    If the last axis is reduced, each result is one `Fold` along memory. If it is kept, vectors run along it and every lane
    is a result of its own, summed in the order of memory.
    """
    rule = REDUCTIONS[op]
    acc = "int8" if dtype == "bool" else accumulator_dtype(dtype)
    dims = _collapse(x_shape, axes, merge=prologue is None)
    y_shape = reduced_shape(x_shape, axes, keepdims)
    inner_kept = not dims[-1][1]
    inner = dims[-1][0]
    kept = [extent for extent, reduced in dims[: len(dims) - inner_kept] if not reduced]
    summed = [extent for extent, reduced in dims if reduced]
    lanes = target.lanes(bits(acc))
    count = product(summed)

    with prim_func(name) as kernel:
        specs = prologue.inputs if prologue else (BufferSpec(x_shape, dtype),)
        sources = tuple(parameter(f"x{i}", spec) for i, spec in enumerate(specs))
        extra = epilogue_parameters(epilogue)
        out_dtype = epilogue.out_dtype or dtype
        y_arg = parameter("y", BufferSpec(y_shape, out_dtype))
        # Booleans are bytes in memory; a vector of them is loaded as such.
        held = "int8" if dtype == "bool" else dtype
        x = None if prologue else flat_view(sources[0], [extent for extent, _ in dims], held)

        def read(where: list[Expr], width: int) -> Expr:
            if prologue:
                return cast_to(acc, prologue.value(tuple(where), width, sources))
            return cast_to(acc, load(x, where, width))

        y = flat_view(y_arg, (product(kept), inner) if inner_kept else (product(kept), 1), out_dtype)

        def at(kept_where: Sequence[Expr], summed_where: Sequence[Expr]) -> list[Expr]:
            """Indices into x, less the last."""
            kept_left, summed_left = list(kept_where), list(summed_where)
            return [summed_left.pop(0) if reduced else kept_left.pop(0) for _, reduced in dims[:-1]]

        def finish(row: Expr, column: Expr, value: Expr) -> None:
            if op == "mean":
                value = share(value / cast_to(acc, count if not isinstance(count, int) else const(count, acc)))
            where: tuple[Expr, ...] = ()
            if epilogue.inputs:
                first = unflatten(row * inner + column if inner_kept else row, y_shape)
                where = (*first[:-1], ramp(first[-1], lanes_of(value))) if first else ()
            store(y, cast_to(out_dtype, epilogue.apply(value, where, extra)), [row, column])

        def along_memory(row: Expr) -> None:
            where = unflatten(row, kept)
            fold = Fold(lanes, acc, rule.identity(acc), rule.combine)
            with _loops(summed[:-1]) as outer:
                fold.over(inner, lambda start, width: read([*at(where, outer), start], width))
            finish(row, 0, fold.result())

        def across_memory(row: Expr) -> None:
            where = unflatten(row, kept)

            def column(start: Expr, width: int) -> None:
                cell = Cell(acc, width, rule.identity(acc))
                with _loops(summed) as outer:
                    value = share(read([*at(where, outer), start], width))
                    cell.set(rule.combine(cell.value, value))
                finish(row, start, cell.value)

            vector_loop(inner, lanes, column)

        static = [extent for extent in (*summed, inner if inner_kept else 1) if isinstance(extent, int)]
        work = math.prod(static) * bits(acc) // 16
        parallel_if_large(product(kept), work, across_memory if inner_kept else along_memory)
    return kernel.func


def arg_reduce(
    op: str,
    x_shape: Sequence[Dim],
    axis: int,
    keepdims: bool,
    dtype: str,
    target: TargetInfo,
    name: str = "arg_reduce",
) -> tirx.PrimFunc:
    """``y`` = int64 index of the first maximum (``op = "argmax"``) or minimum along an axis; the first NaN wins."""
    acc = accumulator_dtype(dtype)
    axis %= len(x_shape)
    outer, length, inner = product(x_shape[:axis]), x_shape[axis], product(x_shape[axis + 1 :])
    lanes = target.lanes(64)

    with prim_func(name) as kernel:
        x_arg = parameter("x", BufferSpec(x_shape, dtype))
        y_arg = parameter("y", BufferSpec(reduced_shape(x_shape, (axis,), keepdims), "int64"))
        x = flat_view(x_arg, (outer, length, inner), dtype)
        y = flat_view(y_arg, (outer, inner), "int64")

        def row(i: Expr) -> None:
            def column(start: Expr, width: int) -> None:
                best = Cell(acc, width, cast_to(acc, load(x, [i, 0, start], width)))
                where = Cell("int64", width, 0)
                with T.serial(1, length) as k:
                    value = share(cast_to(acc, load(x, [i, k, start], width)))
                    one, zero = const(1, "int32", width), const(0, "int32", width)
                    gain = select(value > best.value if op == "argmax" else value < best.value, one, zero)
                    if acc in FLOATS:
                        gain = select(is_nan(best.value), zero, select(is_nan(value), one, gain))
                    gain = share(gain)
                    wins = gain > zero
                    where.set(select(wins, cast_to("int64", k), where.value))
                    best.set(select(wins, value, best.value))
                store(y, where.value, [i, start])

            vector_loop(inner, lanes, column)

        element = 256 if isinstance(inner, int) and inner == 1 else 32  # one after the other, or some in a vector
        work = math.prod(extent for extent in (length, inner) if isinstance(extent, int)) * element
        parallel_if_large(outer, work, row)
    return kernel.func


def reduced_shape(shape: Sequence[Dim], axes: Sequence[int], keepdims: bool) -> tuple[Dim, ...]:
    """Shape after a reduction."""
    gone = {axis % len(shape) for axis in axes}
    if keepdims:
        return tuple(1 if i in gone else extent for i, extent in enumerate(shape))
    return tuple(extent for i, extent in enumerate(shape) if i not in gone)


def _collapse(shape: Sequence[Dim], axes: Sequence[int], merge: bool = True) -> list[tuple[Dim, bool]]:
    """Runs of axes of one kind as ``(extent, reduced)``; each axis by itself unless they may ``merge``."""
    gone = {axis % len(shape) for axis in axes}
    dims: list[tuple[Dim, bool]] = []
    for i, extent in enumerate(shape):
        if merge and dims and dims[-1][1] == (i in gone):
            dims[-1] = (dims[-1][0] * extent, i in gone)
        else:
            dims.append((extent, i in gone))
    return dims


@contextmanager
def _loops(extents: Sequence[Dim]) -> Iterator[list[Expr]]:
    """Nested serial loops."""
    with ExitStack() as stack:
        yield [stack.enter_context(T.serial(extent)) for extent in extents]
