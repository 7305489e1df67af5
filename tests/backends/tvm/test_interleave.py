"""Concatenation of single elements: two operands in turn."""

from __future__ import annotations

import numpy as np
import pytest

from mlec.ir import Graph, GraphBuilder, tensor
from mlec.ops.common import N
from tests.backends.tvm.test_elementwise_tvm import compiled


def pairs(dtype: str) -> Graph:
    b = GraphBuilder()
    x, y = (b.input(name, tensor(dtype, ("n", 3, 1))) for name in ("x", "y"))
    return b.finish([b("concat", x, y, axis=-1)])


@pytest.mark.parametrize("dtype", ["f32", "f64", "i8", "bool", "f16"])
def test_two_operands_in_turn(dtype: str) -> None:
    graph = pairs(dtype)
    executable = compiled(graph)
    assert [kernel.op for kernel in executable.program.kernels] == ["concat"]
    rng = np.random.default_rng(0)
    for rows in (0, 1, N, 5000):
        x = [(rng.normal(size=(rows, 3, 1)) * 50).astype(v.type.dtype.numpy) for v in graph.inputs]
        np.testing.assert_array_equal(executable.run(x)[0], np.concatenate(x, -1))
