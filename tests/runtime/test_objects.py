"""Object files are looked at before they are linked."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import mlec
from mlec.errors import RuntimeUnavailableError
from mlec.runtime import Program, vm
from mlec.runtime.library import link, load_library
from mlec.runtime.objects import check_objects, device_fault

X = np.random.default_rng(0).normal(size=(20, 3))


@pytest.fixture(scope="module")
def objects() -> list[bytes]:
    from mlec.backends.base import CompileOptions
    from mlec.registry import backend_of
    from mlec.target import Target

    load_library()
    graph = mlec.lower(LogisticRegression().fit(X, X[:, 0] > 0))
    return list(backend_of("cpu").compile(graph, Target(), CompileOptions()).objects)


def patched(at: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + value + data[at + len(value) :]


def test_sound_objects_pass(objects: list[bytes]) -> None:
    check_objects(objects)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (patched(0, b"MZ"), "starts with 4d 5a"),
        (patched(4, b"\1"), "starts with 7f 45 4c 46 01"),  # 32 bits
        (patched(5, b"\2"), "starts with"),  # big endian
        (patched(7, b"\x09"), "for the system 9"),
        (patched(16, b"\3\0"), "ELF file of type 3"),  # a shared object
        (patched(18, struct.pack("<H", 243)), "it is for machine 243, this processor is"),
        (patched(40, struct.pack("<Q", 1 << 40)), "none for this machine"),
        (patched(58, b"\1\0"), "section headers"),
        (lambda data: data[:63], "none for this machine"),
        (lambda data: data[: len(data) // 2], "none for this machine"),
        (lambda data: b"", "none for this machine"),
    ],
)
def test_what_is_no_object_for_this_machine(objects: list[bytes], change: Callable[[bytes], bytes], says: str) -> None:
    with pytest.raises(RuntimeUnavailableError, match=says) as caught:
        link([change(objects[0]), *objects[1:]], "mlec_drive")
    assert caught.value.code == "E_OBJECT"


def test_sections_that_are_writable_and_executable_are_refused(objects: list[bytes]) -> None:
    data = objects[0]
    sections, count = struct.unpack_from("<Q", data, 40)[0], struct.unpack_from("<H", data, 60)[0]
    codes = [at for i in range(count) if struct.unpack_from("<Q", data, at := sections + 64 * i + 8)[0] & 4]
    assert codes
    for at in codes:
        changed = patched(at, struct.pack("<Q", 0x7))(data)
        with pytest.raises(RuntimeUnavailableError, match="writable and executable") as caught:
            check_objects([changed, *objects[1:]])
        assert caught.value.code == "E_OBJECT"


def test_linked_code_cannot_be_written_to(tmp_path: Path) -> None:
    mlec.compile(LogisticRegression().fit(X, X[:, 0] > 0), progress=False).save(tmp_path / "m.mle")
    script = f"""
import mlec
model = mlec.load({str(tmp_path / "m.mle")!r})
print(open("/proc/self/maps").read())
"""  # a process of its own: other libraries have such memory
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    maps = [line.split(maxsplit=5) for line in done.stdout.splitlines() if line]
    assert any(entry[1] == "r-xp" and len(entry) == 5 for entry in maps), "code that is of no file"
    assert not any("wx" in entry[1] for entry in maps)


def test_no_changed_bit_of_the_headers_gets_past_as_another_error(objects: list[bytes]) -> None:
    data = objects[-1]
    sections = struct.unpack_from("<Q", data, 40)[0]
    for at in (*range(64), *range(sections, len(data))):
        for bit in range(8):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            try:
                check_objects([*objects[:-1], bytes(changed)])
            except RuntimeUnavailableError as error:
                assert error.code.startswith("E_OBJECT")  # noqa: PT017


def test_a_function_that_is_not_there_is_named(objects: list[bytes]) -> None:
    from mlec.backends.tvm.assembly import object_of

    code = "declare void @not_there()\ndefine void @caller() {\ncall void @not_there()\nret void\n}\n"
    with pytest.raises(RuntimeUnavailableError, match="not_there") as caught:
        link([*objects, object_of(code)], "mlec_drive")
    assert caught.value.code == "E_OBJECT_SYMBOL"


@pytest.mark.parametrize(
    ("archs", "ptx", "capability", "runs"),
    [
        (["sm_80", "sm_90"], "", "9.0", True),
        (["sm_80"], "", "8.6", True),
        (["sm_86"], "", "8.0", False),
        (["sm_80"], "", "9.0", False),
        (["sm_80"], "compute_80", "9.0", True),
        (["sm_90"], "compute_90", "8.0", False),
        (["sm_90a"], "", "9.0", True),
        (["sm_100a"], "", "10.3", False),
        (["sm_100"], "", "10.3", True),
        ([], "", "9.0", False),
    ],
)
def test_devices(archs: list[str], ptx: str, capability: str, runs: bool) -> None:
    fault = device_fault(archs, ptx, capability)
    assert (not fault) == runs
    if fault:
        assert f"this device is sm_{capability.replace('.', '')}" in fault


@pytest.mark.parametrize(("capability", "runs"), [("9.0", True), ("8.0", False)])
def test_code_for_another_device_is_refused_before_it_is_handed_over(
    capability: str, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Package:
        def get_global_func(self, name: str) -> Callable[..., str]:
            return lambda *asked: capability

    monkeypatch.setattr(vm, "load_ffi", Package)
    program = Program("tvm", "cuda", target={"archs": ["sm_90"], "ptx": ""})
    if runs:
        vm._check_device(program)
        return
    with pytest.raises(RuntimeUnavailableError, match="sm_80") as caught:
        vm._check_device(program)
    assert caught.value.code == "E_NO_VARIANT"
