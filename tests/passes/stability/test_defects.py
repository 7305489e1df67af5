"""Each planted defect is found, the witness shows it when it is run, and the stable rewrite mends it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

import mlec.ops
from mlec.ir import Graph, GraphBuilder, Value, run_graph, tensor, verify
from mlec.ir.op import Array
from mlec.passes.stability import CheckNumerics
from mlec.pipeline import PassContext, PassPipeline

assert mlec.ops.OPS
CLEAN_UP = PassPipeline.parse("infer-shapes,canonicalize,fold-constants,cse")
Built = Callable[[GraphBuilder, Value], Value]
Exact = Callable[[Array], Array]


def graph_of(formula: Built, dtype: str = "f32") -> Graph:
    b = GraphBuilder("planted")
    x = b.input("x", tensor(dtype, ("n", 6)))
    return CLEAN_UP.run(b.finish([formula(b, x)]))[0]


def findings_of(graph: Graph, **ranges: tuple[float, float]) -> list[Mapping[str, Any]]:
    result = CheckNumerics().run(graph, PassContext(given_ranges=ranges))
    assert result.graph is graph, "without stabilize the graph is as it was"
    return list(result.findings)


def witness_of(graph: Graph, finding: Mapping[str, Any]) -> list[Array]:
    return [np.array(finding["witness"][v.hint], v.type.dtype.numpy) for v in graph.inputs]


# -- formulas with a stable spelling -------------------------------------------------------------------------------------


def total(b: GraphBuilder, x: Value, keepdims: bool = True) -> Value:
    return b("sum", x, axes=(1,), keepdims=keepdims)


def mean(b: GraphBuilder, x: Value, keepdims: bool = False) -> Value:
    return b("mean", x, axes=(1,), keepdims=keepdims)


def by_hand_sigmoid(b: GraphBuilder, x: Value) -> Value:
    one = b.constant(1.0, dtype=x.type.dtype)
    return b("div", one, b("add", b("exp", b("neg", x)), 1.0))


def one_minus(b: GraphBuilder, x: Value) -> Value:
    return b("sub", b.constant(1.0, dtype=x.type.dtype), x)


def tanh_by_hand(b: GraphBuilder, x: Value) -> Value:
    up, down = b("exp", x), b("exp", b("neg", x))
    return b("div", b("sub", up, down), b("add", up, down))


def sum_of_squares(b: GraphBuilder, x: Value) -> Value:
    return total(b, b("mul", x, x), False)


def square(b: GraphBuilder, x: Value) -> Value:
    return b("mul", x, x)


def masked_terms(b: GraphBuilder, x: Value) -> Value:
    mask = b("cast", b("lt", reversed_columns(b, x), 1e9), dtype=x.type.dtype)  # of the sizes tried: all
    return b("mul", b("exp", x), mask)


def log_in_doubles(b: GraphBuilder, x: Value) -> Value:
    """``torch.log2``, as it is lowered."""
    log = b("log", b("cast", x, dtype="f64"))
    return b("cast", b("div", log, np.log(2)), dtype=x.type.dtype)


def softplus(x: Array) -> Array:
    return np.asarray(np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))))


def log_softmax(x: Array) -> Array:
    shifted = x - x.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))


def reversed_columns(b: GraphBuilder, x: Value) -> Value:
    return b("flip", x, axes=(1,))


@dataclass(frozen=True)
class Planted:
    rule: str
    formula: Built
    exact: Exact
    severity: str = "error"
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)


FORMULAS = {
    "softmax": Planted("softmax-by-hand", lambda b, x: b("div", b("exp", x), total(b, b("exp", x))), lambda x: np.exp(log_softmax(x))),
    "softmax, reshaped sum": Planted(
        "softmax-by-hand",
        lambda b, x: b("div", b("exp", x), b("reshape", total(b, b("exp", x), False), shape=(x.type.shape[0], 1))),
        lambda x: np.exp(log_softmax(x)),
    ),
    "softmax by a reciprocal": Planted(
        "softmax-by-hand",
        lambda b, x: b("mul", b("exp", x), b("div", b.constant(np.float32(1)), total(b, b("exp", x)))),
        lambda x: np.exp(log_softmax(x)),
    ),
    "softmax, masked": Planted(
        "softmax-by-hand",
        lambda b, x: b("div", masked_terms(b, x), total(b, masked_terms(b, x))), lambda x: np.exp(log_softmax(x)),
    ),
    "softmax with an offset": Planted(
        "softmax-by-hand", lambda b, x: b("div", b("exp", x), b("add", total(b, b("exp", x)), 1e-9)),
        lambda x: np.exp(log_softmax(x)) / (1 + 1e-9 * np.exp(log_softmax(x).max(1, keepdims=True) - x.max(1, keepdims=True))),
        ranges={"x": (-5.0, 200.0)},
    ),
    "log of the mean": Planted(
        "logsumexp-by-hand", lambda b, x: b("log", mean(b, b("exp", x))),
        lambda x: x.max(1) - log_softmax(x).max(1) - np.log(6),
    ),
    "logsumexp with an offset": Planted(
        "logsumexp-by-hand", lambda b, x: b("log", b("add", total(b, b("exp", x), False), 1e-9)),
        lambda x: np.logaddexp(x.max(1) - log_softmax(x).max(1), np.log(1e-9)),
    ),
    "log(exp(x) + exp(y))": Planted(
        "logaddexp-by-hand", lambda b, x: b("log", b("add", b("exp", x), b("exp", reversed_columns(b, x)))),
        lambda x: np.logaddexp(x, x[:, ::-1]),
    ),
    "logsumexp": Planted(
        "logsumexp-by-hand", lambda b, x: b("log", total(b, b("exp", x), False)), lambda x: x.max(1) - log_softmax(x).max(1)
    ),
    "log of softmax": Planted("log-of-softmax", lambda b, x: b("log", b("softmax", x, axis=1)), log_softmax),
    "log of softmax by hand": Planted(
        "log-of-softmax", lambda b, x: b("log", b("div", b("exp", x), total(b, b("exp", x)))), log_softmax
    ),
    "log of sigmoid": Planted("log-of-sigmoid", lambda b, x: b("log", b("sigmoid", x)), lambda x: -softplus(-x)),
    "log of sigmoid by hand": Planted("log-of-sigmoid", lambda b, x: b("log", by_hand_sigmoid(b, x)), lambda x: -softplus(-x)),
    "log of 1 - sigmoid": Planted(
        "log-of-one-minus-sigmoid", lambda b, x: b("log", one_minus(b, b("sigmoid", x))), lambda x: -softplus(x)
    ),
    "log of 1 - sigmoid by hand": Planted(
        "log-of-one-minus-sigmoid", lambda b, x: b("log", one_minus(b, by_hand_sigmoid(b, x))), lambda x: -softplus(x)
    ),
    "log1p of -sigmoid": Planted(
        "log-of-one-minus-sigmoid", lambda b, x: b("log1p", b("neg", b("sigmoid", x))), lambda x: -softplus(x)
    ),
    "log(1 - x)": Planted(
        "log-of-one-plus", lambda b, x: b("log", one_minus(b, x)), lambda x: np.log1p(-x), "warning", {"x": (0.0, 0.9)}
    ),
    "log((1 + x) / (1 - x))": Planted(
        "log-of-one-plus", lambda b, x: b("log", b("div", b("add", x, 1.0), one_minus(b, x))), lambda x: 2 * np.arctanh(x), "warning",
        {"x": (0.0, 0.9)},
    ),
    "log2(1 + x)": Planted(
        "log-of-one-plus", lambda b, x: log_in_doubles(b, b("add", x, 1.0)), lambda x: np.log1p(x) / np.log(2), "warning",
        {"x": (0.0, 1.0)},
    ),
    "log(1 - exp(-x))": Planted(
        "log-of-one-minus-exp", lambda b, x: b("log", one_minus(b, b("exp", b("neg", x)))),
        lambda x: np.where(x < 0.7, np.log(-np.expm1(-x)), np.log1p(-np.exp(-x))), "warning", {"x": (1e-12, 50.0)},
    ),
    "1 - exp(x)": Planted(
        "exp-minus-one", lambda b, x: one_minus(b, b("exp", x)), lambda x: -np.expm1(x), "warning", {"x": (-1.0, 1.0)}
    ),
    "1 - sigmoid": Planted("one-minus-sigmoid", lambda b, x: one_minus(b, b("sigmoid", x)), lambda x: 1 / (1 + np.exp(x)), "warning"),
    "softplus": Planted("softplus-by-hand", lambda b, x: b("log", b("add", b("exp", x), 1.0)), softplus),
    "softplus by log1p": Planted("softplus-by-hand", lambda b, x: b("log1p", b("exp", x)), softplus),
    "log(1 + x)": Planted("log-of-one-plus", lambda b, x: b("log", b("add", x, 1.0)), np.log1p, "warning", {"x": (0.0, 1.0)}),
    "exp(x) - 1": Planted("exp-minus-one", lambda b, x: b("sub", b("exp", x), 1.0), np.expm1, "warning", {"x": (-1.0, 1.0)}),
    "tanh": Planted("tanh-by-hand", tanh_by_hand, np.tanh),
    "exp(x) / (1 + exp(x))": Planted(
        "sigmoid-by-hand", lambda b, x: b("div", b("exp", x), b("add", b("exp", x), 1.0)), lambda x: 1 / (1 + np.exp(-x))
    ),
    "E[x^2] - E[x]^2": Planted(
        "variance-of-squares",
        lambda b, x: b("sub", mean(b, b("mul", x, x)), b("mul", mean(b, x), mean(b, x))),
        lambda x: x.var(1), "warning",
    ),
    "sum of squares - square of sums": Planted(
        "variance-of-squares",
        lambda b, x: b(
            "sub", b("div", total(b, b("mul", x, x), False), 6.0), b("pow", b("div", total(b, x, False), 6.0), 2.0)
        ),
        lambda x: x.var(1), "warning",
    ),
    "sums, by n - 1": Planted(
        "variance-of-squares",
        lambda b, x: b("div", b("sub", sum_of_squares(b, x), b("mul", square(b, mean(b, x)), 6.0)), 5.0),
        lambda x: x.var(1, ddof=1), "warning",
    ),
    "sums, square over n": Planted(
        "variance-of-squares",
        lambda b, x: b("sub", sum_of_squares(b, x), b("div", square(b, total(b, x, False)), 6.0)),
        lambda x: 6 * x.var(1), "warning",
    ),
    "-E[x]^2 + E[x^2]": Planted(
        "variance-of-squares", lambda b, x: b("add", b("neg", square(b, mean(b, x))), mean(b, square(b, x))),
        lambda x: x.var(1), "warning",
    ),
    "E[xy] - E[x]E[y]": Planted(
        "covariance-of-products",
        lambda b, x: b("sub", mean(b, b("mul", x, reversed_columns(b, x))), b("mul", mean(b, x), mean(b, reversed_columns(b, x)))),
        lambda x: ((x - x.mean(1, keepdims=True)) * (x - x.mean(1, keepdims=True))[:, ::-1]).mean(1), "warning",
    ),
    "a^2 - b^2": Planted(
        "difference-of-squares",
        lambda b, x: b("sub", b("mul", x, x), b("mul", reversed_columns(b, x), reversed_columns(b, x))),
        lambda x: (x - x[:, ::-1]) * (x + x[:, ::-1]), "warning",
    ),
    "sqrt(x + 1) - sqrt(x)": Planted(
        "difference-of-roots", lambda b, x: b("sub", b("sqrt", b("add", x, 1.0)), b("sqrt", x)),
        lambda x: 1 / (np.sqrt(x + 1) + np.sqrt(x)), "warning", {"x": (0.0, 1e6)},
    ),
    "1 - cos(x)": Planted("one-minus-cos", lambda b, x: one_minus(b, b("cos", x)), lambda x: 2 * np.sin(x / 2) ** 2, "warning"),
}  # fmt: skip


@pytest.mark.parametrize("planted", FORMULAS.values(), ids=FORMULAS)
def test_a_formula_that_loses_the_result_is_found_shown_and_mended(planted: Planted) -> None:
    graph = graph_of(planted.formula)
    (finding,) = findings_of(graph, **planted.ranges)
    assert (finding["rule"], finding["severity"], finding["applied"]) == (planted.rule, planted.severity, False)

    inputs = witness_of(graph, finding)
    exact = planted.exact(inputs[0].astype(np.float64))
    error = off_by(run_graph(graph, inputs)[0], exact)
    if finding["error_before"] == "not finite":
        assert not np.isfinite(error)
    else:
        assert error == pytest.approx(finding["error_before"], rel=1e-3)
        assert error > 3e-4

    result = CheckNumerics(stabilize=True).run(graph, PassContext(given_ranges=planted.ranges))
    verify(result.graph)
    (rewritten,) = result.findings
    assert rewritten["applied"]
    assert any(remark.kind == "applied" and remark.rule == planted.rule for remark in result.remarks)
    assert off_by(run_graph(result.graph, inputs)[0], exact) <= max(1e-6, 2 * finding["error_after"])
    assert finding["error_after"] < 1e-5


@pytest.mark.parametrize("planted", FORMULAS.values(), ids=FORMULAS)
def test_a_rewrite_changes_nothing_where_nothing_was_lost(planted: Planted) -> None:
    graph = graph_of(planted.formula)
    stable = CheckNumerics(stabilize=True).run(graph, PassContext(given_ranges=planted.ranges)).graph
    assert stable is not graph
    x = np.random.default_rng(0).uniform(0.3, 0.9, (5, 6)).astype(np.float32)
    assert off_by(run_graph(stable, [x])[0], planted.exact(x.astype(np.float64))) < 1e-6
    PassPipeline([CheckNumerics(stabilize=True)], verify="numeric").run(graph)  # the pass keeps to what it declares


@pytest.mark.parametrize("planted", FORMULAS.values(), ids=FORMULAS)
def test_the_stable_spelling_is_no_finding(planted: Planted) -> None:
    graph = graph_of(planted.formula)
    stable = CheckNumerics(stabilize=True).run(graph, PassContext(given_ranges=planted.ranges)).graph
    assert [f for f in findings_of(stable, **planted.ranges) if f["severity"] != "note"] == []


def off_by(got: Array, exact: Array) -> float:
    """Largest error relative to the largest exact number; infinite where a number is lost."""
    if not np.isfinite(got).all():
        return float("inf")
    return float(np.max(np.abs(got - exact)) / np.max(np.abs(exact)))


def test_binary_cross_entropy_by_hand_needs_both_logarithms_mended() -> None:
    b = GraphBuilder("bce")
    x, y = b.input("x", tensor("f32", ("n", 3))), b.input("y", tensor("f32", ("n", 3)))
    p = b("sigmoid", x)
    one = b.constant(np.float32(1))
    loss = b("neg", b("add", b("mul", y, b("log", p)), b("mul", b("sub", one, y), b("log", b("sub", one, p)))))
    graph = CLEAN_UP.run(b.finish([loss]))[0]
    found = findings_of(graph, y=(0.0, 1.0))
    assert {f["rule"] for f in found} == {"log-of-sigmoid", "log-of-one-minus-sigmoid"}
    assert {f["severity"] for f in found} == {"error"}
    stable = CheckNumerics(stabilize=True).run(graph, PassContext()).graph
    far = np.array([[100, -100, 50]], np.float32)
    for target in (0.0, 1.0, 0.25):
        (got,) = run_graph(stable, [far, np.full((1, 3), target, np.float32)])
        assert np.allclose(got, softplus(far) - target * far, rtol=1e-6)


# -- hazards without a stable spelling -----------------------------------------------------------------------------------


def norm(b: GraphBuilder, x: Value) -> Value:
    return b("sqrt", total(b, b("mul", x, x)))


HAZARDS: dict[str, tuple[str, str, Built]] = {
    "x / |x|": ("division-by-zero", "warning", lambda b, x: b("div", x, b("abs", x))),
    "1 / (x - 3)": ("division-by-zero", "warning", lambda b, x: b("div", b.constant(np.float32(1)), b("sub", x, 3.0))),
    "x / sum(x)": ("division-by-zero", "warning", lambda b, x: b("div", x, total(b, x))),
    "x / norm": ("sqrt-near-zero", "warning", lambda b, x: b("div", x, norm(b, x))),
    "x * rsqrt": ("sqrt-near-zero", "warning", lambda b, x: b("mul", x, b("rsqrt", total(b, b("mul", x, x))))),
    "x / std": (
        "sqrt-near-zero",
        "warning",
        lambda b, x: b("div", x, b("sqrt", mean(b, squared_distance(b, x), True))),
    ),
    "sqrt(x)": ("sqrt-near-zero", "warning", lambda b, x: b("sqrt", x)),
    "log(x)": ("log-near-zero", "warning", lambda b, x: b("log", x)),
    "(x + 1e8) - 1e8": ("cancellation", "warning", lambda b, x: b("sub", b("add", x, 1e8), 1e8)),
    "(x * y + 1e6) - 1e6": ("cancellation", "warning", lambda b, x: b("sub", b("add", b("mul", x, x), 1e6), 1e6)),
    "x mod y": ("division-by-zero", "warning", lambda b, x: b("mod", x, reversed_columns(b, x))),
    "exp": ("exp-overflow", "note", lambda b, x: b("exp", x)),
    "exp / exp": ("exp-overflow", "error", lambda b, x: b("div", b("exp", x), b("exp", b("sub", x, 1.0)))),
}


def squared_distance(b: GraphBuilder, x: Value) -> Value:
    centred = b("sub", x, mean(b, x, True))
    return b("mul", centred, centred)


@pytest.mark.parametrize(("rule", "severity", "formula"), HAZARDS.values(), ids=HAZARDS)
def test_a_hazard_is_found_and_shown(rule: str, severity: str, formula: Built) -> None:
    graph = graph_of(formula)
    found = [f for f in findings_of(graph) if f["rule"] == rule]
    assert found
    assert found[0]["severity"] == severity
    (result,) = run_graph(graph, witness_of(graph, found[0]))
    if found[0]["error_before"] == "not finite":
        assert not np.isfinite(result).all()
    else:
        assert found[0]["error_before"] > 3e-4


@pytest.mark.parametrize("name", [n for n in HAZARDS if HAZARDS[n][0] != "cancellation" and n != "x / std"])
def test_within_ranges_in_which_nothing_happens_there_is_no_finding(name: str) -> None:
    assert findings_of(graph_of(HAZARDS[name][2]), x=(0.5, 0.75)) == []


def test_what_is_masked_is_no_finding() -> None:
    def guarded(b: GraphBuilder, x: Value) -> Value:
        zero = b.constant(np.float32(0))
        return b("where", b("ne", x, zero), b("div", x, b("abs", x)), x)

    assert findings_of(graph_of(guarded)) == []


def test_each_finding_is_shown_by_what_it_does_itself() -> None:
    """Defects of several outputs, and a harmless overflow beside a harmful one of the same output."""
    b = GraphBuilder("several")
    x, y = b.input("x", tensor("f32", ("n", 4))), b.input("y", tensor("f32", ("n", 4)))
    by_hand = b("div", b("exp", x), total(b, b("exp", x)))
    first = b("add", by_hand, by_hand_sigmoid(b, y))
    second = b("sub", mean(b, b("mul", x, x)), b("mul", mean(b, x), mean(b, x)))
    graph = CLEAN_UP.run(b.finish([first, second, b("exp", y)]))[0]
    names = [spec.name for spec in graph.signature.outputs]
    found = {f["rule"]: (f["severity"], f["shows"].split()[0]) for f in findings_of(graph)}
    assert found == {
        "softmax-by-hand": ("error", names[0]), "variance-of-squares": ("warning", names[1]), "exp-overflow": ("note", names[2]),
    }  # fmt: skip


def test_overflow_that_was_stated_to_occur_is_a_warning() -> None:
    (finding,) = findings_of(graph_of(lambda b, x: b("exp", x)), x=(0.0, 200.0))
    assert finding["severity"] == "warning"
    assert finding["ranges"] == "x in [0, 200] (given)"


# -- other element types -------------------------------------------------------------------------------------------------


def test_float64_is_compared_with_something_wider() -> None:
    def formula(b: GraphBuilder, x: Value) -> Value:
        return b("div", b("exp", x), total(b, b("exp", x)))

    (finding,) = findings_of(graph_of(formula, "f64"))
    assert (finding["rule"], finding["severity"]) == ("softmax-by-hand", "error")
    assert finding["error_after"] < 1e-12


def test_half_precision_overflows() -> None:
    found = findings_of(graph_of(lambda b, x: total(b, b("mul", x, x)), "f16"))
    assert {"fp16-overflow"} == {f["rule"] for f in found}
    # As the result is of half precision itself, and nobody said that such inputs occur:
    assert {f["severity"] for f in found} == {"note"}


def test_half_precision_inside_of_single_precision_overflows() -> None:
    def formula(b: GraphBuilder, x: Value) -> Value:
        half = b("cast", x, dtype="f16")
        return b("sqrt", b("cast", b("mul", half, half), dtype="f32"))

    found = {f["rule"]: f for f in findings_of(graph_of(formula))}
    assert found["fp16-overflow"]["severity"] == "error"


def test_half_precision_underflows() -> None:
    def formula(b: GraphBuilder, x: Value) -> Value:
        half = b("cast", x, dtype="f16")
        return b("mul", b("cast", b("mul", b("mul", half, 1e-4), 1e-4), dtype="f32"), 1e8)

    found = {f["rule"]: f for f in findings_of(graph_of(formula))}
    assert found["fp16-underflow"]["severity"] == "warning"


@pytest.mark.parametrize("op", ["mul", "sum", "cast"])
def test_integers_wrap_around(op: str) -> None:
    def formula(b: GraphBuilder, x: Value) -> Value:
        if op == "cast":
            return b("cast", x, dtype="i8")
        return b("mul", x, x) if op == "mul" else total(b, x)

    graph = graph_of(formula, "i32")
    (finding,) = findings_of(graph, x=(-(2.0**31), 2.0**31 - 1))
    assert (finding["rule"], finding["severity"], finding["op"]) == ("integer-overflow", "warning", op)
    (x,) = witness_of(graph, finding)
    (result,) = run_graph(graph, [x])
    wide = x.astype(np.int64)
    exact = {"mul": wide * wide, "sum": wide.sum(1, keepdims=True), "cast": wide}[op]
    assert (result != exact).any()


def test_what_follows_from_an_integer_that_wrapped_around_is_not_blamed() -> None:
    graph = graph_of(lambda b, x: square(b, square(b, x)), "i32")
    first, second = findings_of(graph, x=(0.0, 100_000.0))
    assert max(np.abs(first["witness"]["x"]).ravel()) ** 2 > 2**31
    assert max(np.abs(second["witness"]["x"]).ravel()) ** 2 < 2**31


def test_nor_is_what_follows_through_other_shapes() -> None:
    def formula(b: GraphBuilder, x: Value) -> Value:
        wrapped = b("reshape", square(b, x), shape=(*x.type.shape, 1))
        return b("reshape", square(b, b("neg", wrapped)), shape=x.type.shape)

    (finding,) = findings_of(graph_of(formula, "i32"), x=(50_000.0, 60_000.0))
    assert (finding["op"], finding["rule"]) == ("mul", "integer-overflow")


def test_integers_that_are_divided_by_zero() -> None:
    def formula(b: GraphBuilder, x: Value) -> Value:
        return b("floordiv", b.constant(np.int32(60)), x)

    (finding,) = findings_of(graph_of(formula, "i32"), x=(0.0, 9.0))
    assert (finding["rule"], finding["severity"], finding["shows"]) == (
        "division-by-zero",
        "warning",
        "60 is divided by 0",
    )
    assert findings_of(graph_of(formula, "i32"), x=(1.0, 9.0)) == []


def test_a_difference_that_is_small_but_never_zero_cancels_too() -> None:
    found = findings_of(graph_of(HAZARDS["(x + 1e8) - 1e8"][2]), x=(1.0, 1000.0))
    assert [f["rule"] for f in found] == ["cancellation"]


def test_integers_that_have_room_are_no_finding() -> None:
    assert findings_of(graph_of(lambda b, x: b("mul", x, x), "i32"), x=(-40_000.0, 40_000.0)) == []


def test_the_documentation_lists_every_finding() -> None:
    from pathlib import Path

    from mlec.passes.stability.rewrites import RULES

    root = Path(__file__).parents[3]
    text = (root / "docs" / "stability.md").read_text()
    rules = {rule.finding for rule in RULES} | {rule for rule, _, _ in HAZARDS.values()}
    assert [rule for rule in sorted(rules) if f"`{rule}`" not in text] == []
