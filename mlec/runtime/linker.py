"""Links object files in memory: those that LLVM makes of kernels for x86-64, which ask a linker for little.

Code, constants and data of all files lie in one piece of memory, in this order, each on pages of its own. So code reaches all of it by
offsets of 32 bits. Functions of libraries are farther away, and get stubs behind the code. Once all addresses are in place, code can be
executed and no longer written. What asks for more is left to the linker of LLVM, which takes 37 MB and 10 ms to load: other processors,
storage of threads, constructors, functions that choose an implementation when they are linked.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple, TypeAlias

from mlec.runtime import elf
from mlec.runtime.elf import R_X86_64_64, R_X86_64_GOTPCREL, R_X86_64_PC32, R_X86_64_PLT32

Address: TypeAlias = Callable[[str], int]

_HEADER, _SECTION, _SYMBOL, _RELOCATION = (
    elf.packed(fields) for fields in (elf.HEADER, elf.SECTION, elf.SYMBOL, elf.RELOCATION)
)
_PAGE: Final = mmap.PAGESIZE

_PLACED: Final = {elf.SHT_PROGBITS, elf.SHT_NOBITS}
_SECTIONS: Final = {elf.SHT_NULL, elf.SHT_SYMTAB, elf.SHT_STRTAB, elf.SHT_RELA, elf.SHT_NOTE, *_PLACED}
_SYMBOLS: Final = {elf.STT_NOTYPE, elf.STT_OBJECT, elf.STT_FUNC, elf.STT_SECTION}
_SLOTS: Final = {R_X86_64_GOTPCREL, elf.R_X86_64_GOTPCRELX, elf.R_X86_64_REX_GOTPCRELX}
"""Relocations that want what holds an address."""
_RELOCATIONS: Final = {R_X86_64_64, R_X86_64_PC32, R_X86_64_PLT32, *_SLOTS}
_OF_LIBRARIES: Final = "__tvm_ffi__library_"
"""How names begin of what whoever loads a whole library does with it: tells it of itself, reads the modules that it contains."""
_OF_RUNTIME: Final = "__TVM"
"""How names begin of words that are to hold the address of a function of the runtime, which has the name without the underscores."""

_JUMP: Final = b"\xff\x25"
"""To the address in a slot, which is told by how far it is."""
_STUB, _SLOT = 8, 8  # bytes
_ADDRESS, _DISTANCE = struct.Struct("<Q"), struct.Struct("<i")


class Image:
    """Linked code, which can be called as long as this is kept.

    Attributes:
        functions: the addresses of those that other files see, by name.
    """

    def __init__(self, memory: mmap.mmap, functions: Mapping[str, int]) -> None:
        self._memory = memory
        self.functions = functions


class _Section(NamedTuple):
    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    entry: int


class _Symbol(NamedTuple):
    """``binding`` and ``kind``: ``elf.STB_...`` and ``elf.STT_...``. ``section``: where it is defined; 0 for nowhere."""

    name: str
    binding: int
    kind: int
    section: int
    value: int


class _Relocation(NamedTuple):
    """What is wanted at an offset of a section."""

    section: int
    offset: int
    kind: int
    symbol: int
    addend: int


class _File(NamedTuple):
    """An object file."""

    data: bytes
    sections: Sequence[_Section]
    symbols: Sequence[_Symbol]
    relocations: Sequence[_Relocation]


def link_in_memory(objects: Sequence[bytes], address_of: Address) -> Image | None:
    """The object files in memory; None where they ask for something that this does not do.

    Args:
        objects: for this machine, see `mlec.runtime.objects.check_objects`.
        address_of: of a function in a library; 0 where there is none of that name.

    Raises:
        ValueError: they contradict themselves or each other.
        PermissionError: the system does not let memory that was written be executed.
        MemoryError: there is not enough for them.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    try:
        files = [_read(data) for data in objects]
        return _Linking(files).image(address_of) if all(map(_is_plain, files)) else None
    except (IndexError, OverflowError, UnicodeDecodeError, struct.error) as error:
        raise ValueError(f"a number or a name in an object file makes no sense: {error}") from error


def _read(data: bytes) -> _File:
    header = dict(zip((name for name, _ in elf.HEADER), _HEADER.unpack_from(data), strict=True))
    if header["machine"] != elf.EM_X86_64:
        raise ValueError("it is for another processor")
    begin, count = header["sections"], header["section_count"]
    sections = list(map(_Section._make, _SECTION.iter_unpack(data[begin : begin + count * _SECTION.size])))
    held = [section for section in sections if section.kind not in (elf.SHT_NULL, elf.SHT_NOBITS)]
    if len(sections) != count or any(section.offset + section.size > len(data) for section in held):
        raise ValueError("a section lies outside of its file")
    if sum(section.size for section in held) > len(data):
        raise ValueError("its sections overlap")
    tables = [section for section in sections if section.kind == elf.SHT_SYMTAB]
    if len(tables) != 1:
        raise ValueError(f"it has {len(tables)} tables of symbols, expected 1")
    (table,) = tables
    strings = sections[table.link]
    texts = data[strings.offset : strings.offset + strings.size]
    entries = list(_SYMBOL.iter_unpack(data[table.offset : table.offset + table.size]))
    if not texts.endswith(b"\0") or any(name >= len(texts) for name, *_ in entries):
        raise ValueError("the name of a symbol lies outside of the table of names")
    symbols = [
        _Symbol(texts[name : texts.index(b"\0", name)].decode(), info >> 4, info & 0xF, section, value)
        for name, info, _, section, value, _ in entries
    ]
    return _File(data, sections, symbols, list(_relocations(data, sections, len(symbols))))


