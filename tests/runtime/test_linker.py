"""Object files that are linked without LLVM: what they ask for is done, or left to LLVM, and nonsense is an error."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import mmap
import platform
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import mlec
from mlec.errors import MlecError, RuntimeUnavailableError
from mlec.runtime import elf, library, linker
from mlec.runtime.linker import Image, link_in_memory
from mlec.runtime.objects import address_of, check_objects

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have LLVM's linker")

X = np.random.default_rng(0).normal(size=(200, 3))


def of_text(text: str) -> bytes:
    from mlec.backends.tvm.assembly import object_of

    return object_of(text)


def linked(*texts: str) -> Image:
    image = link_in_memory([of_text(text) for text in texts], address_of)
    assert image is not None
    return image


def called(image: Image, name: str, *arguments: int) -> int:
    function = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * len(arguments))(image.functions[name])
    return int(function(*arguments))


@pytest.fixture(scope="module")
def objects() -> list[bytes]:
    from mlec.backends.base import CompileOptions
    from mlec.registry import backend_of
    from mlec.target import Target

    library.load_library()
    graph = mlec.lower(LogisticRegression().fit(X, X[:, 0] > 0))
    return list(backend_of("cpu").compile(graph, Target(), CompileOptions()).objects)


def test_files_call_each_other_and_libraries() -> None:
    image = linked(
        "declare i64 @twice(i64)\ndeclare i64 @labs(i64)\n"
        "define i64 @f(i64 %x) {\n%a = call i64 @labs(i64 %x)\n%b = call i64 @twice(i64 %a)\nret i64 %b\n}\n",
        "define i64 @twice(i64 %x) {\n%y = add i64 %x, %x\nret i64 %y\n}\n",
    )
    assert called(image, "f", -21) == 42


def test_constants_data_and_memory_that_is_zero() -> None:
    image = linked(
        "@table = internal constant [4 x i64] [i64 10, i64 20, i64 30, i64 40]\n"
        "@count = global i64 7\n@zero = global i64 0\n@where = global ptr @count\n"
        "define i64 @f(i64 %i) {\n"
        "%p = getelementptr [4 x i64], ptr @table, i64 0, i64 %i\n%a = load i64, ptr %p\n"
        "%q = load ptr, ptr @where\n%b = load i64, ptr %q\n%c = load i64, ptr @zero\n"
        "%more = add i64 %c, 1\nstore i64 %more, ptr @zero\n"
        "%d = add i64 %a, %b\n%e = add i64 %d, %c\nret i64 %e\n}\n"
    )
    assert [called(image, "f", i) for i in range(4)] == [17, 28, 39, 50]


@pytest.mark.parametrize("by_llvm", [False, True])
def test_tables_of_jumps_in_what_was_made_compact(by_llvm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A switch jumps by distances that are told from the table, and calls a function that another file may replace."""
    cases = "".join(f"i64 {i}, label %l{i}\n" for i in range(12))
    values = (7, 1, 12, 5, 3, 99, 4, 2, 8, 6, 11, 10)
    blocks = "".join(f"l{i}:\n%v{i} = call i64 @times(i64 {v})\nret i64 %v{i}\n" for i, v in enumerate(values))
    text = (
        "define weak i64 @times(i64 %x) {\n%y = mul i64 %x, 3\nret i64 %y\n}\n"
        f"define i64 @choose(i64 %i) noinline {{\nswitch i64 %i, label %other [\n{cases}]\nother:\nret i64 -1\n{blocks}}}\n"
        "define i32 @__tvm_ffi_entry(ptr %self, ptr %arguments, i32 %count, ptr %result) {\n"
        "%at = getelementptr i8, ptr %arguments, i64 8\n%i = load i64, ptr %at\n%v = call i64 @choose(i64 %i)\n"
        "store i64 1, ptr %result\n%r = getelementptr i8, ptr %result, i64 8\nstore i64 %v, ptr %r\nret i32 0\n}\n"
    )
    if by_llvm:
        monkeypatch.setattr(library, "link_in_memory", lambda objects, find: None)
    entry = library.link([of_text(text)], "entry")
    assert [entry.call(i) for i in range(13)] == [*(3 * v for v in values), -1]


def test_a_definition_that_is_not_weak_counts_else_the_first() -> None:
    of = "define {} i64 @f() {{\nret i64 {}\n}}\n"
    asking = "declare i64 @f()\ndefine i64 @g() {\n%x = call i64 @f()\nret i64 %x\n}\n"
    assert called(linked(asking, of.format("weak", 1), of.format("", 2), of.format("weak", 3)), "g") == 2
    assert called(linked(asking, of.format("weak", 1), of.format("weak", 3)), "g") == 1
    assert called(linked(of.format("weak", 1) + asking.replace("declare i64 @f()\n", ""), of.format("", 2)), "g") == 2


