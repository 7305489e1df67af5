"""Runs programs compiled for aarch64 under qemu's emulation of that processor, with neither a linker nor a library for it.

Object files become a static program that makes one call. Everything that the call reads, down to its arguments, lies in the program, at
addresses that are known when it is made; the results come over its standard output.
"""

from __future__ import annotations

import math
import shutil
import stat
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlec.backends.tvm.assembly import object_of
from mlec.runtime.edge import numpy_dtype
from mlec.runtime.executable import _DTYPES, DRIVER
from mlec.runtime.ffi import ENTRY
from mlec.runtime.plan import Home, Layout
from mlec.runtime.program import Program

QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")

CODE, DATA, HEAP = 0x400000, 0x8000000, 0x40000000
"""Addresses of the parts of a program."""

HEAP_BYTES = 1 << 28
TASKS = 3
"""Tasks that a parallel loop is shared out to, which run one after the other."""

_INT, _TENSOR, _CPU = 1, 7, 1  # kinds of arguments of tvm-ffi, and of a device of DLPack


def run(program: Program, objects: Sequence[bytes], tensors: Mapping[str, Any], inputs: Sequence[Any]) -> list[Any]:
    """The outputs of a program for these inputs."""
    sequence = program.sequence
    assert sequence is not None
    plan = Layout(sequence).plan(tuple(np.shape(x) for x in inputs))
    given = [*inputs, *program.constants_in(tensors)]
    data = Data()

    homes = {Home("arena"): data.put(b"\xff" * plan.arena_nbytes)}
    for number, (shape, dtype) in enumerate(plan.outputs):
        homes[Home("output", number)] = data.put(b"\xff" * (math.prod(shape) * dtype.itemsize))
    for number, value in enumerate(given):
        kind, place = ("input", number) if number < len(inputs) else ("constant", number - len(inputs))
        homes[Home(kind, place)] = data.put(
            np.ascontiguousarray(value, numpy_dtype(sequence.buffers[number].dtype)).tobytes()
        )

    elements_at = [homes[place.home] + place.offset for place in plan.places]
    tensors_at = []
    for buffer, shape, elements in zip(sequence.buffers, plan.shapes, elements_at, strict=True):
        kind, bits = _DTYPES[buffer.dtype]
        described = len(shape) | kind << 32 | bits << 40 | 1 << 48
        tensors_at.append(data.words(elements, _CPU, described, data.words(*shape), 0, 0))

    calls: list[int] = []
    for number in plan.made:
        call, values = sequence.calls[number], plan.extents[number]
        reads, writes = ([(_TENSOR, tensors_at[i]) for i in numbers] for numbers in (call.reads, call.writes))
        arguments = [*reads, *((_INT, value) for value in values), *writes]
        calls += [sequence.codes.index(call.code), data.words(*(w for a in arguments for w in a)), len(arguments)]
    frame = data.words(program.alignment - 1, 0, 0, 0, data.words(*calls), 0)
    arguments_at = data.words(_INT, frame, _INT, 0, _INT, len(plan.made))

    places = [elements_at[number] for number in sequence.outputs]
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in plan.outputs]
    main = object_of(_main(arguments_at, list(zip(places, sizes, strict=True))), "aarch64-unknown-linux-gnu")
    printed = emulated(linked([*objects, main], data))
    assert len(printed) == sum(sizes)
    ends = np.cumsum(sizes)
    return [
        np.frombuffer(printed[end - size : end], dtype).reshape(shape)
        for end, size, (shape, dtype) in zip(ends, sizes, plan.outputs, strict=True)
    ]


