"""Validates a compiled model against its source: on the user's examples, and on rows made to find differences."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlec.errors import ToleranceError
from mlec.frontends.base import Oracle
from mlec.ir import Graph
from mlec.ir.dtype import DType
from mlec.ir.op import Array
from mlec.pipeline import Tolerance
from mlec.runtime import CompiledModel
from mlec.validation.answers import Answered, SourceAnswers, answer, unheard
from mlec.wording import plural

NETWORK = Tolerance(rtol=1e-4, atol=1e-6)
HALF = Tolerance(rtol=8 * 2.0**-10, atol=1e-6)  # some units in the last place: each op of the source rounds to 16 bits
BFLOAT = Tolerance(rtol=8 * 2.0**-7, atol=1e-6)
ESTIMATOR = Tolerance(rtol=1e-5, atol=1e-9)
TREES = Tolerance(rtol=4 * 2.0**-23, atol=1e-12)


@dataclass(frozen=True)
class Comparison:
    """Compiled against source, for one result.

    Attributes:
        method: which.
        rows: compared; those on which the source's own answer is arbitrary are left out.
        max_abs_error, mean_abs_error: of the values.
        max_rel_error: largest absolute error, relative to the largest magnitude expected.
        label_mismatches: labels that differ; those at a tie of the scores are counted in ``ties`` only.
        excess: error in units of the bound; above 1 the model is refused.
    """

    method: str
    rows: int
    max_abs_error: float = 0.0
    max_rel_error: float = 0.0
    mean_abs_error: float = 0.0
    label_mismatches: int = 0
    ties: int = 0
    excess: float = 0.0


def default_tolerance(graph: Graph) -> Tolerance:
    """The bound of the parity table for this kind of model."""
    if graph.signature.kind == "network":
        kinds = {value.type.dtype for node in graph.nodes for value in node.outputs}
        return BFLOAT if DType.BF16 in kinds else HALF if DType.F16 in kinds else NETWORK
    return TREES if any(node.name == "tree_ensemble" for node in graph.nodes) else ESTIMATOR


def validate(compiled: CompiledModel, answers: SourceAnswers, tolerance: Tolerance) -> dict[str, Any]:
    """Compares every method of the source that the compiled model offers, on examples, probes, single rows and odd batches.

    Args:
        compiled: what was made.
        answers: of the source.
        tolerance: the bound.

    Returns:
        For the report: the bound, the worst comparison of each method, with what the source refused some of the probes, and why there are
        fewer of them than there could be.

    Raises:
        ToleranceError: for a difference beyond the bound; nothing should be shipped then.
    """
    worst: dict[str, Comparison] = {}
    at: dict[str, Answered] = {}
    for batch in answers.batches:
        for comparison in compare_with(compiled, batch, tolerance):
            known = worst.get(comparison.method)
            if known is None or (comparison.excess, comparison.rows) > (known.excess, known.rows):
                worst[comparison.method], at[comparison.method] = comparison, batch
    bad = [c for c in worst.values() if c.excess > 1]
    if bad:
        shown = "; ".join(f"{c.method}: {difference(c)}" for c in bad)
        blame = blamed(compiled, answers.exact, at["run"]) if "run" in at else None
        raise ToleranceError(
            f"the compiled model differs from its source beyond {tolerance}: {shown}",
            code="E_PARITY",
            hint=_hint(bad, blame),
        )
    return {
        "tolerance": {"rtol": tolerance.rtol, "atol": tolerance.atol},
        "methods": {k: asdict(v) for k, v in worst.items()},
        "refused": answers.refused,
        "shortened": answers.shortened,
    }


FACTOR = 4.0
"""Rounding is to blame for a difference if the compiled model errs at most so many times as much as the source does itself."""


@dataclass(frozen=True)
class Errors:
    """How far results are from those of the source in float64.

    Attributes:
        largest: error of any number that is finite in all three, as a part of the largest number of its output; of whole numbers, 1 for
            a wrong one.
        lost: numbers that are not finite, and exactly are.
    """

    largest: float
    lost: int

    def __str__(self) -> str:
        lost = f" (numbers that are not finite: {self.lost:,})" if self.lost else ""
        return f"{self.largest:.2g} of its scale{lost}"


@dataclass(frozen=True)
class Blame:
    """The errors of the source itself and of the compiled model, on the same inputs."""

    source: Errors
    compiled: Errors

    @property
    def is_rounding(self) -> bool:
        """Whether the source's own results are so far off that they say nothing against the compiled model."""
        source, compiled = self.source, self.compiled
        return compiled.largest <= FACTOR * source.largest and compiled.lost <= FACTOR * source.lost


