"""Every supported class offers the methods of its source, and a model that lacks one says so."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import numpy as np
import pytest
from sklearn.base import BaseEstimator, is_classifier
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.experimental import enable_halving_search_cv  # noqa: F401  two more searches
from sklearn.frozen import FrozenEstimator
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import mlec
from mlec.errors import UsageError
from mlec.frontends.base import LowerOptions, SourceMethods
from mlec.frontends.select import frontend_for
from mlec.frontends.sklearn import SklearnFrontend
from mlec.frontends.sklearn.registry import CONVERTERS
from mlec.validation.differential import ESTIMATOR, compare
from mlec.validation.probes import probe_inputs

PUBLIC = SklearnFrontend().supported()  # fills the table of converters
RNG = np.random.default_rng(5)
X = np.abs(RNG.normal(size=(60, 4))) + 0.1
Y = X @ [1.0, 2.0, 0.5, 0.1] + 0.1
KIND = np.digitize(Y, np.quantile(Y, [1 / 3, 2 / 3]))
SMALL = {
    "n_estimators": 3, "max_iter": 20, "cv": 2, "n_iter": 1, "hidden_layer_sizes": (4,), "n_init": 1,
    "n_components": 2, "n_features_to_select": 2, "k": 2,
}  # fmt: skip
PARTS = {
    "estimator": LinearRegression(), "regressor": LinearRegression(), "param_grid": {}, "param_distributions": {},
    "estimators": [("a", LinearRegression())], "transformer_list": [("a", StandardScaler())],
    "transformers": [("a", StandardScaler(), [0, 1])], "steps": [("a", StandardScaler()), ("b", LogisticRegression())],
}  # fmt: skip
CLASSIFY = {"estimator": LogisticRegression(), "estimators": [("a", LogisticRegression())]}
MISSING = {"BernoulliRBM": ({"score_samples"}, "the source flips a feature of each row at random")}
"""By class, the methods that are not offered, and why."""


NO_OTHERS = ("CategoricalNB", "OneHotEncoder", "OrdinalEncoder")
"""Classes that refuse values that they were not fitted on."""
APPROXIMATE = {
    "MiniBatchKMeans": (
        1e-7,
        "a centre may be a row, and the source cancels its distance to 0 but for the root of an ulp",
    ),
}
"""By class, to what relative error it is computed, and why."""


def table_of(name: str) -> np.ndarray:
    """What a class is fitted on."""
    if name == "CategoricalNB":
        return np.round(X)
    return np.where(X < 0.3, np.nan, X) if name == "MissingIndicator" else X


@cache
def fitted(cls: type[BaseEstimator]) -> Any:
    """An estimator of this class, small and with what it needs, fitted."""
    name = cls.__name__
    needed = cls.__init__.__code__.co_varnames  # type: ignore[misc]
    parts = PARTS | (CLASSIFY if "Classif" in name or "OneVs" in name or "Search" in name else {})
    settings = {key: value for key, value in (SMALL | parts).items() if key in needed}
    if name == "FrozenEstimator":
        return FrozenEstimator(LogisticRegression().fit(X, KIND))
    if name in ("MultiOutputClassifier", "ClassifierChain"):
        settings["estimator"] = LogisticRegression()
    model = cls(**settings)
    several = name.startswith(("MultiTask", "MultiOutput", "RegressorChain", "PLS", "CCA"))
    kinds = is_classifier(model) or name in ("Pipeline", "MultiOutputClassifier") or "Search" in name
    kinds |= name.startswith(("Select", "GenericUnivariate"))
    target = KIND if kinds else Y
    if name == "ClassifierChain":
        return model.fit(X, np.column_stack([KIND > 0, KIND > 1]))
    if "Threshold" in name and kinds:
        target = KIND > 0
    if name == "OrthogonalMatchingPursuitCV":
        model.set_params(max_iter=2)  # one for each feature at most
    return model.fit(table_of(name), np.column_stack([target, target if kinds else X[:, 0]]) if several else target)


every_class = pytest.mark.parametrize(
    "cls",
    sorted((c for c in CONVERTERS if c.__name__ in PUBLIC), key=lambda c: c.__name__),
    ids=lambda cls: cls.__name__,
)


@every_class
def test_every_supported_class_offers_what_its_source_does(cls: type[BaseEstimator]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = fitted(cls)
        options = LowerOptions()
        graph = SklearnFrontend().lower(model, options)
    offered = {spec.name for spec in graph.signature.methods}
    missing, _ = MISSING.get(cls.__name__, (set(), ""))
    assert offered == set(SklearnFrontend().oracle(model)) - missing
    assert bool(options.notes) == bool(missing)


@every_class
def test_every_supported_class_gives_what_its_source_gives(lab: Any, cls: type[BaseEstimator]) -> None:
    name = cls.__name__
    table, (missing, _), (rtol, _) = table_of(name), MISSING.get(name, (set(), "")), APPROXIMATE.get(name, (1e-9, ""))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        others = [] if name in NO_OTHERS else [table[::-1] * 1.1]
        lab.check(fitted(cls), table, *others, rtol=rtol, ignore=tuple(missing))


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("metric", ["euclidean", "manhattan"])
@pytest.mark.parametrize("priors", ["uniform", "empirical", "given"])
def test_nearest_centroid(lab: Any, classes: int, metric: str, priors: str) -> None:
    kinds = np.minimum(KIND, classes - 1)
    constant = np.column_stack([X, np.ones(len(X))])  # does not spread
    given = [0.7, 0.3, 0.0][:classes]
    model = NearestCentroid(metric=metric, priors=given if priors == "given" else priors, shrink_threshold=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(constant, kinds)
    lab.check(model, constant, constant * 30 - 20, rtol=1e-9)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_logarithm_of_no_probability_in_discriminant_analysis(lab: Any, classes: int) -> None:
    model = LinearDiscriminantAnalysis().fit(X, np.digitize(X[:, 0], [0.6, 1.0, 1.5][: classes - 1]))
    assert model.predict_log_proba(X * 1e4).min() == np.log(np.finfo(np.float64).smallest_normal)
    lab.check(model, X, X * 1e4, -X * 1e3)


def test_discriminant_analysis_of_float32_does_not_offer_logarithms() -> None:
    table = X.astype(np.float32)
    model = LinearDiscriminantAnalysis().fit(table, KIND)
    compiled = mlec.compile(model, table * 50, progress=False)
    assert not hasattr(compiled, "predict_log_proba")
    assert any("predict_log_proba" in warning for warning in compiled.report.warnings)
    assert set(compiled.report.parity["methods"]) == {"predict", "predict_proba", "decision_function", "transform"}


def test_a_method_that_the_source_only_refuses_is_not_compared() -> None:
    compiled = mlec.compile(LinearDiscriminantAnalysis(solver="lsqr").fit(X, KIND), X, progress=False)
    assert not hasattr(compiled, "transform")


@pytest.mark.parametrize("strategy", ["constant", "most_frequent", "mean"])
@pytest.mark.parametrize("indicator", [True, False])
def test_imputers_of_numbers_are_probed_with_numbers(strategy: str, indicator: bool) -> None:
    holes = np.where(X < 0.5, np.nan, X)
    model = make_pipeline(SimpleImputer(strategy=strategy, add_indicator=indicator), LogisticRegression())
    compiled = mlec.compile(model.fit(holes, KIND), progress=False)
    assert np.allclose(compiled.predict_proba(holes), model.predict_proba(holes), rtol=1e-12)
    (probe,) = probe_inputs(frontend_for(model).lower(model, LowerOptions()))
    assert probe.dtype == np.float64


def test_a_source_that_fails_when_it_is_asked_for_ties() -> None:
    def decided(table: Any) -> Any:
        raise ValueError("Input X contains NaN")

    oracle = SourceMethods({"predict": lambda table: table}, decided)
    with pytest.raises(UsageError, match="contains NaN") as caught:
        compare(oracle, oracle, [X], ESTIMATOR)  # type: ignore[arg-type]
    assert caught.value.code == "E_SOURCE_FAILS"
