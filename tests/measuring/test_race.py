"""Sources have as many threads as the models that are timed beside them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mlec.frontends.source_process import SourceProcess
from mlec.frontends.source_threads import JOBS, limited_threads
from mlec.measuring.race import race
from mlec.measuring.timing import OtherWork


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


def works(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_on_a_busy_machine_both_have_one_thread_and_their_time_on_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("threadpoolctl")
    monkeypatch.setattr(OtherWork, "processors", lambda self: (1.5, 2))
    threads = [2]

    def source() -> None:
        works(1e-3)
        time.sleep(0.01)  # as where others have the processor

    actions: dict[str, Callable[[], object]] = {"compiled": lambda: works(5e-4), "source": source}
    found = race(actions, 2, {}, 0.05, threads.append)
    assert threads == [2, 1, 2]
    assert (found.threads, found.source_threads, found.processor_time, found.disturbance) == (1, 1, True, "")
    assert 1e-3 <= min(found.seconds["source"]) < 5e-3
    alone = race(actions, 2, {}, 0.05)  # where nothing can be held to one thread
    assert (alone.threads, alone.processor_time) == (2, False)
    assert "not reliable" in alone.disturbance


def test_a_clock_of_the_processor_that_counts_in_ticks_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("threadpoolctl")
    monkeypatch.setattr(OtherWork, "processors", lambda self: (1.5, 2))
    monkeypatch.setattr(time, "thread_time", lambda: 1.0)
    actions: dict[str, Callable[[], object]] = {"compiled": lambda: sum(range(500)), "source": lambda: sum(range(900))}
    threads = [2]
    found = race(actions, 2, {}, 0.02, threads.append)
    assert threads == [2, 1, 2], "it was tried"
    assert not found.processor_time
    assert min(found.seconds["compiled"]) > 0
