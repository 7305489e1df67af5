"""Streams of zlib, which every Python decodes, behind the number of bytes that they hold.

A stream is refused before anything of it is decoded if it says more than `compression.plausible` allows.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Generator, Iterator
from typing import Final

from mlec.artifact.compression import plausible
from mlec.errors import CorruptedFileError

LEVEL: Final = 6
"""Of compression: above it, streams of code take several times as long to make and are hardly smaller."""
LEAST: Final = 4096
"""Bytes that are worth a stream: below them, the alignment of sections eats what it saves."""

_MAGIC: Final = b"MLEZ"
_HEAD: Final = struct.Struct("<4sQ")
_FEED: Final = 1 << 17
"""Compressed bytes that the library gets at a time."""
_PIECE: Final = 1 << 20
"""Decoded bytes that it gives back at a time."""


def encode(data: bytes | bytearray) -> bytes | None:
    """The bytes as a stream; None where that saves less than an eighth, or packs implausibly well.

    The same bytes give the same stream, with the same version of the library.
    """
    if len(data) < LEAST:
        return None
    stored = _HEAD.pack(_MAGIC, len(data)) + zlib.compress(data, LEVEL)
    return stored if len(stored) <= len(data) - len(data) // 8 and plausible(len(stored), len(data)) else None


def declared_size(stored: bytes | bytearray | memoryview) -> int | None:
    """Decoded bytes as the beginning says; None if it is no such stream."""
    if len(stored) < _HEAD.size:
        return None
    magic, size = _HEAD.unpack_from(stored)
    return int(size) if magic == _MAGIC else None


def pieces(stored: memoryview, raw: int, *, what: str, code: str) -> Iterator[bytes]:
    """The decoded bytes, at most 1 MiB at a time.

    Args:
        stored: all stored bytes: exactly one stream.
        raw: bytes that it must hold.
        what: what is decoded, for errors.
        code: of those errors.

    Raises:
        CorruptedFileError: it is no such stream. What was given before it is not to be used.
    """

    def broken(why: str) -> CorruptedFileError:
        return CorruptedFileError(f"{what} is not one zlib stream of {raw} bytes: {why}", code=code)

    if declared_size(stored) != raw:
        raise broken("it does not begin with how many it holds")
    try:
        end = yield from _decoded(stored, raw)
    except (ValueError, zlib.error) as error:
        raise broken(str(error)) from None
    if end != len(stored):
        raise broken("other bytes follow it")


def first_stream(data: bytes) -> bytes:
    """The stream that bytes start with; empty if they start with none. What it holds is decoded, and not kept."""
    raw = declared_size(data)
    if raw is None:
        return b""
    decoded = _decoded(memoryview(data), raw)
    try:
        while True:
            next(decoded)
    except StopIteration as end:
        return data[: end.value]
    except (ValueError, zlib.error):
        return b""


def _decoded(stored: memoryview, raw: int) -> Generator[bytes, None, int]:
    """The decoded bytes of the stream that stored bytes begin with.

    Returns:
        Where it ends.

    Raises:
        ValueError, zlib.error: it is none, or does not hold ``raw`` bytes.
    """
    stream = zlib.decompressobj()
    fed, given, left = _HEAD.size, 0, b""
    while not stream.eof:
        feed = left or stored[fed : fed + _FEED]
        fed += 0 if left else len(feed)
        piece = stream.decompress(feed, _PIECE)
        left = stream.unconsumed_tail
        given += len(piece)
        if given > raw:
            raise ValueError("it holds more")
        if piece:
            yield piece
        elif not feed:
            raise ValueError("it is cut short")
    if given != raw:
        raise ValueError(f"it holds {given}")
    return fed - len(stream.unused_data)
