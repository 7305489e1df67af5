"""``python -m bench.accuracy``: the largest errors of the elementary functions of kernels, in units in the last place.

In float32 of every so many-th of all numbers there are (``--every 1``: minutes for each function), in float64 of random ones. The unit is
that of the correctly rounded result, the reference float64, or the machine's long double.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from scipy import special

import mlec.backends.tvm.scalar  # noqa: F401  (fills the table)
from mlec.backends.tvm.backend import cpu_info
from mlec.backends.tvm.compat import IRModule, T, prim_func, tvm
from mlec.backends.tvm.kernels import mathlib
from mlec.backends.tvm.kernels.epilogue import BufferSpec, Expr
from mlec.backends.tvm.kernels.tile import parameter
from mlec.backends.tvm.kernels.vector import load, store
from mlec.backends.tvm.pipeline import compile_for_cpu
from mlec.backends.tvm.registry import find
from mlec.backends.tvm.target import TargetInfo
from mlec.errors import MlecError
from mlec.processor import needed_flags, what_is_missing
from mlec.target import Target

Array = NDArray[Any]

BLOCK = 1 << 16
"""Numbers of a call."""

RANGES = (1.0, 12.0, 120.0, 760.0)
"""Random numbers up to these are taken of float64, beside those of any exponent."""


@dataclass(frozen=True)
class Function:
    """One function of kernels.

    Attributes:
        ours: on expressions.
        reference: on arrays of a wider type.
        least: of x, the magnitude whose unit counts where the result is smaller.
    """

    ours: Callable[[Expr], Expr]
    reference: Callable[[Array], Array]
    least: Callable[[Array], Array] = np.zeros_like


def erf(x: Array) -> Array:
    """The error function, of float64 to float64's own accuracy, of a wider type to that of this."""
    if x.dtype == np.float64:
        return np.asarray(special.erf(x))
    # 2 / sqrt(pi) e**-x² (x + 2 x³ / 3 + 4 x⁵ / 15 + ...): all terms are of one sign.
    a = np.minimum(np.abs(x), 6.5)
    total = term = a
    for n in range(1, 150):
        term = term * (2 * a * a / (2 * n + 1))
        total = total + term
    return np.asarray(np.copysign(total * np.exp(-a * a) / np.sqrt(np.arctan(np.longdouble(1))), x))


def normal(x: Array) -> Array:
    """Of the normal distribution, the probability of a number below x."""
    return np.asarray(special.ndtr(x) if x.dtype == np.float64 else (1 + erf(x / np.sqrt(np.longdouble(2)))) / 2)


def half_of_negative(x: Array) -> Array:
    """``|x| / 2`` of negative x."""
    return np.where(x < 0, np.abs(x) / 2, 0)


def where_sigmoid_is_normal(x: Array) -> Array:
    """``|x|`` of those x whose sigmoid is not a normal number: where it counts as zero, so may silu."""
    return np.where(1 / (1 + np.exp(-x)) < np.finfo(x.dtype).tiny, np.abs(x), 0)


def where_exp_overflows(x: Array) -> Array:
    """1 where ``e ** -x`` is beyond the largest number of the type: there the sigmoid of libraries is 0, and ours."""
    return (-x > np.log(np.finfo(x.dtype).max)).astype(x.dtype)


def gelu_by_tanh(x: Array) -> Array:
    """The approximation of ``x Phi(x)``."""
    return x / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x * x * x)))


def scalar(op: str, *attributes: Any) -> Callable[[Expr], Expr]:
    """An elementwise op."""
    return lambda x: find(op, "scalar")(x, *attributes)


FUNCTIONS = {
    "exp": Function(mathlib.exp, np.exp),
    "expm1": Function(mathlib.expm1, np.expm1),
    "log": Function(mathlib.log, np.log),
    "log1p": Function(mathlib.log1p, np.log1p),
    "tanh": Function(mathlib.tanh, np.tanh),
    "sigmoid": Function(mathlib.sigmoid, lambda x: 1 / (1 + np.exp(-x)), where_exp_overflows),
    "softplus": Function(mathlib.softplus, lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))),
    "erf": Function(mathlib.erf, erf),
    "rsqrt": Function(scalar("rsqrt"), lambda x: 1 / np.sqrt(x)),
    "silu": Function(scalar("silu"), lambda x: x / (1 + np.exp(-x)), where_sigmoid_is_normal),
    "gelu": Function(mathlib.gelu, lambda x: np.where(np.isneginf(x), 0, x * normal(x)), half_of_negative),
    "gelu, by tanh": Function(scalar("gelu", "tanh"), gelu_by_tanh, half_of_negative),
}


