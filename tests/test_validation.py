"""The comparison of a compiled model with its source finds what it should, and excuses only what it may."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from xgboost import XGBRegressor

import mlec
from mlec.validation import ESTIMATOR, TREES, compare, probe_inputs

X = np.arange(6.0)[:, None]
LABELS = np.array([0, 1, 0, 1, 0, 1])


class Answers:
    """A compiled model, as far as `compare` looks at one."""

    def __init__(self, labels: Any, proba: Any) -> None:
        self.predict = lambda table: np.asarray(labels)
        self.predict_proba = lambda table: np.asarray(proba)


def differing(proba: Any, mine: Any, tolerance: Any) -> Any:
    """The comparison of ``predict``, where the first label is another."""
    oracle = {"predict": lambda table: LABELS, "predict_proba": lambda table: np.asarray(proba)}
    found = compare(Answers(np.r_[1, LABELS[1:]], mine), oracle, [X], tolerance)  # type: ignore[arg-type]
    return next(c for c in found if c.method == "predict")


@pytest.mark.parametrize("tolerance", [TREES, ESTIMATOR])
def test_a_label_at_a_tie_is_excused_only_where_the_scores_differ_by_rounding(tolerance: Any) -> None:
    proba = np.tile([0.5, 0.5], (6, 1))
    assert differing(proba, proba, tolerance).label_mismatches == 1
    rounded = proba.copy()
    rounded[0] += [-(2.0**-53), 2.0**-53]
    found = differing(proba, rounded, tolerance)
    assert (found.label_mismatches, found.ties, found.excess) == (0, 1, 0.0)


def test_scores_further_apart_than_their_rounding_are_no_tie() -> None:
    proba = np.tile([0.5 + 1e-8, 0.5 - 1e-8], (6, 1))
    rounded = proba + np.array([-(2.0**-52), 2.0**-52])
    assert differing(proba, rounded, TREES).label_mismatches == 1
    assert differing(proba, rounded, TREES).excess == float("inf")


def test_probes_hold_every_threshold_and_both_floats_beside_it() -> None:
    rng = np.random.default_rng(0)
    data = rng.normal(size=(300, 2)).astype(np.float32)
    model = RandomForestClassifier(5, max_depth=5, random_state=0).fit(data, data[:, 0] > data[:, 1])
    graph = mlec.lower(model)
    (table,) = probe_inputs(graph, 4096) or [None]
    (node,) = (n for n in graph.nodes if n.name == "tree_ensemble")
    feature, threshold = (graph.constant_value(v) for v in node.inputs[1:3])
    assert feature is not None
    assert threshold is not None
    for column in (0, 1):
        exact = np.unique(threshold[feature == column])
        wanted = np.concatenate([exact, *(np.nextafter(exact, np.float32(s)) for s in (-np.inf, np.inf))])
        # A few rows are overwritten by NaN.
        assert np.isin(wanted, table[:, column].astype(np.float32)).mean() > 0.9
        assert np.isnan(table[:, column]).any()


def test_probes_hold_the_codes_of_category_sets_and_infinity() -> None:
    rng = np.random.default_rng(0)
    data = np.c_[rng.integers(0, 6, 300), rng.normal(size=300)]
    model = XGBRegressor(n_estimators=3, enable_categorical=True, feature_types=["c", "q"], max_cat_to_onehot=2)
    model.fit(data, (data[:, 0] % 2) + data[:, 1])
    (table,) = probe_inputs(mlec.lower(model)) or [None]
    assert set(range(6)) <= set(table[:, 0])
    assert np.isinf(table[:, 1]).any()
