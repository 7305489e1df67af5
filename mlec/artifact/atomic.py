"""Replace a file so that its name always leads to the old content or to the new one, whole, whatever happens.

The sequence is fixed: unnamed file in the same directory, space reserved, data written and flushed, linked under a
temporary name, renamed over the target, directory flushed. Where unnamed files do not exist (some network file
systems, no /proc) a file with a temporary name takes their place. A process that is killed leaves nothing, or at
worst a temporary file that the next save to the same name removes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from mlec.errors import WriteError

# No write permission for the group and others, whatever the umask: who can write a model can change its answers.
_MODE = 0o644
_STALE_AFTER_S = 60.0

_NO_UNNAMED_FILE = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT}
_NO_FALLOCATE = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}

_REASONS = {
    errno.ENOSPC: ("E_WRITE_NO_SPACE", "the disk is full", "free some space, or save to another disk"),
    errno.EDQUOT: ("E_WRITE_NO_SPACE", "your disk quota is used up", "free some space, or save to another disk"),
    errno.EFBIG: (
        "E_WRITE_TOO_LARGE",
        "the file would be larger than this file system or `ulimit -f` allows",
        "raise the limit, or save to another disk",
    ),
    errno.EIO: ("E_WRITE_IO", "the disk reports an error", "check the disk, or save to another one"),
    errno.EROFS: ("E_WRITE_READ_ONLY", "the file system is read-only", "save to another directory"),
    errno.EACCES: ("E_WRITE_PERMISSION", "permission denied", "save to a directory that you may write to"),
    errno.EPERM: ("E_WRITE_PERMISSION", "permission denied", "save to a directory that you may write to"),
    errno.ENOENT: ("E_WRITE_NO_DIRECTORY", "the directory does not exist", "create it first"),
    errno.ENOTDIR: ("E_WRITE_NO_DIRECTORY", "a part of the path is not a directory", "check the path"),
    errno.ENAMETOOLONG: ("E_WRITE_NAME", "the name is too long", "choose a shorter name"),
    errno.ELOOP: ("E_WRITE_NAME", "the path goes round in symbolic links", "check the path"),
}


def replace_file(path: str | os.PathLike[str], size: int, chunks: Callable[[], Iterable[bytes | memoryview]]) -> str:
    """Write a file of ``size`` bytes atomically and durably.

    A symbolic link is followed: the file it leads to is replaced, the link stays.

    Args:
        path: where to. What stands there must be a regular file, or nothing.
        size: length of the file in bytes.
        chunks: gives the content in order.

    Returns:
        the real path of the file.

    Raises:
        WriteError: nothing was changed and no temporary file is left (code ``E_WRITE_NOT_DURABLE`` alone means that
            the new file is in place). Other exceptions, among them KeyboardInterrupt, pass through after the same
            clean-up.
    """
    try:
        target = _resolve(path)
        directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise _explain(path, error) from error
    try:
        _remove_stale(directory, target.name)
        _write(directory, target.name, size, chunks)
        _flush_directory(directory, target)
    except OSError as error:
        raise _explain(path, error) from error
    finally:
        os.close(directory)
    return str(target)


def check_replaceable(path: str | os.PathLike[str]) -> None:
    """Whether `replace_file` could start to write now; changes nothing. For asking before long work.

    Raises:
        WriteError: as `replace_file` would.
    """
    try:
        with tempfile.TemporaryFile(dir=_resolve(path).parent):
            pass
    except (OSError, ValueError) as error:
        raise _explain(path, error) from error


def _resolve(path: str | os.PathLike[str]) -> Path:
    """Follow symbolic links and make sure that only a regular file can be replaced."""
    given = Path(os.path.abspath(path))
    if given.is_symlink():
        link, parent = os.lstat(given), os.stat(given.parent)
        shared = parent.st_mode & stat.S_ISVTX and parent.st_mode & stat.S_IWOTH
        if shared and link.st_uid not in (os.geteuid(), parent.st_uid):
            raise WriteError(
                f"{given} is a symbolic link that another user made in a shared directory",
                code="E_WRITE_SYMLINK",
                hint="save to a directory of your own",
            )
    target = Path(os.path.realpath(given))
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return target
    if stat.S_ISDIR(mode):
        raise WriteError(
            f"{given} is a directory", code="E_WRITE_DIRECTORY", hint=f"give a file name, e.g. {given / 'model.mle'}"
        )
    if not stat.S_ISREG(mode):
        raise WriteError(
            f"{given} is a device, pipe or socket, not a file",
            code="E_WRITE_NOT_A_FILE",
            hint="save to a regular file",
        )
    return target


def _write(directory: int, name: str, size: int, chunks: Callable[[], Iterable[bytes | memoryview]]) -> None:
    temporary = f"{_prefix(name)}{secrets.token_hex(8)}.tmp"
    fd = _open_unnamed(directory)
    unnamed = fd is not None
    try:
        if fd is None:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE, dir_fd=directory)
        # Held until the rename: who finds a temporary file unlocked knows that its writer is gone.
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        _reserve(fd, size)
        for chunk in chunks():
            _write_all(fd, chunk)
        os.fsync(fd)
        if unnamed:
            # src_dir_fd has no meaning for an absolute path, but without it Python calls link(), which does not
            # follow the magic link and fails with EXDEV.
            os.link(f"/proc/self/fd/{fd}", temporary, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=True)
        os.replace(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=directory)
        raise
    finally:
        if fd is not None:
            os.close(fd)


def _flush_directory(directory: int, target: Path) -> None:
    try:
        os.fsync(directory)
    except OSError as error:
        raise WriteError(
            f"{target} was written, but the disk did not confirm its new name ({error.strerror})",
            code="E_WRITE_NOT_DURABLE",
            hint="after a power failure the old file may come back: check the disk and save again",
        ) from error


def _open_unnamed(directory: int) -> int | None:
    """A file without a name in the directory, or None where the system has none."""
    if not hasattr(os, "O_TMPFILE") or not os.path.isdir("/proc/self/fd"):
        return None
    try:
        return os.open(".", os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, _MODE, dir_fd=directory)
    except OSError as error:
        if error.errno in _NO_UNNAMED_FILE:
            return None
        raise


def _reserve(fd: int, size: int) -> None:
    """Learn about a full disk before writing gigabytes."""
    if size == 0 or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in _NO_FALLOCATE:
            raise


def _write_all(fd: int, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _prefix(name: str) -> str:
    # A digest, not the name: the temporary name must fit wherever the name does.
    return f".mlec-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}-"


def _remove_stale(directory: int, name: str) -> None:
    """Remove what killed writers of the same file left behind. Failing to do so is no reason not to save."""
    with contextlib.suppress(OSError):
        for entry in os.listdir(directory):
            if entry.startswith(_prefix(name)) and entry.endswith(".tmp"):
                _remove_if_abandoned(directory, entry)


def _remove_if_abandoned(directory: int, entry: str) -> None:
    with contextlib.suppress(OSError):
        fd = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        try:
            info = os.fstat(fd)
            # A writer without unnamed files creates first and locks then; the age covers that moment.
            if stat.S_ISREG(info.st_mode) and time.time() - info.st_mtime > _STALE_AFTER_S:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(entry, dir_fd=directory)
        finally:
            os.close(fd)


def _explain(path: str | os.PathLike[str], error: OSError | ValueError) -> WriteError:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ENOENT and os.path.isdir(os.path.dirname(os.path.realpath(path))):
        number = errno.EPERM  # a directory in which the system makes files itself, such as /proc
    reason = error.strerror if isinstance(error, OSError) else str(error)
    code, why, hint = _REASONS.get(number or 0, ("E_WRITE", reason or type(error).__name__, "check the path"))
    return WriteError(f"cannot write {os.fspath(path)}: {why}", code=code, hint=hint)
