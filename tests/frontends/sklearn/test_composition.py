"""Pipelines, tables, unions, searches, votes, stacks, calibration; refusals; input checks; files."""

from __future__ import annotations

import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
from sklearn import (
    calibration,
    cluster,
    compose,
    datasets,
    decomposition,
    ensemble,
    feature_extraction,
    feature_selection,
    frozen,
    impute,
    linear_model,
    manifold,
    model_selection,
    multiclass,
    multioutput,
    naive_bayes,
    neighbors,
    neural_network,
    pipeline,
    preprocessing,
    svm,
    tree,
)
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.pipeline import make_pipeline, make_union

import mlec
from mlec.errors import FrontendError, InputError, NotFittedModelError, UnsupportedModelError, UntrustedPickleError
from mlec.frontends.base import LowerOptions

IRIS, KIND = datasets.load_iris(return_X_y=True)
NAMES = np.array(["a", "b", "c"])[KIND]
SUGAR, PROGRESS = (part[:200] for part in datasets.load_diabetes(return_X_y=True))
RNG = np.random.default_rng(0)


def titanic(rows: int = 240) -> tuple[pd.DataFrame, np.ndarray]:
    frame = pd.DataFrame(
        {
            "age": RNG.uniform(1, 80, rows),
            "sex": RNG.choice(["male", "female"], rows),
            "fare": RNG.lognormal(3, 1, rows),
            "port": RNG.choice(["S", "C", "Q"], rows),
            "class": RNG.integers(1, 4, rows),
            "unused": RNG.choice(["x", "y"], rows),
        }
    )
    survived = ((frame["sex"] == "female") | (frame["age"] < 15)).to_numpy()
    frame.loc[::11, "age"] = np.nan
    frame.loc[::19, "port"] = np.nan
    return frame, np.where(survived, "yes", "no")


FRAME, SURVIVED = titanic()


def titanic_pipeline(last: Any) -> pipeline.Pipeline:
    numeric = make_pipeline(impute.SimpleImputer(strategy="median"), preprocessing.StandardScaler())
    words = make_pipeline(
        impute.SimpleImputer(strategy="most_frequent"), preprocessing.OneHotEncoder(handle_unknown="ignore")
    )
    columns = compose.ColumnTransformer(
        [("numeric", numeric, ["age", "fare"]), ("words", words, ["sex", "port", "class"])]
    )
    return pipeline.Pipeline([("columns", columns), ("model", last)])


@pytest.mark.parametrize(
    "last",
    [
        linear_model.LogisticRegression(),
        ensemble.RandomForestClassifier(10, random_state=0),
        svm.SVC(),
        ensemble.HistGradientBoostingClassifier(max_iter=5),
        ensemble.GradientBoostingClassifier(n_estimators=4),
        neighbors.KNeighborsClassifier(),
        "passthrough",
    ],
    ids=lambda m: type(m).__name__,
)
def test_a_table_of_numbers_and_words(lab: Any, last: Any) -> None:
    model = titanic_pipeline(last)
    if isinstance(last, ensemble.HistGradientBoostingClassifier):
        model.set_params(columns__sparse_threshold=0.0)
    model.fit(FRAME, SURVIVED)
    strange = FRAME.assign(port="Z", sex=np.where(np.arange(len(FRAME)) % 3 == 0, "other", FRAME["sex"]))
    compiled = lab.check(model, FRAME, strange, FRAME.iloc[::-1])
    assert {feed.columns for feed in compiled.signature.table.feeds} == {(0, 2), (1, 3, 4)}
    assert compiled.signature.table.feature_names == tuple(FRAME.columns)
    scopes = {str(node.loc) for node in compiled.executable.graph.nodes}
    assert "pipeline.columns.numeric.standardscaler: StandardScaler" in scopes


