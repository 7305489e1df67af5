"""The first elements of long lines, where whole vectors are passed over."""

from __future__ import annotations

import numpy as np
import pytest

from mlec.backends.tvm.backend import TVMBackend
from mlec.ir import GraphBuilder, run_graph, tensor
from mlec.runtime import Executable
from mlec.target import Target


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_long_lines_with_ties_nan_and_infinities(dtype: str) -> None:
    b = GraphBuilder("topk")
    x = b.input("x", tensor(dtype, ("n", 203)))
    outputs = [v for k in (1, 5, 40) for largest in (True, False) for v in b.multi("topk", x, k=k, largest=largest)]
    graph = b.finish(outputs)
    module = TVMBackend().compile(graph, Target())
    executable = Executable(module.program, module.objects, module.constants)
    rng = np.random.default_rng(0)
    for rows in (0, 1, 3, 50):
        table = np.round(rng.normal(size=(rows, 203)), 1).astype({"f32": np.float32, "f64": np.float64}[dtype])
        table[rng.random(table.shape) < 0.05] = np.nan
        table[rng.random(table.shape) < 0.02] = np.inf
        if rows > 2:
            table[1] = np.nan
            table[2, :200] = -np.inf
        for got, wanted in zip(executable.run([table]), run_graph(graph, [table]), strict=True):
            np.testing.assert_array_equal(got, wanted)