def _relocations(data: bytes, sections: Sequence[_Section], symbols: int) -> Iterator[_Relocation]:
    """Those of what comes to lie in memory."""
    for section in sections:
        if section.kind == elf.SHT_RELA and sections[section.info].flags & elf.SHF_ALLOC:
            size = sections[section.info].size
            for found in _RELOCATION.iter_unpack(data[section.offset : section.offset + section.size]):
                relocation = _Relocation(section.info, *found)
                wanted = _ADDRESS if relocation.kind == R_X86_64_64 else _DISTANCE
                if relocation.symbol >= symbols or relocation.offset > size - wanted.size:
                    raise ValueError("a relocation lies outside of its section")
                yield relocation


def _is_plain(file: _File) -> bool:
    """Whether sections, symbols and relocations are of the usual kinds."""
    return (
        all(s.kind in _SECTIONS and not s.flags & elf.SHF_TLS and s.alignment <= _PAGE for s in file.sections)
        and all(s.kind == elf.STT_FILE or (s.kind in _SYMBOLS and s.section < elf.SHN_LORESERVE) for s in file.symbols)
        and all(s.binding <= elf.STB_WEAK for s in file.symbols)
        and not any(s.name.startswith(_OF_LIBRARIES) for s in file.symbols)
        and all(relocation.kind in _RELOCATIONS for relocation in file.relocations)
    )