@pytest.mark.parametrize(
    "text",
    [
        "@of_thread = thread_local global i64 7\ndefine i64 @f() {\n%x = load i64, ptr @of_thread\nret i64 %x\n}\n",
        "@llvm.global_ctors = appending global [1 x { i32, ptr, ptr }] [{ i32, ptr, ptr } { i32 1, ptr @f, ptr null }]\n"
        "define void @f() {\nret void\n}\n",
        "@common = common global i64 0\ndefine i64 @f() {\n%x = load i64, ptr @common\nret i64 %x\n}\n",
        "@__tvm_ffi__library_ctx = global ptr null\n",
        "@__tvm_ffi__library_bin = constant i64 0\n",
        "@__TVMNotThere = weak global ptr null\n",
        "@__TVMBackendParallelLaunch = constant ptr null\n",  # nothing can be told there
        "@far = external dso_local global i64\ndefine i64 @f() {\n%x = load i64, ptr @far\nret i64 %x\n}\n",
        "@wide = constant [4 x i64] zeroinitializer, align 8192\n",
        "define ptr @choose() {\nret ptr @f\n}\n@chosen = ifunc i64 (), ptr @choose\ndefine i64 @f() {\nret i64 1\n}\n",
        'module asm ".globl five"\nmodule asm ".set five, 5"\ndefine i64 @f() {\nret i64 5\n}\n',
        'module asm ".type only, @gnu_unique_object"\nmodule asm ".data"\nmodule asm "only: .quad 1"\n',
        'module asm ".quad f@GOTOFF"\ndefine i64 @f() {\nret i64 1\n}\n',
    ],
)
def test_what_asks_for_more_is_left_to_llvm(text: str) -> None:
    assert link_in_memory([of_text(text)], address_of) is None


def test_other_processors_are_left_to_llvm(objects: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert link_in_memory(objects, address_of) is None


def test_data_of_libraries_and_functions_that_may_be_missing() -> None:
    """Both by slots that hold an address, which is 0 for what there need not be."""
    text = (
        "@environ = external global ptr\n@not_there = extern_weak global i64\ndeclare extern_weak i64 @nor_this()\n"
        "define i64 @f() {\n%a = ptrtoint ptr @environ to i64\nret i64 %a\n}\n"
        "define i64 @g() {\n%a = ptrtoint ptr @not_there to i64\n%b = ptrtoint ptr @nor_this to i64\n%c = or i64 %a, %b\nret i64 %c\n}\n"
        "define i64 @h() {\n%a = call i64 @nor_this()\nret i64 %a\n}\n"
    )
    check_objects([of_text(text)])
    image = linked(text)
    assert called(image, "f") == address_of("environ") != 0
    assert called(image, "g") == 0


def test_only_code_can_be_called() -> None:
    image = linked("@data = global i64 7\n@constant = constant i64 8\ndefine i64 @f() {\nret i64 1\n}\n")
    assert image.functions.keys() == {"f"}
    with pytest.raises(MlecError, match="no function entry"):
        library.link([of_text("@__tvm_ffi_entry = global i64 0\n")], "entry")


def test_two_definitions_of_a_name_are_an_error() -> None:
    f = of_text("define i64 @f() {\nret i64 1\n}\n")
    with pytest.raises(ValueError, match="more than one f"):
        link_in_memory([f, f], address_of)


def test_no_name_of_a_symbol_is_taken_for_an_attribute() -> None:
    assert [address_of(name) for name in ("_handle", "_name", "_FuncPtr", "__class__", "__init__", "not there")] == [
        0
    ] * 6
    assert address_of("labs")


def test_llvm_links_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LogisticRegression().fit(X, X[:, 0] > 0)
    expected = mlec.compile(model, progress=False).predict_proba(X)
    asked: list[int] = []

    def nothing(objects: Sequence[bytes], find: Callable[[str], int]) -> None:
        asked.append(len(objects))

    monkeypatch.setattr(library, "link_in_memory", nothing)
    np.testing.assert_array_equal(mlec.compile(model, progress=False).predict_proba(X), expected)
    assert asked


def test_no_changed_byte_of_the_tables_is_worse_than_an_error(objects: list[bytes]) -> None:
    """Nothing of what comes out is executed."""
    rng = np.random.default_rng(0)
    for number, data in enumerate(objects):
        table, count = struct.unpack_from("<Q", data, 40)[0], struct.unpack_from("<H", data, 60)[0]
        places = [*range(64)]
        for i in range(count):
            at = table + 64 * i
            kind, offset, size = (
                struct.unpack_from("<I", data, at + 4)[0], *struct.unpack_from("<QQ", data, at + 24),
            )  # fmt: skip
            places += range(at, at + 64)
            places += range(offset, offset + size) if kind in (2, 4) else ()
        for place in rng.choice(places, min(len(places), 1500), replace=False).tolist():
            changed = bytearray(data)
            changed[place] ^= 1 << int(rng.integers(8))
            with contextlib.suppress(ValueError, MemoryError):
                link_in_memory([*objects[:number], bytes(changed), *objects[number + 1 :]], address_of)


def changed_section(data: bytes, kind: int, at: int, change: Callable[[int], int], zero: int | None = None) -> bytes:
    """The file with another word at an offset in the header of its first section of a kind, and perhaps none at a second one."""
    table, count = struct.unpack_from("<Q", data, 40)[0], struct.unpack_from("<H", data, 60)[0]
    begins = [table + 64 * i for i in range(count) if struct.unpack_from("<I", data, table + 64 * i + 4)[0] == kind]
    made = bytearray(data)
    (word,) = struct.unpack_from("<Q", data, begins[0] + at)
    struct.pack_into("<Q", made, begins[0] + at, change(word))
    if zero is not None:
        struct.pack_into("<Q", made, begins[0] + zero, 0)
    return bytes(made)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data[:18] + struct.pack("<H", 183) + data[20:], "another processor"),
        (lambda data: data[:60] + bytes(2) + data[62:], "0 tables of symbols"),
        (lambda data: changed_section(data, elf.SHT_PROGBITS, 32, lambda size: size + (1 << 40)), "outside of its file"),
        (lambda data: changed_section(data, elf.SHT_STRTAB, 32, lambda size: len(data), 24), "overlap"),
        (lambda data: changed_section(data, elf.SHT_RELA, 40, lambda link: link & 0xFFFFFFFF | 0xFFFF << 32), "out of range"),
        (lambda data: changed_section(data, elf.SHT_PROGBITS, 32, lambda size: 8), "outside of its section|nowhere in memory"),
    ],
)  # fmt: skip
def test_files_that_contradict_themselves(objects: list[bytes], change: Callable[[bytes], bytes], says: str) -> None:
    data = max(objects, key=len)
    with pytest.raises(ValueError, match=says):
        link_in_memory([change(data)], address_of)


