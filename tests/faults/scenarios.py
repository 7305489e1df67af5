"""Files and models under what goes wrong around them: kills, signals, full and failing disks, little memory, other processes.

Each scenario takes an empty folder and how often to try, and returns what it saw, in words. An AssertionError is a defect.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import mlec
from mlec.artifact import Artifact, write
from mlec.errors import ArtifactError, WriteError

ROWS = np.random.default_rng(0).normal(size=(64, 8))


@dataclass(frozen=True)
class Scenario:
    """One of them.

    Attributes:
        run: takes the folder and the number of tries.
        tries: of a complete run.
        quick: in the tests.
    """

    run: Callable[[Path, int], str]
    tries: int
    quick: int


@cache
def model_bytes() -> bytes:
    """A compiled classifier."""
    import tempfile

    from sklearn.linear_model import LogisticRegression

    source = LogisticRegression().fit(ROWS, ROWS[:, 0] > 0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.mle")
        mlec.compile(source, ROWS, progress=False, validate=False).save(path)
        return path.read_bytes()


def model_in(folder: Path) -> Path:
    path = folder / "m.mle"
    path.write_bytes(model_bytes())
    return path


def _save(path: Path, content: int, size: int = 200_000) -> None:
    """A file whose every number is ``content``."""
    write(path, metadata={"n": content}, graph=str(content), tensors={"w": np.full(size, content, np.int32)})


def _content(path: Path) -> int:
    """The number that a file of `_save` is full of."""
    with Artifact.open(path) as artifact:
        numbers = {artifact.metadata["n"], int(artifact.graph), *np.unique(artifact.tensors["w"]).tolist()}
    assert len(numbers) == 1, f"contents are mixed: {numbers}"
    return int(numbers.pop())


def _child(body: Callable[[], object]) -> int:
    """A forked process that does this and ends: 0, or 1 where an exception got out."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        body()
        code = 0
    except KeyboardInterrupt:
        code = 130
    finally:
        os._exit(code)


def _ended(pid: int) -> int:
    """How a child ended: its exit code, or the signal as a negative number."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _stopped_saves(folder: Path, tries: int, number: int) -> str:
    """Saves over and over in a process that a signal stops at a random moment."""
    path, rng = folder / "m.mle", random.Random(number)
    _save(path, 0)
    ends: set[int] = set()
    left = contents = 0

    reader, writer = os.pipe()

    def save_for_ever() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
        os.write(writer, b"x")
        for content in range(1, 1 << 30):
            _save(path, content)

    for _ in range(tries):
        before = _content(path)
        pid = _child(save_for_ever)
        os.read(reader, 1)  # it has begun
        time.sleep(rng.uniform(0, 0.2))
        os.kill(pid, number)
        ends.add(_ended(pid))
        contents += _content(path) != before
        names = sorted(entry.name for entry in folder.iterdir() if entry.name != "m.mle")
        assert all(name.startswith(".mlec-") and name.endswith(".tmp") for name in names), names
        left += len(names)
        for name in names:  # the next save does so, once a minute has gone by
            os.utime(folder / name, (0, 0))
    os.close(reader)
    os.close(writer)
    _save(path, 7)
    assert [entry.name for entry in folder.iterdir()] == ["m.mle"], "the next save removes what was left"
    if number == signal.SIGINT:
        assert left == 0, "an interrupted save cleans up"
    seen = f"always a whole file, {contents} times a new one; {left} temporary files, which the next save removed"
    return f"{tries} saves stopped (ended by {sorted(ends)}): {seen}"


def killed_saves(folder: Path, tries: int) -> str:
    return _stopped_saves(folder, tries, signal.SIGKILL)


def interrupted_saves(folder: Path, tries: int) -> str:
    return _stopped_saves(folder, tries, signal.SIGINT)


def terminated_saves(folder: Path, tries: int) -> str:
    return _stopped_saves(folder, tries, signal.SIGTERM)


def full_and_read_only_disks(folder: Path, tries: int) -> str:
    """A file system of 1 MiB that is full, and then read-only; needs the right to mount, which user namespaces give."""
    script = f"""
import errno, os, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.faults.scenarios import _content, _save
from mlec.errors import WriteError
path = Path({str(folder)!r}) / "m.mle"
for _ in range({tries}):
    _save(path, 1, size=1000)
    for size in (260_000, 10_000_000):
        try:
            _save(path, 2, size=size)
        except WriteError as error:
            assert error.code == "E_WRITE_NO_SPACE", error.code
        else:
            raise SystemExit("it was written")
        assert _content(path) == 1
        assert [entry.name for entry in path.parent.iterdir()] == ["m.mle"]
assert os.system("mount -o remount,ro " + str(path.parent)) == 0
try:
    _save(path, 3, size=10)
except WriteError as error:
    assert error.code == "E_WRITE_READ_ONLY", error.code
