"""The 128-byte header of a .mle file: fields, packing, and the checks that need nothing but the header.

All integers are little endian and packed without gaps.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Mapping
from typing import Final

import msgspec

from mlec.errors import CorruptedFileError, VersionMismatchError

MAGIC: Final = b"MLE\0"
MAJOR: Final = 1
MINOR: Final = 0
SIZE: Final = 128

SECTIONS: Final = ("metadata", "graph", "weights", "kernels", "signature")
"""Names of the sections in the order in which the header lists them and the file holds them."""

ALIGNMENT: Final = {"metadata": SIZE, "graph": 64, "weights": 4096, "kernels": 4096, "signature": 64}
"""Alignment of the offset of each section in bytes."""

DIGEST_SHA256_TREE: Final = 1
SIG_ED25519: Final = 1
ZSTD: Final = 1
ZLIB: Final = 2
"""Only of graph and kernels, which are copied from the file anyway."""
CODECS: Final = {
    "metadata": (0,), "graph": (0, ZSTD, ZLIB), "weights": (0, ZSTD), "kernels": (0, ZSTD, ZLIB),
}  # fmt: skip
"""How a section can be stored, as the codecs byte numbers that; 0 is as it is."""

_LAYOUT: Final = struct.Struct("<4sII10QIIIIIQ4BI")
_CRC_OFFSET: Final = 124

NEWER: Final = (
    "read it with a newer mlec (pip install --upgrade mlec); for this version, compile the model again here, or save it there "
    "without what is new: mlec.load(path).save(other)"
)
"""What to do with a file that uses what this reader does not know."""

_FOREIGN: Final = (
    (b"\0ELM", "the file is byte-swapped: it was written or copied by a tool that reverses 32-bit words"),
    (b"PK\x03\x04", "this is a zip archive (a torch .pt/.pt2 or a .skops file?)"),
    (b"GGUF", "this is a GGUF file"),
    (b"\x89HDF", "this is an HDF5 file"),
    (b"\x7fELF", "this is an ELF program or library"),
    (b"\x1f\x8b", "this is a gzip archive"),
    (b"\x80\x02", "this is a Python pickle"),
    (b"\x80\x03", "this is a Python pickle"),
    (b"\x80\x04", "this is a Python pickle"),
    (b"\x80\x05", "this is a Python pickle"),
    (b"{", "this looks like JSON (an XGBoost model?)"),
)


class Flag(enum.IntFlag):
    """Bits of the flags field. Bits 0 to 15 must be understood to read the file, bits 16 to 31 may be ignored."""

    KERNELS = 1
    COMPRESSED = 2
    ENCRYPTED = 4
    SIGNED = 8


_WITNESSES: Final = {
    Flag.KERNELS: "the kernels section",
    Flag.COMPRESSED: "the codecs field",
    Flag.ENCRYPTED: "the aead_alg field",
    Flag.SIGNED: "the sig_alg field and the signature section",
}
REQUIRED_FLAGS: Final = 0xFFFF
"""Bits of the flags field that a reader must know to read the file."""
_KNOWN: Final = 0x000F


class Section(msgspec.Struct, frozen=True):
    """One entry of the section table.

    Attributes:
        name: one of `SECTIONS`.
        offset: position in the file in bytes; 0 when absent.
        size: length in bytes; 0 when absent.
        crc: CRC-32 of the stored bytes; 0 when absent.
    """

    name: str
    offset: int = 0
    size: int = 0
    crc: int = 0

    @property
    def end(self) -> int:
        """Position of the first byte after the section."""
        return self.offset + self.size


class Header(msgspec.Struct, frozen=True):
    """The header's fields. ``sections`` holds all five, the absent ones too."""

    sections: Mapping[str, Section]
    file_size: int
    flags: int = 0
    major: int = MAJOR
    minor: int = MINOR
    digest_alg: int = DIGEST_SHA256_TREE
    sig_alg: int = 0
    aead_alg: int = 0
    codecs: int = 0

    @property
    def version(self) -> str:
        """Format version as text, e.g. ``"1.0"``."""
        return f"{self.major}.{self.minor}"

    def codec(self, section: str) -> int:
        """Codec number of a section (metadata, graph, weights or kernels)."""
        return self.codecs >> 2 * SECTIONS.index(section) & 3

    @property
    def compressions(self) -> list[str]:
        """Names of the ways in which sections are compressed."""
        used = {self.codec(section) for section in CODECS}
        return [name for number, name in ((ZSTD, "zstd"), (ZLIB, "zlib")) if number in used]

    @property
    def expected_flags(self) -> int:
        """The known flags that the other fields ask for, see `Flag`."""
        present = self.sections["kernels"].size, self.codecs, self.aead_alg, self.sig_alg  # in the order of the bits
        return sum(1 << bit for bit, there in enumerate(present) if there)

    def pack(self) -> bytes:
        """The 128 bytes, with their CRC-32 at the end."""
        table = [self.sections[name] for name in SECTIONS]
        body = _LAYOUT.pack(
            MAGIC,
            self.major | self.minor << 16,
            self.flags,
            *(field for section in table for field in (section.offset, section.size)),
            *(section.crc for section in table),
            self.file_size,
            self.digest_alg,
            self.sig_alg,
            self.aead_alg,
            self.codecs,
            0,
        )[:_CRC_OFFSET]
        return body + zlib.crc32(body).to_bytes(4, "little")


