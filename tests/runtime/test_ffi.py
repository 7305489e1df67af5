"""Native functions that Python calls by itself."""

from __future__ import annotations

import gc
import platform
import weakref

import pytest

from mlec.runtime import library
from mlec.runtime.executable import DRIVER
from mlec.runtime.ffi import FROM_PYTHON

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="code for other processors has no such functions"
)


def test_a_function_keeps_its_code_and_no_longer(objects: dict[str, tuple[bytes, ...]]) -> None:
    call = library.link(objects["main"], DRIVER).call
    code = weakref.ref(call.__self__.code)  # type: ignore[attr-defined]
    assert code() is not None
    del call
    assert code() is None


def test_a_function_in_a_cycle_goes_before_what_it_needs(objects: dict[str, tuple[bytes, ...]]) -> None:
    """It looks at its method when it goes, also where the garbage collector takes the cycle apart."""
    call = library.link(objects["main"], DRIVER).call
    gone: list[str] = []
    parts = {"method": call.__self__.method, "code": call.__self__.code, "function": call}  # type: ignore[attr-defined]
    watched = [weakref.ref(part, lambda _, name=name: gone.append(name)) for name, part in parts.items()]  # type: ignore[misc]
    cycle: list[object] = [call]
    cycle.append(cycle)
    del call, parts, cycle
    gc.collect()
    assert not any(part() for part in watched)
    assert gone[0] == "function"
    assert sorted(gone) == ["code", "function", "method"]


@pytest.mark.parametrize(
    ("before", "kind", "says"),
    [
        ("", RuntimeError, "tvm-ffi failed and does not say why"),
        ("call void @TVMFFIErrorSetRaisedFromCStr(ptr @wrong, ptr @text)\n", RuntimeError, "no luck"),
        ("call void @TVMFFIErrorSetRaisedFromCStr(ptr @memory, ptr @text)\n", MemoryError, "no luck"),
    ],
)
def test_a_function_says_why_it_failed(before: str, kind: type[Exception], says: str) -> None:
    from mlec.backends.tvm.assembly import object_of

    text = (
        '@wrong = constant [11 x i8] c"ValueError\\00"\n@memory = constant [12 x i8] c"MemoryError\\00"\n'
        '@text = constant [8 x i8] c"no luck\\00"\ndeclare void @TVMFFIErrorSetRaisedFromCStr(ptr, ptr)\n'
        "declare ptr @PyObject_CallNoArgs(ptr)\n"
        f"define ptr @{FROM_PYTHON.format('entry')}(ptr %self, ptr %given, i64 %count) {{\n{before}"
        "%raised = call ptr @PyObject_CallNoArgs(ptr %self)\nret ptr %raised\n}\n"
    )
    entry = library.link([object_of(text)], "entry")
    for _ in range(2):
        with pytest.raises(kind, match=says) as caught:
            entry.call()
        assert caught.type is kind
