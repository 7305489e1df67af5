"""Every op of the table, compiled and run against its reference, with static and with symbolic extents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from mlec.backends.tvm.backend import TVMBackend
from mlec.backends.tvm.kernels.tile import PARAMETER_ALIGNMENT
from mlec.ir import OPS, Graph, run_graph
from mlec.ir.op import Array
from mlec.runtime.executable import Executable
from mlec.target import Target
from tests.backends.tvm.op_cases import NAMES, OpTests, families, graph_of


def run(graph: Graph, arrays: Sequence[Array]) -> Sequence[Array]:
    """The results, computed in memory that is not better aligned than kernels may expect."""
    module = TVMBackend().compile(graph, Target())
    executable = Executable(module.program, module.objects, module.constants, num_threads=1)
    return executable.run(list(arrays), [barely_aligned(result) for result in executable.run(list(arrays))])


def barely_aligned(like: Array) -> Array:
    memory = np.full(like.nbytes + 128, 255, np.uint8)
    start = -memory.ctypes.data % 64 + PARAMETER_ALIGNMENT
    return memory[start : start + like.nbytes].view(like.dtype).reshape(like.shape)


@pytest.fixture(scope="module")
def ops() -> OpTests:
    return OpTests(run)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("name", NAMES)
def test_op_equals_its_reference(ops: OpTests, name: str, dynamic: bool) -> None:
    ops.check(name, dynamic)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_op_is_lowered(kind: str) -> None:
    assert [name for name in OPS if not TVMBackend().supports(name, kind)] == []


def test_an_op_that_fails_fails_alone() -> None:
    def run_but_tanh(graph: Graph, arrays: Sequence[Array]) -> Sequence[Array]:
        if any(node.name == "tanh" for node in graph.nodes):
            raise ZeroDivisionError
        return [np.array(a) for a in run_graph(graph, arrays)]

    ops = OpTests(run_but_tanh)
    for name in next(names for names in families() if "tanh" in names):
        if name != "tanh":
            ops.check(name, False)
    with pytest.raises(ZeroDivisionError):
        ops.check("tanh", False)


def test_samples_depend_on_the_op_alone() -> None:
    alone, among = graph_of(["exp"], True)[1], graph_of(["erf", "exp"], True)[1]
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(alone[:3], among[3:6], strict=True))


def test_nan_instead_of_infinity_is_found() -> None:
    def run_wrongly(graph: Graph, arrays: Sequence[Array]) -> Sequence[Array]:
        results = run_graph(graph, arrays)
        return [np.where(np.isinf(a), np.nan, a) if a.dtype.kind == "f" else a for a in results]

    with pytest.raises(pytest.fail.Exception, match=r"sqrt\(f\d\d\[7, 8\]\)(?s:.*)sqrt\(inf\) -> nan, expected inf"):
        OpTests(run_wrongly).check("sqrt", False)
    OpTests(run_wrongly).check("sin", False)
