"""How far a network of lower precision is from its source: measured on data like that it was calibrated with.

There is no bound that holds on any input: numbers outside of the ranges that were calibrated are clipped. The bound here is for inputs
like the calibration data, and on others nothing is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mlec.errors import ToleranceError
from mlec.frontends.base import Oracle
from mlec.ir.op import Array
from mlec.runtime import CompiledModel
from mlec.tolerance import Tolerance
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
    """
    found: dict[int, _Seen] = {}
    for batch in batches:
        theirs = oracle["run"](list(batch))
        for i, (wanted, got) in enumerate(zip(_arrays(theirs), compiled.run(list(batch)), strict=True)):
            found.setdefault(i, _Seen()).add(wanted, got)
    bound = tolerance or Tolerance()
    names = {i: "run" if len(found) == 1 else f"run {i}" for i in found}
    compared = {names[i]: seen.comparison(names[i], bound) for i, seen in found.items()}
    bad = [c for c in compared.values() if c.excess > 1] if tolerance is not None else []
    if bad:
        worst = max(bad, key=lambda c: c.excess)
        raise ToleranceError(
            f"the compiled model differs from its source by {worst.max_rel_error:.3g} of the largest result, beyond {tolerance}",
            code="E_PARITY",
            hint="for int8, calibrate with more data, or raise min_sqnr (passes='default,quantize-int8{min_sqnr = 30}') to keep more "
            "layers in float32; or allow more with tolerance=mlec.Tolerance(rtol=0.5)",
        )
    return {
        "tolerance": {"rtol": bound.rtol, "atol": bound.atol},
        "methods": {name: asdict(c) for name, c in compared.items()},
        "refused": "",
    }


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


class _Seen:
    """One output, batch after batch."""

    def __init__(self) -> None:
        self.rows = self.mismatches = self.count = 0
        self.largest = self.scale = self.total = 0.0

    def add(self, wanted: Array, got: Array) -> None:
        self.rows += len(wanted) if wanted.ndim else 1
        if wanted.dtype.kind not in "fV":
            self.mismatches += int((wanted != got).sum())
            return
        a, b = wanted.astype(np.float64), got.astype(np.float64)
        if a.ndim == 2 and a.shape[1] > 1 and a.size:
            self.mismatches += int((a.argmax(axis=1) != b.argmax(axis=1)).sum())
        finite = np.isfinite(a)  # where the source itself lost the result, there is nothing to compare with
        error = np.abs(np.where(np.isfinite(b), b, np.inf)[finite] - a[finite])
        self.count += error.size
        self.total += float(error.sum())
        self.largest = max(self.largest, float(error.max(initial=0.0)))
        self.scale = max(self.scale, float(np.abs(a[finite]).max(initial=0.0)))

    def comparison(self, name: str, tolerance: Tolerance) -> Comparison:
        bound = tolerance.rtol * self.scale + tolerance.atol
        return Comparison(
            name,
            self.rows,
            self.largest,
            self.largest / self.scale if self.scale else 0.0,
            self.total / self.count if self.count else 0.0,
            self.mismatches,
            excess=self.largest / bound if bound else 0.0,
        )
