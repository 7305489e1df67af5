"""The first seeds of each check; ``python -m tests.fuzz`` goes on from there."""

from __future__ import annotations

import numpy as np
import pytest

from mlec.ir import Graph, GraphBuilder, run_graph, verify
from mlec.passes.canonicalize import Canonicalize
from mlec.pipeline import PassContext, PassResult
from tests.fuzz.checks import CHECKS
from tests.fuzz.graphs import SOURCES, random_sample

AT_ONCE = 25


@pytest.mark.parametrize(
    ("check", "start"),
    [("passes", i) for i in range(0, 500, AT_ONCE)] + [("twins", i) for i in range(500, 1000, AT_ONCE)],
)
def test_random_graphs(check: str, start: int) -> None:
    for seed in range(start, start + AT_ONCE):
        defect = CHECKS[check](seed)
        assert defect is None, f"seed {seed}: {defect}"


@pytest.mark.parametrize("seed", range(20))
def test_compiled_graphs(seed: int) -> None:
    defect = CHECKS["compiled"](seed)
    assert defect is None, str(defect)


def test_graphs_are_valid_connected_and_of_every_op() -> None:
    seen: set[str] = set()
    sizes = []
    for seed in range(250):
        sample = random_sample(seed)
        verify(sample.graph)
        assert all(np.isfinite(y).all() for y in run_graph(sample.graph, sample.inputs) if y.dtype.kind == "f")
        seen |= {node.name for node in sample.graph.nodes}
        reading = [v for node in sample.graph.compute_nodes for v in node.inputs]
        sizes.append(sum(v in sample.graph.producer for v in reading))
    assert seen >= set(SOURCES)
    assert np.mean(sizes) > 5


def test_a_planted_defect_is_found_and_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every result of tanh is a little off after canonicalize."""

    def wrong(self: Canonicalize, graph: Graph, context: PassContext) -> PassResult:
        b = GraphBuilder(graph.name)
        b.adopt_interface(graph)
        for node in graph.nodes:
            b.keep(node)
            if node.name == "tanh":
                here = b.resolve(node.output)
                b.replace(here, b("mul", here, 1.5))
        return PassResult(b.finish(graph.outputs))

    monkeypatch.setattr(Canonicalize, "run", wrong)
    found = (CHECKS["twins"](seed) for seed in range(200))
    defect = next(defect for defect in found if defect is not None)
    reduced = defect.reduced()
    assert [node.name for node in reduced.compute_nodes] == ["tanh"]
