"""The CPU quota of control groups, read from made-up trees of both versions."""

from __future__ import annotations

import _thread
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from mlec.runtime import threads


def process(tmp_path: Path, group: str, mount: str) -> Path:
    proc = tmp_path / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(group + "\n")
    (proc / "mountinfo").write_text("20 1 0:5 / /sys rw - sysfs sysfs rw\n" + mount + "\n")
    return proc


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_dot_", ".")).write_text(text)


def test_version_2_takes_the_tightest_level(tmp_path: Path) -> None:
    top = tmp_path / "cgroup"
    write(top / "a" / "b", cpu_dot_max="max 100000\n")
    write(top / "a", cpu_dot_max="250000 100000\n")
    proc = process(tmp_path, "0::/a/b", f"30 20 0:9 / {top} rw - cgroup2 cgroup rw")
    assert threads.cgroup_quota(proc) == 2.5
    write(top / "a" / "b", cpu_dot_max="150000 100000\n")
    assert threads.cgroup_quota(proc) == 1.5


def test_version_1(tmp_path: Path) -> None:
    top = tmp_path / "cpu"
    write(top / "a", cpu_dot_cfs_quota_us="400000", cpu_dot_cfs_period_us="100000")
    proc = process(tmp_path, "4:cpu,cpuacct:/a", f"30 20 0:9 / {top} rw - cgroup cgroup rw,cpu,cpuacct")
    assert threads.cgroup_quota(proc) == 4
    write(top / "a", cpu_dot_cfs_quota_us="-1")
    assert threads.cgroup_quota(proc) is None


def test_container_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    top = tmp_path / "cpu"
    write(top, cpu_dot_cfs_quota_us="300000", cpu_dot_cfs_period_us="100000")
    mount = f"30 20 0:9 /docker/abc {top} rw - cgroup cgroup rw,cpu"
    assert threads.cgroup_quota(process(tmp_path, "4:cpu:/docker/abc", mount)) == 3


def test_nothing_to_read(tmp_path: Path) -> None:
    assert threads.cgroup_quota(tmp_path / "no such process") is None


@pytest.mark.parametrize(("quota", "expected"), [(None, 8), (2.9, 2), (0.5, 1), (100.0, 8)])
def test_effective_count(monkeypatch: pytest.MonkeyPatch, quota: float | None, expected: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    now = 1e9  # at which nobody asked
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(threads, "cgroup_quota", lambda: quota)
    threads._quota_in.cache_clear()
    assert threads.effective_cpu_count() == expected
    monkeypatch.setattr(threads, "cgroup_quota", lambda: 3.0)
    assert threads.effective_cpu_count() == expected
    now += 1
    assert threads.effective_cpu_count() == 3, "a quota that changes is seen a second later"
    threads._quota_in.cache_clear()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, 8), ({"OMP_NUM_THREADS": "3"}, 3), ({"TVM_NUM_THREADS": "2", "OMP_NUM_THREADS": "3"}, 2)]
    + [({"OMP_NUM_THREADS": bad}, 8) for bad in ("", "0", "4,2", "100")],
)
def test_environment_is_asked(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: int) -> None:
    monkeypatch.setattr(threads, "effective_cpu_count", lambda: 8)
    for variable in ("TVM_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert threads.default_num_threads() == expected


@pytest.mark.parametrize("cpus", [1, 3])
def test_side_by_side(monkeypatch: pytest.MonkeyPatch, cpus: int) -> None:
    monkeypatch.setattr(threads, "effective_cpu_count", lambda: cpus)
    assert threads.side_by_side([partial(pow, 2, n) for n in range(50)]) == [2**n for n in range(50)]
    assert threads.side_by_side([]) == []
    with pytest.raises(ValueError, match="first"):
        threads.side_by_side([partial(int, "7"), partial(fail, "first"), partial(fail, "second")])


def test_side_by_side_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []

    def task() -> None:
        if threading.get_ident() == threading.main_thread().ident:
            raise KeyboardInterrupt
        time.sleep(0.01)
        done.append(1)

    monkeypatch.setattr(threads, "effective_cpu_count", lambda: 2)
    with pytest.raises(KeyboardInterrupt):
        threads.side_by_side([task] * 200)
    at_once = len(done)
    assert at_once < 100, "what was not begun is left"
    time.sleep(0.1)
    assert len(done) == at_once, "no thread goes on"


def fail(why: str) -> None:
    raise ValueError(why)


def _refused(*_: object) -> int:
    raise RuntimeError("can't start new thread")


def _without_memory(*_: object) -> int:
    raise MemoryError


def _never_begun(*_: object) -> int:
    return 1


@pytest.mark.parametrize("start", [_refused, _without_memory, _never_begun])
def test_side_by_side_does_without_threads(monkeypatch: pytest.MonkeyPatch, start: Callable[..., int]) -> None:
    monkeypatch.setattr(threads, "effective_cpu_count", lambda: 4)
    monkeypatch.setattr(_thread, "start_new_thread", start)
    assert threads.side_by_side([partial(pow, 2, n) for n in range(9)]) == [2**n for n in range(9)]


def test_what_a_helper_finds_no_memory_for_is_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def work(self: threads.SideBySide) -> None:
        taken.extend(self._left)
        raise MemoryError

    monkeypatch.setattr(threads, "effective_cpu_count", lambda: 2)
    with monkeypatch.context() as patch:
        patch.setattr(threads.SideBySide, "_work", work)
        begun = threads.SideBySide([partial(pow, 2, n) for n in range(9)])
        while len(taken) < 9:
            time.sleep(0.001)
    assert begun.results() == [2**n for n in range(9)]
