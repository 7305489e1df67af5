"""Tree kernels against the models of scikit-learn, XGBoost and LightGBM, read with the few lines each needs."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from mlec.backends.tvm.compat import IRModule, tirx, tvm
from mlec.backends.tvm.kernels.tree_ensemble import TreeEnsemble, build, prepare
from mlec.backends.tvm.target import TargetInfo

INFO = TargetInfo.host()
PLAIN_STORAGE = {"tirx.disable_storage_rewrite": True}  # as the backend compiles
ZERO = float(np.float32(1e-35))


def join(
    trees: list[dict[str, np.ndarray]], features: int, dtype: str, output: Any, base: np.ndarray, compare: Any
) -> TreeEnsemble:
    """One ensemble of trees whose nodes and leaves share one numbering: ``left == -1`` marks a leaf."""
    columns: dict[str, list[np.ndarray]] = {
        k: [] for k in ("feature", "threshold", "left", "right", "flags", "category")
    }
    values, roots, nodes, leaves = [], [], 0, 0
    for tree in trees:
        leaf = tree["left"] < 0
        code = np.where(leaf, ~(leaves + np.cumsum(leaf) - 1), nodes + np.cumsum(~leaf) - 1)
        for key in columns:
            column = tree.get(key, np.full(len(leaf), -1))[~leaf]
            columns[key].append(code[column] if key in ("left", "right") else column)
        values.append(tree["value"][leaf])
        roots.append(code[0])
        nodes, leaves = nodes + int((~leaf).sum()), leaves + int(leaf.sum())
    joined = {k: np.concatenate(v).astype(np.int32 if k != "threshold" else dtype) for k, v in columns.items()}
    joined["flags"] = joined["flags"].astype(np.uint8)
    sets = [c for tree in trees for c in tree.get("sets", [])]
    if not sets:
        joined["category"] = np.zeros(0, np.int32)
    words = max((max(s, default=0) // 32 + 1 for s in sets), default=0)
    categories = np.zeros((len(sets), words), np.uint32)
    for row, members in enumerate(sets):
        for c in members:
            categories[row, c >> 5] |= np.uint32(1 << (c & 31))
    return TreeEnsemble(
        features,
        **joined,
        categories=categories.view(np.int32),
        roots=np.asarray(roots, np.int32),
        output=np.asarray(output, np.int32),
        values=np.concatenate(values).reshape(leaves, -1).astype(base.dtype),
        base=base,
        compare=compare,
    )


def xgboost_ensemble(booster: Any) -> TreeEnsemble:
    learner = json.loads(bytes(booster.save_raw("json")))["learner"]
    model = learner["gradient_booster"]["model"]
    base = np.atleast_1d(np.asarray(json.loads(learner["learner_model_param"]["base_score"]), np.float32))
    trees, sets = [], 0
    for t in model["trees"]:
        left, right = np.asarray(t["left_children"]), np.asarray(t["right_children"])
        flags = np.asarray(t["default_left"])
        category = np.full(len(left), -1)
        members = []
        for node, start, size in zip(
            t["categories_nodes"], t["categories_segments"], t["categories_sizes"], strict=True
        ):
            category[node] = sets + len(members)
            members.append(t["categories"][start : start + size])
            # A category in the set goes right there: swap the children.
            left[node], right[node], flags[node] = right[node], left[node], 1 - flags[node]
        sets += len(members)
        condition = np.asarray(t["split_conditions"], np.float32)
        trees.append(
            {
                "feature": np.asarray(t["split_indices"]),
                "threshold": condition,
                "left": left,
                "right": right,
                "flags": flags,
                "category": category,
                "value": condition,
                "sets": members,
            }
        )
    return join(trees, booster.num_features(), "float32", model["tree_info"], base, "lt")


def lightgbm_ensemble(booster: Any) -> TreeEnsemble:
    dump = booster.dump_model()
    per_iteration = dump["num_tree_per_iteration"]
    trees, sets = [], 0
    for t in dump["tree_info"]:
        rows: list[list[float]] = []
        members: list[list[int]] = []

        def visit(node: dict[str, Any], rows: Any = rows, members: Any = members, sets: int = sets) -> int:
            at = len(rows)
            rows.append([0, 0, -1, -1, 0, -1, node.get("leaf_value", 0)])
            if "split_feature" in node:
                flags = int(node["default_left"]) | {"None": 2, "NaN": 0, "Zero": 4}[node["missing_type"]]
                if node["decision_type"] == "==":
                    rows[at][5] = sets + len(members)
                    members.append([int(c) for c in node["threshold"].split("||")])
                    flags, threshold = 0, 0.0
                else:
                    threshold = node["threshold"]
                    # A value as small as this is 0 before it meets a tree.
                    if abs(threshold) <= ZERO:
                        threshold = ZERO if threshold >= 0 else np.nextafter(-ZERO, -np.inf)
                rows[at][:2] = [node["split_feature"], threshold]
                rows[at][4] = flags
                rows[at][2] = visit(node["left_child"])
                rows[at][3] = visit(node["right_child"])
            return at

        visit(t["tree_structure"])
        table = np.asarray(rows, np.float64)
        names = ("feature", "threshold", "left", "right", "flags", "category", "value")
        tree = {
            name: table[:, i] if name in ("threshold", "value") else table[:, i].astype(np.int64)
            for i, name in enumerate(names)
        }
        trees.append(tree | {"sets": members})
        sets += len(members)
    output = np.arange(len(trees)) % per_iteration
    return join(trees, booster.num_feature(), "float64", output, np.zeros(per_iteration), "le")


def forest_ensemble(forest: Any) -> TreeEnsemble:
    """Sums of class fractions (or of values): the forest's prediction times its number of trees."""
    trees = []
    for estimator in forest.estimators_:
        t = estimator.tree_
        exact = t.threshold
        threshold = exact.astype(np.float32)
        # x (float32) <= t (float64) holds for the same x when t is rounded down.
        threshold = np.where(threshold > exact, np.nextafter(threshold, np.float32(-np.inf)), threshold)
        trees.append(
            {
                "feature": t.feature,
                "threshold": threshold,
                "left": t.children_left,
                "right": t.children_right,
                "flags": t.missing_go_to_left,
                "value": t.value[:, 0, :],
            }
        )
    width = trees[0]["value"].shape[1]
    return join(trees, forest.n_features_in_, "float32", np.zeros(len(trees)), np.zeros(width), "le")


