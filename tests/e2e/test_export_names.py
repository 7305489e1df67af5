"""The names of the original export workflow: export_model, load_model, validate_export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression

import mlec as mle

X, Y = load_iris(return_X_y=True)


def test_export_load_and_validate(tmp_path: Path) -> None:
    model = RandomForestClassifier(5, random_state=0).fit(X, Y)
    done = mle.export_model(model, tmp_path / "m.mle", metadata={"author": "me"})
    assert done["success"]
    assert done["size_bytes"] == Path(done["path"]).stat().st_size
    np.testing.assert_array_equal(mle.load_model(done["path"]).predict(X), model.predict(X))
    found = mle.validate_export(model, done["path"], X)
    assert found["passed"]
    assert found["label_mismatches"] == 0
    assert found["tolerance"]["rtol"] < 1e-6, "by default the bound of tree ensembles, not that of networks"


def test_validation_finds_another_model(tmp_path: Path) -> None:
    done = mle.export_model(LogisticRegression(max_iter=1000).fit(X, Y), tmp_path / "m.mle")
    other = LogisticRegression(max_iter=1000).fit(-X, Y)
    found = mle.validate_export(other, done["path"], X)
    assert not found["passed"]
    assert found["label_mismatches"] > 0
    assert found["max_abs_error"] > 0


def test_errors_are_returned(tmp_path: Path) -> None:
    done = mle.export_model(LogisticRegression(max_iter=1000).fit(X, Y), tmp_path / "m.mle", quantization="int8")
    assert not done["success"]
    assert done["code"] == "E_NOT_OFFERED"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", [None, 3, b"m.mle", ["m.mle"]])
def test_what_is_no_path_is_refused(path: object) -> None:
    with pytest.raises(mle.MlecError, match="load takes the path of a") as caught:
        mle.load(path)
    assert caught.value.code == "E_USAGE"
