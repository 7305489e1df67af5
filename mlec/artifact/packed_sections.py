"""Graph and kernels as they are stored: as they are, as a frame of zstd, or, where nothing else is asked for, as a stream of zlib."""

from __future__ import annotations

from mlec.artifact import compression, deflated, limits
from mlec.artifact.header import ZLIB, ZSTD
from mlec.errors import CorruptedFileError


def encode(data: bytes | bytearray, *, zstd: bool) -> tuple[int, bytes | bytearray]:
    """The codec number of a section, and its bytes by that; the bytes as they are where nothing clearly saves any.

    Raises:
        RuntimeUnavailableError: ``E_NO_ZSTD``.
    """
    stored = None
    if data:
        stored = compression.encode(data) if zstd else deflated.encode(data)
    return (0, data) if stored is None else (ZSTD if zstd else ZLIB, stored)


def decode(stored: bytes | bytearray, codec: int, *, name: str) -> bytes | bytearray:
    """The bytes of a section as they were.

    Args:
        stored: as they lie in the file, once they are decrypted.
        codec: its number; 0 gives the bytes back.
        name: of the section.

    Raises:
        CorruptedFileError: ``E_SECTION_RAW`` for a size that is too large or implausible, ``E_SECTION_ZSTD`` and ``E_SECTION_ZLIB`` for
            a broken frame or stream.
        ArtifactError: ``E_NO_MEMORY``.
    """
    if not codec:
        return stored
    form, code = (compression, "E_SECTION_ZSTD") if codec == ZSTD else (deflated, "E_SECTION_ZLIB")
    raw, cap, what = form.declared_size(stored), limits.SECTION_BYTES[name], f"the {name} section"
    if raw is not None and (raw > cap or not compression.plausible(len(stored), raw)):
        raise CorruptedFileError(
            f"{what} says that its {len(stored)} bytes hold {raw}: more than the limit of {cap}, more than "
            f"{limits.PACKED_RATIO} times as much, or nothing saved",
            code="E_SECTION_RAW",
        )
    result = compression.allocate(raw or 0, what=what)
    compression.fill(memoryview(result), form.pieces(memoryview(stored), raw or 0, what=what, code=code))
    return result


def codec_of(stored: bytes | bytearray) -> int:
    """The codec number of a graph section, as its bytes show it: the document begins with a brace, a stream or frame says what it is."""
    if stored[:1] == b"{":
        return 0
    return ZSTD if deflated.declared_size(stored) is None else ZLIB


def first(data: bytes, *, name: str) -> bytes:
    """The stream or frame that bytes start with; empty if they start with none, or with one of more than such a section holds.

    Raises:
        RuntimeUnavailableError: ``E_NO_ZSTD``.
    """
    raw = deflated.declared_size(data)
    if raw is None:
        return compression.first_frame(data)
    return deflated.first_stream(data) if raw <= limits.SECTION_BYTES[name] else b""
