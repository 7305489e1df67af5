"""Prices of computing a value where it is read, and that the pass states them."""

from __future__ import annotations

import pytest

from mlec.ir import Graph, GraphBuilder, Node, Value, tensor
from mlec.passes.fusion import FuseOperators
from mlec.passes.fusion.cost import Costs, Price
from mlec.pipeline import NOMINAL_EXTENT, PassContext, TargetFacts

N = NOMINAL_EXTENT


def pair(op: str, columns: int = 256) -> tuple[Graph, Node]:
    """A node between an input and another node."""
    b = GraphBuilder()
    x = b.input("x", tensor("f32", ("n", columns)))
    graph = b.finish([b("neg", b(op, x))])
    return graph, graph.nodes[0]


def price(graph: Graph, node: Node, times: float, kernels: int, target: TargetFacts | None = None) -> Price:
    return Costs(graph, target or TargetFacts()).price(node, times, kernels, (), node.output.type.shape)


def test_bytes_are_those_of_the_store_and_the_loads() -> None:
    graph, node = pair("exp")
    nbytes = node.output.type.nbytes
    assert price(graph, node, 1, 1).saved == nbytes * 2
    assert price(graph, node, 2, 2).saved == nbytes * 2  # a store and two loads less, one load of the operand more
    assert price(graph, node, 2, 2).repeated == 8 * N * 256
    assert str(price(graph, node, 1, 1)) == "2048*n bytes less to move"
    assert str(price(graph, node, 2, 2)) == f"2048*n bytes less to move, {8 * N * 256} operations more"


def test_dear_work_is_not_repeated_and_cheap_work_is() -> None:
    assert price(*pair("neg"), 2, 2).pays
    assert not price(*pair("sin"), 2, 2).pays
    assert price(*pair("sin"), 1, 1).pays
    graph, node = pair("gelu")
    assert [price(graph, node, times, 1).pays for times in (1, 3, 1000)] == [True, False, False]


def test_bytes_beyond_the_cache_count_more() -> None:
    graph, node = pair("tanh", 4096)
    small, large = (price(graph, node, 2, 2, TargetFacts(cache_bytes=size)) for size in (1 << 10, 1 << 30))
    assert small.cycles > large.cycles
    assert small.pays
    assert not large.pays


def sums(count: int) -> tuple[Graph, list[Node]]:
    """Many values that all wait for the last one, users first."""
    b = GraphBuilder()
    x = b.input("x", tensor("f32", ("n", 256)))
    values: list[Value] = []
    for _ in range(count):
        values.append(b("exp", values[-1] if values else x))
    total = values[0]
    for value in values[1:]:
        total = b("add", total, value)
    graph = b.finish([total])
    return graph, list(reversed(graph.nodes))


@pytest.mark.parametrize("count", [4, 12, 30])
def test_vectors_that_wait_are_counted(count: int) -> None:
    graph, members = sums(count)
    costs = Costs(graph, TargetFacts(vector_registers=16))
    assert costs.live(members) == count + 1
    chain, node = pair("exp")
    assert Costs(chain, TargetFacts()).live([chain.nodes[1], node]) == 2


def test_vectors_without_a_register_cost_a_store_and_a_load() -> None:
    graph, nodes = sums(18)
    few, many = (Costs(graph, TargetFacts(vector_registers=count)) for count in (8, 32))
    shape = nodes[0].output.type.shape
    dearer = 0.0
    for count in range(1, len(nodes)):
        prices = [costs.price(nodes[count], 1, 1, nodes[:count], shape) for costs in (few, many)]
        dearer += prices[1].cycles - prices[0].cycles
        assert prices[
            0
        ].pays  # what is stored for want of a register is next to the core; the value would be further away
    assert dearer == (19 - 8) * 2 * N * 256 / 8
    assert "19 live vectors in 8 registers" in str(prices[0])


def test_remarks_state_the_figures() -> None:
    b = GraphBuilder()
    x = b.input("x", tensor("f32", ("n", 256)))
    y = b("sin", x)
    graph = b.finish([b("sum", y, axes=(1,)), b("neg", b("abs", b("max", y, axes=(1,))))])
    remarks = FuseOperators().run(graph, PassContext(TargetFacts(row_programs=False))).remarks
    applied = [remark.message for remark in remarks if remark.kind == "applied"]
    missed = [remark.message for remark in remarks if remark.kind == "missed"]
    assert applied == ["one kernel: max + abs + neg, 16*n bytes less to move"]
    assert len(missed) == 2
    assert all("2 users, not all of them in the group; its 1024*n bytes are stored and loaded" in m for m in missed)
