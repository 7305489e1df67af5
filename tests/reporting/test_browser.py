"""The page as a browser shows it: on a desk and on a phone, in the light and in the dark, with names that want to break it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlec.report import OptimizationReport

from .browser import CHROMIUM, Browser
from .conftest import HOSTILE, perceptron, report_of
from .test_html import observed

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

BEYOND = """
[...document.querySelectorAll("body *")].filter((element) => {
  const box = element.getBoundingClientRect();
  if (!box.width || (box.left >= -1 && box.right <= innerWidth + 1)) return false;
  for (let outer = element.parentElement; outer !== document.body; outer = outer.parentElement)
    if (getComputedStyle(outer).overflowX !== "visible") return false;
  return true;
}).map((element) => element.outerHTML.slice(0, 100))
"""
"""What reaches beyond the window and is in no box that scrolls."""
SPILT = "[...document.querySelectorAll('td')].filter((cell) => cell.scrollHeight > cell.clientHeight + 1).length"
"""Cells whose words reach into the next row."""
SMALLEST = """
Math.min(...[...document.querySelectorAll("main *:not(title)")].filter((element) =>
  element.checkVisibility({ contentVisibilityAuto: true }) && !element.closest(".graph") &&
  [...element.childNodes].some((child) => child.nodeType === Node.TEXT_NODE && child.data.trim())
).map((element) => {
  const svg = element.ownerSVGElement;
  const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
  return scale * parseFloat(getComputedStyle(element).fontSize);
}))
"""
"""Pixels of the smallest words outside of the graphs."""
FAINT = """
(() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = colour.map((v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let outer = element; outer; outer = outer.parentElement) {
      const colour = numbers(getComputedStyle(outer).backgroundColor);
      if (colour.length < 4 || colour[3]) return colour.slice(0, 3);
    }
  };
  return [...document.querySelectorAll("main *:not(title)")].filter((element) => {
    if (![...element.childNodes].some((child) => child.nodeType === Node.TEXT_NODE && child.data.trim())) return false;
    const style = getComputedStyle(element), svg = element.ownerSVGElement;
    const [low, high] = [numbers(svg ? style.fill : style.color).slice(0, 3), ground(svg ? svg.parentElement : element)]
      .map(light).sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05) < 4.5;
  }).map((element) => element.outerHTML.slice(0, 100));
})()
"""
"""Words whose contrast with what is behind them is less than WCAG AA asks for."""
SEARCH = """
((text) => {
  const field = document.querySelector("[data-find]");
  field.value = text;
  field.dispatchEvent(new Event("input"));
  return document.querySelectorAll(".node.hit").length;
})
"""
PRESS = """((key) => document.querySelector("[data-find]").dispatchEvent(new KeyboardEvent("keydown", { key })))"""
SEEN = """
((node) => {
  const box = node.getBoundingClientRect();
  const frame = node.closest(".view").getBoundingClientRect();
  const [top, bottom] = [Math.max(frame.top, 0), Math.min(frame.bottom, innerHeight)];
  return box.top >= top - 1 && box.bottom <= bottom + 1 && box.left >= frame.left - 1 && box.right <= frame.right + 1;
})
"""
"""Whether a node is in the window, within its frame."""
NOW = "document.querySelector('.node.now')"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with all sections, and names that are long, or markup."""
    long = "a_name_of_many_words_" * 12
    report: Any = json.loads(observed(report_of(perceptron(file=f"{long}.py"), warnings=[HOSTILE, long])).to_json())
    report["model"] |= {"name": long + HOSTILE, "precision": "int8"}
    finding = {
        "rule": long,
        "severity": "error",
        "location": HOSTILE,
        "message": long,
        "input": "x: 100 everywhere",
        "shows": "y is inf",
    }
    report["stability"] = [
        finding | {"witness": {"x": [[100.0] * 40]}, "error_before": "not finite"},
        {"rule": "r", "message": "m"},
    ]
    layer = {
        "layer": long,
        "location": f"{long}.py:3",
        "decision": "int8",
        "reason": HOSTILE,
        "sqnr_db": 31.5,
        "predicted_gain": 2.0,
    }
    report["quantization"] = [
        layer | {"method": "mse", "scale": 0.1, "weights": [3, 3, 64, 64], "op": "conv"},
        {"layer": HOSTILE},
    ]
    report["tuning"] = [{"symbol": long, "default": f"Schedule({long})", "chosen": "", "trials": 3}]
    entry = [entry for entry in report["passes"] if entry["applied"]][-1]
    entry["before"]["measured_seconds"], entry["after"]["measured_seconds"], entry["measured_gain"] = 5e-5, 4e-5, 1.25
    report["timing"]["baseline"] = {"unoptimised_ms": 0.12, "speedup": 3.0, "predicted_speedup": 4.0}
    path = tmp_path_factory.mktemp("pages") / "report.html"
    OptimizationReport.from_dict(report).save(path)
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390, 320])
def test_the_page_fits_its_window(browser: Browser, everything: Path, width: int, dark: bool) -> None:
    browser.open(everything, width, dark)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(BEYOND) == []
    assert browser.run(SPILT) == 0
    assert browser.run(SMALLEST) >= 11.5
    assert browser.run(FAINT) == []


