"""Opens one file after another as the process of a source does, each in a fork of this one: the libraries are imported once."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlec.errors import MlecError
from mlec.frontends.base import FileFrontend, LowerOptions

SECONDS = 60
MEMORY = 4 << 30
FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pty.spawn", "socket.connect", "socket.bind",
    "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.", "ctypes.dlopen", "pickle.find_class",
    "webbrowser.open", "urllib.Request",
)  # fmt: skip
"""Events of Python's audit that no reading of data makes."""


def outcome(frontend: FileFrontend, kind: str, path: Path) -> str:
    """What becomes of a file: ``read``, the code of an error of ours, how the process ended, or what it did that it must not."""
    given, taken = os.pipe()
    child = os.fork()
    if not child:
        os.close(given)
        _read(frontend, kind, path, lambda text: os.write(taken, text.encode(errors="replace")[:500]))
    os.close(taken)
    until = time.monotonic() + 2 * SECONDS
    said = b""
    while time.monotonic() < until:
        if select.select([given], [], [], 1)[0]:
            part = os.read(given, 1000)
            if not part:
                break
            said += part
    else:
        os.kill(child, signal.SIGKILL)
        said = b"DEFECT: hangs"
    os.close(given)
    _, status = os.waitpid(child, 0)
    if said:
        return said.decode(errors="replace")
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {status}"


def _read(frontend: FileFrontend, kind: str, path: Path, say: Callable[[str], object]) -> None:
    """Never returns."""
    with contextlib.suppress(BaseException):
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        size = path.stat().st_size
        with open("/proc/self/statm") as statm:
            taken = int(statm.read().split()[0]) * resource.getpagesize()
        most = taken + MEMORY + 64 * size
        for limit, value in (("AS", most), ("CPU", SECONDS), ("FSIZE", 1 << 16), ("CORE", 0), ("NOFILE", 256)):
            resource.setrlimit(getattr(resource, f"RLIMIT_{limit}"), (value, value))
        sys.addaudithook(lambda event, arguments: _judge(event, arguments, say))
        try:
            with path.open("rb") as file:
                model = frontend.open_file(file, kind)
            if kind == "weights":
                frontend.weights(model)
            else:
                frontend.oracle(model)
                frontend.lower(model, LowerOptions())
            say("read")
        except MlecError as error:
            say(error.code)
        except MemoryError:
            say("MemoryError")
        except Exception as error:
            say(f"{type(error).__name__}")
    os._exit(0)


def _judge(event: str, arguments: tuple[Any, ...], say: Callable[[str], object]) -> None:
    if event == "ctypes.dlopen" and str(arguments[0]).startswith(sys.prefix):
        return  # a library of an installed package, where it is first used
    if event == "subprocess.Popen" and arguments[0] == "lscpu":
        return  # joblib counts the cores
    writes = (
        event == "open"
        and isinstance(arguments[1], str)
        and set(arguments[1]) & set("wax+")
        and arguments[0] != os.devnull
    )
    if writes or event.startswith(FORBIDDEN):
        say(f"DEFECT: {event} {arguments!r:.200}")
        os._exit(1)
