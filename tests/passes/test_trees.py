"""Passes on tree ensembles: no result may change by a bit, whatever number stands in the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlec.ir import Graph, GraphBuilder, Value, run_graph, tensor
from mlec.ir.op import Array
from mlec.ops.tree import DEFAULT_LEFT, NAN_IS_ZERO, OPERANDS, ZERO_IS_MISSING, sample_ensemble
from mlec.passes.trees import FoldIntoThresholds, MergeTrees, PruneTrees
from mlec.passes.trees.arrays import Trees
from mlec.passes.trees.columns import floats_of, keys_of
from mlec.pipeline import Pass, PassContext, PassResult

SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 1e-35, -1e-35, 1e30, 5e-324, 1e-45, 1e308, -1e308]


def ensemble(b: GraphBuilder, x: Value, operands: tuple[Array, ...], compare: str = "le") -> Value:
    return b("tree_ensemble", x, *map(b.constant, operands), compare=compare)


def stump(feature: Any, threshold: Any, dtype: str, flags: int = 0) -> tuple[Array, ...]:
    """One tree of one split for each pair: its result is a column of its own, 1 for left and 2 for right."""
    features, thresholds = np.broadcast_arrays(np.atleast_1d(feature), np.atleast_1d(threshold))
    count = len(features)
    return (
        features.astype(np.int32), thresholds.astype(dtype), ~(2 * np.arange(count, dtype=np.int32)),
        ~(2 * np.arange(count, dtype=np.int32) + 1), np.full(count, flags, np.uint8), np.zeros(0, np.int32),
        np.zeros((0, 0), np.int32), np.arange(count, dtype=np.int32), np.arange(count, dtype=np.int32),
        np.tile(np.asarray([[1.0], [2.0]], dtype), (count, 1)), np.zeros(count, dtype),
    )  # fmt: skip


def trees_in(graph: Graph) -> Trees:
    (node,) = (n for n in graph.nodes if n.name == "tree_ensemble")
    trees = Trees.of(node, graph)
    assert trees is not None
    return trees


def run(step: Pass, graph: Graph) -> PassResult:
    return step.run(graph, PassContext())


def rows_around(graphs: list[Graph], rng: np.random.Generator, rows: int = 200) -> list[Array]:
    """Inputs that hold each threshold of any of these graphs, the floats beside it, and all that is special."""
    found = [np.asarray(SPECIAL), rng.normal(size=50) * 3]
    for graph in graphs:
        for node in graph.nodes:
            if node.name == "tree_ensemble":
                t = graph.constant_value(node.inputs[2])
                assert t is not None
                with np.errstate(all="ignore"):
                    found += [t, np.nextafter(t, t.dtype.type(np.inf)), np.nextafter(t, t.dtype.type(-np.inf))]
    inputs = []
    for value in graphs[0].inputs:
        dtype = value.type.dtype.numpy
        with np.errstate(all="ignore"):
            numbers = np.concatenate([part.astype(dtype) for part in found])
        width = value.type.shape[1]
        assert isinstance(width, int)
        rows = max(rows, len(numbers))
        inputs.append(np.stack([rng.permutation(np.resize(numbers, rows)) for _ in range(width)], axis=1))
    return [array[: min(map(len, inputs))] for array in inputs]


def check_same(before: Graph, after: Graph, seed: int = 0) -> None:
    """Equal bit for bit."""
    inputs = rows_around([before, after], np.random.default_rng(seed))
    for a, b in zip(run_graph(before, inputs), run_graph(after, inputs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


# -- fold-into-thresholds --------------------------------------------------------------------------------------------

Step = Callable[[GraphBuilder, Value, np.random.Generator], Value]


def row(rng: np.random.Generator, value: Value, low: float = 0.3, high: float = 3.0) -> Array:
    """A constant for each column, of either sign."""
    width = value.type.shape[1]
    assert isinstance(width, int)
    return np.asarray(rng.uniform(low, high, width) * rng.choice([-1, 1], width), value.type.dtype.numpy)


def power(b: GraphBuilder, x: Value, rng: np.random.Generator) -> Value:
    """Yeo-Johnson, as scikit-learn computes it."""
    positive = b("ge", x, 0.0)
    exponent = np.abs(row(rng, x))
    lam = b("where", positive, b.constant(exponent), b.constant((2 - exponent).astype(exponent.dtype)))
    size = b("div", b("expm1", b("mul", lam, b("log1p", b("abs", x)))), lam)
    return b("where", positive, size, b("neg", size))


STEPS: dict[str, Step] = {
    "scale": lambda b, x, rng: b("mul", x, b.constant(row(rng, x))),
    "shift": lambda b, x, rng: b("sub", x, b.constant(row(rng, x))),
    "standard": lambda b, x, rng: b("div", b("sub", x, b.constant(row(rng, x))), b.constant(row(rng, x))),
    "min-max": lambda b, x, rng: b(
        "clip", b("add", b("mul", x, b.constant(row(rng, x))), b.constant(row(rng, x))), lo=0.0, hi=1.0
    ),
    "impute": lambda b, x, rng: b("where", b("isnan", x), b.constant(row(rng, x)), x),
    "narrow": lambda b, x, rng: b("cast", x, dtype="f32"),
    "widen": lambda b, x, rng: b("cast", x, dtype="f64"),
    "log1p": lambda b, x, rng: b("log1p", x),
    "log": lambda b, x, rng: b("log", x),
    "sqrt": lambda b, x, rng: b("sqrt", x),
    "binarize": lambda b, x, rng: b("cast", b("gt", x, b.constant(row(rng, x))), dtype=x.type.dtype),
    "missing": lambda b, x, rng: b("cast", b("isnan", x), dtype=x.type.dtype),
    "negate": lambda b, x, rng: b("neg", x),
    "relu": lambda b, x, rng: b("relu", x),
    "floor": lambda b, x, rng: b("floor", x),
    "maximum": lambda b, x, rng: b("maximum", b.constant(row(rng, x)), x),
    "power": power,
    "square": lambda b, x, rng: b("mul", x, x),
    "absolute": lambda b, x, rng: b("abs", x),
    "constant scale": lambda b, x, rng: b("mul", x, 0.0),
    "pick": lambda b, x, rng: b("gather", x, b.constant(rng.integers(0, 3, 3)), axis=-1),
    "rotate": lambda b, x, rng: b("concat", *(b("slice", x, axis=1, start=i, stop=i + 1) for i in (2, 0, 1)), axis=1),
}  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=4), st.sampled_from(["f32", "f64"]),
    st.sampled_from(["lt", "le"]), st.integers(0, 10_000), st.booleans(),
)  # fmt: skip
def test_whatever_is_folded_keeps_every_decision(
    steps: list[str], dtype: str, compare: str, seed: int, flagged: bool
) -> None:
    rng = np.random.default_rng(seed)
    b = GraphBuilder()
    x = b.input("x", tensor(dtype, ("n", 3)))
    made = x
    for name in steps:
        made = STEPS[name](b, made, rng)
    with np.errstate(all="ignore"):
        near = run_graph(b.finish([made]), [rng.normal(size=(6, 3)).astype(x.type.dtype.numpy)])[0]
    thresholds = np.concatenate([near.reshape(-1), [0.0, 1.0, 0.5, -1.0, np.inf, -np.inf]])
    flags = int(rng.integers(4)) if flagged else 0
    operands = stump(np.arange(len(thresholds)) % 3, thresholds, str(made.type.dtype.numpy), flags)
    graph = b.finish([ensemble(b, made, operands, compare)])
    result = run(FoldIntoThresholds(), graph)
    check_same(graph, result.graph, seed)
    if not result.remarks:  # the steps leave the rows as they are
        assert result.graph is graph
    elif result.remarks[0].kind == "applied":
        assert [n.name for n in result.graph.compute_nodes] == ["tree_ensemble"]


def test_ops_that_are_not_monotone_or_not_of_one_column_are_missed() -> None:
    def remark(make: Step) -> str:
        b = GraphBuilder()
        x = b.input("x", tensor("f32", ("n", 3)))
        graph = b.finish([ensemble(b, make(b, x, np.random.default_rng(0)), stump([0, 1, 2], 0.5, "float32"))])
        result = run(FoldIntoThresholds(), graph)
        assert result.graph is graph
        (found,) = result.remarks
        assert found.kind == "missed"
        return found.message

    weights = np.eye(3, dtype=np.float32)
    assert "monotone: mul" in remark(STEPS["square"])
    assert "not one interval" in remark(STEPS["absolute"])
    assert "no function of one column" in remark(
        lambda b, x, rng: b("mul", x, b("add", x, b("matmul", x, b.constant(weights))))
    )
    assert "computed anyway" in remark(
        lambda b, x, rng: b(
            "cast", b("matmul", b("cast", x, dtype="f64"), b.constant(weights.astype(np.float64))), dtype="f32"
        )
    )

    def with_truths(b: GraphBuilder, x: Value, rng: np.random.Generator) -> Value:
        numbers = b("slice", x, axis=1, start=0, stop=2, step=1)
        return b("concat", numbers, b("cast", b.input("k", tensor("bool", ("n", 1))), dtype="f32"), axis=1)

    assert remark(with_truths) == "column 2 is computed from bool, thresholds are f32 or f64"


def test_rows_that_others_read_stay() -> None:
    b = GraphBuilder()
    x = b.input("x", tensor("f32", ("n", 2)))
    scaled = b("mul", x, 2.0)
    graph = b.finish([ensemble(b, scaled, stump(0, 0.5, "float32")), b("exp", scaled)])
    result = run(FoldIntoThresholds(), graph)
    assert result.graph is graph
    assert result.remarks[0].message == "the preprocessed rows are needed anyway, by exp"


def test_a_falling_function_exchanges_the_sides() -> None:
    b = GraphBuilder()
    x = b.input("x", tensor("f64", ("n", 1)))
    graph = b.finish([ensemble(b, b("div", x, -3.0), stump(0, 1.0, "float64"))])
    folded = run(FoldIntoThresholds(), graph)
    assert "1 split with sides exchanged" in folded.remarks[0].message
    trees = trees_in(folded.graph)
    assert trees.threshold[0] == np.nextafter(-3.0, -4)  # -3 itself goes left, so what is below it goes right
    check_same(graph, folded.graph)


def test_a_wiggling_function_is_missed() -> None:
    """float32 logarithms as numpy computes them fall between some neighbours: found by trying the neighbours."""
    rng = np.random.default_rng(0)
    x = np.sort(rng.uniform(0.5, 2.0, 4_000_000).astype(np.float32))
    falls = np.flatnonzero(np.diff(np.log(x)) < 0)
    if not falls.size:
        pytest.skip("they rise steadily here")
    b = GraphBuilder()
    value = b.input("x", tensor("f32", ("n", 1)))
    threshold = np.log(x[falls[0] + 1])
    graph = b.finish([ensemble(b, b("log", value), stump(0, threshold, "float32", DEFAULT_LEFT))])
    result = run(FoldIntoThresholds(), graph)
    assert result.graph is graph
    assert "as it is computed" in result.remarks[0].message


@given(st.sampled_from([np.float32, np.float64]), st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_keys_are_in_the_order_of_floats(kind: Any, a: float, b: float) -> None:
    with np.errstate(over="ignore"):
        numbers = np.asarray([a, b], kind)
    keys = keys_of(numbers)
    assert (keys[0] < keys[1]) == (numbers[0] < numbers[1])
    np.testing.assert_array_equal(floats_of(keys, kind), numbers)
    (last,) = keys_of(np.asarray([np.inf], kind))
    np.testing.assert_array_equal(keys_of(np.nextafter(numbers, kind(np.inf))), np.minimum(keys + 1, last))


# -- prune-trees -----------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 100_000), st.sampled_from(["float32", "float64"]), st.sampled_from(["lt", "le"]), st.integers(1, 3)
)
def test_pruning_and_merging_keep_every_result(seed: int, dtype: str, compare: str, features: int) -> None:
    rng = np.random.default_rng(seed)
    operands = list(sample_ensemble(rng, dtype, trees=8, features=features, outputs=2))
    names = OPERANDS.split()[1:]
    if rng.random() < 0.7:  # thresholds that repeat, and such as nothing is below
        choices = np.asarray([-1, -1e-35, 0.0, -0.0, 1e-35, 1, 2, np.inf, -np.inf, np.nan], dtype)
        operands[1] = rng.choice(choices, len(operands[1]))
    if rng.random() < 0.5:
        operands[names.index("values")] = rng.choice(np.asarray([0.0, -0.0, 0.5, 1.0], dtype), (len(operands[9]), 1))
    if rng.random() < 0.3:
        operands[names.index("base")] = np.asarray([-0.0, 0.0], dtype)
    b = GraphBuilder()
    x = b.input("x", tensor(dtype.replace("float", "f"), ("n", features)))
    graph = b.finish([ensemble(b, x, tuple(operands), compare)])
    pruned = run(PruneTrees(), graph).graph
    merged = run(MergeTrees(), pruned).graph
    for a, c in ((graph, pruned), (pruned, merged)):
        check_same(a, c, seed)
        codes = [np.arange(-2, 66) + half for half in (0.0, 0.5)]
        table = rng.choice(np.concatenate([*codes, [np.nan]]), (100, features)).astype(dtype)
        for wanted, got in zip(run_graph(a, [table]), run_graph(c, [table]), strict=True):
            np.testing.assert_array_equal(wanted.view(np.uint8), got.view(np.uint8))
    assert not [r for r in run(PruneTrees(), pruned).remarks if r.kind == "applied"]
    assert not [r for r in run(MergeTrees(), merged).remarks if r.kind == "applied"]


def chain(
    thresholds: list[float], sides: str, flags: int | list[int] = 0, dtype: str = "float64", **given: Any
) -> tuple[Array, ...]:
    """One tree of feature 0 in which each split is the left or right child of the one before (``sides``)."""
    count = len(thresholds)
    inner = np.append(np.arange(1, count), ~0)
    other = ~np.arange(1, count + 1)
    left = np.asarray([side == "l" for side in sides + "l"])
    arrays = {
        "feature": np.zeros(count, np.int32), "threshold": np.asarray(thresholds, dtype),
        "left": np.where(left, inner, other).astype(np.int32), "right": np.where(left, other, inner).astype(np.int32),
        "flags": np.full(count, flags, np.uint8), "category": np.zeros(0, np.int32), "categories": np.zeros((0, 0), np.int32),
        "roots": np.zeros(1, np.int32), "output": np.zeros(1, np.int32),
        "values": np.arange(count + 1.0).reshape(-1, 1).astype(dtype), "base": np.zeros(1, dtype),
    }  # fmt: skip
    return tuple((arrays | given).values())


@pytest.mark.parametrize(
    ("thresholds", "sides", "flags", "left_over"),
    [
        ([5.0, 7.0], "l", 0, 1),  # NaN goes right at both, and so never comes to the second
        ([5.0, 7.0], "l", [DEFAULT_LEFT, 0], 2),  # it comes there, and goes another way than the numbers
        ([5.0, 7.0], "l", DEFAULT_LEFT, 1),
        ([5.0, 3.0], "r", 0, 1),
        ([5.0, 5.0], "l", DEFAULT_LEFT, 1),
        ([5.0, 3.0], "l", 0, 2),
        ([5.0, 3.0, 4.0], "lr", 0, 3),
        ([5.0, 3.0, 6.0], "lr", DEFAULT_LEFT, 2),
        ([-5.0, -3.0], "l", NAN_IS_ZERO, 1),
        ([1.0, 2.0], "l", ZERO_IS_MISSING | DEFAULT_LEFT, 1),
        ([-1.0, -2.0], "r", ZERO_IS_MISSING | DEFAULT_LEFT, 2),
        ([-1.0, -2.0], "r", ZERO_IS_MISSING, 1),
        ([np.nan, 2.0], "r", 0, 1),
        ([np.inf], "", DEFAULT_LEFT, 0),
        ([np.inf], "", 0, 1),
        ([np.nan], "", 0, 0),
    ],
)
def test_what_is_pruned(thresholds: list[float], sides: str, flags: int | list[int], left_over: int) -> None:
    b = GraphBuilder()
    x = b.input("x", tensor("f64", ("n", 1)))
    graph = b.finish([ensemble(b, x, chain(thresholds, sides, flags))])
    result = run(PruneTrees(), graph)
    assert trees_in(result.graph).nodes == left_over
    check_same(graph, result.graph)
    assert [r.message for r in result.remarks] == (
        [f"splits: {len(thresholds)} -> {left_over}, no row can take the other branches"]
        if left_over < len(thresholds)
        else []
    )


@pytest.mark.parametrize(
    ("sides", "second", "left_over"), [("l", 0b0111, 1), ("l", 0b0101, 2), ("r", 0b0010, 1), ("r", 0b1010, 2)]
)
def test_categories_that_cannot_come_are_pruned(sides: str, second: int, left_over: int) -> None:
    """The first split sends the codes 0, 1 and 2 left, of which the first two or three tell the second nothing."""
    b = GraphBuilder()
    x = b.input("x", tensor("f64", ("n", 1)))
    sets = np.asarray([[0b0111], [second]], np.int32)
    graph = b.finish([ensemble(b, x, chain([0, 0], sides, category=np.arange(2, dtype=np.int32), categories=sets))])
    result = run(PruneTrees(), graph)
    assert trees_in(result.graph).nodes == left_over
    table = np.concatenate([np.arange(-2, 40, 0.5), [np.nan, np.inf, -np.inf]]).reshape(-1, 1)
    np.testing.assert_array_equal(run_graph(graph, [table]), run_graph(result.graph, [table]))


# -- merge-trees -----------------------------------------------------------------------------------------------------


def merged_trees(operands: tuple[Array, ...], outputs: int = 1) -> tuple[Trees, list[str]]:
    b = GraphBuilder()
    x = b.input("x", tensor("f64", ("n", 2)))
    graph = b.finish([ensemble(b, x, operands)])
    result = run(MergeTrees(), graph)
    check_same(graph, result.graph)
    return trees_in(result.graph), [f"{r.kind}: {r.message}" for r in result.remarks]


def forest(
    *trees: tuple[list[float], list[float]], base: float = 0.0, output: list[int] | None = None
) -> tuple[Array, ...]:
    """Trees of splits of feature 0, each the left child of the one before, and their leaves: the last one's left, then the right ones."""
    columns: dict[str, list[Any]] = {"threshold": [], "left": [], "right": [], "values": [], "roots": []}
    for thresholds, values in trees:
        start, leaf = len(columns["threshold"]), len(columns["values"])
        columns["roots"].append(start if thresholds else ~leaf)
        for i in range(len(thresholds)):
            last = i == len(thresholds) - 1
            columns["left"].append(~leaf if last else start + i + 1)
            columns["right"].append(~(leaf + i + 1))
        columns["threshold"] += thresholds
        columns["values"] += values
    count = len(columns["threshold"])
    outputs = output or [0] * len(trees)
    return (
        np.zeros(count, np.int32), np.asarray(columns["threshold"], float), np.asarray(columns["left"], np.int32),
        np.asarray(columns["right"], np.int32), np.zeros(count, np.uint8), np.zeros(0, np.int32), np.zeros((0, 0), np.int32),
        np.asarray(columns["roots"], np.int32), np.asarray(outputs, np.int32), np.asarray(columns["values"]).reshape(-1, 1),
        np.full(max(outputs) + 1, base),
    )  # fmt: skip


