"""The report's data with types: what `OptimizationReport.to_dict` holds, as `docs/report.md` lists it.

The renderers read a report through `typed`, because a report may come out of a file that somebody else wrote. Missing keys take their
defaults and unknown keys are left out, so that reports of other versions can be shown too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import field

from mlec.errors import CorruptedFileError
from mlec.pipeline import NOMINAL_EXTENT
from mlec.processor import notable
from mlec.report import OptimizationReport
from mlec.reporting import units
from mlec.wording import plural

Count = Annotated[int, msgspec.Meta(ge=0)]
Measure = Annotated[float, msgspec.Meta(ge=0)]
Peak = Annotated[float, msgspec.Meta(gt=0)]
Duration = Annotated[float, msgspec.Meta(gt=0, lt=1e9)]


class Remark(msgspec.Struct, frozen=True):
    """What a pass did or did not do, and where in the user's code."""

    message: str
    rule: str = ""
    location: str = ""
    locations: tuple[str, ...] = ()


class Stats(msgspec.Struct, frozen=True):
    """Size of a graph, symbolic dims at the nominal extent."""

    nodes: Count = 0
    flops: Count = 0
    bytes: Count = 0
    predicted_seconds: Measure | None = None
    measured_seconds: Measure | None = None

    @property
    def work(self) -> tuple[int, int, int]:
        """What the graph does, whatever it takes."""
        return self.nodes, self.flops, self.bytes


class Rewrite(msgspec.Struct, frozen=True):
    """What one rule of a pass is worth: the graph as the pass leaves it without the rule, and with it."""

    rule: str
    applied: Count = 0
    before: Stats = Stats()
    after: Stats = Stats()
    predicted_gain: Measure | None = None
    measured_gain: Measure | None = None


class PassEntry(msgspec.Struct, frozen=True):
    """What one pass did; gains are old time / new time."""

    name: str
    applied: tuple[Remark, ...] = ()
    missed: tuple[Remark, ...] = ()
    before: Stats = Stats()
    after: Stats = Stats()
    seconds: Measure = 0.0
    predicted_gain: Measure | None = None
    measured_gain: Measure | None = None
    rewrites: tuple[Rewrite, ...] = ()

    @property
    def is_idle(self) -> bool:
        """It changed nothing and has nothing to say."""
        return not self.missed and not self.is_rewrite

    @property
    def is_rewrite(self) -> bool:
        """It changed something."""
        return bool(self.applied) or self.before.work != self.after.work


class Kernel(msgspec.Struct, frozen=True):
    """One kernel; ``flops`` and ``bytes`` may be texts in the symbolic dims, the ``nominal`` ones are numbers."""

    symbol: str
    op: str = ""
    location: str = ""
    strategy: str = ""
    bits: Count = 32
    weights_bytes: Count = 0
    flops: Count | str = 0
    bytes: Count | str = 0
    nominal_flops: Count = 0
    nominal_bytes: Count = 0
    predicted_seconds: Measure | None = None


class KernelRun(msgspec.Struct, frozen=True):
    """One kernel in the run that was measured."""

    symbol: str
    seconds: Measure = 0.0
    predicted_seconds: Measure | None = None
    flops: Count = 0
    bytes: Count = 0


class Profile(msgspec.Struct, frozen=True):
    """The run that was measured; ``seconds`` and ``predicted_seconds`` are of the whole call."""

    rows: Count = 0
    extents: dict[str, Count] = field(default_factory=dict)
    seconds: Measure | None = None
    predicted_seconds: Measure | None = None
    kernels: tuple[KernelRun, ...] = ()

    @property
    def error(self) -> float | None:
        """Of the prediction, relative to what was measured."""
        if not self.seconds or self.predicted_seconds is None:
            return None
        return self.predicted_seconds / self.seconds - 1


class Timings(msgspec.Struct, frozen=True):
    """Seconds of one call of a kernel as the cost model made it, and as it was chosen, at some extents of the symbolic dims."""

    extents: dict[str, Count] = field(default_factory=dict)
    default: Duration = 1.0
    chosen: Duration = 1.0


class Tuned(msgspec.Struct, frozen=True):
    """One distinct kernel that was tuned: two schedules as texts, how many others were measured, and what the measurements say."""

    symbol: str
    op: str = ""
    location: str = ""
    default: str = ""
    chosen: str = ""
    trials: Count = 0
    remembered: bool = False
    timings: tuple[Timings, ...] = ()

    @property
    def is_default(self) -> bool:
        return self.default == self.chosen

    @property
    def gain(self) -> float:
        """Time before / time after: the geometric mean over the extents."""
        logs = [math.log(t.default / t.chosen) for t in self.timings]
        return math.exp(sum(logs) / len(logs)) if logs else 1.0

    @property
    def origin(self) -> str:
        """Where the measurements come from."""
        return f"{'remembered of' if self.remembered else 'measured in'} {plural(self.trials, 'trial')}"


