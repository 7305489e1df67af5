"""Large constants that are only added: rounded to 16 bits where that keeps them, so that files store half the bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mlec
from mlec.artifact import Artifact
from mlec.ir import DType, Graph, GraphBuilder, tensor, verify
from mlec.ir.op import Array
from mlec.passes.quantize.halves import ERROR, with_halves

RNG = np.random.default_rng(0)
POSITIONS = RNG.normal(size=(64, 64)).astype(np.float32)


def network(positions: Array, other: str = "") -> Graph:
    """Positions and a product; ``other`` reads the positions besides."""
    b = GraphBuilder("net")
    x, table = b.input("x", tensor(DType.F32, ("n", 64, 64))), b.constant(positions, "positions")
    weights = b.constant(RNG.normal(size=(64, 8)).astype(np.float32))
    outputs = [b("matmul", b("add", x, table), weights)]
    if other:
        outputs.append(b(other, x, b.constant(positions)))
    return b.finish(outputs)


def constant_of(graph: Graph, op: str) -> Array:
    found = next(graph.constant_value(node.inputs[1]) for node in graph.nodes if node.name == op)
    assert found is not None
    return found


def test_what_is_only_added_becomes_numbers_of_16_bits() -> None:
    graph = with_halves(network(POSITIONS))
    verify(graph)
    got = constant_of(graph, "add")
    assert got.dtype == np.float32
    assert np.array_equal(got, POSITIONS.astype(np.float16).astype(np.float32))
    assert 0 < np.abs(got - POSITIONS).max() <= ERROR * np.abs(POSITIONS).max()
    assert with_halves(graph) is graph


@pytest.mark.parametrize("other", ["mul", "div", "maximum"])
def test_what_something_else_reads_stays(other: str) -> None:
    graph = network(POSITIONS, other)
    assert with_halves(graph) is graph


@pytest.mark.parametrize(
    "positions",
    [
        POSITIONS[:63],  # of less than 16 KB
        POSITIONS * np.float32(1e6),
        POSITIONS * np.float32(1e-6),
        np.where(np.eye(64) == 1, np.float32(np.inf), POSITIONS),
        np.arange(4096, dtype=np.float32).reshape(64, 64),
    ],
    ids=["small", "beyond f16", "below f16", "infinite", "whole numbers"],
)
def test_what_16_bits_do_not_keep_stays(positions: Array) -> None:
    b = GraphBuilder("net")
    x = b.input("x", tensor(DType.F32, ("n", *positions.shape)))
    graph = b.finish([b("add", x, b.constant(positions, "positions"))])
    assert with_halves(graph) is graph


def test_the_file_has_half_the_bytes(tmp_path: Path) -> None:
    x = RNG.normal(size=(32, 64, 64)).astype(np.float32)
    compiled = mlec.compile(network(POSITIONS), x, precision="int8", calibration=x, progress=False)
    compiled.save(tmp_path / "m.mle")
    with Artifact.open(tmp_path / "m.mle") as artifact:
        stored = [entry for entry in artifact.describe()["tensors"] if entry["shape"] == [64, 64]]
        assert [(entry["dtype"], entry["codec"], entry["size"]) for entry in stored] == [("f32", "f16", 8192)]
    loaded = mlec.load(tmp_path / "m.mle")
    assert np.array_equal(loaded.run([x])[0], compiled.run([x])[0])
