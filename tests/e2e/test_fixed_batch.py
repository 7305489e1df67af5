"""Estimators compiled for the number of rows in the example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pandas as pd
import pytest
import xgboost
from sklearn.compose import make_column_transformer
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

import mlec
from mlec.errors import InputError, UsageError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(80, 4)).astype(np.float32)
Y = (X[:, 0] > X[:, 1]).astype(int)
FRAME = pd.DataFrame({"size": X[:, 0], "kind": RNG.choice(["a", "b", "c"], len(X))})


def _models() -> dict[str, tuple[Any, Any]]:
    columns = make_column_transformer((OneHotEncoder(), ["kind"]), (StandardScaler(), ["size"]))
    categories = FRAME.astype({"kind": "category"})
    return {
        "logistic": (LogisticRegression().fit(X, Y), X),
        "categories": (make_pipeline(columns, LogisticRegression()).fit(FRAME, Y), FRAME),
        "forest of two outputs": (RandomForestClassifier(5, max_depth=3).fit(X, np.column_stack([Y, 1 - Y])), X),
        "neighbours": (KNeighborsRegressor().fit(X, Y), X),
        "xgboost": (xgboost.XGBClassifier(n_estimators=5, max_depth=3).fit(X, Y), X),
        "lightgbm": (lightgbm.LGBMClassifier(n_estimators=5, verbosity=-1).fit(categories, Y), categories),
    }


MODELS = _models()


@pytest.mark.parametrize(("name", "rows"), [*((name, 7) for name in MODELS), ("categories", 1)])
def test_the_rows_of_the_example(name: str, rows: int, tmp_path: Path) -> None:
    model, table = MODELS[name]
    compiled = mlec.compile(model, table[:rows], dynamic_batch=False, progress=False)  # validated, too
    assert not compiled.graph.symbols
    assert all(spec.shape[0] == rows for spec in compiled.signature.inputs + compiled.signature.outputs)
    compiled.save(tmp_path / "m.mle")
    for each in (compiled, mlec.load(tmp_path / "m.mle")):
        assert np.array_equal(each.predict(table[10 : 10 + rows]), model.predict(table[10 : 10 + rows]))
        with pytest.raises(InputError, match=f"axis 0 must be {rows}, not {rows + 1}"):
            each.predict(table[: rows + 1])


def test_probes_in_parts_are_those_in_one() -> None:
    compiled = mlec.compile(MODELS["xgboost"][0], X[:7], dynamic_batch=False, progress=False)
    assert compiled.report.parity["methods"]["predict_proba"]["rows"] == 7
    assert compiled.report.parity["methods"]["predict_proba"]["max_abs_error"] == 0


@pytest.mark.parametrize("example", [None, X[:0]])
def test_no_rows_to_fix(example: Any) -> None:
    with pytest.raises(UsageError, match="as many rows as the example"):
        mlec.compile(MODELS["xgboost"][0], example, dynamic_batch=False)
