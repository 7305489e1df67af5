"""Scalers and other numeric transformers, and imputation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from sklearn import feature_selection, impute, preprocessing
from sklearn.utils import check_array, get_tags

from mlec.frontends.sklearn.columns import Absent, Columns, ComputedColumn, TableColumn, is_sparse, marked
from mlec.frontends.sklearn.context import BATCH, Array, Context, Lowered, is_table
from mlec.frontends.sklearn.registry import convert, converts
from mlec.ir import Value
from mlec.signature import Coding, Scalar


@converts(preprocessing.StandardScaler)
def standard_scaler(ctx: Context, scaler: Any, columns: Columns) -> Lowered:
    return _centre_and_scale(
        ctx, columns, scaler.mean_ if scaler.with_mean else None, scaler.scale_ if scaler.with_std else None
    )


@converts(preprocessing.RobustScaler)
def robust_scaler(ctx: Context, scaler: Any, columns: Columns) -> Lowered:
    return _centre_and_scale(
        ctx, columns, scaler.center_ if scaler.with_centering else None, scaler.scale_ if scaler.with_scaling else None
    )


def _centre_and_scale(ctx: Context, columns: Columns, centre: Array | None, scale: Array | None) -> Lowered:
    x = ctx.matrix(columns)
    if centre is not None:
        x = ctx.b("sub", x, ctx.constant(centre, "centre"))
    if scale is not None:
        x = ctx.b("div", x, ctx.constant(scale, "scale"))
    return ctx.transformed(x, like=columns)


@converts(preprocessing.MinMaxScaler)
def min_max_scaler(ctx: Context, scaler: Any, columns: Columns) -> Lowered:
    scaled = ctx.b("mul", ctx.matrix(columns), ctx.constant(scaler.scale_, "scale"))
    x = ctx.b("add", scaled, ctx.constant(scaler.min_, "min"))
    if scaler.clip:
        low, high = scaler.feature_range
        x = ctx.b("clip", x, lo=float(low), hi=float(high))
    return ctx.transformed(x, like=columns)


@converts(preprocessing.MaxAbsScaler)
def max_abs_scaler(ctx: Context, scaler: Any, columns: Columns) -> Lowered:
    x = ctx.b("div", ctx.matrix(columns), ctx.constant(scaler.scale_, "scale"))
    if getattr(scaler, "clip", False):
        x = ctx.b("clip", x, lo=-1.0, hi=1.0)
    return ctx.transformed(x, like=columns)


@converts(preprocessing.Normalizer)
def normalizer(ctx: Context, model: Any, columns: Columns) -> Lowered:
    return ctx.transformed(unit_rows(ctx, ctx.matrix(columns), model.norm), sparse=is_sparse(columns))


def unit_rows(ctx: Context, x: Value, kind: str = "l2") -> Value:
    """Rows divided by their norm; as the library, a row without length keeps its values."""
    if kind == "l2":
        norm = ctx.b("sqrt", ctx.b("sum", ctx.b("mul", x, x), axes=(1,), keepdims=True))
    else:
        norm = ctx.b("sum" if kind == "l1" else "max", ctx.b("abs", x), axes=(1,), keepdims=True)
    vanishing = ctx.b("lt", norm, 10 * float(np.finfo(np.float64).eps))
    return ctx.b("div", x, ctx.b("where", vanishing, ctx.constant(1.0), norm))


@converts(preprocessing.Binarizer)
def binarizer(ctx: Context, model: Any, columns: Columns) -> Lowered:
    return ctx.transformed(
        ctx.cast(ctx.b("gt", ctx.matrix(columns), float(model.threshold)), "f64"), sparse=is_sparse(columns)
    )


@converts(preprocessing.PolynomialFeatures)
def polynomial_features(ctx: Context, model: Any, columns: Columns) -> Lowered:
    """Products are built degree by degree, each as (the product without its first factor) * (first factor): so does the
    library, and rounding follows that order."""
    x = ctx.matrix(columns)
    monomials = [tuple(np.repeat(np.arange(len(powers)), powers).tolist()) for powers in model.powers_]
    parts: list[Value] = []
    place: dict[tuple[int, ...], int] = {}
    if () in monomials:
        parts.append(ctx.b("broadcast_to", ctx.constant(np.ones((1, 1)), "bias"), shape=(BATCH, 1)))
        place[()] = 0
    needed = [
        {m[i:] for m in monomials for i in range(len(m)) if len(m) - i == k + 1}
        for k in range(max(map(len, monomials)))
    ]
    before: dict[tuple[int, ...], int] = {}
    product = x
    for degree, level in enumerate(needed, 1):
        ordered = sorted(level)
        first = ctx.b("gather", x, ctx.constant(np.array([m[0] for m in ordered]), "factor"), axis=1)
        if degree == 1:
            product = first if ordered != [(i,) for i in range(len(columns))] else x
        else:
            rest = ctx.b("gather", product, ctx.constant(np.array([before[m[1:]] for m in ordered]), "product"), axis=1)
            product = ctx.b("mul", rest, first)
        before = {m: i for i, m in enumerate(ordered)}
        place |= {m: len(place) + i for i, m in enumerate(ordered)}
        parts.append(product)
    everything = ctx.b("concat", *parts, axis=1) if len(parts) > 1 else parts[0]
    order = np.array([place[m] for m in monomials])
    if len(order) != len(place) or (order != np.arange(len(order))).any():
        everything = ctx.b("gather", everything, ctx.constant(order, "order"), axis=1)
    return ctx.transformed(everything, sparse=is_sparse(columns))


FUNCTIONS = {
    np.abs: "abs", np.negative: "neg", np.sign: "sign", np.exp: "exp", np.expm1: "expm1", np.log: "log", np.log1p: "log1p",
    np.sqrt: "sqrt", np.sin: "sin", np.cos: "cos", np.tan: "tan", np.arctan: "atan", np.tanh: "tanh", np.floor: "floor",
    np.ceil: "ceil", np.rint: "round", np.trunc: "trunc",
}  # fmt: skip
"""Numpy functions that FunctionTransformer may hold, and the op for each."""

COMPOSED: dict[Any, Callable[[Context, Value], Value]] = {
    np.square: lambda ctx, x: ctx.b("mul", x, x),
    np.reciprocal: lambda ctx, x: ctx.b("div", ctx.constant(1.0), x),
    np.log2: lambda ctx, x: ctx.b("mul", ctx.b("log", x), float(1 / np.log(2))),
    np.log10: lambda ctx, x: ctx.b("mul", ctx.b("log", x), float(1 / np.log(10))),
    np.exp2: lambda ctx, x: ctx.b("pow", ctx.constant(2.0), x),
    np.cbrt: lambda ctx, x: ctx.b("mul", ctx.b("sign", x), ctx.b("pow", ctx.b("abs", x), ctx.constant(1 / 3))),
}
"""Those that are made of several ops, or of one with other operands."""


def apply_function(ctx: Context, function: Any, x: Value) -> Value | None:
    """What a numpy function makes of x; None for a function that is not known."""
    try:
        if function in COMPOSED:
            return COMPOSED[function](ctx, x)
        return ctx.b(FUNCTIONS[function], x) if function in FUNCTIONS else None
    except TypeError:  # not hashable
        return None


@converts(preprocessing.FunctionTransformer)
def function_transformer(ctx: Context, model: Any, columns: Columns) -> Lowered:
    function = model.func
    checks_only = isinstance(function, functools.partial) and function.func is check_array
    if function is None or checks_only:
        ctx.check(columns, nan=not model.validate, infinity=not model.validate)
        return Lowered("transformer", columns=columns)
    x = ctx.matrix(columns, check=bool(model.validate))
    made = None if model.kw_args else apply_function(ctx, function, x)
    if made is None:
        ctx.refuse(
            f"the function {getattr(function, '__qualname__', function)!r} cannot be read",
            "use one of numpy's: " + ", ".join(sorted(f.__name__ for f in (*FUNCTIONS, *COMPOSED))),
        )
    return ctx.transformed(made, like=columns)


@converts(
    feature_selection.GenericUnivariateSelect, feature_selection.SelectFdr, feature_selection.SelectFpr,
    feature_selection.SelectFromModel, feature_selection.SelectFwe, feature_selection.SelectKBest,
    feature_selection.SelectPercentile, feature_selection.SequentialFeatureSelector, feature_selection.VarianceThreshold,
)  # fmt: skip
def feature_selector(ctx: Context, model: Any, columns: Columns) -> Lowered:
    allow_nan = get_tags(model).input_tags.allow_nan
    ctx.check(columns, infinity=allow_nan)
    if not allow_nan:  # also not in the columns that it drops, which must be read for that
        columns = ctx.transformed(ctx.matrix(columns), like=columns).columns or ()
    return Lowered("transformer", columns=tuple(columns[i] for i in model.get_support(indices=True)))


@converts(feature_selection.RFE, feature_selection.RFECV)
def recursive_elimination(ctx: Context, model: Any, columns: Columns) -> Lowered:
    selected = tuple(columns[i] for i in model.get_support(indices=True))
    ctx.check(columns)
    lowered = convert(ctx, model.estimator_, selected, "estimator")
    return Lowered(lowered.kind, lowered.methods, columns=selected)


# -- missing values --------------------------------------------------------------------------------------------------


def scalar(value: object) -> Scalar:
    """A numpy scalar as a plain Python value; NaN, None and pandas.NA as None."""
    plain = value.item() if isinstance(value, np.generic) else value
    if plain is None or (isinstance(plain, float) and plain != plain) or type(plain).__name__ in ("NAType", "NaTType"):
        return None
    if not isinstance(plain, str | int | float | bool):
        raise TypeError(f"{plain!r} is a {type(plain).__name__}")
    return plain


@converts(impute.SimpleImputer)
def simple_imputer(ctx: Context, model: Any, columns: Columns) -> Lowered:
    missing = scalar(model.missing_values)
    ctx.check(columns, nan=missing is None)
    fills = [scalar(value) for value in model.statistics_]
    if (model.keep_empty_features or model.strategy == "constant") and None in fills:
        ctx.refuse(
            f"strategy={model.strategy!r} with fill_value={model.fill_value!r} fills in nothing for a feature that it keeps",
            "use a fill_value that is not missing",
        )
    kept = [i for i, fill in enumerate(fills) if fill is not None]
    # Of what dtype the fill values are says nothing about the table: constants and modes are held as objects.
    strings = model._fit_dtype.kind in "OU" and model.statistics_.dtype.kind in "OU"
    absent = _absent(model.missing_values) if strings else "any"
    imputed = _imputed(ctx, tuple(columns[i] for i in kept), [fills[i] for i in kept], missing, absent)
    if model.add_indicator and len(model.indicator_.features_):
        tested = tuple(columns[i] for i in model.indicator_.features_)
        indicator = _is_missing(ctx, tested, missing, absent, strings=strings)
        imputed += ctx.transformed(indicator).columns or ()
    return Lowered("transformer", columns=marked(imputed, is_sparse(columns)))


@converts(impute.MissingIndicator)
def missing_indicator(ctx: Context, model: Any, columns: Columns) -> Lowered:
    missing = scalar(model.missing_values)
    if model.features == "missing-only" and model.error_on_new and len(model.features_) < len(columns):
        ctx.refuse(
            "error_on_new=True raises for a value missing in a feature that had none in training; a compiled model cannot",
            "set_params(error_on_new=False)",
        )
    ctx.check(columns, nan=missing is None)
    tested = tuple(columns[i] for i in model.features_)
    return ctx.transformed(_is_missing(ctx, tested, missing, strings=isinstance(missing, str)), dtype="bool")


def _absent(missing_values: object) -> Absent:
    """What an imputer of strings takes for missing: None is not NaN to it."""
    return "none" if missing_values is None else "nan" if isinstance(missing_values, float) else "any"


def _imputed(ctx: Context, columns: Columns, fills: list[Scalar], missing: Scalar, absent: Absent) -> Columns:
    if is_table(columns) and all(isinstance(column, TableColumn) and column.fill is None for column in columns):
        return tuple(
            TableColumn(column.position, fill, missing, absent)
            for column, fill in zip(columns, fills, strict=True)
            if isinstance(column, TableColumn)
        )
    x = ctx.matrix(columns, nan=missing is None)
    marks = np.full(len(columns), np.nan if missing is None else missing, np.float64)
    filled = ctx.b("where", ctx.where_missing(x, marks), ctx.constant(np.array(fills, np.float64), "fill"), x)
    return tuple(ComputedColumn(filled, i) for i in range(len(columns)))


def _is_missing(ctx: Context, columns: Columns, missing: Scalar, absent: Absent = "any", *, strings: bool) -> Value:
    """1.0 where a value is missing, (n, len(columns)) of f64."""
    if strings:
        coding = Coding(categories=(), unknown=0, missing=1)
        if absent != "any":
            coding = msgspec.structs.replace(coding, missing=0, **{absent: 1})
        if missing is not None:
            coding = Coding(categories=(missing,), codes=(1,), unknown=0, missing=0)
        table_columns = [column for column in columns if isinstance(column, TableColumn)]
        if len(table_columns) != len(columns):
            ctx.refuse("it marks missing strings that another step has computed")
        return ctx.cast(ctx.codes([(column, coding) for column in table_columns], "missing"), "f64")
    x = ctx.matrix(columns, nan=missing is None)
    return ctx.cast(
        ctx.where_missing(x, np.full(len(columns), np.nan if missing is None else missing, np.float64)), "f64"
    )
