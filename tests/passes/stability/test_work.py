"""How much the search executes: it grows with the graph, and not with the graph times what is found in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from mlec.ir import Graph, GraphBuilder, Node, Value, run_graph, tensor
from mlec.ir.op import Array
from mlec.passes.stability import CheckNumerics, witnesses
from mlec.passes.stability.consequences import Consequences, positions
from mlec.passes.stability.wide import WideGraph
from mlec.pipeline import PassContext, PassResult


def softmaxes(blocks: int) -> Graph:
    """Residual softmaxes by hand: on large inputs each of them gives NaN."""
    b = GraphBuilder("softmaxes")
    h = b.input("x", tensor("f32", ("n", 6)))
    for _ in range(blocks):
        e = b("exp", h)
        h = b("add", h, b("div", e, b("sum", e, axes=(1,), keepdims=True)))
    return b.finish([h])


def variances(blocks: int) -> Graph:
    """Variances by squares, each of which loses other digits, and a division by zero at the end of them all."""
    b = GraphBuilder("variances")
    x = b.input("x", tensor("f32", ("n", 6)))
    total = b("abs", x)
    for block in range(blocks):
        h = b("add", x, float(block))
        mean = b("mean", h, axes=(1,), keepdims=True)
        total = b("add", total, b("sub", b("mean", b("mul", h, h), axes=(1,), keepdims=True), b("mul", mean, mean)))
        for _ in range(10):
            total = b("flip", total, axes=(1,))
    return b.finish([b("div", total, b("abs", x))])


def residuals(blocks: int) -> Graph:
    """Sums of numbers of any sign, each of which may cancel, and one that is divided by."""
    b = GraphBuilder("residuals")
    x = h = b.input("x", tensor("f32", ("n", 6)))
    weights = (np.eye(6) / 2).astype(np.float32)
    for _ in range(blocks):
        h = b("add", h, b("relu", b("matmul", h, b.constant(weights))))
    return b.finish([b("div", h, x)])


class Work:
    """Counts evaluations of nodes on wide operands, and which hazards were judged."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.evaluations = 0
        self.searches: list[witnesses.Search] = []
        evaluated, started = WideGraph.evaluated, witnesses.Search.__init__

        def counted(wide: WideGraph, node: Node, operands: Sequence[Array], bound: Mapping[str, int]) -> list[Array]:
            self.evaluations += 1
            return evaluated(wide, node, operands, bound)

        def seen(search: witnesses.Search, *args: Any) -> None:
            self.searches.append(search)
            started(search, *args)

        monkeypatch.setattr(WideGraph, "evaluated", counted)
        monkeypatch.setattr(witnesses.Search, "__init__", seen)

    def of(self, graph: Graph) -> tuple[int, PassResult]:
        self.evaluations = 0
        result = CheckNumerics().run(graph, PassContext())
        return self.evaluations, result


@pytest.mark.parametrize("model", [softmaxes, residuals])
def test_evaluations_grow_with_the_nodes_and_not_with_the_findings(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(monkeypatch)
    (few, _), (many, result) = (work.of(model(blocks)) for blocks in (30, 120))
    assert many < 6 * few
    if model is softmaxes:
        assert Counter(f["severity"] for f in result.findings) == {"error": 120}
    else:
        assert "division-by-zero" in {f["rule"] for f in result.findings}
        assert not result.remarks  # all were looked at


def test_what_is_followed_is_bounded_and_what_is_left_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(monkeypatch)
    graph = variances(90)
    result = CheckNumerics(effort=0.7).run(graph, PassContext())
    (search,) = work.searches
    most = 0.7 * (0.05 + 0.0005 * len(graph.nodes)) / 2e-5
    assert most <= search.followed < most + len(graph.nodes)  # the last one is followed to its end
    found = Counter((f["rule"], f["severity"]) for f in result.findings)
    assert found["division-by-zero", "warning"] == 1  # the other rule has its turn although it comes last
    shown, left = found["variance-of-squares", "warning"], found["variance-of-squares", "note"]
    assert shown > 30
    assert shown + left == 90
    assert all(f["witness"] for f in result.findings if f["severity"] == "warning")
    (remark,) = [remark for remark in result.remarks if not remark.rule]
    assert remark.kind == "missed"
    assert f"nothing is known of {left} places (variance-of-squares): not followed" in remark.message

    few = CheckNumerics().run(variances(20), PassContext())
    assert len(few.findings) > 15
    assert {f["severity"] for f in few.findings} == {"warning"}
    assert all(remark.rule for remark in few.remarks)


def test_what_follows_from_a_change_is_what_the_graph_gives_with_it() -> None:
    """Several users, several outputs, a change that a maximum hides, one that is remembered, and one of no effect."""
    b = GraphBuilder("several")
    x = b.input("x", tensor("f64", ("n", 3)))
    first = b("exp", x)
    second = b("mul", first, first)
    joined = b("add", second, b("maximum", first, 100.0))
    hidden = b("maximum", b("neg", first), 0.0)
    outputs = [b("tanh", joined), hidden, joined, b("neg", x)]
    graph = b.finish(outputs)
    wide = WideGraph(graph, np.dtype(np.float64))
    inputs = [np.array([[0.0, 1.0, 2.0]])]
    exact = wide.trace(inputs)
    consequences = Consequences(wide, positions(graph), inputs, exact)

    def expected(value: Value, array: Array) -> list[Array]:
        after = GraphBuilder("after")
        after.adopt_interface(graph)
        for node in graph.nodes:
            after.keep(node)
            if value in node.outputs:
                after.replace(value, after.constant(array))
        return run_graph(after.finish(graph.outputs), inputs)

    for value in (first, second, joined, hidden):
        for changed in (exact[value] + 1, np.full((1, 3), np.nan), np.array(exact[value])):
            for _ in range(2):
                got = consequences.of({value: changed})
                for output, array in zip(graph.outputs, expected(value, changed), strict=True):
                    np.testing.assert_array_equal(got.get(output, exact[output]), array)
                assert got.keys() <= set(graph.outputs[:3])

    before = len(consequences.evaluated)
    consequences.of({first: exact[first]})
    assert len(consequences.evaluated) == before  # nothing has changed
    consequences.of({joined: np.full((1, 3), np.nan)})
    assert len(consequences.evaluated) == before  # that is known