def test_columns_are_found_by_name(lab: Any) -> None:
    """A ColumnTransformer takes a DataFrame's columns in any order, among others, and without those it does not use."""
    model = titanic_pipeline(linear_model.LogisticRegression()).fit(FRAME, SURVIVED)
    others = FRAME[FRAME.columns[::-1]].assign(more=1).drop(columns="unused")
    compiled = lab.check(model, others)
    search = model_selection.GridSearchCV(titanic_pipeline(tree.DecisionTreeClassifier(random_state=0)), {}, cv=2)
    lab.check(search.fit(FRAME, SURVIVED), others)
    for wrong in (FRAME.drop(columns="sex"), FRAME.assign(age="old"), FRAME.to_numpy()[:, :5]):
        with pytest.raises(InputError):
            compiled.predict(wrong)


def test_numbers_are_checked_column_by_column(lab: Any) -> None:
    """NaN is imputed in some columns and refused in the others, as by the source."""
    columns = compose.ColumnTransformer(
        [("gaps", impute.SimpleImputer(), [0]), ("rest", preprocessing.StandardScaler(), [1, 2])]
    )
    model = make_pipeline(columns, linear_model.Ridge()).fit(SUGAR, PROGRESS)
    compiled = lab.compile(model)
    for column in range(4):
        table = SUGAR[:5].copy()
        table[2, column] = np.nan
        if column in (1, 2):
            with pytest.raises(ValueError, match="NaN"):
                model.predict(table)
            with pytest.raises(InputError, match="NaN"):
                compiled.predict(table)
        else:
            np.testing.assert_allclose(compiled.predict(table), model.predict(table), rtol=1e-11)


def test_numbers_of_one_table_are_checked_differently(lab: Any) -> None:
    table = RNG.normal(size=(60, 5))
    columns = compose.ColumnTransformer(
        [
            ("plain", "passthrough", [1, -1]),
            ("scaled", preprocessing.MinMaxScaler(), [0, 2]),
            ("bins", preprocessing.KBinsDiscretizer(3, encode="onehot-dense"), slice(0, 2)),
        ]
    ).fit(table)
    compiled = lab.check(columns, table)
    assert mlec.compile(columns, progress=False).report.parity["methods"]["transform"]["excess"] <= 1
    for column, special, refused in [(0, np.nan, True), (2, np.nan, False), (2, np.inf, True), (4, np.inf, False)]:
        odd = table.copy()
        odd[3, column] = special
        if refused:
            with pytest.raises(ValueError, match="contains"):
                columns.transform(odd)
            with pytest.raises(InputError, match="contains"):
                compiled.transform(odd)
        else:
            lab.same(compiled.transform(odd), columns.transform(odd), 1e-12, "transform")


def test_ways_to_select_columns(lab: Any) -> None:
    scaler = preprocessing.StandardScaler()
    for selected in (
        [0, 2],
        slice(1, None),
        slice(None, 2),
        np.array([1, 3]),
        [True, False, False, True],
        [-1, 0],
        [np.int64(2)],
    ):
        for rest in ("drop", "passthrough", preprocessing.MinMaxScaler()):
            lab.check(compose.ColumnTransformer([("a", scaler, selected)], remainder=rest).fit(IRIS), IRIS)
    numbers = FRAME[["age", "fare", "class"]]
    for selected in (
        ["fare"],
        slice("fare", "class"),
        make_column_selector(pattern="a"),
        lambda frame: ["class", "age"],
    ):
        transformer = compose.ColumnTransformer([("a", scaler, selected)], remainder="passthrough").fit(numbers)
        compiled = lab.compile(transformer)
        lab.same(compiled.transform(numbers), transformer.transform(numbers), 1e-11, str(selected))
    by_type = make_column_transformer(
        (scaler, make_column_selector(dtype_include="number")),
        (preprocessing.OneHotEncoder(), make_column_selector(dtype_exclude="number")),
    )
    lab.check(by_type.fit(FRAME), FRAME)


