"""Categories to numbers: one-hot, ordinal and target encoding, and discretisation.

The categories of a table column are coded before the graph runs (see `mlec.signature.Coding`); those of numeric columns are
compared in the graph where the encoder accepts unknown ones, for that is faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn import preprocessing

from mlec.frontends.sklearn.columns import Column, Columns, TableColumn
from mlec.frontends.sklearn.context import BATCH, Array, Context, Lowered
from mlec.frontends.sklearn.preprocessing import scalar
from mlec.frontends.sklearn.registry import converts
from mlec.ir import Value
from mlec.signature import Coding, Scalar

LARGEST_EXACT = 2**53
"""Whole numbers beyond this are not all exact in f64."""


@dataclass(frozen=True)
class Feature:
    """One feature's categories (as the encoder holds them), the code of each, and the code of all others."""

    categories: Array
    codes: tuple[int, ...]
    unknown: int | None

    @property
    def is_numeric(self) -> bool:
        kind = self.categories.dtype.kind
        return kind in "bf" or (
            kind in "iu" and bool((np.abs(self.categories.astype(np.float64)) < LARGEST_EXACT).all())
        )


def encode(ctx: Context, columns: Columns, features: Sequence[Feature]) -> Value:
    """The code of each value, (n, len(columns)) of i64."""
    at_edge = [i for i, (c, f) in enumerate(zip(columns, features, strict=True)) if _coded_outside(ctx, c, f)]
    in_graph = [i for i in range(len(columns)) if i not in set(at_edge)]
    parts = []
    if at_edge:
        codings = [
            (column, _coding(ctx, features[i])) for i in at_edge if isinstance(column := columns[i], TableColumn)
        ]
        parts.append(ctx.codes(codings, "codes"))
    if in_graph:
        x = ctx.matrix(tuple(columns[i] for i in in_graph), nan=True)
        parts.append(_compare(ctx, x, [features[i] for i in in_graph]))
    if len(parts) == 1:
        return parts[0]
    order = np.argsort([*at_edge, *in_graph])
    return ctx.b("gather", ctx.b("concat", *parts, axis=1), ctx.constant(order, "order"), axis=1)


def _coded_outside(ctx: Context, column: Column, feature: Feature) -> bool:
    strings = not feature.is_numeric
    if isinstance(column, TableColumn):
        return strings or feature.unknown is None or isinstance(column.fill, str)
    if strings:
        ctx.refuse("it encodes categories that another step has computed, and these are no numbers")
    if feature.unknown is None:
        ctx.refuse(
            "handle_unknown='error' on values that another step has computed: a compiled model cannot raise in the middle",
            "use handle_unknown='ignore' (OneHotEncoder) or 'use_encoded_value' (OrdinalEncoder)",
        )
    return False


def _coding(ctx: Context, feature: Feature) -> Coding:
    try:
        categories: list[Scalar] = [scalar(category) for category in feature.categories]
    except TypeError as error:
        ctx.refuse(f"categories may be strings, numbers or missing; {error}")
    if categories.count(None) > 1:
        ctx.refuse("None and NaN are two categories of one feature", "replace one by the other before fitting")
    if None not in categories:
        return Coding(
            categories=tuple(categories), codes=feature.codes, unknown=feature.unknown, missing=feature.unknown
        )
    if feature.is_numeric:  # the library reads a table of numbers as floats, and None as NaN
        return Coding(categories=tuple(categories), codes=feature.codes, unknown=feature.unknown)
    position = categories.index(None)
    absent = "none" if feature.categories[position] is None else "nan"
    known = dict(zip(categories, feature.codes, strict=True))
    code = known.pop(None)
    return Coding(
        categories=tuple(known), codes=tuple(known.values()), unknown=feature.unknown, missing=feature.unknown,
        **{absent: code},
    )  # fmt: skip


def _compare(ctx: Context, x: Value, features: Sequence[Feature]) -> Value:
    """Codes of numbers, by comparing each with every category of its feature."""
    width = max(len(feature.categories) for feature in features)
    values = np.full((1, len(features), width), np.nan)  # NaN equals nothing, so padding never matches
    missing = np.zeros((1, len(features), width), bool)
    codes = np.zeros((len(features), width + 1), np.int64)
    for i, feature in enumerate(features):
        count = len(feature.categories)
        values[0, i, :count] = feature.categories
        missing[0, i, :count] = np.isnan(values[0, i, :count])
        codes[i, :count] = feature.codes
        if feature.unknown is not None:
            codes[i, width] = feature.unknown
    cells = ctx.b("reshape", x, shape=(BATCH, len(features), 1))
    equal = ctx.b("eq", cells, ctx.constant(values, "categories"))
    if missing.any():
        equal = ctx.b(
            "logical_or", equal, ctx.b("logical_and", ctx.b("isnan", cells), ctx.constant(missing, "missing"))
        )
    positions = ctx.constant(np.arange(width), "position")
    # The first match; the extra position stands for "none".
    first = ctx.b("min", ctx.b("where", equal, positions, ctx.constant(width)), axes=(2,))
    offsets = np.arange(len(features)) * (width + 1)
    return ctx.b(
        "gather", ctx.constant(codes.ravel(), "codes"), ctx.b("add", first, ctx.constant(offsets, "offset")), axis=0
    )