assert _content(path) == 1
print("done")
"""
    mount = f'mount -t tmpfs -o size=1m none {folder} && exec {sys.executable} -c "$SCRIPT"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount],
        env={**os.environ, "SCRIPT": script},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and ("unshare" in done.stderr or "mount:" in done.stderr):
        return f"left out: {done.stderr.strip().splitlines()[-1]}"
    assert done.stdout == "done\n", done.stderr
    return "ENOSPC and EROFS are clear errors, the old file stays, nothing else does"


def little_memory(folder: Path, tries: int) -> str:
    """Opening a file in processes that may take less and less address space."""
    path = folder / "m.mle"
    _save(path, 5, size=16 << 20)
    codes: list[str] = []

    def open_with(more: int) -> Callable[[], None]:
        def body() -> None:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
            resource.setrlimit(resource.RLIMIT_AS, (used + more, used + more))
            try:
                with Artifact.open(path, copy_weights=True) as artifact:
                    right = int(artifact.tensors["w"][-1]) == 5
                code = b"opened" if right else b"WRONG"
            except ArtifactError as error:
                code = error.code.encode()
            except MemoryError:
                code = b"MemoryError"
            os.write(writer, code + b"\n")

        return body

    for step in range(tries):
        reader, writer = os.pipe()
        pid = _child(open_with((step * (160 << 20)) // tries))
        assert _ended(pid) == 0, "the process crashed"
        os.close(writer)
        codes.append(os.read(reader, 100).decode().strip())
        os.close(reader)
    assert set(codes) <= {"opened", "E_NO_MEMORY"}, set(codes)
    assert codes[-1] == "opened"
    assert codes[0] == "E_NO_MEMORY"
    return f"{codes.count('E_NO_MEMORY')} of {tries} say E_NO_MEMORY, the others open; no crash"


def truncated_while_mapped(folder: Path, tries: int) -> str:
    """The file is cut while it is open: a copy does not notice, a map gives a signal or an error, and never another number."""
    path = folder / "m.mle"
    ends: dict[str, set[int]] = {"copy": set(), "map": set(), "map, asked again": set()}

    def body(how: str) -> None:
        artifact = Artifact.open(path, copy_weights=how == "copy")
        weights = artifact.tensors["w"]
        os.truncate(path, 8192)
        if how == "map, asked again":
            try:
                artifact.tensors  # noqa: B018
            except ArtifactError as error:
                os._exit(3 if error.code == "E_CHANGED" else 4)
        assert np.all(weights == 9)

    for how in list(ends) * tries:
        _save(path, 9)
        ends[how].add(_ended(_child(lambda how=how: body(how))))
    assert ends == {"copy": {0}, "map": {-signal.SIGBUS}, "map, asked again": {3}}, ends
    return f"{tries} copies go on, {tries} maps end by SIGBUS, as documented, {tries} say E_CHANGED when asked again"


def replaced_while_running(folder: Path, tries: int) -> str:
    """Another model takes the file's name again and again."""
    path = model_in(folder)
    other = folder / "other.mle"
    with mlec.load(path) as model:
        wanted = model.predict_proba(ROWS)
        for number in range(tries):
            _save(other, number, size=1000)
            os.replace(other, path)
            assert np.array_equal(model.predict_proba(ROWS), wanted)
    assert _content(path) == tries - 1
    return f"replaced {tries} times: the open model answers as before"


def parallel_saves(folder: Path, tries: int) -> str:
    """Processes that save to one name, and processes that read it all the time."""
    path = folder / "m.mle"
    _save(path, 0, size=20_000)
    stop, seen = os.pipe(), os.pipe()
    os.set_blocking(stop[0], False)

    def write_again() -> None:
        for content in range(1, tries + 1):
            _save(path, content, size=20_000)

    def read_again() -> None:
        os.close(stop[1])
        contents: set[int] = set()
        while not _ready(stop[0]):
            contents.add(_content(path))
        os.write(seen[1], b"%d\n" % len(contents))

    readers = [_child(read_again) for _ in range(3)]
    writers = [_child(write_again) for _ in range(2)]
    ends = {_ended(pid) for pid in writers}
    os.close(stop[1])
    ends |= {_ended(pid) for pid in readers}
    os.close(seen[1])
    with open(seen[0]) as lines:
        counts = [int(line) for line in lines]
    os.close(stop[0])
    assert ends == {0}, ends
    assert max(counts) > 1
    assert _content(path) == tries
    assert [entry.name for entry in folder.iterdir()] == ["m.mle"]
    return f"2 processes save {tries} times each, 3 read: always a whole file, {counts} different ones"


def _ready(end: int) -> bool:
    """Whether the other end of a pipe was closed."""
    try:
        return os.read(end, 1) == b""
    except BlockingIOError:
        return False


def many_threads(folder: Path, tries: int) -> str:
    """64 threads, each with its own batch, through one model."""
    batches = [ROWS[: 1 + number % 64] for number in range(64)]
    faults: list[object] = []
    with mlec.load(model_in(folder), num_threads=1) as model:
        wanted = [model.predict_proba(batch) for batch in batches]

        def work(number: int) -> None:
            try:
                for _ in range(tries):
                    if not np.array_equal(model.predict_proba(batches[number]), wanted[number]):
                        faults.append(number)
            except BaseException as error:
                faults.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not faults, faults[:3]
    return f"64 threads x {tries} calls: every answer right"


