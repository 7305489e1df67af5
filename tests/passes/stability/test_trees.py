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


def stump(thresholds: Sequence[float], source: str, dtype: str, compare: str = "le", compared: str = "") -> Graph:
    """One tree on the first of two features: a chain of splits, each the right child of the one before. Leaves are 0, 1, 2 ...

    Rows of ``source`` are cast to ``dtype``, and then to ``compared``, if that is given, in which the thresholds are.
    """
    b = GraphBuilder("stump")
    x = b.input("x", tensor(source, ("n", 2)))
    size = len(thresholds)
    numbers = b("cast", x, dtype=dtype) if source != dtype else x
    numbers = b("cast", numbers, dtype=compared) if compared else numbers
    i32, values = np.int32, np.arange(size + 1, dtype=np.float32)[:, None]

    def constant(data: object, kind: type[np.generic]) -> Value:
        return b.constant(np.array(data, kind))

    operands = [
        constant([0] * size, i32), b.constant(np.array(thresholds, numbers.type.dtype.numpy)), constant([~i for i in range(size)], i32),
        constant([*range(1, size), ~size], i32), constant([0] * size, np.uint8), constant([-1] * size, i32),
        b.constant(np.zeros((0, 1), i32)), constant([0], i32), constant([0], i32), b.constant(values), b.constant(np.zeros(1, np.float32)),
    ]  # fmt: skip
    return b.finish([b("tree_ensemble", numbers, *operands, compare=compare)])


STAMPS = [1_600_000_000.0, 1_600_000_010.0, 1_600_000_020.0, 1_600_000_300.0, 1_600_000_400.0]


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
    assert len(set(np.array(STAMPS, np.float32).tolist())) < len(STAMPS)
    (finding,) = findings_of(stump(STAMPS, "f64", "f32"))
    assert finding["rule"] == "cast-before-split"
    assert "whole regions are lost" in finding["message"]
    assert findings_of(stump(STAMPS, "f64", "f64")) == []


@pytest.mark.parametrize("compare", ["le", "lt"])
@pytest.mark.parametrize(
    ("source", "rules"), [("f64", {"merged-thresholds", "cast-before-split"}), ("f32", {"merged-thresholds"})]
)
def test_a_number_between_merged_thresholds_shows_them(source: str, rules: set[str], compare: str) -> None:
    """Both splits are on the way of a number of float64, of which none of float32 takes the leaf between them."""
    graph = stump(STAMPS, source, "f32", compare, compared="f64")
    found = {f["rule"]: f for f in findings_of(graph)}
    assert found.keys() == rules
    finding = found["merged-thresholds"]
    assert (finding["severity"], finding["message"].split(" can")[0]) == (
        "warning",
        "2 splits" if compare == "le" else "1 split",
    )
    x = np.array(finding["witness"]["x"])
    (in_double,) = run_graph(stump(STAMPS, "f64", "f64", compare), [x])[0].reshape(-1)
    every = (1.6e9 + np.arange(-300.0, 900.0))[:, None] * [1, 0]
    assert in_double in run_graph(stump(STAMPS, "f64", "f64", compare), [every])[0]
    assert in_double not in run_graph(graph, [every.astype(source.replace("f", "float"))])[0]
    apart = findings_of(stump([0.1, 0.2, 5.5], source, "f32", compare, compared="f64"))
    assert {f["rule"] for f in apart} == rules - {"merged-thresholds"}


def test_the_way_to_merged_thresholds_leads_through_other_features() -> None:
    """Of a tree whose first splits are on another feature, the witness has a number for that as well."""
    b = GraphBuilder("deep")
    x = b.input("x", tensor("f32", ("n", 2)))
    i32 = np.int32
    arrays = (
        np.array([1, 1, 0, 0], i32), np.array([-3.0, 7.0, 1.0, 1.00000001]), np.array([~0, 2, ~1, ~2], i32), np.array([1, ~4, 3, ~3], i32),
        np.zeros(4, np.uint8), np.full(4, -1, i32), np.zeros((0, 1), i32), np.array([0], i32), np.array([0], i32),
        np.arange(5.0)[:, None], np.zeros(1),
    )  # fmt: skip
    graph = b.finish([b("tree_ensemble", b("cast", x, dtype="f64"), *map(b.constant, arrays), compare="le")])
    (finding,) = findings_of(graph)
    row = finding["witness"]["x"][0]
    assert -3 < row[1] <= 7
    assert 1 < row[0] <= 1.00000001
    assert finding["shows"].endswith("instead of 2")
    assert "between the threshold 1.00000001 and" in finding["input"]


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
