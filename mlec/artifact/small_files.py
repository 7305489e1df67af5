"""Reading small files that decide about trust: keys and keyrings."""

from __future__ import annotations

import errno
import os
import stat


def read_small(path: str | os.PathLike[str], most: int) -> tuple[os.stat_result, bytes]:
    """State and content of a regular file, both of the very file that was opened.

    Raises:
        OSError: it cannot be read, is no regular file, or has more than ``most`` bytes.
        ValueError: the path is none.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a pipe must not wait
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        data = b""
        while len(data) <= most and (piece := os.read(fd, most + 1 - len(data))):
            data += piece
    finally:
        os.close(fd)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it has more than {most} bytes")
    return info, data
