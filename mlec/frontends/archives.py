"""Zip archives that nobody vouches for: what is in one, found out within bounds, before any library reads it."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from mlec.artifact import json_safe
from mlec.errors import FrontendError

_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.ENOMEM)
MAX_DIRECTORY = 8 << 20
"""Bytes of the list of entries, and so a bound of their number: `zipfile` reads it at once, and makes an object of each entry."""
MAX_RATIO = 200
FREE_BYTES = 1 << 20
"""All entries together may unpack to so many bytes, and `MAX_RATIO` for each byte of the archive."""
COPY_RATIO, COPY_FREE_BYTES = 4, 64 << 20
"""The same, where all of them are unpacked at once."""
MAX_JSON = 1 << 28
JSON_DEPTH = 512
JSON_VALUES = 1 << 22
"""Bounds of a description in JSON: bytes, nesting, values."""

_DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, RuntimeError, ValueError)
"""What `zipfile` raises for archives that are damaged, encrypted, or compressed in ways that it does not know."""


def entry_names(path: Path) -> list[str]:
    """Names of the entries of a file; none of a file that is no zip archive, or one with too many."""
    try:
        with path.open("rb") as file, _opened(file) as archive:
            return archive.namelist()
    except _DAMAGED:
        return []


@contextmanager
def checked_archive(file: IO[bytes], path: Path) -> Iterator[zipfile.ZipFile]:
    """An archive whose entries have names that stay in it, each once, and unpack to sizes that are in proportion.

    Args:
        file: the archive.
        path: of it, for messages.

    Raises:
        FrontendError: ``E_FILE_PATH``, ``E_FILE_TWICE``, ``E_FILE_SIZE`` for an entry that is not so; ``E_FILE`` for a damaged archive,
            also while it is read.
    """
    try:
        with _opened(file) as archive:
            _check_entries(archive, path)
            yield archive
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise FrontendError(
                f"{path.name} cannot be copied to memory: {error.strerror}",
                code="E_FILE",
                hint="free memory, or raise what this process may take of it and how large its files may be",
            ) from error
        raise FrontendError(
            f"{path.name} is a damaged archive: {error}",
            code="E_FILE",
            hint="copy the file again, or save the model again",
        ) from error


def written_anew(file: IO[bytes], path: Path) -> IO[bytes]:
    """An archive written again, its entries unpacked, in memory that nobody else can change.

    What an archive holds, and where, is said in several places of it. Where these differ, `zipfile` and another reader may find other
    entries, of which one alone was checked. In what is written here they do not.

    Args:
        file: the archive.
        path: of it, for messages.

    Raises:
        FrontendError: as `checked_archive`; ``E_FILE_SIZE`` sooner, as all of it is unpacked here.
    """
    copy = open(os.memfd_create("model"), "w+b")  # noqa: SIM115  (the caller closes it)
    try:
        with checked_archive(file, path) as archive, zipfile.ZipFile(copy, "w") as anew:
            _check_copyable(archive, path)
            for entry in archive.infolist():
                place = zipfile.ZipInfo(entry.filename)
                place.file_size = entry.file_size  # whether it needs the format for large ones
                with archive.open(entry) as content, anew.open(place, "w") as target:
                    shutil.copyfileobj(content, target, 1 << 20)
    except BaseException:
        with suppress(OSError):  # of what could not be written before
            copy.close()
        raise
    copy.seek(0)
    return copy


def read_json(archive: zipfile.ZipFile, name: str, path: Path) -> Any:
    """The JSON in an entry.

    Raises:
        FrontendError: ``E_FILE_JSON``: it is none, or larger or deeper than the description of a model; ``E_FILE`` where there is no such
            entry.
    """

    def refuse(what: str) -> FrontendError:
        return FrontendError(
            f"{path.name}: {name!r} {what}",
            code="E_FILE_JSON",
            hint="save the model again; large tables of numbers belong in arrays and tensors, not in the description of a model",
        )

    try:
        entry = archive.getinfo(name)
    except KeyError:
        raise FrontendError(
            f"{path.name} has no entry {name!r}", code="E_FILE", hint="the file is incomplete: save the model again"
        ) from None
    if entry.file_size > MAX_JSON:
        raise refuse(f"has {entry.file_size} bytes; a description of a model has no more than {MAX_JSON}")
    with archive.open(entry) as file:
        text = file.read(entry.file_size + 1)  # with no number, zipfile would unpack what lies there whatever its size
    depth, count = json_safe.measure(text)
    if depth > JSON_DEPTH or count > JSON_VALUES:
        raise refuse(
            f"is nested {depth} deep and holds up to {count} values; the limits are {JSON_DEPTH} and {JSON_VALUES}"
        )
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refuse(f"is not JSON: {error}") from None


class _Opening:
    """A file of which no more than `MAX_DIRECTORY` bytes are read at once until it is opened."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.is_open = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, count: int = -1) -> bytes:
        if self.is_open:
            return self._file.read(count)
        data = self._file.read(MAX_DIRECTORY + 1 if count < 0 else min(count, MAX_DIRECTORY + 1))
        if len(data) > MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"the list of its entries has more than {MAX_DIRECTORY} bytes")
        return data


@contextmanager
def _opened(file: IO[bytes]) -> Iterator[zipfile.ZipFile]:
    opening = _Opening(file)
    with zipfile.ZipFile(opening) as archive:
        opening.is_open = True
        yield archive


def _check_entries(archive: zipfile.ZipFile, path: Path) -> None:
    entries = archive.infolist()
    # torch finds entries whatever the case of their names.
    if len({entry.filename.lower() for entry in entries}) != len(entries):
        raise FrontendError(
            f"{path.name} holds an entry twice; readers may disagree which one counts",
            code="E_FILE_TWICE",
            hint="save the model again with the library that it is of",
        )
    assert archive.fp is not None
    most = FREE_BYTES + MAX_RATIO * archive.fp.seek(0, io.SEEK_END)
    for entry in entries:
        if _leaves(entry.orig_filename):  # the other one ends at the first NUL
            raise FrontendError(
                f"{path.name} holds the path {entry.orig_filename[:200]!r}, which leaves the archive",
                code="E_FILE_PATH",
                hint="do not use this file: no library writes such a path",
            )
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise NotImplementedError(f"{entry.filename[:200]!r} is neither stored nor deflated")
        most -= entry.file_size
        if most < 0:
            raise FrontendError(
                f"{path.name}: {entry.filename[:200]!r} unpacks to {entry.file_size} bytes; that is no model",
                code="E_FILE_SIZE",
                hint="do not use this file",
            )


def _check_copyable(archive: zipfile.ZipFile, path: Path) -> None:
    assert archive.fp is not None
    size = archive.fp.seek(0, io.SEEK_END)
    held = sum(entry.file_size for entry in archive.infolist())
    if held > COPY_FREE_BYTES + COPY_RATIO * size:
        raise FrontendError(
            f"{path.name} has {size} bytes, and unpacks to {held}", code="E_FILE_SIZE",
            hint="save the model again with the library that it is of, which does not compress",
        )  # fmt: skip


def _leaves(name: str) -> bool:
    return name.startswith("/") or ".." in name.split("/") or re.search(r"[\\:\0]", name) is not None
