"""Code for aarch64, run under emulation: kernels by op, and whole files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

import mlec
from mlec.artifact import Artifact, read_model
from mlec.backends.tvm.backend import TVMBackend
from mlec.ir import parse_graph, run_graph
from mlec.target import Target
from tests.backends.tvm.op_cases import check, graph_of
from tests.e2e.emulator import QEMU, run

pytestmark = pytest.mark.skipif(QEMU is None, reason="qemu-aarch64 is not installed (apt-get install qemu-user)")

OPS = [
    "argmax", "attention", "avg_pool", "cast", "conv", "conv2d_nchwc", "cumsum", "depthwise2d_nchwc", "erf", "exp",
    "gather", "group_norm", "gru", "layer_norm", "log", "logsumexp", "lstm", "matmul", "matmul_narrow",
    "matmul_narrow_packed", "matmul_packed", "max",
    "max_pool", "nearest", "pairwise_distance", "prod", "resize", "rnn", "round", "sigmoid", "softmax", "sort", "sum",
    "tanh", "topk", "transpose", "tree_ensemble", "where",
]  # fmt: skip
"""Those with templates of their own, and some of the elementwise ones. None needs the C library's functions, which are not linked."""

RNG = np.random.default_rng(0)
X = RNG.normal(size=(200, 12))
Y = (X[:, 0] + X[:, 1] * X[:, 2] > 0).astype(int) + (X[:, 3] > 1)


@pytest.fixture(scope="module")
def results() -> dict[str, list[tuple[Any, Any, Any]]]:
    """By op, what the emulated code and the reference give, and the call."""
    graph, arrays, calls = graph_of(OPS, dynamic=True)
    module = TVMBackend().compile(graph, Target.parse("cpu:aarch64"))
    got = run(module.program, module.objects, module.constants, arrays)
    found: dict[str, list[tuple[Any, Any, Any]]] = {}
    for (name, case), ours, theirs in zip(calls, got, run_graph(graph, arrays), strict=True):
        found.setdefault(name, []).append((ours, theirs, case))
    return found


@pytest.mark.parametrize("name", OPS)
def test_op_equals_its_reference(results: dict[str, list[tuple[Any, Any, Any]]], name: str) -> None:
    for got, wanted, case in results[name]:
        check(name, got, wanted, case)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(32, 4, 64, activation="gelu", batch_first=True)


MODELS = {
    "row program": lambda: (make_pipeline(StandardScaler(), LogisticRegression()).fit(X, Y), X),
    "trees": lambda: (RandomForestClassifier(20, max_depth=6, random_state=0).fit(X, Y), X.astype(np.float32)),
    "neighbours": lambda: (KNeighborsRegressor(3).fit(X, Y), X[:50] + 0.01),
    "convolutions": lambda: (Convolutions().eval(), torch.randn(3, 3, 12, 17)),
    "encoder": lambda: (encoder().eval(), torch.randn(2, 17, 32)),
    "many rows": lambda: (
        nn.Sequential(nn.Linear(300, 400), nn.Tanh(), nn.Linear(400, 300)).eval(),
        torch.randn(130, 300),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_code_in_a_file_gives_the_answers_of_its_graph(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name]()
    compiled = mlec.compile(model, x if isinstance(x, np.ndarray) else (x,), target="cpu:aarch64", progress=False)
    compiled.save(tmp_path / "m.mle")
    with Artifact.open(tmp_path / "m.mle") as artifact:
        (program,) = read_model(artifact).programs
        graph = parse_graph(artifact.graph, artifact.tensors)
        objects = [blob.data for blob in artifact.kernels]
        for rows in (1, len(x)):
            given = np.asarray(x[:rows])
            got, wanted = run(program, objects, artifact.tensors, [given]), run_graph(graph, [given])
            close(got, wanted, 1e-9 if given.dtype == np.float64 else 2e-5)


def close(got: Sequence[Any], wanted: Sequence[Any], tolerance: float) -> None:
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(1, np.abs(theirs).max()))
