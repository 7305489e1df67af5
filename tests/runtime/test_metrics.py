"""Counting what a model does."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from sklearn.linear_model import LogisticRegression

import mlec
from mlec.errors import InputError, RuntimeUnavailableError, UsageError
from mlec.runtime.metrics import BOUNDS, Metrics, WatchedModel


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 4))
    path = tmp_path_factory.mktemp("metrics") / "churn.mle"
    mlec.compile(LogisticRegression().fit(X, X[:, 0] > 0), X[:5], validate=False).save(path)
    return path


@pytest.fixture
def model(file: Path) -> mlec.CompiledModel:
    return mlec.load(file, metrics=True)


def test_calls_rows_and_errors_are_counted(model: mlec.CompiledModel) -> None:
    X = np.zeros((7, 4))
    model.predict(X)
    model.predict_proba(X)
    model.run([X])
    model(X)
    model.run([X], out=[np.empty(7, bool), np.empty((7, 2))])
    for wrong in (np.zeros((7, 3)), np.zeros((2, 5))):
        with pytest.raises(InputError):
            model.predict(wrong)
    with pytest.raises(InputError):
        model.run(["nonsense"])
    found = model.metrics()
    assert (found["inferences"], found["rows"]) == (5, 35)
    assert sum(found["errors"].values()) == 3
    assert all(code.startswith("E_INPUT") for code in found["errors"])
    assert found["peak_memory_bytes"] == model.peak_memory_usage() > 0


def test_latencies_lie_in_their_buckets() -> None:
    metrics = Metrics("m", lambda: 0)
    assert metrics()["latency_seconds"]["p50"] is None
    for seconds in [1.5e-6] * 50 + [3e-3] * 45 + [0.4] * 5:
        metrics.count(seconds, np.zeros((2, 3)))
    metrics.count(1000.0, np.zeros(()))
    found = metrics()["latency_seconds"]
    assert (found["buckets"][2e-6], found["buckets"][BOUNDS[-1]], found["buckets"][float("inf")]) == (50, 100, 101)
    assert [repr(bound) for bound in list(found["buckets"])[:3]] == ["1e-06", "2e-06", "5e-06"], "as labels show them"
    assert 1e-6 < found["p50"] <= 5e-3
    assert 0.2 < found["p99"] <= 0.5
    assert found["sum"] == pytest.approx(50 * 1.5e-6 + 45 * 3e-3 + 5 * 0.4 + 1000)
    assert metrics()["rows"] == 201


def test_prometheus_reads_the_same_numbers(model: mlec.CompiledModel) -> None:
    for _ in range(3):
        model.predict(np.zeros((2, 4)))
    with pytest.raises(InputError):
        model.predict(np.zeros((2, 9)))
    text = model.metrics("prometheus")
    samples = {
        (s.name, s.labels.get("le") or s.labels.get("code")): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }
    found = model.metrics()
    assert samples["mlec_inferences_total", None] == found["inferences"] == 3
    assert samples["mlec_rows_total", None] == found["rows"] == 6
    assert samples["mlec_latency_seconds_count", None] == 3
    assert samples["mlec_latency_seconds_bucket", "+Inf"] == 3
    assert samples["mlec_latency_seconds_sum", None] == pytest.approx(found["latency_seconds"]["sum"])
    assert samples["mlec_peak_memory_bytes", None] == found["peak_memory_bytes"]
    assert {code for name, code in samples if name == "mlec_errors_total"} == set(found["errors"])
    assert 'model="churn"' in text


def test_it_is_a_collector(model: mlec.CompiledModel) -> None:
    registry = CollectorRegistry()
    assert isinstance(model, WatchedModel)
    registry.register(model.metrics)
    model.predict(np.zeros((2, 4)))
    assert registry.get_sample_value("mlec_inferences_total", {"model": "churn"}) == 1


def test_threads_lose_no_count(model: mlec.CompiledModel) -> None:
    x = np.zeros((1, 4))
    workers = [threading.Thread(target=lambda: [model.predict(x) for _ in range(200)]) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert model.metrics()["inferences"] == 1600


def test_results_are_those_of_a_model_that_nobody_watches(file: Path, model: mlec.CompiledModel) -> None:
    X = np.random.default_rng(1).normal(size=(9, 4))
    plain = mlec.load(file)
    np.testing.assert_array_equal(model.predict_proba(X), plain.predict_proba(X))
    np.testing.assert_array_equal(model.decision_function(X), plain.decision_function(X))
    assert "predict_proba" in dir(model)
    with pytest.raises(UsageError, match="has no transform"):
        model.transform(X)


def test_refusals(file: Path, model: mlec.CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="nothing was counted") as caught:
        mlec.load(file).metrics()
    assert "metrics=True" in str(caught.value.hint)
    with pytest.raises(UsageError, match="'json'"):
        model.metrics("json")
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(RuntimeUnavailableError, match="prometheus-client"):
        model.metrics("prometheus")
