"""Quadratic forms around means: discriminant analysis with a covariance for each class, mixtures of Gaussians, ellipses of inliers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from sklearn import covariance, discriminant_analysis, mixture

from mlec.frontends.sklearn.columns import Columns
from mlec.frontends.sklearn.context import Array, Context, Lowered, Output
from mlec.frontends.sklearn.linear import outlier_detector
from mlec.frontends.sklearn.registry import converts
from mlec.ir import Value


def squared_lengths(ctx: Context, x: Value, means: Array, factors: Iterable[Array]) -> Value:
    """``|(x - mean) @ factor|**2`` for each mean and its factor, (n, means); a factor of one axis scales the features."""
    lengths = []
    for mean, factor in zip(means, factors, strict=True):
        centred = ctx.b("sub", x, ctx.constant(mean, "mean"))
        scaled = ctx.b("mul" if factor.ndim == 1 else "matmul", centred, ctx.constant(factor, "factor"))
        lengths.append(ctx.b("sum", ctx.b("mul", scaled, scaled), axes=(1,)))
    return ctx.as_columns(*lengths)


@converts(discriminant_analysis.QuadraticDiscriminantAnalysis)
def quadratic_discriminant(ctx: Context, model: Any, columns: Columns) -> Lowered:
    factors = [
        rotation * scaling ** (-0.5) for rotation, scaling in zip(model.rotations_, model.scalings_, strict=True)
    ]
    squared = squared_lengths(ctx, ctx.matrix(columns), np.asarray(model.means_), factors)
    with np.errstate(divide="ignore"):  # a class may have no prior
        spreads = np.array([np.sum(np.log(scaling)) for scaling in model.scalings_])
        priors = ctx.constant(np.log(model.priors_), "log_prior")
    scores = ctx.b("add", ctx.b("mul", ctx.b("add", squared, ctx.constant(spreads, "spread")), -0.5), priors)
    decision = ctx.b("sub", ctx.column(scores, 1), ctx.column(scores, 0)) if len(factors) == 2 else scores
    log_proba = ctx.b("sub", scores, ctx.b("logsumexp", scores, axes=(1,), keepdims=True))
    labels = ctx.first_of_largest(scores)
    return ctx.classifier(model.classes_, labels, proba=ctx.b("exp", log_proba), decision=decision, log_proba=log_proba)


@converts(mixture.GaussianMixture, mixture.BayesianGaussianMixture)
def gaussian_mixture(ctx: Context, model: Any, columns: Columns) -> Lowered:
    means, precisions = np.asarray(model.means_, np.float64), np.asarray(model.precisions_cholesky_, np.float64)
    if model.covariance_type == "tied":
        factors = [precisions] * len(means)
    elif model.covariance_type == "spherical":
        factors = [np.full(means.shape[1], precision) for precision in precisions]
    else:
        factors = list(precisions)
    # What the library gives at each mean itself is all that does not depend on x.
    heights = np.diagonal(model._estimate_weighted_log_prob(means))
    squared = squared_lengths(ctx, ctx.matrix(columns), means, factors)
    joint = ctx.b("add", ctx.b("mul", squared, -0.5), ctx.constant(heights, "height"))
    likelihood = ctx.b("logsumexp", joint, axes=(1,), keepdims=True)
    return Lowered(
        "clusterer",
        {
            "predict": Output((ctx.b("argmax", joint, axis=1),)),
            "predict_proba": Output((ctx.b("exp", ctx.b("sub", joint, likelihood)),)),
            "score_samples": Output((ctx.vector(likelihood),)),
        },
    )


@converts(covariance.EllipticEnvelope)
def elliptic_envelope(ctx: Context, model: Any, columns: Columns) -> Lowered:
    centred = ctx.b("sub", ctx.matrix(columns), ctx.constant(model.location_, "location"))
    stretched = ctx.b("matmul", centred, ctx.constant(model.get_precision(), "precision"))
    samples = ctx.b("neg", ctx.b("sum", ctx.b("mul", stretched, centred), axes=(1,)))
    decision = ctx.b("sub", samples, float(model.offset_))
    return outlier_detector(ctx, decision, ctx.b("ge", decision, 0.0), samples)
