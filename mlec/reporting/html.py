"""The report as one self-contained page: nothing is fetched, nothing of a model runs in it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources

from mlec.pipeline import NOMINAL_EXTENT
from mlec.report import OptimizationReport
from mlec.reporting import units
from mlec.reporting.graph_svg import DRAWN_NODES, draw
from mlec.reporting.markup import Child, Html, element, join
from mlec.reporting.roofline_svg import limit_of, roofline
from mlec.reporting.runs import Layer, Run, layers, runs
from mlec.reporting.schema import (
    Comparison,
    PassEntry,
    Picture,
    Remark,
    ReportData,
    Rewrite,
    Roofline,
    Stats,
    Unstable,
    typed,
)
from mlec.reporting.summary import (
    facts,
    grouped,
    headline,
    model_error,
    saving,
    stats_lines,
    tuning_gain,
    tuning_times,
    where_times_are_from,
)
from mlec.reporting.tables import Cell, on_8_bits, quantization_rows, table
from mlec.reporting.timeline_svg import timeline
from mlec.wording import plural

SHOWN_GROUPS = 200
SHOWN_PLACES = 12
SHOWN_KERNELS = 100
TEXT_CHARACTERS = 100_000
WITNESS_CHARACTERS = 2000
LOSS = 0.95
"""A gain below this is shown as a loss."""

LIMITS = {"compute": "arithmetic", "memory": "memory traffic", "call": "call overhead"}


def render_html(report: OptimizationReport) -> str:
    """The page, complete with style, script and pictures.

    Raises:
        CorruptedFileError: for data that is no report.
    """
    data = typed(report)
    sections = [
        _header(data),
        _cards(data),
        _warnings(data),
        _stability(data),
        _passes(data),
        _layers(data),
        _memory(data),
        _kernels(data),
        _tuning(data),
        _parity(data),
        _quantization(data),
        _graphs(data),
        _footer(data),
    ]
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("title", f"{data.name} – optimisation report"),
        element("style", Html(_asset("page.css"))),
    )
    body = element("body", element("main", sections), element("script", Html(script)))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


@cache
def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


# -- the top ---------------------------------------------------------------------------------------------------------


def _header(data: ReportData) -> Html:
    return element(
        "header",
        element("p", "mlec · optimisation report", class_="eyebrow"),
        element("h1", data.name),
        element("p", headline(data), class_="muted") if headline(data) else None,
    )


def _cards(data: ReportData) -> Html:
    known = facts(data)
    if not known:
        return element("p", "Nothing was recorded in this report.", class_="muted")
    state = {True: " good", False: " bad", None: ""}
    cards = [
        element(
            "div",
            element("h2", fact.title),
            element("p", fact.value, class_="value"),
            element("p", fact.detail, class_="muted") if fact.detail else None,
            class_=f"card{state[fact.good]}",
        )
        for fact in known
    ]
    return element("section", cards, class_="cards", aria_label="summary")


def _warnings(data: ReportData) -> Html | None:
    if not data.warnings:
        return None
    return element(
        "section",
        element("h2", plural(len(data.warnings), "warning")),
        element("ul", [element("li", warning) for warning in data.warnings]),
        class_="warnings",
        id="warnings",
    )


def _footer(data: ReportData) -> Html:
    words = f"Estimates count each symbolic dim as {NOMINAL_EXTENT}."
    if data.machine is not None:
        words += (
            f" This machine: {units.count(data.machine.flops, 'FLOP')}/s, {units.count(data.machine.bandwidth, 'B')}/s, "
            f"{units.seconds(data.machine.kernel_seconds)} for a kernel call, as measured when it compiled its first model."
        )
    return element("footer", words, class_="muted")


def _section(identifier: str, title: str, *content: Child, note: str = "") -> Html:
    return element(
        "section",
        element("h2", title),
        element("p", note, class_="muted note") if note else None,
        *content,
        id=identifier,
    )


# -- passes ----------------------------------------------------------------------------------------------------------


def _passes(data: ReportData) -> Html | None:
    if not data.passes:
        return None
    busy = [entry for entry in data.passes if not entry.is_idle]
    idle = dict.fromkeys(entry.name for entry in data.passes if entry.is_idle)
    return _section(
        "passes",
        "Passes",
        _worth(data),
        [_pass(entry) for entry in busy],
        element("p", f"Nothing to do for {', '.join(idle)}.", class_="muted") if idle else None,
        note="What each pass saves of the time of a call, what it rewrote, what it left alone and why. "
        + (
            f"Predicted by the cost model and measured, on the same {plural(data.profile.rows, 'row')}: the graphs before and after "
            "each pass, compiled and timed in turn. Of a pass with several rules, each rule: the graph that the pass leaves without it, "
            "and with it."
            if data.is_measured and data.profile.rows
            else f"Predicted by the cost model for {data.nominal}; --measure-passes measures it as well."
        ),
    )


def _worth(data: ReportData) -> Html | None:
    """What each pass saves: predicted, and measured where that was done."""
    rewrites = [entry for entry in data.passes if entry.is_rewrite and entry.predicted_gain is not None]
    if not rewrites:
        return None
    titles = ["pass, rule", "rewrites", "predicted saving", "measured saving", "cost model's error"]
    rows: list[list[Child]] = []
    for entry in rewrites:
        rows.append([element("b", entry.name), f"{len(entry.applied):,}", *_savings(entry)])
        if len(entry.rewrites) > 1:
            rows += [
                [element("span", one.rule, class_="rule"), f"{one.applied:,}", *_savings(one)] for one in entry.rewrites
            ]
    baseline = data.timing.baseline
    if baseline is not None:
        after = baseline.unoptimised_ms / 1e3 / baseline.speedup if baseline.speedup else None
        predicted = "" if baseline.predicted_speedup is None else units.times(baseline.predicted_speedup)
        rows.append(
            [element("b", "all passes, against O0"), "", predicted, saving(baseline.unoptimised_ms / 1e3, after), ""]
        )
    known = [i for i in range(len(titles)) if any(row[i] for row in rows)]
    return _rows([titles[i] for i in known], [[row[i] for i in known] for row in rows], "worth")


def _savings(worth: PassEntry | Rewrite) -> list[Child]:
    """Predicted, measured, and how far the two are apart."""
    before, after = worth.before, worth.after
    return [
        saving(before.predicted_seconds, after.predicted_seconds),
        saving(before.measured_seconds, after.measured_seconds),
        model_error(after),
    ]


def _pass(entry: PassEntry) -> Html:
    gains = [("predicted", entry.predicted_gain), ("measured", entry.measured_gain)]
    before, after = entry.before.nodes, entry.after.nodes
    return element(
        "details",
        element(
            "summary",
            element("span", entry.name, class_="name"),
            element("span", f"{len(entry.applied):,} applied", class_="chip good") if entry.applied else None,
            element("span", f"{len(entry.missed):,} missed", class_="chip warn") if entry.missed else None,
            element("span", f"{before:,} → {after:,} nodes", class_="muted") if before != after else None,
            element(
                "span",
                join((_gain(name, value) for name, value in gains if value is not None), " "),
                class_="gains",
            ),
        ),
        element(
            "div",
            _rows(
                ["", "before", "after"],
                [[title, old, new] for title, old, new in [*stats_lines(entry.before, entry.after), *_times(entry)]],
                "stats",
            ),
            _remarks("Applied", entry.applied, "good"),
            _remarks("Missed", entry.missed, "warn"),
            element("p", f"The pass took {units.seconds(entry.seconds)}.", class_="muted"),
            class_="inside",
        ),
        class_="pass",
    )


def _times(entry: PassEntry) -> list[tuple[str, str, str]]:
    """Predicted and measured time of the graph before and after."""

    def line(title: str, of: Callable[[Stats], float | None]) -> list[tuple[str, str, str]]:
        before, after = of(entry.before), of(entry.after)
        return [] if before is None or after is None else [(title, units.seconds(before), units.seconds(after))]

    return line("predicted time", lambda s: s.predicted_seconds) + line("measured time", lambda s: s.measured_seconds)


def _gain(name: str, value: float) -> Html:
    loss = " loss" if value < LOSS else ""
    return element("span", element("b", units.times(value)), f" {name}", class_=f"gain{loss}")


def _remarks(title: str, remarks: Sequence[Remark], state: str) -> Html | None:
    if not remarks:
        return None
    groups = grouped(remarks)
    items = [
        element(
            "li",
            element("span", group.message),
            element("span", f" ×{group.count:,}", class_="times") if group.count > 1 else None,
            element("span", group.rule, class_="rule") if group.rule else None,
            _places(group.places),
        )
        for group in groups[:SHOWN_GROUPS]
    ]
    if len(groups) > SHOWN_GROUPS:
        items.append(element("li", f"and {len(groups) - SHOWN_GROUPS:,} more", class_="muted"))
    return join([element("h3", f"{title} ({len(remarks):,})"), element("ul", items, class_=f"remarks {state}")])


def _places(places: Sequence[str]) -> Html | None:
    if not places:
        return None
    shown = [element("code", place) for place in places[:SHOWN_PLACES]]
    if len(places) > SHOWN_PLACES:
        shown.append(element("span", f"and {len(places) - SHOWN_PLACES:,} more", class_="muted"))
    return element("div", join(shown, " "), class_="places")


# -- kernels ---------------------------------------------------------------------------------------------------------


def _kernels(data: ReportData) -> Html | None:
    if not data.kernels:
        return None
    ranked = sorted(runs(data), key=lambda run: -run.seconds)
    plot = roofline(ranked, data.machine)
    return _section(
        "kernels",
        "Where the time goes",
        None if plot is None else element("figure", element("div", plot, class_="scroll"), _legend(ranked)),
        _kernel_table(ranked, data.machine),
        note=f"Times are {where_times_are_from(data)}, slowest first.",
    )


def _layers(data: ReportData) -> Html | None:
    """Time and memory by place in the model."""
    found = layers(runs(data))
    if len(found) < 2:
        return None
    slowest = max(layer.seconds for layer in found)
    largest = max(max(layer.weights, layer.live) for layer in found)
    titles = ["layer", "kernels", "time", "weights", "values alive"]
    return _section(
        "layers",
        "Time and memory of each layer",
        element(
            "div",
            table(titles, [_layer_row(layer, slowest, largest) for layer in found], "layers"),
            class_="tall",
            tabindex=0,
        ),
        note="In the order in which they run. Values alive: the most bytes of intermediate values at one time while its kernels run.",
    )


def _layer_row(layer: Layer, slowest: float, largest: int) -> list[Cell]:
    return [
        Cell(element("code", layer.name)),
        Cell(f"{layer.kernels:,}", layer.kernels),
        Cell(
            _bar(layer.seconds, slowest, f"{units.seconds(layer.seconds)} · {units.share(layer.share)}", "time"),
            layer.seconds,
        ),
        Cell(_bar(layer.weights, largest, units.size(layer.weights), "bytes"), layer.weights),
        Cell(_bar(layer.live, largest, units.size(layer.live), "bytes"), layer.live),
    ]


def _memory(data: ReportData) -> Html | None:
    memory = data.memory
    plot = timeline(memory.timeline)
    if plot is None:
        return None
    known = [("weights", memory.weights_bytes), ("most at one time", max(s.live_bytes for s in memory.timeline.steps))]
    words = [element("span", f"{title} {units.size(value)}") for title, value in known if value is not None]
    rows = plural(memory.timeline.rows, "row")
    return _section(
        "memory",
        "Memory while it runs",
        element(
            "figure", element("div", plot, class_="scroll"), element("figcaption", join(words, " "), class_="muted")
        ),
        note=f"Bytes of the intermediate values that are alive at each call of a kernel, with {rows}. All of them share one arena.",
    )


def _tuning(data: ReportData) -> Html | None:
    if not data.tuning:
        return None
    rows: list[list[Child]] = [
        [
            element("code", kernel.symbol),
            element("span", tuning_gain(kernel), class_="chip" if kernel.is_default else "chip good"),
            kernel.default,
            "the default" if kernel.is_default else kernel.chosen,
            "; ".join(tuning_times(kernel)),
            kernel.origin,
        ]
        for kernel in sorted(data.tuning, key=lambda kernel: -kernel.gain)[:SHOWN_KERNELS]
    ]
    rest = len(data.tuning) - len(rows)
    return _section(
        "tuning",
        "Tuning",
        _rows(["kernel", "gain", "default schedule", "chosen schedule", "time of a call", "from"], rows, "findings"),
        element("p", f"and {plural(rest, 'more kernel')}", class_="muted") if rest else None,
        note="For each distinct kernel, schedules were measured on this machine. Another one than the default is chosen only where it is "
        "clearly faster.",
    )


def _legend(found: Sequence[Run]) -> Html:
    keys = [
        element("span", element("i", class_=f"key {limit}"), f"bound by {words}") for limit, words in LIMITS.items()
    ]
    if any(run.measured for run in found):
        keys.append(element("span", element("i", class_="key hollow"), "where it was predicted"))
    if still := sum(not run.flops for run in found):
        keys.append(element("span", f"{plural(still, 'kernel')} without arithmetic not shown"))
    return element("figcaption", join(keys, " "), class_="muted")


def _kernel_table(ranked: Sequence[Run], machine: Roofline | None) -> Html:
    slowest = max((max(run.seconds, run.predicted or 0.0) for run in ranked), default=0.0)
    largest = max((run.bytes for run in ranked), default=0)
    rows = [_kernel_row(run, slowest, largest, machine) for run in ranked[:SHOWN_KERNELS]]
    rest = ranked[SHOWN_KERNELS:]
    more = None
    if rest:
        words = f"and {plural(len(rest), 'more kernel')}: {units.share(sum(run.share for run in rest))} of the time"
        more = element("p", words, class_="muted more")
    titles = ["kernel", "time", "predicted", "memory traffic", "arithmetic", "bound by"]
    return join([element("div", table(titles, rows, "kernels"), class_="tall", tabindex=0), more])


def _kernel_row(run: Run, slowest: float, largest: int, machine: Roofline | None) -> list[Cell]:
    error = "" if run.error is None else f" · {100 * run.error:+.0f}%"
    predicted = (
        None
        if run.predicted is None
        else _bar(run.predicted, slowest, f"{units.seconds(run.predicted)}{error}", "predicted")
    )
    return [
        Cell(_kernel_name(run)),
        Cell(
            _bar(run.seconds, slowest, f"{units.seconds(run.seconds)} · {units.share(run.share)}", "time"), run.seconds
        ),
        Cell(predicted, run.predicted or 0.0),
        Cell(_bar(run.bytes, largest, units.size(run.bytes), "bytes"), run.bytes),
        Cell(units.count(run.flops, "FLOP"), run.flops),
        Cell(None if machine is None else LIMITS[limit_of(run, machine)]),
    ]


def _kernel_name(run: Run) -> Html:
    details = [text for text in (run.kernel.strategy, run.kernel.location) if text]
    return join(
        [
            element("code", run.kernel.symbol, class_="symbol"),
            *(element("span", text, class_="sub") for text in details),
        ]
    )


def _bar(value: float, whole: float, words: str, kind: str) -> Html:
    part = 100 * value / whole if whole else 0.0
    return join(
        [element("span", words), element("span", element("i", style=f"width:{part:.1f}%"), class_=f"bar {kind}")]
    )


# -- tables ----------------------------------------------------------------------------------------------------------


def _rows(titles: Sequence[str], rows: Sequence[Sequence[Child]], kind: str) -> Html:
    """A table whose rows keep their order."""
    return table(titles, [[Cell(cell) for cell in row] for row in rows], kind, sortable=False)


def _parity(data: ReportData) -> Html | None:
    if not data.parity.methods:
        return None
    titles = ["result", "rows", "max error", "relative to scale", "mean error", "part of the bound"]
    rows = [_parity_row(name, found) for name, found in data.parity.comparisons]
    if data.has_labels:
        titles.append("labels that differ")
        rows = [[*row, _labels(found)] for row, (_, found) in zip(rows, data.parity.comparisons, strict=True)]
    note = f"The worst comparison of each result, on examples and on rows made to find differences. Bound: {data.parity.tolerance}."
    if data.parity.refused:
        note += f" Left out: rows made for this that the source refuses ({data.parity.refused})."
    if data.parity.shortened:
        note += f" Fewer rows than the thresholds of the model call for: {data.parity.shortened}."
    return _section(
        "parity",
        "Parity with the source",
        _rows(titles, rows, "parity"),
        note=note,
    )


def _parity_row(name: str, found: Comparison) -> list[Child]:
    state = "good" if found.excess <= 1 else "bad"
    return [
        element("code", name),
        f"{found.rows:,}",
        units.error(found.max_abs_error),
        units.error(found.max_rel_error),
        units.error(found.mean_abs_error),
        element("span", units.share(found.excess), class_=f"chip {state}"),
    ]


def _labels(found: Comparison) -> str:
    return f"{found.label_mismatches:,}" + (f" (+{found.ties:,} at ties)" if found.ties else "")


_CHIPS = {"error": "chip bad", "warning": "chip warn", "note": "chip"}


def _stability(data: ReportData) -> Html | None:
    if not data.stability:
        return None
    rows: list[list[Child]] = [
        [
            element("span", "rewritten", class_="chip good")
            if found.applied
            else element("span", found.severity, class_=_CHIPS[found.severity]),
            join([element("b", found.rule), element("div", found.location, class_="muted")]),
            found.message,
            join([found.input, element("div", found.shows, class_="muted") if found.shows else None, _numbers(found)]),
            found.errors,
            found.remedy,
        ]
        for found in data.stability
    ]
    titles = ["severity", "finding", "what goes wrong", "input that shows it", "relative error", "stable spelling"]
    return _section(
        "stability",
        "Numerical stability",
        _rows(titles, rows, "findings"),
        note="Each input was run in the precision of the model and in a wider one. The JSON form of the report has all numbers.",
    )


def _numbers(found: Unstable) -> Html | None:
    """The input that shows it, number by number."""
    if not found.witness:
        return None
    shown = "\n".join(f"{name} = {json.dumps(values)}" for name, values in found.witness.items())
    cut = f"{shown[:WITNESS_CHARACTERS]} …" if len(shown) > WITNESS_CHARACTERS else shown
    return element("details", element("summary", "numbers"), element("pre", cut), class_="numbers")


def _quantization(data: ReportData) -> Html | None:
    if not data.quantization:
        return None
    titles, rows = quantization_rows(data.quantization)
    kept = sum(on_8_bits(entry) for entry in data.quantization)
    return _section(
        "quantization",
        "Quantisation",
        element("div", table(titles, rows, "findings quantization"), class_="scroll wide"),
        note=f"{kept:,} of {plural(len(data.quantization), 'layer')} on 8 bits; of each, what was decided and why.",
    )


# -- graphs ----------------------------------------------------------------------------------------------------------


def _graphs(data: ReportData) -> Html | None:
    pictures = [("before", data.graphs.before), ("after", data.graphs.after)]
    pictures = [(name, picture) for name, picture in pictures if picture.nodes or picture.text]
    if not pictures:
        return None
    places: dict[str, int] = {}
    drawn = {name: draw(picture, name, data.machine, places) for name, picture in pictures}
    tools = element(
        "div",
        element("input", type="search", placeholder="Find an op, a type, a file …", aria_label="find a node", data_find=True),
        element("output", "", class_="muted", data_found=True),
        class_="tools", hidden=True,
    )  # fmt: skip
    return _section(
        "graphs",
        "The graph before and after",
        tools if any(drawn.values()) else None,
        element("div", [_graph(name, picture, drawn[name]) for name, picture in pictures], class_="graphs"),
        element("pre", "", class_="picked", hidden=True, aria_live="polite", data_picked=True),
        note="The stronger its colour, the more of the predicted time a node takes. Select a node for its type, source and cost; "
        "the nodes from the same source lines light up.",
    )


def _graph(name: str, picture: Picture, drawn: Html | None) -> Html:
    buttons = [
        element("button", sign, type="button", data_zoom=step, aria_label=words)
        for sign, step, words in (("−", "out", "zoom out"), ("+", "in", "zoom in"), ("Fit", "fit", "fit the width"))
    ]
    heading = element(
        "h3",
        name.capitalize(),
        element("span", f" {len(picture.nodes):,} nodes with inputs and outputs", class_="muted"),
    )
    if drawn is None:
        notice = f"Graphs of more than {DRAWN_NODES:,} nodes are shown as text."
        return element("div", heading, element("p", notice, class_="muted"), _text(picture), class_="panel")
    return element(
        "div",
        element("div", heading, element("div", buttons, class_="buttons", hidden=True), class_="bar-top"),
        element("div", drawn, class_="view", tabindex=0),
        element("details", element("summary", "Text"), _text(picture), class_="source"),
        class_="panel",
    )


def _text(picture: Picture) -> Html:
    cut = picture.text[:TEXT_CHARACTERS]
    more = f"\n… {len(picture.text) - len(cut):,} more characters" if len(cut) < len(picture.text) else ""
    return element("pre", cut + more)