def test_nothing_is_fetched_and_nothing_of_a_model_runs(browser: Browser, everything: Path) -> None:
    browser.open(everything, 1280)
    assert browser.requests == [everything.as_uri()]
    assert browser.complaints == []
    assert browser.run("document.scripts.length") == 1


def test_large_graphs_are_zoomed_and_searched(browser: Browser, tmp_path: Path) -> None:
    large, page = report_of(perceptron(blocks=250, width=8)), tmp_path / "large.html"
    large.save(page)
    browser.open(page, 390)
    shown = "[...document.querySelectorAll('.graph')].map((graph) => graph.width.baseVal.value)"
    first = browser.run(shown)
    browser.run("document.querySelectorAll('[data-zoom=in]').forEach((button) => button.click())")
    assert browser.run(shown) == [pytest.approx(1.3 * width) for width in first]
    browser.run("document.querySelectorAll('[data-zoom=fit]').forEach((button) => button.click())")
    frames = browser.run("[...document.querySelectorAll('.view')].map((view) => view.clientWidth)")
    assert all(graph <= frame for graph, frame in zip(browser.run(shown), frames, strict=True))

    hits = sum("relu" in node["label"] for picture in large.graphs.values() for node in picture["nodes"])
    assert browser.run(f"{SEARCH}('RELU')") == hits > 300
    for key in ("Enter", "Enter"):
        browser.run(f"{PRESS}('{key}')")
        assert browser.run(f"{SEEN}({NOW})")
    assert browser.run("document.querySelector('[data-found]').textContent") == f"3 of {hits}: Enter for the next"
    browser.run(
        "document.querySelectorAll('[data-zoom=out]').forEach((b) => Array.from({ length: 20 }, () => b.click()))"
    )
    browser.run(f"{PRESS}('Enter')")
    assert browser.run(f"{SEEN}({NOW})")
    assert browser.run(f"{NOW}.getBoundingClientRect().height") > 25, "it can be read"
    browser.run(f"{NOW}.dispatchEvent(new MouseEvent('click', {{ bubbles: true }}))")
    assert "relu" in browser.run("document.querySelector('[data-picked]').textContent")
    assert browser.run(f"{SEARCH}('no such op')") == 0
    assert browser.complaints == []


def test_a_click_on_a_title_sorts(browser: Browser, everything: Path) -> None:
    browser.open(everything, 1280)
    column = "[...document.querySelectorAll('.kernels tbody tr')].map((row) => Number(row.cells[4].dataset.sort))"
    found = browser.run(column)
    for wanted in (sorted(found, reverse=True), sorted(found)):
        browser.run("document.querySelectorAll('.kernels th')[4].click()")
        assert browser.run(column) == wanted
    assert len(set(found)) > 1
