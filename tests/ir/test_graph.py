"""Building, checking, running and rewriting graphs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from mlec.errors import InputError, TypeRuleError, VerifyError
from mlec.ir import (
    Const,
    DType,
    Graph,
    GraphBuilder,
    Location,
    Match,
    Miss,
    Node,
    P,
    Rule,
    TensorType,
    Value,
    apply_rules,
    lookup,
    run_graph,
    tensor,
    verify,
    violations,
)


def mlp() -> Graph:
    b = GraphBuilder("mlp")
    x = b.input("x", tensor("f32", ("n", 3)))
    w = b.constant(np.arange(6, dtype=np.float32).reshape(3, 2), "w")
    with b.at(Location("model.py", 7, "layer")):
        h = b("matmul", x, w)
    return b.finish([b("relu", b("add", h, -1.0))])


def test_derived_facts() -> None:
    graph = mlp()
    matmul, add, relu = graph.compute_nodes[0], graph.compute_nodes[-2], graph.compute_nodes[-1]
    assert [n.name for n in graph.compute_nodes] == ["matmul", "add", "relu"]
    assert graph.producer[add.output] is add
    assert graph.users[add.output] == (relu,)
    assert graph.use_count(relu.output) == 1
    assert graph.symbols == ("n",)
    assert graph.constants["w"].flags.writeable is False
    assert str(graph.cost.flops) == "16*n"
    assert matmul.loc.line == 7
    assert graph.signature.inputs[0].shape == ("n", 3)


def test_run_binds_symbols_and_checks_inputs() -> None:
    graph = mlp()
    for rows in (0, 1, 5):
        (y,) = run_graph(graph, [np.ones((rows, 3), np.float32)])
        assert y.shape == (rows, 2)
    with pytest.raises(InputError, match="axis 1: expected 3, got 4"):
        run_graph(graph, [np.ones((2, 4), np.float32)])
    with pytest.raises(InputError, match="takes float32, got float64"):
        run_graph(graph, [np.ones((2, 3))])
    with pytest.raises(InputError, match="expected 1 input, got 2"):
        run_graph(graph, [np.ones((2, 3), np.float32)] * 2)


def test_equal_structure_gives_equal_digests() -> None:
    assert mlp().digest == mlp().digest
    assert mlp().digest != apply_rules(mlp(), [AddAsSub()])[0].digest


def test_the_builder_refuses_ill_typed_nodes_and_says_where() -> None:
    b = GraphBuilder()
    x = b.input("x", tensor("f32", ("n", 3)))
    with b.at(Location("model.py", 9)), pytest.raises(TypeRuleError, match=r"do not broadcast") as caught:
        b("add", x, b.constant(np.ones(4, np.float32)))
    assert "model.py:9" in str(caught.value)
    with pytest.raises(TypeRuleError, match="one dtype"):
        b("add", x, b.constant(np.ones(3)))
    with pytest.raises(TypeRuleError, match="there is no op") as caught:
        b("matmull", x, x)
    assert "matmul" in str(caught.value.hint)


def test_unused_nodes_and_constants_are_dropped() -> None:
    b = GraphBuilder()
    x = b.input("x", tensor("f32", (2,)))
    b("add", x, b.constant(np.ones(2, np.float32), "unused"))
    graph = b.finish([b("neg", x)])
    assert [n.name for n in graph.nodes] == ["neg"]
    assert not graph.constants


def test_verify_collects_every_violation() -> None:
    x = Value(TensorType((3,), DType.F32), "x")
    y = Value(TensorType((4,), DType.F32), "y")
    stray = Value(TensorType((3,), DType.F32), "stray")
    nodes = (
        Node(lookup("relu"), (x,), (y,), {}, Location("m.py", 3)),
        Node(lookup("add"), (x, stray), (x,), {}),
        Node(lookup("softmax"), (x,), (Value(x.type),), {"axis": 5}),
    )
    graph = Graph("bad", (x,), nodes, (y, Value(x.type)))
    found = violations(graph)
    assert len(found) == 5
    for part in ("m.py:3", "bound twice", "used before it is bound", "axis 5 is out of range", "output 1 is not bound"):
        assert any(part in problem for problem in found), part
    with pytest.raises(VerifyError, match="5 problem"):
        verify(graph, after="my-pass")


class AddAsSub(Rule):
    """add(x, c) -> sub(x, -c)"""

    pattern = P("add", "x", Const(bind="c"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        return Miss("the constant is positive") if m.constants["c"].max() > 0 else None

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value | Sequence[Value]:
        return b("sub", m["x"], b.constant(-m.constants["c"]))


def test_rules_rewrite_locate_and_explain() -> None:
    graph = mlp()
    rewritten, edits = apply_rules(graph, [AddAsSub()])
    assert [n.name for n in rewritten.compute_nodes] == ["matmul", "sub", "relu"]
    assert [n.name for n in graph.compute_nodes] == ["matmul", "add", "relu"], "the old graph is what it was"
    x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
    np.testing.assert_array_equal(run_graph(graph, [x])[0], run_graph(rewritten, [x])[0])
    assert edits[0].applied
    assert "add(x, c) -> sub(x, -c)" in edits[0].message
    assert rewritten.compute_nodes[1].loc.rule == "AddAsSub"

    b = GraphBuilder()
    value = b.input("x", tensor("f32", (2,)))
    kept, edits = apply_rules(other := b.finish([b("add", value, 2.0)]), [AddAsSub()])
    assert kept is other
    assert not edits[0].applied
    assert edits[0].message.startswith("the constant is positive")


def test_patterns_match_commutative_operands_and_repeated_names() -> None:
    b = GraphBuilder()
    x = b.input("x", tensor("f32", (2,)))
    y = b.input("y", tensor("f32", (2,)))
    s = b("sigmoid", x)
    graph = b.finish([b("mul", s, x), b("mul", s, y)])
    from mlec.ir.pattern import match

    pattern = P("mul", "a", P("sigmoid", "a"))
    first, second = graph.compute_nodes[1:]
    found = match(pattern, first, graph)
    assert found is not None
    assert found["a"] is x
    assert match(pattern, second, graph) is None


def test_constants_of_one_hint_have_the_first_names_that_are_free() -> None:
    b = GraphBuilder()
    b.adopt_constants({"w": np.zeros(1), "w_1": np.zeros(1)})
    arrays = [np.full(2, i) for i in range(4)]
    outputs = [b.constant(array, "w") for array in arrays]
    constants = b.finish(outputs).constants
    assert list(constants) == ["w_0", "w_2", "w_3", "w_4"]
    assert [array[0] for array in constants.values()] == [0, 1, 2, 3]


def test_the_cost_of_a_graph_asks_each_node_once(monkeypatch: pytest.MonkeyPatch) -> None:
    b = GraphBuilder()
    x = b.input("x", tensor("f32", ("n", 3)))
    graph = b.finish([b("exp", b("add", x, 1.0))])
    asked: list[Node] = []
    cost = Node.cost.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(Node, "cost", property(lambda node: (asked.append(node), cost(node))[1]))
    assert graph.cost.flops == sum((cost(node).flops for node in graph.compute_nodes), start=0)
    assert asked == list(graph.compute_nodes)
