"""What a process that reads a model file may not do."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlec.frontends import confinement

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
    "signal": refused(os.kill, int(parent), 0),
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
    assert len(refused) == 11
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "inside", "outside", "probe.py", "temporary"]


def test_without_landlock_a_module_runs_all_the_same(tmp_path: Path) -> None:
    code = f"from mlec.frontends import confinement as c; c._call = lambda *_: -1; print(c.confine({str(tmp_path)!r}))"
    assert (
        subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout == "0\n"
    )
