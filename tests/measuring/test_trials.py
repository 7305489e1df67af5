"""Graphs that run on the side, and the model that they come to be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import mlec
from mlec import registry
from mlec.backends.base import CompiledModule, CompileOptions
from mlec.ir import Graph, GraphBuilder, tensor
from mlec.passes.quantize import statistics
from mlec.target import Target


def network() -> Graph:
    rng = np.random.default_rng(0)
    b = GraphBuilder("g")
    h = b.input("x", tensor("f32", ("n", 64)))
    for _ in range(2):
        h = b("relu", b("matmul", h, b.constant(rng.normal(size=(64, 64)).astype(np.float32))))
    return b.finish([h])


def test_a_network_on_8_bits_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its results were measured with is the model."""
    monkeypatch.setattr(statistics, "WORTH_COMPILING", 0.0)
    backend = type(registry.backend_of("cpu"))
    compile_graph, made = backend.compile, []

    def counted(self: Any, graph: Graph, target: Target, options: CompileOptions) -> CompiledModule:
        made.append(graph.digest)
        return compile_graph(self, graph, target, options)

    monkeypatch.setattr(backend, "compile", counted)
    x = np.random.default_rng(1).normal(size=(256, 64)).astype(np.float32)
    model = mlec.compile(network(), x, passes="default,quantize-int8{measure = false}", progress=False)
    assert [layer["decision"] for layer in model.report.quantization] == ["int8", "int8"]
    assert len(made) == len(set(made)) == 2  # to see its numbers, and itself
    (found,) = model.run([x])
    assert np.abs(found - mlec.compile(network(), progress=False).run([x])[0]).max() < 0.02 * np.abs(found).max()
