"""Which function lowers which estimator class."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted

from mlec.errors import NotFittedModelError
from mlec.frontends.sklearn.columns import Columns
from mlec.frontends.sklearn.context import Context, Lowered
from mlec.frontends.sklearn.foreign import convert_foreign, frontend_of

Converter = Callable[[Context, Any, Columns], Lowered]
_F = TypeVar("_F", bound=Converter)

CONVERTERS: dict[type, Converter] = {}

TRAINING_ONLY = frozenset(
    {"fit", "fit_transform", "fit_predict", "partial_fit", "score", "get_params", "set_params", "get_metadata_routing",
     "set_fit_request", "set_score_request", "set_partial_fit_request", "get_feature_names_out", "set_output"}
)  # fmt: skip
"""Methods that a subclass may override without changing what a fitted estimator computes."""


def converts(*classes: type) -> Callable[[_F], _F]:
    """Registers a converter: ``convert(ctx, estimator, columns) -> Lowered``."""

    def register(function: _F) -> _F:
        CONVERTERS.update(dict.fromkeys(classes, function))
        return function

    return register


def supported() -> list[str]:
    """Names of the estimator classes with a converter."""
    return sorted(cls.__name__ for cls in CONVERTERS if not cls.__name__.startswith("_"))


def _alternatives(name: str) -> str:
    near = difflib.get_close_matches(name, supported(), n=5, cutoff=0.5)
    listed = f"supported with a similar name: {', '.join(near)}; " if near else ""
    return (
        f"{listed}`mlec frontends sklearn` lists all {len(supported())}; or leave this step outside the compiled model"
    )


def find_converter(cls: type) -> Converter | None:
    """The converter of a class, or of the base that it inherits all inference methods from; None if there is none."""
    for base in cls.__mro__:
        if base in CONVERTERS:
            return CONVERTERS[base]
        if any(callable(member) and not _harmless(name) for name, member in vars(base).items()):
            return None
    return None


def _harmless(name: str) -> bool:
    return name in TRAINING_ONLY or (name.startswith("__") and name.endswith("__"))


def convert(ctx: Context, estimator: Any, columns: Columns, step: str = "") -> Lowered:
    """Lowers one (fitted) estimator on the given input columns.

    Raises:
        NotFittedModelError: when it was never fitted.
        UnsupportedModelError: when there is no exact lowering.
    """
    with ctx.inside(step, estimator):
        frontend = frontend_of(estimator)
        if frontend is not None:
            return convert_foreign(ctx, frontend, estimator, columns)
        converter = find_converter(type(estimator))
        if converter is None:
            ctx.refuse(
                f"no exact lowering for {type(estimator).__module__}.{type(estimator).__qualname__}",
                _alternatives(type(estimator).__name__),
            )
        _check_fitted(ctx, estimator)  # of a class that is known: estimators without a state look as if they were not
        return converter(ctx, estimator, columns)


def transform(ctx: Context, transformer: Any, columns: Columns, step: str) -> Columns:
    """The columns that a transformer makes; ``"passthrough"`` and None change nothing."""
    if transformer is None or (isinstance(transformer, str) and transformer == "passthrough"):
        return columns
    lowered = convert(ctx, transformer, columns, step)
    if lowered.columns is not None:
        return lowered.columns
    matrix = lowered.methods["transform"].values[0] if "transform" in lowered.methods else None
    if matrix is None or matrix.type.rank != 2:
        with ctx.inside(step, transformer):
            ctx.refuse("its transform is not supported in the middle of a model")
    columns = ctx.transformed(matrix).columns or ()
    return columns


def _check_fitted(ctx: Context, estimator: Any) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check_is_fitted(estimator)
    except NotFittedError as error:
        raise NotFittedModelError(
            f"{type(estimator).__name__} is not fitted", hint="call fit before compiling the model", loc=ctx.location
        ) from error
    except TypeError:  # not an estimator: duck-typed objects are judged by their converter
        pass
