"""Links object files in memory: those that LLVM makes of kernels for x86-64, which ask a linker for little.

Code, constants and data of all files lie in one piece of memory, in this order, each on pages of its own. So code reaches all of it by
offsets of 32 bits. Functions of libraries are farther away, and get stubs behind the code. Once all addresses are in place, code can be
executed and no longer written. What asks for more is left to the linker of LLVM, which takes 37 MB and 10 ms to load: other processors,
storage of threads, constructors.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple, TypeAlias

from mlec.runtime import elf

Address: TypeAlias = Callable[[str], int]

_HEADER, _SECTION, _SYMBOL, _RELOCATION = (
    elf.packed(fields) for fields in (elf.HEADER, elf.SECTION, elf.SYMBOL, elf.RELOCATION)
)
_X86_64: Final = 62
_PAGE: Final = mmap.PAGESIZE

_CONTENT, _NO_BITS, _RELOCATIONS = 1, 8, 4
_KINDS: Final = {_CONTENT, _NO_BITS, _RELOCATIONS, 0, elf.SYMBOL_TABLE, 3, 7}
"""Of sections; those that are not named need nothing: none, names, notes."""
_WRITE, _IN_MEMORY, _EXECUTE, _OF_THREADS = 0x1, 0x2, 0x4, 0x400
_MARKS, _ABSOLUTE = 0xFF00, 0xFFF1
"""Numbers of sections from the first on are none; a symbol of the second one is a number."""
_WEAK: Final = 2
_OF_LIBRARIES: Final = "__tvm_ffi__library_"
"""How names begin of what whoever loads a whole library does with it: tells it of itself, reads the modules that it contains."""

_WORD, _NEAR, _CALL, _SLOTS = 1, 2, 4, 9
_RELOCATED: Final = {_WORD, _NEAR, _CALL, _SLOTS, 41, 42}
"""Relocations: an address; how far something is, or a function, or (from `_SLOTS` on) the slot that holds its address."""
_JUMP: Final = b"\xff\x25"
"""To the address in a slot, which is told by how far it is."""
_STUB, _ENTRY = 8, 8  # bytes of a stub and of a slot
_ADDRESS, _DISTANCE = struct.Struct("<Q"), struct.Struct("<i")


class Image:
    """Linked code, which can be called as long as this is kept.

    Attributes:
        functions: the addresses of what other files see, by name.
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
    """``public``: other files see it. ``section``: where it is defined; 0 for nowhere."""

    name: str
    public: bool
    weak: bool
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
        ValueError: they contradict themselves, or the system does not let memory be executed.
        MemoryError: there is not enough for them.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    try:
        files = [_read(data) for data in objects]
        return _Linking(files).image(address_of) if all(map(_is_plain, files)) else None
    except (IndexError, OverflowError, OSError, struct.error) as error:
        raise ValueError(str(error)) from error


def _read(data: bytes) -> _File:
    header = dict(zip((name for name, _ in elf.HEADER), _HEADER.unpack_from(data), strict=True))
    if header["machine"] != _X86_64:
        raise ValueError("it is for another processor")
    begin, count = header["sections"], header["section_count"]
    sections = list(map(_Section._make, _SECTION.iter_unpack(data[begin : begin + count * _SECTION.size])))
    if len(sections) != count or any(s.offset + s.size > len(data) for s in sections if s.kind != _NO_BITS):
        raise ValueError("a section lies outside of its file")
    (table,) = (s for s in sections if s.kind == elf.SYMBOL_TABLE)
    strings = sections[table.link]
    texts = data[strings.offset : strings.offset + strings.size]
    symbols = [
        _Symbol(texts[name : texts.index(b"\0", name)].decode(), info >> 4 != 0, info >> 4 == _WEAK, section, value)
        for name, info, _, section, value, _ in _SYMBOL.iter_unpack(data[table.offset : table.offset + table.size])
    ]
    return _File(data, sections, symbols, list(_relocations(data, sections, len(symbols))))


