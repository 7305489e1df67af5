"""The shared tree builder: exact rounding, dropped nodes, and refusal of what is no tree."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from mlec.errors import FrontendError
from mlec.frontends.trees import (
    DEFAULT_LEFT,
    MAX_CATEGORY_WORDS,
    Ensemble,
    category_words,
    round_threshold_down,
    round_threshold_up,
)
from mlec.ir import GraphBuilder, Location, run_graph, tensor, verify


def predict(trees: Ensemble, x: np.ndarray, compare: str = "le", base: list[float] | float = 0.0) -> np.ndarray:
    b = GraphBuilder("t")
    x_in = b.input("x", tensor(trees.threshold_dtype, ("n", trees.n_features)))
    value = trees.emit(b, x_in, compare=compare, base=base, location=Location(scope="trees"))
    graph = b.finish([value])
    verify(graph)
    assert all(node.loc.scope == "trees" for node in graph.nodes)
    return run_graph(graph, [x])[0]


@pytest.mark.parametrize("seed", range(3))
def test_rounding_keeps_every_comparison(seed: int) -> None:
    rng = np.random.default_rng(seed)
    t = np.concatenate(
        [rng.normal(size=500) * 10.0 ** rng.integers(-45, 39, 500), [0.0, -0.0, 1e300, -1e300, 1e-60, -1e-60, np.inf]]
    )
    down, up = round_threshold_down(t), round_threshold_up(t)
    assert down.dtype == up.dtype == np.float32
    with np.errstate(over="ignore"):
        near = t.astype(np.float32)
    for x in (
        near,
        np.nextafter(near, np.float32(-np.inf)),
        np.nextafter(near, np.float32(np.inf)),
        np.full_like(near, np.inf),
        -near,
    ):
        assert ((x <= down) == (x.astype(np.float64) <= t)).all()
        assert ((x < up) == (x.astype(np.float64) < t)).all()


def test_layout_and_sum() -> None:
    trees = Ensemble(2, 2, threshold_dtype="f32", value_dtype="f64")
    trees.add_tree(
        [2, -1, 1, -1, -1],
        [4, -1, 3, -1, -1],
        [0, 0, 1, 0, 0],
        [0.5, 0, 1.5, 0, 0],
        [0, 10, 0, 20, 30],
        flags=[1, 0, 0, 0, 0],
    )
    trees.add_tree([-1], [-1], [0], [0.0], [0.25], output=1)
    x = np.array([[0.5, 1.5], [0.5, 2.0], [0.6, 0.0], [np.nan, 0.0], [0.0, np.nan]], np.float32)
    assert predict(trees, x, base=[1.0, 2.0]).tolist() == [[11, 2.25], [21, 2.25], [31, 2.25], [11, 2.25], [21, 2.25]]


def test_pruned_nodes_are_dropped() -> None:
    trees = Ensemble(1, 1, threshold_dtype="f64", value_dtype="f64")
    trees.add_tree([1, -1, -1, 3, -1], [2, -1, -1, 4, -1], [0, 0, 0, 7, 0], np.zeros(5), np.arange(5.0))
    assert trees.operands()["feature"].tolist() == [0]
    assert predict(trees, np.array([[-1.0], [1.0]])).ravel().tolist() == [1, 2]


def test_what_stands_at_leaves_does_not_matter() -> None:
    trees = Ensemble(1, 1, threshold_dtype="f64", value_dtype="f64")
    trees.add_tree([1, -5, -1], [2, -99, 99], [0, -7, 7], [0.0, np.nan, np.nan], [np.nan, 1, 2])
    assert predict(trees, np.array([[0.0], [1.0]])).ravel().tolist() == [1, 2]


def test_category_sets() -> None:
    trees = Ensemble(1, 1, threshold_dtype="f64", value_dtype="f64")
    trees.add_tree(
        [1, -1, -1],
        [2, -1, -1],
        [0, 0, 0],
        np.zeros(3),
        [0, 1, 2],
        flags=DEFAULT_LEFT,
        categories={0: category_words([0, 31, 64])},
    )
    trees.add_tree([1, -1, -1], [2, -1, -1], [0, 0, 0], np.zeros(3), [0, 10, 20], categories={0: []})
    x = np.array([[0.0], [31], [32], [64], [95], [96], [1e9], [np.nan], [np.inf], [-1]])
    assert predict(trees, x).ravel().tolist() == [21, 21, 22, 21, 22, 22, 22, 21, 22, 22]


@pytest.mark.parametrize("codes", [[-1], [2**62], [32 * MAX_CATEGORY_WORDS]])
def test_codes_that_no_set_holds(codes: list[int]) -> None:
    with pytest.raises(FrontendError):
        category_words(codes)


def test_many_large_sets_are_refused_while_they_are_added() -> None:
    trees = Ensemble(1, 1, threshold_dtype="f64", value_dtype="f64")
    words = np.ones(1 << 20, np.uint32)
    stump: Any = [1, -1, -1], [2, -1, -1], [0, 0, 0], np.zeros(3), np.zeros(3)
    for _ in range(MAX_CATEGORY_WORDS // len(words)):
        trees.add_tree(*stump, categories={0: words})
    with pytest.raises(FrontendError, match="too large for a table"):
        trees.add_tree(*stump, categories={0: words})


def test_no_trees_is_the_base() -> None:
    trees = Ensemble(3, 2, threshold_dtype="f32", value_dtype="f32")
    assert predict(trees, np.zeros((4, 3), np.float32), base=[1, 2]).tolist() == [[1, 2]] * 4


@pytest.mark.parametrize(
    "change",
    [
        {"left": [0, -1, -1]},
        {"left": [3, -1, -1]},
        {"right": [1, -1, -1]},
        {"left": [1, 0, -1]},
        {"right": [-1, -1, -1]},
        {"feature": [2, 0, 0]},
        {"feature": [-1, 0, 0]},
        {"right": [2, -1]},
        {"threshold": [0.0]},
        {"values": np.zeros((3, 2))},
        {"output": 1},
        {"categories": {5: [1]}},
        {"left": [], "right": [], "feature": [], "threshold": [], "values": []},
    ],
    ids=str,
)
def test_refuses_what_is_no_tree(change: dict) -> None:
    whole = {
        "left": [1, -1, -1],
        "right": [2, -1, -1],
        "feature": [0, 0, 0],
        "threshold": np.zeros(3),
        "values": np.zeros(3),
    }
    trees = Ensemble(2, 1, threshold_dtype="f32", value_dtype="f32")
    trees.add_tree(**whole)
    with pytest.raises(FrontendError):
        trees.add_tree(**{**whole, **change})


def test_a_chain_of_a_million_nodes_is_read_quickly() -> None:
    count = 1_000_001
    inner = np.arange(0, count - 1, 2)
    left, right = np.full(count, -1), np.full(count, -1)
    left[inner], right[inner] = inner + 1, inner + 2
    trees = Ensemble(1, 1, threshold_dtype="f64", value_dtype="f64")
    start = time.process_time()
    trees.add_tree(left, right, np.zeros(count), np.zeros(count), np.zeros(count))
    assert time.process_time() - start < 30  # a step for each pair of nodes would take hours
    assert len(trees.operands()["feature"]) == len(inner)
