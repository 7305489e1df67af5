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
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from mlec.runtime import elf

Table: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Address: TypeAlias = Callable[[str], int]

_HEADER, _SECTION, _SYMBOL = (elf.packed(fields) for fields in (elf.HEADER, elf.SECTION, elf.SYMBOL))
_RELOCATION: Final = elf.table_of(elf.RELOCATION)
_X86_64: Final = 62
_PAGE: Final = mmap.PAGESIZE

_CONTENT, _NO_BITS, _RELOCATIONS = 1, 8, 4
_KINDS: Final = {_CONTENT, _NO_BITS, _RELOCATIONS, 0, elf.SYMBOL_TABLE, 3, 7}
"""Of sections; those that are not named need nothing: none, names, notes."""
_WRITE, _IN_MEMORY, _EXECUTE, _OF_THREADS = 0x1, 0x2, 0x4, 0x400
_MARKS, _ABSOLUTE = 0xFF00, 0xFFF1
"""Numbers of sections from the first on are none; a symbol of the second one is a number."""
_WEAK: Final = 2

_WORD, _NEAR, _CALL, _SLOTS = 1, 2, 4, 9
_RELOCATED: Final = {_WORD, _NEAR, _CALL, _SLOTS, 41, 42}
"""Relocations: an address; how far something is, or a function, or (from `_SLOTS` on) the slot that holds its address."""
_ROW_OF: Final = np.array([0] * _CALL + [1] * (_SLOTS - _CALL) + [2] * (max(_RELOCATED) - _SLOTS + 1))
"""Which of `_Linking._values` each of them wants."""
_JUMP: Final = b"\xff\x25"
"""To the address in a slot, which is told by how far it is."""
_STUB, _ENTRY = 8, 8  # bytes of a stub and of a slot


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


class _Relocations(NamedTuple):
    """For one section; ``kinds`` and ``symbols`` are columns of the table."""

    section: int
    table: Table
    kinds: Sequence[int]
    symbols: Sequence[int]


class _File(NamedTuple):
    """An object file."""

    data: bytes
    sections: Sequence[_Section]
    symbols: Sequence[_Symbol]
    relocations: Sequence[_Relocations]


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


