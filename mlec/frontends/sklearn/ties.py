"""Rows on which the source's own answer is arbitrary: of several neighbours at the same distance, not all count.

Which of them scikit-learn takes depends on its search tree and on rounding; we take the first in training order.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from types import ModuleType
from typing import Any

import joblib
import numpy as np
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

from mlec.frontends.sklearn.context import Array

SAME_DISTANCE = 1e-9
"""Relative difference below which rounding decides which of two neighbours is the nearer one."""


def decided(model: Any, methods: Sequence[str]) -> Callable[[Any], Array] | None:
    """For models with nearest neighbours anywhere inside: a function that says for each row of a table, (n,) of bool, whether all of
    them have one right answer on what of this row reaches them. None: for all other models.

    Args:
        model: fitted.
        methods: of the model, that are to be compared.
    """
    searches = [part for part in _parts(model) if _may_tie(part)]
    if not searches:
        return None
    if _may_tie(model):
        return lambda table: _one_answer(model, table)

    def everywhere(table: Any) -> Array:
        found: list[Array] = []
        # A copy of the model, in which the neighbours tell what reaches them; deepcopy puts in what its memo holds.
        told = copy.deepcopy(model, {id(search): _telling(search, found) for search in searches})
        with joblib.parallel_config("sequential"), warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            for method in methods:
                getattr(told, method)(table)
        rows = np.ones(np.shape(table)[0], bool)
        for answers in found:
            if answers.shape == rows.shape:  # else it is not known which rows these are: they stay in
                rows &= answers
        return rows

    return everywhere


def _may_tie(part: object) -> bool:
    return (
        isinstance(part, KNeighborsClassifier | KNeighborsRegressor)
        and hasattr(part, "n_samples_fit_")
        and part.n_neighbors < part.n_samples_fit_
    )


def _parts(model: object) -> Iterator[object]:
    """The model and all that it holds, each once, in attributes, containers and arrays of objects."""
    known: dict[int, object] = {}
    waiting = [model]
    while waiting:
        part = waiting.pop()
        if id(part) in known or isinstance(part, type | ModuleType):
            continue
        known[id(part)] = part
        yield part
        if isinstance(part, Mapping):
            waiting.extend(part.values())
        elif isinstance(part, list | tuple | set | frozenset):
            waiting.extend(part)
        elif isinstance(part, np.ndarray):
            waiting.extend(part.flat if part.dtype == object else ())
        else:
            waiting.extend(getattr(part, "__dict__", {}).values())


def _telling(search: Any, found: list[Array]) -> Any:
    """The same neighbours (arrays and search tree are shared), which add to ``found`` where each table has one answer."""

    def telling(predict: Callable[[Any], Any]) -> Callable[[Any], Any]:
        @wraps(predict)  # scikit-learn looks at the name
        def answer(X: Any) -> Any:  # as scikit-learn names it
            found.append(_one_answer(search, X))
            return predict(X)

        return answer

    shown = copy.copy(search)
    for method in ("predict", "predict_proba"):
        if hasattr(search, method):
            setattr(shown, method, telling(getattr(search, method)))
    return shown


def _one_answer(search: Any, table: Any) -> Array:
    """Rows for which the last neighbour that counts is nearer than the first that does not, or all that are as far as these have the
    same target, as the copies of one training row have that a bootstrap draws.
    """
    count, rows = search.n_neighbors, search.n_samples_fit_
    asked = min(rows, 2 * count + 8)  # a few more, to see where the tie ends
    distances, indices = search.kneighbors(table, asked)
    last = distances[:, count - 1 : count]
    same_distance = np.abs(distances - last) <= SAME_DISTANCE * np.maximum(distances, last)
    targets = np.asarray(search._y).reshape(rows, -1)[indices]
    same_target = (targets == targets[:, count - 1 : count]).all(axis=2)
    ends = ~same_distance[:, -1] | (asked == rows)
    nearer = ~same_distance[:, count]
    settled: Array = nearer | (ends & (same_target | ~same_distance).all(axis=1))
    return settled
