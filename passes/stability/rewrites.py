"""Formulas that are right on paper and go wrong in floating point, each with the spelling that does not: one rule each.

A rule is found wherever its pattern matches; the pass applies it only when it is asked to. The docstring is the rewrite, ``name`` the
name of the finding, ``danger`` says what goes wrong.
"""

from __future__ import annotations

import math
from typing import ClassVar

from mlec.ir import AnyOf, Const, Graph, GraphBuilder, Match, Miss, Node, P, Rule, Value
from mlec.ir.dim import product
from mlec.passes.stability.intervals import is_bound_of


class StableRule(Rule):
    """A rewrite to a stable spelling.

    Attributes:
        finding: name of the finding, and of the rule in remarks.
        danger: what goes wrong with the pattern as it is, one sentence.
        stable: the stable spelling, for people.
    """

    finding: ClassVar[str]
    danger: ClassVar[str]
    stable: ClassVar[str]

    @property
    def name(self) -> str:
        return self.finding


class ElementRule(StableRule):
    """Of a function of the elements of ``x``: ones that broadcast the result to another shape are left alone."""

    def check(self, m: Match, graph: Graph) -> Miss | None:
        return None if m["x"].type == m.node.output.type else Miss()


def _is_shifted(x: Value, graph: Graph) -> bool:
    """Whether the largest element was subtracted before."""
    node = graph.producer.get(x)
    return node is not None and node.name == "sub" and is_bound_of(node.inputs[1], node.inputs[0], graph, ("max",))


def _one_axis(node: Node) -> int | None:
    """The axis of a reduction over one, else None."""
    axes = node.attrs["axes"]
    return axes[0] % node.inputs[0].type.rank if len(axes) == 1 else None


def _broadcasts_back(bound: Value, node: Node) -> bool:
    """Whether a value has the shape of a reduction's operand, with 1 for the axes that are gone."""
    shape = node.inputs[0].type.shape
    axes = {axis % len(shape) for axis in node.attrs["axes"]}
    kept = tuple(1 if axis in axes else extent for axis, extent in enumerate(shape))
    return (1,) * (len(shape) - bound.type.rank) + bound.type.shape == kept


def _softplus(b: GraphBuilder, x: Value) -> Value:
    """``log(1 + exp(x))`` as ``max(x, 0) + log1p(exp(-|x|))``."""
    return b("add", b("maximum", x, 0.0), b("log1p", b("exp", b("neg", b("abs", x)))))


def _log_add_exp(b: GraphBuilder, x: Value, y: Value) -> Value:
    """``log(exp(x) + exp(y))``, also where both are the same infinity, whose difference is none."""
    apart = b("where", b("eq", x, y), b.constant(0.0, dtype=x.type.dtype), b("sub", x, y))
    return b("add", b("maximum", x, y), b("log1p", b("exp", b("neg", b("abs", apart)))))


def _count(node: Node) -> int:
    """How many elements a reduction makes one of; 0 if that is not known."""
    shape = node.inputs[0].type.shape
    count = product(tuple(shape[axis] for axis in node.attrs["axes"]))
    return count if isinstance(count, int) else 0


