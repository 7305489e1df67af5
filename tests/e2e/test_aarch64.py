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
from mlec.ir import GraphBuilder, TensorType, parse_graph, run_graph
from mlec.ir.dim import SymDim
from mlec.ir.dtype import DType
from mlec.target import Target
from tests.backends.tvm.op_cases import check, graph_of
from tests.e2e.emulator import QEMU, run

pytestmark = pytest.mark.skipif(QEMU is None, reason="qemu-aarch64 is not installed (apt-get install qemu-user)")

OPS = [
    "argmax", "attention", "avg_pool", "cast", "conv", "conv2d_narrow", "conv2d_nchwc", "conv_int8", "cumsum", "depthwise2d_nchwc",
    "dequantize", "erf", "exp", "gather", "group_norm", "gru", "layer_norm", "log", "logsumexp", "lstm", "matmul",
    "matmul_int8", "matmul_narrow", "matmul_narrow_packed", "matmul_packed", "max", "max_pool", "max_pool_int8",
    "nearest", "pairwise_distance", "prod", "quantize", "resize", "rnn", "round", "sigmoid", "softmax", "sort",
    "sum", "sum_pool_int8", "tanh", "topk", "transpose", "tree_ensemble", "where",
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


@pytest.mark.parametrize("arch", ["aarch64", "neoverse-v1"])
def test_layers_of_bytes(arch: str) -> None:
    """By widening to 32 bits, and by the instruction that newer processors have."""
    rng = np.random.default_rng(0)

    def drawn(dtype: str, *shape: int) -> Any:
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max + 1, shape).astype(dtype)

    b = GraphBuilder("bytes")
    x = b.input("x", TensorType((SymDim.named("n"), 9, 11, 24), DType.U8))
    same = {"pads": (1, 1, 1, 1)}
    wide = b("conv_int8", x, b.constant(drawn("int8", 3, 3, 24, 37)), zero_point=7, **same)
    deep = b("conv_int8", x, b.constant(drawn("int8", 3, 3, 1, 24)), groups=24, zero_point=255, **same)
    flat = b("matmul_int8", x, b.constant(drawn("int8", 24, 50)), zero_point=128)
    graph, images = b.finish([wide, deep, flat]), drawn("uint8", 2, 9, 11, 24)
    module = TVMBackend().compile(graph, Target.parse(f"cpu:{arch}"))
    got = run(module.program, module.objects, module.constants, [images])
    for ours, theirs in zip(got, run_graph(graph, [images]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
