"""Trees, forests, boosting and other ensembles: every decision as the library's, also at thresholds and for missing values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn import datasets, dummy, ensemble, linear_model, naive_bayes, neighbors, svm, tree

from mlec.errors import InputError, UnsupportedModelError

IRIS, KIND = datasets.load_iris(return_X_y=True)
NAMES = np.array(["a", "b", "c"])[KIND]
SUGAR, PROGRESS = (part[:200] for part in datasets.load_diabetes(return_X_y=True))
RNG = np.random.default_rng(0)


def with_gaps(x: np.ndarray, share: float = 0.15) -> np.ndarray:
    gappy = x.copy()
    gappy[RNG.random(x.shape) < share] = np.nan
    return gappy


CLASSIFIERS = [
    tree.DecisionTreeClassifier(random_state=0),
    tree.ExtraTreeClassifier(random_state=0),
    tree.DecisionTreeClassifier(max_depth=1, criterion="entropy"),
    ensemble.RandomForestClassifier(12, random_state=0),
    ensemble.ExtraTreesClassifier(7, max_depth=4, random_state=0),
    ensemble.GradientBoostingClassifier(n_estimators=8, random_state=0),
    ensemble.HistGradientBoostingClassifier(max_iter=12),
]
REGRESSORS = [
    tree.DecisionTreeRegressor(random_state=0),
    tree.ExtraTreeRegressor(random_state=0),
    ensemble.RandomForestRegressor(12, random_state=0),
    ensemble.ExtraTreesRegressor(7, random_state=0),
    ensemble.GradientBoostingRegressor(n_estimators=9, random_state=0),
    ensemble.GradientBoostingRegressor(loss="huber", n_estimators=6),
    ensemble.GradientBoostingRegressor(loss="quantile", n_estimators=6),
    ensemble.HistGradientBoostingRegressor(max_iter=12),
    ensemble.HistGradientBoostingRegressor(loss="poisson", max_iter=7),
    ensemble.HistGradientBoostingRegressor(loss="gamma", max_iter=7),
    ensemble.HistGradientBoostingRegressor(loss="absolute_error", max_iter=7),
    ensemble.HistGradientBoostingRegressor(loss="quantile", quantile=0.3, max_iter=7),
    ensemble.RandomForestRegressor(5, criterion="absolute_error", random_state=0),
]


@pytest.mark.parametrize("model", CLASSIFIERS, ids=str)
@pytest.mark.parametrize("target", [NAMES, KIND == 2], ids=["three", "two"])
def test_classifiers(lab: Any, model: Any, target: np.ndarray) -> None:
    compiled = lab.check(model.fit(IRIS, target), IRIS, IRIS + RNG.normal(0, 0.5, IRIS.shape))
    assert sum(node.name == "tree_ensemble" for node in compiled.executable.graph.nodes) == 1


@pytest.mark.parametrize("model", REGRESSORS, ids=str)
def test_regressors(lab: Any, model: Any) -> None:
    lab.check(model.fit(SUGAR, PROGRESS), SUGAR, SUGAR * 1.2)


@pytest.mark.parametrize("model", [m for m in CLASSIFIERS if "GradientBoostingClassifier(n" not in str(m)], ids=str)
def test_missing_values(lab: Any, model: Any) -> None:
    lab.check(model.fit(with_gaps(IRIS), NAMES), with_gaps(IRIS), IRIS)
    lab.check(model.fit(IRIS, NAMES), with_gaps(IRIS, 0.5))


def test_missing_values_under_constraints(lab: Any) -> None:
    """Monotonic trees cannot be fitted on NaN, but take it in prediction."""
    for model in (tree.DecisionTreeRegressor(max_depth=5), ensemble.RandomForestRegressor(4, random_state=0)):
        lab.check(model.set_params(monotonic_cst=[1, 0, -1, 0]).fit(IRIS, KIND), with_gaps(IRIS))


@pytest.mark.parametrize(
    "model",
    [ensemble.RandomForestClassifier(10, random_state=0), ensemble.RandomForestRegressor(10, random_state=0)],
    ids=str,
)
def test_values_at_thresholds(lab: Any, around_thresholds: Any, model: Any) -> None:
    """Thresholds lie in float64 between float32 values: rounding them to nearest would turn decisions over."""
    model.fit(SUGAR, (PROGRESS > 140) if "Classifier" in str(model) else PROGRESS)
    lab.check(model, around_thresholds(model, SUGAR))


def test_histogram_boosting_at_thresholds(lab: Any, around_thresholds: Any) -> None:
    model = ensemble.HistGradientBoostingRegressor(max_iter=10).fit(SUGAR, PROGRESS)
    nodes = np.concatenate([p.nodes[p.nodes["is_leaf"] == 0] for (p,) in model._predictors])
    splits = np.column_stack([nodes["feature_idx"].astype(float), nodes["num_threshold"]])
    rows = around_thresholds(model, SUGAR, splits=splits)
    lab.check(
        model,
        rows,
        np.where(RNG.random(rows.shape) < 0.2, np.inf, rows),
        np.where(RNG.random(rows.shape) < 0.2, -np.inf, rows),
    )


def test_large_numbers(lab: Any) -> None:
    """Seconds since 1970 differ by less than float32 can tell."""
    stamps = 1.7e9 + RNG.integers(0, 200, (150, 2)).astype(float)
    lab.check(ensemble.HistGradientBoostingClassifier(max_iter=5).fit(stamps, KIND), stamps, stamps + 0.5)
    lab.check(ensemble.RandomForestClassifier(5, random_state=0).fit(stamps, KIND), stamps, stamps + 0.5)


def test_numbers_beyond_float32_are_refused_as_by_the_library(lab: Any) -> None:
    model = tree.DecisionTreeClassifier().fit(IRIS, KIND)
    compiled = lab.compile(model)
    with pytest.raises(ValueError, match="too large"):
        model.predict(np.full((1, 4), 1e39))
    with pytest.raises(InputError, match="too large"):
        compiled.predict(np.full((1, 4), 1e39))


def test_several_outputs(lab: Any) -> None:
    labels = np.column_stack([NAMES, np.where(KIND == 1, "yes", "no")])
    targets = np.column_stack([PROGRESS, -(PROGRESS**2)])
    for model in (
        tree.DecisionTreeClassifier(max_depth=3),
        ensemble.RandomForestClassifier(5),
        ensemble.ExtraTreesClassifier(5),
    ):
        lab.check(model.fit(IRIS, labels), IRIS + 0.05)
    for model in (
        tree.DecisionTreeRegressor(max_depth=3),
        ensemble.RandomForestRegressor(5),
        tree.ExtraTreeRegressor(),
    ):
        lab.check(model.fit(SUGAR, targets), SUGAR * 1.1)


def test_trees_without_a_split(lab: Any) -> None:
    lab.check(tree.DecisionTreeClassifier().fit(IRIS, np.zeros(150, int)), IRIS)
    lab.check(tree.DecisionTreeRegressor().fit(IRIS, np.ones(150)), IRIS)
    lab.check(ensemble.HistGradientBoostingRegressor(max_iter=2).fit(IRIS[:10], np.arange(10.0)), IRIS)


@pytest.mark.parametrize("loss", ["log_loss", "exponential"])
@pytest.mark.parametrize(
    "init",
    [None, "zero", tree.DecisionTreeClassifier(max_depth=2), dummy.DummyClassifier()],
    ids=str,
)
def test_gradient_boosting_from_another_model(lab: Any, loss: str, init: Any) -> None:
    model = ensemble.GradientBoostingClassifier(loss=loss, init=init, n_estimators=5, random_state=0)
    lab.check(model.fit(IRIS, KIND == 1), IRIS * 1.01)
    if loss == "log_loss":
        lab.check(model.fit(IRIS, NAMES), IRIS * 1.01)


@pytest.mark.parametrize("init", [linear_model.LogisticRegression(), naive_bayes.GaussianNB()], ids=str)
def test_gradient_boosting_from_probabilities_of_float32_is_refused(lab: Any, init: Any) -> None:
    model = ensemble.GradientBoostingClassifier(init=init, n_estimators=2).fit(IRIS, KIND)
    with pytest.raises(UnsupportedModelError, match=f"init={type(init).__name__} .*float32"):
        lab.lower(model)


def test_gradient_boosting_regressor_from_another_model(lab: Any) -> None:
    model = ensemble.GradientBoostingRegressor(init=linear_model.Ridge(), n_estimators=5)
    lab.check(model.fit(SUGAR, PROGRESS), SUGAR * 1.1, rtol=1e-6)


def mixed_table() -> tuple[pd.DataFrame, np.ndarray]:
    frame = pd.DataFrame(
        {
            "size": RNG.normal(size=200),
            "town": pd.Categorical(RNG.choice(["Oslo", "Bergen", "Ålesund", "Bodø"], 200)),
            "rooms": RNG.integers(1, 6, 200),
        }
    )
    frame.loc[::17, "town"] = None
    frame.loc[::13, "size"] = np.nan
    return frame, frame["town"].cat.codes.to_numpy() % 2 + (frame["rooms"] > 3).to_numpy()


def test_histogram_boosting_on_categories(lab: Any) -> None:
    frame, target = mixed_table()
    for model in (
        ensemble.HistGradientBoostingClassifier(max_iter=8),
        ensemble.HistGradientBoostingRegressor(max_iter=8),
    ):
        model.set_params(categorical_features="from_dtype", min_samples_leaf=5).fit(frame, target)
        new = frame.copy()
        new["town"] = np.where(np.arange(200) % 5 == 0, "Narvik", new["town"].astype(object))
        lab.check(model, frame, new, frame[frame.columns[::-1]].assign(more=1))


def test_histogram_boosting_on_category_codes(lab: Any) -> None:
    x = np.column_stack([RNG.integers(0, 40, 300), RNG.normal(size=300)]).astype(float)
    y = (x[:, 0] % 3 == 0) + x[:, 1] * 0.1
    model = ensemble.HistGradientBoostingRegressor(categorical_features=[0], max_iter=10, min_samples_leaf=3).fit(x, y)
    fresh = x.copy()
    fresh[::4, 0] = [99, -1, np.nan] * 25
    lab.check(model, x, fresh)


@pytest.mark.parametrize(
    "model",
    [
        ensemble.BaggingClassifier(n_estimators=5, random_state=0),
        ensemble.BaggingClassifier(n_estimators=5, max_features=0.5, random_state=0),
        ensemble.BaggingClassifier(linear_model.LogisticRegression(), n_estimators=3, max_features=3, random_state=0),
        ensemble.BaggingClassifier(svm.LinearSVC(), n_estimators=3, random_state=0),
        ensemble.BaggingClassifier(n_estimators=6, max_samples=3, random_state=0),
        ensemble.AdaBoostClassifier(n_estimators=6, random_state=0),
        ensemble.AdaBoostClassifier(linear_model.LogisticRegression(), n_estimators=3, random_state=0),
    ],
    ids=lambda m: str(m).replace("\n", ""),
)
@pytest.mark.parametrize("target", [NAMES, KIND == 2], ids=["three", "two"])
def test_ensembles_of_classifiers(lab: Any, model: Any, target: np.ndarray) -> None:
    lab.check(model.fit(IRIS, target), IRIS + 0.03)


@pytest.mark.parametrize(
    "model",
    [
        ensemble.BaggingRegressor(n_estimators=5, random_state=0),
        ensemble.BaggingRegressor(neighbors.KNeighborsRegressor(3), n_estimators=3, max_features=0.5, random_state=0),
        ensemble.AdaBoostRegressor(n_estimators=7, random_state=0),
        ensemble.AdaBoostRegressor(linear_model.Ridge(), n_estimators=4, random_state=0),
    ],
    ids=lambda m: str(m).replace("\n", ""),
)
def test_ensembles_of_regressors(lab: Any, model: Any) -> None:
    lab.check(model.fit(SUGAR, PROGRESS), SUGAR * 1.1)


@pytest.mark.parametrize("options", [{}, {"max_features": 0.5}, {"contamination": 0.1}, {"max_samples": 20}], ids=str)
def test_isolation_forest(lab: Any, options: Any) -> None:
    model = ensemble.IsolationForest(n_estimators=15, random_state=0, **options).fit(IRIS)
    lab.check(model, IRIS, IRIS * 2, with_gaps(IRIS))


def test_isolation_forest_with_a_training_row_on_the_boundary(lab: Any) -> None:
    model = ensemble.IsolationForest(n_estimators=15, contamination=30 / 149, random_state=0).fit(IRIS)
    assert (model.decision_function(IRIS) == 0).any()
    lab.check(model, IRIS)


def test_unsupported_init_is_named(lab: Any) -> None:
    model = ensemble.GradientBoostingClassifier(init=dummy.DummyClassifier(strategy="uniform"), n_estimators=2).fit(
        IRIS, KIND
    )
    with pytest.raises(UnsupportedModelError, match="DummyClassifier"):
        lab.lower(model)
