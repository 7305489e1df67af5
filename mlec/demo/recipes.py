"""The models of the demo."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from mlec.errors import UsageError


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained model with data that it has not seen.

    Attributes:
        model: the source model.
        inputs: rows to verify and time with: an array or a DataFrame.
        truth: what should come out for each row: classes, or numbers.
        method: the method to time; empty for a network, which is called.
    """

    model: Any
    inputs: Any
    truth: Any
    method: str = ""


@dataclass(frozen=True)
class Recipe:
    """How to make one model.

    Attributes:
        name: of the model; also of the files made of it.
        data: the data set.
        library: the extra of this package that installs what it needs.
        where: ``"module:function"`` that trains it; imported only when it runs.
    """

    name: str
    data: str
    library: str
    where: str

    def train(self) -> Trained:
        """Trains the model; the same on every machine, up to the libraries' own arithmetic.

        Raises:
            ImportError: the library is not installed.
        """
        module, function = self.where.split(":")
        trained: Trained = getattr(importlib.import_module(f"mlec.demo.{module}"), function)()
        return trained


RECIPES = (
    Recipe("logistic regression", "breast cancer", "sklearn", "estimators:logistic_regression"),
    Recipe("columns of text and numbers", "iris", "sklearn", "estimators:column_transformer"),
    Recipe("support vectors", "digits", "sklearn", "estimators:support_vectors"),
    Recipe("random forest", "digits", "sklearn", "estimators:random_forest"),
    Recipe("hist gradient boosting", "diabetes", "sklearn", "estimators:hist_gradient_boosting"),
    Recipe("xgboost", "digits", "xgboost", "estimators:xgboost"),
    Recipe("lightgbm", "diabetes", "lightgbm", "estimators:lightgbm"),
    Recipe("mlp", "digits", "torch", "networks:mlp"),
    Recipe("resnet", "digits", "torch", "networks:resnet"),
    Recipe("lstm", "digits", "torch", "networks:lstm"),
    Recipe("transformer", "digits", "torch", "networks:transformer"),
)


def chosen(only: Collection[str]) -> Sequence[Recipe]:
    """The recipes whose names hold one of these texts; all where there is none.

    Raises:
        UsageError: a text that is in no name.
    """
    for text in only:
        if not any(text in recipe.name for recipe in RECIPES):
            names = ", ".join(recipe.name for recipe in RECIPES)
            raise UsageError(f"no model of the demo has {text!r} in its name", hint=f"there are: {names}")
    return [recipe for recipe in RECIPES if not only or any(text in recipe.name for text in only)]
