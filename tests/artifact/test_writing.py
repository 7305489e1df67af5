"""Saving: the name leads to the old file or to the new one, whole, whatever happens in between."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlec.artifact import Artifact, atomic, write
from mlec.cli import main
from mlec.errors import WriteError


def save(path: Path | str, value: int, size: int = 3000) -> None:
    write(path, metadata={"value": value}, graph="g", tensors={"w": np.full(size, value)})


def content(path: Path) -> int:
    with Artifact.open(path) as artifact:
        value = int(artifact.metadata["value"])
        assert (artifact.tensors["w"] == value).all()
        return value


@pytest.fixture(params=["unnamed", "named"])
def temporary(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to hold the data before the rename."""
    if request.param == "named":
        monkeypatch.setattr(atomic, "_open_unnamed", lambda directory: None)
    return request.param


def test_replaces_a_file_and_leaves_nothing_else(tmp_path: Path, temporary: str) -> None:
    for value in (1, 2):
        save(tmp_path / "m.mle", value)
        assert content(tmp_path / "m.mle") == value
    assert os.listdir(tmp_path) == ["m.mle"]


def test_short_writes_are_continued(tmp_path: Path, temporary: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original, rng = os.write, random.Random(0)
    monkeypatch.setattr(os, "write", lambda fd, data: original(fd, data[: rng.randint(1, 700)]))
    save(tmp_path / "m.mle", 1)
    assert content(tmp_path / "m.mle") == 1


def test_the_order_of_the_calls(tmp_path: Path, temporary: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the name leads to is on the disk before the name leads there, and the name is before saving is done."""
    calls: list[str] = []

    def recorded(name: str) -> None:
        original = getattr(os, name)

        def record(*arguments: Any, **options: Any) -> Any:
            what = "directory" if name == "fsync" and stat.S_ISDIR(os.fstat(arguments[0]).st_mode) else name
            if calls[-1:] != [what]:
                calls.append(what)
            return original(*arguments, **options)

        monkeypatch.setattr(os, name, record)

    for name in ("posix_fallocate", "write", "fsync", "link", "replace"):
        recorded(name)
    save(tmp_path / "m.mle", 1)
    linked = ["link"] if temporary == "unnamed" else []
    assert calls == ["posix_fallocate", "write", "fsync", *linked, "replace", "directory"]


CALLS = ["open", "posix_fallocate", "write", "fsync", "link", "replace"]
ERRORS = {
    errno.ENOSPC: "E_WRITE_NO_SPACE",
    errno.EDQUOT: "E_WRITE_NO_SPACE",
    errno.EFBIG: "E_WRITE_TOO_LARGE",
    errno.EIO: "E_WRITE_IO",
    errno.EROFS: "E_WRITE_READ_ONLY",
    errno.EACCES: "E_WRITE_PERMISSION",
    errno.ENAMETOOLONG: "E_WRITE_NAME",
    errno.EMLINK: "E_WRITE",
}


def failing(monkeypatch: pytest.MonkeyPatch, call: str, at: int, error: BaseException) -> list[int]:
    """Let the ``at``-th use of an os function fail, and all that follow. Returns the list of uses."""
    original, uses = getattr(os, call), []

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        uses.append(1)
        if len(uses) > at:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(os, call, wrapper)
    return uses


@pytest.mark.parametrize("number", ERRORS, ids=[errno.errorcode[n] for n in ERRORS])
def test_failing_calls_leave_the_old_file(
    tmp_path: Path, temporary: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / "m.mle"
    save(path, 1)
    reached = 0
    for call in CALLS:
        for at in range(20):
            with monkeypatch.context() as patch:
                uses = failing(patch, call, at, OSError(number, os.strerror(number)))
                try:
                    save(path, 2)
                except WriteError as error:
                    caught = error
                else:
                    break
            assert len(uses) > at
            reached += 1
            assert os.listdir(tmp_path) == ["m.mle"]
            assert caught.hint
            if caught.code == "E_WRITE_NOT_DURABLE":
                assert content(path) == 2
                save(path, 1)
            else:
                assert caught.code == ERRORS[number]
                assert str(path) in caught.message
                assert content(path) == 1
        save(path, 1)
    assert reached > 8


def test_a_command_that_cannot_save_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.mle"
    save(path, 1)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        failing(patch, "posix_fallocate", 0, OSError(errno.ENOSPC, "full"))
        assert main(["recover", str(path), "-o", str(tmp_path / "out"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["code"] == "E_WRITE_NO_SPACE"
    assert path.read_bytes() == before
    assert os.listdir(tmp_path / "out") == []


def test_interruption_leaves_the_old_file(tmp_path: Path, temporary: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.mle"
    save(path, 1)
    for call in CALLS:
        if call == "link" and temporary == "named":
            continue
        with monkeypatch.context() as patch:
            failing(patch, call, 0, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                save(path, 2)
        assert os.listdir(tmp_path) == ["m.mle"]
        assert content(path) == 1


def test_the_file_size_limit_of_the_system(tmp_path: Path) -> None:
    save(tmp_path / "m.mle", 1)
    code = f"""
import resource, numpy as np
from mlec.artifact import write
from mlec.errors import WriteError
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    write({str(tmp_path / "m.mle")!r}, metadata={{}}, graph="", tensors={{"w": np.ones(100_000)}})
except WriteError as error:
    print(error.code)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "E_WRITE_TOO_LARGE"
    assert os.listdir(tmp_path) == ["m.mle"]
    assert content(tmp_path / "m.mle") == 1


def test_a_killed_writer_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    path = tmp_path / "m.mle"
    save(path, 0, size=300_000)
    code = f"""
import itertools, numpy as np
from mlec.artifact import write
print("ready", flush=True)
for value in itertools.count():
    write({str(path)!r}, metadata={{"value": value}}, graph="g", tensors={{"w": np.full(300_000, value)}})
"""
    rng = random.Random(1)
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert content(path) >= 0
    assert len(os.listdir(tmp_path)) <= 2  # killed between link and rename, at most once


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "m.mle"
    old, running, recent = (tmp_path / f"{atomic._prefix('m.mle')}{name}.tmp" for name in ("old", "running", "recent"))
    other = tmp_path / f"{atomic._prefix('other.mle')}old.tmp"
    for left in (old, running, recent, other):
        left.write_bytes(b"half")
        if left is not recent:
            os.utime(left, (1, 1))
    with open(running, "rb") as writer:
        atomic.fcntl.flock(writer, atomic.fcntl.LOCK_EX)
        save(path, 1)
    assert {p.name for p in tmp_path.iterdir()} == {path.name, running.name, recent.name, other.name}


def test_parallel_writers_and_readers(tmp_path: Path, temporary: str) -> None:
    path = tmp_path / "m.mle"
    save(path, 0)
    errors: list[BaseException] = []

    def work(step: Any) -> None:
        try:
            for value in range(50):
                step(value)
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=work, args=(step,))
        for step in [lambda v: save(path, v)] * 2 + [lambda _: content(path)] * 2
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert os.listdir(tmp_path) == ["m.mle"]


@pytest.mark.parametrize(("umask", "mode"), [(0o000, 0o644), (0o002, 0o644), (0o022, 0o644), (0o077, 0o600)])
def test_the_umask_is_respected_and_nobody_else_may_write(
    tmp_path: Path, temporary: str, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        save(tmp_path / "m.mle", 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "m.mle").stat().st_mode) == mode


def test_symbolic_links_are_followed_and_stay(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    save(tmp_path / "store" / "v1.mle", 1)
    (tmp_path / "latest.mle").symlink_to("store/v1.mle")
    save(tmp_path / "latest.mle", 2)
    assert (tmp_path / "latest.mle").is_symlink()
    assert content(tmp_path / "store" / "v1.mle") == 2
    (tmp_path / "new.mle").symlink_to("store/v2.mle")
    save(tmp_path / "new.mle", 3)
    assert content(tmp_path / "store" / "v2.mle") == 3


def test_links_that_others_made_in_a_shared_directory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    (shared / "m.mle").symlink_to(tmp_path / "victim")
    (tmp_path / "victim").write_text("precious")
    me = os.geteuid()
    save(shared / "m.mle", 1)
    (tmp_path / "victim").write_text("precious")
    original = os.lstat

    def lstat(path: Any, **options: Any) -> os.stat_result:
        fields = list(original(path, **options))
        fields[stat.ST_UID] = me + 1 if Path(path) == shared / "m.mle" else fields[stat.ST_UID]
        return os.stat_result(fields)

    monkeypatch.setattr(os, "lstat", lstat)
    with pytest.raises(WriteError) as caught:
        save(shared / "m.mle", 2)
    assert caught.value.code == "E_WRITE_SYMLINK"
    assert (tmp_path / "victim").read_text() == "precious"


def test_targets_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop.mle").symlink_to("loop.mle")
    (tmp_path / "plain").write_text("x")
    for target, code in (
        (tmp_path, "E_WRITE_DIRECTORY"),
        (tmp_path / "pipe", "E_WRITE_NOT_A_FILE"),
        ("/dev/full", "E_WRITE_NOT_A_FILE"),
        (tmp_path / "missing" / "m.mle", "E_WRITE_NO_DIRECTORY"),
        (tmp_path / "plain" / "m.mle", "E_WRITE_NO_DIRECTORY"),
        (tmp_path / "loop.mle", "E_WRITE_NAME"),
        (tmp_path / ("x" * 300), "E_WRITE_NAME"),
        (str(tmp_path / "a\0b"), "E_WRITE"),
    ):
        with pytest.raises(WriteError) as caught:
            save(target, 1)
        assert caught.value.code == code, target
        assert caught.value.hint
    assert sorted(os.listdir(tmp_path)) == ["loop.mle", "pipe", "plain"]


def test_a_file_can_be_saved_over_itself_while_it_is_open(tmp_path: Path) -> None:
    path = tmp_path / "m.mle"
    save(path, 5)
    with Artifact.open(path) as artifact:
        write(path, metadata={"value": 5}, graph=artifact.graph, tensors=artifact.tensors)
    assert content(path) == 5


def test_a_name_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    save(tmp_path / ("x" * 255), 1)
    assert content(tmp_path / ("x" * 255)) == 1


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    save(tmp_path / "m.mle", 1)
    content(tmp_path / "m.mle")
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
