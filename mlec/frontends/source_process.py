"""The library of a model file as the oracle of that file, in a process of its own.

Nobody vouches for a model file, and the libraries read it in C++ that believes what it says. So a child process with bounded time,
memory and files, which may write to no others (`confinement`), loads it, and whatever becomes of that process is a clear error here. It
starts at once, and the parent need not wait before its first question. What it answers are plain arrays and text:

    parent --- the file, in memory that both see ------------> child   (a pipe would pass 64 KiB at a time, while the parent works)
    parent --- length, pickle of (method, argument) ---------> child   (ours: it may be a pickle)
    parent <-- length, JSON, the elements of the arrays ------ child   (the file's, maybe: never a pickle)

A file that only its library can read (`torch.export.save`, skops) is lowered there as well: the answer to `LOWER` is the graph as text.
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
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import IO, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from mlec import errors, registry
from mlec.errors import FrontendError, MlecError, UsageError
from mlec.frontends import confinement
from mlec.frontends.base import FileFrontend, LowerOptions, SourceMethods
from mlec.frontends.source_threads import limited_threads
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
OPEN, LOWER, WEIGHTS, DECIDED, EXACT, THREADS = "(open)", "(lower)", "(weights)", "(decided)", "(exact)", "(threads)"
"""Questions about the model, beside the names of its methods."""

_LENGTH = struct.Struct("<Q")
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

_Element = str | int | float | bool | list[str] | None
"""Of an array of Python objects; in a list, a number that JSON lacks."""


class _Frame(msgspec.Struct):
    """What of a DataFrame is not in the arrays of its columns."""

    library: Literal["pandas", "polars"]
    columns: list[str | int]
    dtypes: list[str]


class _Answer(msgspec.Struct):
    """What precedes the elements of the arrays in an answer.

    Attributes:
        seconds: that the question took there; where the library has one thread, without those in which it waited for a processor.
        arrays: dtype and shape of each.
        objects: by its position, the elements of each array of Python objects.
        frame: the arrays are the columns of a DataFrame.
        single: the answer is one array, not a list of them.
        error: an error in the place of an answer: of ours by the name of its class, or of the library.
        methods, decided: what the model answers to, and whether it says which rows have one right answer.
        limited: whether the number of threads could be set.
        graph, signature, notes: of the file, as text and as JSON; ``constants`` are the names of its arrays, by their position.
    """

    seconds: float = 0.0
    arrays: list[tuple[str, tuple[int, ...]]] = []
    objects: dict[int, list[_Element]] = {}
    frame: _Frame | None = None
    single: bool = False
    methods: list[str] = []
    decided: bool = False
    limited: bool = False
    notes: list[str] = []
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
        methods: that the model has; where the file tells them, they are known after `wait`.
        path: of the file, for messages.
        environment: variables that hold the library back; what is held back is not to be timed.

    Attributes:
        timed: whether `seconds` are those that the library takes anywhere.
        decided: as of `SourceMethods`, after `wait`.
    """

    def __init__(
        self, frontend: str, kind: str, data: bytes | IO[bytes], methods: Sequence[str], path: object,
        environment: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self._library, self._path, self._methods = frontend, path, tuple(methods)
        self.timed = not environment
        self.decided: Callable[[Any], Any] | None = None
        folder = _folder()
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("MLEC_KEY")},  # secrets
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "TMPDIR": folder,
            **(environment or {}),
        }
        try:
            with in_memory(data) if isinstance(data, bytes) else data as file:
                self._most = MAX_ANSWER + ANSWER_PER_BYTE * os.fstat(file.fileno()).st_size
                self._process = subprocess.Popen(
                    [sys.executable, "-P", confinement.__file__, folder, __name__, frontend, kind, str(file.fileno())], env=environment,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=[file.fileno()],
                )  # fmt: skip
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._asking, self._overdue = threading.Lock(), threading.Event()
        self._ended: str | None = None
        self.close = weakref.finalize(self, _end, self._process, folder)

    def __getitem__(self, method: str) -> Callable[[Any], Any]:
        if method not in self._methods:
            raise KeyError(method)
        return lambda argument: self._ask(method, argument)[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._methods)

    def __len__(self) -> int:
        return len(self._methods)

    def exact(self, argument: Any) -> Any:
        """As of `SourceMethods`: what the source answers in float64.

        Raises:
            UsageError: it has no such answer.
            FrontendError: its process died, hung, or ran out of memory.
        """
        return self._ask(EXACT, argument)[1]

    def seconds(self, method: str, argument: Any) -> float:
        """That a call takes there, without the way there and back."""
        return self._ask(method, argument)[0].seconds

    def limit_threads(self, threads: int) -> bool:
        """Its library is to answer with so many threads from now on; whether it can be told."""
        answer, _ = self._ask(THREADS, threads)
        return answer.limited

    def wait(self) -> None:
        """Until the file is open.

        Raises:
            MlecError: it cannot be read.
        """
        answer, _ = self._ask(OPEN, None)
        self._methods = self._methods or tuple(answer.methods)
        if answer.decided:
            self.decided = lambda table: self._ask(DECIDED, table)[1]

    def weights(self) -> dict[str, NDArray[Any]]:
        """The arrays of a file that holds nothing else, by name.

        Raises:
            MlecError: it cannot be read, or holds more.
        """
        answer, arrays = self._ask(WEIGHTS, None)
        return self._named(answer, arrays)

    def lower(self, options: LowerOptions) -> Graph:
        """The file's model as a verified graph; adds to the notes of the options.

        Raises:
            MlecError: what reading or lowering it raises there.
            FrontendError: the process died, hung, or ran out of memory.
        """
        answer, arrays = self._ask(LOWER, replace(options, notes=[]))
        try:
            graph = parse_graph(answer.graph, self._named(answer, arrays), answer.signature)
        except (MlecError, TypeError) as error:
            raise self._failed(f"answered with no graph: {error}") from error
        verify(graph, after=f"the {self._library} frontend")
        options.notes.extend(answer.notes)
        return graph

    def _named(self, answer: _Answer, arrays: list[NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if not all(0 <= position < len(arrays) for position in answer.constants.values()):
            raise self._failed("answered with names of no arrays")
        return {name: arrays[position] for name, position in answer.constants.items()}

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
        if answer.frame is not None:
            try:
                return answer, _as_frame(answer.frame, arrays, argument)
            except (ImportError, TypeError, ValueError) as error:
                raise self._failed(f"answered with no table: {error}") from error
        return answer, arrays[0] if answer.single and arrays else arrays

    def _answer(self, method: str, argument: Any) -> tuple[_Answer, list[NDArray[Any]]]:
        if self._ended is not None:
            raise self._failed(self._ended)
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        seconds = LOWER_SECONDS if method in (OPEN, LOWER, WEIGHTS) else SECONDS
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


def _folder() -> str:
    """A new folder for temporary files.

    Raises:
        FrontendError: there is no space for it, or nowhere to put it.
    """
    try:
        return tempfile.mkdtemp(prefix="mlec-source-")
    except OSError as error:
        raise FrontendError(
            f"cannot make a folder for temporary files: {error.strerror or error}",
            code="E_TEMPORARY_SPACE",
            hint="free some space there, or name another directory in TMPDIR",
        ) from error


def _stop(process: subprocess.Popen[bytes], overdue: threading.Event) -> None:
    overdue.set()
    process.kill()


def _end(process: subprocess.Popen[bytes], folder: str) -> None:
    with contextlib.suppress(OSError):
        process.kill()
    process.wait()
    with contextlib.suppress(RecursionError):  # whoever the file makes nest folders without an end
        shutil.rmtree(folder, ignore_errors=True)
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
        for position, (name, shape) in enumerate(answer.arrays):
            if position in answer.objects:
                arrays.append(_of_elements(answer.objects[position], shape))
                continue
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


def _of_elements(elements: list[_Element], shape: tuple[int, ...]) -> NDArray[Any]:
    if min(shape, default=0) < 0 or math.prod(shape) != len(elements):
        raise _WrongAnswerError(f"answered with {len(elements)} elements of an array {list(shape)}")
    array = np.empty(len(elements), object)
    for i, element in enumerate(elements):
        array[i] = _NOT_FINITE.get("".join(element)) if isinstance(element, list) else element
    return array.reshape(shape)


def _as_frame(frame: _Frame, columns: list[NDArray[Any]], table: Any) -> Any:
    """The DataFrame that the library made of a table: its rows have the names that they have there."""
    if frame.library == "polars":
        import polars

        return polars.DataFrame(dict(zip(map(str, frame.columns), columns, strict=True)))
    import pandas

    index = getattr(table, "index", None)
    made = pandas.DataFrame(dict(enumerate(columns)), index=index if index is not None and len(index) else None)
    made = made.astype({i: dtype for i, dtype in enumerate(frame.dtypes) if str(made[i].dtype) != dtype})
    return made.set_axis(frame.columns, axis=1)


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
        self._limits, self._has_one_thread = contextlib.ExitStack(), False
        try:
            self._frontend: FileFrontend = registry.load("frontends", frontend)()
            if kind == "Booster":  # only the estimators around it need scikit-learn, which is most of the import's time
                sys.modules["sklearn"] = None  # type: ignore[assignment]
            __import__(frontend)
            _limit_memory(os.fstat(file.fileno()).st_size)
            file.seek(0)
            self._model = self._frontend.open_file(file, kind)
            oracle = self._frontend.oracle(self._model)
            self._functions = dict(oracle)
            self._methods = list(oracle)
            if isinstance(oracle, SourceMethods):
                more = {DECIDED: oracle.decided, EXACT: oracle.exact}
                self._functions |= {question: function for question, function in more.items() if function is not None}
        except Exception as error:
            self._problem = _described(error)

    def answer(self, method: str, argument: Any) -> tuple[_Answer, list[NDArray[Any]]]:
        """What precedes the arrays, and the arrays."""
        if self._problem is not None:
            return _Answer(error=self._problem), []
        # Not of the process: that clock stands still between ticks where the time of a process is limited.
        worked, begin = time.thread_time(), time.perf_counter()
        try:
            if method == OPEN:
                return _Answer(methods=self._methods, decided=DECIDED in self._functions), []
            if method == THREADS:
                self._limits.close()  # a new limit replaces the last one
                limited = self._limits.enter_context(limited_threads(argument))
                self._has_one_thread = limited and argument == 1
                return _Answer(limited=limited), []
            if method == LOWER:
                graph = self._frontend.lower(self._model, argument)
                answer, arrays = _of_arrays(graph.constants)
                answer.graph, answer.signature, answer.notes = print_graph(graph), graph.signature, argument.notes
                return answer, arrays
            if method == WEIGHTS:
                return _of_arrays(self._frontend.weights(self._model))
            found = self._functions[method](argument)
            seconds = time.perf_counter() - begin
            return _of_result(found, min(seconds, time.thread_time() - worked) if self._has_one_thread else seconds)
        except Exception as error:
            return _Answer(error=_described(error, method)), []


def _of_arrays(named: Mapping[str, NDArray[Any]]) -> tuple[_Answer, list[NDArray[Any]]]:
    """Arrays by name; each once, however many names it has."""
    arrays = list({id(array): array for array in named.values()}.values())
    positions = {id(array): i for i, array in enumerate(arrays)}
    names = {name: positions[id(array)] for name, array in named.items()}
    return _Answer(arrays=[_kind(array) for array in arrays], constants=names), arrays


def _of_result(found: Any, seconds: float) -> tuple[_Answer, list[NDArray[Any]]]:
    """What a method returned: an array, a list of arrays, or a DataFrame."""
    answer = _Answer(seconds)
    if hasattr(found, "columns"):
        library: Any = type(found).__module__.partition(".")[0]
        answer.frame = _Frame(library, list(found.columns), [str(dtype) for dtype in found.dtypes])
        parts = [column for _, column in found.items()] if library == "pandas" else found.get_columns()
        arrays = [np.asarray(part) for part in parts]
    else:
        answer.single = not isinstance(found, list)
        arrays = [np.asarray(array) for array in ([found] if answer.single else found)]
    answer.arrays = [("O", array.shape) if array.dtype == object else _kind(array) for array in arrays]
    answer.objects = {
        position: [_element(value) for value in array.ravel().tolist()]
        for position, array in enumerate(arrays) if array.dtype == object
    }  # fmt: skip
    return answer, [array for array in arrays if array.dtype != object]


def _element(value: object) -> _Element:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return [str(value)]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"the answer holds a {type(value).__name__}")


def _kind(array: NDArray[Any]) -> tuple[str, tuple[int, ...]]:
    if array.dtype.hasobject:
        raise TypeError(f"the answer is an array of {array.dtype}")
    return DType.BF16.value if array.dtype == DType.BF16.numpy else array.dtype.str, array.shape


def _described(error: Exception, method: str = "") -> dict[str, Any]:
    if isinstance(error, MlecError):
        return {"class": type(error).__name__, **error.to_dict(), "loc": error.loc and str(error.loc)}
    text = f"{type(error).__name__}: {error}"
    return {"message": text} if method in ("", LOWER, WEIGHTS) else {"message": text, "method": method}


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
