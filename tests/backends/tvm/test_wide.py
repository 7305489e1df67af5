"""Tensors with more elements than indices of 32 bits can number, where all extents are fixed."""

from unittest.mock import patch

import numpy as np
import pytest

import mlec
from mlec.backends.tvm import compat
from mlec.backends.tvm.backend import TVMBackend
from mlec.ir import GraphBuilder, run_graph, tensor
from mlec.ir.op import Case
from mlec.runtime.executable import Executable
from mlec.target import Target
from tests.backends.tvm.op_cases import check, families, graph_of
from tests.fuzz.kernels import quick


def test_the_last_of_more_than_two_to_the_31st_elements() -> None:
    rows, columns = (1 << 16) + 3, 1 << 15
    b = GraphBuilder("wide")
    graph = b.finish([b("any", b.input("x", tensor("bool", (rows, columns))), axes=(1,))])
    model = mlec.compile(graph, validate=False)
    x = np.zeros((rows, columns), bool)  # its pages stay the one page of zeros, but for the last
    x[-1, -1] = True
    np.testing.assert_array_equal(np.flatnonzero(model.run([x])[0]), [rows - 1])


@pytest.mark.parametrize("names", families(), ids=lambda names: f"{names[0]}-{names[-1]}")
def test_loops_that_count_in_64_bits(names: list[str]) -> None:
    """Every op's kernels as they are for such tensors, on small ones."""
    graph, arrays, _ = graph_of(names, False, 1)
    with quick(), patch.object(compat, "MOST_NARROW", 0):
        module = TVMBackend().compile(graph, Target())
    got = Executable(module.program, module.objects, module.constants, num_threads=1).run(list(arrays))
    with np.errstate(all="ignore"):
        values = dict(zip([*graph.inputs, *graph.outputs], [*arrays, *run_graph(graph, arrays)], strict=True))
    for output, result in zip(graph.outputs, got, strict=True):
        node = graph.producer[output]
        check(node.name, result, values[output], Case(tuple(values.get(v, ()) for v in node.inputs), node.attrs))