def test_addresses_in_what_is_not_in_memory_are_an_error() -> None:
    note = 'module asm ".section .note.of,\\22a\\22,@note"\nmodule asm ".quad f"\ndefine i64 @f() {\nret i64 1\n}\n'
    with pytest.raises(ValueError, match="a section that is nowhere in memory"):
        linked(note)


def test_names_that_are_none(objects: list[bytes]) -> None:
    data = max(objects, key=len)
    shorter = changed_section(data, elf.SHT_STRTAB, 32, lambda size: size - 1)
    with pytest.raises(ValueError, match="outside of the table of names"):
        link_in_memory([shorter], address_of)


def test_a_function_that_nobody_has_is_named() -> None:
    text = "declare i64 @labs(i64)\ndefine i64 @f() {\n%a = call i64 @labs(i64 -1)\nret i64 %a\n}\n"
    with pytest.raises(ValueError, match="there is no labs"):
        link_in_memory([of_text(text)], lambda name: 0)


def refused(number: int) -> Callable[..., int]:
    def mprotect(address: int, nbytes: int, allowed: int) -> int:
        ctypes.set_errno(number)
        return -1

    return mprotect


def test_a_system_that_lets_nothing_new_be_executed_says_so(
    objects: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linker, "_mprotect", refused(errno.EACCES))
    with pytest.raises(RuntimeUnavailableError, match=r"may not be executed: .*: Permission denied") as caught:
        library.link(objects, "mlec_drive")
    assert caught.value.code == "E_RUNTIME"
    assert "SELinux" in str(caught.value)


def test_too_little_memory_for_code_says_so(objects: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linker, "_mprotect", refused(errno.ENOMEM))
    with pytest.raises(MlecError, match="not enough memory for the compiled code") as caught:
        library.link(objects, "mlec_drive")
    assert caught.value.code == "E_NO_MEMORY"

    def none(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", none)
    with pytest.raises(MlecError, match="not enough memory for the compiled code") as caught:
        library.link(objects, "mlec_drive")
    assert caught.value.code == "E_NO_MEMORY"


def test_code_goes_with_its_model_and_not_before(tmp_path: Path) -> None:
    """Also where threads load, run, close and drop models at once."""
    model = LogisticRegression().fit(X, X[:, 0] > 0)
    mlec.compile(model, validate=False, progress=False).save(tmp_path / "m.mle")
    right = mlec.load(tmp_path / "m.mle").predict_proba(X)

    def loaded(number: int) -> bool:
        found = mlec.load(tmp_path / "m.mle", num_threads=1)
        same = [np.array_equal(found.predict_proba(X), right) for _ in range(3)]
        if number % 2:
            found.close()
        return all(same)

    def pieces() -> int:
        gc.collect()
        return sum("r-xp" in line and "/" not in line for line in Path("/proc/self/maps").read_text().splitlines())

    before = pieces()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(loaded, range(200)))
    assert pieces() <= before


def test_a_file_for_nobody_says_so(objects: list[bytes]) -> None:
    with pytest.raises(MlecError, match="no function nowhere"):
        library.link(objects, "nowhere")