class Unstable(msgspec.Struct, frozen=True):
    """A finding of the pass ``stability``; errors are relative, or the words "not finite"."""

    rule: str
    severity: Literal["error", "warning", "note"] = "note"
    op: str = ""
    location: str = ""
    locations: tuple[str, ...] = ()
    message: str = ""
    input: str = ""
    witness: dict[str, Any] = field(default_factory=dict)
    shows: str = ""
    error_before: Measure | str | None = None
    error_after: Measure | str | None = None
    rewrite: str = ""
    applied: bool = False
    ranges: str = ""

    @property
    def errors(self) -> str:
        """The error as it is, and with the stable spelling where there is one; empty without a witness."""
        known = [e for e in (self.error_before, self.error_after) if e is not None]
        return " -> ".join(e if isinstance(e, str) else units.error(e) for e in known)

    @property
    def remedy(self) -> str:
        """The stable spelling, and whether it is in place."""
        return f"{self.rewrite}{', applied' if self.applied else ''}"


class Comparison(msgspec.Struct, frozen=True):
    """Compiled against source for one result; see `mlec.validation.differential.Comparison`."""

    method: str = ""
    rows: Count = 0
    max_abs_error: Measure = 0.0
    max_rel_error: Measure = 0.0
    mean_abs_error: Measure = 0.0
    label_mismatches: Count = 0
    ties: Count = 0
    excess: Measure = 0.0


class Bound(msgspec.Struct, frozen=True):
    rtol: Measure = 0.0
    atol: Measure = 0.0

    def __str__(self) -> str:
        parts = [f"{name} {value:.3g}" for name, value in (("relative", self.rtol), ("absolute", self.atol)) if value]
        return " + ".join(parts) or "exact"


class Parity(msgspec.Struct, frozen=True):
    tolerance: Bound = Bound()
    methods: dict[str, Comparison] = field(default_factory=dict)
    refused: str = ""
    shortened: str = ""

    @property
    def comparisons(self) -> list[tuple[str, Comparison]]:
        """By name of the result."""
        return sorted(self.methods.items())

    @property
    def worst(self) -> Comparison | None:
        """The comparison that comes nearest to its bound."""
        return max((c for _, c in self.comparisons), key=lambda c: c.excess, default=None)


class Measured(msgspec.Struct, frozen=True):
    """Milliseconds of one call: the least of many; a report of before has medians, and says nothing of the spread and of threads."""

    rows: Count = 0
    compiled_ms: Measure = 0.0
    source_ms: Measure | None = None
    speedup: Measure | None = None
    threads: Count | None = None
    source_threads: Count | None = None
    spread: dict[str, dict[str, Measure]] = field(default_factory=dict)
    disturbance: str = ""
    all_threads_ms: Measure | None = None
    processor_time: bool = False


class Baseline(msgspec.Struct, frozen=True):
    """The same model without passes (O0), on the inputs that were measured: milliseconds, and how many times as fast it became, measured
    and as predicted."""

    unoptimised_ms: Measure = 0.0
    speedup: Measure = 1.0
    predicted_speedup: Measure | None = None


class Timing(msgspec.Struct, frozen=True):
    compile_seconds: Measure | None = None
    stages: dict[str, Measure] = field(default_factory=dict)
    baseline: Baseline | None = None
    predicted_seconds: dict[str, Measure] = field(default_factory=dict)
    measured: Measured | None = None

    @property
    def predictions(self) -> list[tuple[str, float]]:
        """Batch size and seconds, smallest batch first: a file does not keep the order of keys."""
        return sorted(self.predicted_seconds.items(), key=lambda item: (len(item[0]), item[0]))


class MemoryStep(msgspec.Struct, frozen=True):
    """Bytes of the intermediate values that are alive while one kernel runs."""

    symbol: str
    live_bytes: Count = 0


class Timeline(msgspec.Struct, frozen=True):
    """Memory of intermediate values in the run that was measured: of the arena that holds them, and at each call of a kernel."""

    rows: Count = 0
    arena_bytes: Count = 0
    steps: tuple[MemoryStep, ...] = ()


class Memory(msgspec.Struct, frozen=True):
    weights_bytes: Count | None = None
    code_bytes: Count = 0
    peak_bytes: Count | None = None
    peak_apart_bytes: Count | None = None
    arena_bytes: Count | None = None
    live_bytes: Count | None = None
    timeline: Timeline = Timeline()
    before: Stats = Stats()
    after: Stats = Stats()


class Loss(msgspec.Struct, frozen=True):
    """What outputs lost against float32, the worst of them; None where there is no such output, or the number is not finite."""

    accuracy_loss: float | None = None
    changed_labels: Count | None = None
    error: float | None = None


class Accuracy(Loss, frozen=True):
    """What 8 bits cost the outputs of a network on the calibration data, and what they may cost."""

    layers: Count = 0
    chosen: Count = 0
    kept: Count = 0
    rows: Count = 0
    max_accuracy_loss: float = 0.0
    max_error: float = 0.0
    unguarded: Loss = Loss()