def emulated(program: bytes) -> bytes:
    """What a program writes to its standard output."""
    assert QEMU is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program"
        path.write_bytes(program)
        path.chmod(stat.S_IRWXU)
        done = subprocess.run([QEMU, str(path)], capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, f"the program ended with {done.returncode}: {done.stderr.decode(errors='replace')}"
    return done.stdout


class Data:
    """The memory that a program begins with, from the address `DATA` on."""

    def __init__(self) -> None:
        self.content = bytearray()

    def put(self, content: bytes) -> int:
        """The address of a copy, a multiple of 64."""
        self.content += bytes(-len(self.content) % 64)
        self.content += content
        return DATA + len(self.content) - len(content)

    def words(self, *values: int) -> int:
        return self.put(struct.pack(f"<{len(values)}Q", *values))


def _main(arguments: int, outputs: Sequence[tuple[int, int]]) -> str:
    """The function that a program begins with, and what kernels ask of the runtime, as LLVM assembly.

    Args:
        arguments: address of those of `DRIVER`.
        outputs: address and size of what is written out.
    """
    writes = "".join(
        f"  call i64 @system(i64 64, i64 1, i64 {address}, i64 {size})\n" for address, size in outputs if size
    )
    return f"""
declare i32 @{ENTRY.format(DRIVER)}(ptr, ptr, i32, ptr)
@__TVMBackendParallelLaunch = global ptr @launch
@__TVMBackendAllocWorkspace = global ptr @allocate
@__TVMBackendFreeWorkspace = global ptr @release
@top = internal global i64 {HEAP}

define void @_start() {{
  %result = alloca [2 x i64], align 8
  store [2 x i64] zeroinitializer, ptr %result
  %status = call i32 @{ENTRY.format(DRIVER)}(ptr null, ptr inttoptr (i64 {arguments} to ptr), i32 3, ptr %result)
  %good = icmp eq i32 %status, 0
  br i1 %good, label %write, label %failed
write:
{writes}  call i64 @system(i64 94, i64 0, i64 0, i64 0)
  unreachable
failed:
  call i64 @system(i64 94, i64 1, i64 0, i64 0)
  unreachable
}}

define i64 @system(i64 %number, i64 %a, i64 %b, i64 %c) noinline {{
  %result = call i64 asm sideeffect "svc #0", "={{x0}},{{x8}},{{x0}},{{x1}},{{x2}},~{{memory}}"(i64 %number, i64 %a, i64 %b, i64 %c)
  ret i64 %result
}}

define i32 @launch(ptr %body, ptr %data, i32 %wanted) {{
entry:
  %group = alloca [2 x i64], align 8
  store [2 x i64] [i64 0, i64 {TASKS}], ptr %group
  br label %head
head:
  %task = phi i32 [ 0, %entry ], [ %next, %run ]
  %more = icmp slt i32 %task, {TASKS}
  br i1 %more, label %run, label %done
run:
  %status = call i32 %body(i32 %task, ptr %group, ptr %data)
  %next = add i32 %task, 1
  %good = icmp eq i32 %status, 0
  br i1 %good, label %head, label %failed
failed:
  ret i32 %status
done:
  ret i32 0
}}

define ptr @allocate(i32 %device, i32 %number, i64 %size, i32 %kind, i32 %bits) {{
  %old = load i64, ptr @top
  %end = add i64 %old, %size
  %more = add i64 %end, 63
  %new = and i64 %more, -64
  store i64 %new, ptr @top
  %address = inttoptr i64 %old to ptr
  ret ptr %address
}}

define i32 @release(i32 %device, i32 %number, ptr %memory) {{
  %address = ptrtoint ptr %memory to i64
  store i64 %address, ptr @top
  ret i32 0
}}

define void @TVMFFIErrorSetRaisedFromCStrParts(ptr %kind, ptr %parts, i32 %count) {{
  ret void
}}

define ptr @memcpy(ptr %to, ptr %from, i64 %size) {{
entry:
  br label %head
head:
  %i = phi i64 [ 0, %entry ], [ %next, %copy ]
  %more = icmp ult i64 %i, %size
  br i1 %more, label %copy, label %done
copy:
  %source = getelementptr i8, ptr %from, i64 %i
  %target = getelementptr i8, ptr %to, i64 %i
  %value = load volatile i8, ptr %source
  store volatile i8 %value, ptr %target
  %next = add i64 %i, 1
  br label %head
done:
  ret ptr %to
}}

define ptr @memset(ptr %to, i32 %value, i64 %size) {{
entry:
  %byte = trunc i32 %value to i8
  br label %head
head:
  %i = phi i64 [ 0, %entry ], [ %next, %fill ]
  %more = icmp ult i64 %i, %size
  br i1 %more, label %fill, label %done
fill:
  %target = getelementptr i8, ptr %to, i64 %i
  store volatile i8 %byte, ptr %target
  %next = add i64 %i, 1
  br label %head
done:
  ret ptr %to
}}
"""


# -- linking -------------------------------------------------------------------------------------------------------------

_SYMTAB, _RELA, _NOBITS = 2, 4, 8  # kinds of sections
_ALLOCATED = 2  # flag of a section
_WEAK = 2  # binding of a symbol


@dataclass(frozen=True)
class Section:
    """A section of an object file."""

    kind: int
    flags: int
    content: bytes
    link: int
    info: int
    alignment: int


@dataclass(frozen=True)
class Symbol:
    """A symbol of an object file; ``section`` is 0 where it is defined elsewhere."""

    name: str
    weak: bool
    local: bool
    section: int
    value: int


class Object:
    """A relocatable file, as far as linking needs it."""

    def __init__(self, data: bytes) -> None:
        assert data[:6] == b"\x7fELF\x02\x01"
        assert int.from_bytes(data[18:20], "little") == 183, "not aarch64"
        (at,) = struct.unpack_from("<Q", data, 40)
        count, _ = struct.unpack_from("<HH", data, 60)
        self.sections = []
        for i in range(count):
            _, kind, flags, _, offset, size, link, info, align, _ = struct.unpack_from("<IIQQQQIIQQ", data, at + 64 * i)
            content = bytes(size) if kind == _NOBITS else data[offset : offset + size]
            self.sections.append(Section(kind, flags, content, link, info, max(align, 1)))

    def symbols(self) -> list[Symbol]:
        found = []
        for section in self.sections:
            if section.kind == _SYMTAB:
                names = self.sections[section.link].content
                for at, info, _, place, value, _ in struct.iter_unpack("<IBBHQQ", section.content):
                    name = names[at : names.index(b"\0", at)].decode()
                    found.append(Symbol(name, info >> 4 == _WEAK, info >> 4 == 0, place, value))
        return found

    def relocations(self) -> Iterator[tuple[int, int, int, int, int]]:
        """Section, offset in it, kind, number of the symbol, addend."""
        for section in self.sections:
            if section.kind == _RELA and self.sections[section.info].flags & _ALLOCATED:
                for offset, info, addend in struct.iter_unpack("<QQq", section.content):
                    yield section.info, offset, info & 0xFFFFFFFF, info >> 32, addend


def linked(objects: Sequence[bytes], data: Data) -> bytes:
    """A static program of these object files, which begins with ``_start``."""
    files = [Object(content) for content in objects]
    code = bytearray()
    placed: dict[tuple[int, int], int] = {}
    for number, file in enumerate(files):
        for index, section in enumerate(file.sections):
            if section.flags & _ALLOCATED:
                code += bytes(-len(code) % section.alignment)
                placed[number, index] = CODE + len(code)
                code += section.content

    tables = [file.symbols() for file in files]
    known: dict[str, int] = {}
    for number, table in enumerate(tables):
        for symbol in table:
            if (number, symbol.section) in placed and not symbol.local and not (symbol.weak and symbol.name in known):
                known[symbol.name] = placed[number, symbol.section] + symbol.value

    slots: dict[int, int] = {}
    code += bytes(-len(code) % 8)
    for number, file in enumerate(files):
        for index, offset, kind, which, addend in file.relocations():
            symbol = tables[number][which]
            assert symbol.local or symbol.name in known, f"nothing defines {symbol.name}"
            value = placed[number, symbol.section] + symbol.value if symbol.local else known[symbol.name]
            target = value + addend
            if kind in (311, 312):
                if target not in slots:
                    slots[target] = CODE + len(code)
                    code += struct.pack("<Q", target)
                target = slots[target]
            place = placed[number, index] + offset
            _relocate(code, place - CODE, kind, target, place)
    return _executable(bytes(code), bytes(data.content), known["_start"])


def _relocate(code: bytearray, at: int, kind: int, target: int, place: int) -> None:
    """Puts an address, or a part of it, where it is used. The numbers of kinds are those of the ABI of aarch64."""
    scales = {277: 0, 278: 0, 284: 1, 285: 2, 286: 3, 299: 4, 312: 3}
    (word,) = struct.unpack_from("<I", code, at)
    if kind == 257:  # ABS64
        struct.pack_into("<Q", code, at, target)
    elif kind == 260:  # PREL64
        struct.pack_into("<q", code, at, target - place)
    elif kind == 261:  # PREL32
        struct.pack_into("<i", code, at, target - place)
    elif kind in (275, 311):  # the page of an address, for ADRP
        pages = (target >> 12) - (place >> 12)
        struct.pack_into("<I", code, at, word | (pages & 3) << 29 | (pages >> 2 & 0x7FFFF) << 5)
    elif kind in (282, 283):  # jumps and calls
        struct.pack_into("<I", code, at, word | (target - place) >> 2 & 0x3FFFFFF)
    else:  # the place in its page, in units of what is loaded
        struct.pack_into("<I", code, at, word | (target & 0xFFF) >> scales[kind] << 10)


def _executable(code: bytes, data: bytes, start: int) -> bytes:
    """An ELF file with these contents of memory, all of it writable and executable."""
    page = 0x10000
    code_at = page
    data_at = -(-(code_at + len(code)) // page) * page
    parts = [(code_at, CODE, len(code), len(code)), (data_at, DATA, len(data), len(data)), (0, HEAP, 0, HEAP_BYTES)]
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 183, 1, start, 64, 0, 0, 64, 56, len(parts), 64, 0, 0
    )
    for offset, address, stored, size in parts:
        header += struct.pack("<IIQQQQQQ", 1, 7, offset, address, address, stored, size, page)
    content = header.ljust(code_at, b"\0") + code
    return content.ljust(data_at, b"\0") + data
