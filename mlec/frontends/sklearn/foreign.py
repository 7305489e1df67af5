"""Estimators of other libraries as steps of a scikit-learn model: their own frontend lowers them, and the graph is put in here."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlec.errors import MlecError
from mlec.frontends.base import Frontend, LowerOptions
from mlec.frontends.sklearn.columns import Columns, TableColumn
from mlec.frontends.sklearn.context import Array, Context, Kind, Lowered, Output
from mlec.ir import Graph, Value, constant_array
from mlec.signature import ColumnFeed, Labels


def frontend_of(estimator: object) -> Frontend | None:
    """The frontend of another library that takes this estimator."""
    package = type(estimator).__module__.partition(".")[0]
    packages = {package, *(cls.__module__.partition(".")[0] for cls in type(estimator).__mro__)}
    if "xgboost" in packages:
        from mlec.frontends.xgboost import XGBoostFrontend

        return XGBoostFrontend()
    if "lightgbm" in packages:
        from mlec.frontends.lightgbm import LightGBMFrontend

        return LightGBMFrontend()
    return None


def convert_foreign(ctx: Context, frontend: Frontend, estimator: Any, columns: Columns) -> Lowered:
    """Lowers an estimator of another library on the given columns."""
    try:
        graph = frontend.lower(estimator, LowerOptions())
    except MlecError as error:
        error.loc = ctx.location
        raise
    table = graph.signature.table
    if table is None or table.n_features != len(columns):
        ctx.refuse(f"it takes {table.n_features if table else 'no'} columns, but gets {len(columns)}")
    infinity = table.numbers == "any"
    inputs = []
    for value, feed in zip(graph.inputs, table.feeds, strict=True):
        taken = tuple(columns[i] for i in feed.columns)
        if feed.codings:
            inputs.append(_codes(ctx, taken, feed, str(value.type.dtype)))
            continue
        ctx.check(taken, nan=table.numbers != "finite", infinity=infinity)
        x = ctx.matrix(taken, dtype=str(value.type.dtype), check=False)
        if frontend.name == "xgboost" and any(column.sparse for column in taken):
            # What a sparse matrix does not store is missing to XGBoost, not zero.
            x = ctx.b("where", ctx.b("eq", x, 0.0), ctx.b.constant(np.nan, dtype=x.type.dtype), x)
        inputs.append(x)
    results = inlined(ctx, graph, inputs)
    methods = {
        spec.name: Output(
            tuple(results[i] for i in spec.outputs), tuple(_classes(labels) for labels in spec.labels), spec.dtype, spec.as_list, spec.stack
        )
        for spec in graph.signature.methods
        if not spec.function
    }  # fmt: skip
    kind: Kind = "classifier" if graph.signature.kind == "classifier" else "regressor"
    return Lowered(kind, methods)


def _codes(ctx: Context, columns: Columns, feed: ColumnFeed, dtype: str) -> Value:
    pairs = [(c, coding) for c, coding in zip(columns, feed.codings, strict=True) if isinstance(c, TableColumn)]
    if len(pairs) != len(columns):
        ctx.refuse("it takes categories, but another step has computed them", "encode them as numbers before this step")
    return ctx.cast(ctx.codes(pairs, "codes"), dtype)


def inlined(ctx: Context, graph: Graph, inputs: list[Value]) -> list[Value]:
    """The graph's outputs, its nodes copied to here and located in this model."""
    values = dict(zip(graph.inputs, inputs, strict=True))
    for node in graph.nodes:
        if node.is_constant:
            values[node.output] = ctx.b.constant(constant_array(node, graph.constants), node.output.hint)
        else:
            results = ctx.b.multi(
                node.op, *(values[v] for v in node.inputs), hints=[v.hint for v in node.outputs], **node.attrs
            )
            values.update(zip(node.outputs, results, strict=True))
    return [values[v] for v in graph.outputs]


def _classes(labels: Labels | None) -> Array | None:
    return None if labels is None else np.array(labels.values, dtype=labels.dtype)
