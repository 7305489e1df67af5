"""The library of a model file as the oracle of that file, in a process of its own.

Nobody vouches for a model file, and the libraries read it in C++ that believes what it says. So a child process with bounded time and
memory loads it, and whatever becomes of that process is a clear error here. It starts at once, and the parent need not wait before its
first question. What it answers are plain arrays:

    parent --- the file, in memory that both see ----> child   (a pipe would pass 64 KiB at a time, while the parent works)
    parent --- length, pickle of (method, table) --> child     (ours: it may be a pickle)
    parent <-- status, length, array or text ------- child     (the file's, maybe: never a pickle)
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mlec import registry
from mlec.errors import FrontendError
from mlec.frontends.base import FileFrontend

SECONDS = 120.0
"""For one answer; the first one waits for the import of the library as well."""
MAX_ANSWER = 1 << 30
MEMORY = 4 << 30
"""Bytes that the child may take besides `MEMORY_PER_BYTE` for each byte of the file."""
MEMORY_PER_BYTE = 64
MOST_THREADS = 8
"""That answer, unless the environment names a number: each reserves some 100 MiB of the address space that the child may take."""

_REQUEST, _ANSWER = struct.Struct("<Q"), struct.Struct("<?Q")


class SourceProcess(Mapping[str, Callable[[Any], NDArray[Any]]]):
    """The methods of a file's model, by name; each call is answered by the child, which ends with this object.

    Threads may share it: one asks at a time, the others wait. A question that is interrupted ends the child.

    Args:
        frontend: name of the `FileFrontend` whose ``open_file`` and ``oracle`` the child calls.
        kind: what the file is to be opened as, for ``open_file``.
        data: the content of the file.
        methods: that the model has.
        path: of the file, for messages.
    """

    def __init__(self, frontend: str, kind: str, data: bytes, methods: Sequence[str], path: object) -> None:
        self._library, self._path, self._methods = frontend, path, tuple(methods)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(min(len(os.sched_getaffinity(0)), MOST_THREADS))),
            "OMP_WAIT_POLICY": "passive",  # the parent compiles meanwhile
            "OPENBLAS_NUM_THREADS": "1",
        }
        with open(os.memfd_create("model"), "wb") as file:
            file.write(data)
            file.flush()
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "mlec.frontends.source_process", frontend, kind, str(file.fileno())], env=environment,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=[file.fileno()],
            )  # fmt: skip
        self._asking, self._overdue = threading.Lock(), threading.Event()
        self._ended: str | None = None
        self.close = weakref.finalize(self, _end, self._process)

    def __getitem__(self, method: str) -> Callable[[Any], NDArray[Any]]:
        if method not in self._methods:
            raise KeyError(method)
        return lambda table: self._ask(method, table)

    def __iter__(self) -> Iterator[str]:
        return iter(self._methods)

    def __len__(self) -> int:
        return len(self._methods)

    def _ask(self, method: str, table: Any) -> NDArray[Any]:
        """What the library answers.

        Raises:
            FrontendError: it refuses the file or the table, or its process died, hung, or ran out of memory.
        """
        with self._asking:
            good, body = self._answer(method, table)
        if not good:
            raise self._failed(body.decode(errors="replace"))
        try:
            return np.lib.format.read_array(io.BytesIO(body), allow_pickle=False)
        except ValueError as error:
            raise self._failed(f"answered with no array: {error}") from error

    def _answer(self, method: str, table: Any) -> tuple[bool, bytes]:
        if self._ended is not None:
            raise self._failed(self._ended)
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Timer(SECONDS, _stop, (process, self._overdue))
        try:
            late.start()
            _send(process.stdin, (method, table))
            return _receive(process.stdout)
        except BaseException as error:  # also an interrupt: what is left in the pipe is no answer to the next question
            self._ended = "its process was stopped when an earlier question was interrupted"
            self.close()
            if not isinstance(error, OSError | EOFError | ValueError):  # ValueError: it was closed before
                raise
            overdue = self._overdue.is_set()
            self._ended = f"took more than {SECONDS:.0f} s" if overdue else _ending(process.returncode)
            raise self._failed(self._ended) from error
        finally:
            late.cancel()

    def _failed(self, what: str) -> FrontendError:
        return FrontendError(
            f"{self._library} itself fails on {self._path}: {what}",
            code="E_SOURCE_FAILS",
            hint="the file may be damaged, or of a version that the installed library does not know; "
            "compiling without validation does not need the library",
        )


def _stop(process: subprocess.Popen[bytes], overdue: threading.Event) -> None:
    overdue.set()
    process.kill()


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            if pipe:
                pipe.close()


def _ending(code: int | None) -> str:
    if code is None or code >= 0:
        return f"its process ended with {code}"
    with contextlib.suppress(ValueError):
        return f"its process died of {signal.Signals(-code).name}"
    return f"its process died of signal {-code}"


def _send(pipe: IO[bytes], message: object) -> None:
    body = pickle.dumps(message)
    pipe.write(_REQUEST.pack(len(body)) + body)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> tuple[bool, bytes]:
    good, length = _ANSWER.unpack(_exactly(pipe, _ANSWER.size))
    if length > MAX_ANSWER:
        raise EOFError
    return good, _exactly(pipe, length)


def _exactly(pipe: IO[bytes], count: int) -> bytes:
    data = pipe.read(count)
    if len(data) != count:
        raise EOFError
    return data


# -- the child -------------------------------------------------------------------------------------------------------


def _limit_memory(file_bytes: int) -> None:
    with open("/proc/self/statm") as statm:
        taken = int(statm.read().split()[0]) * resource.getpagesize()
    most = taken + MEMORY + MEMORY_PER_BYTE * file_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _serve(requests: IO[bytes], answers: IO[bytes], frontend_name: str, kind: str, file: int) -> None:
    """Opens the model in the file of this descriptor, and answers questions until there are no more."""
    for name, limit in (("RLIMIT_CORE", 0), ("RLIMIT_FSIZE", 0), ("RLIMIT_CPU", int(4 * SECONDS * MOST_THREADS))):
        resource.setrlimit(getattr(resource, name), (limit, limit))

    def request() -> Any:
        return pickle.loads(_exactly(requests, _REQUEST.unpack(_exactly(requests, _REQUEST.size))[0]))

    functions: Mapping[str, Callable[[Any], Any]] = {}
    problem = ""
    try:
        frontend: FileFrontend = registry.load("frontends", frontend_name)()
        if kind == "Booster":  # only the estimators around it need scikit-learn, which is most of the import's time
            sys.modules["sklearn"] = None  # type: ignore[assignment]
        __import__(frontend_name)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    with open(file, "rb") as opened:
        opened.seek(0)
        data = opened.read()
    if not problem:
        try:
            _limit_memory(len(data))
            functions = frontend.oracle(frontend.open_file(data, kind))
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
    while True:
        try:
            method, table = request()
        except EOFError:
            return
        body = io.BytesIO()
        try:
            if not problem:
                np.lib.format.write_array(body, np.asarray(functions[method](table)), allow_pickle=False)
        except Exception as error:
            problem = f"{method}: {type(error).__name__}: {error}"
        content = problem.encode() if problem else body.getvalue()
        answers.write(_ANSWER.pack(not problem, len(content)) + content)
        answers.flush()
        problem = "" if functions else problem


def main() -> None:
    # The library may print: its output goes where errors go, and the answers through a pipe that only we know.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    frontend, kind, file = sys.argv[1:]
    _serve(sys.stdin.buffer, answers, frontend, kind, int(file))


if __name__ == "__main__":
    main()