@dataclass(frozen=True)
class Largest:
    """The largest error, in units in the last place, and where it is."""

    ulps: float = 0.0
    at: float = 0.0


def compiled(
    function: Callable[[Expr], Expr], dtype: str, n: int, lanes: int, target: TargetInfo
) -> Callable[[Array], Array]:
    """A callable that applies a function on expressions to arrays of n elements, a multiple of ``lanes``, so many at a time."""
    with prim_func("kernel") as kernel:
        x, y = (parameter(name, BufferSpec((n,), dtype)) for name in "xy")
        with T.serial(n // lanes) as i:
            store(y, function(load(x, [i * lanes], lanes)), [i * lanes])
    entry = compile_for_cpu(IRModule({"kernel": kernel.func}), target.tvm_target())["kernel"]

    def run(values: Array) -> Array:
        result = tvm.runtime.empty((n,), dtype)
        entry(tvm.runtime.tensor(values), result)
        return np.asarray(result.numpy())

    return run


def errors(function: Function, x: Array, got: Array) -> Array:
    """Of each element in units in the last place; infinite where NaN or an infinity is wrong or missing."""
    with np.errstate(all="ignore"):
        exact = function.reference(x.astype(np.longdouble if x.dtype == np.float64 else np.float64))
        wanted = exact.astype(x.dtype)
        off = np.abs(got - exact) / unit(np.maximum(np.abs(wanted), function.least(x)))
    usual = np.isfinite(off)
    if not usual.all():
        right = (got == wanted) | (np.isnan(got) & np.isnan(wanted))
        off[~usual] = np.where(right[~usual], 0, np.inf)
    return off.astype(np.float64)


def unit(magnitudes: Array) -> Array:
    """In the last place, of numbers from 0; as `numpy.spacing`, but in vectors."""
    info = np.finfo(magnitudes.dtype)
    integers = magnitudes.view(f"i{magnitudes.itemsize}")
    powers = np.maximum(integers >> info.nmant << info.nmant, info.tiny.view(integers.dtype)).view(magnitudes.dtype)
    return powers * info.eps


def largest_error(function: Function, dtype: str, blocks: Iterable[Array], target: TargetInfo) -> Largest:
    """Of all blocks, each of `BLOCK` numbers."""
    run = compiled(function.ours, dtype, BLOCK, target.lanes(np.dtype(dtype).itemsize * 8), target)
    found = Largest()
    for x in blocks:
        off = errors(function, x, run(x))
        if off.max() > found.ulps:
            found = Largest(float(off.max()), float(x[off.argmax()]))
    return found


def every_float32(step: int) -> Iterator[Array]:
    """Each so many-th of all bit patterns, NaN and infinities among them; the last block may begin anew."""
    for start in range(0, 1 << 32, step * BLOCK):
        yield np.arange(start, start + step * BLOCK, step, np.uint64).astype(np.uint32).view(np.float32)


def some_float64(count: int) -> Iterator[Array]:
    """Random numbers: half of them of any exponent, the others from `RANGES`; the same ones each time."""
    rng = np.random.default_rng(0)
    for _ in range(0, count, BLOCK):
        patterns = rng.integers(0, 1 << 64, BLOCK // 2, np.uint64).view(np.float64)
        yield np.concatenate([patterns, *(rng.uniform(-r, r, BLOCK // 2 // len(RANGES)) for r in RANGES)])


@click.command()
@click.argument("functions", nargs=-1, type=click.Choice(list(FUNCTIONS)))
@click.option("--every", default=331, show_default=True, help="Every so many-th float32.")
@click.option("--samples", default=1 << 20, show_default=True, help="Numbers of float64.")
@click.option("--processor", help="Code for this one, by LLVM's name; it has to run here.")
def main(functions: tuple[str, ...], every: int, samples: int, processor: str | None) -> None:
    """Prints a line for each function, or those that are named."""
    try:
        target = cpu_info(Target("cpu", (processor,) if processor else ()))
    except MlecError as error:
        raise click.BadParameter(str(error), param_hint="--processor") from error
    if missing := what_is_missing(needed_flags(target.triple, target.features)):
        raise click.BadParameter(f"code for {processor} does not run here: {missing}", param_hint="--processor")
    click.echo("| function | float32 | at | float64 | at |\n|---|---|---|---|---|")
    for name in functions or FUNCTIONS:
        single = largest_error(FUNCTIONS[name], "float32", every_float32(every), target)
        double = largest_error(FUNCTIONS[name], "float64", some_float64(samples), target)
        click.echo(f"| `{name}` | {single.ulps:.2f} | {single.at:.9g} | {double.ulps:.2f} | {double.at:.17g} |")


if __name__ == "__main__":
    main()
