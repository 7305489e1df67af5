from __future__ import annotations

import base64
import hashlib
import json
import re
import time

import pytest

from mlec.backends.base import KernelNote
from mlec.report import OptimizationReport
from mlec.reporting.graph_svg import DRAWN_NODES
from mlec.runtime.program import KernelInfo

from .conftest import HOSTILE, MACHINE, perceptron, report_of
from .pages import Page


@pytest.fixture(scope="module")
def page(report: OptimizationReport) -> Page:
    return Page(report.to_html())


def test_the_page_says_what_the_text_says(page: Page, report: OptimizationReport) -> None:
    assert "4.00x faster" in page.text
    assert "0.4% of the bound" in page.text
    assert list(page.of_class("pass")) != []
    assert "net.py:10 (layers.0)" in page.text
    for kernel in report.kernels:
        assert kernel["symbol"] in page.text


def test_both_graphs_are_drawn_in_full(page: Page, report: OptimizationReport) -> None:
    pictures = report.graphs["before"], report.graphs["after"]
    assert len(page.of_class("graph")) == 2
    assert len(page.of_class("node")) == sum(len(p["nodes"]) for p in pictures)
    edges = [a for a in page.tags("path") if "marker-end" in a]
    assert len(edges) == sum(len({tuple(e) for e in p["edges"]}) for p in pictures)


def test_fused_nodes_name_the_ops_of_their_body(page: Page) -> None:
    assert "matmul_packed + add + relu" in page.text


def test_every_kernel_with_arithmetic_is_on_the_roofline(page: Page, report: OptimizationReport) -> None:
    assert len(page.of_class("dot")) == sum(k["nominal_flops"] > 0 for k in report.kernels)
    inside = [(float(a["cx"] or 0), float(a["cy"] or 0)) for a in page.of_class("dot")]
    (plot,) = page.of_class("roofline")
    _, _, width, height = map(float, (plot["viewbox"] or "").split())
    assert all(0 < x < width and 0 < y < height for x, y in inside)


def test_kernels_of_float64_have_the_peak_of_float64() -> None:
    report = OptimizationReport(machine=MACHINE.to_dict())
    kernels = [KernelInfo(name, "matmul", "", flops=10**9, bytes=10**6) for name in ("single", "double")]
    notes = {"double": KernelNote("double", "matmul", "gemm", bits=64)}
    report.add_kernels(kernels, notes, {"single": 0.01, "double": 0.02})
    page = Page(report.to_html())
    assert "float32, 100 GFLOP/s" in page.text
    assert "float64, 50.0 GFLOP/s" in page.text


def test_the_page_fetches_nothing(report: OptimizationReport) -> None:
    source = report.to_html()
    page = Page(source)
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "base", "form"), tag
        assert "src" not in attributes
        assert "href" not in attributes
    assert not re.search(r"https?://|@import|url\((?!#)", source)


