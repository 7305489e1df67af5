"""Takes from a process what reading a model does not need, before a library reads one that nobody vouches for.

As a script: python confinement.py FOLDER MODULE ARGUMENTS... runs a module so. That is before anything else is imported, as the kernel
confines the thread that asks and those that it starts later: libraries start theirs when they are imported.

What is taken away, by Landlock (Linux 5.13, each part as the kernel has it): to write to, make, remove or move files, but in one folder,
and semaphores; to connect or listen by TCP; to send signals, or talk by abstract sockets, to processes outside. Programs that are started
are confined the same. What stays: to read what its user may read, and of the administrator's powers only that; the environment and the
memory of processes outside are not among it. Without Landlock, the limits of time, memory and files remain (`source_process`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import runpy
import struct
import sys

_NO_NEW_PRIVILEGES = 38
_CAPABILITIES = struct.pack("=Ii", 0x20080522, 0)
"""Version of the sets of capabilities, and whose: of this thread."""
_READ_ALL = 0b110
"""The capabilities to get past permissions of files; others would let an administrator look into processes that are not confined."""
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_ASK_VERSION, _BENEATH = 1, 1

_WRITE_FILE, _TRUNCATE, _IOCTL = 1 << 1, 1 << 14, 1 << 15
_REMOVE_FILE, _MAKE_FILE = 1 << 5, 1 << 8
_REMOVE_AND_MAKE = sum(1 << bit for bit in range(4, 13))
_SEMAPHORES = "/dev/shm"
"""Where the system has them: joblib, which gets none, uses one thread."""
_TCP = 0b11
_OUTSIDE = 0b11


def confine(folder: str) -> int:
    """Confines this thread, and what it starts from now on, for good.

    Args:
        folder: where it may write; libraries want one for temporary files when they are imported.

    Returns:
        The version of Landlock; 0 where the kernel has none, and of all this only the capabilities were taken away.
    """
    system = ctypes.CDLL(None, use_errno=True)
    system.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    sets = ctypes.create_string_buffer(24)  # effective, permitted, inheritable; of 32 capabilities, then of the next 32
    if system.capget(_CAPABILITIES, sets) == 0:
        kept = [word & _READ_ALL for word in struct.unpack("=6I", sets)[:3]]
        system.capset(_CAPABILITIES, struct.pack("=6I", *kept, 0, 0, 0))
    version = _call(system, _CREATE_RULESET, None, 0, _ASK_VERSION)
    if version < 1:
        return 0
    files = _WRITE_FILE | _REMOVE_AND_MAKE | (_TRUNCATE if version >= 3 else 0) | (_IOCTL if version >= 5 else 0)
    taken = struct.pack("<3Q", files, _TCP, _OUTSIDE)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    rules = _call(system, _CREATE_RULESET, taken, len(taken), 0)
    if rules < 0:
        return 0
    for path, allowed in (
        (folder, files),
        ("/dev/null", _WRITE_FILE),
        (_SEMAPHORES, _WRITE_FILE | _REMOVE_FILE | _MAKE_FILE),
    ):
        with contextlib.suppress(OSError):  # what is not there cannot be written to
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            _call(system, _ADD_RULE, rules, _BENEATH, struct.pack("<Qi", allowed, place), 0)
            os.close(place)
    confined = _call(system, _RESTRICT_SELF, rules, 0) == 0
    os.close(rules)
    return version if confined else 0


def _call(system: ctypes.CDLL, number: int, *arguments: int | bytes | None) -> int:
    return int(system.syscall(number, *(ctypes.c_size_t(a) if isinstance(a, int) else a for a in arguments)))


if __name__ == "__main__":
    confine(sys.argv[1])
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
