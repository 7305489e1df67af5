"""The pass in the pipeline, the report and the commands."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest

import mlec
from mlec.cli import main
from mlec.errors import UsageError
from mlec.ir import Graph, GraphBuilder, parse_graph, run_graph, tensor
from mlec.passes.stability import CheckNumerics
from mlec.pipeline import PassContext, PassPipeline

SOFTMAX = """graph @by_hand(%x: f32[n, 4]) -> (f32[n, 4]) {
  %e = exp(%x) : f32[n, 4]  loc("model.py":12 in "head")
  %s = sum(%e) {axes = [1], keepdims = true} : f32[n, 1]  loc("model.py":13 in "head")
  %y = div(%e, %s) : f32[n, 4]  loc("model.py":13 in "head")
  return %y
}
"""


def softmax_by_hand() -> Graph:
    return parse_graph(SOFTMAX)


def deep(blocks: int, width: int) -> Graph:
    """Dense layers with residual connections, and a softmax by hand."""
    b = GraphBuilder("deep")
    x = h = b.input("x", tensor("f32", ("n", width)))
    weights = (np.eye(width) / 2).astype(np.float32)
    for _ in range(blocks):
        h = b("add", h, b("relu", b("matmul", h, b.constant(weights))))
    e = b("exp", b("div", h, x))
    return b.finish([b("div", e, b("sum", e, axes=(1,), keepdims=True))])


def test_options_and_text() -> None:
    assert str(PassPipeline.parse("stability{stabilize = true}")) == "stability{stabilize = true}"
    default = [step.name for step in PassPipeline.parse("default")]
    assert default.index("cse") < default.index("stability") < default.index("layout")
    assert "stability" not in [step.name for step in PassPipeline.parse("O0")]


def test_the_report_holds_the_finding_with_its_place_and_a_warning() -> None:
    _, report = mlec.optimize(softmax_by_hand(), "O1")
    (finding,) = report.stability
    assert finding["location"] == "model.py:13 (head)"
    assert np.array(finding["witness"]["x"]).shape == (2, 4)
    (warning,) = report.warnings
    assert warning.startswith("softmax-by-hand at model.py:13 (head): exp overflows")
    assert "y is nan instead of 0.25; softmax(x) is stable (--stabilize)" in warning
    json.loads(report.to_json(), parse_constant=pytest.fail)  # no NaN, no Infinity
    text = report.to_text()
    assert "numerical stability: 1 error" in text
    assert "! error: softmax-by-hand at model.py:13 (head)" in text
    assert "relative error not finite -> " in text
    page = report.to_html()
    assert "softmax-by-hand" in page
    assert "model.py:13 (head)" in page


def test_what_is_rewritten_is_no_warning() -> None:
    graph, report = mlec.optimize(softmax_by_hand(), "cse,stability{stabilize = true}")
    assert [node.name for node in graph.nodes] == ["softmax"]
    assert report.stability[0]["applied"]
    assert report.warnings == []
    assert "numerical stability: 1 rewritten" in report.to_text()
    assert np.allclose(run_graph(graph, [np.full((1, 4), 1000, np.float32)]), 0.25)


def test_each_run_finds_the_same() -> None:
    graph = deep(3, 8)
    first, second = (CheckNumerics().run(graph, PassContext()).findings for _ in range(2))
    assert first == second


def test_a_model_too_large_to_be_executed_takes_no_time_and_gets_notes() -> None:
    graph = deep(8, 2048)
    start = time.perf_counter()
    found = CheckNumerics().run(graph, PassContext()).findings
    assert time.perf_counter() - start < 5  # executing it once takes longer than the search may
    assert {f["severity"] for f in found} == {"note"}
    assert [f["rule"] for f in found] == ["softmax-by-hand"]
    assert "too large" in found[0]["message"]
    assert found[0]["witness"] == {}


def test_more_effort_executes_more() -> None:
    graph = softmax_by_hand()
    assert CheckNumerics(effort=1e-6).run(graph, PassContext()).findings[0]["severity"] == "note"
    assert CheckNumerics(effort=2.0).run(graph, PassContext()).findings[0]["severity"] == "error"


def test_the_effort_that_a_note_names_executes_the_model() -> None:
    graph = deep(8, 512)
    (note,) = CheckNumerics().run(graph, PassContext()).findings
    (effort,) = re.findall(r"stability\{effort=(\d+)\}", note["message"])
    assert 1 < int(effort) < 1000
    assert CheckNumerics(effort=int(effort)).run(graph, PassContext()).findings != (note,)


# -- compile -------------------------------------------------------------------------------------------------------------


def test_compile_warns_and_stabilizes() -> None:
    torch = pytest.importorskip("torch")

    class ByHand(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x):  # type: ignore[no-untyped-def]
            e = torch.exp(x)
            return e / e.sum(-1, keepdim=True)

    far = torch.full((3, 4), 500.0)
    plain = mlec.compile(ByHand(), far, target="numpy")
    assert [f["rule"] for f in plain.report.stability] == ["softmax-by-hand"]
    assert "test_pass.py" in plain.report.stability[0]["location"]
    assert any(warning.startswith("softmax-by-hand at ") for warning in plain.report.warnings)
    assert np.isnan(plain.run([far])[0]).all()

    stable = mlec.compile(ByHand(), far, target="numpy", stabilize=True)
    assert stable.report.stability[0]["applied"]
    assert np.allclose(stable.run([far])[0], 0.25)

    near = mlec.compile(ByHand(), far, target="numpy", input_ranges={"x": (-5, 5)})
    assert near.report.stability == []
    seen = mlec.compile(ByHand(), torch.randn(3, 4), target="numpy", input_ranges="examples")
    assert seen.report.stability == []


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ({"z": (0, 1)}, "no input 'z'"),
        ({"x": (1, 0)}, "smallest and its largest"),
        ({"x": 3}, "smallest and its largest"),
        ({"x": (float("nan"), 1)}, "smallest and its largest"),
        ([0, 1], "takes a mapping"),
        ("examples", "without examples"),
    ],
)
def test_ranges_that_say_nothing_of_the_model_are_refused(ranges: object, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        mlec.compile(softmax_by_hand(), target="numpy", input_ranges=ranges)  # type: ignore[arg-type]


def test_the_command_prints_a_warning_and_takes_ranges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "by_hand.mlet"
    source.write_text(SOFTMAX)

    def output(*options: str, code: int = 0) -> str:
        assert main(["compile", str(source), "--target", "numpy", *options]) == code
        return " ".join(capsys.readouterr().out.split())

    assert "softmax-by-hand at model.py:13" in output()
    assert "softmax-by-hand" not in output("--stabilize")
    assert "softmax-by-hand" not in output("--input-range", "x=-5,5")
    output("--input-range", "x=5", code=2)


def test_opt_prints_what_is_severe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "by_hand.mlet"
    source.write_text(SOFTMAX)
    assert main(["opt", str(source), "--passes", "stability"]) == 0
    assert "// stability: error: softmax-by-hand at model.py:13 (head)" in capsys.readouterr().out
    assert main(["opt", str(source), "--passes", "stability", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["passes"]
    assert [finding["rule"] for finding in entry["findings"]] == ["softmax-by-hand"]
