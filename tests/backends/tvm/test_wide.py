"""Tensors with more elements than indices of 32 bits can number, where all extents are fixed."""

from unittest.mock import patch

import numpy as np
import pytest

import mlec
from mlec.backends.tvm import compat
from mlec.backends.tvm.backend import TVMBackend
from mlec.backends.tvm.kernels.conv_bf16 import NarrowConv, conv_bf16
from mlec.backends.tvm.target import TargetInfo
from mlec.ir import GraphBuilder, run_graph, tensor
from mlec.ir.op import Case
from mlec.ops.conv import paired_weights
from mlec.runtime.executable import Executable
from mlec.target import Target
from tests.backends.tvm.kernel_helpers import geometry
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


@pytest.mark.parametrize(("images", "wide"), [(63, False), (65, True)])
def test_images_of_two_bytes_are_numbered_by_bytes(images: int, wide: bool) -> None:
    """An index of 32 bits reaches each number of either, but not each byte of both."""
    target = TargetInfo.for_cpu("sapphirerapids", "x86_64-unknown-linux-gnu")
    weights = paired_weights(np.zeros((64, 64, 3, 3), np.float32), 32, 1)
    conv = NarrowConv(weights.shape, 32, 64, 32, geometry((1, 1), (1, 1, 1, 1)), 1)
    text = conv_bf16((images, 2, 512, 512, 32), conv, target).script()
    assert ("T.parallel(T.int64(" in text) == wide
