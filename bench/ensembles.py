"""XGBoost ensembles of any size within seconds: some trees are trained, and altered copies of them appended."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from xgboost import XGBRegressor

SHIFT = 2
"""Bins by which a threshold of a copy may be off that of the tree that was trained."""


def half_a_million_leaves() -> XGBRegressor:
    """26,000 trees of depth 6 on 16 features with about 520,000 leaves."""
    from xgboost import XGBRegressor

    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 16)).astype(np.float32)
    y = np.sin(x[:, 0] * 2) * 3 + x[:, 1] * x[:, 2] + 0.3 * rng.normal(size=1000)
    options = {"learning_rate": 0.01, "subsample": 0.7, "min_child_weight": 10.7, "max_bin": 64, "random_state": 0}
    return appended(XGBRegressor(n_estimators=1000, max_depth=6, **options).fit(x, y), 26)


def appended(model: XGBRegressor, times: int) -> XGBRegressor:
    """The trees of a model ``times`` over, each copy with other thresholds and leaves; their sum stays near that of the model. As those of
    trained trees, the thresholds are edges of the bins that the features were sorted into.

    Args:
        model: of one tree a round, with numeric splits only.
        times: how many copies of each tree, itself included.
    """
    from xgboost import XGBRegressor

    document = json.loads(bytes(model.get_booster().save_raw("json")))
    forest: dict[str, Any] = document["learner"]["gradient_booster"]["model"]
    rng = np.random.default_rng(0)
    trained = forest["trees"]
    edges = _edges(trained)
    forest["trees"] = [
        _altered(tree, number * len(trained) + i, times, edges, rng)
        for number in range(times)
        for i, tree in enumerate(trained)
    ]
    count = len(forest["trees"])
    forest["gbtree_model_param"]["num_trees"] = str(count)
    forest["iteration_indptr"] = list(range(count + 1))
    forest["tree_info"] = [0] * count
    larger = XGBRegressor()
    larger.load_model(bytearray(json.dumps(document), "ascii"))
    return larger


def _edges(trees: list[dict[str, Any]]) -> list[np.ndarray[Any, Any]]:
    """For each feature the thresholds of all trees, in order."""
    feature, threshold, left = (
        np.concatenate([tree[key] for tree in trees]) for key in ("split_indices", "split_conditions", "left_children")
    )
    inner = left >= 0
    return [np.unique(threshold[inner & (feature == f)]) for f in range(int(feature.max()) + 1)]


def _altered(
    tree: dict[str, Any], number: int, times: int, edges: list[np.ndarray[Any, Any]], rng: np.random.Generator
) -> dict[str, Any]:
    """The tree under another number; its leaves add a part of what they added, give or take a half."""
    leaf = np.array(tree["left_children"]) < 0
    changed = np.array(tree["split_conditions"]) / times * rng.uniform(0.5, 1.5, len(leaf))
    shifts = rng.integers(-SHIFT, SHIFT + 1, len(leaf)).tolist()
    for node in np.flatnonzero(~leaf).tolist():
        known = edges[tree["split_indices"][node]]
        place = int(known.searchsorted(tree["split_conditions"][node])) + shifts[node]
        changed[node] = known[min(max(place, 0), len(known) - 1)]
    return {**tree, "id": number, "split_conditions": changed.astype(np.float32).tolist()}
