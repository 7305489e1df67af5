"""The structures of object files: ELF of 64 bits, little endian. Names and kinds of their fields, as ``struct`` and numpy spell kinds."""

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

SYMBOL_TABLE: Final = 2
"""The kind of a section with symbols."""


def packed(fields: Fields) -> struct.Struct:
    """How one structure lies in memory."""
    return struct.Struct("<" + "".join(kind for _, kind in fields))


def table_of(fields: Fields) -> np.dtype[Any]:
    """The same, of many in a row."""
    return np.dtype([(name, f"<{kind}") for name, kind in fields])
