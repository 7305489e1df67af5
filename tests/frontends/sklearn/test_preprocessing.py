"""Scalers, encoders, imputers, selections and projections."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn import (
    cross_decomposition,
    datasets,
    decomposition,
    ensemble,
    feature_selection,
    impute,
    linear_model,
    naive_bayes,
    preprocessing,
    random_projection,
)
from sklearn.pipeline import make_pipeline

from mlec.errors import InputError, UnsupportedModelError

IRIS, KIND = datasets.load_iris(return_X_y=True)
RNG = np.random.default_rng(0)
SIGNED = RNG.normal(0, 3, (120, 5))
GAPPY = np.where(RNG.random(SIGNED.shape) < 0.2, np.nan, SIGNED)
SPECIAL = np.vstack([np.zeros((1, 5)), SIGNED, -SIGNED, np.full((2, 5), 1e-300)])

NAN_TOLERANT = [
    preprocessing.StandardScaler(),
    preprocessing.StandardScaler(with_mean=False),
    preprocessing.StandardScaler(with_std=False),
    preprocessing.MinMaxScaler(),
    preprocessing.MinMaxScaler((-1, 2), clip=True),
    preprocessing.MaxAbsScaler(),
    preprocessing.RobustScaler(),
    preprocessing.RobustScaler(with_centering=False),
    preprocessing.RobustScaler(with_scaling=False),
    feature_selection.VarianceThreshold(),
]
STRICT = [
    preprocessing.Normalizer(),
    preprocessing.Normalizer("l1"),
    preprocessing.Normalizer("max"),
    preprocessing.Binarizer(threshold=0.5),
    preprocessing.PolynomialFeatures(3),
    preprocessing.PolynomialFeatures(2, interaction_only=True, include_bias=False),
    preprocessing.PolynomialFeatures((2, 3)),
    preprocessing.PolynomialFeatures(1, include_bias=False),
    preprocessing.PolynomialFeatures(0),
    decomposition.PCA(3),
    decomposition.PCA(3, whiten=True),
    decomposition.TruncatedSVD(3, random_state=0),
    decomposition.IncrementalPCA(3),
    decomposition.FastICA(3, random_state=0, whiten="unit-variance"),
    random_projection.GaussianRandomProjection(3, random_state=0),
    random_projection.SparseRandomProjection(3, random_state=0),
    preprocessing.KBinsDiscretizer(4, encode="ordinal"),
    preprocessing.KBinsDiscretizer([2, 3, 4, 5, 2], encode="onehot-dense"),
    preprocessing.KBinsDiscretizer(3),
    preprocessing.KBinsDiscretizer(2, encode="ordinal", strategy="uniform"),
    preprocessing.FunctionTransformer(),
    preprocessing.FunctionTransformer(np.square, validate=True),
    preprocessing.FunctionTransformer(np.tanh),
    preprocessing.FunctionTransformer(np.reciprocal),
    preprocessing.FunctionTransformer(np.absolute),
]


@pytest.mark.parametrize("model", NAN_TOLERANT, ids=str)
def test_columnwise(lab: Any, model: Any) -> None:
    lab.check(model.fit(SIGNED), SIGNED, GAPPY, SPECIAL)


@pytest.mark.parametrize("model", STRICT, ids=lambda m: str(m).replace("\n", ""))
def test_strict(lab: Any, model: Any) -> None:
    lab.check(model.fit(SIGNED), SIGNED, SPECIAL[1:])


def test_rows_of_zeros_keep_their_values(lab: Any) -> None:
    for norm in ("l1", "l2", "max"):
        lab.check(preprocessing.Normalizer(norm).fit(SIGNED), np.zeros((3, 5)))


def test_bin_edges(lab: Any) -> None:
    model = preprocessing.KBinsDiscretizer(5, encode="onehot-dense").fit(SIGNED)
    rows = np.array([[edges[i] for edges in model.bin_edges_] for i in range(6)])
    lab.check(model, rows, np.nextafter(rows, np.inf), np.nextafter(rows, -np.inf))


@pytest.mark.parametrize(
    "model",
    [
        feature_selection.SelectKBest(k=2),
        feature_selection.SelectPercentile(percentile=50),
        feature_selection.SelectFromModel(linear_model.LogisticRegression()),
        feature_selection.SelectFromModel(ensemble.RandomForestClassifier(5, random_state=0)),
    ],
    ids=lambda m: type(m).__name__,
)
def test_selection(lab: Any, model: Any) -> None:
    lab.check(model.fit(IRIS, KIND), IRIS)


def test_selection_checks_the_columns_that_it_drops(lab: Any) -> None:
    table = SIGNED[:, :2].copy()
    compiled = lab.compile(feature_selection.SelectKBest(k=1).fit(table, table[:, 0] > 0))
    table[3, 1] = np.nan
    with pytest.raises(InputError, match="NaN"):
        compiled.transform(table)


def test_recursive_elimination_predicts_too(lab: Any) -> None:
    lab.check(feature_selection.RFE(linear_model.LogisticRegression(), n_features_to_select=2).fit(IRIS, KIND), IRIS)


@pytest.mark.parametrize(
    "model",
    [cross_decomposition.PLSRegression(2), cross_decomposition.PLSCanonical(1), cross_decomposition.CCA(1)],
    ids=str,
)
def test_partial_least_squares(lab: Any, model: Any) -> None:
    lab.check(model.fit(SIGNED, SIGNED[:, :2] ** 2), SIGNED)


@pytest.mark.parametrize("kernel", ["linear", "poly", "rbf", "sigmoid", "cosine"])
def test_principal_components_of_kernels(lab: Any, kernel: str) -> None:
    model = make_pipeline(preprocessing.StandardScaler(), decomposition.KernelPCA(2, kernel=kernel))
    compiled = lab.check(model.fit(SIGNED), SIGNED + 0.01, rtol=1e-10)
    assert "pipeline.kernelpca: KernelPCA" in {str(node.loc) for node in compiled.executable.graph.nodes}


@pytest.mark.parametrize("offset", [100, 1000])
def test_kernels_of_data_that_is_far_from_zero(lab: Any, offset: float) -> None:
    lab.check(decomposition.KernelPCA(2).fit(SIGNED + offset), SIGNED + offset, rtol=1e-8)
    lab.check(decomposition.KernelPCA(2, kernel="rbf", gamma=1e-6).fit(SIGNED + offset), SIGNED + offset, rtol=1e-8)


def test_all_components_and_given_kernels(lab: Any) -> None:
    lab.check(decomposition.KernelPCA().fit(SIGNED), SIGNED, rtol=1e-9)  # some eigenvalues are 0
    given = SIGNED @ SIGNED.T
    lab.check(decomposition.KernelPCA(2, kernel="precomputed").fit(given), given[:7], rtol=1e-9)


def test_cosines_of_rows_of_zeros(lab: Any) -> None:
    lab.check(decomposition.KernelPCA(2, kernel="cosine").fit(SIGNED), SIGNED, np.zeros((3, 5)), rtol=1e-10)


def test_a_kernel_that_is_unknown(lab: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="KernelPCA: kernel"):
        lab.lower(decomposition.KernelPCA(2, kernel=lambda a, b: a @ b).fit(SIGNED))


# -- imputation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["mean", "median", "most_frequent", "constant"])
@pytest.mark.parametrize("indicator", [False, True])
def test_imputer(lab: Any, strategy: str, indicator: bool) -> None:
    lab.check(impute.SimpleImputer(strategy=strategy, add_indicator=indicator).fit(GAPPY), GAPPY, SIGNED)


def test_imputer_of_a_number(lab: Any) -> None:
    marked = np.where(np.isnan(GAPPY), -1.0, GAPPY)
    model = impute.SimpleImputer(missing_values=-1.0, add_indicator=True).fit(marked)
    lab.check(model, marked)
    with pytest.raises(InputError, match="NaN"):
        lab.compile(model).transform(GAPPY)


def test_imputer_of_a_whole_number(lab: Any) -> None:
    counts = np.array([[0, 3], [2, 0], [4, 9]])
    lab.check(impute.SimpleImputer(missing_values=0, add_indicator=True).fit(counts), counts)


@pytest.mark.filterwarnings("ignore:Skipping features")
def test_imputer_drops_empty_columns(lab: Any) -> None:
    empty = GAPPY.copy()
    empty[:, 2] = np.nan
    lab.check(impute.SimpleImputer(add_indicator=True).fit(empty), empty, SIGNED)
    lab.check(impute.SimpleImputer(strategy="constant", keep_empty_features=True).fit(empty), empty)


def test_imputer_after_another_step(lab: Any) -> None:
    lab.check(make_pipeline(preprocessing.StandardScaler(), impute.SimpleImputer(add_indicator=True)).fit(GAPPY), GAPPY)


def test_missing_indicator(lab: Any) -> None:
    lab.check(impute.MissingIndicator(features="all").fit(GAPPY), GAPPY, SIGNED)
    partly = np.where(np.arange(5) == 1, GAPPY, SIGNED)
    lab.check(impute.MissingIndicator(error_on_new=False).fit(partly), partly)
    with pytest.raises(UnsupportedModelError, match="error_on_new"):
        lab.lower(impute.MissingIndicator().fit(partly))


# -- encoders --------------------------------------------------------------------------------------------------------

TOWNS = np.array(
    [["Oslo", "red"], ["Bergen", "blue"], ["Ålesund", "red"], ["Oslo", "green"], ["Bergen", "red"]] * 6, object
)
STRANGE = np.array([["Oslo", "red"], ["Narvik", "blue"], ["Ålesundet", "pink"], ["oslo", ""], [np.nan, np.nan]], object)
NUMBERS = RNG.integers(0, 4, (80, 3)).astype(float)
ODD_NUMBERS = np.vstack([NUMBERS, NUMBERS + 0.5, np.full((1, 3), -1e9)])
NUMBERS_GAPPY = np.where(RNG.random(NUMBERS.shape) < 0.2, np.nan, NUMBERS)


@pytest.mark.parametrize("drop", [None, "first", "if_binary"])
@pytest.mark.parametrize("unknown", ["error", "ignore", "infrequent_if_exist"])
@pytest.mark.parametrize("rare", [{}, {"min_frequency": 8}, {"max_categories": 2}], ids=str)
def test_one_hot(lab: Any, drop: Any, unknown: str, rare: Any) -> None:
    model = preprocessing.OneHotEncoder(drop=drop, handle_unknown=unknown, sparse_output=False, **rare)
    lab.check(model.fit(TOWNS), TOWNS, *([] if unknown == "error" else [STRANGE]))
    lab.check(model.fit(NUMBERS), NUMBERS, *([] if unknown == "error" else [ODD_NUMBERS]))
    lab.check(model.fit(NUMBERS_GAPPY), NUMBERS_GAPPY, *([] if unknown == "error" else [ODD_NUMBERS]))


def test_one_hot_refuses_unknown_values_as_the_library_does(lab: Any) -> None:
    for table, strange in ((TOWNS, STRANGE), (NUMBERS, ODD_NUMBERS)):
        model = preprocessing.OneHotEncoder().fit(table)
        compiled = lab.check(model, table)
        with pytest.raises(ValueError, match="unknown"):
            model.transform(strange)
        with pytest.raises(InputError, match=r"unknown|missing"):
            compiled.transform(strange)


@pytest.mark.parametrize("dtype", [int, np.float32, bool])
def test_one_hot_of_other_dtypes(lab: Any, dtype: Any) -> None:
    lab.check(preprocessing.OneHotEncoder(dtype=dtype).fit(TOWNS), TOWNS)


def test_one_hot_with_missing_strings(lab: Any) -> None:
    gappy = TOWNS.copy()
    gappy[::7, 0] = np.nan
    lab.check(preprocessing.OneHotEncoder(handle_unknown="ignore").fit(gappy), gappy, TOWNS)
    lab.check(
        preprocessing.OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1).fit(gappy), gappy, STRANGE
    )


def test_mixed_frame(lab: Any) -> None:
    frame = pd.DataFrame(
        {"town": TOWNS[:, 0], "rooms": np.arange(30) % 3, "sold": np.arange(30) % 2 == 0, "size": NUMBERS[:30, 0]}
    )
    lab.check(
        preprocessing.OneHotEncoder(handle_unknown="ignore").fit(frame), frame, frame.assign(town="Narvik", rooms=9)
    )
    lab.check(preprocessing.OneHotEncoder().fit(frame), frame)
    lab.check(preprocessing.OrdinalEncoder().fit(frame), frame)
    lab.check(preprocessing.OneHotEncoder(drop=["Oslo", 1, True, 2.0]).fit(frame), frame)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"handle_unknown": "use_encoded_value", "unknown_value": -1},
        {"handle_unknown": "use_encoded_value", "unknown_value": np.nan},
        {"encoded_missing_value": -2},
        {"min_frequency": 8, "handle_unknown": "use_encoded_value", "unknown_value": 99},
    ],
    ids=str,
)
def test_ordinal(lab: Any, options: Any) -> None:
    model = preprocessing.OrdinalEncoder(**options)
    tolerant = "handle_unknown" in options
    lab.check(model.fit(TOWNS), TOWNS, *([STRANGE] if tolerant else []))
    lab.check(model.fit(NUMBERS), NUMBERS, *([ODD_NUMBERS] if tolerant else []))
    lab.check(model.fit(NUMBERS_GAPPY), NUMBERS_GAPPY, *([ODD_NUMBERS] if tolerant else []))


def test_ordinal_with_rare_and_missing_values(lab: Any) -> None:
    table = pd.DataFrame({"c": ["a"] * 9 + ["b"] * 7 + ["c", "d", None] + [np.nan] * 3, "d": ["x", "y"] * 11})
    options = {"handle_unknown": "use_encoded_value", "unknown_value": 99, "encoded_missing_value": -5}
    for rare in ({"max_categories": 2}, {"min_frequency": 3}):
        lab.check(preprocessing.OrdinalEncoder(**rare, **options).fit(table), table, table.replace({"c": {"a": "new"}}))


def test_given_categories_and_integers(lab: Any) -> None:
    lab.check(
        preprocessing.OrdinalEncoder(
            categories=[["Oslo", "Bergen", "Ålesund"], ["green", "red", "blue"]], dtype=np.int32
        ).fit(TOWNS),
        TOWNS,
    )
    lab.check(preprocessing.OrdinalEncoder().fit(NUMBERS.astype(int)), NUMBERS.astype(int))


MISSING = np.array([["a", "x"], ["b", None], ["a", "y"], [None, "x"], ["b", "x"]], dtype=object)


@pytest.mark.parametrize("fill", [{"strategy": "most_frequent"}, {"strategy": "constant", "fill_value": "?"}], ids=str)
@pytest.mark.parametrize("trained_on", [None, np.nan])
def test_imputed_strings_tell_none_from_nan(lab: Any, fill: Any, trained_on: Any) -> None:
    tables = [np.where(MISSING == None, gap, MISSING) for gap in (None, np.nan)]  # noqa: E711
    encoder = preprocessing.OneHotEncoder(handle_unknown="ignore")
    train = tables[0] if trained_on is None else tables[1]
    lab.check(make_pipeline(impute.SimpleImputer(**fill), encoder).fit(train), *tables)
    if trained_on is None:  # told that None is missing, the source refuses NaN
        lab.check(make_pipeline(impute.SimpleImputer(missing_values=None, **fill), encoder).fit(train), train)


@pytest.mark.parametrize("trained_on", [None, np.nan])
def test_encoders_tell_none_from_nan(lab: Any, trained_on: Any) -> None:
    tables = [np.where(MISSING == None, gap, MISSING) for gap in (None, np.nan)]  # noqa: E711
    train = tables[0] if trained_on is None else tables[1]
    for model in (
        preprocessing.OneHotEncoder(handle_unknown="ignore"),
        preprocessing.OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1, encoded_missing_value=-2),
    ):
        lab.check(model.fit(train), *tables)
    strict = lab.compile(preprocessing.OrdinalEncoder().fit(train))
    with pytest.raises(InputError, match="missing"):
        strict.transform(tables[1] if trained_on is None else tables[0])


def test_strings_imputed_and_then_encoded(lab: Any) -> None:
    gappy = TOWNS.copy()
    gappy[::4, 0] = np.nan
    gappy[1::4, 1] = np.nan
    for strategy, fill in (("most_frequent", None), ("constant", "missing")):
        imputer = impute.SimpleImputer(strategy=strategy, fill_value=fill)
        for encoder in (
            preprocessing.OneHotEncoder(handle_unknown="ignore"),
            preprocessing.OneHotEncoder(),
            preprocessing.OrdinalEncoder(),
        ):
            lab.check(
                make_pipeline(imputer, encoder).fit(gappy), gappy, TOWNS if strategy == "most_frequent" else gappy
            )
    marked = np.where(TOWNS == "Oslo", "?", TOWNS)
    lab.check(
        make_pipeline(
            impute.SimpleImputer(missing_values="?", strategy="most_frequent"), preprocessing.OneHotEncoder()
        ).fit(marked),
        marked,
    )


def test_numbers_imputed_and_then_encoded(lab: Any) -> None:
    for encoder in (preprocessing.OneHotEncoder(), preprocessing.OneHotEncoder(handle_unknown="ignore")):
        lab.check(
            make_pipeline(impute.SimpleImputer(strategy="most_frequent"), encoder).fit(NUMBERS_GAPPY),
            NUMBERS_GAPPY,
            NUMBERS,
        )


def test_numbers_computed_and_then_encoded(lab: Any) -> None:
    bins = preprocessing.KBinsDiscretizer(3, encode="ordinal")
    lab.check(make_pipeline(bins, preprocessing.OneHotEncoder(handle_unknown="ignore")).fit(SIGNED), SIGNED)
    with pytest.raises(UnsupportedModelError, match="handle_unknown"):
        lab.lower(make_pipeline(bins, preprocessing.OneHotEncoder()).fit(SIGNED))


def test_unreadable_function(lab: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="FunctionTransformer") as caught:
        lab.lower(
            make_pipeline(preprocessing.FunctionTransformer(lambda x: x + 1), linear_model.LinearRegression()).fit(
                IRIS, KIND
            )
        )
    assert "pipeline.functiontransformer" in str(caught.value)


def test_selectors_that_take_nan_take_infinity_too(lab: Any) -> None:
    table = SIGNED.copy()
    table[::3, 1] = np.inf
    table[1::3, 2] = np.nan
    lab.check(feature_selection.VarianceThreshold(0.1).fit(SIGNED), table)


@pytest.mark.parametrize("function", [np.log2, np.log10, np.exp2, np.cbrt, np.square, np.reciprocal])
def test_functions_of_several_ops(lab: Any, function: Any) -> None:
    lab.check(preprocessing.FunctionTransformer(function).fit(SIGNED), SIGNED, np.abs(SIGNED))


def test_imputer_that_fills_in_nothing_is_refused(lab: Any) -> None:
    model = impute.SimpleImputer(missing_values=-1, strategy="constant", fill_value=np.nan).fit(SIGNED)
    with pytest.raises(UnsupportedModelError, match="fill_value=nan"):
        lab.lower(model)


COLORS = np.array(["red", "green", "blue", None], object)[RNG.integers(0, 4, (120, 2))]


@pytest.mark.parametrize("table", [np.round(GAPPY), COLORS], ids=["numbers", "strings"])
@pytest.mark.parametrize(
    "target",
    [SIGNED[:, 0], SIGNED[:, 0] > 1, np.digitize(SIGNED[:, 0], [-1, 1])],
    ids=["continuous", "binary", "classes"],
)
def test_target_encoder(lab: Any, table: np.ndarray, target: np.ndarray) -> None:
    other = table.copy()
    other[::4, 0] = 99 if table.dtype == float else "mauve"
    lab.check(preprocessing.TargetEncoder(random_state=0).fit(table, target), table, other)


def test_target_encoder_behind_another_step(lab: Any) -> None:
    model = make_pipeline(preprocessing.FunctionTransformer(np.rint), preprocessing.TargetEncoder(random_state=0))
    lab.check(model.fit(SIGNED, SIGNED[:, 0]), SIGNED, SIGNED * 3)


def test_categorical_naive_bayes(lab: Any) -> None:
    codes = RNG.integers(0, 4, (120, 3))
    compiled = lab.check(naive_bayes.CategoricalNB().fit(codes, codes[:, 0] > 1), codes, codes.astype(float))
    with pytest.raises(InputError, match="unknown category"):
        compiled.predict(codes + 3)
    encoded = make_pipeline(preprocessing.OrdinalEncoder(), naive_bayes.CategoricalNB())
    lab.check(encoded.fit(COLORS, codes[:, 0]), COLORS)
