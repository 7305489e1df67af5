"""What backends say of their targets, and what the passes make of it."""

from __future__ import annotations

import numpy as np
import pytest

import mlec
from mlec import registry
from mlec.backends.base import Backend
from mlec.backends.tvm.cuda import CudaLowering
from mlec.backends.tvm.target import TargetInfo
from mlec.errors import TargetError
from mlec.ir import Graph, GraphBuilder, tensor
from mlec.passes.fusion import FuseOperators
from mlec.pipeline import PassContext, PassPipeline, TargetFacts
from mlec.target import Target


def facts(text: str) -> TargetFacts:
    target = Target.parse(text)
    backend: Backend = registry.backend_of(target.kind)
    return backend.facts(target)


@pytest.mark.parametrize(
    ("target", "vector_bytes"),
    [
        ("cpu:x86-64-v4", 64), ("cpu:x86-64-v4,-avx512f", 32), ("cpu:x86-64-v3", 32), ("cpu:haswell", 32), ("cpu:nehalem", 16),
        ("cpu:x86-64", 16),
    ],
)  # fmt: skip
def test_vectors_are_those_of_the_processor_that_is_named(target: str, vector_bytes: int) -> None:
    found = facts(target)
    assert (found.vector_bytes, found.row_programs) == (vector_bytes, True)


def test_of_the_machine_that_compiles() -> None:
    assert facts("cpu").vector_bytes == TargetInfo.host().vector_bits // 8
    assert facts("cpu").row_programs


@pytest.mark.parametrize("target", ["cuda", "cuda:sm_90", "numpy"])
def test_only_processors_have_row_programs(target: str) -> None:
    assert not facts(target).row_programs


def test_a_processor_that_nobody_knows_is_refused() -> None:
    with pytest.raises(TargetError, match="i80286"):
        facts("cpu:i80286")


def classifier() -> Graph:
    """Imputer, scaler, products of columns, a linear model, its label and probabilities."""
    rng = np.random.default_rng(0)
    b = GraphBuilder()
    x = b.input("x", tensor("f32", ("n", 5)))
    left, right = (b.constant(columns) for columns in np.triu_indices(5))
    fill, mean, scale = (b.constant(rng.normal(size=5).astype(np.float32)) for _ in range(3))
    scaled = b("div", b("sub", b("where", b("isnan", x), fill, x), mean), scale)
    products = b("mul", b("gather", scaled, left, axis=1), b("gather", scaled, right, axis=1))
    weights = b.constant(rng.normal(size=(20, 1)).astype(np.float32))
    margin = b("add", b("matmul", b("concat", scaled, products, axis=1), weights), 0.5)
    p = b("sigmoid", margin)
    label = b("cast", b("gt", b("reshape", margin, shape=("n",)), 0.0), dtype="i64")
    return b.finish([label, b("concat", b("sub", 1.0, p), p, axis=1)])


def test_a_gpu_gets_fused_kernels_instead_of_row_programs() -> None:
    def strategies(context: PassContext) -> list[str]:
        fused, _ = PassPipeline([FuseOperators()]).run(classifier(), context)
        return [note.strategy for note in CudaLowering(fused, TargetInfo.host()).run().notes]

    whole, in_pieces = strategies(PassContext(facts("cuda"))), strategies(PassContext())
    assert (len(whole), len(in_pieces)) == (11, 15)
    assert not any("one of several" in strategy for strategy in whole)
    assert all(strategy.endswith("one of several for a fused body") for strategy in in_pieces)


def test_optimize_asks_the_backend() -> None:
    names = {target: _ops(mlec.optimize(classifier(), "fuse", target=target)[0]) for target in ("cpu:nehalem", "cuda")}
    assert names["cpu:nehalem"] == ["fused"]
    assert {"concat", "gather"} < set(names["cuda"])


def _ops(graph: Graph) -> list[str]:
    return [node.name for node in graph.nodes if not node.is_constant]
