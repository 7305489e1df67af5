"""The form of results: DataFrames where the source is set to return them, and its dtypes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from polars import testing as polars_testing
from sklearn import (
    cluster,
    compose,
    decomposition,
    ensemble,
    feature_selection,
    impute,
    linear_model,
    pipeline,
    preprocessing,
    tree,
)
from sklearn.base import clone

import mlec

FRAME = pd.DataFrame(
    {"a": [1, 2, 3, 4, 5, 2], "b": [1.5, np.nan, 2, 3, 0, 1], "c": list("uvuwuv")}, index=[7, 3, 5, 1, 9, 8]
)
HALF = [0, 1, 0, 1, 1, 0]


@pytest.mark.parametrize(
    ("model", "columns"),
    [
        (preprocessing.StandardScaler(), ["a", "b"]),
        (impute.SimpleImputer(), ["a", "b"]),
        (feature_selection.SelectKBest(k=1), ["a"]),
        (preprocessing.Binarizer(threshold=2), ["a"]),
        (preprocessing.OrdinalEncoder(dtype=np.int16), ["c"]),
        (pipeline.make_pipeline(impute.SimpleImputer(), decomposition.PCA(1)), ["a", "b"]),
        (pipeline.FeatureUnion([("p", "passthrough"), ("s", preprocessing.MinMaxScaler())]), ["a"]),
        (
            compose.make_column_transformer(
                (preprocessing.StandardScaler(), ["b"]),
                (preprocessing.OneHotEncoder(sparse_output=False, dtype=int), ["c"]),
                remainder="passthrough",
            ),
            ["a", "b", "c"],
        ),
        (ensemble.VotingClassifier([("x", linear_model.LogisticRegression()), ("y", tree.DecisionTreeClassifier())]), ["a"]),
    ],
    ids=lambda v: type(v).__name__,
)  # fmt: skip
def test_transformers_that_return_frames(lab: Any, model: Any, columns: list[str]) -> None:
    table = FRAME[columns]
    fitted = clone(model).set_output(transform="pandas").fit(table, HALF)
    compiled = lab.check(fitted, table, ignore=() if hasattr(fitted, "predict") else ("predict",))
    pd.testing.assert_index_equal(compiled.transform(table).index, table.index)
    if "c" not in columns:
        narrow = table.astype(np.float32)
        pd.testing.assert_frame_equal(compiled.transform(narrow), fitted.transform(narrow), rtol=1e-6)
    assert mlec.compile(fitted, table, progress=False).transform(table).columns.equals(fitted.transform(table).columns)


def test_frames_whose_columns_are_found_by_name(lab: Any) -> None:
    columns = compose.make_column_transformer((preprocessing.StandardScaler(), ["b"]), ("passthrough", ["a"]))
    fitted = columns.set_output(transform="pandas").fit(FRAME)
    table = FRAME[["c", "b", "a"]]
    pd.testing.assert_frame_equal(lab.compile(fitted).transform(table), fitted.transform(table))


def test_frames_of_arrays_and_of_polars(lab: Any) -> None:
    numbers = FRAME[["a", "b"]].fillna(0.0)
    steps = pipeline.make_pipeline(preprocessing.StandardScaler(), feature_selection.SelectKBest(k=1))
    for table in (numbers, numbers.to_numpy()):
        fitted = clone(steps).set_output(transform="polars").fit(table, HALF)
        got, wanted = lab.compile(fitted).transform(table), fitted.transform(table)
        polars_testing.assert_frame_equal(got, wanted)
    fitted = clone(steps).set_output(transform="pandas").fit(numbers.to_numpy(), HALF)
    pd.testing.assert_frame_equal(
        lab.compile(fitted).transform(numbers.to_numpy()), fitted.transform(numbers.to_numpy())
    )


def test_frames_are_arrays_where_pandas_is_missing(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = preprocessing.StandardScaler().set_output(transform="pandas").fit(FRAME[["a"]])
    compiled = lab.compile(fitted)
    wanted = fitted.transform(FRAME[["a"]]).to_numpy()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    np.testing.assert_array_equal(compiled.transform(FRAME[["a"]].to_numpy()), wanted)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64, np.uint8, np.float32, np.float64])
@pytest.mark.parametrize(
    "model",
    [
        preprocessing.Binarizer(threshold=2),
        feature_selection.SelectKBest(k=1),
        preprocessing.StandardScaler(),
        linear_model.LinearRegression(),
        ensemble.IsolationForest(n_estimators=3, random_state=0),
        cluster.KMeans(2, n_init=1, random_state=0),
    ],
    ids=lambda m: type(m).__name__,
)
def test_results_have_the_dtype_of_the_source(lab: Any, model: Any, dtype: Any) -> None:
    table = np.array([[1, 7], [2, 0], [3, 4], [4, 1], [5, 5], [2, 2]], dtype)
    fitted = clone(model).fit(table, HALF)
    compiled = lab.compile(fitted)
    for name in ("predict", "transform", "decision_function"):
        if hasattr(fitted, name):
            lab.same(getattr(compiled, name)(table), getattr(fitted, name)(table), 1e-5, name)


def test_encoders_side_by_side_have_the_dtype_of_both(lab: Any) -> None:
    for dtypes in ((np.int8, np.int16), (np.uint8, np.float32), (int, int)):
        first, second = (preprocessing.OrdinalEncoder(dtype=dtype) for dtype in dtypes)
        columns = compose.make_column_transformer((first, ["c"]), (second, ["c"]))
        lab.check(columns.fit(FRAME), FRAME)
