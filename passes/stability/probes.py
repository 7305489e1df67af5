"""Inputs on which rounding shows: within the ranges, plain ones first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlec.ir import Graph, Value
from mlec.ir.dim import evaluate
from mlec.ir.extents import extents_near
from mlec.ir.op import Array
from mlec.passes.stability.intervals import Interval

ROWS = 2
"""Extent of symbolic dims in probes."""
FILLS = (
    0.0,
    100.0,
    -100.0,
    1.0,
    -1.0,
    10.0,
    -10.0,
    1e-4,
    1e-8,
    20.0,
    -20.0,
    50.0,
    -50.0,
    200.0,
    -200.0,
    1e-2,
    1e-6,
    1e-10,
)
SIZES = (1000.0, 100.0, 1.0, 10.0, 1e-3, 1e-6)
SPREADS = (1e-4, 1e-2, 1e-6)


@dataclass(frozen=True)
class Probe:
    """Arrays for the inputs of a graph, and in a few words what they are."""

    text: str
    arrays: tuple[Array, ...]


@dataclass(frozen=True)
class _Form:
    """How the numbers of one input are made: ``size * (base + spread * noise)``, or evenly from ``-size`` to ``size``."""

    size: float
    base: float = 1.0
    spread: float = 0.0
    ramp: bool = False

    def fill(self, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
        if self.ramp:
            return np.linspace(-self.size, self.size, max(1, int(np.prod(shape)))).reshape(shape)
        noise = self.spread * rng.standard_normal(shape) if self.spread else 0.0
        return np.asarray(np.full(shape, self.size) * (self.base + noise))

    def __str__(self) -> str:
        if self.ramp:
            return f"evenly from {-self.size:g} to {self.size:g}"
        if not self.spread:
            return f"{self.size:g} everywhere"
        return (
            f"{self.size:g} * (1 + {self.spread:g} * noise)" if self.base else f"random numbers of size {self.size:g}"
        )


def probes(graph: Graph, ranges: Mapping[Value, Interval], count: int, seed: int = 0) -> Iterator[Probe]:
    """Up to so many probes; the same ones in each run."""
    rng = np.random.default_rng(seed)
    forms = _forms(graph, ranges)
    for number in range(count):
        if number < len(forms):
            yield _probe(graph, ranges, [forms[number]] * len(graph.inputs), rng)
        else:  # each input by itself, which two inputs that differ in size need
            sizes = 10.0 ** rng.uniform(-6, 3, len(graph.inputs))
            kinds = rng.integers(0, 3, len(graph.inputs))
            made = [_random_form(float(size), int(kind), rng) for size, kind in zip(sizes, kinds, strict=True)]
            yield _probe(graph, ranges, made, rng)


def _random_form(size: float, kind: int, rng: np.random.Generator) -> _Form:
    sign = float(rng.choice([-1.0, 1.0]))
    return (_Form(sign * size), _Form(size, 0.0, 1.0), _Form(sign * size, 1.0, float(rng.choice(SPREADS))))[kind]


def _forms(graph: Graph, ranges: Mapping[Value, Interval]) -> list[_Form]:
    ends = [end for interval in ranges.values() for end in (interval.lo, interval.hi) if np.isfinite(end)]
    # A number that is added or subtracted somewhere is where a difference may vanish.
    numbers = [float(n.attrs["value"]) for n in graph.nodes if n.is_constant and isinstance(n.attrs["value"], float)]
    special = [sign * n for n in dict.fromkeys(numbers) if np.isfinite(n) for sign in (1.0, -1.0)][:16]
    fills = [_Form(v) for v in dict.fromkeys((*FILLS, *ends, *special)) if any(v in r for r in ranges.values())]
    near = [_Form(size, 1.0, spread) for spread in SPREADS for size in (1000.0, 100.0, 1.0)]
    ramps = [_Form(size, ramp=True) for size in SIZES[:4]]
    noise = [_Form(size, 0.0, 1.0) for size in SIZES]
    return [*fills[:4], *noise[:3], *ramps[:1], *near[:2], *fills[4:], *near[2:], *noise[3:], *ramps[1:]]


def _probe(graph: Graph, ranges: Mapping[Value, Interval], forms: Sequence[_Form], rng: np.random.Generator) -> Probe:
    binding = extents_near(graph, ROWS)
    arrays, words = [], []
    for value, form in zip(graph.inputs, forms, strict=True):
        shape = tuple(evaluate(dim, binding) for dim in value.type.shape)
        interval, dtype = ranges[value], value.type.dtype
        numbers = np.clip(form.fill(shape, rng), interval.lo, interval.hi)
        if dtype.is_bool:
            numbers = numbers > 0
        elif dtype.is_int:
            numbers = np.clip(np.rint(numbers), np.ceil(interval.lo), np.floor(interval.hi))
        arrays.append(_within(numbers, dtype.numpy))
        words.append(f"{value.hint or 'input'}: {_shown(arrays[-1], form)}")
    return Probe("; ".join(words), tuple(arrays))


def _within(numbers: Array, dtype: np.dtype[Any]) -> Array:
    """In the element type, whose largest number may be less than the range allows."""
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return np.asarray(np.clip(numbers, float(limits.min), np.nextafter(float(limits.max), 0.0)), dtype)
    if dtype.kind == "f":
        numbers = np.clip(numbers, -np.finfo(dtype).max, np.finfo(dtype).max)
    return np.asarray(numbers, dtype)


def _shown(array: Array, form: _Form) -> str:
    if array.size and bool(np.all(array == array.flat[0])):
        return f"{array.flat[0]:.6g} everywhere" if array.dtype.kind != "b" else f"{bool(array.flat[0])} everywhere"
    return str(form)
