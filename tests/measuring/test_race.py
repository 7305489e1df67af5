"""Sources have as many threads as the models that are timed beside them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlec.frontends.source_process import SourceProcess
from mlec.frontends.source_threads import JOBS, limited_threads
from mlec.measuring.race import race


def test_libraries_are_held_to_a_number_and_let_go_again(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    joblib = pytest.importorskip("joblib")
    controlled = pytest.importorskip("threadpoolctl")
    monkeypatch.delenv(JOBS, raising=False)
    before = torch.get_num_threads()
    with limited_threads(1) as held:
        assert held
        assert torch.get_num_threads() == joblib.effective_n_jobs(-1) == 1
        assert {pool["num_threads"] for pool in controlled.threadpool_info()} == {1}
    assert torch.get_num_threads() == before
    assert JOBS not in os.environ


def test_the_source_has_the_threads_of_the_compiled_model() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("threadpoolctl")
    seen = []
    found = race({"compiled": lambda: None, "source": lambda: seen.append(torch.get_num_threads())}, 1, {}, 0.01)
    assert set(seen) == {1}
    assert found.source_threads == 1
    assert race({"compiled": lambda: None}, 1, {}, 0.01).source_threads is None


def test_a_source_in_a_process_of_its_own_is_told(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("threadpoolctl")
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), path)
    process = SourceProcess("torch", "program", path.read_bytes(), ("run",), path)
    assert process.limit_threads(1)
