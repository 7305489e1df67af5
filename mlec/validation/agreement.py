"""How far a network of lower precision is from its source: measured on data like that it was calibrated with.

There is no bound that holds on any input: numbers outside of the ranges that were calibrated are clipped. The bound here is for inputs
like the calibration data, and on others nothing is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mlec.difference import Difference
from mlec.errors import ToleranceError
from mlec.frontends.base import Oracle
from mlec.ir.op import Array
from mlec.runtime import CompiledModel
from mlec.tolerance import Tolerance
from mlec.validation.answers import answer, unheard
from mlec.validation.differential import Comparison
from mlec.validation.probes import probe_inputs

INT8 = Tolerance(rtol=0.2, atol=1e-3, signed_zeros=False, specials=False)
"""The declared bound of int8; what is measured is mostly a tenth of that."""
BF16 = Tolerance(rtol=0.05, atol=1e-3, signed_zeros=False, specials=False)
FP16 = Tolerance(rtol=0.01, atol=1e-4, signed_zeros=False, specials=False)
LOWERED = {"int8": INT8, "bf16": BF16, "fp16": FP16}
"""By precision, the bound on results for inputs like the calibration data or the examples."""


def measured(
    compiled: CompiledModel, oracle: Oracle, batches: Sequence[Sequence[Any]], tolerance: Tolerance | None
) -> dict[str, Any]:
    """Compares all outputs, and the label that is the largest of a row.

    Args:
        compiled: the network.
        oracle: the source's functions.
        batches: inputs, as the source takes them.
        tolerance: the bound; None refuses nothing.

    Returns:
        For the report, as `validation.validate`: ``label_mismatches`` are rows of an output whose largest element is another one.

    Raises:
        ToleranceError: a difference beyond the bound.
        UsageError: the source fails on a batch.
    """
    found: dict[int, Difference] = {}
    for batch in batches:
        with unheard(oracle):
            theirs = answer(oracle, ("run",), list(batch)).wanted["run"]
        for i, (wanted, got) in enumerate(zip(_arrays(theirs), compiled.run(list(batch)), strict=True)):
            found.setdefault(i, Difference()).add(wanted, got)
    bound = tolerance or Tolerance()
    names = {i: "run" if len(found) == 1 else f"run {i}" for i in found}
    compared = {names[i]: _comparison(names[i], seen, bound) for i, seen in found.items()}
    bad = [c for c in compared.values() if c.excess > 1] if tolerance is not None else []
    if bad:
        worst = max(bad, key=lambda c: c.excess)
        raise ToleranceError(
            f"the compiled model differs from its source by {worst.max_rel_error:.3g} of the largest result, beyond {tolerance}",
            code="E_PARITY",
            hint=f"{_remedy(compiled.report.model.get('precision'))}; or allow more with tolerance=mlec.Tolerance(rtol=0.5)",
        )
    return {
        "tolerance": {"rtol": bound.rtol, "atol": bound.atol},
        "methods": {name: asdict(c) for name, c in compared.items()},
        "refused": "",
    }


def _remedy(precision: str) -> str:
    """What brings a network nearer to its source."""
    if precision == "int8":
        return (
            "calibrate with more data: the examples are unlike it; or raise min_sqnr "
            "(passes='default,quantize-int8{min_sqnr = 30}') to keep more layers in float32"
        )
    wider = "the network magnifies the rounding of weights: "
    wider += (
        "bf16 holds larger numbers, fp32 has more digits"
        if precision == "fp16"
        else "fp16 has more digits, fp32 more still"
    )
    return f"{wider}; mixed-precision{{dtype = {precision}, min_weights = 1000000}} rounds large weights only"


def verified(
    compiled: CompiledModel, oracle: Oracle, given: Sequence[Any] | None, recorded: Mapping[str, Any]
) -> dict[str, Any]:
    """Compares a network that was compiled before: on inputs like the calibration data, with the bound that was recorded then; without
    such, on random ones, for which there is no bound.

    Raises:
        ToleranceError: as `measured`.
    """
    if given is not None:
        bound = recorded.get("tolerance") or {"rtol": INT8.rtol, "atol": INT8.atol}
        return measured(compiled, oracle, [given], Tolerance(bound["rtol"], bound["atol"]))
    made = probe_inputs(compiled.graph)
    return measured(compiled, oracle, [] if made is None else [made], None)


def _arrays(results: Any) -> list[Array]:
    return [np.asarray(r) for r in results] if isinstance(results, (list, tuple)) else [np.asarray(results)]


def _comparison(name: str, seen: Difference, tolerance: Tolerance) -> Comparison:
    bound = tolerance.rtol * seen.scale + tolerance.atol
    return Comparison(
        name,
        seen.rows,
        seen.largest,
        seen.largest / seen.scale if seen.scale else 0.0,
        seen.total / seen.count if seen.count else 0.0,
        seen.changed,
        excess=seen.largest / bound if bound else 0.0,
    )
