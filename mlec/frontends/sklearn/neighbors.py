"""Nearest neighbours, by distances to every training row (neighbours at equal distance: the first in training order)."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn import neighbors

from mlec.frontends.sklearn.columns import Columns
from mlec.frontends.sklearn.context import BATCH, Context, Lowered, Output
from mlec.frontends.sklearn.linear import dense
from mlec.frontends.sklearn.registry import converts
from mlec.ir import Value

METRICS = {
    "euclidean": "euclidean", "l2": "euclidean", "sqeuclidean": "sqeuclidean", "manhattan": "manhattan",
    "cityblock": "manhattan", "l1": "manhattan", "chebyshev": "chebyshev", "minkowski": "minkowski",
}  # fmt: skip


def nearest(ctx: Context, model: Any, columns: Columns) -> tuple[Value, Value | None]:
    """Indices of the nearest training rows (n, k), and their weights (n, k); None when all count the same."""
    metric, parameters = model.effective_metric_, dict(model.effective_metric_params_)
    if callable(model.weights):
        ctx.refuse("weights given as a Python function are not supported", "use 'uniform' or 'distance'")
    if metric not in METRICS or parameters.get("w") is not None:
        supported = ", ".join(sorted(METRICS))
        ctx.refuse(f"the metric {metric!r} with parameters {parameters} is not supported", f"supported: {supported}")
    fitted = ctx.constant(dense(model._fit_X), "training_rows")
    kind = METRICS[metric]
    # The squared distance has the same order, without the root.
    ranked = "sqeuclidean" if kind == "euclidean" else kind
    x = ctx.matrix(columns)
    p = float(parameters.get("p", 2.0))
    closest, indices = ctx.b.multi("nearest", x, fitted, metric=ranked, p=p, k=int(model.n_neighbors))
    if model.weights != "distance":
        return indices, None
    inverse = ctx.b("div", ctx.constant(1.0), ctx.b("sqrt", closest) if kind == "euclidean" else closest)
    exact = ctx.b("isinf", inverse)
    any_exact = ctx.b("any", exact, axes=(1,), keepdims=True)
    return indices, ctx.b("where", any_exact, ctx.cast(exact, "f64"), inverse)


@converts(neighbors.KNeighborsClassifier)
def k_neighbors_classifier(ctx: Context, model: Any, columns: Columns) -> Lowered:
    indices, weights = nearest(ctx, model, columns)
    several = bool(model.outputs_2d_)
    codes = np.asarray(model._y).reshape(len(model._y), -1)
    classes = list(model.classes_) if several else [model.classes_]
    labels, probabilities = [], []
    for j, names in enumerate(classes):
        chosen = ctx.b("gather", ctx.constant(np.ascontiguousarray(codes[:, j]), "training_labels"), indices, axis=0)
        votes = ctx.b("one_hot", chosen, depth=len(names), dtype="f64")
        if weights is not None:
            votes = ctx.b("mul", votes, ctx.b("reshape", weights, shape=(BATCH, weights.type.shape[1], 1)))
        counts = ctx.b("sum", votes, axes=(1,))
        labels.append(ctx.first_of_largest(counts))
        probabilities.append(ctx.b("div", counts, ctx.b("sum", counts, axes=(1,), keepdims=True)))
    return Lowered(
        "classifier",
        {
            "predict": Output(tuple(labels), tuple(classes), stack=several),
            "predict_proba": Output(tuple(probabilities), as_list=several),
        },
    )


@converts(neighbors.KNeighborsRegressor)
def k_neighbors_regressor(ctx: Context, model: Any, columns: Columns) -> Lowered:
    indices, weights = nearest(ctx, model, columns)
    targets = np.asarray(model._y, np.float64)
    chosen = ctx.b("gather", ctx.constant(targets.reshape(len(targets), -1), "training_targets"), indices, axis=0)
    if weights is None:
        predicted = ctx.b("mean", chosen, axes=(1,))
    else:
        spread = ctx.b("reshape", weights, shape=(BATCH, weights.type.shape[1], 1))
        total = ctx.b("sum", weights, axes=(1,), keepdims=True)
        predicted = ctx.b("div", ctx.b("sum", ctx.b("mul", chosen, spread), axes=(1,)), total)
    return ctx.regressor(ctx.vector(predicted) if targets.ndim == 1 else predicted)


@converts(neighbors.NearestCentroid)
def nearest_centroid(ctx: Context, model: Any, columns: Columns) -> Lowered:
    x = ctx.matrix(columns)
    metric = "sqeuclidean" if model.metric == "euclidean" else model.metric
    if metric not in ("sqeuclidean", "manhattan"):
        ctx.refuse(f"metric={metric!r} is not supported", "use 'euclidean' or 'manhattan'")
    priors = np.asarray(model.class_prior_, np.float64)
    spread = np.where(model.within_class_std_dev_ != 0, model.within_class_std_dev_, 1.0)
    scaled = ctx.b("div", x, ctx.constant(spread, "spread"))
    centroids = np.asarray(model.centroids_, np.float64)
    distances = ctx.b("pairwise_distance", scaled, ctx.constant(centroids / spread, "scaled_centroids"), metric=metric)
    squared = distances if metric == "sqeuclidean" else ctx.b("mul", distances, distances)
    with np.errstate(divide="ignore"):  # a class may have no prior
        scores = ctx.b("sub", ctx.constant(2.0 * np.log(priors), "log_prior"), squared)
    if np.isclose(priors, 1 / len(priors)).all():  # the library then looks at distances that are not scaled
        plain = ctx.b("pairwise_distance", x, ctx.constant(centroids, "centroids"), metric=metric)
        labels = ctx.b("argmin", plain, axis=1)
    else:
        labels = ctx.first_of_largest(scores)
    if metric == "manhattan":
        return ctx.classifier(model.classes_, labels)
    two = len(model.classes_) == 2
    decision = ctx.b("sub", ctx.column(scores, 1), ctx.column(scores, 0)) if two else scores
    log_proba = ctx.b("sub", scores, ctx.b("logsumexp", scores, axes=(1,), keepdims=True))
    return ctx.classifier(model.classes_, labels, proba=ctx.b("exp", log_proba), decision=decision, log_proba=log_proba)
