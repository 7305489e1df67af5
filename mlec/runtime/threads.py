"""How many CPUs this process may really use: its affinity mask, cut down by the quota of its control group."""

from __future__ import annotations

import functools
import logging
import operator
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlec.errors import UsageError

logger = logging.getLogger("mlec")

_HINT = "leave it out to use every usable CPU"


def effective_cpu_count() -> int:
    """Number of CPUs that this process can keep busy, at least 1.

    A quota of 2.5 CPUs counts as 2: a third thread would be throttled together with the other two.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_quota()
    return count if quota is None else max(1, min(count, int(quota)))


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
        logger.warning("num_threads=%d: this process may use %d CPUs, so that many are used", wanted, usable)
    return min(wanted, usable)


def cgroup_quota(proc: Path = Path("/proc/self")) -> float | None:
    """The smallest CPU quota, in CPUs, set on the control group of this process or on one above it; None: no limit.

    Args:
        proc: where the kernel describes the process.
    """
    try:
        membership = _text(str(proc), "cgroup")
    except OSError:
        return None
    quotas = [quota for folder in _cpu_groups(proc, membership) if (quota := _read_quota(folder)) is not None]
    return min(quotas, default=None)


@functools.lru_cache(maxsize=16)
def _cpu_groups(proc: Path, membership: str) -> tuple[str, ...]:
    """Folders of the control groups (version 1 and 2) that limit CPU time, from the process's own upwards.

    Where they are mounted is looked up once for each membership: a list of a hundred mounts takes as long to read as a small model to load.
    """
    try:
        mounts = [line.split(" - ", 1) for line in (proc / "mountinfo").read_text().splitlines()]
    except OSError:
        return ()
    return tuple(map(str, _mounted_groups([line.split(":", 2) for line in membership.splitlines()], mounts)))


def _mounted_groups(memberships: Sequence[Sequence[str]], mounts: Sequence[Sequence[str]]) -> Iterator[Path]:
    for _, controllers, group in memberships:
        for place, kind in mounts:
            root, mount_point = place.split(" ")[3:5]
            filesystem, _, options = kind.split(" ", 2)
            unified = controllers == "" and filesystem == "cgroup2"
            legacy = "cpu" in controllers.split(",") and filesystem == "cgroup" and "cpu" in options.split(",")
            if not (unified or legacy):
                continue
            top = Path(mount_point)
            # In a container the mount's root is the container's own group, so the path below it is what remains.
            relative = group.removeprefix(root) if root != "/" else group
            folder = top / relative.strip("/")
            yield folder
            while folder != top and top in folder.parents:
                folder = folder.parent
                yield folder


def _read_quota(folder: str) -> float | None:
    try:
        try:
            quota, period = _text(folder, "cpu.max").split()
        except FileNotFoundError:  # version 1
            quota, period = _text(folder, "cpu.cfs_quota_us"), _text(folder, "cpu.cfs_period_us")
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else None
    except (OSError, ValueError):  # no such group, or "max": no limit
        return None


def _text(folder: str, name: str) -> str:
    with open(f"{folder}/{name}", encoding="utf-8", errors="surrogateescape") as file:
        return file.read()
