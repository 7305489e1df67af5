"""The cases: models trained here on bundled or generated data. A case is made when it is run, by its function.

The groups ``sklearn``, ``trees`` and ``networks`` are what a run without arguments takes; ``trees-full`` has the ensembles by which
tree kernels are compared, ``trees-wide`` those of many features, ``networks-large`` the networks of full size, ``layers`` single products
and convolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from bench.harness import Case

CASES: dict[str, tuple[str, Callable[[], Case]]] = {}
"""By name: the group, and what trains the model."""

DEFAULT_GROUPS = ("sklearn", "trees", "networks")


def case(group: str, name: str = "") -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    def register(function: Callable[[], Case]) -> Callable[[], Case]:
        CASES[name or function.__name__] = (group, function)
        return function

    return register


def chosen(groups: Sequence[str], names: Sequence[str]) -> dict[str, Callable[[], Case]]:
    """The cases of these groups (by default the usual ones) and names (by default all; names alone choose from every group).

    Raises:
        ValueError: for a group or a name that is not there.
    """
    known = {group for group, _ in CASES.values()}
    if missing := [*sorted({*groups} - known), *(name for name in names if name not in CASES)]:
        raise ValueError(
            f"no group or case {', '.join(missing)}; groups: {', '.join(sorted(known))}; cases: {', '.join(CASES)}"
        )
    wanted = groups or (known if names else DEFAULT_GROUPS)
    return {name: make for name, (group, make) in CASES.items() if group in wanted and (not names or name in names)}


def rows_of(x: Any) -> Callable[[int], list[Any]]:
    """Batches taken from a table, repeated as often as needed."""
    return lambda n: [np.ascontiguousarray(np.resize(x, (n, *x.shape[1:])) if n > len(x) else x[:n])]


def _random(*shape: int) -> Callable[[int], list[Any]]:
    return lambda n: [np.random.default_rng(0).normal(size=(n, *shape)).astype(np.float32)]


def _regression(rows: int, features: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, features)).astype(np.float32)
    return x, np.sin(x[:, 0] * 2) * 3 + x[:, 1] * x[:, 2] + 0.3 * rng.normal(size=rows)


# -- scikit-learn --------------------------------------------------------------------------------------------------------


@case("sklearn")
def logistic_pipeline() -> Case:
    from sklearn.datasets import load_breast_cancer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = load_breast_cancer(return_X_y=True)
    return Case(
        "scaler + logistic, 30 features",
        "sklearn",
        "sklearn",
        make_pipeline(StandardScaler(), LogisticRegression()).fit(x, y),
        rows_of(x),
        method="predict_proba",
    )


@case("sklearn")
def svc_rbf() -> Case:
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    x, y = load_digits(return_X_y=True)
    return Case("SVC rbf, digits", "sklearn", "sklearn", SVC(gamma=0.001).fit(x, y), rows_of(x), method="predict")


@case("sklearn")
def mlp_classifier() -> Case:
    from sklearn.datasets import load_digits
    from sklearn.neural_network import MLPClassifier

    x, y = load_digits(return_X_y=True)
    model = MLPClassifier((128, 64), max_iter=60, random_state=0).fit(x, y)
    return Case("MLP 64-128-64-10, digits", "sklearn", "sklearn", model, rows_of(x), method="predict_proba")


@case("sklearn")
def neighbours() -> Case:
    from sklearn.datasets import load_digits
    from sklearn.neighbors import KNeighborsClassifier

    x, y = load_digits(return_X_y=True)
    return Case(
        "5 neighbours, digits", "sklearn", "sklearn", KNeighborsClassifier().fit(x, y), rows_of(x), method="predict"
    )


@case("sklearn")
def polynomial_ridge() -> Case:
    from sklearn.datasets import load_diabetes
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    x, y = load_diabetes(return_X_y=True)
    model = make_pipeline(StandardScaler(), PolynomialFeatures(2), Ridge()).fit(x, y)
    return Case("scaler + polynomial + ridge", "sklearn", "sklearn", model, rows_of(x), method="predict")


@case("sklearn")
def imputer_ridge() -> Case:
    from sklearn.datasets import load_diabetes
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = load_diabetes(return_X_y=True)
    x[np.random.default_rng(0).random(x.shape) < 0.05] = np.nan
    model = make_pipeline(SimpleImputer(), StandardScaler(), Ridge()).fit(x, y)
    return Case("imputer + scaler + ridge", "sklearn", "sklearn", model, rows_of(x), method="predict")


@case("sklearn")
def pca_logistic() -> Case:
    from sklearn.datasets import load_digits
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = load_digits(return_X_y=True)
    model = make_pipeline(StandardScaler(), PCA(20), LogisticRegression()).fit(x, y)
    name = "scaler + PCA + logistic, digits"
    return Case(name, "sklearn", "sklearn", model, rows_of(x), method="predict_proba")


@case("sklearn")
def features_logistic() -> Case:
    """Components and chosen columns side by side."""
    from sklearn.datasets import load_breast_cancer
    from sklearn.decomposition import PCA
    from sklearn.feature_selection import SelectKBest
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union
    from sklearn.preprocessing import StandardScaler

    x, y = load_breast_cancer(return_X_y=True)
    features = make_union(PCA(5), SelectKBest(k=5))
    model = make_pipeline(StandardScaler(), features, LogisticRegression()).fit(x, y)
    name = "scaler + union of PCA and chosen columns + logistic"
    return Case(name, "sklearn", "sklearn", model, rows_of(x), method="predict_proba")


def _passengers() -> tuple[Any, Any]:
    """A DataFrame with three columns of numbers, one of them with gaps, and three of pandas categories."""
    import pandas as pd

    rng = np.random.default_rng(0)
    columns: dict[str, Any] = {
        "age": rng.normal(40, 10, 2000),
        "fare": rng.exponential(30, 2000),
        "relatives": rng.integers(0, 5, 2000),
    }
    columns["age"][rng.random(2000) < 0.1] = np.nan
    for name, categories in (("sex", "mf"), ("port", "SCQ"), ("deck", "ABCDEFG")):
        columns[name] = pd.Categorical(rng.choice(list(categories), 2000))
    x = pd.DataFrame(columns)
    return x, ((x.age.fillna(40) > 40) ^ (x.sex == "m")).astype(int)


def _frame_case(name: str, model: Any) -> Case:
    x, y = _passengers()
    return Case(name, "sklearn", "sklearn", model.fit(x, y), lambda n: [x[:n].copy()], method="predict_proba")


@case("sklearn")
def categories_logistic() -> Case:
    from sklearn.compose import make_column_transformer
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    numbers = make_pipeline(SimpleImputer(), StandardScaler())
    columns = make_column_transformer(
        (numbers, ["age", "fare", "relatives"]), (OneHotEncoder(handle_unknown="ignore"), ["sex", "port", "deck"])
    )
    return _frame_case("one-hot categories + logistic, DataFrame", make_pipeline(columns, LogisticRegression()))


@case("sklearn")
def categories_boosting() -> Case:
    from sklearn.ensemble import HistGradientBoostingClassifier

    model = HistGradientBoostingClassifier(categorical_features="from_dtype", max_iter=100)
    return _frame_case("HistGradientBoosting on categories, DataFrame", model)


# -- trees ---------------------------------------------------------------------------------------------------------------

TREE_BATCHES = (1, 64, 1024, 4096)


@case("trees")
def random_forest() -> Case:
    from sklearn.datasets import load_digits
    from sklearn.ensemble import RandomForestClassifier

    x, y = load_digits(return_X_y=True)
    model = RandomForestClassifier(100, max_depth=8, random_state=0).fit(x, y)
    return Case("random forest 100 x d8, digits", "trees", "sklearn", model, rows_of(x), TREE_BATCHES, "predict_proba")


@case("trees")
def hist_gradient_boosting() -> Case:
    from sklearn.ensemble import HistGradientBoostingRegressor

    x, y = _regression(8000, 28)
    model = HistGradientBoostingRegressor(max_iter=100).fit(x, y)
    return Case(
        "HistGradientBoosting 100 x 31 leaves, 28 features",
        "trees",
        "sklearn",
        model,
        rows_of(x.astype(np.float64)),
        TREE_BATCHES,
        "predict",
    )


def _xgboost(group: str, trees: int, depth: int, features: int) -> Case:
    from xgboost import XGBRegressor

    x, y = _regression(8000, features)
    model = XGBRegressor(n_estimators=trees, max_depth=depth, learning_rate=0.1, random_state=0).fit(x, y)
    name = f"XGBoost {trees} x d{depth}, {features} features"
    return Case(name, group, "xgboost", model, rows_of(x), TREE_BATCHES, "predict")


@case("trees")
def xgboost_d6() -> Case:
    return _xgboost("trees", 100, 6, 28)


@case("trees")
def xgboost_d8() -> Case:
    return _xgboost("trees", 500, 8, 28)


def _lightgbm(group: str) -> Case:
    from lightgbm import LGBMRegressor

    x, y = _regression(8000, 28)
    model = LGBMRegressor(n_estimators=100, num_leaves=31, verbose=-1).fit(x.astype(np.float64), y)
    rows = rows_of(x.astype(np.float64))
    return Case("LightGBM 100 x 31 leaves, 28 features", group, "lightgbm", model, rows, TREE_BATCHES, "predict")


@case("trees")
def lightgbm_31() -> Case:
    return _lightgbm("trees")


for _group, _trees, _depth, _features in (
    ("trees-full", 1000, 6, 8),
    ("trees-full", 100, 8, 13),
    ("trees-full", 100, 8, 28),
    ("trees-full", 100, 8, 90),
    ("trees-full", 500, 8, 28),
    ("trees-wide", 100, 8, 968),
    ("trees-wide", 100, 8, 2000),
):
    case(_group, f"xgboost_{_trees}_d{_depth}_{_features}")(partial(_xgboost, _group, _trees, _depth, _features))


@case("trees-full")
def xgboost_classes() -> Case:
    """A hundred rounds of one tree for each of eight classes."""
    from xgboost import XGBClassifier

    x, y = _regression(8000, 54)
    classes = np.digitize(y, np.quantile(y, np.linspace(0, 1, 9)[1:-1]))
    model = XGBClassifier(n_estimators=100, max_depth=6, learning_rate=0.1, random_state=0).fit(x, classes)
    name = "XGBoost 800 x d6, 8 classes, 54 features"
    return Case(name, "trees-full", "xgboost", model, rows_of(x), TREE_BATCHES, "predict_proba")


@case("trees-full")
def xgboost_26000() -> Case:
    from bench.ensembles import half_a_million_leaves

    x, _ = _regression(8000, 16)
    model = half_a_million_leaves()
    return Case("XGBoost 26,000 x d6, 16 features", "trees-full", "xgboost", model, rows_of(x), TREE_BATCHES, "predict")


@case("trees-full")
def lightgbm_31_full() -> Case:
    return _lightgbm("trees-full")


# -- networks ------------------------------------------------------------------------------------------------------------


def _network(
    name: str, module: Any, inputs: Callable[[int], list[Any]], batches: tuple[int, ...], group: str = "networks"
) -> Case:
    return Case(name, group, "torch", module.eval(), inputs, batches)


@case("networks")
def mlp_784() -> Case:
    from bench.networks import Mlp

    return _network("MLP 784-512-512-10", _seeded(lambda: Mlp(784, 512, 512, 10)), _random(784), (1, 64, 1024))


@case("networks")
def resnet8() -> Case:
    from bench.networks import ResNet8

    return _network("ResNet-8, 32 x 32", _seeded(ResNet8), _random(3, 32, 32), (1, 64))


@case("networks")
def depthwise_cnn() -> Case:
    from bench.networks import DepthwiseCnn

    return _network("DS-CNN, 49 x 10", _seeded(DepthwiseCnn), _random(1, 49, 10), (1, 64))


@case("networks")
def lstm() -> Case:
    from bench.networks import Recurrent

    return _network("LSTM 32-128, 20 steps", _seeded(Recurrent), _random(20, 32), (1, 64))


@case("networks")
def encoder() -> Case:
    from bench.networks import Encoder

    def ids(n: int) -> list[Any]:
        return [np.random.default_rng(0).integers(0, 1000, (n, 64))]

    return _network("transformer encoder 2 x 128, 64 tokens", _seeded(Encoder), ids, (1, 16))


@case("networks")
def autoencoder() -> Case:
    """The anomaly detector of the tiny benchmark suites."""
    from bench.networks import Mlp

    sizes = (640, 128, 128, 128, 128, 8, 128, 128, 128, 128, 640)
    return _network("autoencoder 640-128-8-128-640", _seeded(lambda: Mlp(*sizes)), _random(640), (1, 64))


@case("networks-large")
def resnet18() -> Case:
    from bench.networks import ResNet18

    return _network("ResNet-18, 224 x 224", _seeded(ResNet18), _random(3, 224, 224), (1,), "networks-large")


@case("networks-large")
def mobilenet_v1() -> Case:
    from bench.networks import MobileNetV1

    return _network(
        "MobileNetV1 x 0.25, 96 x 96",
        _seeded(lambda: MobileNetV1(0.25, 2)),
        _random(3, 96, 96),
        (1, 16),
        "networks-large",
    )


@case("networks-large")
def mobilenet_v2() -> Case:
    from bench.networks import MobileNetV2

    return _network("MobileNetV2, 224 x 224", _seeded(MobileNetV2), _random(3, 224, 224), (1,), "networks-large")


@case("networks-large")
def minilm() -> Case:
    """The sizes of a sentence encoder with six layers; weights are random."""
    from bench.networks import Encoder

    def ids(n: int) -> list[Any]:
        return [np.random.default_rng(0).integers(0, 30522, (n, 128))]

    module = _seeded(lambda: Encoder(30522, 384, 12, 6, 128))
    return _network("transformer encoder 6 x 384, 128 tokens", module, ids, (1,), "networks-large")


@case("layers")
def linear_square() -> Case:
    from torch import nn

    return _network("linear, 1024 to 1024", _seeded(lambda: nn.Linear(1024, 1024)), _random(1024), (64, 1024), "layers")


@case("layers")
def linear_wide() -> Case:
    from torch import nn

    return _network("linear, 384 to 1536", _seeded(lambda: nn.Linear(384, 1536)), _random(384), (384,), "layers")


def _conv(channels_in: int, channels: int, size: int, stride: int, extent: int) -> Case:
    from torch import nn

    name = f"conv {size} x {size}" + (f" by {stride}" if stride > 1 else "")
    return _network(
        f"{name}, {channels_in} x {extent} x {extent} to {channels}",
        _seeded(lambda: nn.Conv2d(channels_in, channels, size, stride, size // 2)),
        _random(channels_in, extent, extent),
        (1,),
        "layers",
    )


for _name, _shape in {
    "conv_pointwise": (256, 256, 1, 1, 28),
    "conv_winograd": (64, 64, 3, 1, 56),
    "conv_strided": (64, 128, 3, 2, 56),
    "conv_wide": (64, 64, 5, 1, 28),
    "conv_stem": (3, 64, 7, 2, 224),
    "conv_many_weights": (512, 512, 3, 1, 7),
}.items():
    case("layers", _name)(partial(_conv, *_shape))


def _seeded(make: Callable[[], Any]) -> Any:
    import torch

    torch.manual_seed(0)
    return make()
