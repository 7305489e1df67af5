"""infer-shapes: types from the inputs on, and errors that say where two extents come from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from mlec.errors import ParseError, PassError, TypeRuleError
from mlec.ir import Graph, GraphBuilder, Location, Node, Value, parse_graph, tensor, verify
from mlec.ir.dim import Dim, Proof, Ranges, SymDim, bounds, evaluate, parse_dim, proves_equal
from mlec.ir.op import lookup
from mlec.passes.infer_shapes import InferShapes
from mlec.pipeline import PassContext, PassPipeline
from mlec.signature import Signature, TensorSpec

N = SymDim.named("n")


def mismatch(ranges: dict[str, tuple[int, int | None]] | None = None, rows: str = "m") -> Graph:
    """An addition of [n, 6], which comes from weights [8, 6], and of [m, 5], which is cut out of an input: made without any check."""
    x, y = Value(tensor("f32", ("n", 8)), "x"), Value(tensor("f32", (rows, 9)), "y")
    weights, h, r = (Value(tensor("f32", s), name) for s, name in (((8, 6), "w"), (("n", 6), "h"), (("n", 6), "r")))
    cut, total = Value(tensor("f32", (rows, 5)), "cut"), Value(tensor("f32", ("n", 6)), "total")

    def node(op: str, inputs: Sequence[Value], output: Value, line: int, **attrs: object) -> Node:
        definition = lookup(op)
        return Node(definition, tuple(inputs), (output,), definition.complete_attrs(attrs), Location("model.py", line))

    nodes = (
        node("constant", [], weights, 1, value=0.5), node("matmul", [x, weights], h, 12), node("relu", [h], r, 13),
        node("slice", [y], cut, 20, axis=1, start=0, stop=5), node("add", [r, cut], total, 21),
    )  # fmt: skip
    specs = (TensorSpec("x", "f32", ("n", 8)), TensorSpec("y", "f32", (rows, 9)))
    signature = Signature(specs, (TensorSpec("total", "f32", ("n", 6)),), symbols=ranges or {})
    return Graph("mismatch", (x, y), nodes, (total,), {}, signature)


def failure(graph: Graph) -> TypeRuleError:
    with pytest.raises(TypeRuleError) as caught:
        InferShapes().run(graph, PassContext())
    return caught.value


def test_both_extents_are_traced_to_where_they_come_from() -> None:
    error = failure(mismatch())
    assert str(error.loc) == "model.py:21"
    assert error.notes[1:] == (
        "n, axis 0 of %r: f32[n, 6]: from relu at model.py:13 < matmul at model.py:12 < the input %x: f32[n, 8]",
        "m, axis 0 of %cut: f32[m, 5]: from slice at model.py:20 < the input %y: f32[m, 9]",
        "n and m may be equal or not: where they always are, give them one name",
    )
    error = failure(mismatch(rows="n"))
    assert error.notes[0] == "in %total = add(%r, %cut) : f32[n, 6]"
    assert error.notes[1:] == (
        "6, axis 1 of %r: f32[n, 6]: from relu at model.py:13 < matmul at model.py:12 < the constant %w: f32[8, 6]",
        "5, axis 1 of %cut: f32[n, 5]: from slice at model.py:20, which makes it of %y: f32[n, 9]",
        "6 is never 5",
    )


def test_ranges_of_the_signature_say_whether_they_can_be_equal() -> None:
    apart = failure(mismatch({"n": (2, 8), "m": (9, None)}))
    assert apart.notes[-1] == "n is never m, m being at least 9, n being 2 to 8"
    assert (
        failure(mismatch({"n": (2, 8), "m": (8, None)}))
        .notes[-1]
        .startswith("n and m may be equal or not, m being at least 8")
    )


def test_a_pipeline_shows_the_ways() -> None:
    with pytest.raises(PassError) as caught:
        PassPipeline([InferShapes()]).run(mismatch())
    assert "from slice at model.py:20 < the input %y" in str(caught.value)


def test_extents_are_those_of_two_operands() -> None:
    """The 16 that is not 12 is in the second one, although the first has one, too."""
    b = GraphBuilder()
    q, k = b.input("q", tensor("f32", ("n", 16, 12))), b.input("k", tensor("f32", ("n", 16, 20)))
    with b.at(Location("model.py", 3)):
        turned = b("exp", k)
    with pytest.raises(TypeRuleError) as caught:
        b("matmul", q, turned)
    assert caught.value.notes == (
        "12, axis 2 of %q: f32[n, 16, 12]: from the input %q: f32[n, 16, 12]",
        "16, axis 1 of f32[n, 16, 20]: from exp at model.py:3 < the input %k: f32[n, 16, 20]",
        "12 is never 16",
    )


def test_long_ways_are_cut_short() -> None:
    b = GraphBuilder()
    x, y = b.input("x", tensor("f32", ("n",))), b.input("y", tensor("f32", ("m",)))
    value = x
    for _ in range(30):
        value = b("exp", value)
    with b.at(Location("model.py", 7)), pytest.raises(TypeRuleError) as caught:
        b("add", value, y)
    assert caught.value.notes[0] == "n, axis 0 of f32[n]: from exp < exp < exp < 27 more < the input %x: f32[n]"
    assert str(caught.value.loc) == "model.py:7"


def test_text_says_so_too() -> None:
    text = """graph @bad(%x: f32[n, 8], %y: f32[m, 8]) -> (f32[n, 8]) {
      %h = relu(%y) : f32[m, 8]  loc("model.py":3)
      %z = mul(%x, %h) : f32[n, 8]
      return %z
    }"""
    with pytest.raises(ParseError) as caught:
        parse_graph(text)
    assert "m, axis 0 of %h: f32[m, 8]: from relu at model.py:3 < the input %y: f32[m, 8]" in str(caught.value)


def test_types_that_are_stated_wrong_are_inferred_anew() -> None:
    b = GraphBuilder()
    x = b.input("x", tensor("f32", ("n", 4)))
    graph = b.finish([b("relu", b("exp", x))])
    wrong = Value(tensor("f32", ("n", 3)), "h")
    first, second = graph.nodes
    nodes = (
        Node(first.op, first.inputs, (wrong,), first.attrs),
        Node(second.op, (wrong,), second.outputs, second.attrs),
    )
    stale = Graph("g", graph.inputs, nodes, graph.outputs)
    result = InferShapes().run(stale, PassContext())
    verify(result.graph)
    assert [r.message for r in result.remarks] == ["exp: f32[n, 3] is f32[n, 4]"]


@pytest.mark.parametrize(
    ("a", "b", "ranges", "proof"),
    [
        ("n", "n", {}, Proof.YES),
        ("n", "1", {}, Proof.UNKNOWN),
        ("n", "1", {"n": (2, None)}, Proof.NO),
        ("n", "m", {"n": (2, 8), "m": (9, 9)}, Proof.NO),
        ("n", "m", {"n": (2, 9), "m": (9, 9)}, Proof.UNKNOWN),
        ("2*n+1", "8", {"n": (0, 3)}, Proof.NO),
        ("(n+1)//2", "6", {"n": (0, 9)}, Proof.NO),
        ("n*m", "101", {"n": (0, 10), "m": (0, 10)}, Proof.NO),
        ("8-n", "0", {"n": (0, 7)}, Proof.NO),
        ("8-n", "0", {}, Proof.UNKNOWN),
    ],
)
def test_dims_within_ranges(a: str, b: str, ranges: Ranges, proof: Proof) -> None:
    assert proves_equal(parse_dim(a), parse_dim(b), ranges) is proof
    assert proves_equal(parse_dim(b), parse_dim(a), ranges) is proof


def test_bounds_hold() -> None:
    rng = np.random.default_rng(0)
    ranges = {"n": (1, 6), "m": (2, 5)}
    m = SymDim.named("m")
    made: list[Dim] = [N, m]
    for _ in range(200):
        x, y = (made[int(rng.integers(len(made)))] for _ in range(2))
        made.append(
            [x + y, x - y, x * int(rng.integers(-3, 4)), (x + 1) // int(rng.integers(1, 4))][int(rng.integers(4))]
        )
        if len(str(made[-1])) > 60:
            made.pop()
    for dim in made:
        low, high = bounds(dim, ranges)
        assert low is not None
        assert high is not None
        found = [evaluate(dim, {"n": i, "m": j}) for i in range(1, 7) for j in range(2, 6)]
        assert low <= min(found)
        assert max(found) <= high
