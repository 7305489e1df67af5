"""Formulas that are right on paper and go wrong in floating point, each with the spelling that does not: one rule each.

A rule is found wherever its pattern matches; the pass applies it only when it is asked to. The docstring is the rewrite, ``name`` the
name of the finding, ``danger`` says what goes wrong.
"""

from __future__ import annotations

from typing import ClassVar

from mlec.ir import Const, Graph, GraphBuilder, Match, Miss, Node, P, Rule, Value
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
    """log(1 - sigmoid(x)) -> -softplus(x)"""

    finding = "log-of-one-minus-sigmoid"
    danger = "sigmoid rounds to 1 for x of 17 and more in float32, and log(0) is -inf; -x itself would be close"
    stable = "-(max(x, 0) + log1p(exp(-|x|)))"
    pattern = P("log", P("sub", Const(1), P("sigmoid", "x")))

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


class Log1p(ElementRule):
    """log(1 + x) -> log1p(x)"""

    finding = "log-of-one-plus"
    danger = "1 + x loses the digits of a small x: the logarithm comes out as 0 where it is close to x"
    stable = "log1p(x)"
    pattern = P("log", P("add", "x", Const(1)))

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("log1p", m["x"])


class Expm1(ElementRule):
    """exp(x) - 1 -> expm1(x)"""

    finding = "exp-minus-one"
    danger = "exp(x) rounds to 1 for a small x, and the difference to 0, where it is close to x"
    stable = "expm1(x)"
    pattern = P("sub", P("exp", "x"), Const(1))

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("expm1", m["x"])


class ExpPlusMinusOne(Expm1):
    """exp(x) + -1 -> expm1(x)"""

    pattern = P("add", P("exp", "x"), Const(-1))


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


class Variance(StableRule):
    """mean(x * x) - mean(x) ** 2 -> mean((x - mean(x)) ** 2)"""

    finding = "variance-of-squares"
    danger = "two squares cancel: where the mean is large beside the spread, nothing but rounding is left, which can be below 0"
    stable = "mean((x - mean(x)) ** 2)"
    pattern = P(
        "sub",
        P("mean", P("mul", "x", "x"), bind="squares"),
        P("mul", P("mean", "x", bind="mean"), P("mean", "x")),
    )

    def check(self, m: Match, graph: Graph) -> Miss | None:
        squares, mean = (m.nodes[name] for name in ("squares", "mean"))
        same = dict(squares.attrs) == dict(mean.attrs) and squares.output.type == m.node.output.type
        return None if same else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return self._variance(b, m["x"], m.nodes["squares"])

    def _variance(self, b: GraphBuilder, x: Value, squares: Node) -> Value:
        axes = squares.attrs["axes"]
        centred = b("sub", x, b("mean", x, axes=axes, keepdims=True))
        return b("mean", b("mul", centred, centred), axes=axes, keepdims=squares.attrs["keepdims"])


class VarianceOfSums(Variance):
    """sum(x * x) / n - (sum(x) / n) ** 2 -> mean((x - mean(x)) ** 2)"""

    pattern = P(
        "sub",
        P("div|mul", P("sum", P("mul", "x", "x"), bind="squares"), Const(bind="n"), bind="first"),
        P(
            "mul",
            P("div|mul", P("sum", "x", bind="mean"), Const(bind="m"), bind="second"),
            P("div|mul", P("sum", "x"), Const()),
        ),
    )

    def check(self, m: Match, graph: Graph) -> Miss | None:
        squares = m.nodes["squares"]
        shape = squares.inputs[0].type.shape
        count = 1.0
        for axis in squares.attrs["axes"]:
            extent = shape[axis]
            if not isinstance(extent, int):
                return Miss()
            count *= extent
        second = m.node.inputs[1]
        square = graph.producer[second]
        if square.inputs[0] is not square.inputs[1]:
            return Miss()
        for name, node in (("n", m.nodes["first"]), ("m", m.nodes["second"])):
            divisor = m.constants[name]
            wanted = count if node.name == "div" else 1 / count
            if divisor.size != 1 or abs(float(divisor.reshape(())) - wanted) > 1e-6 * wanted:
                return Miss()
        return super().check(m, graph)


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
    Variance(), VarianceOfSums(), LogSoftmaxByHand(), LogSoftmax(), LogSigmoidByHand(), LogSigmoid(), LogOneMinusSigmoidByHand(),
    LogOneMinusSigmoid(), OneMinusSigmoid(), LogSumExp(), Softplus(), Softplus1p(), Log1p(), Expm1(), ExpPlusMinusOne(), Tanh(), ExpRatio(),
    Softmax(), SoftmaxReshaped(), DifferenceOfSquares(), DifferenceOfRoots(), OneMinusCos(),
)  # fmt: skip
