"""Layer, root-mean-square and group normalisation: each line is read twice or three times from L1 and written once.

Of an element of float32, 4 bytes come from memory and 4 go there. The mean takes an addition, the variance a subtraction and a
multiply-add, the result three operations more (scale and bias included): at 6 to 8 for 8 bytes all of it waits for memory as soon as
the tensor is larger than L2, and for L1 before that, from which a vector is loaded three times and the factors once. The sums go over
`FoldSchedule.vectors` partial sums: one alone would add a vector in the 4 cycles that an addition takes, four add one a cycle, which is
half of what L1 gives. Lines longer than L1 are read from L2 twice more; they are rare, and a sum of squares in the same pass as the mean
would cancel where the mean is large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import IDENTITY, BufferSpec, Dim, Epilogue, Expr, Prologue
from mlec.backends.tvm.kernels.schedule import FoldSchedule
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
from mlec.backends.tvm.kernels.vector import cast_to, const, load, ramp, share, store
from mlec.backends.tvm.target import TargetInfo

DEFAULT = FoldSchedule(4)
"""Partial sums hide the latency of additions."""


def line_schedules(length: Dim, dtype: str, target: TargetInfo) -> Iterator[FoldSchedule]:
    """Candidates for lines, or groups, of so many elements."""
    return FoldSchedule.candidates(DEFAULT.vectors, length, target.lanes(bits(accumulator_dtype(dtype))))


def layer_norm(
    x_shape: Sequence[Dim],
    axis: int,
    eps: float,
    dtype: str,
    target: TargetInfo,
    epilogue: Epilogue = IDENTITY,
    name: str = "layer_norm",
    schedule: FoldSchedule = DEFAULT,
    prologue: Prologue | None = None,
) -> tirx.PrimFunc:
    """``y = (x - mean) / sqrt(variance + eps) * scale + bias`` over the axes from ``axis`` on.

    Parameters of the program: x, scale and bias (shape of those axes), the epilogue's inputs, y. Extents may be symbolic.

    With a ``prologue``, x is what it computes from its own inputs, which take the place of x among the parameters. Only the last axis can
    be normalised then, and y has the type of x: each line of x is computed once, and waits in y.
    """
    return _line_norm(x_shape, axis, eps, dtype, target, epilogue, True, name, schedule, prologue)


def rms_norm(
    x_shape: Sequence[Dim],
    axis: int,
    eps: float,
    dtype: str,
    target: TargetInfo,
    epilogue: Epilogue = IDENTITY,
    name: str = "rms_norm",
    schedule: FoldSchedule = DEFAULT,
    prologue: Prologue | None = None,
) -> tirx.PrimFunc:
    """``y = x / sqrt(mean(x²) + eps) * scale`` over the axes from ``axis`` on, see `layer_norm`. Parameters: x, scale, extra, y."""
    return _line_norm(x_shape, axis, eps, dtype, target, epilogue, False, name, schedule, prologue)


def _line_norm(
    x_shape: Sequence[Dim],
    axis: int,
    eps: float,
    dtype: str,
    target: TargetInfo,
    epilogue: Epilogue,
    centred: bool,
    name: str,
    schedule: FoldSchedule,
    prologue: Prologue | None,
) -> tirx.PrimFunc:
    acc = accumulator_dtype(dtype)
    lanes = target.lanes(bits(acc))
    axis %= len(x_shape)
    rows, length = product(x_shape[:axis]), product(x_shape[axis:])

    with prim_func(name, noalias=False) as kernel:
        specs = prologue.inputs if prologue else (BufferSpec(x_shape, dtype),)
        sources = tuple(parameter(f"x{i}", spec) for i, spec in enumerate(specs))
        factors = [parameter(label, BufferSpec(x_shape[axis:], dtype)) for label in ("scale", "bias")[: 1 + centred]]
        extra = epilogue_parameters(epilogue)
        out_dtype = epilogue.out_dtype or dtype
        y_arg = parameter("y", BufferSpec(x_shape, out_dtype))
        y = flat_view(y_arg, (rows, length), out_dtype)
        x = y if prologue else flat_view(sources[0], (rows, length), dtype)
        scale, *bias = (flat_view(buffer, (length,), dtype) for buffer in factors)

        def row(i: Expr) -> None:
            def value(start: Expr, width: int) -> Expr:
                return cast_to(acc, load(x, [i, start], width))

            def made(start: Expr, width: int) -> Expr:
                assert prologue is not None
                computed = share(prologue.value((*unflatten(i, x_shape[:-1]), start), width, sources))
                store(y, computed, [i, start])
                return cast_to(acc, computed)

            first = iter([made] if prologue else [])

            def visit(fold: Fold, term: Callable[[Expr], Expr]) -> None:
                element = next(first, value)
                fold.over(length, lambda start, width: term(element(start, width)))

            mean, inverse = statistics(length, lanes, acc, eps, centred, visit, schedule.vectors)

            def put(start: Expr, width: int) -> None:
                normal = (value(start, width) - mean if centred else value(start, width)) * inverse
                done = normal * cast_to(acc, load(scale, [start], width))
                if bias:
                    done = done + cast_to(acc, load(bias[0], [start], width))
                where: tuple[Expr, ...] = ()
                if epilogue.inputs:
                    first = unflatten(i * length + start, x_shape)
                    where = (*first[:-1], ramp(first[-1], width))
                store(y, cast_to(out_dtype, epilogue.apply(share(done), where, extra)), [i, start])

            vector_loop(length, lanes, put)

        parallel_if_large(rows, 12 * length * bits(acc) // 32, row)
    return kernel.func


def group_norm(
    x_shape: Sequence[Dim],
    groups: int,
    eps: float,
    dtype: str,
    target: TargetInfo,
    name: str = "group_norm",
    schedule: FoldSchedule = DEFAULT,
) -> tirx.PrimFunc:
    """``y = (x - mean) / sqrt(variance + eps) * scale + bias`` over each group of channels of ``x[n, c, *space]``.

    Parameters of the program: x, scale[c], bias[c], y. The batch and spatial extents may be symbolic.
    """
    acc = accumulator_dtype(dtype)
    lanes = target.lanes(bits(acc))
    n, c, *space = x_shape
    size, per_group = product(space), c // groups

    with prim_func(name) as kernel:
        x_arg = parameter("x", BufferSpec(x_shape, dtype))
        scale, bias = (parameter(label, BufferSpec((c,), dtype)) for label in ("scale", "bias"))
        y_arg = parameter("y", BufferSpec(x_shape, dtype))
        x, y = (flat_view(b, (product((n, groups)), per_group * size), dtype) for b in (x_arg, y_arg))

        def group(i: Expr) -> None:
            def value(start: Expr, width: int) -> Expr:
                return cast_to(acc, load(x, [i, start], width))

            length = per_group * size
            mean, inverse = statistics(
                length, lanes, acc, eps, True, lambda fold, term: fold.over(length, lambda s, w: term(value(s, w))),
                schedule.vectors,
            )  # fmt: skip
            with T.serial(per_group) as j:
                channel = share(i % groups * per_group + j)
                factor = share(cast_to(acc, scale[channel]) * inverse)
                shift = share(cast_to(acc, bias[channel]))

                def put(start: Expr, width: int) -> None:
                    at = j * size + start
                    store(y, cast_to(dtype, (value(at, width) - mean) * factor + shift), [i, at])

                vector_loop(size, lanes, put)

        parallel_if_large(product((n, groups)), 12 * per_group * size * bits(acc) // 32, group, groups)
    return kernel.func


def statistics(
    length: Dim,
    lanes: int,
    dtype: str,
    eps: float,
    centred: bool,
    visit: Callable[[Fold, Callable[[Expr], Expr]], None],
    partials: int,
) -> tuple[Expr, Expr]:
    """Mean (0 if not ``centred``) and ``1 / sqrt(variance + eps)``; ``visit(fold, term)`` feeds term of each element.

    Sums are kept as so many ``partials``, see `Fold`.
    """
    count = cast_to(dtype, length if not isinstance(length, int) else const(length, dtype))

    def add(a: Expr, b: Expr) -> Expr:
        return a + b

    mean = const(0, dtype)
    if centred:
        total = Fold(lanes, dtype, 0, add, partials)
        visit(total, lambda value: value)
        mean = share(total.result() / count)

    def square(value: Expr) -> Expr:
        difference = share(value - mean if centred else value)
        return difference * difference

    squares = Fold(lanes, dtype, 0, add, partials)
    visit(squares, square)
    return mean, share(const(1, dtype) / tirx.sqrt(squares.result() / count + const(eps, dtype)))