def _relocations(data: bytes, sections: Sequence[_Section], symbols: int) -> Iterator[_Relocation]:
    for section in sections:
        if section.kind == _RELOCATIONS and sections[section.info].flags & _IN_MEMORY:
            size = sections[section.info].size
            for found in _RELOCATION.iter_unpack(data[section.offset : section.offset + section.size]):
                relocation = _Relocation(section.info, *found)
                if relocation.symbol >= symbols or relocation.offset > size - (8 if relocation.kind == _WORD else 4):
                    raise ValueError("a relocation lies outside of its section")
                yield relocation


def _is_plain(file: _File) -> bool:
    """Whether sections, symbols and relocations are of the usual kinds."""
    return (
        all(s.kind in _KINDS and not s.flags & _OF_THREADS and s.alignment <= _PAGE for s in file.sections)
        and all(s.section < _MARKS or s.section == _ABSOLUTE for s in file.symbols)
        and all(relocation.kind in _RELOCATED for relocation in file.relocations)
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
        self.chosen: dict[str, tuple[int, int]] = {}
        for number, file in enumerate(files):
            for index, symbol in enumerate(file.symbols):
                if symbol.public and symbol.section:
                    before = self.chosen.get(symbol.name)
                    if before is None or (not symbol.weak and files[before[0]].symbols[before[1]].weak):
                        self.chosen[symbol.name] = number, index
        called, held = self._asked_for()
        self.places = [[-1] * len(file.sections) for file in files]
        end = self._place(0, _EXECUTE, _EXECUTE)
        self.stubs: dict[tuple[int, int], int] = {}
        for key in called:
            if self._home(*key) is None:
                self.stubs[key] = end = -(-end // _STUB) * _STUB
                end += _STUB
        self.readable = -(-end // _PAGE) * _PAGE
        end = self._place(self.readable, _EXECUTE | _WRITE, 0)
        self.slots: dict[tuple[int, int], int] = {}
        for key in dict.fromkeys((*held, *self.stubs)):
            self.slots[key] = end = -(-end // _ENTRY) * _ENTRY
            end += _ENTRY
        self.writable = -(-end // _PAGE) * _PAGE
        self.size = max(self._place(self.writable, _EXECUTE | _WRITE, _WRITE), 1)

    def image(self, address_of: Address) -> Image | None:
        """Everything in its place; None where the files want something that is not in a place, nor a function of a library."""
        try:
            memory = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"{self.size} bytes for machine code") from error
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._copy(memory)
        places = {name: place for name, key in self.chosen.items() if (place := self._place_of(*key)) is not None}
        if not (self._all_near() and self._told_functions(memory, places, address_of)):
            return None
        values = {
            (number, index): self._value(number, index, base, address_of)
            for number, file in enumerate(self.files) for index in {r.symbol for r in file.relocations}
        }  # fmt: skip
        self._relocate(memory, base, values)
        _protect(base, self.readable, mmap.PROT_READ | mmap.PROT_EXEC)
        _protect(base + self.readable, self.writable - self.readable, mmap.PROT_READ)
        return Image(memory, {name: base + place for name, place in places.items()})

    def _copy(self, memory: mmap.mmap) -> None:
        """The sections to their places."""
        for file, places in zip(self.files, self.places, strict=True):
            for section, place in zip(file.sections, places, strict=True):
                if place >= 0 and section.kind == _CONTENT:
                    memory[place : place + section.size] = file.data[section.offset : section.offset + section.size]

    def _told_functions(self, memory: mmap.mmap, places: Mapping[str, int], address_of: Address) -> bool:
        """Fills in the words that want the address of a function of the runtime; whether that is all that files want to be told."""
        for name, place in places.items():
            if name.startswith("__TVM"):
                function = address_of(name.removeprefix("__"))
                if not function or not self.writable <= place <= self.size - _ENTRY:
                    return False
                _ADDRESS.pack_into(memory, place, function)
        return not any(name.startswith(_OF_LIBRARIES) for name in places)

    def _all_near(self) -> bool:
        """Whether all that is wanted by how far away it is lies in this memory, or is a number."""
        near = {(n, r.symbol) for n, file in enumerate(self.files) for r in file.relocations if r.kind == _NEAR}
        return all(self._home(*key) is not None or self._symbol(*key).section == _ABSOLUTE for key in near)

    def _relocate(self, memory: mmap.mmap, base: int, values: Mapping[tuple[int, int], int]) -> None:
        """Puts addresses and distances where they are wanted, given what each symbol stands for."""
        for key, slot in self.slots.items():
            _ADDRESS.pack_into(memory, slot, values[key])
        for key, stub in self.stubs.items():
            memory[stub : stub + 2] = _JUMP
            _DISTANCE.pack_into(memory, stub + 2, self.slots[key] - (stub + 6))
        for number, file in enumerate(self.files):
            for section, offset, kind, symbol, addend in file.relocations:
                begin, key = self.places[number][section], (number, symbol)
                if begin < 0:
                    raise ValueError("something is wanted in a section that is nowhere in memory")
                if kind == _WORD:
                    _ADDRESS.pack_into(memory, begin + offset, (values[key] + addend) % (1 << 64))
                    continue
                instead = self.stubs.get(key) if kind == _CALL else self.slots[key] if kind >= _SLOTS else None
                towards = values[key] - base if instead is None else instead
                _DISTANCE.pack_into(memory, begin + offset, towards + addend - (begin + offset))

    def _asked_for(self) -> tuple[Sequence[tuple[int, int]], Sequence[tuple[int, int]]]:
        """Files and symbols of the functions that are called, and of what is wanted in slots."""
        called: dict[tuple[int, int], None] = {}
        held: dict[tuple[int, int], None] = {}
        for number, file in enumerate(self.files):
            for relocation in file.relocations:
                if relocation.kind == _CALL:
                    called[number, relocation.symbol] = None
                elif relocation.kind >= _SLOTS:
                    held[number, relocation.symbol] = None
        return list(called), list(held)

    def _place(self, begin: int, asked: int, wanted: int) -> int:
        """Places the sections that have the wanted ones of the flags asked for, and returns where they end."""
        for file, places in zip(self.files, self.places, strict=True):
            for number, section in enumerate(file.sections):
                if section.flags & (asked | _IN_MEMORY) == wanted | _IN_MEMORY and section.kind in (_CONTENT, _NO_BITS):
                    alignment = max(section.alignment, 1)
                    places[number] = begin = -(-begin // alignment) * alignment
                    begin += section.size
        return begin

    def _symbol(self, file: int, index: int) -> _Symbol:
        return self.files[file].symbols[index]

    def _home(self, file: int, index: int) -> tuple[int, _Symbol] | None:
        """File and symbol where a symbol is defined; None if no file does that, or not as a place."""
        symbol = self._symbol(file, index)
        if symbol.public and symbol.name in self.chosen:
            file, index = self.chosen[symbol.name]
            symbol = self._symbol(file, index)
        return (file, symbol) if 0 < symbol.section < _MARKS else None

    def _place_of(self, file: int, index: int) -> int | None:
        """Where a symbol comes to lie, if it has a home."""
        home = self._home(file, index)
        if home is None:
            return None
        file, symbol = home
        place = self.places[file][symbol.section]
        if place < 0 or symbol.value > self.files[file].sections[symbol.section].size:
            raise ValueError("something that it refers to is nowhere in memory")
        return place + symbol.value

    def _value(self, number: int, index: int, base: int, address_of: Address) -> int:
        """What a symbol stands for."""
        symbol, place = self._symbol(number, index), self._place_of(number, index)
        if place is not None:
            return base + place
        if symbol.section == _ABSOLUTE or not symbol.name:
            return symbol.value
        address = address_of(symbol.name)
        if not address and not symbol.weak:
            raise ValueError(f"there is no {symbol.name}")
        return address


def _protect(address: int, nbytes: int, allowed: int) -> None:
    if nbytes and _mprotect(address, nbytes, allowed):
        raise OSError(ctypes.get_errno(), "pages cannot be made executable")


_mprotect: Final = ctypes.CDLL(None, use_errno=True).mprotect
_mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
