"""Passes and the pipeline that runs them.

A pass is a frozen dataclass: its fields are its options, so that ``fuse{max_nodes = 30}`` parses to ``FuseOperators(max_nodes=30)`` and
prints back. It declares what it preserves, and says what it did (applied remarks) and what it did not do and why (missed remarks).
"""

from __future__ import annotations

import dataclasses
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_type_hints

from mlec import registry
from mlec.errors import MlecError, ParseError, PassError, UsageError
from mlec.ir import Edit, Graph, Location, verify
from mlec.ir.types import UNKNOWN
from mlec.tolerance import EXACT, Tolerance, approx, check_equal, ulp

__all__ = [
    "EXACT", "NOMINAL_EXTENT", "Pass", "PassContext", "PassPipeline", "PassRecord", "PassResult", "Remark", "TargetFacts",
    "Tolerance", "Verification", "approx", "ulp",
]  # fmt: skip

NOMINAL_EXTENT = 64
"""Value that stands for a symbolic dim wherever one number is wanted: cost estimates and reports."""


@dataclass(frozen=True)
class Remark:
    """What a pass did (``applied``) or decided against (``missed``), and where."""

    kind: Literal["applied", "missed"]
    message: str
    loc: Location = UNKNOWN
    rule: str = ""


@dataclass(frozen=True)
class TargetFacts:
    """What a backend says of a target, for the passes; by default an ordinary CPU.

    Attributes:
        vector_bytes: width of the vector registers.
        row_programs: whether what goes over narrow rows once (`mlec.ops.rows`) becomes one kernel.
    """

    vector_bytes: int = 32
    row_programs: bool = True


@dataclass(frozen=True)
class PassContext:
    """What passes may know besides the graph.

    Attributes:
        target: what it is compiled for.
        precision: asked for by the user.
    """

    target: TargetFacts = TargetFacts()
    precision: str = "fp32"


@dataclass(frozen=True)
class PassResult:
    """A pass's new graph (the same object when nothing changed) and its remarks."""

    graph: Graph
    remarks: tuple[Remark, ...] = ()

    @staticmethod
    def of_edits(graph: Graph, edits: Sequence[Edit]) -> PassResult:
        """From what the rewrite driver did."""
        return PassResult(
            graph, tuple(Remark("applied" if e.applied else "missed", e.message, e.loc, e.rule) for e in edits)
        )


