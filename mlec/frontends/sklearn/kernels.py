"""Kernels between rows and training rows, as `sklearn.metrics.pairwise.pairwise_kernels` defines them."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn import decomposition, kernel_ridge
from sklearn.preprocessing import normalize

from mlec.frontends.sklearn.columns import Columns
from mlec.frontends.sklearn.context import Array, Context, Lowered
from mlec.frontends.sklearn.linear import dense
from mlec.frontends.sklearn.preprocessing import unit_rows
from mlec.frontends.sklearn.registry import converts
from mlec.ir import Value

KERNELS = ("cosine", "laplacian", "linear", "poly", "polynomial", "rbf", "sigmoid")


def pairwise_kernel(ctx: Context, model: Any, x: Value, rows: Array) -> Value:
    """The kernel that ``model.kernel``, ``gamma``, ``degree`` and ``coef0`` name, between each row of x and each of ``rows``.

    Args:
        x: (n, features).
        rows: (k, features).

    Returns:
        (n, k).
    """
    kernel = model.kernel
    if callable(kernel) or kernel not in KERNELS:
        ctx.refuse(f"kernel={kernel!r} is not supported", f"supported: {', '.join(KERNELS)}")
    gamma = getattr(model, "gamma_", model.gamma)  # what fitting made of None
    gamma = 1.0 / rows.shape[1] if gamma is None else float(gamma)
    if kernel in ("rbf", "laplacian"):
        metric = "sqeuclidean" if kernel == "rbf" else "manhattan"
        distance = ctx.b("pairwise_distance", x, ctx.constant(rows, "training_rows"), metric=metric)
        return ctx.b("exp", ctx.b("mul", distance, -gamma))
    if kernel == "cosine":
        x, rows = unit_rows(ctx, x), normalize(rows)
    product = ctx.b("matmul", x, ctx.constant(np.ascontiguousarray(rows.T), "training_rows"))
    if kernel in ("linear", "cosine"):
        return product
    shifted = ctx.b("add", ctx.b("mul", product, gamma), float(model.coef0))
    return ctx.b("tanh", shifted) if kernel == "sigmoid" else ctx.b("pow", shifted, ctx.constant(float(model.degree)))


@converts(kernel_ridge.KernelRidge)
def kernel_ridge_regression(ctx: Context, model: Any, columns: Columns) -> Lowered:
    x, weights = ctx.matrix(columns), dense(model.dual_coef_)
    values = x if model.kernel == "precomputed" else pairwise_kernel(ctx, model, x, dense(model.X_fit_))
    predicted = ctx.affine(values, weights.reshape(len(weights), -1), None)
    return ctx.regressor(ctx.vector(predicted) if weights.ndim == 1 else predicted)


@converts(decomposition.KernelPCA)
def kernel_pca(ctx: Context, model: Any, columns: Columns) -> Lowered:
    """Projections of kernels whose rows and columns are centred, as those of the training rows were, by the training rows' means."""
    x, centring = ctx.matrix(columns), model._centerer
    values = x if model.kernel == "precomputed" else pairwise_kernel(ctx, model, x, dense(model.X_fit_))
    means = ctx.b("mean", values, axes=(1,), keepdims=True)
    centred = ctx.b("sub", ctx.b("sub", values, ctx.constant(centring.K_fit_rows_, "means")), means)
    centred = ctx.b("add", centred, float(centring.K_fit_all_))
    kept = np.flatnonzero(model.eigenvalues_)
    axes = np.zeros_like(model.eigenvectors_)  # an eigenvalue of 0 gives a column of zeros
    axes[:, kept] = model.eigenvectors_[:, kept] / np.sqrt(model.eigenvalues_[kept])
    return ctx.transformed(ctx.affine(centred, axes, None))