def blamed(compiled: CompiledModel, exact: Callable[[Any], Any] | None, asked: Answered) -> Blame | None:
    """Asks the source in float64; None if it cannot answer, or not in float64.

    Args:
        compiled: a model without methods.
        exact: see `mlec.frontends.base.SourceMethods`.
        asked: inputs, and what the source answered to them.
    """
    if exact is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            truth = _arrays(exact(asked.inputs))
    except Exception:  # whatever a model does in a type that it was not written for
        return None
    theirs, ours = _arrays(asked.wanted["run"]), _arrays(compiled.run(asked.inputs))
    if not [a.shape for a in truth] == [a.shape for a in theirs] == [a.shape for a in ours]:
        return None
    if any(a.dtype.kind == "f" and a.dtype != np.float64 for a in truth):
        return None
    known = [np.isfinite(t) & np.isfinite(a) & np.isfinite(b) for t, a, b in zip(truth, theirs, ours, strict=True)]
    return Blame(_errors(truth, theirs, known), _errors(truth, ours, known))


def _errors(truth: Sequence[Array], found: Sequence[Array], known: Sequence[Array]) -> Errors:
    largest, lost = 0.0, 0
    for exact, got, both in zip(truth, found, known, strict=True):
        if exact.dtype.kind != "f":
            largest = max(largest, float((exact != got).any()))
            continue
        finite = np.isfinite(exact)
        error = np.abs(got[both].astype(np.float64) - exact[both]).max(initial=0.0)
        largest = max(largest, float(error) / (float(np.abs(exact[finite]).max(initial=0.0)) or 1.0))
        lost += int((finite & ~np.isfinite(got)).sum())
    return Errors(largest, lost)


def _hint(bad: Sequence[Comparison], blame: Blame | None) -> str:
    """What to do about differences beyond the bound."""
    look = "to look at the result, compile with validate=False or a larger tolerance"
    if blame is None:
        if [c.method for c in bad] != ["run"]:
            return f"this is a defect of mlec; {look}"
        return f"this is a defect of mlec, unless the model magnifies the rounding of its own numbers, as a logarithm near 0 does; {look}"
    errors = f"beside the source in float64, the source errs by {blame.source}, the compiled model by {blame.compiled}"
    if not blame.is_rounding:
        return f"this is a defect of mlec: {errors}; {look}"
    worst = max(c.max_rel_error if c.excess < np.inf else np.inf for c in bad)
    allow = (
        f"allow it with tolerance=mlec.Tolerance(rtol={2 * worst:.1g})"
        if worst < np.inf
        else "compile with validate=False"
    )
    return (
        f"the model magnifies the rounding of its own numbers: {errors}. Take logarithms, quotients and roots of what stays away from 0, "
        f"or {allow}"
    )


def difference(found: Comparison) -> str:
    """What of a result differs, for the error."""
    if found.label_mismatches:
        return f"{plural(found.label_mismatches, 'different label')} on {plural(found.rows, 'row')}"
    if found.max_abs_error:
        return f"values differ on {plural(found.rows, 'row')}, max error {found.max_abs_error:.3g} (relative {found.max_rel_error:.3g})"
    return "the shape, the element type, or where the values are NaN or infinite differ"


def compare(compiled: CompiledModel, oracle: Oracle, inputs: Sequence[Any], tolerance: Tolerance) -> list[Comparison]:
    """One comparison for each method of the oracle that the compiled model offers, on one set of inputs.

    Raises:
        UsageError: the source fails on these inputs.
    """
    offered = [name for name in oracle if hasattr(compiled, name)]  # the frontend's notes say which are not
    with unheard(oracle):
        answered = answer(oracle, offered, list(inputs))
    return compare_with(compiled, answered, tolerance)