SPLIT = ([1.0], [0.1, 0.3])
"""A tree whose values are rounded when they are summed."""


@pytest.mark.parametrize(
    ("trees", "base", "nodes", "left_over"),
    [
        ([([1.0], [0.1, 0.1]), SPLIT], 0.2, 1, 1),  # equal leaves; then the first tree is a constant
        ([([2.0, 1.0], [0.1, 0.3, 0.1])], 0.2, 1, 1),
        ([([2.0, 1.0], [0.1, 0.1, 0.3])], 0.2, 2, 1),
        ([([2.0, 1.0], [0.1] * 3), SPLIT], 0.2, 1, 1),
        ([([], [0.1]), SPLIT], 0.2, 1, 1),
        ([SPLIT, ([], [0.1])], 0.2, 1, 2),  # the sum of both is rounded in that order
        ([SPLIT, ([], [0.0])], 0.2, 1, 1),
        ([SPLIT, ([], [-0.0])], -0.0, 1, 1),
        ([([1.0], [-0.0, 1.5]), ([], [0.0])], -0.0, 1, 1),  # no sum is rounded
        ([([1.0], [-0.0, 0.1]), ([], [0.0])], -0.0, 1, 2),
        ([SPLIT, SPLIT], 0.2, 2, 2),
        ([([1.0], [0.25, 3.0]), ([2.0], [1.0, 0.5]), ([1.0], [0.25, 3.0])], 0.5, 2, 2),
        ([([1.0], [1.0, 0.0]), ([], [5.0])], 0.5, 1, 1),
        ([([], [0.1]), ([], [0.2])], 0.3, 0, 0),
        ([([1.0], [1e300, 0.0]), ([], [1.0])], 0.5, 1, 2),
        ([([1.0], [np.inf, 0.0]), ([], [1.0])], 0.5, 1, 2),
    ],
)
def test_which_trees_are_merged(
    trees: list[tuple[list[float], list[float]]], base: float, nodes: int, left_over: int
) -> None:
    merged, remarks = merged_trees(forest(*trees, base=base))
    assert (merged.nodes, len(merged.roots)) == (nodes, left_over)
    if any(not thresholds for thresholds, _ in trees) and left_over == len(trees):
        assert remarks == ["missed: 1 constant tree left in place in the sum, whose rounding depends on the order"]


def test_equal_trees_whose_sum_is_rounded_are_told_of() -> None:
    other = ([2.0], [0.1, 0.2])
    merged, remarks = merged_trees(forest(SPLIT, other, SPLIT, SPLIT, ([], [0.3])))
    assert len(merged.roots) == 5
    assert remarks == [
        "missed: 1 constant tree and 2 repeated trees left in place in the sum, whose rounding depends on the order"
    ]
    assert merged_trees(forest(SPLIT, other))[1] == []
    assert merged_trees(forest(SPLIT, SPLIT, output=[0, 1]))[1] == []


def test_constant_trees_of_another_column_do_not_wait() -> None:
    merged, _ = merged_trees(forest(SPLIT, ([], [0.1]), output=[0, 1]))
    assert len(merged.roots) == 1
    assert merged.base.tolist() == [0.0, 0.1]