def test_column_transformer_corners(lab: Any) -> None:
    scaler = preprocessing.StandardScaler()
    weighted = compose.ColumnTransformer(
        [("a", scaler, [0]), ("none", scaler, []), ("b", "passthrough", [1, 0]), ("c", "drop", [2])],
        transformer_weights={"a": 3.0},
    )
    lab.check(weighted.fit(IRIS), IRIS)
    nested = compose.ColumnTransformer(
        [("inner", compose.ColumnTransformer([("deep", scaler, [1])], remainder="passthrough"), [3, 1, 0])]
    )
    lab.check(nested.fit(IRIS), IRIS)
    twice = compose.ColumnTransformer(
        [
            ("one", preprocessing.OneHotEncoder(handle_unknown="ignore"), ["sex", "port"]),
            ("two", preprocessing.OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1), ["port"]),
            ("three", preprocessing.OneHotEncoder(), ["sex"]),
        ]
    )
    lab.check(twice.fit(FRAME), FRAME)


def test_pipelines(lab: Any) -> None:
    lab.check(
        pipeline.Pipeline([("a", "passthrough"), ("b", None), ("c", linear_model.Ridge())]).fit(SUGAR, PROGRESS), SUGAR
    )
    lab.check(make_pipeline(preprocessing.StandardScaler(), None).fit(IRIS), IRIS)
    lab.check(
        make_pipeline(make_pipeline(decomposition.PCA(2)), make_pipeline(ensemble.RandomForestClassifier(5))).fit(
            IRIS, NAMES
        ),
        IRIS,
    )
    lab.check(
        make_pipeline(
            preprocessing.PolynomialFeatures(2),
            feature_selection.SelectKBest(k=5),
            linear_model.LogisticRegression(max_iter=500),
        ).fit(IRIS, KIND),
        IRIS,
    )
    lab.check(
        make_pipeline(preprocessing.StandardScaler(), cluster.KMeans(3, n_init=1, random_state=0)).fit(IRIS),
        IRIS,
        rtol=1e-7,
    )
    lab.check(
        make_pipeline(cluster.KMeans(3, n_init=1, random_state=0), linear_model.Ridge()).fit(SUGAR, PROGRESS),
        SUGAR,
        rtol=1e-7,
    )


def test_unions(lab: Any) -> None:
    union = make_union(
        decomposition.PCA(2),
        preprocessing.StandardScaler(),
        "passthrough",
        make_pipeline(preprocessing.MinMaxScaler(), preprocessing.Binarizer(threshold=0.5)),
    )
    lab.check(union.fit(IRIS), IRIS)
    weighted = pipeline.FeatureUnion(
        [("a", preprocessing.StandardScaler()), ("b", "drop")], transformer_weights={"a": 0.5}
    )
    lab.check(make_pipeline(weighted, linear_model.Ridge()).fit(SUGAR, PROGRESS), SUGAR)


def test_searches(lab: Any) -> None:
    grid = model_selection.GridSearchCV(
        make_pipeline(preprocessing.StandardScaler(), svm.SVC()), {"svc__C": [1, 10]}, cv=2
    )
    lab.check(grid.fit(IRIS, NAMES), IRIS)
    draw = model_selection.RandomizedSearchCV(tree.DecisionTreeRegressor(), {"max_depth": [2, 3]}, n_iter=2, cv=2)
    lab.check(draw.fit(SUGAR, PROGRESS), SUGAR)
    with pytest.raises(NotFittedModelError):
        lab.lower(model_selection.GridSearchCV(svm.SVC(), {"C": [1]}, refit=False).fit(IRIS, KIND))


MEMBERS = [
    ("line", linear_model.LogisticRegression(max_iter=200)),
    ("bayes", naive_bayes.GaussianNB()),
    ("forest", ensemble.RandomForestClassifier(5, random_state=0)),
]


@pytest.mark.parametrize("target", [NAMES, KIND == 1, KIND * 10], ids=["names", "bools", "numbers"])
@pytest.mark.parametrize("weights", [None, [1, 2, 1.5]], ids=str)
def test_votes(lab: Any, target: np.ndarray, weights: Any) -> None:
    for voting in ("hard", "soft"):
        lab.check(ensemble.VotingClassifier(MEMBERS, voting=voting, weights=weights).fit(IRIS, target), IRIS + 0.02)


