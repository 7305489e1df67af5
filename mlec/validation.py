"""Validates a compiled model against its source: on the user's examples, and on rows made to find differences."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlec.errors import MlecError, ToleranceError, UsageError
from mlec.frontends.base import Oracle, SourceMethods
from mlec.ir import Graph
from mlec.ir.dtype import DType
from mlec.ir.op import Array
from mlec.pipeline import Tolerance
from mlec.probes import PROBE_ROWS, probe_inputs, probe_rows
from mlec.runtime import CompiledModel
from mlec.runtime.nested import Nesting
from mlec.signature import Signature

BATCHES = (1, 5)

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


def validate(
    compiled: CompiledModel, graph: Graph, oracle: Oracle, examples: Sequence[Any] | None, tolerance: Tolerance
) -> dict[str, Any]:
    """Compares every method of the source that the compiled model offers, on examples, probes, single rows and odd batches.

    Args:
        compiled: what was made.
        graph: as lowered, before any pass.
        oracle: the source's functions.
        examples: the user's inputs, one for each input of the model.
        tolerance: the bound.

    Returns:
        For the report: the bound, the worst comparison of each method, and with what the source refused some of the probes.

    Raises:
        UsageError: the source fails on the examples, or, without examples, on all probes.
        ToleranceError: for a difference beyond the bound; nothing should be shipped then.
    """
    worst: dict[str, Comparison] = {}
    flat = Nesting(
        [spec.name for spec in graph.signature.inputs]
    ).is_flat  # else the source takes them as the examples are, below
    probes, refused = taken_probes(graph, oracle if flat else None, probe_rows(graph))
    batches = _batches(graph.signature, examples, probes)
    if not batches and refused is not None:
        raise UsageError(
            f"the source takes none of the inputs that were made to compare on: {refused.message}",
            code="E_SOURCE_FAILS", hint="pass example_inputs (--example) that it takes, or validate=False to compile without comparing",
        ) from refused  # fmt: skip
    for number, batch in enumerate(batches):
        if number and graph.signature.table is None and _refusal(oracle, batch) is not None:
            continue  # probes in containers, or a part of probes, whose numbers need not fit fewer rows
        for comparison in compare(compiled, oracle, batch, tolerance):
            known = worst.get(comparison.method)
            if known is None or (comparison.excess, comparison.rows) > (known.excess, known.rows):
                worst[comparison.method] = comparison
    bad = [c for c in worst.values() if c.excess > 1]
    if bad:
        shown = "; ".join(f"{c.method}: {difference(c)}" for c in bad)
        raise ToleranceError(
            f"the compiled model differs from its source beyond {tolerance}: {shown}",
            code="E_PARITY",
            hint="this is a defect of mlec; to look at the result, compile with validate=False or a larger tolerance",
        )
    return {
        "tolerance": {"rtol": tolerance.rtol, "atol": tolerance.atol},
        "methods": {k: asdict(v) for k, v in worst.items()},
        "refused": refused.message if refused is not None else "",
    }


def difference(found: Comparison) -> str:
    """What of a result differs, for the error."""
    if found.label_mismatches:
        return f"{found.label_mismatches} labels differ on {found.rows} rows"
    if found.max_abs_error:
        return f"values differ on {found.rows} rows, max error {found.max_abs_error:.3g} (relative {found.max_rel_error:.3g})"
    return "the shape, the element type, or where the values are NaN or infinite differ"


def compare(compiled: CompiledModel, oracle: Oracle, inputs: Sequence[Any], tolerance: Tolerance) -> list[Comparison]:
    """One comparison for each method of the oracle that the compiled model offers, on one set of inputs."""
    results: dict[str, tuple[list[Array], list[Array]]] = {}
    for method, function in oracle.items():
        if not hasattr(compiled, method):  # the frontend's notes say which
            continue
        argument = list(inputs) if method == "run" else inputs[0]
        wanted = _of_source(function, argument, method)
        got = getattr(compiled, method)(argument)
        same_form = _form(got) == _form(wanted)
        results[method] = _arrays(wanted), _arrays(got) if same_form else []
    if isinstance(oracle, SourceMethods) and oracle.decided is not None:
        rows = _of_source(oracle.decided, inputs[0], "the search for rows without one right answer")
        results = {name: ([a[rows] for a in wanted], [a[rows] for a in got]) for name, (wanted, got) in results.items()}
    scores = [results[m] for m in ("predict_proba", "decision_function") if m in results]
    ties = _tied_rows([pair for wanted, got in scores for pair in zip(wanted, got, strict=False)], tolerance)
    return [_worst_of(method, wanted, got, ties, tolerance) for method, (wanted, got) in results.items()]


def _of_source(function: Callable[[Any], Any], argument: Any, method: str) -> Any:
    """What the source gives; what it warns about on probing inputs is not the user's concern.

    Raises:
        UsageError: the source fails: the examples, or the source, are not those of the compiled model.
    """
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            return function(argument)
    except MlecError:
        raise
    except Exception as error:
        raise UsageError(
            f"the source model fails on the inputs it is compared on: {method}: {_first_line(error)}",
            code="E_SOURCE_FAILS",
            hint="check that the source is the model that was compiled, and that it takes the examples as they are given; "
            "validate=False compiles without comparing",
        ) from error


def _first_line(error: Exception) -> str:
    """Of an error of others: libraries add pages of advice."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


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