def test_only_its_own_script_may_run(report: OptimizationReport) -> None:
    source = report.to_html()
    (script,) = re.findall(r"<script>(.*?)</script>", source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [a["content"] for a in Page(source).tags("meta") if "http-equiv" in a]
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


def test_nothing_of_a_model_becomes_markup() -> None:
    report = report_of(perceptron(file=HOSTILE), warnings=[HOSTILE])
    report.model |= {
        "name": HOSTILE,
        "source": HOSTILE,
        "kind": HOSTILE,
        "target": {"device": HOSTILE, "mcpu": HOSTILE},
    }
    report.stability = [
        {"rule": HOSTILE, "location": HOSTILE, "message": HOSTILE, "input": HOSTILE, "rewrite": HOSTILE}
    ]
    report.quantization = [{HOSTILE: HOSTILE}]
    report.parity["methods"] = {HOSTILE: {"method": HOSTILE}}
    report.timing["predicted_seconds"] = {HOSTILE: 1.0}
    for entry in report.passes:
        entry["name"] = HOSTILE
        for remark in [*entry["applied"], *entry["missed"]]:
            remark["message"] = remark["rule"] = HOSTILE
    for kernel in report.kernels:
        kernel.update(symbol=HOSTILE, op=HOSTILE, strategy=HOSTILE)
    for picture in report.graphs.values():
        picture["text"] = HOSTILE
        for node in picture["nodes"]:
            node.update(label=HOSTILE, type=HOSTILE, op=HOSTILE)
    source = report.to_html()
    assert source.count("<script") == 1
    assert HOSTILE not in source
    clean = Page(
        report_of(perceptron(), warnings=["w"], stability=[{"rule": "r"}], quantization=[{"a": "b"}]).to_html()
    )
    assert {tag for tag, _ in Page(source).elements} <= {tag for tag, _ in clean.elements}
    assert HOSTILE in Page(source).text


def test_a_hostile_id_draws_nothing_and_breaks_nothing() -> None:
    nodes = [{"id": HOSTILE}, {"id": "a"}, {"id": "b"}]
    edges = [[HOSTILE, "a"], ["a", "b"], ["b", "a"], ["a", "a"], ["a", "missing"], ["a", "b"]]
    page = Page(OptimizationReport(graphs={"before": {"nodes": nodes, "edges": edges}}).to_html())
    assert len(page.of_class("node")) == 3
    assert len([a for a in page.tags("path") if "marker-end" in a]) == 2


def test_a_thousand_nodes_are_drawn_in_time() -> None:
    report = report_of(perceptron(blocks=250, width=8))
    assert len(report.graphs["before"]["nodes"]) >= 1000
    start = time.process_time()
    source = report.to_html()
    assert time.process_time() - start < 2
    assert len(Page(source).of_class("node")) >= 1000


def test_a_graph_too_large_to_draw_is_shown_as_text() -> None:
    nodes = [{"id": f"n{i}", "op": "relu"} for i in range(DRAWN_NODES + 1)]
    page = Page(OptimizationReport(graphs={"before": {"nodes": nodes, "edges": [], "text": "graph @large"}}).to_html())
    assert page.of_class("graph") == []
    assert "graph @large" in page.text
    assert "shown as text" in page.text


def test_an_empty_report_is_a_page() -> None:
    assert "Nothing was recorded" in Page(OptimizationReport().to_html()).text


def test_a_report_without_a_machine_has_no_roofline(report: OptimizationReport) -> None:
    data = json.loads(report.to_json()) | {"machine": {}}
    page = Page(OptimizationReport.from_dict(data).to_html())
    assert page.of_class("roofline") == []
    assert report.kernels[0]["symbol"] in page.text


def test_the_page_survives_json(report: OptimizationReport) -> None:
    assert OptimizationReport.from_dict(json.loads(report.to_json())).to_html() == report.to_html()


def test_kernels_without_work_do_not_divide_by_zero(report: OptimizationReport) -> None:
    data = json.loads(report.to_json())
    for kernel in data["kernels"]:
        kernel |= {"nominal_flops": 0, "nominal_bytes": 0, "predicted_seconds": 0.0}
    page = Page(OptimizationReport.from_dict(data).to_html())
    assert page.of_class("roofline") == []


def observed(report: OptimizationReport) -> OptimizationReport:
    """The report as if the model had been run: each kernel twice as fast as predicted."""
    data = json.loads(report.to_json())
    data["profile"] = {
        "rows": 8, "extents": {"n": 8}, "seconds": 1e-5, "predicted_seconds": 2e-5,
        "kernels": [
            {
                "symbol": k["symbol"], "seconds": k["predicted_seconds"] / 2, "predicted_seconds": k["predicted_seconds"],
                "flops": k["nominal_flops"] // 8, "bytes": k["nominal_bytes"] // 8,
            }
            for k in data["kernels"]
        ],
    }  # fmt: skip
    steps = [{"symbol": k["symbol"], "live_bytes": 1024 * (i + 1)} for i, k in enumerate(data["kernels"])]
    data["memory"]["timeline"] = {"rows": 8, "arena_bytes": 65536, "steps": steps}
    return OptimizationReport.from_dict(data)


def test_predicted_and_measured_are_on_the_roofline(report: OptimizationReport) -> None:
    page = Page(observed(report).to_html())
    dots = page.of_class("dot")
    rings = [a for a in page.of_class("ring") if "r" in a]
    assert len(dots) == len(rings) > 0
    assert all(float(ring["cy"] or 0) > float(dot["cy"] or 0) for dot, ring in zip(dots, rings, strict=True))
    assert "+100%" in page.text


def test_time_and_memory_of_each_layer(report: OptimizationReport) -> None:
    page = Page(observed(report).to_html())
    assert "layers.0" in page.text
    (table,) = page.of_class("layers")
    assert "data-sortable" in table
    assert len(page.of_class("timeline")) == 1
    assert "arena, 64.0 KiB" in page.text


def test_layers_are_joined_until_there_are_few() -> None:
    from mlec.reporting.runs import MOST_LAYERS, layers, runs
    from mlec.reporting.schema import typed

    report = OptimizationReport()
    kernels = [KernelInfo(f"k{i}", "relu", f"net.py:{i} (blocks.{i % 4}.part{i})") for i in range(200)]
    report.add_kernels(kernels, {}, {kernel.symbol: 1e-6 for kernel in kernels})
    found = layers(runs(typed(report)))
    assert [layer.name for layer in found] == [f"blocks.{i}" for i in range(4)]
    assert len(found) <= MOST_LAYERS
    assert sum(layer.kernels for layer in found) == 200
    assert sum(layer.share for layer in found) == pytest.approx(1)


def test_the_table_of_quantised_layers_sorts_by_numbers() -> None:
    findings = [
        {"layer": "a", "location": "net.py:1", "decision": "int8", "sqnr_db": 31.5, "weights": [64, 32], "float32_us": 20.5},
        {"layer": "b", "location": "net.py:2", "decision": "float32", "sqnr_db": None, "weights": [8, 8], "other": True},
    ]  # fmt: skip
    page = Page(OptimizationReport(quantization=findings).to_html())
    (table,) = page.of_class("quantization")
    assert "data-sortable" in table
    for words in ("31.5 dB", "64 × 32", "20.5 µs", "net.py:2", "1 of 2 layers on 8 bits"):
        assert words in page.text
    assert {a.get("data-sort") for a in page.tags("td")} == {"31.5", "20.5", None}
