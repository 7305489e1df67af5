"""Object files of kernels: however many parts they are made in, the bytes are the same and every kernel is there once."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from mlec.backends.tvm.assembly import ENTRY
from mlec.backends.tvm.backend import cpu_info
from mlec.backends.tvm.compat import IRModule, tirx
from mlec.backends.tvm.kernels.gemm import gemm
from mlec.backends.tvm.objects import to_object
from mlec.backends.tvm.pipeline import ObjectsForCPU, compile_for_cpu
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


@pytest.mark.parametrize("target", ["cpu", "cpu:aarch64"])
def test_objects_hold_nothing_for_debuggers_or_exceptions_and_all_else(target: str, tmp_path: Path) -> None:
    info = cpu_info(Target.parse(target))
    product = gemm((tirx.Var("n", "int64"),), 8, 24, "float32", 8, info, name="product")
    module = compile_for_cpu(IRModule({"product": product}), info.tvm_target())
    module.write_to_file(str(tmp_path / "whole.o"))
    whole, ours = sections((tmp_path / "whole.o").read_bytes()), sections(to_object(module))
    dropped = {name for name in whole if ".debug_" in name or ".eh_frame" in name}
    assert {".debug_info", ".rela.debug_info", ".eh_frame"} <= dropped
    assert all(not ours[name] for name in dropped)
    assert {".text", ".symtab", ".strtab"} <= whole.keys()
    assert list(ours) == list(whole)
    assert all(ours[name] == found for name, found in whole.items() if name not in dropped)


def sections(data: bytes) -> dict[str, bytes]:
    """What each section of an object file holds, by name."""
    (start,), (count, names) = struct.unpack_from("<Q", data, 40), struct.unpack_from("<HH", data, 60)
    table = [struct.unpack_from("<IIQQQQIIQQ", data, start + 64 * i) for i in range(count)]
    texts = data[table[names][4] :]
    assert all(section[4] % max(section[8], 1) == 0 for section in table)
    return {texts[s[0] : texts.index(b"\0", s[0])].decode(): data[s[4] : s[4] + s[5] * (s[1] != 8)] for s in table}
