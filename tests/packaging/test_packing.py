"""What a file holds, and that it holds nothing twice."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier

import mlec
from mlec.artifact import Artifact
from mlec.backends.base import CompiledModule
from mlec.ir import Graph, GraphBuilder, tensor
from mlec.packaging.packing import stored
from mlec.runtime import Program

RNG = np.random.default_rng(0)
X = RNG.normal(size=(300, 5)).astype(np.float32)


def _module(graph: Graph, **constants: np.ndarray) -> CompiledModule:
    return CompiledModule(Program("b", "cpu", constants=tuple(constants)), (), constants, graph.signature)


def test_equal_tensors_are_stored_once() -> None:
    """By their bits, of the same form; the graph's name counts."""
    w = RNG.normal(size=(64, 8)).astype(np.float32)
    w[0] = 0.0
    far, signed = w.copy(), w.copy()
    far[-1, -1] += 1
    signed[0, 0] = -0.0
    b = GraphBuilder("g")
    x = b.input("x", tensor("f32", ("n", 64)))
    graph = b.finish([b("matmul", x, b.constant(w, "w"))])
    first = _module(graph, packed=w.copy(), far=far, w=signed, flat=w.reshape(-1), turned=np.asfortranarray(w))
    second = _module(graph, other=far.copy(), far=w.view(np.int32))
    tensors, programs = stored(graph, [first, second])
    assert [program.constants for program in programs] == [("w", "far", "w_1", "flat", "w"), ("far", "far_1")]
    assert list(tensors) == ["w", "far", "w_1", "flat", "far_1"]
    for module, program in zip((first, second), programs, strict=True):
        for name, kept in zip(module.program.constants, program.constants, strict=True):
            assert tensors[kept].dtype == module.constants[name].dtype
            assert tensors[kept].tobytes() == module.constants[name].tobytes()


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_forest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str | None) -> None:
    """Its file holds nothing twice, and gives the same answers where its kernels run and where its graph is compiled again."""
    forest = RandomForestClassifier(4, random_state=0).fit(X, (X[:, 0] > 0) + (X[:, 1] > X[:, 2]))
    path = tmp_path / "forest.mle"
    compiled = mlec.compile(forest, X, validate=False, progress=False)
    compiled.save(path, compression=compression)
    with Artifact.open(path) as artifact:
        tensors = [(a.dtype, a.shape, a.tobytes()) for a in artifact.tensors.values() if a.size]
    assert len(set(tensors)) == len(tensors)
    loaded = mlec.load(path)
    assert loaded.metadata["target"] == compiled.metadata["target"]
    probabilities = loaded.predict_proba(X)
    np.testing.assert_array_equal(probabilities, forest.predict_proba(X))
    loaded.save(tmp_path / "again.mle", compression=compression)
    np.testing.assert_array_equal(mlec.load(tmp_path / "again.mle").predict_proba(X), probabilities)
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, os.fspath(tmp_path / name))
    for _ in range(2):  # compiled here, then as it was compiled here before
        np.testing.assert_array_equal(mlec.load(path).predict_proba(X), probabilities)
