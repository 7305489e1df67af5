"""Ensembles that decide on numbers of too few digits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

import mlec
from mlec.ir import Graph, GraphBuilder, Value, run_graph, tensor
from mlec.passes.stability import CheckNumerics
from mlec.pipeline import PassContext


def stump(thresholds: Sequence[float], source: str, dtype: str, compare: str = "le") -> Graph:
    """One tree on the first of two features: a chain of splits, each the right child of the one before. Leaves are 0, 1, 2 ..."""
    b = GraphBuilder("stump")
    x = b.input("x", tensor(source, ("n", 2)))
    size = len(thresholds)
    numbers = b("cast", x, dtype=dtype) if source != dtype else x
    i32, values = np.int32, np.arange(size + 1, dtype=np.float32)[:, None]

    def constant(data: object, kind: type[np.generic]) -> Value:
        return b.constant(np.array(data, kind))

    operands = [
        constant([0] * size, i32), b.constant(np.array(thresholds, numbers.type.dtype.numpy)), constant([~i for i in range(size)], i32),
        constant([*range(1, size), ~size], i32), constant([0] * size, np.uint8), constant([-1] * size, i32),
        b.constant(np.zeros((0, 1), i32)), constant([0], i32), constant([0], i32), b.constant(values), b.constant(np.zeros(1, np.float32)),
    ]  # fmt: skip
    return b.finish([b("tree_ensemble", numbers, *operands, compare=compare)])


def findings_of(graph: Graph) -> list[Mapping[str, Any]]:
    return list(CheckNumerics().run(graph, PassContext()).findings)


@pytest.mark.parametrize("compare", ["le", "lt"])
def test_a_cast_before_the_splits_is_shown_by_a_number_beside_a_threshold(compare: str) -> None:
    graph = stump([0.1, 5.5], "f64", "f32", compare)
    (finding,) = findings_of(graph)
    assert (finding["rule"], finding["severity"]) == ("cast-before-split", "warning")
    x = np.array(finding["witness"]["x"])
    as_stated = run_graph(stump([float(np.float32(0.1)), float(np.float32(5.5))], "f64", "f64", compare), [x])[0]
    assert run_graph(graph, [x])[0] != as_stated


def test_thresholds_that_a_cast_made_equal_are_found() -> None:
    stamps = [1_600_000_000.0, 1_600_000_010.0, 1_600_000_020.0, 1_600_000_300.0, 1_600_000_400.0]
    assert len(set(np.array(stamps, np.float32).tolist())) < len(stamps)
    rules = {f["rule"]: f for f in findings_of(stump(stamps, "f64", "f32"))}
    assert rules.keys() == {"merged-thresholds", "cast-before-split"}
    assert "whole regions are lost" in rules["cast-before-split"]["message"]
    assert findings_of(stump(stamps, "f64", "f64")) == []


def test_thresholds_of_the_inputs_own_precision_are_no_finding() -> None:
    assert findings_of(stump([0.1, 0.2, 5.5], "f32", "f32")) == []


def test_an_estimator_that_was_fitted_on_less_than_its_table_holds_is_noted() -> None:
    sklearn_tree = pytest.importorskip("sklearn.tree")
    seconds = 1_600_000_000.0 + np.arange(0.0, 4000.0, 2)[:, None]
    labels = (np.arange(len(seconds)) // 64) % 2
    coarse = mlec.lower(sklearn_tree.DecisionTreeClassifier().fit(seconds, labels))
    (finding,) = findings_of(coarse)
    assert (finding["rule"], finding["severity"]) == ("cast-before-split", "note")
    row = np.array(finding["witness"]["X"])
    (near,) = row[0]
    assert np.float32(near) != near
    assert any(word in finding["shows"] for word in ("is 0 instead of 1", "is 1 instead of 0"))
    fine = mlec.lower(sklearn_tree.DecisionTreeClassifier().fit(seconds - 1.6e9, labels))
    assert findings_of(fine) == []
