"""What a process that reads a model file may not do."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mlec.errors import FrontendError
from mlec.frontends import confinement, source_process

PROBE = """
import json, multiprocessing, os, socket, subprocess, sys, threading
here, inside, outside, parent = sys.argv[1:]
def refused(action, *arguments, **options):
    try:
        action(*arguments, **options)
    except OSError:
        return True
    return False
socket_ = socket.socket()
found = {
    "make": refused(open, outside + "/new", "w"), "write": refused(open, here, "a"), "cut": refused(os.truncate, here, 0),
    "remove": refused(os.unlink, here), "move": refused(os.rename, here, inside + "/moved"), "link": refused(os.link, here, outside + "/l"),
    "connect": refused(socket_.connect, ("127.0.0.1", int(os.environ["PORT"]))), "listen": refused(socket_.bind, ("127.0.0.1", 0)),
    "signal": refused(os.kill, int(parent), 0), "environment": refused(open, f"/proc/{parent}/environ"),
    "shell": bool(subprocess.call(["/bin/sh", "-c", "echo x > " + outside + "/new"], stderr=subprocess.DEVNULL)),
}
thread = threading.Thread(target=lambda: found.update(thread=refused(open, outside + "/new", "w")))
thread.start(); thread.join()
open(inside + "/temporary", "w").write("x"); open("/dev/null", "w").write("x"); multiprocessing.Semaphore()
print(json.dumps([open(here).read(), found]))
"""
"""Tries what must be refused, and does what must not."""


def test_only_a_folder_can_be_written_to_and_nobody_reached(tmp_path: Path) -> None:
    version = confinement._call(ctypes.CDLL(None), confinement._CREATE_RULESET, None, 0, confinement._ASK_VERSION)
    if version < 6:
        pytest.skip("this kernel has not all of Landlock")
    import socket

    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "file").write_text("content")
    (outside / "probe.py").write_text(PROBE)
    with socket.create_server(("127.0.0.1", 0)) as server:
        environment = {
            **os.environ,
            "PYTHONPATH": str(outside),
            "PORT": str(server.getsockname()[1]),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        words = (inside, "probe", outside / "file", inside, outside, os.getpid())
        done = subprocess.run(
            [sys.executable, "-P", confinement.__file__, *map(str, words)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    content, refused = json.loads(done.stdout)
    assert content == "content"
    assert all(refused.values()), refused
    assert len(refused) == 12
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "inside", "outside", "probe.py", "temporary"]


def test_without_landlock_a_module_runs_all_the_same(tmp_path: Path) -> None:
    code = f"from mlec.frontends import confinement as c; c._call = lambda *_: -1; print(c.confine({str(tmp_path)!r}))"
    assert (
        subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout == "0\n"
    )


def test_the_folder_goes_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def started() -> source_process.SourceProcess:
        return source_process.SourceProcess("torch", "", b"", (), "model.pt2")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(source_process, "in_memory", fail)
        with pytest.raises(OSError, match="No space"):
            started()
    assert not os.listdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkdtemp", fail)
        with pytest.raises(FrontendError, match="temporary files: No space") as caught:
            started()
    assert caught.value.code == "E_TEMPORARY_SPACE"

    process = started()
    (folder,) = tmp_path.iterdir()
    monkeypatch.chdir(folder)
    for _ in range(2 * sys.getrecursionlimit()):
        os.mkdir("deeper")
        os.chdir("deeper")
    process.close()
    os.chdir(tmp_path)
    subprocess.run(["rm", "-rf", folder], check=True)
