"""What looks on while a pipeline runs: dumps, checks, and what users write themselves."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlec.errors import MlecError, ToleranceError, WriteError
from mlec.ir import Graph, verify
from mlec.reduction import reduce_graph
from mlec.tolerance import check_equal

if TYPE_CHECKING:
    from mlec.pipeline import Pass, PassContext, PassRecord

SHOWN_LINES = 20
"""Of a reduced graph, in an error."""


class Instrument:
    """Looks on while a pipeline runs: for times, dumps, checks. Each method may be left as it is.

    An `MlecError` that one raises ends the run, as a `PassError` of the pass that it is about.
    """

    def should_run(self, step: Pass, graph: Graph) -> bool:
        """Whether to run a pass at all; it runs if all instruments say so."""
        return True

    def before(self, step: Pass, graph: Graph) -> None:
        """Called before a pass runs."""

    def after(self, step: Pass, record: PassRecord, context: PassContext) -> None:
        """Called after a pass ran."""

    def failed(self, step: Pass, graph: Graph, error: MlecError) -> None:
        """Called when a pass, or an instrument after it, ended with an error.

        Args:
            graph: what the pass was given.
            error: about to be raised; notes may be added.
        """


class TimePasses(Instrument):
    """Adds up what each pass takes; its text is a table, the longest first.

    Attributes:
        seconds: by the name of the pass.
        runs: how often it ran.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.runs: Counter[str] = Counter()

    def after(self, step: Pass, record: PassRecord, context: PassContext) -> None:
        self.seconds[step.name] += record.seconds
        self.runs[step.name] += 1

    def __str__(self) -> str:
        longest = sorted(self.seconds.items(), key=lambda item: -item[1])
        rows = [(f"{1e3 * taken:.2f} ms", f"{self.runs[name]}x", name) for name, taken in longest]
        return "\n".join(f"{taken:>12} {runs:>4} {name}" for taken, runs, name in rows)


@dataclass(frozen=True)
class DumpGraphs(Instrument):
    """Writes every graph that a pass changed to a folder, as ``01-canonicalize.mlet``, with the arrays of constants left out.

    When a pass fails, the graph that it was given is ``failed.mlet``, and the small one that it does wrong, if there is one,
    ``reduced.mlet``.
    """

    folder: str | os.PathLike[str]

    def after(self, step: Pass, record: PassRecord, context: PassContext) -> None:
        if record.changed:
            self.write(f"{record.position:02d}-{step.name}.mlet", record.after)

    def failed(self, step: Pass, graph: Graph, error: MlecError) -> None:
        if isinstance(error, WriteError):
            return
        graphs = {"failed.mlet": graph}
        if isinstance(error, ToleranceError) and error.reduced is not None:
            graphs["reduced.mlet"] = error.reduced
        try:
            note = f"in {' and '.join(str(self.write(name, dumped)) for name, dumped in graphs.items())}"
        except WriteError as unwritten:  # what the pass did wrong is what its user is to see
            note = f"there is no dump of it: {unwritten.message}"
        error.notes = (*error.notes, note)

    def write(self, name: str, graph: Graph) -> Path:
        """Write one graph to a file of this name in the folder.

        Raises:
            WriteError: the folder or the file cannot be made.
        """
        path = Path(self.folder) / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{graph}\n", encoding="utf-8")
        except OSError as error:
            raise WriteError(
                f"cannot write {path}: {error.strerror}", hint="give a folder that can be written to"
            ) from error
        return path


class VerifyStructure(Instrument):
    """Checks the rules of the IR after each pass that changed something."""

    def after(self, step: Pass, record: PassRecord, context: PassContext) -> None:
        if record.changed:
            verify(record.after, after=step.name)


class VerifyNumerics(VerifyStructure):
    """Also runs the graph before and after on the reference interpreter, and compares within the pass's tolerance.

    A graph that a pass does wrong is made small: `ToleranceError.reduced` is one that it still does wrong.
    """

    def after(self, step: Pass, record: PassRecord, context: PassContext) -> None:
        super().after(step, record, context)
        if not record.changed:
            return
        try:
            check_equal(record.before, record.after, step.preserves, record.place)
        except ToleranceError as error:
            error.reduced = reduce_graph(record.before, lambda graph: _goes_wrong(step, graph, context))
            text = str(error.reduced).splitlines()
            error.notes = (*error.notes, "", *text[:SHOWN_LINES], *(["..."] if len(text) > SHOWN_LINES else []))
            raise


def _goes_wrong(step: Pass, graph: Graph, context: PassContext) -> bool:
    """Whether a pass changes the results of a graph by more than it declares."""
    try:
        check_equal(graph, step.run(graph, context).graph, step.preserves, step.name)
    except ToleranceError:
        return True
    return False