@dataclass(frozen=True)
class Pass(ABC):
    """One transformation. Subclasses are frozen dataclasses whose fields are their options.

    Attributes:
        name: as in the text form of a pipeline.
        preserves: how far the outputs may move.
        before: name of a pass that this one must precede, such as ``"layout"`` or ``"fuse"``, after which most patterns are
            inside kernels: ``default,my-pass`` then puts it there instead of at the end.
    """

    name: ClassVar[str]
    preserves: ClassVar[Tolerance] = EXACT
    before: ClassVar[str] = ""

    @abstractmethod
    def run(self, graph: Graph, context: PassContext) -> PassResult: ...

    def __str__(self) -> str:
        changed = [
            f"{f.name} = {_option_text(getattr(self, f.name))}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{self.name}{{{', '.join(changed)}}}" if changed else self.name


@dataclass(frozen=True)
class PassRecord:
    """What one pass did to one graph: both graphs are there to be printed, compared, run and timed."""

    name: str
    before: Graph
    after: Graph
    remarks: tuple[Remark, ...]
    seconds: float


Verification = Literal["off", "structure", "numeric"]


@dataclass(frozen=True, init=False)
class PassPipeline:
    """Passes in order.

    Args:
        passes: passes, or pipelines that are spliced in.
        verify: after each pass, check nothing ("off"), that the graph is valid ("structure"), or also that the reference
            interpreter gives the same results within the pass's tolerance ("numeric").
    """

    passes: tuple[Pass, ...]
    verify: Verification

    def __init__(self, passes: Sequence[Pass | PassPipeline], verify: Verification = "structure") -> None:
        if verify not in ("off", "structure", "numeric"):
            raise UsageError(
                f'verify takes "off", "structure" or "numeric", got {verify!r}',
                hint="structure checks the rules of the IR after each pass, numeric the results too",
            )
        flat: list[Pass] = []
        for item in passes:
            if isinstance(item, PassPipeline):
                flat += item.passes
            elif isinstance(item, Pass):
                flat.append(item)
            else:
                raise UsageError(
                    f"a pipeline takes passes, got {item!r}", hint="create the pass: FuseOperators(), not FuseOperators"
                )
        object.__setattr__(self, "passes", tuple(flat))
        object.__setattr__(self, "verify", verify)

    # -- editing -------------------------------------------------------------------------------------------------

    def insert(self, step: Pass, *, before: str | None = None, after: str | None = None) -> PassPipeline:
        """A pipeline with one more pass: before the first, or after the last, pass of a name; at the end without either."""
        if before is not None and after is not None:
            raise UsageError("insert takes before= or after=, not both", hint="name one pass to insert at")
        at = len(self.passes)
        if before is not None:
            at = self._positions(before)[0]
        elif after is not None:
            at = self._positions(after)[-1] + 1
        return PassPipeline((*self.passes[:at], step, *self.passes[at:]), self.verify)

    def replace(self, name: str, step: Pass) -> PassPipeline:
        """A pipeline in which every pass of that name is another one."""
        self._positions(name)
        return PassPipeline([step if p.name == name else p for p in self.passes], self.verify)

    def without(self, *names: str) -> PassPipeline:
        """A pipeline without the passes of these names."""
        for name in names:
            self._positions(name)
        return PassPipeline([p for p in self.passes if p.name not in names], self.verify)

    def verified(self, verify: Verification) -> PassPipeline:
        """The same passes under another verification."""
        return PassPipeline(self.passes, verify)

    def _positions(self, name: str) -> list[int]:
        found = [i for i, p in enumerate(self.passes) if p.name == name]
        if not found:
            raise UsageError(
                f"the pipeline has no pass {name!r}",
                hint=f"it has: {', '.join(dict.fromkeys(p.name for p in self.passes))}",
            )
        return found

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    # -- text ----------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))

    @staticmethod
    def parse(text: str, verify: Verification = "structure") -> PassPipeline:
        """The inverse of ``str``; ``O0`` .. ``O3`` and ``default`` stand for the pipelines of those names.

        Raises:
            ParseError: for text that is not a pipeline.
            UsageError: for a pass that does not exist.
        """
        steps: list[Pass] = []
        for part in _split(text):
            for step in _parse_part(part):
                places = [i for i, earlier in enumerate(steps) if earlier.name == step.before]
                steps.insert(places[0] if places else len(steps), step)
        return PassPipeline(steps, verify)

    # -- running -------------------------------------------------------------------------------------------------

    def run(self, graph: Graph, context: PassContext | None = None) -> tuple[Graph, list[PassRecord]]:
        """Runs every pass in turn.

        Returns:
            The last graph, and a record for each pass.

        Raises:
            PassError: naming the pass and its position, when it fails or leaves an invalid graph.
            ToleranceError: when ``verify="numeric"`` finds a result outside the pass's tolerance.
        """
        context = context or PassContext()
        records: list[PassRecord] = []
        for index, step in enumerate(self.passes):
            place = f"pass {index + 1} of {len(self.passes)}, {step}"
            start = time.perf_counter()
            try:
                result = step.run(graph, context)
                if self.verify != "off" and result.graph is not graph:
                    verify(result.graph, after=step.name)
            except PassError:
                raise
            except MlecError as error:
                raise PassError(
                    f"{place}: {error.message}", hint=error.hint, loc=error.loc, notes=error.notes
                ) from error
            except Exception as error:
                raise PassError(
                    f"{place} failed: {type(error).__name__}: {error}", hint="this is a defect of the pass"
                ) from error
            seconds = time.perf_counter() - start
            if self.verify == "numeric" and result.graph is not graph:
                check_equal(graph, result.graph, step.preserves, place)
            records.append(PassRecord(step.name, graph, result.graph, result.remarks, seconds))
            graph = result.graph
        return graph, records


# -- the text form of passes ---------------------------------------------------------------------------------------------


def _option_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def _split(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += {"{": 1, "}": -1}.get(char, 0)
        if char == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    if depth:
        raise ParseError(
            f"a pipeline text with an unbalanced brace: {text!r}", code="E_PIPELINE", hint="write name{option = value}"
        )
    return [p.strip() for p in parts if p.strip()]


_PART = re.compile(r"([A-Za-z][\w-]*)\s*(?:\{(.*)\})?\Z", re.S)


def _parse_part(part: str) -> Sequence[Pass]:
    match = _PART.match(part)
    if match is None:
        raise ParseError(
            f"{part!r} is not a pass: write name or name{{option = value}}",
            code="E_PIPELINE",
            hint="`mlec passes` lists the passes and their options",
        )
    name, options = match.groups()
    if name == "default" or re.fullmatch(r"O\d", name):
        from mlec.passes.pipelines import named_pipeline

        return named_pipeline(name).passes
    kind: type[Pass] = registry.load("passes", name)
    hints = get_type_hints(kind)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(kind)}
    given: dict[str, Any] = {}
    for pair in _split(options or ""):
        key, _, value = (s.strip() for s in pair.partition("="))
        if key not in fields:
            raise UsageError(f"{name} has no option {key!r}", hint=f"it has: {', '.join(fields) or 'none'}")
        given[key] = _option_value(name, key, value, fields[key])
    return [kind(**given)]


_READERS: dict[type, Callable[[str], Any]] = {
    bool: {"true": True, "false": False}.__getitem__,
    int: int,
    float: float,
    str: str,
}


def _option_value(name: str, key: str, text: str, kind: type) -> Any:
    try:
        return _READERS[kind](text)
    except (KeyError, ValueError):
        raise UsageError(
            f"{name}: option {key} takes {getattr(kind, '__name__', kind)}, got {text!r}",
            hint="`mlec passes` lists the options and their defaults",
        ) from None
