"""Passes and the pipeline that runs them.

A pass is a frozen dataclass: its fields are its options, so that ``fuse{max_nodes = 30}`` parses to ``FuseOperators(max_nodes=30)`` and
prints back. It declares what it preserves, and says what it did (applied remarks) and what it did not do and why (missed remarks).
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_args, get_origin, get_type_hints

from mlec import registry
from mlec.errors import MlecError, ParseError, PassError, UsageError, WriteError
from mlec.instruments import Instrument, VerifyNumerics, VerifyStructure
from mlec.ir import Dim, Edit, Graph, Location, Rule, apply_rules
from mlec.ir.dim import evaluate_at
from mlec.ir.op import Array
from mlec.ir.types import UNKNOWN
from mlec.tolerance import EXACT, Tolerance, approx, ulp

__all__ = [
    "EXACT", "NOMINAL_EXTENT", "Pass", "PassContext", "PassPipeline", "PassRecord", "PassResult", "Remark", "TargetFacts",
    "Tolerance", "Trials", "Verification", "approx", "nominal", "register_pass", "ulp",
]  # fmt: skip

NOMINAL_EXTENT = 64
"""Value that stands for a symbolic dim wherever one number is wanted: cost estimates and reports."""


def nominal(amount: Dim) -> int:
    """An extent or a cost as one number."""
    return evaluate_at(amount, NOMINAL_EXTENT)


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
        vector_registers: how many there are.
        row_programs: whether what goes over narrow rows once (`mlec.ops.rows`) becomes one kernel.
        cache_bytes: of weights that a core reads again and again as fast as it computes with them.
        byte_products, bf16_products: how many products of bytes, and of bf16 by bf16, take the time of one of float32 where there are many;
            1 where the processor has nothing for them.
        bf16_rows: of a product by n columns of k numbers, the rows from which on it takes less time by bf16 products; see `bf16_products`.
        bf16_tiles: whether a matrix unit does these, in tiles whose rows are 64 bytes; else vectors do.
        winograd: of a convolution by 3 x 3 with a step of 1, its channels before and after and the extent of its result: whether it takes
            less time in float32, by Winograd's sums, than by bf16 products.
    """

    vector_bytes: int = 32
    vector_registers: int = 16
    row_programs: bool = True
    cache_bytes: int = 1 << 20
    byte_products: float = 1.0
    bf16_products: float = 1.0
    bf16_rows: Callable[[int, int], int] = lambda n, k: 2
    bf16_tiles: bool = False
    winograd: Callable[[int, int, Sequence[int]], bool] = lambda before, after, extent: False


class Trials(Protocol):
    """Runs graphs on the side, for passes that decide by what comes out."""

    def compiled(self, graph: Graph) -> Callable[[Sequence[Array]], Sequence[Array]]:
        """Something that runs the graph: inputs to outputs."""
        ...

    def times(self, graph: Graph, inputs: Sequence[Array]) -> Sequence[tuple[str, str, float]]:
        """Op, location and seconds of each kernel of the graph, where it will run; nothing where that cannot be measured here."""
        ...


@dataclass(frozen=True)
class PassContext:
    """What passes may know besides the graph.

    Attributes:
        target: what it is compiled for.
        precision: asked for by the user.
        given_ranges: smallest and largest number that an input can hold, by its name, as the user says.
        seen_ranges: the same of the examples.
        trials: runs graphs on the side; None leaves the reference interpreter.
        left_out: names of rules that passes do without, to see what they are worth.
    """

    target: TargetFacts = TargetFacts()
    precision: str = "fp32"
    given_ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    seen_ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    trials: Trials | None = None
    left_out: frozenset[str] = frozenset()

    def takes(self, rule: str) -> bool:
        """Whether passes apply the rule of this name."""
        return rule not in self.left_out

    def taken(self, rules: Iterable[Rule]) -> list[Rule]:
        """Those of the rules that passes apply."""
        return [rule for rule in rules if self.takes(rule.name)]


@dataclass(frozen=True)
class PassResult:
    """What a pass made of a graph.

    Attributes:
        graph: the new one; the same object when nothing changed.
        remarks: on what it did and did not do.
        findings, summary: of a pass that judges the model, what it found: one by one, and of the whole.
    """

    graph: Graph
    remarks: tuple[Remark, ...] = ()
    findings: tuple[Mapping[str, Any], ...] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of_edits(graph: Graph, edits: Sequence[Edit]) -> PassResult:
        """From what the rewrite driver did."""
        return PassResult(
            graph, tuple(Remark("applied" if e.applied else "missed", e.message, e.loc, e.rule) for e in edits)
        )


