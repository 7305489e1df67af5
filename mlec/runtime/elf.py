"""Object files: ELF of 64 bits, little endian. The fields of its structures, with kinds as ``struct`` and numpy spell them, and what of its
numbers is looked at, by the names that the System V ABI and its supplement for x86-64 have for them.
"""

from __future__ import annotations

import struct
from typing import Any, Final, TypeAlias

import numpy as np

Fields: TypeAlias = tuple[tuple[str, str], ...]

HEADER: Final[Fields] = (
    ("identity", "16s"), ("kind", "H"), ("machine", "H"), ("version", "I"), ("entry", "Q"), ("segments", "Q"), ("sections", "Q"),
    ("flags", "I"), ("size", "H"), ("segment_size", "H"), ("segment_count", "H"), ("section_size", "H"), ("section_count", "H"),
    ("section_names", "H"),
)  # fmt: skip
"""``sections`` is where their table begins, ``section_names`` the number of the one with their names."""
SECTION: Final[Fields] = (
    ("name", "I"), ("kind", "I"), ("flags", "Q"), ("address", "Q"), ("offset", "Q"), ("size", "Q"),
    ("link", "I"), ("info", "I"), ("alignment", "Q"), ("entry", "Q"),
)  # fmt: skip
"""``link`` of symbols is the section with their names, ``info`` the first that other files see."""
SYMBOL: Final[Fields] = (
    ("name", "I"), ("info", "B"), ("other", "B"), ("section", "H"), ("value", "Q"), ("size", "Q"),
)  # fmt: skip

RELOCATION: Final[Fields] = (("offset", "Q"), ("kind", "I"), ("symbol", "I"), ("addend", "q"))

ET_REL: Final = 1
"""Of files: to be linked."""
EM_X86_64, EM_AARCH64 = 62, 183
"""Processors."""

SHT_NULL, SHT_PROGBITS, SHT_SYMTAB, SHT_STRTAB, SHT_RELA, SHT_NOTE, SHT_NOBITS, SHT_REL = 0, 1, 2, 3, 4, 7, 8, 9
SHT_INIT_ARRAY, SHT_GROUP, SHT_SYMTAB_SHNDX = 14, 17, 18
"""What is in a section: code or data, symbols, names, relocations with addends, notes, nothing but zeros, relocations without addends;
what runs first, what goes together, the numbers of sections from `SHN_LORESERVE` on.
"""
SHF_WRITE, SHF_ALLOC, SHF_EXECINSTR, SHF_TLS = 0x1, 0x2, 0x4, 0x400
"""What becomes of a section: it can be written to, is in memory, can be executed, is there once for each thread."""
SHN_UNDEF, SHN_LORESERVE = 0, 0xFF00
"""What a symbol has for a section that is defined nowhere; from the second one on: a number, shared data, or no section at all."""

STB_LOCAL, STB_GLOBAL, STB_WEAK = 0, 1, 2
"""Who sees a symbol: its file, all, all unless another one of that name is not weak. The upper half of ``info``."""
STT_NOTYPE, STT_OBJECT, STT_FUNC, STT_SECTION, STT_FILE = range(5)
"""What a symbol is: of no kind, data, a function, the start of a section, the name of the source. The lower half of ``info``."""

R_X86_64_64, R_X86_64_PC32, R_X86_64_PLT32, R_X86_64_GOTPCREL, R_X86_64_GOTPCRELX, R_X86_64_REX_GOTPCRELX = (
    1,
    2,
    4,
    9,
    41,
    42,
)
"""What is wanted at a place: an address; how far away something is, or a function; how far away what holds its address is."""


def packed(fields: Fields) -> struct.Struct:
    """How one structure lies in memory."""
    return struct.Struct("<" + "".join(kind for _, kind in fields))


def table_of(fields: Fields) -> np.dtype[Any]:
    """The same, of many in a row."""
    return np.dtype([(name, f"<{kind}") for name, kind in fields])