@pytest.mark.parametrize("members", [MEMBERS, MEMBERS[:1]], ids=["three", "one"])
def test_votes_that_are_not_flattened(lab: Any, members: Any) -> None:
    weights = [0.3, 2, 1.5][: len(members)]
    model = ensemble.VotingClassifier(members, voting="soft", flatten_transform=False, weights=weights).fit(IRIS, NAMES)
    compiled = lab.compile(model)
    for rows in (150, 1, 2, 5):
        lab.same(compiled.transform(IRIS[:rows]), model.transform(IRIS[:rows]), 1e-12, f"{rows} rows")
    assert compiled.transform(IRIS[:0]).shape == (len(members), 0, 3)
    with pytest.raises(UnsupportedModelError, match="in the middle"):
        lab.lower(pipeline.make_pipeline(model, preprocessing.StandardScaler().fit(IRIS)))
    assert mlec.compile(model, progress=False).report.parity["methods"]["transform"]["excess"] <= 1


def test_votes_of_regressors_and_dropped_members(lab: Any) -> None:
    members = [("a", linear_model.Ridge()), ("b", tree.DecisionTreeRegressor(max_depth=3)), ("c", "drop")]
    lab.check(ensemble.VotingRegressor(members).fit(SUGAR, PROGRESS), SUGAR)
    lab.check(ensemble.VotingRegressor(members, weights=[1, 3, 9]).fit(SUGAR, PROGRESS), SUGAR)
    lab.check(ensemble.VotingClassifier([*MEMBERS, ("gone", "drop")]).fit(IRIS, NAMES), IRIS)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"passthrough": True},
        {"stack_method": "predict"},
        {"final_estimator": ensemble.RandomForestClassifier(5, random_state=0)},
    ],
    ids=str,
)
@pytest.mark.parametrize("target", [NAMES, KIND == 1], ids=["three", "two"])
def test_stacks(lab: Any, options: Any, target: np.ndarray) -> None:
    members = [*MEMBERS, ("svm", svm.LinearSVC())]
    lab.check(ensemble.StackingClassifier(members, cv=3, **options).fit(IRIS, target), IRIS + 0.02)


def test_stack_of_regressors(lab: Any) -> None:
    members = [("a", linear_model.Ridge()), ("b", ensemble.GradientBoostingRegressor(n_estimators=5))]
    lab.check(ensemble.StackingRegressor(members, cv=3).fit(SUGAR, PROGRESS), SUGAR)


@pytest.mark.parametrize("method", ["sigmoid", "isotonic"])
@pytest.mark.parametrize("target", [NAMES, KIND == 1], ids=["three", "two"])
@pytest.mark.parametrize(
    "base", [svm.LinearSVC(), ensemble.RandomForestClassifier(5, random_state=0)], ids=lambda m: type(m).__name__
)
def test_calibration(lab: Any, method: str, target: np.ndarray, base: Any) -> None:
    for together in (True, False):
        lab.check(
            calibration.CalibratedClassifierCV(base, method=method, cv=3, ensemble=together).fit(IRIS, target),
            IRIS,
            IRIS + 0.05,
        )


def test_models_fitted_before(lab: Any) -> None:
    fitted = linear_model.LogisticRegression(max_iter=300).fit(IRIS, NAMES)
    lab.check(frozen.FrozenEstimator(fitted), IRIS)
    lab.check(calibration.CalibratedClassifierCV(frozen.FrozenEstimator(fitted)).fit(IRIS, NAMES), IRIS)
    lab.check(ensemble.StackingClassifier([("line", fitted)], cv="prefit").fit(IRIS, NAMES), IRIS)


