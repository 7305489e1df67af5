"""Trees behind preprocessing: one op on the input, with every decision of the source."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import GradientBoostingClassifier, HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Binarizer, MaxAbsScaler, MinMaxScaler, PowerTransformer, RobustScaler, StandardScaler

import mlec
from mlec.ir import run_graph
from mlec.ir.op import Array

ROWS, COLUMNS = 300, 6


def table(missing: bool = False) -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    x = rng.normal(3.0, 2.0, (ROWS, COLUMNS)) * 10.0 ** np.arange(-2, 4)
    y = (x / x.std(axis=0)).sum(axis=1) + rng.normal(size=ROWS) > np.median((x / x.std(axis=0)).sum(axis=1))
    if missing:
        x[rng.random(x.shape) < 0.1] = np.nan
    return x, y.astype(np.int64)


def xgboost() -> Any:
    return pytest.importorskip("xgboost").XGBClassifier(n_estimators=15)


def lightgbm() -> Any:
    return pytest.importorskip("lightgbm").LGBMClassifier(n_estimators=15, verbose=-1)


def forest() -> Any:
    return RandomForestClassifier(15, random_state=0)


MODELS = {
    "standard-forest": (lambda: make_pipeline(StandardScaler(), forest()), True),
    "impute-boosting": (lambda: make_pipeline(SimpleImputer(), GradientBoostingClassifier(n_estimators=15)), True),
    "indicator-boosting": (
        lambda: make_pipeline(SimpleImputer(add_indicator=True), GradientBoostingClassifier(n_estimators=15)), True
    ),
    "clip-xgboost": (lambda: make_pipeline(MinMaxScaler(clip=True), xgboost()), False),
    "robust-lightgbm": (lambda: make_pipeline(RobustScaler(), lightgbm()), True),
    "power-forest": (lambda: make_pipeline(PowerTransformer(), forest()), False),
    "max-histogram": (lambda: make_pipeline(MaxAbsScaler(), HistGradientBoostingClassifier(max_iter=15)), True),
    "columns-lightgbm": (
        lambda: make_pipeline(
            ColumnTransformer(
                [("a", make_pipeline(SimpleImputer(), StandardScaler()), [3, 1]), ("b", Binarizer(threshold=3.0), [2])],
                remainder="passthrough",
            ),
            lightgbm(),
        ),
        False,
    ),
}  # fmt: skip


COMPILED = ("standard-forest", "clip-xgboost")


@pytest.mark.parametrize("name", MODELS)
def test_preprocessing_is_in_the_thresholds(name: str) -> None:
    make, missing = MODELS[name]
    x, y = table(missing)
    model = make().fit(x, y)
    lowered = mlec.lower(model, x[:5])
    optimised, report = mlec.optimize(lowered, passes="O1,fold-into-thresholds,prune-trees,merge-trees")
    (trees,) = (node for node in optimised.nodes if node.name == "tree_ensemble")
    rows = optimised.producer.get(trees.inputs[0])
    assert trees.inputs[0] in optimised.inputs or (rows is not None and rows.name == "concat"), str(report)

    # Each threshold that a column of the input is compared with now, and the floats to both sides.
    feature, threshold = (optimised.constant_value(v) for v in trees.inputs[1:3])
    assert feature is not None
    assert threshold is not None
    spec = optimised.signature.table
    assert spec is not None
    place = [column for feed in spec.feeds for column in feed.columns]
    edges = threshold[np.isfinite(threshold)].astype(np.float64)
    near = np.concatenate([np.nextafter(edges, -np.inf), edges, np.nextafter(edges, np.inf)])
    column = np.resize(np.asarray(place)[feature[np.isfinite(threshold)]], len(near))
    probes = np.resize(x, (len(near), COLUMNS))
    probes[np.arange(len(near)), column] = near
    fed = [
        np.ascontiguousarray(probes[:, feed.columns], value.type.dtype.numpy)
        for feed, value in zip(spec.feeds, optimised.inputs, strict=True)
    ]
    before, after = run_graph(lowered, fed), run_graph(optimised, fed)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(after[0], model.predict(probes))
    if name in COMPILED:
        compiled = mlec.compile(model, validate=False)
        np.testing.assert_array_equal(compiled.predict(probes), model.predict(probes))
        np.testing.assert_allclose(compiled.predict_proba(probes), model.predict_proba(probes), rtol=0, atol=5e-7)
