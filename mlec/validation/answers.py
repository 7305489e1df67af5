"""What the source of a model answers to the inputs on which compiled models are compared with it.

It is asked once, however many models are compiled of it, and for no longer than is reasonable: beyond `PROBE_ROWS` rows, as many as it
answers within `SOURCE_SECONDS`.
"""

from __future__ import annotations

import functools
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlec.errors import MlecError, UsageError
from mlec.frontends.base import Oracle, SourceMethods
from mlec.frontends.source_process import SourceProcess
from mlec.ir import Graph
from mlec.ir.op import Array
from mlec.runtime.nested import Nesting
from mlec.signature import Signature
from mlec.validation.probes import PROBE_ROWS, fixed_rows, probe_inputs, probe_rows, table_probe

BATCHES = (1, 5)
SOURCE_SECONDS = 2.0


@dataclass(frozen=True)
class Answered:
    """Inputs, and what the source answers to them.

    Attributes:
        inputs: one for each input of the model.
        wanted: the answers, by method.
        decided: rows of a table that have one right answer, (n,) of bool; None: all.
    """

    inputs: list[Any]
    wanted: Mapping[str, Any]
    decided: Array | None = None

    def part(self, rows: slice) -> Answered:
        """The same for some rows of a table."""

        def of(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [of(v) for v in value]
            return value.iloc[rows] if hasattr(value, "iloc") else value[rows]

        wanted = {method: of(value) for method, value in self.wanted.items()}
        return Answered(of(self.inputs), wanted, None if self.decided is None else self.decided[rows])


@dataclass(frozen=True)
class SourceAnswers:
    """All that compiled models are compared with.

    Attributes:
        batches: the examples; the probes, and the first 1 and 5 rows of them.
        refused: the error with which the source refused some of the probes, or empty.
        shortened: why there are fewer probes than the thresholds of the model call for, or empty.
        timed: inputs to time a model on; None where there are none.
        exact: see `SourceMethods`.
    """

    batches: Sequence[Answered]
    refused: str
    shortened: str
    timed: list[Any] | None
    exact: Callable[[Any], Any] | None = None


def ask_beside(graph: Graph, oracle: Oracle, examples: Sequence[Any] | None) -> Callable[[], SourceAnswers]:
    """`ask`: at once in a thread of its own where another process answers, so that it works while this one compiles; else when the answers
    are asked for.
    """  # fmt: skip
    if not isinstance(oracle, SourceProcess):
        return functools.cache(lambda: ask(graph, oracle, examples))
    answers: Future[SourceAnswers] = Future()

    def work() -> None:
        try:
            answers.set_result(ask(graph, oracle, examples))
        except BaseException as error:
            answers.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return answers.result


def ask(graph: Graph, oracle: Oracle, examples: Sequence[Any] | None) -> SourceAnswers:
    """Asks the source about examples and probes.

    Args:
        graph: as lowered, before any pass.
        oracle: the source's functions; those that the graph does not offer are not asked.
        examples: the user's inputs, one for each input of the model.

    Raises:
        UsageError: the source fails on the examples, or, without examples, on all probes.
        FrontendError: the process of the source fails.
    """
    signature = graph.signature
    offered = {"run", *(method.name for method in signature.methods)}
    put = functools.partial(answer, oracle, [name for name in oracle if name in offered])
    with unheard(oracle):
        batches = [] if examples is None else [put(list(examples))]
        probes = _of_table(graph, put) if signature.table is not None else _of_tensors(graph, put, examples)
    if not batches and not probes.batches and probes.refused is not None:
        raise UsageError(
            f"the source takes none of the inputs that were made to compare on: {probes.refused.message}",
            code="E_SOURCE_FAILS", hint="pass example_inputs (--example) that it takes, or validate=False to compile without comparing",
        ) from probes.refused  # fmt: skip
    timed = None if examples is None else list(examples)
    if timed is None and probes.batches:
        timed = [_head(p, PROBE_ROWS, _is_batched(signature, i)) for i, p in enumerate(probes.batches[0].inputs)]
    refused = "" if probes.refused is None else probes.refused.message
    exact = oracle.exact if isinstance(oracle, SourceMethods | SourceProcess) else None
    return SourceAnswers([*batches, *probes.batches], refused, probes.shortened, timed, exact)


def answer(oracle: Oracle, methods: Collection[str], inputs: list[Any]) -> Answered:
    """What the source answers.

    Args:
        oracle: its functions.
        methods: which of them to ask.
        inputs: one for each input of the model.

    Raises:
        UsageError: it fails on these inputs.
    """
    wanted = {name: _called(oracle[name], inputs if name == "run" else inputs[0], name) for name in methods}
    decided = None
    if isinstance(oracle, SourceMethods | SourceProcess) and oracle.decided is not None:
        decided = _called(oracle.decided, inputs[0], "the search for rows without one right answer")
    return Answered(inputs, wanted, decided)


def _called(function: Callable[[Any], Any], argument: Any, what: str) -> Any:
    """What a function of the source gives.

    Raises:
        UsageError: it fails: the examples, or the source, are not those of the compiled model.
    """
    try:
        return function(argument)
    except MlecError:
        raise
    except Exception as error:
        raise UsageError(
            f"the source model fails on the inputs it is compared on: {what}: {_first_line(error)}",
            code="E_SOURCE_FAILS",
            hint="check that the source is the model that was compiled, and that it takes the examples as they are given; "
            "validate=False compiles without comparing",
        ) from error


def _first_line(error: Exception) -> str:
    """Of an error of others: libraries add pages of advice."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


@contextmanager
def unheard(oracle: Oracle) -> Iterator[None]:
    """What the source warns about on probing inputs is not the user's concern. In another process it is not heard anyway, and the filters
    of warnings belong to all threads.
    """  # fmt: skip
    if isinstance(oracle, SourceProcess):
        yield
        return
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield


# -- probes ----------------------------------------------------------------------------------------------------------

_Put = Callable[[list[Any]], Answered]


@dataclass(frozen=True)
class _Probes:
    """Probes that the source takes: numbers made here need not lie where its functions are defined (a logarithm, positions in a text).

    Attributes:
        batches: all, and parts of them; empty where nothing is left, or none could be made.
        refused: with what the source refused some, if it did.
        shortened: see `SourceAnswers`.
    """

    batches: Sequence[Answered] = ()
    refused: UsageError | None = None
    shortened: str = ""


def _of_table(graph: Graph, put: _Put) -> _Probes:
    """All rows that the source takes, and the first of them; or all in parts, where the model takes one number of rows only."""
    fixed = fixed_rows(graph.signature)
    wanted = probe_rows(graph)
    if fixed is not None:
        wanted = -(-wanted // fixed) * fixed
    (table,) = table_probe(graph, wanted, np.random.default_rng(0))
    shortened = ""
    if wanted > PROBE_ROWS:
        seconds = _seconds_of_a_row(table, put)
        rows = min(wanted, max(PROBE_ROWS, int(SOURCE_SECONDS / max(seconds, 1e-9))))
        if rows < wanted:
            shortened = f"{rows:,} of {wanted:,} rows, as the source takes {1e3 * seconds:.3g} ms for one"
            table = table[:rows]
    refused = None
    try:
        whole = put([table])
    except UsageError as error:
        refused = error
        kept = _taken_rows(lambda index: _takes(put, _rows_of(table, index)), len(table))
        if not len(kept):
            return _Probes((), refused, shortened)
        table = _rows_of(table, kept)
        whole = put([table])
    if fixed is not None:
        starts = range(0, len(table) - fixed + 1, fixed)
        return _Probes([whole.part(slice(i, i + fixed)) for i in starts], refused, shortened)
    return _Probes([whole, *(put([table[:rows]]) for rows in BATCHES if rows < len(table))], refused, shortened)


def _seconds_of_a_row(table: Any, put: _Put) -> float:
    """What a row costs the source where there are many."""
    with suppress(UsageError):
        put([table[:1]])  # loads what the first call needs
    begin = time.perf_counter()
    with suppress(UsageError):
        put([table[:PROBE_ROWS]])
    return (time.perf_counter() - begin) / PROBE_ROWS


def _of_tensors(graph: Graph, put: _Put, examples: Sequence[Any] | None) -> _Probes:
    """Random tensors and, where the model takes any batch, parts with fewer rows."""
    signature = graph.signature
    probes = probe_inputs(graph)
    if probes is None:
        return _Probes()
    nesting = Nesting([spec.name for spec in signature.inputs])

    def asked(inputs: list[Any]) -> Answered:
        # In containers the source takes its arguments as the examples are.
        return put(inputs if examples is None or nesting.is_flat else nesting.like(examples, inputs))

    try:
        batches = [asked(probes)]
    except UsageError as refused:
        return _Probes((), refused)
    symbolic = {i: str(spec.shape[0]) for i, spec in enumerate(signature.inputs) if _is_batched(signature, i)}
    least = max((signature.symbols.get(dim, (0, None))[0] for dim in symbolic.values()), default=0)
    most = max((len(probes[i]) for i in symbolic), default=0)
    for rows in BATCHES:
        if least <= rows < most:
            with suppress(UsageError):  # numbers in the other inputs need not fit fewer rows
                batches.append(asked([_head(p, rows, i in symbolic) for i, p in enumerate(probes)]))
    return _Probes(batches)


def _takes(put: _Put, table: Any) -> bool:
    try:
        put([table])
    except UsageError:
        return False
    return True


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
