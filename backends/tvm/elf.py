"""Object files without what only debuggers and exceptions need.

LLVM describes every kernel to debuggers, by name and argument types alone: there are no source lines. That is a quarter to a third
of an object file, which the runtime would read, hash and skip. How to unwind the stack takes a tenth of the time of linking it; an
exception below a kernel ends the process with that or without, so what could raise one is asked for before (`library.require_room`).
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from mlec.runtime.elf import HEADER, RELOCATION, SECTION, SYMBOL, SYMBOL_TABLE, packed, table_of

Array: TypeAlias = npt.NDArray[Any]

_HEADER: Final = packed(HEADER)
_TABLE, _COUNT, _NAMES = (
    [name for name, _ in HEADER].index(field) for field in ("sections", "section_count", "section_names")
)
_SECTION, _SYMBOL, _RELOCATION = (table_of(fields) for fields in (SECTION, SYMBOL, RELOCATION))
_RELOCATIONS, _NO_BITS = 4, 8  # kinds of sections
_OTHER_NUMBERS: Final = (9, 17, 18)
"""Kinds that tell sections or symbols by numbers, too, and that LLVM makes none of for us: relocations without addends, groups, and the
numbers of sections from `_MARKS` on."""
_MARKS: Final = 0xFF00  # what a symbol has for a section from here on is none
_DROPPED: Final = (b".debug_", b".rela.debug_", b".eh_frame", b".rela.eh_frame")


def without_debug_sections(data: bytes) -> bytes:
    """An object file (ELF, 64 bits, little endian, relocatable) without its sections for debuggers and exceptions.

    What is left has new numbers: sections and symbols are told by their place in tables. One with numbers elsewhere stays as it is.
    """
    header = list(_HEADER.unpack_from(data))
    table = np.frombuffer(data, _SECTION, header[_COUNT], header[_TABLE]).copy()
    if np.isin(table["kind"], _OTHER_NUMBERS).any() or not len(table):
        return data
    content = [data[s["offset"] : s["offset"] + s["size"]] if s["kind"] != _NO_BITS else b"" for s in table]
    names = content[header[_NAMES]]
    kept = np.array([not names.startswith(_DROPPED, s["name"]) for s in table])
    section_number = np.cumsum(kept) - 1

    symbol_number: Array = np.zeros(0, np.int64)
    for i in np.flatnonzero(table["kind"] == SYMBOL_TABLE):
        symbols = np.frombuffer(content[i], _SYMBOL).copy()
        placed = symbols["section"] < _MARKS
        stays = ~placed | kept[np.where(placed, symbols["section"], 0)]
        symbols["section"][placed] = section_number[symbols["section"][placed]]
        content[i], symbol_number = symbols[stays].tobytes(), np.cumsum(stays) - 1
        table["info"][i] = stays[: table["info"][i]].sum()  # the first that other files see
    for i in np.flatnonzero((table["kind"] == _RELOCATIONS) & kept):
        relocations = np.frombuffer(content[i], _RELOCATION).copy()
        relocations["symbol"] = symbol_number[relocations["symbol"]]
        content[i] = relocations.tobytes()
        table["info"][i] = section_number[table["info"][i]]
    table["link"] = section_number[table["link"]]

    made = bytearray(_HEADER.size)
    for i in np.flatnonzero(kept):
        made += bytes(-len(made) % max(int(table["alignment"][i]), 1))
        table["offset"][i] = len(made)
        if table["kind"][i] != _NO_BITS:
            table["size"][i] = len(content[i])
        made += content[i]
    made += bytes(-len(made) % 8)
    header[_TABLE], header[_COUNT], header[_NAMES] = len(made), int(kept.sum()), int(section_number[header[_NAMES]])
    _HEADER.pack_into(made, 0, *header)
    made += table[kept].tobytes()
    return bytes(made)