def hist_ensemble(model: Any) -> TreeEnsemble:
    trees, sets = [], 0
    for iteration in model._predictors:
        for predictor in iteration:
            nodes = predictor.nodes
            leaf = nodes["is_leaf"].astype(bool)
            categorical = nodes["is_categorical"].astype(bool) & ~leaf
            members = [
                [c for c in range(256) if predictor.raw_left_cat_bitsets[int(row)][c >> 5] >> (c & 31) & 1]
                for row in nodes["bitset_idx"][categorical]
            ]
            category = np.full(len(nodes), -1)
            category[categorical] = sets + np.arange(len(members))
            sets += len(members)
            trees.append(
                {
                    "feature": nodes["feature_idx"],
                    "threshold": nodes["num_threshold"],
                    "left": np.where(leaf, -1, nodes["left"].astype(np.int64)),
                    "right": nodes["right"].astype(np.int64),
                    "flags": nodes["missing_go_to_left"],
                    "value": nodes["value"],
                    "category": category,
                    "sets": members,
                }
            )
    base = np.asarray(model._baseline_prediction, np.float64).reshape(-1)
    return join(trees, model.n_features_in_, "float64", np.arange(len(trees)) % len(base), base, "le")


def run(ensemble: TreeEnsemble, x: np.ndarray) -> np.ndarray:
    plan = prepare(ensemble, INFO)
    func = build(plan, tirx.Var("n", "int64"), INFO)
    with tvm.transform.PassContext(config=PLAIN_STORAGE):
        kernel = tvm.compile(IRModule({"tree_ensemble": func}), target=INFO.tvm_target())["tree_ensemble"]
    packed = [tvm.runtime.tensor(a) for a in plan.packed.values()]
    results = []
    for rows in (x[:1], x[:67], x):
        out = tvm.runtime.tensor(np.empty((len(rows), ensemble.outputs), ensemble.value_dtype))
        kernel(tvm.runtime.tensor(np.ascontiguousarray(rows, ensemble.dtype)), *packed, out)
        results.append(out.numpy())
    np.testing.assert_array_equal(results[0], results[2][:1])
    np.testing.assert_array_equal(results[1], results[2][:67])
    return np.asarray(results[2])


