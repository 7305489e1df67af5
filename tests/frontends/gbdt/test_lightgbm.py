"""LightGBM models against LightGBM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import pandas as pd
import pytest

from mlec.errors import NotFittedModelError, UnsupportedModelError
from mlec.frontends.base import LowerOptions
from mlec.frontends.lightgbm import LightGBMFrontend
from tests.frontends.gbdt.checks import check, probes, results

FRONTEND = LightGBMFrontend()
ZERO = float(np.float32(1e-35))
SPECIALS = (
    np.nan, np.inf, -np.inf, 0.0, -0.0, ZERO, -ZERO, 1e-35, 5e-36, -5e-36, np.nextafter(ZERO, 1), -np.nextafter(ZERO, 1), 1e300,
)  # fmt: skip

rng = np.random.default_rng(0)
X = rng.normal(size=(400, 5))
X[rng.random(X.shape) < 0.1] = np.nan
X[rng.random(400) < 0.5, 4] = 0
KNOWN = np.nan_to_num(X)
Y = KNOWN[:, 0] * 3 + KNOWN[:, 1] * KNOWN[:, 2] + KNOWN[:, 4] + rng.normal(size=400) * 0.1
CLASSES = np.digitize(Y, [-1, 1])
SHARE = 1 / (1 + np.exp(-Y))


def params(**changed: Any) -> dict[str, Any]:
    return {"verbose": -1, "n_estimators": 12, "n_jobs": 1} | changed


@pytest.mark.parametrize(
    ("objective", "target"),
    [
        ("regression", Y),
        ("regression_l1", Y),
        ("huber", Y),
        ("fair", Y),
        ("quantile", Y),
        ("mape", Y),
        ("poisson", abs(Y)),
        ("gamma", abs(Y) + 0.1),
        ("tweedie", abs(Y)),
        ("cross_entropy", SHARE),
        ("cross_entropy_lambda", SHARE),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_objectives(objective: str, target: Any) -> None:
    model = lgb.LGBMRegressor(**params(objective=objective)).fit(X, target)
    graph = check(FRONTEND, model, specials=SPECIALS)
    assert graph.outputs[0].type.dtype.value == "f64"


@pytest.mark.parametrize(
    "changed",
    [
        {"reg_sqrt": True},
        {"reg_sqrt": True, "objective": "regression_l1"},
        {"zero_as_missing": True},
        {"use_missing": False},
        {"boosting_type": "rf", "bagging_freq": 1, "bagging_fraction": 0.7},
        {"boosting_type": "dart"},
        {"min_child_samples": 100_000},
        {"n_estimators": 1},
    ],
    ids=str,
)
def test_regressor_settings_are_exact_to_the_bit(changed: dict[str, Any]) -> None:
    model = lgb.LGBMRegressor(**params(**changed)).fit(X, Y)
    check(FRONTEND, model, specials=SPECIALS, ulp=0)
    check(FRONTEND, model.booster_, specials=SPECIALS, ulp=0)


def test_thresholds_next_to_zero() -> None:
    tiny = np.where(X > 0.5, 3e-35, np.where(X > 0, 0, np.where(X < -1, -1e-36, -3e-35)))
    for changed in ({}, {"zero_as_missing": True}):
        check(FRONTEND, lgb.LGBMRegressor(**params(**changed)).fit(tiny, Y), specials=SPECIALS, ulp=0)


def test_without_missing_values_in_training() -> None:
    check(FRONTEND, lgb.LGBMRegressor(**params()).fit(KNOWN, Y), specials=SPECIALS, ulp=0)


def test_values_beyond_float32() -> None:
    large = KNOWN + 1.7e9
    model = lgb.LGBMRegressor(**params()).fit(large, Y)
    graph = check(FRONTEND, model, large, ulp=0)
    check(FRONTEND, model, probes(graph, SPECIALS), ulp=0)


@pytest.mark.parametrize(
    "labels",
    [["lo", "mid", "high"], [10, -3, 7], [1.0, 2.0, 7.0], [0, 1, 1], [True, False, False], ["a", "b", "b"]],
    ids=str,
)
def test_labels(labels: list[Any]) -> None:
    model = lgb.LGBMClassifier(**params()).fit(X, np.array(labels)[CLASSES])
    graph = check(FRONTEND, model, specials=SPECIALS)
    assert [m.name for m in graph.signature.methods] == ["predict", "predict_proba", "decision_function"]
    assert graph.signature.run == ("predict", "predict_proba")


@pytest.mark.parametrize(
    "changed",
    [
        {"objective": "multiclassova", "sigmoid": 1.5},
        {"boosting_type": "rf", "bagging_freq": 1, "bagging_fraction": 0.7},
        {"boosting_type": "dart"},
        {"data_sample_strategy": "goss"},
        {"n_estimators": 1},
    ],
    ids=str,
)
def test_multiclass_settings(changed: dict[str, Any]) -> None:
    check(FRONTEND, lgb.LGBMClassifier(**params(**changed)).fit(X, CLASSES), specials=SPECIALS)


@pytest.mark.parametrize("changed", [{"sigmoid": 2.5, "is_unbalance": True}, {"objective": "cross_entropy"}], ids=str)
def test_binary_settings(changed: dict[str, Any]) -> None:
    check(FRONTEND, lgb.LGBMClassifier(**params(**changed)).fit(X, Y > 0), specials=SPECIALS)


def test_an_objective_of_the_users_own_gives_raw_scores() -> None:
    def objective(truth: Any, score: Any) -> tuple[Any, Any]:
        return 1 / (1 + np.exp(-score)) - truth, np.full_like(score, 0.2)

    check(FRONTEND, lgb.LGBMClassifier(**params(objective=objective)).fit(X, Y > 0), specials=SPECIALS, ulp=0)


def test_the_best_iteration_is_used() -> None:
    model = lgb.LGBMClassifier(**params(n_estimators=100, learning_rate=0.5))
    stop = lgb.early_stopping(3, verbose=False)
    model.fit(X[:300], CLASSES[:300], eval_set=[(X[300:], CLASSES[300:])], callbacks=[stop])
    assert model.best_iteration_ < 100
    check(FRONTEND, model, specials=SPECIALS)
    whole = lgb.train({"verbose": -1, "num_threads": 1}, lgb.Dataset(X, Y), 10)
    whole.best_iteration = 3
    graph = check(FRONTEND, whole, specials=SPECIALS, ulp=0)
    assert next(n for n in graph.nodes if n.name == "tree_ensemble").inputs[8].type.shape == (3,)


def test_ranker() -> None:
    model = lgb.LGBMRanker(**params()).fit(X, CLASSES, group=[100] * 4)
    graph = check(FRONTEND, model, specials=SPECIALS, ulp=0)
    assert graph.signature.kind == "ranker"


# -- categories ------------------------------------------------------------------------------------------------------


def test_category_codes_in_an_array() -> None:
    codes = KNOWN.copy()
    codes[:, 2], codes[:, 3] = rng.integers(0, 50, 400), rng.integers(-1, 6, 400)
    codes[rng.random(codes.shape) < 0.05] = np.nan
    model = lgb.LGBMRegressor(**params(min_data_per_group=1, cat_smooth=1))
    model.fit(codes, Y + np.nan_to_num(np.sin(codes[:, 2])) * 3, categorical_feature=[2, 3])
    odd = codes.copy()
    values = [-1, -0.5, 0.5, 49.9, 50, 51, 63, 64, 1e9, 3e9, 1e10, np.inf, -np.inf, np.nan, -0.0, 5]
    odd[:200, 2:4] = rng.choice(values, (200, 2))
    check(FRONTEND, model, odd, ulp=0)


def frame(ordered: bool = False) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "a": X[:, 0],
            "color": pd.Categorical(rng.choice(["red", "grün", "blue"], 400), ordered=ordered),
            "flag": pd.Categorical(rng.random(400) < 0.5),
            "size": pd.Categorical(rng.choice([40, 20, -30, 10], 400)),
        }
    )


def test_pandas_categories() -> None:
    table = frame()
    target = Y + table["color"].map({"red": 0, "grün": 4, "blue": -3}).astype(float) + table["size"].astype(float) / 10
    model = lgb.LGBMRegressor(**params()).fit(table, target)
    graph = check(FRONTEND, model, table, ulp=0)
    check(FRONTEND, model.booster_, table, ulp=0)
    unseen = table.iloc[:60].copy()
    unseen["color"] = pd.Categorical(rng.choice(["blue", "red", "black", None], 60))
    unseen["size"] = pd.Categorical(rng.choice([10, 40, 99], 60))
    check(FRONTEND, model, unseen, ulp=0)
    plain = unseen.assign(color=unseen["color"].astype(object), size=unseen["size"].astype(int))
    np.testing.assert_array_equal(results(graph, plain)["predict"], model.predict(unseen))
    np.testing.assert_array_equal(FRONTEND.oracle(model)["predict"](plain), model.predict(unseen))


def test_an_example_tells_which_columns_hold_categories() -> None:
    """An ordered category is a number to LightGBM, so that the model itself does not say which column it was."""
    table = frame(ordered=True)
    model = lgb.LGBMRegressor(**params()).fit(table, Y)
    with pytest.raises(UnsupportedModelError, match="which columns"):
        FRONTEND.lower(model, LowerOptions())
    graph = check(FRONTEND, model, table, ulp=0, example_inputs=(table,))
    assert graph.signature.table is not None
    assert graph.signature.table.feature_names == tuple(table.columns)


def test_names_with_spaces() -> None:
    table = pd.DataFrame(X, columns=["mean radius", "b", "c", "d", "e"])
    model = lgb.LGBMRegressor(**params()).fit(table, Y)
    check(FRONTEND, model, table, ulp=0)
    graph = check(FRONTEND, model, table, ulp=0, example_inputs=(table,))
    assert graph.signature.table is not None
    assert graph.signature.table.feature_names == tuple(table.columns)


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["multiclass", "regression", "categories", "windows"])
def test_files_predict_as_the_booster_they_were_saved_from(tmp_path: Path, kind: str) -> None:
    table: Any = X
    if kind == "multiclass":
        model = lgb.LGBMClassifier(**params()).fit(X, CLASSES)
    elif kind == "categories":
        table = frame()
        model = lgb.LGBMRegressor(**params()).fit(table, Y)
    else:
        model = lgb.LGBMRegressor(**params()).fit(X, Y)
    path = tmp_path / "model.txt"
    model.booster_.save_model(path)
    if kind == "windows":
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert FRONTEND.sniff(path.read_bytes()[:65536], path)
    loaded = FRONTEND.load(path, LowerOptions())
    assert FRONTEND.accepts(loaded)
    graph = FRONTEND.lower(loaded, LowerOptions())
    want = results(FRONTEND.lower(model.booster_, LowerOptions()), table)["predict"]
    np.testing.assert_array_equal(results(graph, table)["predict"], want)


# -- refusals --------------------------------------------------------------------------------------------------------


def test_not_fitted() -> None:
    with pytest.raises(NotFittedModelError, match="LGBMClassifier"):
        FRONTEND.lower(lgb.LGBMClassifier(), LowerOptions())


@pytest.mark.parametrize("changed", [{"linear_tree": True}, {"pred_early_stop": True}], ids=str)
def test_what_cannot_be_exact_is_refused(changed: dict[str, Any]) -> None:
    model = lgb.LGBMRegressor(**params(**changed)).fit(X, Y)
    with pytest.raises(UnsupportedModelError, match=next(iter(changed))):
        FRONTEND.lower(model, LowerOptions())


def test_accepts_by_class_names_only() -> None:
    class Mine(lgb.LGBMRegressor):
        pass

    assert FRONTEND.accepts(Mine())
    assert not FRONTEND.accepts(object())
