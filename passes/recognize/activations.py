"""Activations that are spelled out. Their kernels take one approximation in place of several."""

from __future__ import annotations

import math
from typing import ClassVar

from mlec.ir import AnyOf, Const, Graph, GraphBuilder, Match, Miss, P, Rule, Value

ROOT_HALF = math.sqrt(0.5)
ROOT_TWO_OVER_PI = math.sqrt(2 / math.pi)
CUBIC = 0.044715


class _OfElements(Rule):
    """Shared: nothing broadcasts, and the numbers in the formula are those of the function.

    Attributes:
        numbers: what the constants of these names must be, up to their rounding.
    """

    rounds_once = True
    numbers: ClassVar[dict[str, float]] = {}

    def check(self, m: Match, graph: Graph) -> Miss | None:
        if m["x"].type != m.node.output.type or not m["x"].type.dtype.is_float:
            return Miss()
        for name, array in m.constants.items():
            if array.size != 1 or not math.isclose(float(array.reshape(())), self.numbers[name], rel_tol=1e-5):
                return Miss(f"the formula has {float(array.reshape(-1)[0]):g} in the place of {self.numbers[name]:g}")
        return None


class Sigmoid(_OfElements):
    """1 / (1 + exp(-x)) -> sigmoid(x)"""

    pattern = P("div", Const(1), P("add", P("exp", P("neg", "x")), Const(1)))

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("sigmoid", m["x"])


class Silu(_OfElements):
    """x / (1 + exp(-x)) -> silu(x)"""

    pattern = P("div", "x", P("add", P("exp", P("neg", "x")), Const(1)))

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("silu", m["x"])


def _half_times(factor: P) -> AnyOf:
    """``x * factor / 2`` in any order."""
    half = Const(0.5)
    halved = AnyOf(P("mul", "x", half), P("div", "x", Const(2)))
    whole = P("mul", "x", factor)
    return AnyOf(
        P("mul", halved, factor),
        P("mul", whole, half),
        P("div", whole, Const(2)),
        P("mul", "x", AnyOf(P("mul", factor, half), P("div", factor, Const(2)))),
    )


class Gelu(_OfElements):
    """x * (1 + erf(x / sqrt(2))) / 2 -> gelu(x), and NaN at minus infinity as the formula has it"""

    pattern = _half_times(
        P("add", P("erf", AnyOf(P("div", "x", Const(bind="root")), P("mul", "x", Const(bind="inverse")))), Const(1))
    )
    numbers: ClassVar[dict[str, float]] = {"root": 1 / ROOT_HALF, "inverse": ROOT_HALF}

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        lost = b("eq", m["x"], -math.inf)
        return b("where", lost, b.constant(math.nan, dtype=m["x"].type.dtype), b("gelu", m["x"]))


class GeluTanh(_OfElements):
    """x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x³))) / 2 -> gelu(x, approximate = "tanh")"""

    _square = P("mul", "x", "x")
    _cube = AnyOf(
        P("mul", P("mul", _square, "x"), Const(bind="cubic")),
        P("mul", P("mul", P("mul", "x", Const(bind="cubic")), "x"), "x"),
        P("mul", P("mul", _square, Const(bind="cubic")), "x"),
        P("mul", P("pow", "x", Const(3)), Const(bind="cubic")),
    )
    _factor = P(
        "add",
        AnyOf(P("mul", _square, Const(bind="cubic")), P("mul", P("mul", "x", Const(bind="cubic")), "x")),
        Const(1),
    )
    _inside = AnyOf(
        P("mul", P("add", "x", _cube), Const(bind="root")),
        P("mul", P("mul", "x", Const(bind="root")), _factor),
        P("mul", P("mul", "x", _factor), Const(bind="root")),
    )
    pattern = _half_times(P("add", P("tanh", _inside), Const(1)))
    numbers: ClassVar[dict[str, float]] = {"root": ROOT_TWO_OVER_PI, "cubic": CUBIC}

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("gelu", m["x"], approximate="tanh")


RULES: tuple[Rule, ...] = (Sigmoid(), Silu(), Gelu(), GeluTanh())
