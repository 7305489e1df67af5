"""XGBoost and LightGBM estimators inside scikit-learn models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn import calibration, compose, datasets, ensemble, linear_model, model_selection, multiclass, preprocessing
from sklearn.base import clone
from sklearn.pipeline import make_pipeline

lightgbm = pytest.importorskip("lightgbm")
xgboost = pytest.importorskip("xgboost")

IRIS, KIND = datasets.load_iris(return_X_y=True)
SUGAR, PROGRESS = (part[:200] for part in datasets.load_diabetes(return_X_y=True))
RNG = np.random.default_rng(0)
BOOSTERS = {
    "xgboost": (xgboost.XGBClassifier(n_estimators=6, n_jobs=1), xgboost.XGBRegressor(n_estimators=6, n_jobs=1)),
    "lightgbm": (
        lightgbm.LGBMClassifier(n_estimators=6, n_jobs=1, verbose=-1),
        lightgbm.LGBMRegressor(n_estimators=6, n_jobs=1, verbose=-1),
    ),
}


@pytest.fixture(params=BOOSTERS)
def pair(request: Any) -> Any:
    return tuple(map(clone, BOOSTERS[request.param]))


@pytest.mark.parametrize("target", [KIND, KIND == 1], ids=["three", "two"])
def test_as_the_last_step(lab: Any, pair: Any, target: np.ndarray) -> None:
    target = target.astype(int)
    lab.check(make_pipeline(preprocessing.StandardScaler(), pair[0]).fit(IRIS, target), IRIS, rtol=1e-6)
    lab.check(model_selection.GridSearchCV(pair[0], {"max_depth": [2, 3]}, cv=2).fit(IRIS, target), IRIS, rtol=1e-6)
    gaps = np.where(RNG.random(IRIS.shape) < 0.2, np.nan, IRIS)
    compiled = lab.check(make_pipeline(preprocessing.MinMaxScaler(), pair[0]).fit(gaps, target), gaps, rtol=1e-6)
    assert any(
        "pipeline." in str(node.loc) and node.name == "tree_ensemble" for node in compiled.executable.graph.nodes
    )


def test_regressors(lab: Any, pair: Any) -> None:
    lab.check(make_pipeline(preprocessing.RobustScaler(), pair[1]).fit(SUGAR, PROGRESS), SUGAR, rtol=1e-6)
    lab.check(
        compose.TransformedTargetRegressor(pair[1], func=np.log1p, inverse_func=np.expm1).fit(SUGAR, PROGRESS),
        SUGAR,
        rtol=1e-6,
    )
    members = [("boost", pair[1]), ("line", linear_model.Ridge())]
    lab.check(ensemble.VotingRegressor(members).fit(SUGAR, PROGRESS), SUGAR, rtol=1e-6)
    lab.check(ensemble.StackingRegressor(members, cv=2).fit(SUGAR, PROGRESS), SUGAR, rtol=1e-6)


def test_votes_stacks_and_calibration(lab: Any, pair: Any) -> None:
    members = [("boost", pair[0]), ("line", linear_model.LogisticRegression(max_iter=300))]
    names = np.array(["a", "b", "c"])[KIND]
    for voting in ("soft", "hard"):
        lab.check(ensemble.VotingClassifier(members, voting=voting).fit(IRIS, names), IRIS, rtol=1e-6)
    lab.check(ensemble.StackingClassifier(members, cv=2).fit(IRIS, names), IRIS, rtol=1e-5)
    lab.check(calibration.CalibratedClassifierCV(pair[0], cv=2).fit(IRIS, KIND), IRIS, rtol=1e-5)
    lab.check(multiclass.OneVsRestClassifier(pair[0]).fit(IRIS, KIND), IRIS, rtol=1e-5)


@pytest.mark.parametrize("sparse", [True, False])
def test_zeros_of_a_sparse_matrix(lab: Any, pair: Any, sparse: bool) -> None:
    """What a sparse matrix leaves out is missing to XGBoost, and zero to LightGBM."""
    frame = pd.DataFrame({"town": RNG.choice(list("abcdefgh"), 300), "size": np.round(RNG.normal(size=300))})
    target = ((frame["town"] < "d") ^ (frame["size"] > 0)).astype(int)
    columns = compose.ColumnTransformer(
        [("town", preprocessing.OneHotEncoder(handle_unknown="ignore"), ["town"])],
        remainder="passthrough",
        sparse_threshold=float(sparse),
    )
    model = make_pipeline(columns, pair[0]).fit(frame, target)
    assert model[0].sparse_output_ == sparse
    lab.check(model, frame, frame.assign(town="z"), rtol=1e-6)
