"""Torch models that are written as loops: torch's answers, from fewer nodes, however many steps there are."""

from __future__ import annotations

import numpy as np
import pytest

import mlec
from mlec.ir import run_graph, verify
from mlec.passes.vectorize import Vectorize
from mlec.pipeline import PassPipeline
from mlec.tolerance import check_equal

torch = pytest.importorskip("torch")

from bench.torch_loops import TORCH_LOOPS  # noqa: E402
from bench.vectorize import TORCH  # noqa: E402

STEPS = 5
NODES = {
    "heads_in_a_list": 23, "expert_modules": 19, "time_distributed": 9, "lstm_cells": 9, "gru_cell": 6,
    "written_lstm": 3, "standardized_modules": 8, "updates": 5, "spectra": 23,
}  # fmt: skip
"""What is left."""
APART = {"channels": "one pass over narrow rows", "ensemble": "one pass over narrow rows"}
"""What is better left as it is, and why."""


def test_the_bench_has_them_all() -> None:
    assert set(TORCH) == set(TORCH_LOOPS)


@pytest.mark.parametrize("name", TORCH_LOOPS)
def test_a_loop_of_torch(name: str) -> None:
    torch.manual_seed(0)
    model = TORCH_LOOPS[name](STEPS).eval()
    x = torch.randn(3, *model.shape)
    lowered = PassPipeline.parse("canonicalize,fold-constants,cse").run(mlec.lower(model, example_inputs=(x,)))[0]
    graph, records = PassPipeline.parse("vectorize,canonicalize").run(lowered)
    verify(graph)
    check_equal(lowered, graph, Vectorize.preserves, name, seeds=(0,))
    with torch.no_grad():
        wanted = model(x)
    for a, b in zip(wanted if isinstance(wanted, tuple) else (wanted,), run_graph(graph, [x.numpy()]), strict=True):
        np.testing.assert_allclose(b, a.numpy(), rtol=1e-4, atol=1e-5)
    if name in APART:
        assert any(APART[name] in r.message for r in records[0].remarks if r.kind == "missed")
    if name in NODES:
        assert len(graph.compute_nodes) <= NODES[name] < 3 * STEPS + 10 < len(lowered.compute_nodes)
        told = [r.message for r in records[0].remarks if r.kind == "applied"]
        assert any(f"{STEPS} equal steps" in text or f"{STEPS} steps of a recurrence" in text for text in told)