def _relocations(data: bytes, sections: Sequence[_Section], symbols: int) -> Iterator[_Relocations]:
    for section in sections:
        if section.kind == _RELOCATIONS and section.size and sections[section.info].flags & _IN_MEMORY:
            table = np.frombuffer(data, _RELOCATION, section.size // _RELOCATION.itemsize, section.offset)
            found = _Relocations(section.info, table, table["kind"].tolist(), table["symbol"].tolist())
            size, offsets = sections[section.info].size, table["offset"].tolist()
            words = [at for at, kind in zip(offsets, found.kinds, strict=True) if kind == _WORD]
            if max(found.symbols) >= symbols or max(offsets) > size - 4 or max(words, default=size - 8) > size - 8:
                raise ValueError("a relocation lies outside of its section")
            yield found


def _is_plain(file: _File) -> bool:
    """Whether sections, symbols and relocations are of the usual kinds."""
    return (
        all(s.kind in _KINDS and not s.flags & _OF_THREADS and s.alignment <= _PAGE for s in file.sections)
        and all(s.section < _MARKS or s.section == _ABSOLUTE for s in file.symbols)
        and all(_RELOCATED.issuperset(relocations.kinds) for relocations in file.relocations)
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
        octets = np.frombuffer(memory, np.uint8)
        base = int(octets.ctypes.data)
        for file, places in zip(self.files, self.places, strict=True):
            for section, at in zip(file.sections, places, strict=True):
                if at >= 0 and section.kind == _CONTENT:
                    memory[at : at + section.size] = file.data[section.offset : section.offset + section.size]
        functions = {
            name: base + place for name, key in self.chosen.items() if (place := self._place_of(*key)) is not None
        }
        for name, address in functions.items():
            if name.startswith("__TVM"):  # it wants the address of a function of the runtime there
                function, at = address_of(name.removeprefix("__")), address - base
                if not function or not self.writable <= at <= self.size - _ENTRY:
                    return None
                memory[at : at + _ENTRY] = function.to_bytes(_ENTRY, "little")
            elif name == "__tvm_ffi__library_ctx":
                return None
        relocations = []
        for number, file in enumerate(self.files):
            values = self._values(number, base, address_of)
            if values is None:
                return None
            for found in file.relocations:
                table, kinds = found.table, found.table["kind"]
                target = values[_ROW_OF[kinds], table["symbol"]] + table["addend"].view(np.uint64)  # modulo 2 ** 64
                relocations.append(
                    (table["offset"] + np.uint64(self.places[number][found.section]), kinds == _WORD, target)
                )
            for (owner, symbol), slot in self.slots.items():
                if owner == number:
                    memory[slot : slot + _ENTRY] = int(values[0, symbol]).to_bytes(_ENTRY, "little")
        if relocations:
            _relocate(octets, base, *map(np.concatenate, zip(*relocations, strict=True)))
        for key, stub in self.stubs.items():
            memory[stub : stub + 2] = _JUMP
            memory[stub + 2 : stub + 6] = (self.slots[key] - (stub + 6)).to_bytes(4, "little", signed=True)
        del octets
        _protect(base, self.readable, mmap.PROT_READ | mmap.PROT_EXEC)
        _protect(base + self.readable, self.writable - self.readable, mmap.PROT_READ)
        return Image(memory, functions)

    def _asked_for(self) -> tuple[Sequence[tuple[int, int]], Sequence[tuple[int, int]]]:
        """Files and symbols of the functions that are called, and of what is wanted in slots."""
        called: dict[tuple[int, int], None] = {}
        held: dict[tuple[int, int], None] = {}
        for number, file in enumerate(self.files):
            for relocations in file.relocations:
                for kind, symbol in zip(relocations.kinds, relocations.symbols, strict=True):
                    if kind == _CALL:
                        called[number, symbol] = None
                    elif kind >= _SLOTS:
                        held[number, symbol] = None
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

    def _home(self, file: int, index: int) -> tuple[int, _Symbol] | None:
        """File and symbol where a symbol is defined; None if no file does that, or not as a place."""
        symbol = self.files[file].symbols[index]
        if symbol.public and symbol.name in self.chosen:
            file, index = self.chosen[symbol.name]
            symbol = self.files[file].symbols[index]
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

    def _values(self, number: int, base: int, address_of: Address) -> Table | None:
        """What each symbol that relocations name stands for by itself, as a function, and as a slot: u64[3, symbols]. None where something
        in a library is wanted at an offset."""
        file = self.files[number]
        values = np.zeros((3, len(file.symbols)), np.uint64)
        named = {pair for r in file.relocations for pair in zip(r.symbols, r.kinds, strict=True)}
        for index in {index for index, _ in named}:
            symbol, place = file.symbols[index], self._place_of(number, index)
            if place is not None:
                values[:, index] = base + place
            elif symbol.section == _ABSOLUTE:
                values[:, index] = symbol.value
            elif symbol.name and (index, _NEAR) in named:
                return None
            elif symbol.name:
                values[:, index] = address = address_of(symbol.name)
                if not address and not symbol.weak:
                    raise ValueError(f"there is no {symbol.name}")
            for row, instead in ((1, self.stubs), (2, self.slots)):
                if (found := instead.get((number, index))) is not None:
                    values[row, index] = base + found
        return values


def _relocate(octets: Table, base: int, at: Table, whole: Table, target: Table) -> None:
    """Puts addresses (``whole``) and distances where they are wanted."""
    if whole.any():
        _write(octets, at[whole], target[whole])
        near = ~whole
        at, target = at[near], target[near]
    apart = (target - (at + np.uint64(base))).view(np.int64)
    short = apart.astype(np.int32)
    if (apart != short).any():
        raise ValueError("something that it refers to is too far away")
    _write(octets, at, short)


def _write(octets: Table, at: Table, values: Table) -> None:
    """Little-endian numbers, at any places."""
    width = values.itemsize
    octets[at[:, None] + np.arange(width, dtype=np.uint64)] = (
        np.ascontiguousarray(values).view(np.uint8).reshape(-1, width)
    )


def _protect(address: int, nbytes: int, allowed: int) -> None:
    if nbytes and _mprotect(address, nbytes, allowed):
        raise OSError(ctypes.get_errno(), "pages cannot be made executable")


_mprotect: Final = ctypes.CDLL(None, use_errno=True).mprotect
_mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