def test_one_model_for_each_class_or_target(lab: Any) -> None:
    for base in (linear_model.LogisticRegression(), tree.DecisionTreeClassifier(max_depth=2), svm.LinearSVC()):
        lab.check(multiclass.OneVsRestClassifier(base).fit(IRIS, NAMES), IRIS)
        lab.check(multiclass.OneVsRestClassifier(base).fit(IRIS, KIND == 1), IRIS)
        lab.check(
            multiclass.OneVsRestClassifier(base).fit(IRIS, np.column_stack([KIND == 0, KIND > 0]).astype(int)), IRIS
        )
    labels = np.column_stack([KIND, KIND == 2]).astype(int)
    lab.check(multioutput.MultiOutputClassifier(linear_model.LogisticRegression()).fit(IRIS, labels), IRIS)
    targets = np.column_stack([PROGRESS, PROGRESS**2])
    lab.check(multioutput.MultiOutputRegressor(linear_model.Ridge()).fit(SUGAR, targets), SUGAR)
    lab.check(multioutput.RegressorChain(linear_model.Ridge(), order=[1, 0]).fit(SUGAR, targets), SUGAR)


@pytest.mark.parametrize(
    "how",
    [
        {"func": np.log1p, "inverse_func": np.expm1},
        {"func": np.sqrt, "inverse_func": np.square},
        {"transformer": preprocessing.StandardScaler()},
        {"transformer": preprocessing.MinMaxScaler()},
        {"transformer": preprocessing.RobustScaler()},
        {"transformer": preprocessing.MaxAbsScaler()},
        {},
    ],
    ids=str,
)
def test_transformed_targets(lab: Any, how: Any) -> None:
    lab.check(compose.TransformedTargetRegressor(linear_model.Ridge(), **how).fit(SUGAR, PROGRESS), SUGAR)


# -- inputs ----------------------------------------------------------------------------------------------------------


def test_forms_of_input(lab: Any) -> None:
    frame = pd.DataFrame(IRIS, columns=["a", "b", "c", "d"])
    model = make_pipeline(preprocessing.StandardScaler(), linear_model.LogisticRegression()).fit(frame, NAMES)
    compiled = lab.compile(model)
    expected = model.predict_proba(frame)
    for table in (
        frame,
        IRIS,
        IRIS.tolist(),
        np.asfortranarray(IRIS),
        np.repeat(IRIS, 2, axis=0)[::2],
        frame.to_dict("list"),
    ):
        np.testing.assert_allclose(compiled.predict_proba(table), expected, rtol=1e-12)
    np.testing.assert_allclose(compiled.predict_proba(IRIS.astype(np.float32)), expected, rtol=1e-4)
    whole = (IRIS * 10).astype(np.int32)
    np.testing.assert_allclose(
        compiled.predict_proba(whole), model.predict_proba(pd.DataFrame(whole, columns=frame.columns)), rtol=1e-9
    )
    with pytest.raises(InputError, match="order"):
        compiled.predict(frame[["d", "c", "b", "a"]])
    for wrong in (IRIS[:, :3], IRIS[0], np.array([["x"] * 4])):
        with pytest.raises(InputError):
            compiled.predict(wrong)


@pytest.mark.parametrize(
    "model",
    [
        linear_model.Ridge(),
        tree.DecisionTreeRegressor(),
        ensemble.GradientBoostingRegressor(n_estimators=2),
        ensemble.HistGradientBoostingRegressor(max_iter=2),
        make_pipeline(preprocessing.StandardScaler(), linear_model.Ridge()),
        make_pipeline(impute.SimpleImputer(), linear_model.Ridge()),
        make_pipeline(preprocessing.StandardScaler(), tree.DecisionTreeRegressor()),
        make_pipeline(preprocessing.MinMaxScaler(), impute.SimpleImputer(), linear_model.Ridge()),
        make_pipeline(
            feature_selection.SelectKBest(feature_selection.f_regression, k=2), neighbors.KNeighborsRegressor()
        ),
        ensemble.VotingRegressor([("a", linear_model.Ridge()), ("b", tree.DecisionTreeRegressor())]),
    ],
    ids=lambda m: type(m[-1]).__name__ + "s" * len(m) if isinstance(m, pipeline.Pipeline) else type(m).__name__,
)
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_numbers_that_the_source_refuses_are_refused(lab: Any, model: Any, special: float) -> None:
    compiled = lab.compile(model.fit(SUGAR, PROGRESS))
    table = SUGAR[:8].copy()
    table[3, 2] = special
    try:
        expected = model.predict(table)
    except ValueError:
        with pytest.raises(InputError):
            compiled.predict(table)
    else:
        np.testing.assert_allclose(compiled.predict(table), expected, rtol=1e-11)


