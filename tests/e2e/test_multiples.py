"""Models whose inputs have extents such as 2*n, and no axis that is n."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mlec
from mlec.errors import InputError, LoweringError, UsageError
from mlec.ir import Graph, GraphBuilder, run_graph, tensor
from mlec.validation.probes import batch_inputs


def pairs_and_rest() -> Graph:
    """Sums of the pairs in (2*n, 6), and of the rest of (3*t+1,)."""
    b = GraphBuilder("pairs")
    x, y = b.input("x", tensor("f32", ("2*n", 6))), b.input("y", tensor("f32", ("3*t+1",)))
    rest = b("slice", y, axis=0, start=1, stop=y.type.shape[0])
    both = b("concat", b("sum", b("reshape", x, shape=("n", 12)), axes=(1,)), rest, axis=0)
    return b.finish([b("matmul", b("relu", x), b.constant(np.ones((6, 4), np.float32))), both])


@pytest.mark.parametrize("saved", [False, True])
def test_inputs_of_multiples(saved: bool, tmp_path: Path) -> None:
    graph = pairs_and_rest()
    model = mlec.compile(graph)
    if saved:
        model.save(tmp_path / "m.mle")
        model = mlec.load(tmp_path / "m.mle")
    rng = np.random.default_rng(0)
    for n, t in ((0, 0), (1, 4), (3, 0), (500, 7)):
        inputs = [rng.normal(size=shape).astype(np.float32) for shape in ((2 * n, 6), 3 * t + 1)]
        for got, wanted in zip(model.run(inputs), run_graph(graph, inputs), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match=r"axis 0 must be 2\*n, a multiple of 2, not 65"):
        model.run([np.ones((65, 6), np.float32), np.ones(1, np.float32)])
    with pytest.raises(InputError, match=r"axis 0 must be 3\*t\+1, not 3"):
        model.run([np.ones((2, 6), np.float32), np.ones(3, np.float32)])


def test_rows_that_are_multiples() -> None:
    b = GraphBuilder("pairs")
    x = b.input("x", tensor("f32", ("2*n", 6)))
    graph = b.finish([b("sum", b("reshape", x, shape=("n", 12)), axes=(1,))])
    assert [array.shape for array in batch_inputs(graph, 64)] == [(64, 6)]
    with pytest.raises(UsageError, match=r"batches of 2\*n rows, not of 65"):
        batch_inputs(graph, 65)
    assert mlec.compile(graph, validate=False).memory_usage()["inputs"] == 2 * 6 * 4, "of the fewest rows"


def test_a_program_that_takes_multiples() -> None:
    torch = pytest.importorskip("torch")

    class Pairs(torch.nn.Module):
        def forward(self, x):
            return torch.relu(x).reshape(-1, 2, 4).sum(1)

    sizes = ({0: 2 * torch.export.Dim("half", max=512)},)
    model = mlec.compile(torch.export.export(Pairs(), (torch.ones(8, 4),), dynamic_shapes=sizes))
    x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    np.testing.assert_allclose(model.run([x])[0], np.maximum(x, 0).reshape(-1, 2, 4).sum(1), rtol=1e-6)
    with pytest.raises(InputError, match="a multiple of 2, not 65"):
        model.run([np.ones((65, 4), np.float32)])


def test_expressions_that_tell_no_symbol() -> None:
    b = GraphBuilder("sum")
    x = b.input("x", tensor("f32", ("n+m", 3)))
    with pytest.raises(LoweringError, match="no input has an axis of extent m, or of a multiple of it"):
        mlec.compile(b.finish([b("relu", x)]), validate=False)
