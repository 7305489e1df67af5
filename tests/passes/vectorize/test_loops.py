"""Loops of 64 steps, as the bench compiles them: what is left of them, and how long that takes."""

from __future__ import annotations

import time

import numpy as np
import pytest

from bench.vectorize import LOOPS, STEPS, recurrence
from mlec.ir import Graph, GraphBuilder, tensor
from mlec.passes.pipelines import named_pipeline
from mlec.passes.vectorize import Vectorize
from mlec.pipeline import PassContext, PassPipeline
from mlec.tolerance import check_equal

NODES = {
    "assigned_rows": 3, "standardized_rows": 8, "heads": 4, "centres": 1, "experts": 18, "shared_mlps": 8, "windows": 23,
}  # fmt: skip


@pytest.mark.parametrize("name", NODES)
def test_a_loop_of_64_steps_becomes_a_few_nodes(name: str) -> None:
    graph = LOOPS[name]()
    assert len(graph.compute_nodes) >= 3 * STEPS
    short, records = PassPipeline.parse("canonicalize,cse,vectorize,canonicalize").run(graph)
    assert len(short.compute_nodes) <= NODES[name]
    told = next(r.remarks for r in records if r.name == "vectorize")
    assert any(r.kind == "applied" and f"{STEPS} equal steps" in r.message for r in told)
    assert not any(r.kind == "missed" for r in told)
    check_equal(graph, short, Vectorize.preserves, name, seeds=(1,))


def test_a_plain_recurrent_cell_becomes_one_op() -> None:
    graph = LOOPS["recurrence"]()
    short, records = PassPipeline.parse("vectorize,canonicalize").run(graph)
    assert [n.name for n in short.nodes if n.name in ("rnn", "matmul")] == ["rnn", "matmul"]
    assert any(f"{STEPS} steps of a recurrence became one rnn" in r.message for r in records[0].remarks)
    check_equal(graph, short, Vectorize.preserves, "recurrence", seeds=(1,))


def test_of_another_recurrence_the_products_with_inputs_and_of_outputs_are_one_each() -> None:
    graph = recurrence("silu", 32)
    short = PassPipeline.parse("vectorize,canonicalize").run(graph)[0]
    products = [n for n in short.nodes if n.name == "matmul"]
    assert len(products) == STEPS + 2
    assert {str(n.output.type) for n in products} == {"f32[n, 64, 32]", "f32[n, 32]", "f32[n, 64, 4]"}
    check_equal(graph, short, Vectorize.preserves, "recurrence", seeds=(1,))


def test_of_a_narrow_recurrence_everything_stays_where_its_rows_are() -> None:
    graph = recurrence("silu")
    result = Vectorize().run(graph, PassContext())
    assert result.graph is graph
    assert any(f"{STEPS} steps that look alike stay apart" in r.message for r in result.remarks if r.kind == "missed")


def test_time_grows_with_the_number_of_nodes() -> None:
    def loop(steps: int) -> Graph:
        b = GraphBuilder("loop")
        x = b.input("x", tensor("f32", ("n", steps)))
        parts = [b("slice", x, axis=1, start=i, stop=i + 1) for i in range(steps)]
        return b.finish([b("concat", *[b("exp", b("tanh", b("neg", p))) for p in parts], axis=1)])

    def seconds(steps: int) -> float:
        graph = loop(steps)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            assert len(Vectorize().run(graph, PassContext()).graph.nodes) <= 5
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(2000) < 40 * seconds(200)  # quadratic time would be 100 times


def test_it_is_in_the_default_pipeline_and_leaves_other_graphs_alone() -> None:
    assert "vectorize" in str(named_pipeline("default"))
    b = GraphBuilder("plain")
    x = b.input("x", tensor("f32", ("n", 8)))
    graph = b.finish([b("softmax", b("matmul", x, b.constant(np.ones((8, 3), np.float32))), axis=1)])
    assert Vectorize().run(graph, PassContext()).graph is graph