def _usage() -> tuple[int, int, int]:
    """Open descriptors, maps, kB of resident memory."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    maps = len(Path("/proc/self/maps").read_text().splitlines())
    resident = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return len(os.listdir("/proc/self/fd")), maps, int(resident.split()[1])


def loaded_and_dropped(folder: Path, tries: int) -> str:
    """The first quarter may fill caches and pools; after that nothing grows."""
    path = model_in(folder)
    for _ in range(max(5, tries // 4)):
        mlec.load(path).predict(ROWS)
    before = _usage()
    for _ in range(tries):
        mlec.load(path).predict(ROWS)
    after = _usage()
    assert after[0] == before[0], (before, after)
    assert after[1] - before[1] <= 2 + tries // 20, (before, after)
    assert after[2] - before[2] <= 2048 + 10 * tries, (before, after)
    return f"{tries} models: descriptors {before[0]} -> {after[0]}, maps {before[1]} -> {after[1]}, kB {before[2]} -> {after[2]}"


def shared_pages(folder: Path, tries: int) -> str:
    """Processes that map the same weights share them: together they take the memory of one."""
    path = folder / "m.mle"
    size = 64 << 20
    _save(path, 3, size=size // 4)
    go, ready = os.pipe(), os.pipe()

    def body() -> None:
        artifact = Artifact.open(path, verify="fast")
        assert int(artifact.tensors["w"].sum(dtype=np.int64)) == 3 * size // 4
        os.write(ready[1], b"x")
        os.read(go[0], 1)  # until all have read

    pids = [_child(body) for _ in range(tries)]
    for _ in pids:
        os.read(ready[0], 1)
    kilobytes = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
        at = next(i for i, line in enumerate(lines) if line.endswith(str(path)))
        kilobytes += next(int(line.split()[1]) for line in lines[at:] if line.startswith("Pss:"))
    os.write(go[1], b"x" * tries)
    assert {_ended(pid) for pid in pids} == {0}
    for end in (*go, *ready):
        os.close(end)
    assert kilobytes < 1.1 * size / 1024, f"{kilobytes} kB for {tries} processes"
    return f"{tries} processes map {size >> 20} MiB each, and take {kilobytes >> 10} MiB together"


def forked_after_load(folder: Path, tries: int) -> str:
    """Children compute what their parent does."""
    with mlec.load(model_in(folder)) as model:
        wanted = model.predict_proba(ROWS)

        def body() -> None:
            assert np.array_equal(model.predict_proba(ROWS), wanted)

        ends = [_ended(_child(body)) for _ in range(tries)]
        assert set(ends) == {0}, ends
        assert np.array_equal(model.predict_proba(ROWS), wanted)
    return f"{tries} children: every answer right"


def failing_disk(folder: Path, tries: int) -> str:
    """Every call of the system that saving makes fails once, with each of the errors that a disk can give."""
    import errno

    path = folder / "m.mle"
    _save(path, 1, size=1000)
    names = ("open", "write", "fsync", "link", "replace", "posix_fallocate")
    failed = 0
    for name in names:
        real = getattr(os, name)
        for number in (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT):
            for call in range(tries):
                calls = 0

                def failing(
                    *args: Any, real: Any = real, number: int = number, call: int = call, **options: Any
                ) -> Any:
                    nonlocal calls
                    calls += 1
                    if calls == call + 1:
                        raise OSError(number, os.strerror(number))
                    return real(*args, **options)

                setattr(os, name, failing)
                try:
                    _save(path, 2, size=1000)
                    done = True
                except WriteError as error:
                    done = error.code == "E_WRITE_NOT_DURABLE"
                    failed += 1
                finally:
                    setattr(os, name, real)
                assert _content(path) == (2 if done else 1), (name, number, call)
                assert [entry.name for entry in folder.iterdir()] == ["m.mle"], (name, number, call)
                _save(path, 1, size=1000)
    assert failed
    return f"{failed} failures: the old file or the new one, nothing else is left"


def available() -> dict[str, Scenario]:
    """All scenarios by name."""
    if not hasattr(os, "fork") or shutil.which("unshare") is None:
        return {}
    return {
        "killed-saves": Scenario(killed_saves, 200, 10),
        "interrupted-saves": Scenario(interrupted_saves, 100, 5),
        "terminated-saves": Scenario(terminated_saves, 100, 5),
        "full-disk": Scenario(full_and_read_only_disks, 20, 1),
        "failing-disk": Scenario(failing_disk, 20, 3),
        "little-memory": Scenario(little_memory, 100, 6),
        "truncated": Scenario(truncated_while_mapped, 50, 2),
        "replaced": Scenario(replaced_while_running, 1000, 20),
        "parallel-saves": Scenario(parallel_saves, 500, 20),
        "threads": Scenario(many_threads, 1000, 20),
        "loads": Scenario(loaded_and_dropped, 200, 20),
        "shared": Scenario(shared_pages, 16, 4),
        "forked": Scenario(forked_after_load, 100, 4),
    }
