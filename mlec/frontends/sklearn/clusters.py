"""Clusters with centres."""

from __future__ import annotations

from typing import Any

from sklearn import cluster

from mlec.frontends.sklearn.columns import Columns
from mlec.frontends.sklearn.context import Context, Lowered, Output
from mlec.frontends.sklearn.linear import dense
from mlec.frontends.sklearn.registry import converts


@converts(cluster.KMeans, cluster.MiniBatchKMeans)
def k_means(ctx: Context, model: Any, columns: Columns) -> Lowered:
    x = ctx.matrix(columns)
    centres = ctx.constant(dense(model.cluster_centers_), "centres")
    squared = ctx.b("pairwise_distance", x, centres, metric="sqeuclidean")
    return Lowered(
        "clusterer",
        {
            "predict": Output((ctx.b("argmin", squared, axis=1),), dtype="int32"),
            "transform": Output((ctx.b("sqrt", squared),)),
        },
    )


@converts(cluster.MeanShift)
def mean_shift(ctx: Context, model: Any, columns: Columns) -> Lowered:
    centres = ctx.constant(dense(model.cluster_centers_), "centres")
    squared = ctx.b("pairwise_distance", ctx.matrix(columns), centres, metric="sqeuclidean")
    return Lowered("clusterer", {"predict": Output((ctx.b("argmin", squared, axis=1),))})
