"""Object files with what running them takes, and no more.

LLVM describes every kernel to debuggers, by name and argument types alone: there are no source lines. That is a quarter to a third
of an object file, which the runtime would read, hash and skip. How to unwind the stack takes a tenth of the time of linking it; an
exception below a kernel ends the process with that or without, so what could raise one is asked for before (`library.require_room`).

On x86-64, kernels refer to their constants by how far these are away. Where code and constants are one section, that is known before
linking: nine tenths of the relocations go, and with them the names of all constants, a fifth of a small file. Elsewhere such distances
are in pages, and stay to be filled in.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from mlec.runtime import elf

Array: TypeAlias = npt.NDArray[Any]

_HEADER: Final = elf.packed(elf.HEADER)
_MACHINE, _TABLE, _COUNT, _NAMES = (
    [name for name, _ in elf.HEADER].index(field) for field in ("machine", "sections", "section_count", "section_names")
)
_SECTION, _SYMBOL, _RELOCATION = (elf.table_of(fields) for fields in (elf.SECTION, elf.SYMBOL, elf.RELOCATION))
_OTHER_NUMBERS: Final = (elf.SHT_REL, elf.SHT_GROUP, elf.SHT_SYMTAB_SHNDX)
"""Sections that tell sections or symbols by numbers, too, and that LLVM makes none of for us."""
_DISTANCES: Final = (elf.R_X86_64_PC32, elf.R_X86_64_PLT32)
_DROPPED: Final = (b".debug_", b".rela.debug_", b".eh_frame", b".rela.eh_frame")


def compact(data: bytes) -> bytes:
    """An object file (ELF, 64 bits, little endian, relocatable) without its sections for debuggers and exceptions; on x86-64, code and
    constants are one section.

    What is left has new numbers: sections and symbols are told by their place in tables. One with numbers elsewhere, or with more than one
    table of symbols or of names, stays as it is.
    """
    header = list(_HEADER.unpack_from(data))
    table = np.frombuffer(data, _SECTION, header[_COUNT], header[_TABLE]).copy()
    names = table["link"][table["kind"] == elf.SHT_SYMTAB]
    if np.isin(table["kind"], _OTHER_NUMBERS).any() or names.tolist() != [header[_NAMES]]:
        return data
    parts = _Parts(data, header, table)
    if header[_MACHINE] == elf.EM_X86_64:
        parts.join()
    return parts.put_together()


class _Parts:
    """An object file, taken apart.

    Attributes:
        content: bytes of each section.
        kept: which of them stay.
        symbols, relocations: as arrays; the latter by the number of their section.
    """

    def __init__(self, data: bytes, header: list[Any], table: Array) -> None:
        self.header, self.table = header, table
        self.content = [
            data[s["offset"] : s["offset"] + s["size"]] if s["kind"] != elf.SHT_NOBITS else b"" for s in table
        ]
        self.names = self.content[header[_NAMES]]
        self.kept = np.array([not self.names.startswith(_DROPPED, s["name"]) for s in table])
        self.symbol_table = int(np.flatnonzero(table["kind"] == elf.SHT_SYMTAB)[0])
        self.symbols = np.frombuffer(self.content[self.symbol_table], _SYMBOL).copy()
        self.relocations = {
            int(i): np.frombuffer(self.content[i], _RELOCATION).copy()
            for i in np.flatnonzero((table["kind"] == elf.SHT_RELA) & self.kept)
        }

    def join(self) -> None:
        """Makes code and constants one section, and fills in the distances between them."""
        table, flags = self.table, self.table["flags"]
        constant = flags & (elf.SHF_ALLOC | elf.SHF_WRITE | elf.SHF_TLS) == elf.SHF_ALLOC
        joined = self.kept & (table["kind"] == elf.SHT_PROGBITS) & constant
        code = joined & (flags & elf.SHF_EXECINSTR != 0)
        if not code.any():
            return
        order = [*np.flatnonzero(code), *np.flatnonzero(joined & ~code)]
        host, body, begins = order[0], bytearray(), np.zeros(len(table), np.uint64)
        for section in order:
            body += bytes(-len(body) % max(int(table["alignment"][section]), 1))
            begins[section] = len(body)
            body += self.content[section]
        table["alignment"][host] = table["alignment"][joined].max()
        table["flags"][host] = elf.SHF_ALLOC | elf.SHF_EXECINSTR
        self.kept &= ~joined
        self.kept[host] = True

        symbols = self.symbols
        moved = self._lies_in(joined)
        symbols["value"][moved] += begins[symbols["section"][moved]]
        names_another = moved & (symbols["info"] & 0xF == elf.STT_SECTION) & (symbols["section"] != host)
        symbols["info"][names_another] &= 0xF0
        symbols["section"][moved] = host
        for number, relocations in self.relocations.items():
            if joined[table["info"][number]]:
                relocations["offset"] += begins[table["info"][number]]
                table["info"][number] = host
                self.relocations[number] = _filled_in(body, relocations, symbols, host)
                self.kept[number] = len(self.relocations[number]) > 0
        self.content[host] = bytes(body)

    def put_together(self) -> bytes:
        """The file, with symbols that other files see or that relocations name."""
        table, kept, symbols = self.table, self.kept, self.symbols
        section_number = np.cumsum(kept) - 1
        placed = symbols["section"] < elf.SHN_LORESERVE
        stays = ~placed | self._lies_in(kept)
        if self.header[_MACHINE] == elf.EM_X86_64:
            named = [r["symbol"] for number, r in self.relocations.items() if kept[number]]
            used = np.zeros(len(symbols), bool)
            used[np.concatenate([np.zeros(1, np.uint32), *named])] = True
            stays &= used | (symbols["info"] >> 4 != elf.STB_LOCAL)
        symbol_number = np.cumsum(stays) - 1
        symbols["section"][placed] = section_number[symbols["section"][placed]]
        for number, relocations in self.relocations.items():
            relocations["symbol"] = symbol_number[relocations["symbol"]]
            self.content[number] = relocations.tobytes()
            table["info"][number] = section_number[table["info"][number]]
        table["info"][self.symbol_table] = stays[: table["info"][self.symbol_table]].sum()  # the first that others see
        self._rename(stays)
        self.content[self.symbol_table] = symbols[stays].tobytes()
        table["link"] = section_number[table["link"]]

        made = bytearray(_HEADER.size)
        for i in np.flatnonzero(kept):
            made += bytes(-len(made) % max(int(table["alignment"][i]), 1))
            table["offset"][i] = len(made)
            if table["kind"][i] != elf.SHT_NOBITS:
                table["size"][i] = len(self.content[i])
            made += self.content[i]
        made += bytes(-len(made) % 8)
        header = self.header
        header[_TABLE], header[_COUNT], header[_NAMES] = len(made), int(kept.sum()), int(section_number[header[_NAMES]])
        _HEADER.pack_into(made, 0, *header)
        made += table[kept].tobytes()
        return bytes(made)

    def _lies_in(self, chosen: Array) -> Array:
        """Of each symbol, whether it lies in one of the chosen sections."""
        numbers = self.symbols["section"]
        placed = numbers < elf.SHN_LORESERVE
        found: Array = placed & chosen[np.where(placed, numbers, 0)]
        return found

    def _rename(self, stays: Array) -> None:
        """Leaves the names of what stays in the table of names, which sections and symbols have in common."""
        begins = {b"": 0}
        made = bytearray(b"\0")
        for rows, chosen in ((self.table, self.kept), (self.symbols, stays)):
            for row in np.flatnonzero(chosen):
                at = int(rows["name"][row])
                name = self.names[at : self.names.index(b"\0", at)]
                if name not in begins:
                    begins[name] = len(made)
                    made += name + b"\0"
                rows["name"][row] = begins[name]
        self.content[self.header[_NAMES]] = bytes(made)


def _filled_in(body: bytearray, relocations: Array, symbols: Array, host: int) -> Array:
    """Fills in distances to what lies in the same section, unless another file can replace it or a function chooses it.

    Returns:
        The relocations that are left.
    """
    towards = symbols[relocations["symbol"]]
    known = np.isin(relocations["kind"], _DISTANCES) & (towards["section"] == host)
    known &= (towards["info"] >> 4 < elf.STB_WEAK) & (towards["info"] & 0xF <= elf.STT_SECTION)
    apart = towards["value"].astype(np.int64) + relocations["addend"] - relocations["offset"].astype(np.int64)
    known &= apart == apart.astype(np.int32)
    for at, distance in zip(relocations["offset"][known].tolist(), apart[known].tolist(), strict=True):
        body[at : at + 4] = distance.to_bytes(4, "little", signed=True)
    left: Array = relocations[~known]
    return left
