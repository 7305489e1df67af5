"""How many CPUs this process may really use: its affinity mask, cut down by the quota of its control group."""

from __future__ import annotations

import _thread
import contextlib
import functools
import operator
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from mlec.errors import UsageError
from mlec.runtime import logs

_HINT = "leave it out to use every usable CPU"


def effective_cpu_count() -> int:
    """Number of CPUs that this process can keep busy, at least 1.

    A quota of 2.5 CPUs counts as 2: a third thread would be throttled together with the other two.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota_in(int(time.monotonic()))
    return count if quota is None else max(1, min(count, int(quota)))


@functools.lru_cache(maxsize=1)
def _quota_in(second: int) -> float | None:
    """`cgroup_quota`, which reads files of the kernel, at most once in a second."""
    return cgroup_quota()


def default_num_threads() -> int:
    """Threads for a model when its user names no number: what the environment asks for, or every usable CPU."""
    for variable in ("TVM_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(variable, "")
        if value.isdigit() and int(value) > 0:
            return min(int(value), effective_cpu_count())
    return effective_cpu_count()


def checked_num_threads(num_threads: object) -> int:
    """Threads for a model whose user asks for that many; None: `default_num_threads`.

    A number above the CPUs that this process may use is cut down to them, with a line in the log.

    Raises:
        UsageError: it is no whole number from 1.
    """
    if num_threads is None:
        return default_num_threads()
    if isinstance(num_threads, bool) or not hasattr(num_threads, "__index__"):
        raise UsageError(f"num_threads must be a whole number from 1, or None, got {num_threads!r}", hint=_HINT)
    wanted, usable = operator.index(num_threads), effective_cpu_count()
    if wanted < 1:
        raise UsageError(f"num_threads must be at least 1, got {wanted}", hint=_HINT)
    if wanted > usable:
        logs.warning("mlec", "num_threads=%d: this process may use %d CPUs, so that many are used", wanted, usable)
    return min(wanted, usable)


class SideBySide:
    """Tasks that other CPUs begin with at once; of use where they let go of Python's lock while they work.

    The threads are the bare ones of the interpreter: starting a `threading.Thread` waits until it runs, for ever where that one finds no
    memory to begin with.
    """

    def __init__(self, tasks: Sequence[Callable[[], Any]]) -> None:
        self._tasks = tasks
        self._done: list[Any] = [_UNDONE] * len(tasks)
        self._left = iter(range(len(tasks)))  # shared: whoever is free takes the next one
        self._at_work: list[_thread.LockType] = []  # of each helper; held while it may take a task
        for _ in range(min(effective_cpu_count(), len(tasks)) - 1):
            at_work = _thread.allocate_lock()
            # There may be threads enough in this process, or no memory for one more: the others do without.
            with contextlib.suppress(RuntimeError, MemoryError):
                _thread.start_new_thread(self._help, (at_work,))
                self._at_work.append(at_work)

    def results(self) -> list[Any]:
        """What the tasks return, in their order; this thread takes part.

        Raises:
            Exception: of the first task, in their order, that raises one.
        """
        try:
            self._work()
        finally:
            for _ in self._left:  # there are none, unless this was interrupted
                pass
            for at_work in self._at_work:  # one that comes to work only now finds nothing left
                with at_work:
                    pass
        for number, done in enumerate(self._done):
            if done is _UNDONE:  # a helper took it and found no memory for it
                self._done[number] = self._tasks[number]()
            elif isinstance(done, _Failure):
                raise done.error
        return self._done

    def _help(self, at_work: _thread.LockType) -> None:
        with contextlib.suppress(MemoryError), at_work:
            self._work()

    def _work(self) -> None:
        for number in self._left:
            try:
                self._done[number] = self._tasks[number]()
            except Exception as error:
                self._done[number] = _Failure(error)


_UNDONE: Final = object()


class _Failure:
    """What a task has instead of a result."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def side_by_side(tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    """What tasks return, in their order, done on all usable CPUs.

    Raises:
        Exception: of the first task, in their order, that raises one.
    """
    return SideBySide(tasks).results()


def cgroup_quota(proc: str | os.PathLike[str] = "/proc/self") -> float | None:
    """The smallest CPU quota, in CPUs, set on the control group of this process or on one above it; None: no limit.

    Args:
        proc: where the kernel describes the process.
    """
    try:
        membership = _text(f"{os.fspath(proc)}/cgroup")
    except OSError:
        return None
    quotas = [quota for files in _cpu_files(os.fspath(proc), membership) if (quota := _read_quota(files)) is not None]
    return min(quotas, default=None)


@functools.lru_cache(maxsize=16)
def _cpu_files(proc: str, membership: str) -> tuple[tuple[str, ...], ...]:
    """The files with the limits of CPU time of the process's own control group (version 1 or 2) and of those above it.

    Where they are mounted is looked up once for each membership: a list of a hundred mounts takes as long to read as a small model to load.
    """
    try:
        with open(f"{proc}/mountinfo", errors="surrogateescape") as file:
            mounts = [line.split(" - ", 1) for line in file.read().splitlines()]
    except OSError:
        return ()
    return tuple(_files_of([line.split(":", 2) for line in membership.splitlines()], mounts))


def _files_of(memberships: Sequence[Sequence[str]], mounts: Sequence[Sequence[str]]) -> Iterator[tuple[str, ...]]:
    for _, controllers, group in memberships:
        for place, kind in mounts:
            root, mount_point = place.split(" ")[3:5]
            filesystem, _, options = kind.split(" ", 2)
            unified = controllers == "" and filesystem == "cgroup2"
            legacy = "cpu" in controllers.split(",") and filesystem == "cgroup" and "cpu" in options.split(",")
            if not (unified or legacy):
                continue
            names = ("cpu.max",) if unified else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            # In a container the mount's root is the container's own group, so the path below it is what remains.
            below = [part for part in (group.removeprefix(root) if root != "/" else group).split("/") if part]
            for depth in range(len(below), -1, -1):
                yield tuple("/".join([mount_point, *below[:depth], name]) for name in names)


def _read_quota(files: Sequence[str]) -> float | None:
    """Of the texts of quota and period, in microseconds."""
    try:
        quota, period = " ".join(map(_text, files)).split()
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else None
    except (OSError, ValueError):  # no such group, or "max": no limit
        return None


def _text(path: str) -> str:
    """A short text of the kernel's; at least twice as fast as by a file object."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(file, 1 << 16).decode("utf-8", "surrogateescape")
    finally:
        os.close(file)
