"""How far results may move, and whether two graphs keep to it: a pass says it of itself, validation asks it of a compiled model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlec.errors import ToleranceError
from mlec.ir import Graph, run_graph
from mlec.ir.dim import evaluate
from mlec.ir.extents import extents_near
from mlec.ir.op import Array


@dataclass(frozen=True)
class Tolerance:
    """How far results may move: ``|actual - expected| <= rtol * scale + atol``, scale being the largest finite magnitude expected.

    ``rtol = atol = 0`` means equal bit for bit (any NaN equals any NaN), zeros included unless ``signed_zeros`` is False.
    NaN and infinities must be where they were, unless ``specials`` is False: then anything may have taken their place, or come of them.
    ``roundings`` is for graphs with floats of 16 bits: so many units in their last place, relative to the scale, come on top there, as
    what is computed in another way is rounded in other places. See `on`.
    """

    rtol: float = 0.0
    atol: float = 0.0
    signed_zeros: bool = True
    specials: bool = True
    roundings: float = 0.0

    def then(self, later: Tolerance) -> Tolerance:
        """The bound of two steps in a row."""
        kept = self.signed_zeros and later.signed_zeros, self.specials and later.specials
        return Tolerance(self.rtol + later.rtol, self.atol + later.atol, *kept, self.roundings + later.roundings)

    def on(self, graph: Graph) -> Tolerance:
        """The bound for one graph, in which the roundings of its coarsest floats of 16 bits are part of ``rtol``."""
        types = {v.type.dtype for v in graph.inputs} | {v.type.dtype for n in graph.nodes for v in n.outputs}
        eps = max((dtype.eps for dtype in types if dtype.is_float and dtype.bits < 32), default=0.0)
        return replace(self, rtol=self.rtol + self.roundings * eps, roundings=0.0)

    @property
    def is_exact(self) -> bool:
        return not (self.rtol or self.atol or self.roundings)

    def excess(self, expected: Array, actual: Array) -> float:
        """Largest deviation in units of the bound: at most 1.0 is fine; ``inf`` for a NaN or infinity in the wrong place."""
        if expected.shape != actual.shape or expected.dtype != actual.dtype:
            return float("inf")
        if expected.dtype.kind not in "fV":
            return 0.0 if np.array_equal(expected, actual) else float("inf")
        wanted, got = expected.astype(np.float64), actual.astype(np.float64)
        finite = np.isfinite(wanted)
        if not self.specials:
            got = np.where(finite, got, wanted)
        if not np.array_equal(
            np.where(finite, 0, wanted), np.where(finite, np.where(np.isfinite(got), 0, np.inf), got), equal_nan=True
        ):
            return float("inf")
        difference = np.max(np.abs(got[finite] - wanted[finite]), initial=0.0)
        scale = np.max(np.abs(wanted[finite]), initial=0.0)
        bound = self.rtol * scale + self.atol
        return float(difference / bound) if bound else (float("inf") if difference else 0.0)

    def moves_zeros(self, expected: Array, actual: Array) -> bool:
        """Whether a zero has another sign although this tolerance keeps them."""
        if not (self.is_exact and self.signed_zeros and expected.dtype.kind in "fV"):
            return False
        zeros = (expected == 0) & (actual == 0)
        return bool((np.signbit(expected) != np.signbit(actual))[zeros].any())

    def __str__(self) -> str:
        if not self.is_exact:
            narrow = f", and {self.roundings:g} roundings of 16 bits" if self.roundings else ""
            return f"approx(rtol={self.rtol:g}, atol={self.atol:g}{narrow})"
        return "exact" if self.signed_zeros else "exact but for the sign of zero"


EXACT = Tolerance()
ANOTHER_ORDER = Tolerance(roundings=2)
"""What a sum in another order does to numbers of 16 bits: now and then one is rounded to a neighbour."""


def ulp(k: float) -> Tolerance:
    """k units in the last place of float32, relative to the output's scale."""
    return Tolerance(rtol=k * 2.0**-23)


def approx(rtol: float, atol: float = 0.0, roundings: float = 0.0) -> Tolerance:
    return Tolerance(rtol, atol, roundings=roundings)


def check_equal(before: Graph, after: Graph, tolerance: Tolerance, place: str, seeds: Sequence[int] = (0, 1)) -> None:
    """Runs both graphs on random inputs, plain ones and such with each kind of special values among them.

    Raises:
        ToleranceError: with the output, the deviation and the bound.
    """
    if not tolerance.is_exact:
        tolerance = tolerance.then(ANOTHER_ORDER).on(before)
    for seed in seeds:
        for kind, special in SPECIAL_VALUES.items():
            if not (tolerance.specials or np.isfinite(special).all()):
                continue
            rng = np.random.default_rng(seed)
            inputs = random_inputs(before, rng, extents_near(before, 3 - seed), special)
            wanted, got = run_graph(before, inputs), run_graph(after, inputs)
            for i, (a, b) in enumerate(zip(wanted, got, strict=True)):
                excess = tolerance.excess(a, b)
                if excess > 1:
                    change = f"by {excess:.3g} times its tolerance ({tolerance})"
                elif tolerance.moves_zeros(a, b):
                    change = f"in the sign of a zero, which its tolerance ({tolerance}) keeps"
                else:
                    continue
                raise ToleranceError(
                    f"{place} changed output {i} {change}",
                    hint="run with verify='structure' to see the graph it made",
                    notes=(f"inputs: {kind}, seed {seed}",),
                )


SPECIAL_VALUES: dict[str, tuple[float, ...]] = {
    "random numbers": (),
    "with NaN": (np.nan,),
    "with infinities": (np.inf, -np.inf),
    "with zeros and denormals": (0.0, -0.0, 1e-40, -1e-40, 2.0**-140, 1e-310, 2.0**-20),
}
"""What `check_equal` puts among the numbers of its inputs, one kind at a time so that none hides another. Of the denormals each is
one of another type: 2**-20 of f16, 1e-40 of f32 and bf16, 1e-310 of f64."""


def random_inputs(
    graph: Graph, rng: np.random.Generator, binding: Mapping[str, int], special: Sequence[float] = ()
) -> list[Array]:
    """Random arrays that fit the graph's inputs: normal floats, small non-negative integers.

    With special values, a tenth of the floats, and at least one of each input, are some of these.
    """
    arrays: list[Array] = []
    for value in graph.inputs:
        shape = tuple(evaluate(d, binding) for d in value.type.shape)
        dtype = value.type.dtype
        if dtype.is_float:
            array = rng.normal(size=shape)
            if special and array.size:
                places = rng.choice(array.size, max(1, array.size // 10), replace=False)
                array.flat[places] = rng.choice(special, len(places))
            arrays.append(array.astype(dtype.numpy))
        elif dtype.is_bool:
            arrays.append(rng.random(shape) < 0.5)
        else:
            arrays.append(rng.integers(0, 4, shape).astype(dtype.numpy))
    return arrays
