"""Object files of kernels: however many parts they are made in, the bytes are the same and every kernel is there once."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import pytest

from mlec.backends.tvm.backend import cpu_info
from mlec.backends.tvm.compat import IRModule, tirx, tvm
from mlec.backends.tvm.elf import compact
from mlec.backends.tvm.kernels.gemm import gemm
from mlec.backends.tvm.objects import to_object
from mlec.backends.tvm.pipeline import ObjectsForCPU, compile_for_cpu
from mlec.runtime.ffi import ENTRY
from mlec.target import Target
from tests.backends.tvm.kernel_helpers import HOST


@pytest.mark.parametrize(("count", "parts"), [(0, 0), (1, 1), (3, 1), (4, 2), (13, 5), (40, 13)])
def test_kernels_are_shared_out_by_their_order(count: int, parts: int) -> None:
    def functions() -> dict[str, object]:
        return {
            f"product_{i}": gemm((tirx.Var("n", "int64"),), 8, 4 + i, "float32", 8, HOST, name=f"product_{i}")
            for i in range(count)
        }

    def made(at_once: bool) -> tuple[bytes, ...]:
        with ObjectsForCPU(HOST.tvm_target(), at_once) as objects:
            for symbol, function in functions().items():
                objects.add(symbol, function)
            return objects.finish()

    objects = made(at_once=True)
    assert len(objects) == parts
    assert objects == made(at_once=False)
    names = [ENTRY.format(name).encode() + b"\0" for name in functions()]
    assert all(sum(name in found for found in objects) == 1 for name in names)


def written(target: str, folder: Path) -> tuple[ElfFile, ElfFile]:
    """What TVM writes of a kernel, and what becomes of it."""
    info = cpu_info(Target.parse(target))
    product = gemm((tirx.Var("n", "int64"),), 8, 24, "float32", 8, info, name="product")
    module = compile_for_cpu(IRModule({"product": product}), info.tvm_target())
    module.write_to_file(str(folder / "whole.o"))
    whole, ours = ElfFile((folder / "whole.o").read_bytes()), ElfFile(to_object(module))
    dropped = {name for name in whole.sections if ".debug_" in name or ".eh_frame" in name}
    assert {".debug_info", ".rela.debug_info", ".eh_frame"} <= dropped
    assert not dropped & ours.sections.keys()
    assert [s.is_global for s in ours.symbols] == sorted(s.is_global for s in ours.symbols)
    assert ours.first_global == sum(not s.is_global for s in ours.symbols)
    return whole, ours


def test_objects_hold_nothing_for_debuggers_or_exceptions_and_all_else(tmp_path: Path) -> None:
    whole, ours = written("cpu:aarch64", tmp_path)
    dropped = whole.sections.keys() - ours.sections.keys()
    assert list(ours.sections) == [name for name in whole.sections if name not in dropped]
    assert {".text", ".rela.text", ".symtab", ".strtab"} <= ours.sections.keys()
    rewritten = {".symtab", ".strtab", *(name for name in ours.sections if name.startswith(".rela"))}
    assert all(ours.sections[name] == whole.sections[name] for name in ours.sections.keys() - rewritten)
    assert ours.symbols == [symbol for symbol in whole.symbols if symbol.section not in dropped]
    assert ours.relocations
    assert ours.relocations == {k: v for k, v in whole.relocations.items() if k not in dropped}


def test_code_and_constants_are_one_section_in_which_distances_are_known(tmp_path: Path) -> None:
    whole, ours = written("cpu:x86-64-v4", tmp_path)
    (_, left), (_, before) = ours.relocations[".rela.text"], whole.relocations[".rela.text"]
    assert {name for name in ours.sections if name.startswith((".text", ".rodata"))} == {".text"}
    assert all(symbol.section != ".text" or symbol.rest[0] >> 4 == 2 for _, _, symbol, _ in left)
    assert len(left) < len(before) + len(whole.relocations.get(".rela.rodata", ("", []))[1])
    assert ".rela.rodata" not in ours.relocations
    names = {symbol.name for symbol in ours.symbols if symbol.name}
    assert names == {symbol.name for symbol in whole.symbols if symbol.is_global}
    assert ours.sections[".strtab"].count(b"\0") == len(names | ours.sections.keys() - {""}) + 1


def as_written(code: str, folder: Path) -> bytes:
    """The object file that LLVM makes of a module."""
    source, whole = folder / "module.ll", folder / "module.o"
    source.write_text(f'target triple = "x86_64-unknown-linux-gnu"\n{code}')
    tvm.runtime.load_module(str(source)).write_to_file(str(whole))
    return whole.read_bytes()


def test_objects_with_groups_stay_as_they_are(tmp_path: Path) -> None:
    """These tell sections and symbols by numbers of their own."""
    whole = as_written("$f = comdat any\ndefine linkonce_odr void @f() comdat {\nret void\n}\n", tmp_path)
    assert ".group" in ElfFile(whole).sections
    assert compact(whole) == whole


def test_objects_with_names_in_two_tables_stay_as_they_are(tmp_path: Path) -> None:
    whole = bytearray(as_written("define void @f() {\nret void\n}\n", tmp_path))
    (start,), (count, number) = struct.unpack_from("<Q", whole, 40), struct.unpack_from("<HH", whole, 60)
    table = whole[start : start + 64 * count]
    struct.pack_into("<Q", whole, 40, len(whole))  # a new table of sections, with the names once more
    struct.pack_into("<IHHHHHH", whole, 48, 0, 64, 0, 0, 64, count + 1, count)
    whole += table + table[64 * number : 64 * (number + 1)]
    assert ElfFile(bytes(whole)).sections.keys() >= {".text", ".symtab", ".strtab"}
    assert compact(bytes(whole)) == whole


def test_what_is_called_by_choice_is_not_called_directly(tmp_path: Path) -> None:
    """A call of such a function goes to what it returns when it is linked."""
    code = (
        "define internal ptr @choose() {\nret ptr @one\n}\n@chosen = internal ifunc i64 (), ptr @choose\n"
        "define i64 @one() {\nret i64 1\n}\ndefine i64 @f() {\n%x = call i64 @chosen()\nret i64 %x\n}\n"
    )
    ((_, left),) = ElfFile(compact(as_written(code, tmp_path))).relocations.values()
    assert (4, "chosen") in [(kind, symbol.name) for _, kind, symbol, _ in left]


def test_constants_without_code_stay_constants(tmp_path: Path) -> None:
    whole = bytearray(as_written("@table = constant [4 x i64] [i64 1, i64 2, i64 3, i64 4]\n", tmp_path))
    (start,), (count,) = struct.unpack_from("<Q", whole, 40), struct.unpack_from("<H", whole, 60)
    for at in range(start, start + 64 * count, 64):  # what is code, though there is none, becomes data
        (flags,) = struct.unpack_from("<Q", whole, at + 8)
        struct.pack_into("<Q", whole, at + 8, flags & ~0x4)
    before, after = ElfFile(bytes(whole)), ElfFile(compact(bytes(whole)))
    (name,) = (symbol.section for symbol in before.symbols if symbol.name == "table")
    assert isinstance(name, str)
    assert after.sections[name] == before.sections[name]
    assert ".text" in after.sections


class Symbol(NamedTuple):
    name: str
    section: str | int
    is_global: bool
    rest: tuple[int, int, int]


class ElfFile:
    """What an object file says, with names in place of numbers.

    Attributes:
        sections: what each one holds, by name.
        symbols: in order.
        first_global: number of the first one that other files see.
        relocations: place, kind, symbol and addend of each, by the section that lists them; and the section that they change.
    """

    def __init__(self, data: bytes) -> None:
        (start,), (count, number) = struct.unpack_from("<Q", data, 40), struct.unpack_from("<HH", data, 60)
        table = [struct.unpack_from("<IIQQQQIIQQ", data, start + 64 * i) for i in range(count)]
        assert all(section[4] % max(section[8], 1) == 0 for section in table)

        def text(strings: int, at: int) -> str:
            begin = table[strings][4] + at
            return data[begin : data.index(b"\0", begin)].decode()

        names = [text(number, section[0]) for section in table]
        held = [data[s[4] : s[4] + s[5] * (s[1] != 8)] for s in table]
        self.sections = dict(zip(names, held, strict=True))
        (symbols,) = (i for i, section in enumerate(table) if section[1] == 2)
        self.first_global = table[symbols][7]
        self.symbols = [
            Symbol(text(table[symbols][6], at), names[place] if place < count else place, info >> 4 > 0, (info, *rest))
            for at, info, _, place, *rest in struct.iter_unpack("<IBBHQQ", held[symbols])
        ]
        self.relocations = {
            name: (
                names[section[7]],
                [(at, kind, self.symbols[to], addend) for at, kind, to, addend in struct.iter_unpack("<QIIq", content)],
            )
            for name, section, content in zip(names, table, held, strict=True)
            if section[1] == 4
        }