def rows_near(ensemble: TreeEnsemble, n: int = 700, missing: bool = True) -> np.ndarray:
    """Rows at the thresholds and beside them, with infinities, and NaN where the model takes it."""
    rng = np.random.default_rng(0)
    x = np.empty((n, ensemble.features), ensemble.dtype)
    for f in range(ensemble.features):
        at = ensemble.threshold[ensemble.feature == f]
        x[:, f] = rng.choice(at, n) if len(at) else rng.normal(size=n)
        beside = np.nextafter(x[:, f], rng.choice([-np.inf, np.inf], n).astype(x.dtype))
        x[:, f] = np.where(rng.random(n) < 0.5, beside, x[:, f])
    if missing:
        odd = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0], x.dtype)
        x = np.where(rng.random(x.shape) < 0.2, rng.choice(odd, x.shape), x)
    return x


def data(classes: int = 0, features: int = 6, missing: bool = True) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2000, features)).astype(np.float32)
    y = np.sin(3 * x[:, 0]) + x[:, 1] * x[:, 2] + 0.1 * rng.normal(size=len(x))
    if missing:
        x[rng.random(x.shape) < 0.1] = np.nan
    return x, np.digitize(y, np.quantile(y, np.arange(1, classes) / classes)) if classes else y


@pytest.mark.parametrize("classes", [0, 3])
def test_xgboost(classes: int) -> None:
    xgb = pytest.importorskip("xgboost")
    x, y = data(classes)
    options: dict[str, Any] = {"max_depth": 5, "nthread": 1, "eta": 0.3}
    options |= {"objective": "multi:softprob", "num_class": 3} if classes else {}
    booster = xgb.train(options, xgb.DMatrix(x, y), 20)
    ensemble = xgboost_ensemble(booster)
    rows = rows_near(ensemble)
    rows[np.isinf(rows)] = 0  # XGBoost refuses infinities
    expected = booster.inplace_predict(rows, predict_type="margin").reshape(len(rows), -1)
    np.testing.assert_array_equal(run(ensemble, rows), expected)


def test_xgboost_on_thousands_of_features() -> None:
    xgb = pytest.importorskip("xgboost")
    rng = np.random.default_rng(3)
    x = rng.normal(size=(200, 2000)).astype(np.float32)
    x[rng.random(x.shape) < 0.3] = np.nan
    y = np.nan_to_num(x) @ rng.normal(size=2000)
    options = {"max_depth": 6, "nthread": 1, "max_bin": 8, "eta": 0.5}
    booster = xgb.train(options, xgb.DMatrix(x, y), 6)
    ensemble = xgboost_ensemble(booster)
    rows = rows_near(ensemble, 200)
    rows[np.isinf(rows)] = 0
    expected = booster.inplace_predict(rows, predict_type="margin").reshape(len(rows), -1)
    np.testing.assert_array_equal(run(ensemble, rows), expected)


def test_xgboost_categories() -> None:
    xgb = pytest.importorskip("xgboost")
    x, y = data()
    x[:, 0] = np.random.default_rng(2).integers(0, 40, len(x))
    y = y + (x[:, 0] % 7 == 3)
    types = ["c"] + ["q"] * (x.shape[1] - 1)
    matrix = xgb.DMatrix(x, y, feature_types=types, enable_categorical=True)
    options = {"max_depth": 4, "nthread": 1, "max_cat_to_onehot": 3}
    booster = xgb.train(options, matrix, 10)
    ensemble = xgboost_ensemble(booster)
    assert ensemble.categorical.any()
    expected = booster.predict(matrix, output_margin=True).reshape(-1, 1)
    np.testing.assert_array_equal(run(ensemble, x), expected)


