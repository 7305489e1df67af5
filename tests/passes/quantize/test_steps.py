"""Constant factors before a quantisation."""

from __future__ import annotations

import numpy as np
import pytest

from mlec.ir import DType, Graph, GraphBuilder, apply_rules, run_graph, tensor
from mlec.passes.quantize.steps import RULES


def graph_of(op: str, factor: float, shared: bool = False) -> Graph:
    b = GraphBuilder()
    scaled = b(op, b.input("x", tensor("f32", ("n",))), factor)
    eight = b("quantize", scaled, scale=0.03, zero_point=7, dtype=DType.U8)
    return b.finish([eight, scaled] if shared else [eight])


@pytest.mark.parametrize(("op", "factor"), [("div", 6.0), ("mul", 1 / 3), ("div", 1e-3)])
def test_they_become_steps(op: str, factor: float) -> None:
    graph = graph_of(op, factor)
    found, _ = apply_rules(graph, RULES)
    assert [node.name for node in found.compute_nodes] == ["quantize"]
    x = np.append(np.random.default_rng(0).normal(scale=9, size=4000), [np.nan, np.inf, -np.inf, 0]).astype(np.float32)
    (got,), (wanted,) = (run_graph(g, [x]) for g in (found, graph))
    apart = np.abs(got.astype(int) - wanted)
    assert apart.max() <= 1  # where it lies between two of them
    assert (apart > 0).mean() < 0.002
    assert (apart[-4:] == 0).all()


@pytest.mark.parametrize("graph", [graph_of("div", 6.0, shared=True), graph_of("mul", -1.0), graph_of("mul", 0.0)])
def test_others_stay(graph: Graph) -> None:
    assert apply_rules(graph, RULES)[0] is graph
