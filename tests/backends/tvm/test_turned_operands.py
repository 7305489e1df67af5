"""Every op on operands that are turned around first: those that read them as they lie, and those that have it carried out."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from mlec.backends.tvm.backend import TVMBackend
from mlec.ir import OPS, GraphBuilder, TensorType, Value, run_graph
from mlec.ir.dtype import DType
from mlec.ir.op import Array
from mlec.runtime.executable import Executable
from mlec.target import Target
from tests.backends.tvm.op_cases import CONSTANT_OPERANDS, check, families
from tests.fuzz.kernels import quick


@pytest.mark.parametrize("names", families(), ids=lambda names: f"{names[0]}-{names[-1]}")
def test_ops_on_turned_operands(names: list[str]) -> None:
    b = GraphBuilder("turned")
    arrays: list[Array] = []
    results: list[Value] = []
    calls = []
    for name in names:
        case = OPS[name].sample(np.random.default_rng(zlib.crc32(name.encode())))
        operands = []
        for k, array in enumerate(map(np.asarray, case.operands)):
            if k in CONSTANT_OPERANDS.get(name, ()):
                operands.append(b.constant(array))
                continue
            arrays.append(np.array(array.T, order="C"))
            given = b.input(f"{name}{k}", TensorType(arrays[-1].shape, DType.of(array.dtype)))
            operands.append(b("transpose", given, perm=tuple(reversed(range(array.ndim)))))
        made = b.multi(name, *operands, **case.attrs)
        results += made
        calls += [(name, case)] * len(made)
    graph = b.finish(results)
    with quick():
        module = TVMBackend().compile(graph, Target())
    got = Executable(module.program, module.objects, module.constants, num_threads=1).run(arrays)
    for (name, case), ours, wanted in zip(calls, got, run_graph(graph, arrays), strict=True):
        check(name, ours, wanted, case)