# -- refusals --------------------------------------------------------------------------------------------------------


class Doubled(linear_model.LinearRegression):
    def predict(self, X: Any) -> Any:
        return 2 * super().predict(X)


class Named(linear_model.LinearRegression):
    """A subclass that computes what its base does."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        return super().fit(X, y)


class Foreign(BaseEstimator):
    def fit(self, X: Any, y: Any = None) -> Any:
        self.fitted_ = True
        self.n_features_in_ = 4
        return self

    def predict(self, X: Any) -> Any:
        return np.zeros(len(X))


class Stateless(TransformerMixin, BaseEstimator):
    """It learns nothing, so that scikit-learn takes it for one that was not fitted."""

    def fit(self, X: Any, y: Any = None) -> Any:
        return self

    def transform(self, X: Any) -> Any:
        return X


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Doubled(), "Doubled"),
        (Foreign(), "Foreign"),
        (make_pipeline(Stateless(), linear_model.Ridge()), "no exact lowering for"),
        (manifold.Isomap(), "Isomap"),
        (neighbors.KNeighborsClassifier(weights=np.exp), "weights"),
        (neighbors.KNeighborsClassifier(metric="cosine"), "cosine"),
        (svm.SVC(kernel=lambda a, b: a @ b.T), "kernel"),
        (pipeline.Pipeline([("scale", preprocessing.StandardScaler()), ("odd", manifold.Isomap())]), "pipeline.odd"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_unsupported_models_are_named(lab: Any, model: Any, words: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        lab.lower(model.fit(IRIS, KIND))
    assert words in str(caught.value)
    assert caught.value.hint


def test_subclasses_that_change_nothing(lab: Any) -> None:
    lab.check(Named().fit(IRIS, KIND), IRIS)


def test_text_is_refused(lab: Any) -> None:
    words = ["good film", "bad film", "good good", "awful"] * 5
    model = make_pipeline(feature_extraction.text.TfidfVectorizer(), linear_model.LogisticRegression()).fit(
        words, [1, 0, 1, 0] * 5
    )
    with pytest.raises((UnsupportedModelError, FrontendError)) as caught:
        lab.lower(model)
    assert "TfidfVectorizer" in str(caught.value)


@pytest.mark.parametrize(
    "model",
    [
        linear_model.LogisticRegression(),
        make_pipeline(preprocessing.StandardScaler(), svm.SVC()),
        ensemble.RandomForestClassifier(),
        neural_network.MLPClassifier(),
        model_selection.GridSearchCV(svm.SVC(), {"C": [1]}),
    ],
    ids=lambda m: type(m).__name__,
)
def test_unfitted_models_are_refused(lab: Any, model: Any) -> None:
    with pytest.raises(NotFittedModelError, match="fit"):
        lab.lower(model)


# -- the frontend itself ---------------------------------------------------------------------------------------------


def test_accepts(lab: Any) -> None:
    assert lab.frontend.accepts(svm.SVC())
    assert lab.frontend.accepts(Doubled())
    assert not lab.frontend.accepts(np.zeros(3))
    assert not lab.frontend.accepts("model.pkl")


def test_the_package_is_imported_without_scikit_learn() -> None:
    code = "import sys, mlec.frontends.sklearn as s; s.SklearnFrontend().accepts(3); assert 'sklearn' not in sys.modules, 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


@pytest.mark.parametrize("compress", [0, 3, ("gzip", 3), ("bz2", 3), ("xz", 3)], ids=str)
def test_pickles_need_permission(lab: Any, tmp_path: Path, compress: Any) -> None:
    model = make_pipeline(preprocessing.StandardScaler(), linear_model.LogisticRegression()).fit(IRIS, KIND)
    path = tmp_path / "no_ending"
    joblib.dump(model, path, compress=compress)
    assert lab.frontend.sniff(path.read_bytes()[:65536], path)
    with pytest.raises(UntrustedPickleError) as caught:
        lab.frontend.load(path, LowerOptions())
    digest = str(caught.value).split("trust_pickle='")[1].split("'")[0]
    for trust in (True, digest):
        np.testing.assert_array_equal(
            lab.frontend.load(path, LowerOptions(trust_pickle=trust)).predict(IRIS), model.predict(IRIS)
        )
    with pytest.raises(UntrustedPickleError):
        lab.frontend.load(path, LowerOptions(trust_pickle="sha256:" + "0" * 64))


def test_skops_files(lab: Any, tmp_path: Path) -> None:
    skops_io = pytest.importorskip("skops.io")
    for model in (titanic_pipeline(ensemble.RandomForestClassifier(3, random_state=0)), titanic_pipeline(svm.SVC())):
        model.fit(FRAME, SURVIVED)
        path = tmp_path / "no_ending"
        skops_io.dump(model, path)
        assert lab.frontend.sniff(path.read_bytes()[:65536], path)
        with path.open("rb") as file:
            oracle = lab.frontend.oracle(lab.frontend.open_file(file, "skops"))
        np.testing.assert_array_equal(oracle["predict"](FRAME), model.predict(FRAME))


def test_skops_is_named_where_it_is_missing(lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("schema.json", "{}")
    assert lab.frontend.sniff(path.read_bytes(), path)
    monkeypatch.setitem(sys.modules, "skops", None)
    with pytest.raises(FrontendError, match="skops is not installed"):
        lab.frontend.load(path, LowerOptions())


def test_other_files_are_left_alone(lab: Any, tmp_path: Path) -> None:
    for content in (
        b"",
        b"\x80",
        pickle.dumps({"a": 1}),
        b"{}",
        b"tree\nversion=v4",
        b"\x1f\x8bnot really",
        b"PK\x03\x04broken",
    ):
        path = tmp_path / "file.pkl"
        path.write_bytes(content)
        assert not lab.frontend.sniff(content, path)


def test_a_damaged_pickle(lab: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(svm.SVC().fit(IRIS, KIND))[:-200])
    with pytest.raises(FrontendError, match=r"model\.pkl"):
        lab.frontend.load(path, LowerOptions(trust_pickle=True))


# -- thresholds, pairs, chains ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [None, "no", "yes"])
@pytest.mark.parametrize("threshold", ["auto", 0.3])
@pytest.mark.parametrize("member", [linear_model.LogisticRegression(), svm.LinearSVC()], ids=lambda m: type(m).__name__)
def test_threshold_classifier(lab: Any, label: str | None, threshold: Any, member: Any) -> None:
    names = np.where(KIND == 1, "yes", "no")
    model = model_selection.FixedThresholdClassifier(member, threshold=threshold, pos_label=label)
    if label is None:
        model.set_params(pos_label=None)
        names = np.where(KIND == 1, 1, 0)
    lab.check(model.fit(IRIS, names), IRIS * 1.01)


def test_a_threshold_for_no_label_is_refused(lab: Any) -> None:
    model = model_selection.FixedThresholdClassifier(linear_model.LogisticRegression(), pos_label="maybe")
    with pytest.raises(UnsupportedModelError, match="'maybe' is none of its labels"):
        lab.lower(model.fit(IRIS, np.where(KIND == 1, "yes", "no")))


@pytest.mark.parametrize("method", ["auto", "decision_function"])
def test_tuned_threshold(lab: Any, method: str) -> None:
    model = model_selection.TunedThresholdClassifierCV(linear_model.LogisticRegression(), response_method=method, cv=2)
    lab.check(model.fit(IRIS, KIND == 1), IRIS * 1.01)


@pytest.mark.parametrize("member", [linear_model.LogisticRegression(), naive_bayes.GaussianNB()], ids=str)
@pytest.mark.parametrize("kinds", [NAMES, KIND == 1], ids=["3", "2"])
def test_one_versus_one(lab: Any, member: Any, kinds: np.ndarray) -> None:
    lab.check(multiclass.OneVsOneClassifier(member).fit(IRIS, kinds), IRIS * 1.01)


def test_one_versus_one_by_parts_of_a_kernel_is_refused(lab: Any) -> None:
    kernel = IRIS @ IRIS.T
    with pytest.raises(UnsupportedModelError, match="kernels"):
        lab.lower(multiclass.OneVsOneClassifier(svm.SVC(kernel="precomputed")).fit(kernel, KIND))


@pytest.mark.parametrize("constant", [0, 1])
@pytest.mark.parametrize("first", [False, True])
def test_one_versus_rest_with_a_label_that_is_always_the_same(lab: Any, constant: int, first: bool) -> None:
    labels = np.column_stack([KIND == 0, np.full(150, constant), KIND == 2]).astype(int)
    labels = labels[:, [1, 0, 2]] if first else labels
    with pytest.warns(UserWarning, match="present in all"):
        model = multiclass.OneVsRestClassifier(linear_model.LogisticRegression()).fit(IRIS, labels)
    lab.check(model, IRIS * 1.01)


@pytest.mark.parametrize("method", ["predict", "predict_proba", "decision_function"])
def test_classifier_chain(lab: Any, method: str) -> None:
    labels = np.column_stack([KIND == 0, KIND == 1, IRIS[:, 0] > 5.8]).astype(int)
    model = multioutput.ClassifierChain(linear_model.LogisticRegression(), order=[2, 0, 1], chain_method=method)
    lab.check(model.fit(IRIS, labels), IRIS * 1.01)


@pytest.mark.parametrize("kinds", [NAMES, KIND == 1], ids=["3", "2"])
@pytest.mark.parametrize("member", [svm.LinearSVC(), naive_bayes.GaussianNB()], ids=lambda m: type(m).__name__)
def test_calibration_by_temperature(lab: Any, kinds: np.ndarray, member: Any) -> None:
    lab.check(calibration.CalibratedClassifierCV(member, method="temperature", cv=2).fit(IRIS, kinds), IRIS * 1.01)


# -- no columns, and columns that only pass --------------------------------------------------------------------------


def test_a_column_transformer_that_drops_all(lab: Any) -> None:
    model = compose.ColumnTransformer([("a", preprocessing.StandardScaler(), [])]).fit(IRIS)
    with pytest.raises(UnsupportedModelError, match="no column"):
        lab.lower(model)


def test_a_pipeline_that_changes_nothing(lab: Any) -> None:
    model = pipeline.Pipeline([("a", "passthrough")]).fit(IRIS)
    lab.check(model, IRIS, example_inputs=(IRIS,))
    with pytest.raises(FrontendError, match="how many columns"):
        lab.lower(model)


def test_polars_columns_that_a_pandas_table_passes_through(lab: Any) -> None:
    pl = pytest.importorskip("polars")
    table = pd.DataFrame(IRIS[:, :2], columns=["a", "b"]).astype({"b": np.float32})
    model = compose.ColumnTransformer([("s", preprocessing.StandardScaler(), ["a"])], remainder="passthrough")
    model.set_output(transform="polars").fit(table)
    got, wanted = lab.compile(model).transform(table), model.transform(table)
    assert got.dtypes == wanted.dtypes == [pl.Float64, pl.Float32]
    np.testing.assert_allclose(got.to_numpy(), wanted.to_numpy(), rtol=1e-12)
