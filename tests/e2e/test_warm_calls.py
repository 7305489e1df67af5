"""Calls after the first: nothing is prepared again, and nothing is left unchecked."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import mlec
from mlec.errors import InputError


@pytest.fixture(scope="module")
def model() -> mlec.CompiledModel:
    X = np.arange(60.0).reshape(2, 30)
    return mlec.compile(LogisticRegression(C=1e-4).fit(X, [3, 7]), validate=False, progress=False)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_warm_model_still_looks_at_its_input(model: mlec.CompiledModel, dtype: type) -> None:
    X = np.arange(60.0).reshape(2, 30).astype(dtype)
    first = model.run([X])
    for _ in range(3):
        labels, probabilities = model.run([X])
        assert labels.tolist() == [3, 7]
        np.testing.assert_array_equal(probabilities, first[1])
        np.testing.assert_array_equal(model.predict_proba(X), probabilities)
    with pytest.raises(InputError, match="features"):
        model.run([X[:, :29]])
    for wrong in (np.nan, np.inf):
        X[1, 3] = wrong
        with pytest.raises(InputError) as caught:
            model.run([X])
        assert caught.value.code == "E_INPUT_VALUE"
    X[1, 3] = 3e38  # its square is no float32, and it is a number
    (again,) = model.run([X.astype(np.float64)])[1:]
    np.testing.assert_array_equal(model.run([X])[1], again)


def test_warm_results_go_where_they_are_wanted(model: mlec.CompiledModel) -> None:
    X = np.arange(60.0).reshape(2, 30)
    labels, probabilities = model.run([X])
    plain, wide = np.empty((2, 2)), np.empty((2, 2), np.longdouble)
    for out in ([np.empty(2, np.int64), plain], [np.empty(2, object), wide]):
        for _ in range(2):
            results = model.run([X], out=out)
            assert all(result is target for result, target in zip(results, out, strict=True))
            assert out[0].tolist() == labels.tolist()
            np.testing.assert_array_equal(out[1], probabilities)
    kept = X.copy()
    model.run([X], out=[np.empty(2, np.int64), X[:, :2]])  # over the input
    np.testing.assert_array_equal(X[:, :2], probabilities)
    np.testing.assert_array_equal(X[:, 2:], kept[:, 2:])
