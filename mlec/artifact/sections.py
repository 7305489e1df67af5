"""Sections: where they lie, zero padding, checksums, and the digest tree.

A file has exactly one valid layout for its content: sections follow each other in table order, each at the first
position that its alignment allows, with zero bytes between them and nothing after the last.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

from mlec.artifact import limits
from mlec.artifact.header import ALIGNMENT, SECTIONS, SIZE, Header, Section
from mlec.errors import CorruptedFileError
from mlec.runtime.threads import SideBySide

CHUNK: Final = 1 << 20
"""Bytes under one leaf of the digest tree."""

SECTION_ID: Final = {name: number for number, name in enumerate(SECTIONS, start=1)}
"""Number of a section inside its digest."""

_CODE_DOMAIN: Final = b"mle:code:v1\0"
_ABSENT_ROOT: Final = bytes(32)


def align_up(position: int, alignment: int) -> int:
    """The first multiple of ``alignment`` that is not below ``position``."""
    return -(-position // alignment) * alignment


class SectionHash:
    """CRC-32 and digest root of a section whose bytes arrive in pieces of any length.

    leaf = SHA-256(0xA5 | u32 length of the chunk | chunk), chunks of 1 MiB, the last one shorter.
    root = SHA-256(0x5A | u8 section id | u64 length of the section | u32 number of leaves | leaves).
    """

    def __init__(self, section: str, length: int) -> None:
        self.crc = 0
        self._section = section
        self._length = length
        self._done = 0
        self._leaves: list[bytes] = []
        self._leaf: Any = None  # under way
        self._root: bytes | None = None

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes of the section."""
        view = memoryview(data)
        while len(view):
            room = CHUNK - self._done % CHUNK
            if room == CHUNK:
                self._leaf = _begun_leaf(min(CHUNK, self._length - self._done))
            piece, view = view[:room], view[room:]
            self.crc = zlib.crc32(piece, self.crc)
            self._leaf.update(piece)
            self._done += len(piece)
            if self._done % CHUNK == 0 or self._done == self._length:
                self._leaves.append(self._leaf.digest())

    def root(self) -> bytes:
        """The 32-byte root. All ``length`` bytes must have been given."""
        assert self._done == self._length, (self._done, self._length)
        if self._root is None:
            head = struct.pack("<BBQI", 0x5A, SECTION_ID[self._section], self._length, len(self._leaves))
            self._root = hashlib.sha256(head + b"".join(self._leaves)).digest()
        return self._root

    @classmethod
    def of(cls, section: str, data: bytes | bytearray | memoryview) -> SectionHash:
        """The finished hash of a section that is in memory as a whole; one of several chunks is hashed on all usable CPUs."""
        return BegunHash(section, data).finish()


class BegunHash:
    """The hash of a section that is in memory as a whole. Where it has several chunks, other CPUs are at work on it from now on.

    Args:
        section, data: its name and bytes.
        checksum: False leaves the CRC-32 at 0.
    """

    def __init__(self, section: str, data: bytes | bytearray | memoryview, *, checksum: bool = True) -> None:
        view = memoryview(data)
        self._hash = SectionHash(section, view.nbytes)
        self._tasks: list[Callable[[], Any]] = [partial(zlib.crc32, view)] if checksum else [int]
        self._tasks += [partial(_leaf, view[start : start + CHUNK]) for start in range(0, view.nbytes, CHUNK)]
        self._under_way = SideBySide(self._tasks) if view.nbytes > CHUNK else None

    def finish(self) -> SectionHash:
        """The finished hash; this thread takes part."""
        found = [task() for task in self._tasks] if self._under_way is None else self._under_way.results()
        self._hash.crc, *self._hash._leaves = found
        self._hash._done = self._hash._length
        return self._hash


def _leaf(chunk: memoryview) -> bytes:
    leaf = _begun_leaf(chunk.nbytes)
    leaf.update(chunk)
    digest: bytes = leaf.digest()
    return digest


def _begun_leaf(length: int) -> Any:
    return hashlib.sha256(b"\xa5" + struct.pack("<I", length))


def code_id(metadata_root: bytes, graph_root: bytes, kernels_root: bytes | None) -> str:
    """Identity of everything in a file that decides what code runs, as 64 hexadecimal digits.

    The roots are those of the digest tree; None stands for an absent kernels section. The weights are covered through
    the digest that the metadata holds of them.
    """
    return hashlib.sha256(_CODE_DOMAIN + metadata_root + graph_root + (kernels_root or _ABSENT_ROOT)).hexdigest()


def place(sizes: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Offset and size of each section, in table order; (0, 0) for those of size 0."""
    placed = {}
    end = SIZE
    for name in SECTIONS:
        size = sizes.get(name, 0)
        offset = align_up(end, ALIGNMENT[name]) if size else 0
        placed[name] = (offset, size)
        end = offset + size if size else end
    return placed


def check_layout(header: Header) -> None:
    """Every section lies exactly where the format puts it, within its cap and within the file.

    Reads nothing and allocates nothing: it runs before any section is touched.

    Raises:
        CorruptedFileError: with the code of the broken rule.
    """
    end = SIZE
    for name in SECTIONS:
        section = header.sections[name]
        if section.size == 0:
            if name in ("metadata", "graph"):
                raise _broken(section, "the section is missing", "E_SECTION_MISSING")
            if section.offset or section.crc:
                raise _broken(section, "an absent section must have offset, size and CRC 0", "E_SECTION_ABSENT")
            continue
        cap = limits.SECTION_BYTES[name]
        if section.size > cap:
            raise _broken(section, f"it is larger than the limit of {cap} bytes", "E_SECTION_CAP")
        if section.end > header.file_size:
            raise _broken(section, f"it ends after the file ({header.file_size} bytes)", "E_SECTION_BOUNDS")
        expected = align_up(end, ALIGNMENT[name])
        if section.offset != expected:
            raise _broken(section, f"it must start at {expected}", "E_SECTION_PLACEMENT")
        end = section.end
    if end != header.file_size:
        raise CorruptedFileError(
            f"the last section ends at byte {end}, the file at {header.file_size}: the bytes between belong to nothing",
            code="E_FILE_END",
        )


def paddings(header: Header) -> Iterator[tuple[int, int]]:
    """Start and end of each gap between sections; at most 4095 bytes each."""
    end = SIZE
    for section in header.sections.values():
        if section.size:
            if section.offset > end:
                yield end, section.offset
            end = section.end


def check_zero(padding: bytes | bytearray | memoryview, position: int, *, code: str = "E_PADDING") -> None:
    """Padding holds zero bytes only. ``position`` is where in the file it starts."""
    if padding != bytes(len(padding)):
        raise CorruptedFileError(
            f"the {len(padding)} bytes of padding at byte {position} must be zero, they are not",
            code=code,
            hint="fetch or compile the file again; no part of the model lies there: `mlec recover` takes out of it what is intact",
        )


def _broken(section: Section, why: str, code: str) -> CorruptedFileError:
    return CorruptedFileError(
        f"section {section.name} (offset {section.offset}, size {section.size}): {why}",
        code=code,
        hint="fetch or compile the file again",
    )
