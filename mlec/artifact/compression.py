"""Zstandard frames: written where they save something, decoded in pieces and never beyond the size that was declared.

A frame is refused before anything of it is decoded if it does not say how much it holds, or says more than `plausible` allows.
The library is imported when the first frame is written or read.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Final

from mlec.artifact import limits
from mlec.errors import ArtifactError, CorruptedFileError, RuntimeUnavailableError

LEVEL: Final = 9
"""Of compression: above it, frames of weights and code get much slower to make and hardly smaller."""

_MAGIC: Final = bytes.fromhex("28b52ffd")
_DICTIONARY: Final = 0b11
"""The bits of a frame's fifth byte that say how long the name of its dictionary is."""
_FEED: Final = 1 << 17
"""Compressed bytes that the library gets at a time."""
_PIECE: Final = 1 << 20
"""Decoded bytes that it gives back at a time."""
_SMALL: Final = 16 << 20
"""Bytes that need no look at the free memory."""


def _zstd() -> ModuleType:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError as error:
        raise RuntimeUnavailableError(
            "files compressed by zstd need a library that is not installed: backports.zstd",
            code="E_NO_ZSTD",
            hint="pip install 'mlec[zstd]', or save the model without compression",
        ) from error
    module: ModuleType = zstd
    return module


def plausible(stored: int, raw: int) -> bool:
    """Whether readers accept a frame or stream of ``stored`` bytes that holds ``raw``: it saves something, and is no bomb."""
    return 0 < stored < raw <= max(limits.PACKED_FREE, stored * limits.PACKED_RATIO)


def encode(data: bytes | bytearray | memoryview) -> bytes | None:
    """One frame with the bytes, which says how many they are; None where that saves less than an eighth, or packs implausibly well.

    The same bytes give the same frame, with the same version of the library.

    Raises:
        RuntimeUnavailableError: ``E_NO_ZSTD``.
    """
    zstd = _zstd()
    frame: bytes = zstd.compress(data, level=LEVEL)
    raw = memoryview(data).nbytes
    return frame if len(frame) <= raw - raw // 8 and plausible(len(frame), raw) else None


def declared_size(frame: bytes | bytearray | memoryview) -> int | None:
    """Decoded bytes as the frame's header says; None if it does not, or is none."""
    head = bytes(frame[:18])  # the longest header of a frame
    # The library would also take frames that hold nothing and are to be skipped, and a dictionary named 0 for none.
    if head[:4] != _MAGIC or head[4:5] == b"" or head[4] & _DICTIONARY:
        return None
    zstd = _zstd()
    try:
        size: int | None = zstd.get_frame_info(head).decompressed_size
    except zstd.ZstdError:
        return None
    return size


def pieces(frame: memoryview, raw: int, *, what: str, code: str) -> Iterator[bytes]:
    """The decoded bytes, at most 1 MiB at a time.

    Args:
        frame: all stored bytes: exactly one frame.
        raw: bytes that it must hold.
        what: what is decoded, for errors.
        code: of those errors.

    Raises:
        CorruptedFileError: it is no such frame. What was given before it is not to be used.
    """

    def broken(why: str) -> CorruptedFileError:
        return CorruptedFileError(f"{what} is not one zstd frame of {raw} bytes: {why}", code=code)

    declared = declared_size(frame)
    if declared != raw:
        raise broken("it does not say how many it holds" if declared is None else f"it says it holds {declared}")
    zstd = _zstd()
    decoder = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: limits.ZSTD_WINDOW_LOG})
    fed = given = 0
    while not decoder.eof:
        feed = frame[fed : fed + _FEED] if decoder.needs_input else b""
        if decoder.needs_input and not feed:
            raise broken("it is cut short")
        fed += len(feed)
        try:
            piece: bytes = decoder.decompress(feed, max_length=_PIECE)
        except zstd.ZstdError as error:
            raise broken(str(error)) from None
        given += len(piece)
        if given > raw:
            raise broken("it holds more")
        if piece:
            yield piece
    if given != raw:
        raise broken(f"it holds {given}")
    if decoder.unused_data or fed != len(frame):
        raise broken("other bytes follow it")


def first_frame(data: bytes) -> bytes:
    """The frame that bytes start with; empty if they start with none."""
    if declared_size(data) is None:
        return b""
    zstd = _zstd()
    try:
        return data[: zstd.get_frame_size(data)]
    except zstd.ZstdError:
        return b""


def allocate(size: int, *, what: str) -> bytearray:
    """Zeroed memory.

    Raises:
        ArtifactError: ``E_NO_MEMORY``.
    """
    check_memory(size, what=what)
    try:
        return bytearray(size)
    except MemoryError:
        raise _no_memory(size, what) from None


def check_memory(size: int, *, what: str) -> None:
    """Refuses what the machine has no memory for, rather than to be killed while it is filled.

    Raises:
        ArtifactError: ``E_NO_MEMORY``.
    """
    if size > _SMALL and size > _available():
        raise _no_memory(size, what)


def fill(memory: memoryview, parts: Iterable[bytes | memoryview]) -> None:
    """Lays the parts one after the other."""
    end = 0
    for part in parts:
        memory[end : end + len(part)] = part
        end += len(part)


def _no_memory(size: int, what: str) -> ArtifactError:
    return ArtifactError(
        f"there is not enough memory for {what}, which takes {size} bytes", code="E_NO_MEMORY", hint="free some memory"
    )


def _available() -> int:
    """Bytes of memory that the system would give; as many as one likes where it does not say."""
    try:
        with open("/proc/meminfo", "rb") as file:
            found = next(line for line in file if line.startswith(b"MemAvailable:"))
        return int(found.split()[1]) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        return 1 << 63
