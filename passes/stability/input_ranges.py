"""Between which numbers the inputs of a graph lie: as given, as in the examples, or by their element types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mlec.ir import DType, Graph, Value
from mlec.passes.stability.intervals import Interval

ASSUMED = 1000.0
"""Magnitude of floats of which nothing else is known: enough for what overflows without reason, and not for every square."""
ASSUMED_INTEGERS = 1_000_000.0


@dataclass(frozen=True)
class InputRange:
    """Where the elements of an input lie, and who says so."""

    interval: Interval
    origin: Literal["given", "assumed"]


def input_ranges(
    graph: Graph, given: Mapping[str, tuple[float, float]], seen: Mapping[str, tuple[float, float]]
) -> dict[Value, InputRange]:
    """The range of each input.

    Args:
        graph: whose inputs.
        given: smallest and largest number by the name of an input, or of the only one by ``""``.
        seen: the same of examples, which tell the sign but not how large numbers can become.
    """
    found = {}
    for value, spec in zip(graph.inputs, graph.signature.inputs, strict=True):
        bounds = given.get(spec.name, spec.limits)
        if bounds is not None:
            found[value] = InputRange(Interval(float(bounds[0]), float(bounds[1])), "given")
        else:
            found[value] = InputRange(_assumed(value.type.dtype, seen.get(spec.name)), "assumed")
    return found


def _assumed(dtype: DType, seen: tuple[float, float] | None) -> Interval:
    if dtype.is_bool:
        return Interval(0.0, 1.0)
    least, most = (-ASSUMED, ASSUMED) if dtype.is_float else (-ASSUMED_INTEGERS, ASSUMED_INTEGERS)
    if seen is not None:
        low, high = seen
        most = max(most, high)
        least = min(low, least) if low < 0 else 0.0 if low == 0 else low / ASSUMED  # positive numbers stay positive
        most = most if high > 0 else 0.0 if high == 0 else high / ASSUMED
    if dtype.is_int:
        limits = np.iinfo(dtype.numpy)
        least, most = max(float(np.floor(least)), float(limits.min)), min(float(np.ceil(most)), float(limits.max))
    return Interval(least, most)
