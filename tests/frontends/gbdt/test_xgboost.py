"""XGBoost models against XGBoost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xgboost as xgb

from mlec.errors import InputError, NotFittedModelError, UnsupportedModelError
from mlec.frontends.base import LowerOptions
from mlec.frontends.xgboost import XGBoostFrontend
from tests.frontends.gbdt.checks import check, results

FRONTEND = XGBoostFrontend()
SPECIALS = (np.nan, -0.0, 0.0)
INFINITE = (*SPECIALS, np.inf, -np.inf)

rng = np.random.default_rng(0)
X = rng.normal(size=(400, 6)).astype(np.float32)
X[rng.random(X.shape) < 0.1] = np.nan
KNOWN = np.nan_to_num(X)
Y = KNOWN[:, 0] * 3 + KNOWN[:, 1] * KNOWN[:, 2] + rng.normal(size=400) * 0.1
CLASSES = np.digitize(Y, [-1, 1])


@pytest.mark.parametrize(
    ("objective", "target"),
    [
        ("reg:squarederror", Y),
        ("reg:absoluteerror", Y),
        ("reg:pseudohubererror", Y),
        ("reg:squaredlogerror", abs(Y)),
        ("count:poisson", abs(Y)),
        ("reg:gamma", abs(Y) + 0.1),
        ("reg:tweedie", abs(Y)),
        ("reg:logistic", 1 / (1 + np.exp(-Y))),
        ("survival:cox", Y),
        ("binary:logitraw", Y > 0),
        ("binary:hinge", Y > 0),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_objectives(objective: str, target: Any) -> None:
    check(FRONTEND, xgb.XGBRegressor(n_estimators=12, objective=objective).fit(X, target), specials=INFINITE)


@pytest.mark.parametrize("objective", ["binary:logistic", "binary:logitraw", "binary:hinge"])
def test_binary_classifiers(objective: str) -> None:
    check(FRONTEND, xgb.XGBClassifier(n_estimators=12, objective=objective).fit(X, Y > 0), specials=INFINITE)


@pytest.mark.parametrize("objective", ["multi:softprob", "multi:softmax"])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"booster": "dart", "rate_drop": 0.5},
        {"num_parallel_tree": 3, "subsample": 0.5},
        {"multi_strategy": "multi_output_tree"},
        {"base_score": 0.3},
    ],
    ids=str,
)
def test_multiclass_classifiers(objective: str, params: dict[str, Any]) -> None:
    model = xgb.XGBClassifier(n_estimators=6, objective=objective, **params).fit(X, CLASSES)
    check(FRONTEND, model, specials=INFINITE)
    check(FRONTEND, model.get_booster(), specials=SPECIALS)


@pytest.mark.parametrize("columns", [2, 3])
def test_several_labels_at_once(columns: int) -> None:
    many = np.c_[Y > 0, Y > 1, Y < 0][:, :columns].astype(int)
    graph = check(FRONTEND, xgb.XGBClassifier(n_estimators=8).fit(X, many), specials=INFINITE)
    assert graph.outputs[0].type.dtype.value == "f64"


@pytest.mark.parametrize(
    "model",
    [
        xgb.XGBRegressor(n_estimators=10, multi_strategy="one_output_per_tree"),
        xgb.XGBRegressor(n_estimators=10, multi_strategy="multi_output_tree"),
        xgb.XGBRFRegressor(n_estimators=10),
    ],
    ids=lambda m: f"{type(m).__name__}-{m.multi_strategy}",
)
def test_several_targets(model: xgb.XGBRegressor) -> None:
    check(FRONTEND, model.fit(X, np.c_[Y, Y**2, -Y]), specials=INFINITE)


@pytest.mark.parametrize(
    "params",
    [
        {"booster": "dart", "rate_drop": 0.3},
        {"tree_method": "exact", "gamma": 2.0},
        {"n_estimators": 1, "max_depth": 1},
        {"n_estimators": 1, "gamma": 1e9},
        {"objective": "reg:quantileerror", "quantile_alpha": [0.1, 0.5, 0.9]},
        {"missing": np.inf},
    ],
    ids=str,
)
def test_regressor_settings(params: dict[str, Any]) -> None:
    model = xgb.XGBRegressor(**({"n_estimators": 10} | params)).fit(X, Y)
    check(FRONTEND, model, specials=INFINITE)
    if "missing" not in params:
        check(FRONTEND, model.get_booster(), specials=SPECIALS)


def test_a_number_can_mean_missing() -> None:
    coarse = np.round(KNOWN * 2) / 2
    for missing in (0.5, 0.0):
        model = xgb.XGBRegressor(n_estimators=10, missing=missing).fit(coarse, Y)
        check(FRONTEND, model, coarse, ulp=0)
        check(FRONTEND, model, specials=(missing, -0.0, np.nan), ulp=0)


def test_regression_is_exact_to_the_bit() -> None:
    check(FRONTEND, xgb.XGBRegressor(n_estimators=50).fit(X, Y), specials=INFINITE, ulp=0)


def test_random_forest_classifier() -> None:
    check(FRONTEND, xgb.XGBRFClassifier(n_estimators=10).fit(X, CLASSES), specials=INFINITE)


def test_ranker() -> None:
    graph = check(FRONTEND, xgb.XGBRanker(n_estimators=8).fit(X, CLASSES, group=[100] * 4), specials=INFINITE)
    assert graph.signature.kind == "ranker"


def test_accelerated_failure_time() -> None:
    data = xgb.DMatrix(X)
    data.set_float_info("label_lower_bound", abs(Y))
    data.set_float_info("label_upper_bound", abs(Y) + 1)
    check(FRONTEND, xgb.train({"objective": "survival:aft"}, data, 8), specials=SPECIALS)


def test_estimators_stop_at_the_best_iteration_and_boosters_do_not() -> None:
    model = xgb.XGBClassifier(n_estimators=60, early_stopping_rounds=3, num_parallel_tree=2, learning_rate=0.9)
    model.fit(X[:300], CLASSES[:300], eval_set=[(X[300:], CLASSES[300:])], verbose=False)
    assert model.best_iteration + 1 < model.get_booster().num_boosted_rounds()
    check(FRONTEND, model, specials=INFINITE)
    check(FRONTEND, model.get_booster(), specials=SPECIALS)


@pytest.mark.parametrize("classes", [2, 3])
def test_linear_booster(classes: int) -> None:
    target = CLASSES if classes == 3 else CLASSES > 1
    model = xgb.XGBClassifier(n_estimators=10, booster="gblinear").fit(X, target)
    graph = FRONTEND.lower(model, LowerOptions())
    assert graph.signature.table is not None
    assert graph.signature.table.numbers == "nan"
    got = results(graph, X)
    np.testing.assert_allclose(got["predict_proba"], model.predict_proba(X), rtol=1e-5, atol=1e-6)
    assert (got["predict"] == model.predict(X)).all()


# -- tables ----------------------------------------------------------------------------------------------------------


def frame(rows: int = 400) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "a": X[:rows, 0],
            "color": pd.Categorical(rng.choice(["red", "green", "blue"], rows)),
            "b": X[:rows, 1],
            "size": pd.Categorical(rng.choice([40, 20, -30, 10], rows)),
        }
    )


def categorical_model(table: pd.DataFrame, **params: Any) -> xgb.XGBRegressor:
    shift = table["color"].map({"red": 0, "green": 4, "blue": -3}).astype(float) + table["size"].astype(float) / 10
    return xgb.XGBRegressor(n_estimators=10, enable_categorical=True, **params).fit(table, Y + shift)


@pytest.mark.parametrize("params", [{}, {"max_cat_to_onehot": 1}], ids=str)
def test_pandas_categories(params: dict[str, Any]) -> None:
    table = frame()
    model = categorical_model(table, **params)
    graph = check(FRONTEND, model, table, ulp=0)
    check(FRONTEND, model.get_booster(), table, ulp=0)
    part = table.iloc[:60].copy()
    part["color"] = pd.Categorical(rng.choice(["red", "blue", None], 60))
    part["size"] = pd.Categorical(rng.choice([10, 40], 60))
    check(FRONTEND, model, part, ulp=0)
    plain = part.assign(color=part["color"].astype(object), size=part["size"].astype(int))
    np.testing.assert_array_equal(results(graph, plain)["predict"], model.predict(part))


def test_unseen_categories_are_refused() -> None:
    table = frame()
    model = categorical_model(table)
    unseen = table.iloc[:3].assign(color=pd.Categorical(["red", "blue", "violet"]))
    with pytest.raises(xgb.core.XGBoostError, match="not in the training set"):
        model.predict(unseen)
    with pytest.raises(InputError, match="violet"):
        results(FRONTEND.lower(model, LowerOptions()), unseen)


def test_only_categories() -> None:
    table = frame()[["color", "size"]]
    check(FRONTEND, xgb.XGBRegressor(n_estimators=5, enable_categorical=True).fit(table, Y), table, ulp=0)


@pytest.mark.parametrize("types", [["q", "c", "c"], ["c", "c", "c"]], ids=str)
def test_category_codes_in_an_array(types: list[str]) -> None:
    codes = np.c_[rng.integers(0, 5, 400), rng.integers(0, 40, 400), rng.integers(0, 10, 400)].astype(float)
    target = Y + np.sin(codes[:, 1]) * 5 + codes[:, 2]
    model = xgb.XGBRegressor(n_estimators=10, enable_categorical=True, feature_types=types).fit(codes, target)
    odd = codes.copy()
    odd[:200, 1:] = rng.choice(
        [-1, -0.5, 0, -0.0, 0.5, 1.5, 39.9, 40, 41, 2.0**24, 1e9, np.inf, -np.inf, np.nan], (200, 2)
    )
    check(FRONTEND, model, odd, ulp=0)


def test_feature_names_are_checked() -> None:
    table = frame()[["a", "b"]]
    graph = check(FRONTEND, xgb.XGBRegressor(n_estimators=5).fit(table, Y), table)
    with pytest.raises(InputError, match="order"):
        results(graph, table[["b", "a"]])
    with pytest.raises(InputError, match="features"):
        results(graph, X)


def test_a_booster_refuses_infinity_as_a_dmatrix_does() -> None:
    graph = FRONTEND.lower(xgb.train({}, xgb.DMatrix(X, Y), 2), LowerOptions())
    with pytest.raises(InputError, match="infinity"):
        results(graph, np.full((1, 6), np.inf))


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["json", "ubj"])
@pytest.mark.parametrize("kind", ["classifier", "regressor", "ranker", "booster", "categories", "dart", "linear"])
def test_files_predict_as_the_model_they_were_saved_from(tmp_path: Path, ending: str, kind: str) -> None:
    table: Any = X
    model: Any
    if kind == "classifier":
        model = xgb.XGBClassifier(n_estimators=40, early_stopping_rounds=2, learning_rate=0.9)
        model.fit(X[:300], CLASSES[:300], eval_set=[(X[300:], CLASSES[300:])], verbose=False)
    elif kind == "booster":
        model = xgb.train({"objective": "multi:softprob", "num_class": 3}, xgb.DMatrix(X, CLASSES), 4)
    elif kind == "categories":
        table = frame()
        model = categorical_model(table)
    elif kind == "ranker":
        model = xgb.XGBRanker(n_estimators=3).fit(X, CLASSES, group=[400])
    else:
        booster = {"dart": "dart", "linear": "gblinear"}.get(kind, "gbtree")
        model = xgb.XGBRegressor(n_estimators=4, booster=booster).fit(X, Y)
    path = tmp_path / f"model.{ending}"
    model.save_model(path)
    assert FRONTEND.sniff(path.read_bytes()[:65536], path)
    loaded = FRONTEND.load(path, LowerOptions())
    assert FRONTEND.accepts(loaded)
    from_file, live = FRONTEND.lower(loaded, LowerOptions()), FRONTEND.lower(model, LowerOptions())
    assert from_file.signature == live.signature
    for name, value in results(live, table).items():
        np.testing.assert_array_equal(results(from_file, table)[name], value)


def test_documents_of_older_versions() -> None:
    """Before 3.1 the base score was a scalar; before 1.7 there was no index of iterations; flags were booleans."""
    from mlec.frontends.xgboost import ModelFile, _document

    model = xgb.XGBClassifier(
        n_estimators=30, early_stopping_rounds=2, num_parallel_tree=2, learning_rate=0.9, base_score=0.25
    )
    model.fit(X[:300], CLASSES[:300], eval_set=[(X[300:], CLASSES[300:])], verbose=False)
    model.get_booster().set_attr(scikit_learn='{"_estimator_type": "classifier"}')
    document = _document(model.get_booster())
    document["learner"]["learner_model_param"]["base_score"] = "2.5E-1"
    trees = document["learner"]["gradient_booster"]["model"]
    del trees["iteration_indptr"], trees["cats"]
    for tree in trees["trees"]:
        tree["default_left"] = [bool(v) for v in tree["default_left"]]
        del tree["split_type"]
    graph = FRONTEND.lower(ModelFile(Path("old.json"), document, b""), LowerOptions())
    np.testing.assert_array_equal(
        results(graph, X)["predict_proba"], results(FRONTEND.lower(model, LowerOptions()), X)["predict_proba"]
    )


# -- refusals --------------------------------------------------------------------------------------------------------


def test_not_fitted() -> None:
    with pytest.raises(NotFittedModelError, match="XGBRegressor"):
        FRONTEND.lower(xgb.XGBRegressor(), LowerOptions())


def test_categories_without_their_values_are_refused() -> None:
    from mlec.frontends.xgboost import ModelFile, _document

    document = _document(categorical_model(frame()).get_booster())
    document["learner"]["gradient_booster"]["model"]["cats"] = {"enc": [], "feature_segments": [], "sorted_idx": []}
    document["version"] = [3, 0, 5]
    with pytest.raises(UnsupportedModelError, match="did not store"):
        FRONTEND.lower(ModelFile(Path("old.json"), document, b""), LowerOptions())


def test_missing_codes_are_refused() -> None:
    model = categorical_model(frame()).set_params(missing=1.0)
    with pytest.raises(UnsupportedModelError, match="missing"):
        FRONTEND.lower(model, LowerOptions())


def test_categories_that_xgboost_stores_damaged_are_refused() -> None:
    table = pd.DataFrame({"color": pd.Categorical(rng.choice(["rot", "grün", "blau"], 400))})
    model = xgb.XGBRegressor(n_estimators=2, enable_categorical=True).fit(table, Y)
    with pytest.raises(UnsupportedModelError, match="ASCII"):
        FRONTEND.lower(model, LowerOptions())


@pytest.mark.parametrize("settings", [{}, {"base_score": 0.3}], ids=str)
def test_a_booster_before_its_first_round(settings: dict[str, float]) -> None:
    labels = (Y > 0).astype(int)
    check(FRONTEND, xgb.train({"objective": "binary:logistic", **settings}, xgb.DMatrix(X, labels), 0), X)


def test_accepts_by_class_names_only() -> None:
    class Mine(xgb.XGBClassifier):
        pass

    assert FRONTEND.accepts(Mine())
    assert not FRONTEND.accepts(object())
    assert not FRONTEND.accepts(pd.DataFrame())
