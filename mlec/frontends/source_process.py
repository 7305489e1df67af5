"""The library of a model file as the oracle of that file, in a process of its own.

Nobody vouches for a model file, and the libraries read it in C++ that believes what it says. So a child process with bounded time,
memory and files loads it, and whatever becomes of that process is a clear error here. It starts at once, and the parent need not wait
before its first question. What it answers are plain arrays and text:

    parent --- the file, in memory that both see ------------> child   (a pipe would pass 64 KiB at a time, while the parent works)
    parent --- length, pickle of (method, argument) ---------> child   (ours: it may be a pickle)
    parent <-- length, JSON, the elements of the arrays ------ child   (the file's, maybe: never a pickle)

A file that only its library can read (`torch.export.save`) is lowered there as well: the answer to `LOWER` is the graph as text.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mlec import errors, registry
from mlec.errors import FrontendError, MlecError, UsageError
from mlec.frontends.base import FileFrontend, InputShapes, LowerOptions
from mlec.ir import Graph, parse_graph, print_graph, verify
from mlec.ir.dtype import DType
from mlec.signature import Signature

SECONDS = 120.0
"""For one answer; the first one waits for the import of the library as well."""
LOWER_SECONDS = 900.0
"""For reading a file and lowering it: of a network with billions of weights, on a busy machine."""
MAX_ANSWER = 1 << 30
"""Bytes of an answer, besides `ANSWER_PER_BYTE` for each byte of the file: a graph has its weights, some of them converted."""
ANSWER_PER_BYTE = 16
MEMORY = 4 << 30
"""Bytes that the child may take besides `MEMORY_PER_BYTE` for each byte of the file and `MEMORY_PER_THREAD`."""
MEMORY_PER_BYTE = 64
MEMORY_PER_THREAD = 128 << 20
CPU_SECONDS = 3600
"""Of each processor that this process may use; one that hangs for longer has lost its parent."""
FILE_BYTES = 1 << 16
"""That it may write to a file: torch looks for a folder where it could."""
FILES = 256
"""That may be open at a time."""
OPEN, LOWER = "(open)", "(lower)"
"""Questions about the model, beside the names of its methods."""

_LENGTH = struct.Struct("<Q")


class _Answer(msgspec.Struct):
    """What precedes the elements of the arrays in an answer.

    Attributes:
        seconds: that the question took there.
        arrays: dtype and shape of each.
        single: the answer is one array, not a list of them.
        error: an error in the place of an answer: of ours by the name of its class, or of the library.
        graph, signature: of the file, as text and as JSON; ``constants`` are the names of its arrays, by their position.
    """

    seconds: float = 0.0
    arrays: list[tuple[str, tuple[int, ...]]] = []
    single: bool = False
    error: dict[str, Any] | None = None
    graph: str = ""
    signature: Signature | None = None
    constants: dict[str, int] = {}


class SourceProcess(Mapping[str, Callable[[Any], Any]]):
    """The methods of a file's model, by name; each call is answered by the child, which ends with this object.

    Threads may share it: one asks at a time, the others wait. A question that is interrupted ends the child.

    Args:
        frontend: name of the `FileFrontend` whose ``open_file``, ``oracle`` and ``lower`` the child calls.
        kind: what the file is to be opened as, for ``open_file``.
        data: the content of the file: bytes, or where they are many, an open file of memory.
        methods: that the model has.
        path: of the file, for messages.
        environment: variables that hold the library back; what is held back is not to be timed.

    Attributes:
        timed: whether `seconds` are those that the library takes anywhere.
    """

    def __init__(
        self, frontend: str, kind: str, data: bytes | IO[bytes], methods: Sequence[str], path: object,
        environment: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self._library, self._path, self._methods = frontend, path, tuple(methods)
        self.timed = not environment
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            **(environment or {}),
        }
        with in_memory(data) if isinstance(data, bytes) else data as file:
            self._most = MAX_ANSWER + ANSWER_PER_BYTE * os.fstat(file.fileno()).st_size
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "mlec.frontends.source_process", frontend, kind, str(file.fileno())], env=environment,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=[file.fileno()],
            )  # fmt: skip
        self._asking, self._overdue = threading.Lock(), threading.Event()
        self._ended: str | None = None
        self.close = weakref.finalize(self, _end, self._process)

    def __getitem__(self, method: str) -> Callable[[Any], Any]:
        if method not in self._methods:
            raise KeyError(method)
        return lambda argument: self._ask(method, argument)[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._methods)

    def __len__(self) -> int:
        return len(self._methods)

    def seconds(self, method: str, argument: Any) -> float:
        """That a call takes there, without the way there and back."""
        return self._ask(method, argument)[0].seconds

    def wait(self) -> None:
        """Until the file is open.

        Raises:
            MlecError: it cannot be read.
        """
        self._ask(OPEN, None)

    def lower(self, shapes: InputShapes | None) -> Graph:
        """The file's model as a verified graph.

        Raises:
            MlecError: what reading or lowering it raises there.
            FrontendError: the process died, hung, or ran out of memory.
        """
        answer, arrays = self._ask(LOWER, shapes)
        try:
            constants = {name: arrays[position] for name, position in answer.constants.items()}
            graph = parse_graph(answer.graph, constants, answer.signature)
        except (MlecError, IndexError, TypeError) as error:
            raise self._failed(f"answered with no graph: {error}") from error
        verify(graph, after=f"the {self._library} frontend")
        return graph

    def _ask(self, method: str, argument: Any) -> tuple[_Answer, Any]:
        """What the library answers.

        Raises:
            UsageError: it fails on the argument.
            FrontendError: it refuses the file, or its process died, hung, or ran out of memory.
        """
        with self._asking:
            answer, arrays = self._answer(method, argument)
        if answer.error is not None:
            raise self._error(answer.error)
        return answer, arrays[0] if answer.single and arrays else arrays

    def _answer(self, method: str, argument: Any) -> tuple[_Answer, list[NDArray[Any]]]:
        if self._ended is not None:
            raise self._failed(self._ended)
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        seconds = LOWER_SECONDS if method in (OPEN, LOWER) else SECONDS
        late = threading.Timer(seconds, _stop, (process, self._overdue))
        try:
            late.start()
            _send(process.stdin, (method, argument))
            return _receive(process.stdout, self._most)
        except BaseException as error:  # also an interrupt: what is left in the pipe is no answer to the next question
            self._ended = "its process was stopped when an earlier question was interrupted"
            self.close()
            if not isinstance(error, OSError | EOFError | ValueError):  # ValueError: it was closed before
                raise
            overdue = self._overdue.is_set()
            self._ended = f"took more than {seconds:g} s" if overdue else _ending(process.returncode)
            if isinstance(error, _WrongAnswerError):
                self._ended = str(error)
            raise self._failed(self._ended) from error
        finally:
            late.cancel()

    def _error(self, error: dict[str, Any]) -> MlecError:
        """An error of the child's: one of ours as it is, any other as a failure of the library on the file or on the inputs."""
        kind = getattr(errors, str(error.get("class")), None)
        if not isinstance(kind, type) or not issubclass(kind, MlecError):
            if "method" not in error:
                return self._failed(str(error.get("message")))
            return UsageError(
                f"{self._library} fails on the inputs that {self._path} is compared on: {error['method']}: {error.get('message')}",
                code="E_SOURCE_FAILS", hint="pass examples that it takes; validate=False compiles without comparing",
            )  # fmt: skip
        given = {name: error.get(name) for name in ("code", "hint", "loc")}
        notes = tuple(map(str, error.get("notes") or ()))
        return kind(str(error.get("message")), notes=notes, **{k: v and str(v) for k, v in given.items()})

    def _failed(self, what: str) -> FrontendError:
        return FrontendError(
            f"{self._library} itself fails on {self._path}: {what}",
            code="E_SOURCE_FAILS",
            hint="the file may be damaged, or of a version that the installed library does not know"
            + ("" if self._library == "torch" else "; compiling without validation does not need the library"),
        )


