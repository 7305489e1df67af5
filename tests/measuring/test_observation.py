from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

import mlec
from mlec.ir import Graph, GraphBuilder, tensor
from mlec.measuring import machine
from mlec.measuring.machine import Machine
from mlec.pipeline import Pass, PassContext, PassResult, Remark


def network(width: int = 64) -> Graph:
    rng = np.random.default_rng(0)
    b = GraphBuilder("g")
    h = b.input("x", tensor("f32", ("n", width)))
    for _ in range(2):
        h = b("relu", b("matmul", h, b.constant(rng.normal(size=(width, width)).astype(np.float32))))
    return b.finish([b("softmax", h, axis=-1)])


@pytest.fixture(scope="module")
def compiled() -> mlec.CompiledModel:
    return mlec.compile(network(), np.ones((32, 64), np.float32), measure_passes=True, progress=False)


def test_every_kernel_is_measured_beside_its_prediction(compiled: mlec.CompiledModel) -> None:
    report = compiled.report
    profile = report.profile
    assert profile["rows"] == 32
    assert profile["extents"] == {"n": 32}
    assert [k["symbol"] for k in profile["kernels"]] == [k["symbol"] for k in report.kernels]
    for kernel in profile["kernels"]:
        assert kernel["predicted_seconds"] > 0
        assert kernel["seconds"] >= 0
    assert sum(k["flops"] for k in profile["kernels"]) > 2 * 2 * 32 * 64 * 64
    assert profile["seconds"] == report.timing["measured"]["all_threads_ms"] / 1e3
    assert profile["predicted_seconds"] > sum(k["predicted_seconds"] for k in profile["kernels"])
    assert [k["weights_bytes"] for k in report.kernels][:2] == [4 * 64 * 64] * 2


def test_the_timeline_has_what_is_alive_at_each_call(compiled: mlec.CompiledModel) -> None:
    timeline = compiled.report.memory["timeline"]
    plan = compiled.memory_plan(np.ones((32, 64), np.float32))
    assert plan is not None
    assert timeline["rows"] == 32
    assert timeline["arena_bytes"] == plan.arena_nbytes
    assert max(step["live_bytes"] for step in timeline["steps"]) == plan.live_nbytes
    assert len(timeline["steps"]) == len(compiled.report.kernels)


def test_what_passes_are_worth_is_measured(compiled: mlec.CompiledModel) -> None:
    report = compiled.report
    assert report.timing["baseline"]["speedup"] > 0
    rewrites = [entry["predicted_gain"] for entry in report.passes]
    assert np.prod(rewrites) == pytest.approx(report.timing["baseline"]["predicted_speedup"])
    last = report.passes[-1]["after"]["predicted_seconds"]
    assert last == pytest.approx(report.profile["predicted_seconds"])  # of the same call
    by_name = {entry["name"]: entry for entry in report.passes}
    assert by_name["infer-shapes"]["measured_gain"] == 1.0
    fuse = by_name["fuse"]
    assert fuse["measured_gain"] == fuse["before"]["measured_seconds"] / fuse["after"]["measured_seconds"]
    assert fuse["predicted_gain"] == fuse["before"]["predicted_seconds"] / fuse["after"]["predicted_seconds"] > 1
    assert "measured against the graph without passes (O0)" in " ".join(report.to_text().split())
    assert " measured" in report.to_html()


def looped() -> Graph:
    """Has work for several rules of one pass: a factor 1 twice, a sum with 0, and two reshapes in a row."""
    b = GraphBuilder("g")
    x = b.input("x", tensor("f32", ("n", 64)))
    h = b("mul", b("mul", x, b.constant(np.float32(1))), b.constant(np.float32(1)))
    h = b("exp", b("tanh", b("neg", b("neg", h))))
    h = b("reshape", b("reshape", h, shape=("n", 8, 8)), shape=("n", 4, 16))
    return b.finish([h])