# -- inputs ----------------------------------------------------------------------------------------------------------


def _batches(signature: Signature, examples: Sequence[Any] | None, probes: list[Any] | None) -> list[list[Any]]:
    """The examples, and probes: all, and parts with 1 and 5 rows; for a fixed batch only what fits it."""
    batches: list[list[Any]] = []
    if examples is not None:
        batches.append(list(examples))
    if probes is not None:
        batches.append(probes)
        symbolic = [str(s.shape[0]) for s in signature.inputs if s.shape and isinstance(s.shape[0], str)]
        if signature.table is not None or symbolic:
            least = max((signature.symbols.get(dim, (0, None))[0] for dim in symbolic), default=0)
            batches += [
                [_head(p, rows, _is_batched(signature, i)) for i, p in enumerate(probes)]
                for rows in BATCHES
                if rows >= least
            ]
    if examples is not None and signature.table is None:
        nesting = Nesting([spec.name for spec in signature.inputs])
        if not nesting.is_flat:  # the source takes its arguments as the examples are
            batches[1:] = [nesting.like(examples, batch) for batch in batches[1:]]
    return batches


def taken_probes(
    graph: Graph, oracle: Oracle | None, rows: int = PROBE_ROWS
) -> tuple[list[Any] | None, UsageError | None]:
    """Probes that the source takes: numbers made here need not lie where its functions are defined (a logarithm, positions in a text).

    Args:
        oracle: the source's functions; None takes everything.

    Returns:
        The probes, of a table without the rows that the source refuses, None where nothing is left or none could be made; and with what
        the source refused some, if it did.
    """
    probes = probe_inputs(graph, rows)
    if probes is None or oracle is None:
        return probes, None
    refused = _refusal(oracle, probes)
    if refused is None:
        return probes, None
    if graph.signature.table is None:
        return None, refused
    kept = _taken_rows(lambda index: _refusal(oracle, [_rows_of(probes[0], index)]) is None, len(probes[0]))
    return [_rows_of(probes[0], kept)] if len(kept) else None, refused


def _refusal(oracle: Oracle, inputs: list[Any]) -> UsageError | None:
    for method, function in oracle.items():
        try:
            _of_source(function, inputs if method == "run" else inputs[0], method)
        except UsageError as error:
            return error
    return None


def _taken_rows(takes: Callable[[Array], bool], rows: int, patience: int = 600) -> Array:
    """Rows that are taken together with any others that are taken, found by halving.

    Args:
        takes: whether these rows are taken.
        rows: how many there are.
        patience: calls, after which what is not known to be taken is left out.
    """
    kept: list[Array] = []
    unknown = [np.arange(rows)]
    while unknown and patience > 0:
        part = unknown.pop()
        patience -= 1
        if takes(part):
            kept.append(part)
        elif len(part) > 1:
            unknown += np.array_split(part, 2)
    return np.sort(np.concatenate(kept)) if kept else np.zeros(0, np.int64)


def _rows_of(table: Any, index: Array) -> Any:
    return table.iloc[index] if hasattr(table, "iloc") else table[index]


def _is_batched(signature: Signature, index: int) -> bool:
    if signature.table is not None:
        return True
    shape = signature.inputs[index].shape
    return bool(shape) and isinstance(shape[0], str)


def _head(value: Any, rows: int, batched: bool) -> Any:
    return value[:rows] if batched else value
