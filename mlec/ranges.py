"""Between which numbers the inputs of a model lie: as the user says, and as the examples show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlec.errors import MlecError, UsageError
from mlec.runtime.edge import Edge
from mlec.signature import Signature

Ranges = dict[str, tuple[float, float]]


def ranges_of(signature: Signature, examples: Sequence[Any] | None, given: object) -> tuple[Ranges, Ranges]:
    """Smallest and largest number by the name of an input: what is given, and what the finite numbers of the examples are.

    Args:
        signature: of the model.
        examples: the user's inputs.
        given: a mapping, ``"examples"`` for those of the examples, or None.

    Raises:
        UsageError: ``given`` is something else, or says nothing of this model.
    """
    seen = _of_examples(signature, examples)
    if given is None:
        return {}, seen
    if given == "examples":
        if not seen:
            raise UsageError("input_ranges='examples' without examples", hint="pass example_inputs (--example)")
        return seen, seen
    if not isinstance(given, Mapping):
        raise UsageError(
            f'input_ranges takes a mapping or "examples", got {given!r}',
            hint='for example input_ranges={"x": (0, 255)}',
        )
    names = [spec.name for spec in signature.inputs]
    if unknown := [name for name in given if name not in names]:
        raise UsageError(
            f"input_ranges: there is no input {unknown[0]!r}", hint=f"the inputs are: {', '.join(map(str, names))}"
        )
    return {name: _bounds(name, bounds) for name, bounds in given.items()}, seen


def _bounds(name: str, bounds: Any) -> tuple[float, float]:
    try:
        least, most = map(float, bounds)
    except (TypeError, ValueError):
        least, most = 1.0, 0.0
    if not least <= most:  # nor is NaN
        raise UsageError(
            f"input_ranges: {name!r} takes its smallest and its largest number, got {bounds!r}",
            hint="for example (0, 255)",
        )
    return least, most


def _of_examples(signature: Signature, examples: Sequence[Any] | None) -> Ranges:
    if not examples:
        return {}
    try:
        arrays = Edge(signature).read(list(examples))
    except MlecError:  # what does not fit is an error of validation, or goes unnoticed without
        return {}
    found = {}
    for spec, array in zip(signature.inputs, arrays, strict=True):
        if array.dtype.kind not in "fiu":
            continue
        numbers = array[np.isfinite(array)]
        if numbers.size:
            found[spec.name] = float(numbers.min()), float(numbers.max())
    return found