def one_hot(ctx: Context, codes: Value, widths: Sequence[int]) -> Value:
    """Indicator columns, (n, sum(widths)) of f64: ``widths[i]`` for feature i; a code of -1 sets none."""
    feature = np.repeat(np.arange(len(widths)), widths)
    code = np.concatenate([np.arange(width) for width in widths]) if len(widths) else np.zeros(0)
    spread = ctx.b("gather", codes, ctx.constant(feature, "feature"), axis=1)
    return ctx.cast(ctx.b("eq", spread, ctx.constant(code.astype(np.int64), "category")), "f64")


def _grouped(model: Any, i: int) -> Array:
    """The code of each category of feature i after rare ones are put together."""
    mappings = getattr(model, "_default_to_infrequent_mappings", None)
    mapping = None if mappings is None else mappings[i]
    return np.arange(len(model.categories_[i])) if mapping is None else np.asarray(mapping)


@converts(preprocessing.OneHotEncoder)
def one_hot_encoder(ctx: Context, model: Any, columns: Columns) -> Lowered:
    features, widths = [], []
    dropped_codes = model._drop_idx_after_grouping
    for i, categories in enumerate(model.categories_):
        codes = _grouped(model, i)
        unknown: int | None = None if model.handle_unknown == "error" else -1
        rare = getattr(model, "_infrequent_indices", None)
        if model.handle_unknown in ("infrequent_if_exist", "warn") and rare is not None and rare[i] is not None:
            unknown = int(codes[rare[i][0]])
        width = int(codes.max(initial=-1)) + 1
        dropped = None if dropped_codes is None else dropped_codes[i]
        if dropped is not None:
            codes = np.where(codes == dropped, -1, codes - (codes > dropped))
            if unknown is not None and unknown >= 0:
                unknown = -1 if unknown == dropped else unknown - (unknown > dropped)
            width -= 1
        features.append(Feature(categories, tuple(codes.tolist()), unknown))
        widths.append(width)
    indicators = one_hot(ctx, encode(ctx, columns, features), widths)
    return ctx.transformed(indicators, dtype=_dtype(model.dtype), sparse=bool(model.sparse_output))


@converts(preprocessing.OrdinalEncoder)
def ordinal_encoder(ctx: Context, model: Any, columns: Columns) -> Lowered:
    tables = []
    for i, categories in enumerate(model.categories_):
        grouped = _grouped(model, i)  # without the missing value, which comes last, where rare ones are put together
        table = np.full(len(categories), np.nan)
        table[: len(grouped)] = grouped
        if i in model._missing_indices:
            table[model._missing_indices[i]] = model.encoded_missing_value
        tables.append(table)
    accepts = model.handle_unknown == "use_encoded_value"
    return _look_up(ctx, model, columns, tables, model.unknown_value if accepts else None)


def _look_up(ctx: Context, model: Any, columns: Columns, tables: Sequence[Array], unknown: float | None) -> Lowered:
    """A number for each category: ``tables[i]`` of feature i, one joined table in the graph."""
    features, entries, start = [], [], 0
    for categories, table in zip(model.categories_, tables, strict=True):
        entries.append(table if unknown is None else np.append(table, unknown))
        codes = range(start, start + len(table))
        features.append(Feature(categories, tuple(codes), None if unknown is None else start + len(table)))
        start += len(entries[-1])
    table_value = ctx.constant(np.concatenate(entries), "encoding")
    encoded = ctx.b("gather", table_value, encode(ctx, columns, features), axis=0)
    return ctx.transformed(encoded, dtype=_dtype(getattr(model, "dtype", np.float64)))


@converts(preprocessing.TargetEncoder)
def target_encoder(ctx: Context, model: Any, columns: Columns) -> Lowered:
    """Of a target with several classes, each feature becomes a column for every class."""
    means = np.atleast_1d(np.asarray(model.target_mean_, np.float64))
    features = [Feature(values, tuple(range(len(values))), len(values)) for values in model.categories_]
    tables = [np.append(table, means[i % len(means)]) for i, table in enumerate(model.encodings_)]
    starts = np.cumsum([0, *map(len, tables[:-1])])
    codes = encode(ctx, columns, features)
    if len(means) > 1:
        repeated = np.repeat(np.arange(len(columns)), len(means))
        codes = ctx.b("gather", codes, ctx.constant(repeated, "feature"), axis=1)
    places = ctx.b("add", codes, ctx.constant(starts, "start"))
    return ctx.transformed(ctx.b("gather", ctx.constant(np.concatenate(tables), "encoding"), places, axis=0))


@converts(preprocessing.KBinsDiscretizer)
def k_bins_discretizer(ctx: Context, model: Any, columns: Columns) -> Lowered:
    inner = [np.asarray(edges[1:-1], np.float64) for edges in model.bin_edges_]
    width = max(map(len, inner))
    edges = np.full((1, len(inner), max(width, 1)), np.nan)
    for i, values in enumerate(inner):
        edges[0, i, : len(values)] = values
    cells = ctx.b("reshape", ctx.matrix(columns), shape=(BATCH, len(inner), 1))
    above = ctx.cast(ctx.b("ge", cells, ctx.constant(edges, "bin_edges")), "i64")
    bins = ctx.b("sum", above, axes=(2,))
    if model.encode == "ordinal":
        return ctx.transformed(ctx.cast(bins, "f64"))
    return ctx.transformed(one_hot(ctx, bins, [int(n) for n in model.n_bins_]), sparse=model.encode == "onehot")


def _dtype(dtype: Any) -> str | None:
    name = np.dtype(dtype).name
    return None if name == "float64" else name