def pack_codecs(codecs: Mapping[str, int]) -> int:
    """The codecs field, from the codec numbers of sections; 0 (raw) for those that are not named."""
    return sum(codec << 2 * SECTIONS.index(name) for name, codec in codecs.items())


def unpack(data: bytes | bytearray) -> Header:
    """Parse and check the first 128 bytes of a file.

    Raises:
        CorruptedFileError: not a .mle header, truncated, or its fields contradict each other.
        VersionMismatchError: another major version, or a feature that this reader does not know.
    """
    _check_magic(data)
    _, version, flags, *rest, file_size, digest_alg, sig_alg, aead_alg, codecs, crc = _LAYOUT.unpack(data)
    intact = zlib.crc32(data[:_CRC_OFFSET]) == crc
    major, minor = version & 0xFFFF, version >> 16
    if major != MAJOR:
        raise VersionMismatchError(
            f"the file has format version {major}.{minor}, this version of mlec reads {MAJOR}.x",
            code="E_VERSION_MAJOR",
            hint=f"an mlec that reads {major}.x loads it; for this version, compile the model again here",
            notes=() if intact else ("the checksum of the header is wrong too: the file may be damaged",),
        )
    if not intact:
        raise CorruptedFileError(
            f"the header is damaged: its checksum is {zlib.crc32(data[:_CRC_OFFSET]):#010x}, it says {crc:#010x}",
            code="E_HEADER_CRC",
            hint="fetch or compile the file again",
        )
    table = {
        name: Section(name, offset, size, section_crc)
        for name, offset, size, section_crc in zip(SECTIONS, rest[0:10:2], rest[1:10:2], rest[10:], strict=True)
    }
    header = Header(table, file_size, flags, major, minor, digest_alg, sig_alg, aead_alg, codecs)
    _check_known(header)
    _check_consistent(header)
    return header


def metadata_section(data: bytes | bytearray) -> Section:
    """Where the header says that the metadata is; nothing else of it is looked at."""
    _, _, _, offset, size, *rest = _LAYOUT.unpack(data)
    return Section(SECTIONS[0], offset, size, rest[8])


def _check_magic(data: bytes | bytearray) -> None:
    start = data[:4]
    if start != MAGIC[: len(start)]:
        kind = next((text for prefix, text in _FOREIGN if data.startswith(prefix)), None)
        raise CorruptedFileError(
            f"not a .mle file: it starts with {start.hex(' ')}, expected {MAGIC.hex(' ')}",
            code="E_MAGIC",
            hint="`mlec compile MODEL` makes a .mle file of a model",
            notes=(kind,) if kind else (),
        )
    if len(data) < SIZE:
        raise CorruptedFileError(
            f"the file is cut short: it has {len(data)} bytes, the header alone takes {SIZE}",
            code="E_HEADER_TRUNCATED",
            hint="fetch or compile the file again",
        )


def _check_known(header: Header) -> None:
    unknown = header.flags & REQUIRED_FLAGS & ~_KNOWN
    if unknown:
        raise VersionMismatchError(
            f"the file needs features that this version of mlec does not know (flags {unknown:#06x})",
            code="E_FLAG_UNKNOWN",
            hint=NEWER,
        )
    for field, value, known in (
        ("digest_alg", header.digest_alg, (DIGEST_SHA256_TREE,)),
        ("sig_alg", header.sig_alg, (0, 1)),
        ("aead_alg", header.aead_alg, (0, 1, 2)),
    ):
        if value not in known:
            raise VersionMismatchError(
                f"the header's {field} is {value}, this version of mlec knows {', '.join(map(str, known))}",
                code=f"E_{field.upper()}",
                hint=NEWER,
            )
    for name, known_codecs in CODECS.items():
        codec = header.codec(name)
        if codec not in known_codecs:
            raise VersionMismatchError(
                f"the {name} section is stored with codec {codec}, which this version of mlec does not know",
                code="E_CODEC",
                hint=NEWER,
            )


def _check_consistent(header: Header) -> None:
    """Each flag says the same as the fields and the section that belong to it."""
    wrong = (header.flags & _KNOWN) ^ header.expected_flags
    if bool(header.sections["signature"].size) != bool(header.sig_alg):
        wrong |= Flag.SIGNED
    if any(header.codec(name) and not header.sections[name].size for name in ("weights", "kernels")):
        wrong |= Flag.COMPRESSED
    if not wrong:
        return
    flag = next(flag for flag in Flag if flag & wrong)
    raise CorruptedFileError(
        f"the header contradicts itself: flag {flag.name} is {'set' if header.flags & flag else 'clear'}, "
        f"{_WITNESSES[flag]} says otherwise",
        code="E_FLAG_MISMATCH",
        hint="fetch or compile the file again",
    )


def check_file_size(header: Header, actual: int) -> None:
    """The header's file_size is the size of the file: nothing cut off, nothing appended."""
    if header.file_size != actual:
        how = "cut short" if actual < header.file_size else "longer than it says"
        raise CorruptedFileError(
            f"the file is {how}: it has {actual} bytes, the header says {header.file_size}",
            code="E_FILE_SIZE",
            hint="the copy or download is incomplete or was changed: fetch it again; `mlec recover` takes out what is intact",
        )