@pytest.mark.parametrize("zero_as_missing", [False, True])
@pytest.mark.parametrize("classes", [0, 3])
def test_lightgbm(classes: int, zero_as_missing: bool) -> None:
    lgb = pytest.importorskip("lightgbm")
    x, y = data(classes, missing=not zero_as_missing)
    x[np.abs(x) < 0.1] = 0
    options: dict[str, Any] = {"num_leaves": 15, "verbose": -1, "num_threads": 1, "zero_as_missing": zero_as_missing}
    options |= {"objective": "multiclass", "num_class": 3} if classes else {}
    booster = lgb.train(options, lgb.Dataset(x.astype(np.float64), y), 20)
    ensemble = lightgbm_ensemble(booster)
    rows = rows_near(ensemble)
    expected = np.asarray(booster.predict(rows, raw_score=True)).reshape(len(rows), -1)
    np.testing.assert_array_equal(run(ensemble, rows), expected)


def test_lightgbm_categories() -> None:
    lgb = pytest.importorskip("lightgbm")
    x, y = data(missing=False)
    x[:, 0] = np.random.default_rng(2).integers(0, 40, len(x))
    y = y + (x[:, 0] % 7 == 3)
    dataset = lgb.Dataset(x.astype(np.float64), y, categorical_feature=[0])
    booster = lgb.train({"num_leaves": 15, "verbose": -1, "num_threads": 1}, dataset, 20)
    ensemble = lightgbm_ensemble(booster)
    assert ensemble.categorical.any()
    rows = x.astype(np.float64)
    rows[:5, 0] = [50, -1, 7.9, 1e9, np.nan]
    expected = np.asarray(booster.predict(rows, raw_score=True)).reshape(-1, 1)
    np.testing.assert_array_equal(run(ensemble, rows), expected)


@pytest.mark.parametrize("missing", [False, True])
def test_random_forest(missing: bool) -> None:
    ensemble_module = pytest.importorskip("sklearn.ensemble")
    x, y = data(classes=3, missing=missing)
    forest = ensemble_module.RandomForestClassifier(20, n_jobs=1, random_state=0).fit(x, y)
    ensemble = forest_ensemble(forest)
    rows = rows_near(ensemble, missing=missing)
    rows[np.isinf(rows)] = 0  # scikit-learn refuses infinities
    np.testing.assert_array_equal(run(ensemble, rows) / 20, forest.predict_proba(rows))


def test_trees_that_split_off_one_row_after_the_other() -> None:
    """Depth beyond 30 with two leaves on most levels."""
    ensemble_module = pytest.importorskip("sklearn.ensemble")
    x = np.random.default_rng(0).normal(size=(100, 2)).astype(np.float32)
    y = 2.0 ** np.argsort(np.argsort(x[:, 0]))
    forest = ensemble_module.RandomForestRegressor(8, n_jobs=1, random_state=0).fit(x, y)
    ensemble = forest_ensemble(forest)
    assert ensemble.layout.depth.max() > 30
    rows = rows_near(ensemble)
    rows[np.isinf(rows)] = 0
    expected = [tree.tree_.predict(np.ascontiguousarray(rows)) for tree in forest.estimators_]
    np.testing.assert_array_equal(run(ensemble, rows), np.sum(expected, axis=0).reshape(len(rows), 1))


@pytest.mark.parametrize("classes", [0, 3])
def test_hist_gradient_boosting(classes: int) -> None:
    ensemble_module = pytest.importorskip("sklearn.ensemble")
    x, y = data(classes)
    x[:, 0] = np.nan_to_num(np.abs(x[:, 0]) * 10).round()
    kind = "HistGradientBoostingClassifier" if classes else "HistGradientBoostingRegressor"
    model = getattr(ensemble_module, kind)(max_iter=20, categorical_features=[0], max_leaf_nodes=20)
    model.fit(x.astype(np.float64), y)
    ensemble = hist_ensemble(model)
    assert ensemble.categorical.any()
    rows = rows_near(ensemble)
    rows[:, 0] = np.random.default_rng(3).choice(x[:, 0], len(rows))
    expected = model._raw_predict(rows) if classes else model.predict(rows).reshape(-1, 1)
    np.testing.assert_array_equal(run(ensemble, preprocess(model, rows)), expected)


def preprocess(model: Any, rows: np.ndarray) -> np.ndarray:
    """What the model itself does to rows before its trees see them (ordinal codes, categorical columns first)."""
    return np.asarray(model._preprocessor.transform(rows)) if model._preprocessor is not None else rows