@dataclass(frozen=True)
class Pass(ABC):
    """One transformation. Subclasses are frozen dataclasses whose fields are their options; one with ``repr=False`` has no text form.

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
            if f.repr and getattr(self, f.name) != f.default
        ]
        return f"{self.name}{{{', '.join(changed)}}}" if changed else self.name


@dataclass(frozen=True)
class PassRecord:
    """What one pass did to one graph: both graphs are there to be printed, compared, run and timed.

    Attributes:
        position: among the passes, from 1.
        place: the same with the pass and how many there are, for messages.
    """

    step: Pass
    before: Graph
    after: Graph
    remarks: tuple[Remark, ...]
    seconds: float
    findings: tuple[Mapping[str, Any], ...] = ()
    position: int = 1
    place: str = ""
    summary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.step.name

    @property
    def changed(self) -> bool:
        return self.after is not self.before


Verification = Literal["off", "structure", "numeric"]
_CHECKS: dict[str, tuple[Instrument, ...]] = {
    "off": (),
    "structure": (VerifyStructure(),),
    "numeric": (VerifyNumerics(),),
}


@dataclass(frozen=True, init=False)
class PassPipeline:
    """Passes in order.

    Args:
        passes: passes, or pipelines that are spliced in. Their instruments then look on while the whole runs; so does "numeric".
        verify: after each pass, check nothing ("off"), that the graph is valid ("structure"), or also that the reference
            interpreter gives the same results within the pass's tolerance ("numeric").
        instruments: look on while it runs.
    """

    passes: tuple[Pass, ...]
    verify: Verification
    instruments: tuple[Instrument, ...]

    def __init__(
        self,
        passes: Sequence[Pass | PassPipeline],
        verify: Verification = "structure",
        instruments: Sequence[Instrument] = (),
    ) -> None:
        if verify not in _CHECKS:
            raise UsageError(
                f'verify takes "off", "structure" or "numeric", got {verify!r}',
                hint="structure checks the rules of the IR after each pass, numeric the results too",
            )
        flat: list[Pass] = []
        watching = list(instruments)
        for item in passes:
            if isinstance(item, PassPipeline):
                flat += item.passes
                watching += [instrument for instrument in item.instruments if instrument not in watching]
                verify = "numeric" if item.verify == "numeric" else verify
            elif isinstance(item, Pass):
                flat.append(item)
            else:
                raise UsageError(
                    f"a pipeline takes passes, got {item!r}",
                    hint="create the pass: FuseOperators(), not FuseOperators; names go in one text, such as 'canonicalize,fuse'",
                )
        object.__setattr__(self, "passes", tuple(flat))
        object.__setattr__(self, "verify", verify)
        object.__setattr__(self, "instruments", tuple(watching))

    # -- editing -------------------------------------------------------------------------------------------------

    def insert(self, step: Pass | PassPipeline, *, before: str | None = None, after: str | None = None) -> PassPipeline:
        """A pipeline with one more pass: before the first, or after the last, pass of a name; at the end without either."""
        if before is not None and after is not None:
            raise UsageError("insert takes before= or after=, not both", hint="name one pass to insert at")
        at = len(self.passes)
        if before is not None:
            at = self._positions(before)[0]
        elif after is not None:
            at = self._positions(after)[-1] + 1
        return self._of([*self.passes[:at], step, *self.passes[at:]])

    def replace(self, name: str, step: Pass | PassPipeline) -> PassPipeline:
        """A pipeline in which every pass of that name is another one."""
        self._positions(name)
        return self._of([step if p.name == name else p for p in self.passes])

    def without(self, *names: str) -> PassPipeline:
        """A pipeline without the passes of these names."""
        for name in names:
            self._positions(name)
        return self._of([p for p in self.passes if p.name not in names])

    def verified(self, verify: Verification) -> PassPipeline:
        """The same passes under another verification."""
        return PassPipeline(self.passes, verify, self.instruments)

    def watched(self, *instruments: Instrument) -> PassPipeline:
        """The same passes with more instruments."""
        return PassPipeline(self.passes, self.verify, (*self.instruments, *instruments))

    def _of(self, passes: Sequence[Pass | PassPipeline]) -> PassPipeline:
        return PassPipeline(passes, self.verify, self.instruments)

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
        instruments = (*_CHECKS[self.verify], *self.instruments)
        records: list[PassRecord] = []
        for position, step in enumerate(self.passes, 1):
            if not all(instrument.should_run(step, graph) for instrument in instruments):
                continue
            place = f"pass {position} of {len(self.passes)}, {step}"
            with _told(instruments, step, graph), _errors_of(place):
                for instrument in instruments:
                    instrument.before(step, graph)
                start = time.perf_counter()
                result = step.run(graph, context)
                seconds = time.perf_counter() - start
                record = PassRecord(
                    step,
                    graph,
                    result.graph,
                    result.remarks,
                    seconds,
                    result.findings,
                    position,
                    place,
                    result.summary,
                )
                for instrument in instruments:
                    instrument.after(step, record, context)
            records.append(record)
            graph = result.graph
        return graph, records


@contextmanager
def _told(instruments: Sequence[Instrument], step: Pass, graph: Graph) -> Iterator[None]:
    """Instruments are told of an error inside."""
    try:
        yield
    except MlecError as error:
        for instrument in instruments:
            instrument.failed(step, graph, error)
        raise


@contextmanager
def _errors_of(place: str) -> Iterator[None]:
    """Errors inside name the pass."""
    try:
        yield
    except (PassError, WriteError):
        raise
    except MlecError as error:
        raise PassError(f"{place}: {error.message}", hint=error.hint, loc=error.loc, notes=error.notes) from error
    except Exception as error:
        raise PassError(
            f"{place} failed: {type(error).__name__}: {error}", hint="this is a defect of the pass"
        ) from error


# -- passes of the user's own ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _RulePass(Pass):
    """Applies one rule until nothing changes."""

    rule: ClassVar[type[Rule]]

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        return PassResult.of_edits(*apply_rules(graph, context.taken([self.rule()])))


Kind = TypeVar("Kind", bound=type[Pass] | type[Rule])


def register_pass(*, preserves: Tolerance = EXACT, before: str = "layout") -> Callable[[Kind], Kind]:
    """Class decorator: from now on, in this process, pipelines know the pass by its name.

    A `Pass` is taken as it is. Of a rewrite `Rule`, a pass is made that applies it until nothing changes, named after the class:
    ``DoubleNegation`` becomes ``double-negation``.

    Args:
        preserves: how far a rule may move results.
        before: where a rule goes in ``default,double-negation``, see `Pass`.

    Raises:
        UsageError: another pass has the name.
    """

    def register(kind: Kind) -> Kind:
        if issubclass(kind, Rule):
            name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", kind.__name__).lower()
            members = {"name": name, "preserves": preserves, "before": before, "rule": kind, "__doc__": kind.__doc__}
            step = type(f"{kind.__name__}Pass", (_RulePass,), members)
            registry.add("passes", name, step, kind)
        else:
            registry.add("passes", kind.name, kind, kind)
        return kind

    return register


# -- the text form of passes ---------------------------------------------------------------------------------------------


def _option_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and not re.fullmatch(r"[\w./+-]+", value):
        return json.dumps(value)
    return str(value)


_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"|.', re.S)


def _split(text: str) -> list[str]:
    """The parts between commas that are neither in braces nor in quotes."""
    parts, depth, start = [], 0, 0
    for token in _QUOTED.finditer(text):
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if token.group() == "," and depth == 0:
            parts.append(text[start : token.start()])
            start = token.end()
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
    fields = {f.name: hints[f.name] for f in dataclasses.fields(kind) if f.repr}
    given: dict[str, Any] = {}
    for pair in _split(options or ""):
        key, _, value = (s.strip() for s in pair.partition("="))
        if key not in fields:
            raise UsageError(f"{name} has no option {key!r}", hint=f"it has: {', '.join(fields) or 'none'}")
        given[key] = _option_value(name, key, value, fields[key])
    return [kind(**given)]


def _string(text: str) -> str:
    return str(json.loads(text)) if text.startswith('"') else text


_READERS: dict[type, Callable[[str], Any]] = {
    bool: {"true": True, "false": False}.__getitem__,
    int: int,
    float: float,
    str: _string,
}


def _kind_text(kind: type) -> str:
    """What an option takes, for people."""
    if get_origin(kind) is Literal:
        return " or ".join(map(_option_text, get_args(kind)))
    return str(getattr(kind, "__name__", kind))


def _option_value(name: str, key: str, text: str, kind: type) -> Any:
    try:
        if get_origin(kind) is Literal:
            return {_option_text(choice): choice for choice in get_args(kind)}[text]
        return _READERS[kind](text)
    except (KeyError, ValueError):
        raise UsageError(
            f"{name}: option {key} takes {_kind_text(kind)}, got {text!r}",
            hint="`mlec passes` lists the options and their defaults",
        ) from None
