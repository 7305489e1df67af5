from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mlec
from mlec.ir import Graph, GraphBuilder, tensor
from mlec.measuring import machine
from mlec.measuring.machine import Machine


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