def in_memory(content: bytes | IO[bytes]) -> IO[bytes]:
    """A copy of a file that nobody else can change: what is checked is what is read."""
    file = open(os.memfd_create("model"), "w+b")  # noqa: SIM115  (the caller closes it)
    if isinstance(content, bytes):
        file.write(content)
    else:
        shutil.copyfileobj(content, file, 1 << 20)
    file.flush()
    file.seek(0)
    return file


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


class _WrongAnswerError(ValueError):
    """The child does not answer as it should."""


def _send(pipe: IO[bytes], message: object) -> None:
    body = pickle.dumps(message)
    pipe.write(_LENGTH.pack(len(body)) + body)
    pipe.flush()


def _receive(pipe: IO[bytes], most: int) -> tuple[_Answer, list[NDArray[Any]]]:
    (length,) = _LENGTH.unpack(_exactly(pipe, _LENGTH.size))
    if length > most:
        raise _WrongAnswerError(f"answered with {length} bytes")
    try:
        answer = msgspec.json.decode(_exactly(pipe, length), type=_Answer)
        arrays: list[NDArray[Any]] = []
        for name, shape in answer.arrays:
            dtype = DType.BF16.numpy if name == DType.BF16.value else np.dtype(name)
            size = math.prod(shape) * dtype.itemsize
            most -= size
            if dtype.hasobject or min(shape, default=0) < 0 or most < 0:
                raise _WrongAnswerError(f"answered with an array {name}{list(shape)}")
            arrays.append(np.empty(shape, dtype))
            _fill(pipe, arrays[-1].reshape(-1).view(np.uint8).data)
    except (msgspec.MsgspecError, TypeError, RecursionError, MemoryError) as error:
        raise _WrongAnswerError(f"answered with no array: {error}") from error
    return answer, arrays


