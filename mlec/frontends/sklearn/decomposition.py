"""Projections onto learned components."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn import cross_decomposition, decomposition, random_projection

from mlec.frontends.sklearn.columns import Columns
from mlec.frontends.sklearn.context import Context, Lowered, Output
from mlec.frontends.sklearn.linear import dense
from mlec.frontends.sklearn.registry import converts


@converts(decomposition.PCA, decomposition.IncrementalPCA)
def pca(ctx: Context, model: Any, columns: Columns) -> Lowered:
    x = ctx.matrix(columns)
    components = np.ascontiguousarray(dense(model.components_).T)
    projected = ctx.b("matmul", x, ctx.constant(components, "components"))
    projected = ctx.b("sub", projected, ctx.constant(np.reshape(model.mean_, (1, -1)) @ components, "mean"))
    if model.whiten:
        scale = np.sqrt(model.explained_variance_)
        projected = ctx.b("div", projected, ctx.constant(np.maximum(scale, np.finfo(scale.dtype).eps), "scale"))
    transformed = ctx.transformed(projected)
    if not hasattr(model, "score_samples"):
        return transformed
    precision = model.get_precision()
    centred = ctx.b("sub", x, ctx.constant(model.mean_, "mean"))
    distance = ctx.b(
        "sum", ctx.b("mul", centred, ctx.b("matmul", centred, ctx.constant(precision, "precision"))), axes=(1,)
    )
    constant = 0.5 * (len(columns) * np.log(2.0 * np.pi) - np.linalg.slogdet(precision)[1])
    likelihood = ctx.b("sub", ctx.b("mul", distance, -0.5), float(constant))
    return Lowered("transformer", {"score_samples": Output((likelihood,))}, columns=transformed.columns)


@converts(
    decomposition.TruncatedSVD, random_projection.GaussianRandomProjection, random_projection.SparseRandomProjection
)
def projection(ctx: Context, model: Any, columns: Columns) -> Lowered:
    return ctx.transformed(ctx.affine(ctx.matrix(columns), np.ascontiguousarray(dense(model.components_).T), None))


@converts(decomposition.FastICA)
def fast_ica(ctx: Context, model: Any, columns: Columns) -> Lowered:
    x = ctx.matrix(columns)
    if model.whiten:
        x = ctx.b("sub", x, ctx.constant(model.mean_, "mean"))
    return ctx.transformed(ctx.affine(x, np.ascontiguousarray(dense(model.components_).T), None))


@converts(cross_decomposition.PLSRegression, cross_decomposition.PLSCanonical, cross_decomposition.CCA)
def partial_least_squares(ctx: Context, model: Any, columns: Columns) -> Lowered:
    x = ctx.b("sub", ctx.matrix(columns), ctx.constant(model._x_mean, "mean"))
    predicted = ctx.affine(x, np.ascontiguousarray(dense(model.coef_).T), model.intercept_)
    predicted = ctx.vector(predicted) if model._predict_1d else predicted
    scores = ctx.affine(ctx.b("div", x, ctx.constant(model._x_std, "scale")), dense(model.x_rotations_), None)
    return Lowered("regressor", {"predict": Output((predicted,)), "transform": Output((scores,))})