class Roofline(msgspec.Struct, frozen=True):
    """The machine: peaks in operations and bytes a second, and the overhead of one kernel call."""

    flops: Peak
    bandwidth: Peak
    kernel_seconds: Measure = 0.0
    flops64: Measure = 0.0
    threads: Count = 1
    core_flops: Measure = 0.0
    core_flops64: Measure = 0.0
    copies: tuple[tuple[Count, Peak], ...] = ()
    dispatch_seconds: Measure = 0.0
    call_seconds: Measure = 0.0
    clock: Measure = 1.0
    byte_products: Peak = 1.0
    bf16_products: Peak = 1.0

    def peak(self, bits: int) -> float:
        """Operations a second on numbers of ``bits`` bits (8: products of bytes, 16: of bf16)."""
        if bits == 64:
            return self.flops64 or self.flops / 2
        return self.flops * {8: self.byte_products, 16: self.bf16_products}.get(bits, 1)


class PictureNode(msgspec.Struct, frozen=True):
    id: str
    op: str = ""
    label: str = ""
    type: str = ""
    location: str = ""
    locations: tuple[str, ...] = ()
    flops: Count = 0
    bytes: Count = 0


class Picture(msgspec.Struct, frozen=True):
    """A graph for drawing; edges are pairs of node ids."""

    nodes: tuple[PictureNode, ...] = ()
    edges: tuple[tuple[str, str], ...] = ()
    text: str = ""


class Graphs(msgspec.Struct, frozen=True):
    before: Picture = Picture()
    after: Picture = Picture()


class ReportData(msgspec.Struct, frozen=True):
    """A whole report."""

    model: dict[str, Any] = field(default_factory=dict)
    passes: tuple[PassEntry, ...] = ()
    parity: Parity = Parity()
    timing: Timing = Timing()
    memory: Memory = Memory()
    kernels: tuple[Kernel, ...] = ()
    profile: Profile = Profile()
    tuning: tuple[Tuned, ...] = ()
    graphs: Graphs = Graphs()
    machine: Roofline | None = None
    quantization: tuple[dict[str, Any], ...] = ()
    accuracy: Accuracy = Accuracy()
    stability: tuple[Unstable, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return str(self.model.get("name") or "model")

    @property
    def target(self) -> str:
        """What it was compiled for, in short; empty when only passes ran."""
        if processor := self.model.get("processor"):
            return str(processor)
        target = self.model.get("target") or {}
        if not isinstance(target, dict):
            return str(target)
        kind = target.get("kind") or target.get("device")
        return " ".join(str(part) for part in (kind, target.get("mcpu"), target.get("arch")) if part)

    @property
    def instruction_sets(self) -> list[str]:
        """Those that the code may use and that matter for its speed; empty where that is not known."""
        target = self.model.get("target")
        features = target.get("features") if isinstance(target, dict) else None
        return notable(map(str, features)) if isinstance(features, list) else []

    @property
    def nominal(self) -> str:
        """The extents at which estimates stand: ``"64 rows"``, or of several symbolic dims ``"64 for each of batch, seq"``."""
        names = list(self.profile.extents)
        if len(names) < 2:
            return plural(NOMINAL_EXTENT, "row")
        return f"{NOMINAL_EXTENT} for each of {', '.join(names)}"

    @property
    def has_labels(self) -> bool:
        """Whether results are labels, or were compared as labels."""
        compared = self.parity.methods.values()
        return self.model.get("kind") in ("classifier", "clusterer", "outlier") or any(
            c.label_mismatches or c.ties for c in compared
        )

    @property
    def is_measured(self) -> bool:
        """Whether it is known what single passes are worth."""
        return any(entry.measured_gain is not None for entry in self.passes)

    @property
    def first(self) -> Stats:
        """The graph before all passes."""
        return self.passes[0].before if self.passes else Stats()

    @property
    def last(self) -> Stats:
        """The graph after all passes."""
        return self.passes[-1].after if self.passes else Stats()


def typed(report: OptimizationReport) -> ReportData:
    """The report's data with types.

    Raises:
        CorruptedFileError: for data that is no report, naming the place.
    """
    plain = json.loads(report.to_json())
    plain["machine"] = plain["machine"] or None
    try:
        data = msgspec.convert(plain, ReportData)
    except msgspec.ValidationError as error:
        raise CorruptedFileError(
            f"this is not a report: {error}", code="E_REPORT", hint="compile the model again to get a new one"
        ) from error
    return msgspec.structs.replace(data, passes=_said_once(data.passes))


def _said_once(passes: Sequence[PassEntry]) -> tuple[PassEntry, ...]:
    """The passes; what one of them misses again in a later round is left out there."""
    said: dict[str, frozenset[Remark]] = {}
    entries = []
    for entry in passes:
        before = said.get(entry.name, frozenset())
        said[entry.name] = before.union(entry.missed)
        entries.append(msgspec.structs.replace(entry, missed=tuple(r for r in entry.missed if r not in before)))
    return tuple(entries)