def compare_with(compiled: CompiledModel, answered: Answered, tolerance: Tolerance) -> list[Comparison]:
    """One comparison for each answer of the source that the compiled model offers, too."""
    inputs = answered.inputs
    results: dict[str, tuple[list[Array], list[Array]]] = {}
    for method, wanted in answered.wanted.items():
        if not hasattr(compiled, method):
            continue
        got = getattr(compiled, method)(inputs if method == "run" else inputs[0])
        same_form = _form(got) == _form(wanted)
        results[method] = _arrays(wanted), _arrays(got) if same_form else []
    if answered.decided is not None:
        rows = answered.decided
        results = {name: ([a[rows] for a in wanted], [a[rows] for a in got]) for name, (wanted, got) in results.items()}
    scores = [results[m] for m in ("predict_proba", "decision_function") if m in results]
    ties = _tied_rows([pair for wanted, got in scores for pair in zip(wanted, got, strict=False)], tolerance)
    return [_worst_of(method, wanted, got, ties, tolerance) for method, (wanted, got) in results.items()]


def _form(value: Any) -> object:
    """What of a DataFrame is not in its numbers; None for arrays."""
    if not hasattr(value, "columns"):
        return None
    index = list(value.index) if hasattr(value, "index") else None
    return type(value), list(value.columns), [str(dtype) for dtype in value.dtypes], index


def _arrays(value: Any) -> list[Array]:
    return [np.asarray(v) for v in value] if isinstance(value, (list, tuple)) else [np.asarray(value)]


def _worst_of(
    method: str, wanted: list[Array], got: list[Array], ties: Array | None, tolerance: Tolerance
) -> Comparison:
    if len(wanted) != len(got):
        return Comparison(method, 0, excess=float("inf"))
    pairs = [_compare_arrays(method, w, g, ties, tolerance) for w, g in zip(wanted, got, strict=True)]
    return max(pairs, key=lambda c: c.excess)


def _compare_arrays(method: str, wanted: Array, got: Array, ties: Array | None, tolerance: Tolerance) -> Comparison:
    rows = len(wanted) if wanted.ndim else 1
    if wanted.shape != got.shape or wanted.dtype != got.dtype:
        return Comparison(method, rows, excess=float("inf"))
    if wanted.dtype.kind not in "fV":  # V: bfloat16
        different = np.asarray(wanted != got)
        tied = (
            different & ties.reshape(-1, *[1] * (different.ndim - 1))
            if ties is not None and different.ndim and len(ties) == rows
            else different & False
        )
        mismatches = int((different & ~tied).sum())
        return Comparison(
            method, rows, label_mismatches=mismatches, ties=int(tied.sum()), excess=float("inf") if mismatches else 0.0
        )
    finite = np.isfinite(wanted) & np.isfinite(got)
    error = np.abs(got.astype(np.float64)[finite] - wanted.astype(np.float64)[finite])
    scale = float(np.max(np.abs(wanted[np.isfinite(wanted)]), initial=0.0))
    largest = float(np.max(error, initial=0.0))
    return Comparison(
        method, rows, largest, largest / scale if scale else 0.0, float(error.mean()) if error.size else 0.0,
        excess=tolerance.excess(wanted, got),
    )  # fmt: skip


def _tied_rows(scores: list[tuple[Array, Array]], tolerance: Tolerance) -> Array | None:
    """Rows whose label may differ: the two best scores (or a single score and 0) are as near as the bound allows, and as the rounding
    that was found in this very row can move them. Where the scores are the source's own, as those of a tree ensemble are when it
    sums in the same order and precision, there is no such row.

    Args:
        scores: of the source and of the compiled model.
    """
    tied: Array | None = None
    for wanted, got in scores:
        if wanted.shape != got.shape or wanted.ndim not in (1, 2) or wanted.shape[-1:] == (1,):
            continue
        wide = wanted.astype(np.float64)
        with np.errstate(invalid="ignore"):
            error = np.abs(got.astype(np.float64) - wide)
            margin = np.abs(wide) if wide.ndim == 1 else np.diff(np.sort(wide, axis=1)[:, -2:], axis=1)[:, 0]
        if wide.ndim == 2:
            error = error.max(axis=1, initial=0.0)
        bound = 2 * (tolerance.rtol * np.max(np.abs(wide[np.isfinite(wide)]), initial=0.0) + tolerance.atol)
        close = (margin <= bound) & (margin <= 4 * error) & (error > 0)
        tied = close if tied is None else tied | close
    return tied
