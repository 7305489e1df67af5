"""Casts in a row that are one, or none."""

from __future__ import annotations

from mlec.ir import DType, Graph, GraphBuilder, Match, Miss, P, Rule, Value


class DropWideningCast(Rule):
    """cast(cast(x, wider), dtype of x) -> x"""

    pattern = P("cast", P("cast", "x", bind="inner"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        start, middle, end = m["x"].type.dtype, m.nodes["inner"].output.type.dtype, m.node.output.type.dtype
        if start is not end:
            return Miss()
        return None if _holds(middle, start) else Miss("the cast in between loses bits")

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return m["x"]


def _holds(wide: DType, narrow: DType) -> bool:
    """Every value of ``narrow`` is one of ``wide``."""
    if narrow.is_bool:
        return True
    if narrow.is_float and wide.is_float:
        return (wide.eps <= narrow.eps and wide.bits > narrow.bits) or wide is narrow
    if narrow.is_int and wide.is_int:
        return wide.bits > narrow.bits
    return narrow.is_int and wide.is_float and narrow.bits <= {DType.F64: 32, DType.F32: 16}.get(wide, 8)


class MergeCasts(Rule):
    """cast(cast(x, wider)) -> cast(x)"""

    pattern = P("cast", P("cast", "x", bind="inner"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        start, middle, end = m["x"].type.dtype, m.nodes["inner"].output.type.dtype, m.node.output.type.dtype
        # What a float out of range becomes depends on the widths, and is not what an integer out of range wraps to.
        in_range = not end.is_int or _holds(end, start) or not (start.is_float or middle.is_float)
        return None if _holds(middle, start) and start is not end and in_range else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("cast", m["x"], dtype=m.node.output.type.dtype)


RULES: tuple[Rule, ...] = (DropWideningCast(), MergeCasts())
