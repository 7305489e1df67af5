"""The parser refuses what the printer would not write, with line and column."""

from __future__ import annotations

import numpy as np
import pytest

from mlec.errors import ParseError
from mlec.ir import Location, parse_graph, parser, print_graph
from mlec.ir.parser import MAX_DEPTH

GOOD = """graph @mlp(%x: f32[n, 8]) -> (f32[n, 2]) {
  %w = constant {value = @w0} : f32[8, 2]
  %h = matmul(%x, %w) : f32[n, 2]  loc("model.py":12 in "layers.0")
  %y = relu(%h) : f32[n, 2]  loc("model.py":13, in "layers.1" rule "fuse")
  return %y
}"""
CONSTANTS = {"w0": np.ones((8, 2), np.float32)}


def test_round_trip_with_locations() -> None:
    graph = parse_graph(GOOD, CONSTANTS)
    assert print_graph(graph) == GOOD
    assert graph.nodes[1].loc == Location("model.py", 12, "layers.0")
    assert graph.nodes[2].loc.rule == "fuse"


def test_comments_and_white_space_are_free() -> None:
    text = GOOD.replace("  %h", "\n\n  // a product\n\t%h")
    assert print_graph(parse_graph(text, CONSTANTS)) == GOOD


@pytest.mark.parametrize(
    ("old", "new", "message", "line", "code"),
    [
        ("%h = matmul", "%x = matmul", "%x is bound twice", 3, "E_PARSE"),
        ("relu(%h)", "relu(%z)", "%z is used before it is bound", 4, "E_PARSE"),
        ("relu(%h)", "rellu(%h)", "there is no op 'rellu'", 4, "E_UNKNOWN_OP"),
        (
            "relu(%h) : f32[n, 2]",
            "relu(%h) : f32[n, 3]",
            r"relu gives \(f32\[n, 2\]\), the text says \(f32\[n, 3\]\)",
            4,
            "E_TYPE",
        ),
        ("matmul(%x, %w)", "matmul(%x)", "takes 2 operands, got 1", 3, "E_ARITY"),
        ("value = @w0", "value = @w1", "there is no constant @w1", 2, "E_CONSTANT"),
        ("f32[8, 2]\n", "f32[8, 3]\n", r"@w0 is f32\[8, 2\]", 2, "E_CONSTANT"),
        ("relu(%h)", "relu(%h) {size = 3}", "no attribute 'size'", 4, "E_ATTR"),
        ("-> (f32[n, 2])", "-> (f32[n, 9])", "the graph declares results", 6, "E_PARSE"),
        ("f32[n, 8]", "f99[n, 8]", "'f99' is not an element type", 1, "E_PARSE"),
        ("f32[n, 8]", "f32[n, 8*]", "is not a dim", 1, "E_PARSE"),
        ("f32[n, 8]", "f32[n, 999999999999999999]", "an extent must lie between", 1, "E_PARSE"),
        ("f32[n, 8]", f"f32[{1 << 40}, {1 << 40}]", "a tensor of more than", 1, "E_PARSE"),
        ("f32[n, 8]", f"f32[n, 0, {1 << 40}, {1 << 40}]", "a tensor of more than", 1, "E_PARSE"),
        ("f32[n, 8]", f"f32[{', '.join(['1'] * 33)}]", "a rank of more than 32", 1, "E_PARSE"),
        ("return %y", "return %y extra", "expected '}'", 5, "E_PARSE"),
        ("return %y\n}", "return %y\n} more", "text after the end", 6, "E_PARSE"),
        ("%y = relu", "%y ? relu", "unexpected character", 4, "E_PARSE"),
        ("graph @mlp", "graf @mlp", "expected 'graph'", 1, "E_PARSE"),
    ],
)
def test_errors_say_where_and_what(old: str, new: str, message: str, line: int, code: str) -> None:
    with pytest.raises(ParseError, match=message) as caught:
        parse_graph(GOOD.replace(old, new), CONSTANTS)
    assert caught.value.message.startswith(f"line {line},")
    assert caught.value.code == code


def test_every_truncation_is_a_parse_error() -> None:
    for end in range(len(GOOD) - 1):
        with pytest.raises(ParseError):
            parse_graph(GOOD[:end], CONSTANTS)


def test_the_number_of_nodes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parser, "MAX_NODES", 2)
    with pytest.raises(ParseError, match="more than 2 nodes"):
        parse_graph(GOOD, CONSTANTS)


@pytest.mark.parametrize("value", ["{}", "[{}]", "[[1], [{}]]"])
def test_nesting_is_bounded(value: str) -> None:
    text = "graph @a() -> () { return }"
    for _ in range(MAX_DEPTH + 5):
        text = f"graph @a() -> () {{ %v = fused {{body = {value.format(text)}}} : f32[1] return }}"
    with pytest.raises(ParseError, match="nested deeper"):
        parse_graph(text)


def test_lists_are_not_nested_without_an_end() -> None:
    with pytest.raises(ParseError, match="lists nested deeper"):
        parse_graph("graph @a() -> () { %v = fused {body = " + "[" * 5000)


def test_one_number_fills_no_memory() -> None:
    """Twice what is allowed together, though each of them is within it."""
    spread = f"constant {{value = 1.0}} : f32[{parser.MAX_SPREAD // 2 + 1}]"
    parse_graph(f"graph @a() -> () {{ %v = {spread} return }}")
    with pytest.raises(ParseError, match=r"line 2, .*more than 134217728 elements"):
        parse_graph(f"graph @a() -> () {{ %v = {spread}\n%w = {spread} return }}")


@pytest.mark.parametrize(
    ("extent", "why"),
    [
        ("*".join(["(a+b+c+d+e+f+g+h+i+j+k+l+m+o+p+q+r+s+t)"] * 6), "is no extent"),
        ("n*" + "*".join(["99999999999"] * 50), "more than 64 bits"),
        ("n*" + "9" * 5000, "more than 64 bits"),
    ],
)
def test_extents_do_not_grow_beyond_any_memory(extent: str, why: str) -> None:
    with pytest.raises(ParseError, match=rf"line 1, .*{why}"):
        parse_graph(f"graph @a(%x: f32[{extent}]) -> () {{ return }}")


def test_a_size_that_grows_beyond_any_memory_is_a_parse_error() -> None:
    """Each extent alone is within bounds; their product, which the rule of the op asks for, is not."""
    shape = ", ".join(["(a+b+c+d+e+f+g+h+i+j)*(k+l+m)"] * 6)
    with pytest.raises(ParseError, match="is no extent"):
        parse_graph(f"graph @a(%x: f32[{shape}]) -> () {{ %y = reshape(%x) {{shape = [n]}} : f32[n] return }}")
