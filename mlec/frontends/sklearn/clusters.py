"""Clusters with centres."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn import cluster

from mlec.frontends.sklearn.columns import Columns
from mlec.frontends.sklearn.context import Context, Lowered, Output
from mlec.frontends.sklearn.linear import dense
from mlec.frontends.sklearn.registry import converts


@converts(cluster.KMeans, cluster.MiniBatchKMeans)
def k_means(ctx: Context, model: Any, columns: Columns) -> Lowered:
    x = ctx.matrix(columns)
    centres = dense(model.cluster_centers_)
    squared = ctx.b("pairwise_distance", x, ctx.constant(centres, "centres"), metric="sqeuclidean")
    # As the library, labels follow |c|^2 - 2 x.c: a row far from all centres still is nearer to one of them, where its
    # squared distances round to one number.
    scores = ctx.affine(x, np.ascontiguousarray(-2.0 * centres.T), np.square(centres).sum(axis=1))
    return Lowered(
        "clusterer",
        {
            "predict": Output((ctx.b("argmin", scores, axis=1),), dtype="int32"),
            "transform": Output((ctx.b("sqrt", squared),)),
        },
    )


@converts(cluster.MeanShift)
def mean_shift(ctx: Context, model: Any, columns: Columns) -> Lowered:
    centres = ctx.constant(dense(model.cluster_centers_), "centres")
    squared = ctx.b("pairwise_distance", ctx.matrix(columns), centres, metric="sqeuclidean")
    return Lowered("clusterer", {"predict": Output((ctx.b("argmin", squared, axis=1),))})
