"""Estimators through the whole path: compile, save, load, and every method against the source, at many batch sizes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine
from sklearn.decomposition import PCA
from sklearn.ensemble import (
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    IsolationForest,
    RandomForestClassifier,
    RandomForestRegressor,
    StackingClassifier,
    VotingClassifier,
)
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge, SGDClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import (
    MinMaxScaler,
    Normalizer,
    OneHotEncoder,
    OrdinalEncoder,
    PolynomialFeatures,
    RobustScaler,
    StandardScaler,
)
from sklearn.svm import SVC, SVR, LinearSVC
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

import mlec

pd = pytest.importorskip("pandas")
BATCHES = (0, 1, 2, 5, 1000)

Data = tuple[Any, Any]


def cancer() -> Data:
    return load_breast_cancer(return_X_y=True)


def iris_names() -> Data:
    data = load_iris()
    return data.data, data.target_names[data.target]


def wine() -> Data:
    return load_wine(return_X_y=True)


def diabetes() -> Data:
    return load_diabetes(return_X_y=True)


def digits() -> Data:
    x, y = load_digits(return_X_y=True)
    return x[:600], y[:600]


def holes() -> Data:
    x, y = load_diabetes(return_X_y=True)
    x = x.copy()
    x[np.random.default_rng(0).random(x.shape) < 0.1] = np.nan
    return x, y


def hole_classes() -> Data:
    x, y = holes()
    return x, np.digitize(y, [90, 160]) * 10


def people() -> Data:
    rng = np.random.default_rng(0)
    n = 400
    frame = pd.DataFrame(
        {
            "age": rng.integers(18, 90, n).astype(float),
            "city": rng.choice(["Zürich", "Paris", "Oslo", "São Paulo"], n),
            "income": np.where(rng.random(n) < 0.1, np.nan, rng.normal(5e4, 1e4, n)),
            "grade": rng.choice(["low", "mid", "high"], n),
        }
    )
    return frame, np.where(frame["age"] + (frame["city"] == "Oslo") * 20 > 60, "yes", "no")


def columns() -> ColumnTransformer:
    return ColumnTransformer(
        [
            ("num", make_pipeline(SimpleImputer(), StandardScaler()), ["age", "income"]),
            ("city", OneHotEncoder(handle_unknown="ignore"), ["city"]),
            ("grade", OrdinalEncoder(categories=[["low", "mid", "high"]]), ["grade"]),
        ]
    )


def xgb(kind: str, **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        xgboost = pytest.importorskip("xgboost")
        return getattr(xgboost, kind)(n_estimators=20, max_depth=4, **options)

    return make


def lgbm(kind: str, **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        lightgbm = pytest.importorskip("lightgbm")
        return getattr(lightgbm, kind)(n_estimators=20, verbose=-1, **options)

    return make


MODELS: dict[str, tuple[Callable[[], Any], Callable[[], Data]]] = {
    "logistic": (lambda: make_pipeline(StandardScaler(), LogisticRegression()), cancer),
    "logistic_multi_strings": (lambda: LogisticRegression(max_iter=500), iris_names),
    "linear": (LinearRegression, diabetes),
    "polynomial_ridge": (lambda: make_pipeline(PolynomialFeatures(2), Ridge()), diabetes),
    "sgd": (lambda: make_pipeline(MinMaxScaler(), SGDClassifier(random_state=0)), wine),
    "linear_svc": (lambda: make_pipeline(RobustScaler(), LinearSVC()), wine),
    "svc_rbf": (lambda: SVC(gamma=0.001), digits),
    "svr_poly": (lambda: SVR(kernel="poly"), diabetes),
    "naive_bayes": (GaussianNB, wine),
    "neighbours": (KNeighborsClassifier, digits),
    "neighbours_distance": (lambda: KNeighborsRegressor(weights="distance"), diabetes),
    "mlp_classifier": (
        lambda: make_pipeline(StandardScaler(), MLPClassifier((32, 16), max_iter=80, random_state=0)),
        wine,
    ),
    "mlp_regressor": (
        lambda: MLPRegressor(hidden_layer_sizes=(16,), activation="tanh", max_iter=80, random_state=0),
        diabetes,
    ),
    "tree_classifier": (DecisionTreeClassifier, digits),
    "tree_regressor_nan": (lambda: DecisionTreeRegressor(max_depth=6), holes),
    "forest_classifier": (lambda: RandomForestClassifier(20, random_state=0), iris_names),
    "forest_regressor": (lambda: RandomForestRegressor(20, random_state=0), diabetes),
    "extra_trees": (lambda: ExtraTreesClassifier(20, random_state=0), wine),
    "gradient_boosting": (lambda: GradientBoostingClassifier(n_estimators=20), wine),
    "gradient_boosting_regressor": (lambda: GradientBoostingRegressor(n_estimators=20), diabetes),
    "hist_boosting_nan": (lambda: HistGradientBoostingRegressor(max_iter=20), holes),
    "hist_boosting_multi_nan": (lambda: HistGradientBoostingClassifier(max_iter=10), hole_classes),
    "isolation_forest": (lambda: IsolationForest(n_estimators=20, random_state=0), wine),
    "kmeans": (lambda: KMeans(4, n_init=1, random_state=0), wine),
    "pca_union": (lambda: make_union(PCA(3), StandardScaler(), Normalizer()), wine),
    "columns": (lambda: make_pipeline(columns(), LogisticRegression()), people),
    "columns_forest": (lambda: make_pipeline(columns(), RandomForestClassifier(10, random_state=0)), people),
    "voting": (
        lambda: VotingClassifier([("a", GaussianNB()), ("b", LogisticRegression(max_iter=3000))], voting="soft"),
        wine,
    ),
    "stacking": (lambda: StackingClassifier([("a", GaussianNB()), ("b", DecisionTreeClassifier(max_depth=3))]), wine),
    "grid_search": (lambda: GridSearchCV(Ridge(), {"alpha": [0.1, 1.0]}), diabetes),
    "xgb_binary": (xgb("XGBClassifier"), cancer),
    "xgb_multi_nan": (xgb("XGBClassifier"), lambda: (hole_classes()[0], hole_classes()[1] // 10)),
    "xgb_regressor_nan": (xgb("XGBRegressor"), holes),
    "lgbm_binary": (lgbm("LGBMClassifier"), cancer),
    "lgbm_multi_strings": (lgbm("LGBMClassifier"), iris_names),
    "lgbm_regressor_nan": (lgbm("LGBMRegressor"), holes),
}
METHODS = ("predict", "predict_proba", "decision_function", "transform", "score_samples")


def batch(x: Any, rows: int) -> Any:
    picks = np.random.default_rng(rows).integers(0, len(x), rows)
    return x.iloc[picks] if hasattr(x, "iloc") else x[picks]


@pytest.mark.parametrize("name", MODELS)
def test_every_method_at_every_batch(name: str, tmp_path: Path) -> None:
    make, data = MODELS[name]
    x, y = data()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make().fit(x, y)
    compiled = mlec.compile(model, batch(x, 50))
    assert compiled.report.parity["methods"]
    compiled.save(tmp_path / "model.mle")
    loaded = mlec.load(tmp_path / "model.mle")
    methods = [m for m in METHODS if hasattr(model, m)]
    assert methods
    assert [m for m in METHODS if hasattr(loaded, m)] == methods
    for rows in BATCHES:
        part = batch(x, rows)
        for method in methods:
            got = getattr(loaded, method)(part)
            if rows == 0:  # scikit-learn refuses empty tables
                assert len(got) == 0
                continue
            wanted = getattr(model, method)(part)
            wanted = wanted.toarray() if hasattr(wanted, "toarray") else np.asarray(wanted)
            assert got.shape == wanted.shape
            assert got.dtype == wanted.dtype
            if wanted.dtype.kind != "f":
                np.testing.assert_array_equal(got, wanted)
            else:
                single = wanted.dtype == np.float32
                scale = float(np.abs(wanted).max())
                np.testing.assert_allclose(
                    got, wanted, rtol=5e-7 if single else 1e-9, atol=scale * (5e-7 if single else 1e-9)
                )


def test_other_forms_of_the_same_rows(tmp_path: Path) -> None:
    x, y = wine()
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(x, y)
    compiled = mlec.compile(model)
    wanted = model.predict_proba(x)
    for form in (
        x.tolist(),
        np.asfortranarray(x),
        np.repeat(x, 2, axis=1)[:, ::2],
        pd.DataFrame(x),
        np.flip(np.flip(x)),
    ):
        np.testing.assert_allclose(compiled.predict_proba(form), wanted, rtol=1e-9)
    np.testing.assert_allclose(
        compiled.predict_proba(x.astype(np.float32)), model.predict_proba(x.astype(np.float32)), atol=1e-6
    )
    labels, probabilities = compiled.run([x])
    np.testing.assert_array_equal(labels, model.predict(x))
    np.testing.assert_allclose(probabilities, wanted, rtol=1e-9)


@pytest.mark.parametrize("trained", [np.float32, np.float64])
def test_float32_tables_are_answered_as_the_source_does(trained: Any) -> None:
    x, y = wine()
    models = [make_pipeline(StandardScaler(), LogisticRegression()), StandardScaler(), Ridge()]
    for model in models:
        model.fit(x.astype(trained), y)
        compiled = mlec.compile(model)
        for method in ("predict", "predict_proba", "decision_function", "transform"):
            for dtype in (np.float32, np.float64):
                if hasattr(model, method):
                    table = x.astype(dtype)
                    wanted, got = getattr(model, method)(table), getattr(compiled, method)(table)
                    assert got.dtype == wanted.dtype
                    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_an_unknown_category_does_as_the_source_does() -> None:
    x, y = people()
    model = make_pipeline(columns(), LogisticRegression()).fit(x, y)
    compiled = mlec.compile(model)
    strange = x.head(3).assign(city=["Atlantis", "Oslo", "Paris"])
    np.testing.assert_allclose(compiled.predict_proba(strange), model.predict_proba(strange), rtol=1e-9)
    with pytest.raises(mlec.InputError, match="awful"):
        compiled.predict(x.head(2).assign(grade=["awful", "low"]))