def test_each_rule_of_a_pass_is_measured_by_leaving_it_out() -> None:
    x = np.ones((512, 64), np.float32)
    passes = "canonicalize,layout,fuse"
    report = mlec.compile(looped(), x, passes=passes, measure_passes=True, progress=False).report
    canonicalize, layout, fuse = report.passes
    rules = {one["rule"]: one for one in canonicalize["rewrites"]}
    applied = [remark["rule"] for remark in canonicalize["applied"]]
    assert {name: one["applied"] for name, one in rules.items()} == {name: applied.count(name) for name in applied}
    assert len(rules) >= 3
    nodes = canonicalize["after"]["nodes"]
    assert rules["DropNeutral"]["before"]["nodes"] == nodes + 2
    assert rules["MergeReshapes"]["before"]["nodes"] == nodes + 1
    for one in rules.values():
        assert one["after"]["nodes"] == nodes
        for kind in ("predicted", "measured"):
            seconds = [one[side][f"{kind}_seconds"] for side in ("before", "after")]
            assert one[f"{kind}_gain"] == seconds[0] / seconds[1] > 0
    assert rules["DropNeutral"]["predicted_gain"] > 1
    (fusion,) = fuse["rewrites"]
    assert fusion["measured_gain"] == fuse["measured_gain"]
    assert layout["rewrites"] == []
    assert "= DropNeutral (2 times): " in report.to_text()
    assert ">MergeReshapes<" in report.to_html()


def test_a_rule_that_another_one_stands_in_for_is_worth_nothing() -> None:
    b = GraphBuilder("g")
    x = b.input("x", tensor("f32", ("n", 64)))
    graph = b.finish([b("exp", b("neg", x))])
    report = mlec.compile(
        graph, np.ones((8, 64), np.float32), passes=[_ThreeRules()], measure_passes=True, progress=False
    ).report
    (entry,) = report.passes
    assert [(one["rule"], one["predicted_gain"], one["measured_gain"]) for one in entry["rewrites"]] == [
        ("b", 1.0, 1.0)
    ]


@dataclass(frozen=True)
class _ThreeRules(Pass):
    """Says that it applied three rules, one of them without a name: it leaves out the second only, which it does not need."""

    name: ClassVar[str] = "three-rules"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        applied = [Remark("applied", "a", rule="a"), Remark("applied", "nameless")]
        if context.takes("b"):
            applied.append(Remark("applied", "b", rule="b"))
        return PassResult(graph, tuple(applied))


def test_only_the_whole_is_measured_where_that_is_asked_for() -> None:
    x = np.ones((4, 64), np.float32)
    report = mlec.compile(network(), x, measure_passes="total", progress=False).report
    assert report.timing["baseline"]["unoptimised_ms"] > 0
    assert all(entry["measured_gain"] is None for entry in report.passes)


def test_a_graph_that_does_not_compile_as_it_is_leaves_the_gain_open() -> None:
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = np.random.default_rng(0).normal(size=(50, 3))
    model = make_pipeline(StandardScaler(), RandomForestRegressor(3, max_depth=3)).fit(x, x[:, 0])
    report = mlec.compile(model, x, measure_passes=True, progress=False).report
    assert report.profile["kernels"]
    assert report.passes


def test_the_machine_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    made = Machine(
        flops=1e11, flops64=5e10, bandwidth=1e10, copies=((1 << 15, 1e11),), **machine._narrow_products()
    )  # fmt: skip
    calls = []
    monkeypatch.setattr(machine, "measure", lambda threads: calls.append(threads) or made)
    again = machine.this_machine.__wrapped__
    assert again() == made
    assert again() == made
    assert len(calls) == 1
    (file,) = (tmp_path / "mlec" / "machine").iterdir()
    file.write_text('{"flops": -1}')
    assert again() == made
    assert len(calls) == 2


def test_rates_of_the_machine() -> None:
    made = Machine(
        flops=3e11,
        flops64=1e11,
        bandwidth=1.5e10,
        threads=2,
        core_flops=2e11,
        copies=((1 << 15, 1e11), (1 << 27, 1e10)),
    )
    assert made.peak(32, 1) == 2e11
    assert made.peak(32, 2) == made.peak(32) == 3e11
    assert made.peak(64, 1) == 5e10
    assert made.traffic(1 << 10) == 1e11
    assert made.traffic(1 << 10, 2) == 2e11
    assert made.traffic(1 << 28) == 1e10
    assert made.traffic(1 << 30, 2) == 1.5e10
