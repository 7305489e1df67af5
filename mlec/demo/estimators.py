"""Estimators of scikit-learn, XGBoost and LightGBM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris
from sklearn.model_selection import train_test_split

from mlec.demo.recipes import Trained


def _fitted(model: Any, load: Callable[..., Any], method: str) -> Trained:
    X, y = load(return_X_y=True)
    X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.3, random_state=0)
    return Trained(model.fit(X_train, y_train), X_test, y_test, method)


def logistic_regression() -> Trained:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return _fitted(make_pipeline(StandardScaler(), LogisticRegression()), load_breast_cancer, "predict_proba")


def column_transformer() -> Trained:
    """Text, missing values and numbers in one DataFrame; labels that are text as well."""
    import pandas as pd
    from sklearn.compose import make_column_transformer
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    iris = load_iris(as_frame=True)
    table = iris.data.set_axis(["sepal_length", "sepal_width", "petal_length", "petal_width"], axis=1)
    table["sepal"] = pd.cut(table.pop("sepal_length"), [0, 5.4, 6.3, 9], labels=["short", "middle", "long"]).astype(str)
    table["petal"] = pd.cut(table.pop("petal_length"), [0, 2, 5, 9], labels=["small", "middle", "large"]).astype(str)
    table.loc[::7, "sepal_width"] = np.nan
    species = iris.target_names[iris.target]
    model = make_pipeline(
        make_column_transformer(
            (OneHotEncoder(handle_unknown="ignore"), ["sepal", "petal"]),
            (make_pipeline(SimpleImputer(strategy="median"), StandardScaler()), ["sepal_width", "petal_width"]),
        ),
        LogisticRegression(),
    )
    X_train, X_test, y_train, y_test = train_test_split(table, species, test_size=0.3, random_state=0)
    return Trained(model.fit(X_train, y_train), X_test, y_test, "predict_proba")


def support_vectors() -> Trained:
    from sklearn.svm import SVC

    return _fitted(SVC(), load_digits, "decision_function")


def random_forest() -> Trained:
    from sklearn.ensemble import RandomForestClassifier

    return _fitted(RandomForestClassifier(100, random_state=0), load_digits, "predict_proba")


def hist_gradient_boosting() -> Trained:
    from sklearn.ensemble import HistGradientBoostingRegressor

    trained = _fitted(HistGradientBoostingRegressor(random_state=0), load_diabetes, "predict")
    trained.inputs[::5, 3] = np.nan  # missing values take a branch of their own
    return trained


def xgboost() -> Trained:
    from xgboost import XGBClassifier

    return _fitted(XGBClassifier(n_estimators=100, max_depth=6, n_jobs=1), load_digits, "predict_proba")


def lightgbm() -> Trained:
    from lightgbm import LGBMRegressor

    model = LGBMRegressor(n_estimators=100, n_jobs=1, verbose=-1, random_state=0)
    return _fitted(model, load_diabetes, "predict")
