"""A file in memory that is shared with everybody who maps it, and whether it was written to since it was opened.

Nobody can be kept from writing to a file that is mapped. The file is held open beside the map, so that asking about it means the file that
is mapped, whatever its name leads to by then: one that was replaced by renaming is still what it was.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import Any

import numpy as np

from mlec.errors import CorruptedFileError

_Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class MappedFile:
    """The bytes of a file.

    Args:
        fd: the open file; a duplicate of it is kept.
        info: what the system said of it when it was opened.

    Raises:
        ValueError: it is shorter by now.
        OSError: its file system has no maps.
    """

    def __init__(self, fd: int, info: os.stat_result) -> None:
        self._fd = -1
        # From 0: only that offset suits the page size of every system.
        self._map = mmap.mmap(fd, info.st_size, access=mmap.ACCESS_READ)
        self._fd = os.dup(fd)
        self._size, self._written = info.st_size, _times(info)

    def bytes_at(self, offset: int, size: int) -> _Bytes:
        """A part of it, read-only; it keeps the map, and not this object."""
        return np.frombuffer(self._map, np.uint8, size, offset)

    def written(self) -> tuple[int, int] | None:
        """The times that a write to the file changes, in nanoseconds; None if they are as when it was opened, or `accept` knows of them.

        Raises:
            CorruptedFileError: ``E_CHANGED``: it has another length. Where it is shorter, reading the map would end this process.
        """
        info = os.fstat(self._fd)
        if info.st_size != self._size:
            raise changed(f"the file had {self._size} bytes when it was opened, and has {info.st_size}")
        times = _times(info)
        return None if times == self._written else times

    def accept(self, written: tuple[int, int]) -> None:
        """What was written by then is known to be right."""
        self._written = written

    def close(self) -> None:
        """Give the map back. Where parts of it are in use, the last one that is dropped does."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
            with contextlib.suppress(BufferError):
                self._map.close()

    def __del__(self) -> None:
        self.close()


def _times(info: os.stat_result) -> tuple[int, int]:
    return info.st_mtime_ns, info.st_ctime_ns  # tools that copy set the first back; nobody can set the second


def changed(why: str) -> CorruptedFileError:
    """The error for a file that was written to while it was read or mapped."""
    return CorruptedFileError(why, code="E_CHANGED", hint="do not write .mle files in place: replace them by renaming")