class Softmax(StableRule):
    """exp(x) / sum(exp(x)) -> softmax(x)"""

    finding = "softmax-by-hand"
    danger = "exp overflows for large x, and all terms underflow to 0 / 0 for very negative x, since the largest x is not subtracted first"
    stable = "softmax(x)"
    pattern = P("div", P("exp", "x"), P("sum", P("exp", "x"), bind="sum"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        return self._check(m, m.node.inputs[1], graph)

    def _check(self, m: Match, divisor: Value, graph: Graph) -> Miss | None:
        total = m.nodes["sum"]
        fits = _one_axis(total) is not None and _broadcasts_back(divisor, total)
        return None if fits and not _is_shifted(m["x"], graph) else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("softmax", m["x"], axis=_one_axis(m.nodes["sum"]))


class SoftmaxReshaped(Softmax):
    """exp(x) / reshape(sum(exp(x))) -> softmax(x)"""

    pattern = P("div", P("exp", "x"), P("reshape|broadcast_to", P("sum", P("exp", "x"), bind="sum"), bind="view"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        view = m.nodes["view"]
        return self._check(m, view.output if view.name == "reshape" else view.inputs[0], graph)


class SoftmaxByReciprocal(Softmax):
    """exp(x) * (1 / sum(exp(x))) -> softmax(x)"""

    pattern = P("mul", P("exp", "x"), P("div", Const(1), P("sum", P("exp", "x"), bind="sum"), bind="inverse"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        return self._check(m, m.nodes["inverse"].output, graph)


class WeightedSoftmax(Softmax):
    """exp(x) * w / sum(exp(x) * w) -> e * w / sum(e * w), e = exp(x - max(x where w is not 0))"""

    danger = "exp overflows for large x, and all terms underflow to 0 / 0 for very negative x, since the largest x is not subtracted first"
    stable = "exp(x - max(x, of those that count)) * w / its sum"
    _terms = P("mul", P("exp", "x"), "w")
    pattern = P("div", _terms, P("sum", P("mul", P("exp", "x"), "w"), bind="sum"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        same = m["x"].type == m.node.output.type == m.nodes["sum"].inputs[0].type
        return super().check(m, graph) if same else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        x, w, axes = m["x"], m["w"], m.nodes["sum"].attrs["axes"]
        none = b.constant(-math.inf, dtype=x.type.dtype)
        counted = b("where", b("ne", w, b.constant(0.0, dtype=w.type.dtype)), x, none)
        terms = b("mul", b("exp", b("sub", counted, b("max", counted, axes=axes, keepdims=True))), w)
        return b("div", terms, b("sum", terms, axes=axes, keepdims=True))


class SoftmaxWithOffset(Softmax):
    """exp(x) / (sum(exp(x)) + c) -> e / (sum(e) + c * exp(-m)), e = exp(x - m), m the largest of x and log(c)"""

    danger = "exp overflows for large x and gives inf / inf, since the largest x is not subtracted first"
    stable = "exp(x - m) / (its sum + c * exp(-m)), m the largest of x and log(c)"
    pattern = P("div", P("exp", "x"), P("add", P("sum", P("exp", "x"), bind="sum"), Const(bind="c"), bind="divisor"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        positive = m.constants["c"].size == 1 and float(m.constants["c"].reshape(())) > 0
        return self._check(m, m.nodes["divisor"].output, graph) if positive else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        x, axes, c = m["x"], m.nodes["sum"].attrs["axes"], float(m.constants["c"].reshape(()))
        most = b("maximum", b("max", x, axes=axes, keepdims=True), math.log(c))
        terms = b("exp", b("sub", x, most))
        offset = b("mul", b("exp", b("neg", most)), c)
        return b("div", terms, b("add", b("sum", terms, axes=axes, keepdims=True), offset))


class LogSumExp(StableRule):
    """log(sum(exp(x))) -> logsumexp(x)"""

    finding = "logsumexp-by-hand"
    danger = (
        "exp overflows for large x, and log(0) is -inf for very negative x, since the largest x is not subtracted first"
    )
    stable = "logsumexp(x)"
    pattern = P("log", P("sum", P("exp", "x"), bind="sum"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        return Miss() if _is_shifted(m["x"], graph) else None

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        attrs = m.nodes["sum"].attrs
        return b("logsumexp", m["x"], axes=attrs["axes"], keepdims=attrs["keepdims"])


class LogMeanExp(LogSumExp):
    """log(mean(exp(x))) -> logsumexp(x) - log(n)"""

    stable = "logsumexp(x) - log(n)"
    pattern = P("log", P("mean", P("exp", "x"), bind="sum"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        return None if _count(m.nodes["sum"]) and not _is_shifted(m["x"], graph) else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("sub", super().rewrite(b, m, graph), math.log(_count(m.nodes["sum"])))


class LogSumExpWithOffset(LogSumExp):
    """log(sum(exp(x)) + c) -> max(s, log(c)) + log1p(exp(-|s - log(c)|)), s = logsumexp(x)"""

    danger = "exp overflows for large x, since the largest x is not subtracted first"
    stable = "logaddexp(logsumexp(x), log(c))"
    pattern = P("log", P("add", P("sum", P("exp", "x"), bind="sum"), Const(bind="c"), bind="total"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        c = m.constants["c"]
        fits = c.size == 1 and float(c.reshape(())) > 0 and m.nodes["sum"].output.type == m.nodes["total"].output.type
        return super().check(m, graph) if fits else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        total = super().rewrite(b, m, graph)
        return _log_add_exp(b, total, b.constant(math.log(float(m.constants["c"].reshape(()))), dtype=total.type.dtype))


class LogAddExp(StableRule):
    """log(exp(x) + exp(y)) -> max(x, y) + log1p(exp(-|x - y|))"""

    finding = "logaddexp-by-hand"
    danger = "exp overflows for large x or y, and log(0) is -inf where both are very negative"
    stable = "max(x, y) + log1p(exp(-|x - y|))"
    pattern = P("log", P("add", P("exp", "x"), P("exp", "y")))

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return _log_add_exp(b, m["x"], m["y"])


class LogSoftmax(StableRule):
    """log(softmax(x)) -> log_softmax(x)"""

    finding = "log-of-softmax"
    danger = "a probability that underflows to 0 gives -inf, although its logarithm is an ordinary number"
    stable = "log_softmax(x)"
    pattern = P("log", P("softmax", "x", bind="softmax"))

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("log_softmax", m["x"], axis=m.nodes["softmax"].attrs["axis"])


class LogSoftmaxByHand(LogSoftmax):
    """log(exp(x) / sum(exp(x))) -> log_softmax(x)"""

    pattern = P("log", P("div", P("exp", "x"), P("sum", P("exp", "x"), bind="sum"), bind="div"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        total = m.nodes["sum"]
        return None if _one_axis(total) is not None and _broadcasts_back(m.nodes["div"].inputs[1], total) else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("log_softmax", m["x"], axis=_one_axis(m.nodes["sum"]))


class LogSigmoid(ElementRule):
    """log(sigmoid(x)) -> -softplus(-x)"""

    finding = "log-of-sigmoid"
    danger = "sigmoid underflows to 0 for very negative x, whose logarithm is -inf; x itself would be close"
    stable = "min(x, 0) - log1p(exp(-|x|))"
    pattern = P("log", P("sigmoid", "x"))

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("neg", _softplus(b, b("neg", m["x"])))


class LogSigmoidByHand(LogSigmoid):
    """log(1 / (1 + exp(x))) -> -softplus(x)"""

    pattern = P("log", P("div", Const(1), P("add", P("exp", "x"), Const(1))))

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("neg", _softplus(b, m["x"]))


class LogOneMinusSigmoid(ElementRule):
    """log(1 - sigmoid(x)), log1p(-sigmoid(x)) -> -softplus(x)"""

    finding = "log-of-one-minus-sigmoid"
    danger = "sigmoid rounds to 1 for x of 17 and more in float32, and log(0) is -inf; -x itself would be close"
    stable = "-(max(x, 0) + log1p(exp(-|x|)))"
    pattern: ClassVar[P | AnyOf] = AnyOf(
        P("log", P("sub", Const(1), P("sigmoid", "x"))), P("log1p", P("neg", P("sigmoid", "x")))
    )

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("neg", _softplus(b, m["x"]))


class LogOneMinusSigmoidByHand(LogOneMinusSigmoid):
    """log(1 - 1 / (1 + exp(x))) -> -softplus(-x)"""

    pattern = P("log", P("sub", Const(1), P("div", Const(1), P("add", P("exp", "x"), Const(1)))))

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("neg", _softplus(b, b("neg", m["x"])))


class OneMinusSigmoid(ElementRule):
    """1 - sigmoid(x) -> sigmoid(-x)"""

    finding = "one-minus-sigmoid"
    danger = "sigmoid rounds to 1 for x of 17 and more in float32, and the difference to 0"
    stable = "sigmoid(-x)"
    pattern = P("sub", Const(1), P("sigmoid", "x"))

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("sigmoid", b("neg", m["x"]))


class Softplus(ElementRule):
    """log(1 + exp(x)) -> max(x, 0) + log1p(exp(-|x|))"""

    finding = "softplus-by-hand"
    danger = "exp overflows for large x, where the result is x, and 1 + exp(x) rounds to 1 for negative x"
    stable = "max(x, 0) + log1p(exp(-|x|))"
    pattern = P("log", P("add", P("exp", "x"), Const(1)))

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return _softplus(b, m["x"])


class Softplus1p(Softplus):
    """log1p(exp(x)) -> max(x, 0) + log1p(exp(-|x|))"""

    danger = "exp overflows for large x, where the result is x"
    pattern = P("log1p", P("exp", "x"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        """Of ``-|x|`` it is the stable spelling itself; where it is chosen for some elements only, those are the small ones."""
        inner = graph.producer.get(m["x"])
        users = graph.users.get(m.node.output, ())
        guarded = bool(users) and all(user.name == "where" for user in users)
        return Miss() if guarded or (inner is not None and _is_negative_size(graph, inner)) else None


def _is_negative_size(graph: Graph, node: Node) -> bool:
    inner = graph.producer.get(node.inputs[0]) if node.name == "neg" else None
    return inner is not None and inner.name == "abs"


class Log1p(StableRule):
    """log(1 + x) -> log1p(x), log(1 - x) -> log1p(-x)"""

    finding = "log-of-one-plus"
    danger = "1 + x loses the digits of a small x: the logarithm comes out as 0 where it is close to x"
    stable = "log1p(x)"
    _sum = AnyOf(P("add", "x", Const(1)), P("sub", Const(1), "x", bind="minus"))
    pattern: ClassVar[P | AnyOf] = P(
        "log", AnyOf(_sum, P("cast", _sum))
    )  # torch computes log2 and log10 of floats in a wider type

    def check(self, m: Match, graph: Graph) -> Miss | None:
        x = m["x"].type
        return None if x.dtype.is_float and x.shape == m.node.output.type.shape else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        x, dtype = m["x"], m.node.output.type.dtype
        x = b("neg", x) if "minus" in m.nodes else x
        return b("log1p", x if x.type.dtype is dtype else b("cast", x, dtype=dtype))


class LogRatio(Log1p):
    """log((1 + x) / (1 - x)) -> log1p(x) - log1p(-x)"""

    danger = "1 + x and 1 - x lose the digits of a small x: the logarithm comes out as 0 where it is close to 2 x"
    stable = "log1p(x) - log1p(-x)"
    pattern = P("log", P("div", P("add", "x", Const(1)), P("sub", Const(1), "x")))

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("sub", b("log1p", m["x"]), b("log1p", b("neg", m["x"])))


class LogOneMinusExp(ElementRule):
    """log(1 - exp(x)) -> log(-expm1(x)) where x > -log(2), else log1p(-exp(x))"""

    finding = "log-of-one-minus-exp"
    danger = "exp(x) rounds to 1 for a small x, and 1 - exp(x) to 1 for a very negative one: the logarithm is -inf or 0"
    stable = "log(-expm1(x)) where x > -log(2), else log1p(-exp(x))"
    pattern = P("log", P("sub", Const(1), P("exp", "x")))

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        x = m["x"]
        near, far = b("log", b("neg", b("expm1", x))), b("log1p", b("neg", b("exp", x)))
        return b("where", b("gt", x, -math.log(2)), near, far)


class Expm1(ElementRule):
    """exp(x) - 1 -> expm1(x)"""

    finding = "exp-minus-one"
    danger = "exp(x) rounds to 1 for a small x, and the difference to 0, where it is close to x"
    stable = "expm1(x)"
    pattern: ClassVar[P | AnyOf] = AnyOf(P("sub", P("exp", "x"), Const(1)), P("add", P("exp", "x"), Const(-1)))

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("expm1", m["x"])


class OneMinusExp(Expm1):
    """1 - exp(x) -> -expm1(x)"""

    stable = "-expm1(x)"
    pattern = P("sub", Const(1), P("exp", "x"))

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("neg", b("expm1", m["x"]))


class Tanh(ElementRule):
    """(exp(x) - exp(-x)) / (exp(x) + exp(-x)) -> tanh(x)"""

    finding = "tanh-by-hand"
    danger = "exp overflows for large |x| and gives inf / inf, where the result is 1 or -1"
    stable = "tanh(x)"
    pattern = P(
        "div", P("sub", P("exp", "x"), P("exp", P("neg", "x"))), P("add", P("exp", "x"), P("exp", P("neg", "x")))
    )

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("tanh", m["x"])


class ExpRatio(ElementRule):
    """exp(x) / (1 + exp(x)) -> sigmoid(x)"""

    finding = "sigmoid-by-hand"
    danger = "exp overflows for large x and gives inf / inf, where the result is 1"
    stable = "sigmoid(x)"
    pattern = P("div", P("exp", "x"), P("add", P("exp", "x"), Const(1)))

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("sigmoid", m["x"])


def _scaled(total: P, name: str) -> AnyOf:
    """The total, or a multiple of it by a constant."""
    return AnyOf(total, P("div|mul", total, Const(bind=f"{name} constant"), bind=f"{name} scaled"))


class Covariance(StableRule):
    """mean(x * y) - mean(x) * mean(y) -> mean((x - mean(x)) * (y - mean(y))), also by sums"""

    finding = "covariance-of-products"
    danger = "two products cancel: where the means are large beside the spread, nothing but rounding is left"
    stable = "mean((x - mean(x)) * (y - mean(y)))"

    _of_products = _scaled(P("sum|mean", P("mul", "x", "y"), bind="xy"), "xy")
    _of_x, _of_y = _scaled(P("sum|mean", "x", bind="x"), "x"), _scaled(P("sum|mean", "y", bind="y"), "y")
    _product = _scaled(P("mul", _of_x, _of_y), "product")
    pattern = AnyOf(P("sub", _of_products, _product), P("add", _of_products, P("neg", _product)))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        totals = [m.nodes[name] for name in ("xy", "x", "y")]
        alike = len({(n.attrs["axes"], n.attrs["keepdims"]) for n in totals}) == 1 and m["x"].type == m["y"].type
        count = 1 if all(n.name == "mean" for n in totals) else _count(m.nodes["xy"])  # of means, it cancels
        factors = [_factor(m, name, count) for name in ("xy", "x", "y", "product")]
        if (
            not alike
            or not count
            or None in factors
            or m.nodes["xy"].output.type != m.node.output.type
            or not m["x"].type.dtype.is_float
        ):
            return Miss()
        of_products, of_x, of_y, scale = (float(f) for f in factors if f is not None)
        wanted = of_products / count
        return None if abs(of_x * of_y * scale - wanted) <= 1e-6 * wanted and self._is_of(m) else Miss()

    def _is_of(self, m: Match) -> bool:
        return m["x"] is not m["y"]

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        total = m.nodes["xy"]
        x, y = (b("sub", m[name], b("mean", m[name], axes=total.attrs["axes"], keepdims=True)) for name in ("x", "y"))
        result = b(total.op, b("mul", x, x if m["x"] is m["y"] else y), **total.attrs)
        scaled = m.nodes.get("xy scaled")
        return result if scaled is None else b(scaled.op, result, m["xy constant"])


def _factor(m: Match, name: str, count: int) -> float | None:
    """By what the sum is multiplied that a total is; None if that differs between its elements."""
    factor = 1 / count if name in m.nodes and m.nodes[name].name == "mean" and count else 1.0
    scaled = m.nodes.get(f"{name} scaled")
    if scaled is None:
        return factor
    constant = m.constants[f"{name} constant"]
    if constant.size != 1 or not float(constant.reshape(())):
        return None
    number = float(constant.reshape(()))
    return factor * number if scaled.name == "mul" else factor / number


class Variance(Covariance):
    """mean(x * x) - mean(x) ** 2 -> mean((x - mean(x)) ** 2), also by sums"""

    finding = "variance-of-squares"
    danger = "two squares cancel: where the mean is large beside the spread, nothing but rounding is left, which can be below 0"
    stable = "mean((x - mean(x)) ** 2)"

    def _is_of(self, m: Match) -> bool:
        return m["x"] is m["y"]


class DifferenceOfSquares(StableRule):
    """a * a - b * b -> (a - b) * (a + b)"""

    finding = "difference-of-squares"
    danger = "the squares are rounded before they cancel: where a and b are close, few digits are left"
    stable = "(a - b) * (a + b)"
    pattern = P("sub", P("mul", "a", "a"), P("mul", "b", "b"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        return None if m["a"].type.dtype.is_float else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("mul", b("sub", m["a"], m["b"]), b("add", m["a"], m["b"]))


class DifferenceOfRoots(ElementRule):
    """sqrt(x + c) - sqrt(x) -> c / (sqrt(x + c) + sqrt(x))"""

    finding = "difference-of-roots"
    danger = "two roots of nearly the same number cancel: where x is large beside c, few digits are left"
    stable = "c / (sqrt(x + c) + sqrt(x))"
    pattern = P("sub", P("sqrt", P("add", "x", Const(bind="c"))), P("sqrt", "x"))

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("div", m["c"], b("add", m.node.inputs[0], m.node.inputs[1]))


class OneMinusCos(ElementRule):
    """1 - cos(x) -> 2 * sin(x / 2) ** 2"""

    finding = "one-minus-cos"
    danger = "cos(x) rounds to 1 for a small x, and the difference to 0, where it is close to x ** 2 / 2"
    stable = "2 * sin(x / 2) ** 2"
    pattern = P("sub", Const(1), P("cos", "x"))

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        half = b("sin", b("mul", m["x"], 0.5))
        return b("mul", b("mul", half, half), 2.0)


RULES: tuple[StableRule, ...] = (
    # The larger patterns first: what they take is not looked at again.
    Variance(), Covariance(), LogSoftmaxByHand(), LogSoftmax(), LogSigmoidByHand(), LogSigmoid(), LogOneMinusSigmoidByHand(),
    LogOneMinusSigmoid(), OneMinusSigmoid(), LogSumExp(), LogMeanExp(), LogSumExpWithOffset(), LogAddExp(), LogOneMinusExp(), Softplus(),
    Softplus1p(), LogRatio(), Log1p(), Expm1(), OneMinusExp(), Tanh(), ExpRatio(), Softmax(), SoftmaxReshaped(), SoftmaxByReciprocal(),
    WeightedSoftmax(), SoftmaxWithOffset(), DifferenceOfSquares(), DifferenceOfRoots(), OneMinusCos(),
)  # fmt: skip
