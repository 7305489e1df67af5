"""The first thing that a report says, the same in every form."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlec.reporting import units
from mlec.reporting.schema import Loss, Measured, Remark, ReportData, Stats, Tuned, Unstable
from mlec.wording import plural

_VALUE_NAME = re.compile(r"%\w+")


@dataclass(frozen=True)
class Fact:
    """One line of the summary.

    Attributes:
        title: what it is about, one or two words.
        value: the number to remember.
        detail: what stands behind it.
        good: True and False colour it; None is neither.
    """

    title: str
    value: str
    detail: str = ""
    good: bool | None = None


def facts(data: ReportData) -> list[Fact]:
    """What is known, most important first; what was not measured is left out."""
    found = [
        _speed(data),
        _parity(data),
        accuracy_fact(data),
        _stability(data),
        _graph(data),
        _passes_gain(data),
        _predicted(data),
        _size(data),
        _memory(data),
        _instruction_sets(data),
        _compile_time(data),
    ]
    return [fact for fact in found if fact is not None]


def headline(data: ReportData) -> str:
    """``"torch network in int8 for cpu znver4"``."""
    source = " ".join(str(data.model[key]) for key in ("source", "kind") if data.model.get(key))
    precision = str(data.model.get("precision") or "fp32")
    source += "" if precision == "fp32" else f" in {precision}"
    return " for ".join(part for part in (source.strip(), data.target) if part)


def change(before: float, after: float, show: str) -> str:
    """``"3.3 (-26%)"`` for a number that changed by 0.1% or more; ``show`` is the new number as text."""
    percent = 100 * (after - before) / before if before else 0.0
    if abs(percent) < 0.1:
        return show
    return f"{show} ({percent:+.{0 if abs(percent) >= 1 else 1}f}%)"


def stats_lines(before: Stats, after: Stats) -> list[tuple[str, str, str]]:
    """Title, before and after of nodes, arithmetic and memory traffic."""
    return [
        ("nodes", f"{before.nodes:,}", change(before.nodes, after.nodes, f"{after.nodes:,}")),
        ("arithmetic", units.count(before.flops, "FLOP"), change(before.flops, after.flops, units.count(after.flops, "FLOP"))),
        ("memory traffic", units.size(before.bytes), change(before.bytes, after.bytes, units.size(after.bytes))),
    ]  # fmt: skip


def saving(before: float | None, after: float | None) -> str:
    """What a rewrite does to the time of a call: ``"saves 12.0 µs of 40.0 µs (1.43x)"``; empty where that is not known."""
    if before is None or after is None or not after:
        return ""
    saved = before - after
    if f"{saved / after:.3f}" in ("0.000", "-0.000"):
        return f"nothing saved, {units.seconds(before)} as before"
    gain = f"({units.times(before / after)})"
    if saved < 0:
        return f"costs {units.seconds(-saved)} on {units.seconds(before)} {gain}"
    return f"saves {units.seconds(saved)} of {units.seconds(before)} {gain}"


def model_error(stats: Stats) -> str:
    """Of the time that the cost model predicts of a graph, ``"+12%"``; empty where it was not measured."""
    if stats.predicted_seconds is None or not stats.measured_seconds:
        return ""
    return f"{100 * (stats.predicted_seconds / stats.measured_seconds - 1):+.0f}%"


@dataclass(frozen=True)
class RemarkGroup:
    """Remarks that say the same of several nodes.

    Attributes:
        message: the common words.
        rule: the rewrite.
        places: source locations, each once; the node's text where the location is unknown.
        count: number of remarks.
    """

    message: str
    rule: str
    places: tuple[str, ...]
    count: int


def grouped(remarks: Iterable[Remark]) -> list[RemarkGroup]:
    """Remarks with the same words (whatever the names of the values) and rule once, in order of first appearance."""
    groups: dict[tuple[str, str], list[tuple[Remark, str]]] = {}
    for remark in remarks:
        words, node = _parted(remark.message)
        groups.setdefault((_VALUE_NAME.sub("%", words), remark.rule), []).append((remark, node))
    result = []
    for (words, rule), members in groups.items():
        if len(members) == 1:
            words = _parted(members[0][0].message)[0]
        places = (
            place
            for remark, node in members
            for place in (remark.locations or (remark.location or (f"%{node}" if node else ""),))
            if place
        )
        result.append(RemarkGroup(words, rule, tuple(dict.fromkeys(places)), len(members)))
    return result


def _parted(message: str) -> tuple[str, str]:
    """What a remark says, and the text of the node that it says it of, which the rewrite driver adds."""
    words, _, node = message.partition(" at %")
    return words.rstrip(" ,"), node


def where_times_are_from(data: ReportData) -> str:
    """Of which run the times of the kernels are."""
    if data.profile.kernels:
        return f"measured with {plural(data.profile.rows, 'row')}, beside the prediction of the cost model"
    return f"predicted by the cost model for {data.nominal}"


def _speed(data: ReportData) -> Fact | None:
    measured = data.timing.measured
    if measured is None:
        return None
    ours = units.seconds(measured.compiled_ms / 1e3)
    rows = plural(measured.rows, "row") + _threads(measured)
    if measured.speedup is None or measured.source_ms is None:
        return Fact("Speed", ours, f"measured, {rows}")
    faster = measured.speedup >= 1
    word = "faster" if faster else "slower"
    ratio = units.times(measured.speedup if faster else 1 / measured.speedup if measured.speedup else float("inf"))
    detail = f"measured {ours}, source {units.seconds(measured.source_ms / 1e3)}, {rows}"
    if measured.disturbance:
        return Fact("Speed", "not reliable", f"{detail}: {ratio} {word}, but {measured.disturbance}")
    return Fact("Speed", f"{ratio} {word}", detail, faster)


def _threads(measured: Measured) -> str:
    """With how many threads the two were timed."""
    if measured.threads is None:
        return ""
    both = measured.source_ms is not None
    source = " each" if measured.source_threads else ", the source as many as it takes"
    busy = ", in time on a processor, as the machine was busy" if measured.processor_time else ""
    return f", {plural(measured.threads, 'thread')}{source if both else ''}{busy}"


def _parity(data: ReportData) -> Fact | None:
    worst = data.parity.worst
    if worst is None:
        return None
    methods = ", ".join(name for name, _ in data.parity.comparisons)
    if worst.excess > 1:
        return Fact(
            "Parity",
            "differs",
            f"{worst.method}: {units.times(worst.excess)} the bound ({data.parity.tolerance})",
            False,
        )
    if all(c.excess == 0 for c in data.parity.methods.values()):
        return Fact("Parity", "identical", f"{methods}: no difference from the source", True)
    largest = max(c.max_rel_error for c in data.parity.methods.values())
    detail = f"{methods}: {units.share(worst.excess)} of the bound ({data.parity.tolerance})"
    if data.has_labels:
        different = sum(c.label_mismatches for c in data.parity.methods.values())
        detail += f", {plural(different, 'different label')}"
    return Fact("Parity", f"error {units.error(largest)}", detail, True)


def accuracy_fact(data: ReportData) -> Fact | None:
    """What 8 bits cost."""
    found = data.accuracy
    if not found.layers:
        return None
    back = found.chosen - found.kept
    detail = f"on {plural(found.rows, 'row')} of calibration data: {_loss(found, found.rows) or 'no difference'}"
    detail += f"; at most {found.max_accuracy_loss:.2%} of accuracy, or an error of {found.max_error:.0%}"
    if back:
        lost = _loss(found.unguarded, found.rows) or "results that are not finite"
        detail += f"; {plural(back, 'layer')} went back to float32, which had cost {lost}"
    return Fact("8 bits", f"{found.kept:,} of {plural(found.layers, 'layer')}", detail, not back)


def _loss(loss: Loss, rows: int) -> str:
    parts = []
    if loss.changed_labels is not None:
        parts.append(f"{loss.changed_labels:,} of {rows:,} labels")
    if loss.accuracy_loss is not None:
        parts.append(f"{loss.accuracy_loss:.2%} of accuracy")
    if loss.error is not None:
        parts.append(f"an error of {loss.error:.2g}")
    return ", ".join(parts)


def _stability(data: ReportData) -> Fact | None:
    severe = [found for found in data.stability if found.severity != "note" and not found.applied]
    if not data.stability:
        return None
    rules = ", ".join(dict.fromkeys(found.rule for found in severe or data.stability))
    return Fact("Stability", stability_counts(data.stability), rules, not severe)


def stability_counts(found: Sequence[Unstable]) -> str:
    """``"1 error, 2 notes, 1 rewritten"``."""
    left = [one.severity for one in found if not one.applied]
    counts = [(left.count(severity), severity) for severity in ("error", "warning", "note")]
    parts = [plural(count, word) for count, word in counts if count]
    return ", ".join([*parts, *([f"{len(found) - len(left)} rewritten"] if len(left) < len(found) else [])])


def _graph(data: ReportData) -> Fact | None:
    if not data.passes:
        return None
    first, last = data.first, data.last
    applied = sum(len(p.applied) for p in data.passes)
    missed = sum(len(p.missed) for p in data.passes)
    detail = f"{plural(applied, 'rewrite')} applied, {missed:,} missed, in {plural(len(data.passes), 'pass', 'es')}"
    return Fact("Graph", f"{first.nodes:,} → {plural(last.nodes, 'node')}", detail)


def _passes_gain(data: ReportData) -> Fact | None:
    """What the passes are worth together: measured against no passes where that was done, else predicted."""
    baseline = data.timing.baseline
    if baseline is not None:
        detail = f"measured against the graph without passes (O0), {units.seconds(baseline.unoptimised_ms / 1e3)}"
        detail += f"; predicted {units.times(baseline.predicted_speedup)}" if baseline.predicted_speedup else ""
        return Fact("Gain by the passes", units.times(baseline.speedup), detail, baseline.speedup >= 1)
    gains = [p.predicted_gain for p in data.passes if p.predicted_gain is not None]
    if not gains:
        return None
    return Fact(
        "Gain by the passes", f"{units.times(math.prod(gains))}, predicted",
        f"at {data.nominal}; measure_passes=True or --measure-passes measures it, against O0 and for each pass",
    )  # fmt: skip


def _predicted(data: ReportData) -> Fact | None:
    """How near the cost model came."""
    predicted = data.timing.predictions
    names = list(data.profile.extents)
    if len(names) > 1:
        detail = ", ".join(f"{units.seconds(s)} with {n} for each" for n, s in predicted)
        detail += f" of {', '.join(names)}" if detail else ""
    else:
        detail = ", ".join(f"{units.seconds(s)} at {n} row{'' if n == '1' else 's'}" for n, s in predicted)
    profile = data.profile
    if profile.error is None or profile.predicted_seconds is None or profile.seconds is None:
        return Fact("Predicted time", units.seconds(max(s for _, s in predicted)), detail) if predicted else None
    both = f"predicted {units.seconds(profile.predicted_seconds)}, measured {units.seconds(profile.seconds)}"
    beside = f"{both}, {plural(profile.rows, 'row')}"
    measured = data.timing.measured
    if measured is not None and (measured.disturbance or measured.processor_time):
        beside += "; the machine was busy"
    return Fact("Cost model", f"{100 * profile.error:+.0f}%", f"{beside}; predicted {detail}" if detail else beside)


def _size(data: ReportData) -> Fact | None:
    """What a file of the model holds, uncompressed."""
    memory = data.memory
    if memory.weights_bytes is None:
        return None
    if not memory.code_bytes:
        return Fact("Weights", units.size(memory.weights_bytes))
    parts = f"weights {units.size(memory.weights_bytes)}, machine code {units.size(memory.code_bytes)}"
    return Fact("Size", units.size(memory.weights_bytes + memory.code_bytes), parts)


def _memory(data: ReportData) -> Fact | None:
    memory = data.memory
    if memory.peak_bytes is None:
        return None
    values = ""
    if memory.arena_bytes and memory.live_bytes is not None:
        values = f"with the largest inputs that it was run on; of it {units.size(memory.arena_bytes)} for intermediate values"
        if memory.live_bytes != memory.arena_bytes:
            values += f", {units.size(memory.live_bytes)} at one time"
    if memory.peak_apart_bytes is not None and memory.peak_apart_bytes > memory.peak_bytes:
        values += f"; {units.size(memory.peak_apart_bytes)} if no result took the place of an operand"
    return Fact("Memory", units.size(memory.peak_bytes), values or "at most while running, with its weights")


def _instruction_sets(data: ReportData) -> Fact | None:
    """What the code may use of the processor: a name says less, and LLVM's may be that of another one."""
    found = data.instruction_sets
    if not found:
        return None
    triple = str(data.model["target"].get("triple", ""))
    return Fact("Instructions", triple.partition("-")[0] or found[0], ", ".join(found))


def _compile_time(data: ReportData) -> Fact | None:
    if data.timing.compile_seconds is None:
        return None
    spent = sum(p.seconds for p in data.passes)
    kernels = plural(len(data.kernels), "kernel")
    return Fact(
        "Code generation", units.seconds(data.timing.compile_seconds), f"{kernels}; passes took {units.seconds(spent)}"
    )


def tuning_counts(kernels: Sequence[Tuned]) -> str:
    """``"3 distinct kernels measured, 1 with another schedule"``."""
    better = sum(not kernel.is_default for kernel in kernels)
    return f"{plural(len(kernels), 'distinct kernel')} measured, {better:,} with another schedule"


def tuning_gain(kernel: Tuned) -> str:
    """What another schedule was worth, in few words."""
    return "default kept" if kernel.is_default else f"{units.times(kernel.gain)} as fast"


def tuning_times(kernel: Tuned) -> list[str]:
    """The times of a call, for each of the extents at which it was measured."""
    return [
        f"{units.seconds(t.default)}{'' if kernel.is_default else f' -> {units.seconds(t.chosen)}'}"
        f"{f' at {at}' if (at := ', '.join(f'{name} = {size}' for name, size in t.extents.items())) else ''}"
        for t in kernel.timings
    ]
