"""The report as text: at most 100 columns wide, plain; coloured only on a terminal."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Sequence

from mlec.report import OptimizationReport
from mlec.reporting import units
from mlec.reporting.runs import layers, runs, short_place
from mlec.reporting.schema import PassEntry, Remark, ReportData, Rewrite, typed
from mlec.reporting.summary import (
    facts,
    grouped,
    headline,
    model_error,
    saving,
    stability_counts,
    stats_lines,
    tuning_counts,
    tuning_gain,
    tuning_times,
    where_times_are_from,
)
from mlec.reporting.tables import on_8_bits, quantization_line
from mlec.wording import plural

WIDTH = 100
SHOWN_REMARKS = 5
SHOWN_KERNELS = 20
SHOWN_LAYERS = 20
SHOWN_PLACES = 2
SHOWN_FINDINGS = 20


def render_text(report: OptimizationReport) -> str:
    """The report as plain text.

    Raises:
        CorruptedFileError: for data that is no report.
    """
    data = typed(report)
    blocks = [
        _summary(data),
        _stability(data),
        *[_pass(entry) for entry in data.passes if not entry.is_idle],
        _idle(data),
        _parity(data),
        _layers(data),
        _timeline(data),
        _kernels(data),
        _tuning(data),
        _quantization(data),
    ]
    return "\n\n".join("\n".join(lines) for lines in blocks if lines) + "\n"


def print_report(report: OptimizationReport) -> None:
    """Writes the text to stdout, in colours when that is a terminal."""
    text = render_text(report)
    if not sys.stdout.isatty():
        sys.stdout.write(text)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for line in text.splitlines():
        console.print(Text(line, _style(line)), soft_wrap=True)


def _style(line: str) -> str:
    """Headings are bold; what was done is green, what was not is yellow, warnings are red."""
    if line[:1].strip():
        return "bold"
    return {"+": "green", "-": "yellow", "!": "red"}.get(line.strip()[:1], "")


# -- blocks ----------------------------------------------------------------------------------------------------------


def _summary(data: ReportData) -> list[str]:
    known = facts(data)
    lines = _cut(f"{data.name}: {headline(data)}" if headline(data) else data.name)
    titles = max((len(f.title) for f in known), default=0)
    values = max((len(f.value) for f in known), default=0)
    for fact in known:
        head = f"  {fact.title:{titles}}  {_line(fact.value):{values}}  "
        lines += textwrap.wrap(
            _line(fact.detail), WIDTH, initial_indent=head, subsequent_indent=" " * len(head)
        ) or [head.rstrip()]  # fmt: skip
    for warning in data.warnings:
        lines += _wrapped(f"! {_line(warning)}", 2)
    if not known and not data.warnings:
        lines.append("  nothing was recorded")
    return lines


def _pass(entry: PassEntry) -> list[str]:
    lines = _cut(f"pass {entry.name}: {len(entry.applied):,} applied, {len(entry.missed):,} missed")
    if entry.is_rewrite:
        predicted = saving(entry.before.predicted_seconds, entry.after.predicted_seconds)
        measured = saving(entry.before.measured_seconds, entry.after.measured_seconds)
        lines += _cut(f"  predicted: {predicted}") if predicted else []
        lines += (
            _cut(f"  measured: {measured}; the cost model is then off by {model_error(entry.after)}")
            if measured
            else []
        )
        for one in entry.rewrites if len(entry.rewrites) > 1 else ():
            lines += _rewrite(one)
    lines += [
        f"  {title}: {before} -> {after}"
        for title, before, after in stats_lines(entry.before, entry.after)
        if before != after
    ]
    return [*lines, *_remarks("+", entry.applied), *_remarks("-", entry.missed)]


def _rewrite(one: Rewrite) -> list[str]:
    predicted = saving(one.before.predicted_seconds, one.after.predicted_seconds)
    measured = saving(one.before.measured_seconds, one.after.measured_seconds)
    if not measured:
        return []
    return _wrapped(f"= {one.rule} ({plural(one.applied, 'time')}): {predicted}, predicted; {measured}, measured", 2)


def _remarks(mark: str, remarks: Sequence[Remark]) -> list[str]:
    groups = grouped(remarks)
    lines: list[str] = []
    for group in groups[:SHOWN_REMARKS]:
        often = f" ({group.count:,} times)" if group.count > 1 else ""
        lines += _wrapped(f"{mark} {_line(group.message)}{often}", 2)
        lines += [f"      {place}" for place in _some(group.places)]
    if len(groups) > SHOWN_REMARKS:
        lines.append(
            f"  {mark} and {plural(len(groups) - SHOWN_REMARKS, 'more kind')}, {'missed' if mark == '-' else 'applied'}"
        )
    return lines


def _some(places: Sequence[str]) -> list[str]:
    shown = [_shortened(_line(place), WIDTH - 6) for place in places[:SHOWN_PLACES]]
    rest = len(places) - len(shown)
    return [*shown, f"and {plural(rest, 'more place')}"] if rest else shown


def _idle(data: ReportData) -> list[str]:
    idle = dict.fromkeys(entry.name for entry in data.passes if entry.is_idle)
    if not idle:
        return []
    return _wrapped(f"passes that had nothing to do: {', '.join(idle)}", 0)


def _parity(data: ReportData) -> list[str]:
    if not data.parity.methods:
        return []
    rows = [["result", "rows", "max error", "relative", "mean error", "of the bound"]]
    rows += [
        [
            name, f"{c.rows:,}", units.error(c.max_abs_error), units.error(c.max_rel_error), units.error(c.mean_abs_error),
            units.share(c.excess),
        ]
        for name, c in data.parity.comparisons
    ]  # fmt: skip
    if data.has_labels:
        labels = ["labels differ", *(f"{c.label_mismatches:,}" for _, c in data.parity.comparisons)]
        rows = [[*row, cell] for row, cell in zip(rows, labels, strict=True)]
    left_out = _wrapped(f"left out: rows made for this that the source refuses ({data.parity.refused})", 2)
    fewer = _wrapped(f"fewer rows than the thresholds of the model call for: {data.parity.shortened}", 2)
    return [
        f"parity with the source, the worst of each result; bound: {data.parity.tolerance}",
        *_table(rows, numbers=range(1, len(rows[0]))),
        *(left_out if data.parity.refused else []),
        *(fewer if data.parity.shortened else []),
    ]


def _layers(data: ReportData) -> list[str]:
    found = layers(runs(data))
    if len(found) < 2:
        return []
    rows = [["layer", "kernels", "time", "share", "weights", "values alive"]]
    rows += [
        [
            layer.name, f"{layer.kernels:,}", units.seconds(layer.seconds), units.share(layer.share), units.size(layer.weights),
            units.size(layer.live),
        ]
        for layer in found[:SHOWN_LAYERS]
    ]  # fmt: skip
    rest = found[SHOWN_LAYERS:]
    more = [f"  and {plural(len(rest), 'more layer')}, {units.share(sum(layer.share for layer in rest))} of the time"]
    return ["layers, in the order in which they run", *_table(rows, numbers=range(1, 6)), *(more if rest else [])]


def _timeline(data: ReportData) -> list[str]:
    """Where most memory is in use."""
    timeline = data.memory.timeline
    top = max(timeline.steps, key=lambda step: step.live_bytes, default=None)
    if top is None or not top.live_bytes:
        return []
    return [
        f"memory of intermediate values, {plural(timeline.rows, 'row')}",
        *_wrapped(
            f"most at one time: {units.size(top.live_bytes)}, at call {timeline.steps.index(top) + 1:,} of {len(timeline.steps):,} "
            f"({_line(top.symbol)}); the arena that holds them has {units.size(timeline.arena_bytes)}",
            2,
        ),
    ]


def _kernels(data: ReportData) -> list[str]:
    if not data.kernels:
        return []
    shown = sorted(runs(data), key=lambda run: -run.seconds)
    titles = ["time", "predicted", "share", "kernel", "strategy", "source"]
    rows = [
        [
            units.seconds(run.seconds),
            "" if run.predicted is None else units.seconds(run.predicted),
            units.share(run.share),
            run.kernel.symbol,
            run.kernel.strategy.partition("; ")[0],
            short_place(run.kernel.location),
        ]
        for run in shown[:SHOWN_KERNELS]
    ]
    measured = bool(data.profile.kernels)
    columns = [row if measured else [row[0], *row[2:]] for row in [titles, *rows]]
    lines = [f"kernels, {where_times_are_from(data)}", *_table(columns, numbers=range(2 + measured))]
    table = "\n".join(lines)
    by_strategy: dict[str, list[str]] = {}
    for kernel in (run.kernel for run in shown[:SHOWN_KERNELS]):
        by_strategy.setdefault(_line(kernel.strategy), []).append(_line(kernel.symbol))
    for strategy, symbols in by_strategy.items():
        if strategy not in table:  # it is cut there, or is the choice without the reasons for it
            lines += _wrapped(f"{', '.join(symbols)}: {strategy}", 2)
    rest = shown[SHOWN_KERNELS:]
    if rest:
        lines.append(
            f"  and {plural(len(rest), 'more kernel')}, {units.share(sum(run.share for run in rest))} of the time"
        )
    return lines


def _tuning(data: ReportData) -> list[str]:
    if not data.tuning:
        return []
    lines = [f"tuning: {tuning_counts(data.tuning)}"]
    for kernel in sorted(data.tuning, key=lambda kernel: -kernel.gain)[:SHOWN_KERNELS]:
        lines += _cut(f"  {kernel.symbol}: {tuning_gain(kernel)}, {kernel.origin}")
        lines += _wrapped(f"default {_line(kernel.default)}", 6)
        if not kernel.is_default:
            lines += _wrapped(f"chosen {_line(kernel.chosen)}", 6)
        lines += _wrapped(_line("; ".join(tuning_times(kernel))), 6)
    if len(data.tuning) > SHOWN_KERNELS:
        lines.append(f"  and {plural(len(data.tuning) - SHOWN_KERNELS, 'more kernel')}")
    return lines


def _stability(data: ReportData) -> list[str]:
    lines = [f"numerical stability: {stability_counts(data.stability)}"] if data.stability else []
    for found in data.stability[:SHOWN_FINDINGS]:
        place = f" at {_line(found.location)}" if found.location else ""
        mark = "-" if found.applied or found.severity == "note" else "!"
        lines += _cut(f"  {mark} {_line(found.severity)}: {_line(found.rule)}{place}")
        said = [found.message]
        said += [f"with {found.input}: {found.shows}"] if found.input else []
        said += [f"stable: {found.remedy}"] if found.rewrite else []
        said += [f"relative error {found.errors}"] if found.errors else []
        for text in said:
            lines += _wrapped(_line(text), 6)
    if len(data.stability) > SHOWN_FINDINGS:
        lines.append(f"  and {plural(len(data.stability) - SHOWN_FINDINGS, 'more finding')}")
    return lines


def _quantization(data: ReportData) -> list[str]:
    lines = ["layers that could work on 8 bits"] if data.quantization else []
    for entry in data.quantization:
        mark = "+" if on_8_bits(entry) else "-"
        lines += _wrapped(f"{mark} {_line(quantization_line(entry))}", 2)
    return lines


# -- lines -----------------------------------------------------------------------------------------------------------


def _line(text: str) -> str:
    """One line without control characters: a name out of a file must not drive the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _cut(text: str) -> list[str]:
    return [_shortened(_line(text), WIDTH)]


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * (indent + 2)) or [""]


def _table(rows: Sequence[Sequence[str]], numbers: Iterable[int] = ()) -> list[str]:
    """Aligned columns, indented by two, the widest ones shortened until a row fits."""
    cells = [[_line(cell) for cell in row] for row in rows]
    if not cells:
        return []
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    room = WIDTH - 2 - 2 * (len(widths) - 1)
    while sum(widths) > room:
        widest = max(range(len(widths)), key=lambda i: widths[i])
        second = max((w for i, w in enumerate(widths) if i != widest), default=0)
        widths[widest] -= max(1, min(sum(widths) - room, widths[widest] - second))
    right = set(numbers)
    lines = []
    for row in cells:
        shown = [_shortened(cell, width) for cell, width in zip(row, widths, strict=True)]
        aligned = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(shown, widths, strict=True))]
        lines.append(("  " + "  ".join(aligned)).rstrip())
    return lines