class _Linking:
    """Object files on their way into memory.

    Attributes:
        places: by file and section, where it comes to lie; -1 of those that do not.
        chosen: file and symbol of each name that other files see: the one that is not weak, or the first.
        slots, stubs: by file and symbol, where they are.
        size: of everything. ``readable``, ``writable``: where pages of constants and of data begin.
    """

    def __init__(self, files: Sequence[_File]) -> None:
        self.files = files
        self.chosen = _chosen(files)
        called, held = self._asked_for()
        self.places = [[-1] * len(file.sections) for file in files]
        end = self._place(0, elf.SHF_EXECINSTR, elf.SHF_EXECINSTR)
        self.stubs: dict[tuple[int, int], int] = {}
        for key in called:
            if self._home(*key) is None:
                self.stubs[key] = end = _aligned(end, _STUB)
                end += _STUB
        self.readable = _aligned(end, _PAGE)
        end = self._place(self.readable, elf.SHF_EXECINSTR | elf.SHF_WRITE, 0)
        self.slots: dict[tuple[int, int], int] = {}
        for key in dict.fromkeys((*held, *self.stubs)):
            self.slots[key] = end = _aligned(end, _SLOT)
            end += _SLOT
        self.writable = _aligned(end, _PAGE)
        self.size = max(self._place(self.writable, elf.SHF_EXECINSTR | elf.SHF_WRITE, elf.SHF_WRITE), 1)

    def image(self, address_of: Address) -> Image | None:
        """Everything in its place; None where the files want something that is not in a place, nor a function of a library."""
        places = {name: self._place_of(*key) for name, key in self.chosen.items()}
        told = {place: address_of(name[2:]) for name, place in places.items() if name.startswith(_OF_RUNTIME)}
        in_data = all(self.writable <= place <= self.size - _ADDRESS.size for place in told)
        if not (in_data and all(told.values()) and self._all_near()):
            return None
        try:
            memory = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"{self.size} bytes for machine code") from error
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._copy(memory)
        for place, address in told.items():
            _ADDRESS.pack_into(memory, place, address)
        values = {
            (number, index): self._value(number, index, base, address_of)
            for number, file in enumerate(self.files) for index in {r.symbol for r in file.relocations}
        }  # fmt: skip
        self._relocate(memory, base, values)
        _protect(base, self.readable, mmap.PROT_READ | mmap.PROT_EXEC)
        _protect(base + self.readable, self.writable - self.readable, mmap.PROT_READ)
        return Image(memory, {name: base + place for name, place in places.items() if self._is_function(name, place)})

    def _is_function(self, name: str, place: int) -> bool:
        file, index = self.chosen[name]
        return place < self.readable and self.files[file].symbols[index].kind == elf.STT_FUNC

    def _copy(self, memory: mmap.mmap) -> None:
        """The sections to their places."""
        for file, places in zip(self.files, self.places, strict=True):
            for section, place in zip(file.sections, places, strict=True):
                if place >= 0 and section.kind != elf.SHT_NOBITS:
                    memory[place : place + section.size] = file.data[section.offset : section.offset + section.size]

    def _all_near(self) -> bool:
        """Whether all that is wanted by how far away it is lies in this memory."""
        near = {(n, r.symbol) for n, file in enumerate(self.files) for r in file.relocations if r.kind == R_X86_64_PC32}
        return all(self._home(*key) is not None for key in near)

    def _relocate(self, memory: mmap.mmap, base: int, values: Mapping[tuple[int, int], int]) -> None:
        """Puts addresses and distances where they are wanted, given what each symbol stands for."""
        for key, slot in self.slots.items():
            _ADDRESS.pack_into(memory, slot, values[key])
        for key, stub in self.stubs.items():
            behind = stub + len(_JUMP) + _DISTANCE.size
            memory[stub : stub + len(_JUMP)] = _JUMP
            _DISTANCE.pack_into(memory, stub + len(_JUMP), self.slots[key] - behind)
        for number, file in enumerate(self.files):
            for section, offset, kind, symbol, addend in file.relocations:
                begin, key = self.places[number][section], (number, symbol)
                if begin < 0:
                    raise ValueError("something is wanted in a section that is nowhere in memory")
                if kind == R_X86_64_64:
                    _ADDRESS.pack_into(memory, begin + offset, (values[key] + addend) % (1 << 64))
                    continue
                instead = self.slots[key] if kind in _SLOTS else self.stubs.get(key) if kind == R_X86_64_PLT32 else None
                towards = values[key] - base if instead is None else instead
                _DISTANCE.pack_into(memory, begin + offset, towards + addend - (begin + offset))

    def _asked_for(self) -> tuple[Sequence[tuple[int, int]], Sequence[tuple[int, int]]]:
        """Files and symbols of the functions that are called, and of what is wanted in slots."""
        called: dict[tuple[int, int], None] = {}
        held: dict[tuple[int, int], None] = {}
        for number, file in enumerate(self.files):
            for relocation in file.relocations:
                if relocation.kind == R_X86_64_PLT32:
                    called[number, relocation.symbol] = None
                elif relocation.kind in _SLOTS:
                    held[number, relocation.symbol] = None
        return list(called), list(held)

    def _place(self, begin: int, asked: int, wanted: int) -> int:
        """Places the sections that have the wanted ones of the flags asked for, and returns where they end."""
        for file, places in zip(self.files, self.places, strict=True):
            for number, section in enumerate(file.sections):
                if section.kind in _PLACED and section.flags & (asked | elf.SHF_ALLOC) == wanted | elf.SHF_ALLOC:
                    places[number] = begin = _aligned(begin, section.alignment)
                    begin += section.size
        return begin

    def _home(self, file: int, index: int) -> tuple[int, int] | None:
        """File and symbol where a symbol is defined; None if no file does that."""
        symbol = self.files[file].symbols[index]
        if symbol.binding != elf.STB_LOCAL:
            return self.chosen.get(symbol.name)
        return (file, index) if _is_defined(symbol) else None

    def _place_of(self, file: int, index: int) -> int:
        """Where a symbol comes to lie that is defined there."""
        symbol = self.files[file].symbols[index]
        place = self.places[file][symbol.section]
        if place < 0 or symbol.value > self.files[file].sections[symbol.section].size:
            raise ValueError("something that it refers to is nowhere in memory")
        return place + symbol.value

    def _value(self, file: int, index: int, base: int, address_of: Address) -> int:
        """The address that a symbol stands for; 0 for none."""
        home = self._home(file, index)
        if home is not None:
            return base + self._place_of(*home)
        symbol = self.files[file].symbols[index]
        address = address_of(symbol.name) if symbol.name else 0
        if not address and symbol.name and symbol.binding != elf.STB_WEAK:
            raise ValueError(f"there is no {symbol.name}")
        return address


def _chosen(files: Sequence[_File]) -> dict[str, tuple[int, int]]:
    chosen: dict[str, tuple[int, int]] = {}
    for number, file in enumerate(files):
        for index, symbol in enumerate(file.symbols):
            if symbol.binding == elf.STB_LOCAL or not _is_defined(symbol):
                continue
            if symbol.name not in chosen:
                chosen[symbol.name] = number, index
            elif symbol.binding != elf.STB_WEAK:
                before, place = chosen[symbol.name]
                if files[before].symbols[place].binding != elf.STB_WEAK:
                    raise ValueError(f"there is more than one {symbol.name}")
                chosen[symbol.name] = number, index
    return chosen


def _is_defined(symbol: _Symbol) -> bool:
    return elf.SHN_UNDEF < symbol.section < elf.SHN_LORESERVE


def _aligned(offset: int, alignment: int) -> int:
    """The first offset from there on that is so aligned; 0 for not at all."""
    return -(-offset // alignment) * alignment if alignment > 1 else offset


def _protect(address: int, nbytes: int, allowed: int) -> None:
    """Lets whole pages be used for this alone."""
    if nbytes and _mprotect(address, nbytes, allowed):
        number = ctypes.get_errno()
        if number == errno.ENOMEM:  # of a process's pieces of memory there can be only so many
            raise MemoryError(f"{nbytes} bytes of machine code on pages of their own")
        raise PermissionError(number, f"memory that was written cannot be executed: {os.strerror(number)}")


_mprotect: Final = ctypes.CDLL(None, use_errno=True).mprotect
_mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
