"""Object files without what only debuggers and exceptions need.

LLVM describes every kernel to debuggers, by name and argument types alone: there are no source lines. That is a quarter to a third
of an object file, which the runtime would read, hash and skip. How to unwind the stack takes a tenth of the time of linking it; an
exception below a kernel ends the process with that or without, so what could raise one is asked for before (`library.require_room`).
"""

from __future__ import annotations

import struct
from typing import Final

_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION: Final = struct.Struct("<IIQQQQIIQQ")
_NO_BITS: Final = 8
_DROPPED: Final = (b".debug_", b".rela.debug_", b".eh_frame", b".rela.eh_frame")


def without_debug_sections(data: bytes) -> bytes:
    """An object file (ELF, 64 bits, little endian, relocatable) whose sections for debuggers and exceptions are empty.

    They stay in the table of sections, as symbols and other sections are told by numbers.
    """
    header = list(_HEADER.unpack_from(data))
    start, entry, count, names = header[6], header[11], header[12], header[13]
    table = [list(_SECTION.unpack_from(data, start + i * entry)) for i in range(count)]
    texts = table[names][4]
    made = bytearray(data[: _HEADER.size])
    for section in table:
        name, kind, _, _, offset, size, _, _, alignment, _ = section
        begin = texts + name
        if data[begin : data.index(b"\0", begin)].startswith(_DROPPED):
            size = section[5] = 0
        made += bytes(-len(made) % max(alignment, 1))
        section[4] = len(made)
        if kind != _NO_BITS:
            made += data[offset : offset + size]
    made += bytes(-len(made) % 8)
    header[6] = len(made)
    for section in table:
        made += _SECTION.pack(*section)
    _HEADER.pack_into(made, 0, *header)
    return bytes(made)
