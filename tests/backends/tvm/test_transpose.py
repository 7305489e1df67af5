import itertools

import numpy as np
import pytest

from mlec.backends.tvm.compat import tirx
from mlec.backends.tvm.kernels.transpose import merged_axes, transpose
from mlec.ir import GraphBuilder, run_graph, tensor
from tests.backends.tvm.kernel_helpers import HOST, compile_kernel


@pytest.mark.parametrize("dtype", ["float32", "float64", "int8", "bool", "float16"])
@pytest.mark.parametrize("shape", [(33, 47), (16, 32), (1, 5), (1, 70), (3, 17, 1, 20)])
def test_moves_every_element(dtype, shape):
    perm = tuple(reversed(range(len(shape))))
    x = (np.random.default_rng(0).normal(size=shape) * 50).astype(dtype)
    run = compile_kernel(transpose(shape, perm, dtype, HOST))
    np.testing.assert_array_equal(run(x, out=x.transpose(perm).shape, dtype=dtype), x.transpose(perm))


@pytest.mark.parametrize("perm", [p for p in itertools.permutations(range(3)) if p[-1] != 2])
def test_symbolic_extents(perm):
    n = tirx.Var("n", "int64")
    run = compile_kernel(transpose((n, 18, 5), perm, "float32", HOST))
    for rows in (0, 1, 16, 50):
        x = np.random.default_rng(rows).normal(size=(rows, 18, 5)).astype(np.float32)
        np.testing.assert_array_equal(run(x, out=x.transpose(perm).shape), x.transpose(perm))


def test_axes_that_move_together_are_one():
    assert merged_axes((2, 3, 4, 5), (2, 3, 0, 1)) == ([6, 20], [1, 0])
    assert merged_axes((2, 1, 4, 5), (3, 0, 1, 2)) == ([8, 5], [1, 0])
    assert merged_axes((2, 3, 4), (2, 1, 0)) == ([2, 3, 4], [2, 1, 0])


def test_a_transposition_that_only_moves_ones_costs_nothing():
    from tests.backends.tvm.test_elementwise_tvm import compiled

    b = GraphBuilder()
    x = b.input("x", tensor("f32", ("n", 1, 4)))
    graph = b.finish([b("transpose", x, perm=(1, 0, 2))])
    executable = compiled(graph)
    assert executable.program.kernels == ()
    inputs = [np.arange(8, dtype=np.float32).reshape(2, 1, 4)]
    np.testing.assert_array_equal(executable.run(inputs)[0], run_graph(graph, inputs)[0])