def _fill(pipe: IO[bytes], buffer: memoryview) -> None:
    at = 0
    while at < len(buffer):
        count = pipe.readinto(buffer[at:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        at += count


def _exactly(pipe: IO[bytes], count: int) -> bytes:
    data = pipe.read(count)
    if len(data) != count:
        raise EOFError
    return data


# -- the child -------------------------------------------------------------------------------------------------------


def _limit_memory(file_bytes: int) -> None:
    with open("/proc/self/statm") as statm:
        taken = int(statm.read().split()[0]) * resource.getpagesize()
    threads = len(os.sched_getaffinity(0)) * MEMORY_PER_THREAD
    most = taken + MEMORY + threads + MEMORY_PER_BYTE * file_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


class _Model:
    """The model in a file, in the library that wrote it; an error of opening it is the answer to every question.

    Args:
        frontend: name of its `FileFrontend`.
        kind: what it is to be opened as.
        file: its content.
    """

    def __init__(self, frontend: str, kind: str, file: IO[bytes]) -> None:
        self._problem: dict[str, Any] | None = None
        try:
            self._frontend: FileFrontend = registry.load("frontends", frontend)()
            if kind == "Booster":  # only the estimators around it need scikit-learn, which is most of the import's time
                sys.modules["sklearn"] = None  # type: ignore[assignment]
            __import__(frontend)
            _limit_memory(os.fstat(file.fileno()).st_size)
            file.seek(0)
            self._model = self._frontend.open_file(file, kind)
            self._functions = self._frontend.oracle(self._model)
        except Exception as error:
            self._problem = _described(error)

    def answer(self, method: str, argument: Any) -> tuple[_Answer, list[NDArray[Any]]]:
        """What precedes the arrays, and the arrays."""
        if self._problem is not None:
            return _Answer(error=self._problem), []
        begin = time.perf_counter()
        try:
            if method == OPEN:
                return _Answer(), []
            if method == LOWER:
                return _of_graph(self._frontend.lower(self._model, LowerOptions(input_shapes=argument)))
            found = self._functions[method](argument)
            seconds = time.perf_counter() - begin
            arrays = [np.asarray(array) for array in (found if isinstance(found, list) else [found])]
            return _Answer(seconds, [_kind(array) for array in arrays], not isinstance(found, list)), arrays
        except Exception as error:
            return _Answer(error=_described(error, method)), []


def _of_graph(graph: Graph) -> tuple[_Answer, list[NDArray[Any]]]:
    """A graph as an answer; each array once, however many names it has."""
    arrays = list({id(array): array for array in graph.constants.values()}.values())
    positions = {id(array): i for i, array in enumerate(arrays)}
    names = {name: positions[id(array)] for name, array in graph.constants.items()}
    kinds = [_kind(array) for array in arrays]
    return _Answer(arrays=kinds, graph=print_graph(graph), signature=graph.signature, constants=names), arrays


def _kind(array: NDArray[Any]) -> tuple[str, tuple[int, ...]]:
    if array.dtype.hasobject:
        raise TypeError(f"the answer is an array of {array.dtype}")
    return DType.BF16.value if array.dtype == DType.BF16.numpy else array.dtype.str, array.shape


def _described(error: Exception, method: str = "") -> dict[str, Any]:
    if isinstance(error, MlecError):
        return {"class": type(error).__name__, **error.to_dict(), "loc": error.loc and str(error.loc)}
    text = f"{type(error).__name__}: {error}"
    return {"message": text} if method in ("", LOWER) else {"message": text, "method": method}


def _serve(requests: IO[bytes], answers: IO[bytes], frontend: str, kind: str, file: int) -> None:
    """Opens the model in the file of this descriptor, and answers questions until there are no more."""
    seconds = CPU_SECONDS * len(os.sched_getaffinity(0))
    for name, limit in (
        ("RLIMIT_CORE", 0),
        ("RLIMIT_FSIZE", FILE_BYTES),
        ("RLIMIT_CPU", seconds),
        ("RLIMIT_NOFILE", FILES),
    ):
        resource.setrlimit(getattr(resource, name), (limit, limit))
    with open(file, "rb") as opened:
        model = _Model(frontend, kind, opened)
    while True:
        try:
            method, argument = pickle.loads(_exactly(requests, _LENGTH.unpack(_exactly(requests, _LENGTH.size))[0]))
        except EOFError:
            return
        answer, arrays = model.answer(method, argument)
        head = msgspec.json.encode(answer)
        answers.write(_LENGTH.pack(len(head)) + head)
        for array in arrays:
            answers.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        answers.flush()


def main() -> None:
    # The library may print: its output goes where errors go, and the answers through a pipe that only we know.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    frontend, kind, file = sys.argv[1:]
    _serve(sys.stdin.buffer, answers, frontend, kind, int(file))


if __name__ == "__main__":
    main()
