"""Object files of kernels: however many parts they are made in, the bytes are the same and every kernel is there once."""

from __future__ import annotations

import pytest

from mlec.backends.tvm.assembly import ENTRY
from mlec.backends.tvm.compat import tirx
from mlec.backends.tvm.kernels.gemm import gemm
from mlec.backends.tvm.pipeline import ObjectsForCPU
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
