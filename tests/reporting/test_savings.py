"""What passes are worth: predicted beside measured, in every form."""

from __future__ import annotations

import json

import pytest

from mlec.report import OptimizationReport
from mlec.reporting.schema import Stats
from mlec.reporting.summary import model_error, saving

from .pages import Page


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (4e-5, 3e-5, "saves 10.0 µs of 40.0 µs (1.33x)"),
        (3e-5, 4e-5, "costs 10.0 µs on 30.0 µs (0.750x)"),
        (3e-5, 3.0000001e-5, "nothing saved, 30.0 µs as before"),
        (None, 3e-5, ""),
        (3e-5, None, ""),
        (3e-5, 0.0, ""),
    ],
)
def test_savings(before: float | None, after: float | None, words: str) -> None:
    assert saving(before, after) == words


def test_the_error_of_the_model_is_relative_to_what_was_measured() -> None:
    assert model_error(Stats(predicted_seconds=3e-5, measured_seconds=2e-5)) == "+50%"
    assert model_error(Stats(predicted_seconds=3e-5)) == model_error(Stats(measured_seconds=2e-5)) == ""


@pytest.fixture(scope="module")
def measured(report: OptimizationReport) -> OptimizationReport:
    """The report as if the graphs around the last rewrite had been timed."""
    data = json.loads(report.to_json())
    entry = [entry for entry in data["passes"] if entry["applied"]][-1]
    entry["before"] |= {"predicted_seconds": 4e-5, "measured_seconds": 5e-5}
    entry["after"] |= {"predicted_seconds": 2e-5, "measured_seconds": 4e-5}
    entry |= {"predicted_gain": 2.0, "measured_gain": 1.25}
    data["profile"] = {"rows": 8, "seconds": 4e-5, "predicted_seconds": 2e-5}
    data["timing"]["baseline"] = {"unoptimised_ms": 0.12, "speedup": 3.0, "predicted_speedup": 4.0}
    return OptimizationReport.from_dict(data)


def test_each_rewrite_has_its_predicted_and_its_measured_saving(measured: OptimizationReport) -> None:
    for text in (Page(measured.to_html()).text, measured.to_text()):
        assert "saves 20.0 µs of 40.0 µs (2.00x)" in text
        assert "saves 10.0 µs of 50.0 µs (1.25x)" in text
        assert "-50%" in text


def test_the_whole_is_measured_against_the_graph_without_passes(measured: OptimizationReport) -> None:
    page = Page(measured.to_html())
    (table,) = page.of_class("worth")
    assert table["class"] == "rows worth"
    assert "all passes, against O0" in page.text
    assert "saves 80.0 µs of 120 µs (3.00x)" in page.text
    assert "on the same 8 rows" in page.text


def test_what_was_not_measured_is_only_predicted(report: OptimizationReport) -> None:
    page = Page(report.to_html())
    assert "predicted saving" in page.text
    assert "measured saving" not in page.text
    assert "--measure-passes measures it" in page.text


def test_the_input_that_shows_a_finding_is_there_number_by_number(report: OptimizationReport) -> None:
    data = json.loads(report.to_json())
    finding = {"rule": "exp-overflow", "severity": "error", "input": "x: 100 everywhere", "shows": "y is inf"}
    long = [float(i) for i in range(4000)]
    data["stability"] = [finding | {"witness": {"x": [[100.0, 100.5]], "y": None}}, finding | {"witness": {"x": long}}]
    page = Page(OptimizationReport.from_dict(data).to_html())
    assert "x = [[100.0, 100.5]]" in page.text
    assert "199.0, 200.0, " in page.text
    assert "3999.0" not in page.text


def test_the_text_has_layers_and_memory(report: OptimizationReport) -> None:
    data = json.loads(report.to_json())
    steps = [{"symbol": k["symbol"], "live_bytes": 1024 * (i + 1)} for i, k in enumerate(data["kernels"])]
    data["memory"]["timeline"] = {"rows": 8, "arena_bytes": 65536, "steps": steps}
    text = " ".join(OptimizationReport.from_dict(data).to_text().split())
    assert "layers.0" in text
    assert (
        f"most at one time: {len(steps)}.00 KiB, at call {len(steps)} of {len(steps)} ({steps[-1]['symbol']})" in text
    )
    assert "64.0 KiB" in text
