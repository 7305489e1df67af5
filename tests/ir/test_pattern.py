from __future__ import annotations

from mlec.ir import AnyOf, Const, Graph, GraphBuilder, P, tensor
from mlec.ir.pattern import match


def graph(inverted: bool) -> Graph:
    """``x / sqrt(x + 2)``, or ``x * rsqrt(x)``."""
    b = GraphBuilder("g")
    x = b.input("x", tensor("f32", ("n", 3)))
    result = b("mul", b("rsqrt", x), x) if inverted else b("div", x, b("sqrt", b("add", x, 2.0)))
    return b.finish([result])


INSIDE = AnyOf(P("add", "x", Const(bind="eps")), "x")


def test_spellings_at_the_root_and_below() -> None:
    pattern = AnyOf(P("div", "x", P("sqrt", INSIDE)), P("mul", "x", P("rsqrt", INSIDE)))
    for inverted in (False, True):
        g = graph(inverted)
        m = match(pattern, g.nodes[-1], g)
        assert m is not None
        assert m["x"] is g.inputs[0]
        assert ("eps" in m.constants) is not inverted
        assert match(pattern, g.nodes[0], g) is None


def test_the_next_spelling_is_tried_where_a_later_part_does_not_fit() -> None:
    g = graph(False)
    (x,) = g.inputs
    m = match(P("div", AnyOf(P("exp", "x"), "y"), P("sqrt", AnyOf("y", P("add", "y", Const(2))))), g.nodes[-1], g)
    assert m is not None
    assert m["y"] is x
