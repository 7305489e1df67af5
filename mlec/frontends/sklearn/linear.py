"""Linear models: regressors, classifiers with a linear decision function, and discriminant analysis."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn import discriminant_analysis, linear_model, svm

from mlec.frontends.sklearn.columns import Columns
from mlec.frontends.sklearn.context import WITHHELD, Array, Context, Lowered, Output
from mlec.frontends.sklearn.registry import convert, converts
from mlec.ir import Value


def dense(array: Any) -> Array:
    """Coefficients as a dense float64 array (``sparsify()`` makes them sparse)."""
    return np.asarray(array.toarray() if hasattr(array, "toarray") else array, np.float64)


def linear_scores(ctx: Context, x: Value, coef: Any, intercept: Any) -> Value:
    """``x @ coef.T + intercept``: (n,) for one row of coefficients, else (n, rows)."""
    weights = dense(coef)
    scores = ctx.affine(x, np.ascontiguousarray(np.atleast_2d(weights).T), np.ravel(intercept))
    return ctx.vector(scores) if np.atleast_2d(weights).shape[0] == 1 else scores


@converts(
    linear_model.ARDRegression, linear_model.BayesianRidge, linear_model.ElasticNet, linear_model.ElasticNetCV,
    linear_model.HuberRegressor, linear_model.Lars, linear_model.LarsCV, linear_model.Lasso, linear_model.LassoCV,
    linear_model.LassoLars, linear_model.LassoLarsCV, linear_model.LassoLarsIC, linear_model.LinearRegression,
    linear_model.MultiTaskElasticNet, linear_model.MultiTaskElasticNetCV, linear_model.MultiTaskLasso,
    linear_model.MultiTaskLassoCV, linear_model.OrthogonalMatchingPursuit, linear_model.OrthogonalMatchingPursuitCV,
    linear_model.PassiveAggressiveRegressor, linear_model.QuantileRegressor, linear_model.Ridge, linear_model.RidgeCV,
    linear_model.SGDRegressor, linear_model.TheilSenRegressor, svm.LinearSVR,
)  # fmt: skip
def linear_regressor(ctx: Context, model: Any, columns: Columns) -> Lowered:
    coef = dense(model.coef_)
    scores = ctx.affine(ctx.matrix(columns), np.ascontiguousarray(np.atleast_2d(coef).T), np.ravel(model.intercept_))
    # A model fitted on a target of shape (n, 1) keeps a row of coefficients, and answers in that shape.
    return ctx.regressor(ctx.vector(scores) if coef.ndim == 1 else scores)


@converts(linear_model.RANSACRegressor)
def ransac(ctx: Context, model: Any, columns: Columns) -> Lowered:
    return convert(ctx, model.estimator_, columns, "estimator")


@converts(linear_model.PoissonRegressor, linear_model.GammaRegressor, linear_model.TweedieRegressor)
def generalised_linear(ctx: Context, model: Any, columns: Columns) -> Lowered:
    scores = linear_scores(ctx, ctx.matrix(columns), model.coef_, model.intercept_)
    return ctx.regressor(inverse_link(ctx, model._base_loss.link, scores))


def inverse_link(ctx: Context, link: Any, scores: Value) -> Value:
    """The mean that a raw score stands for."""
    name = type(link).__name__
    if name == "IdentityLink":
        return scores
    if name == "LogLink":
        return ctx.b("exp", scores)
    if name in ("LogitLink", "HalfLogitLink"):
        return ctx.b("sigmoid", ctx.b("mul", scores, 2.0) if name == "HalfLogitLink" else scores)
    ctx.refuse(f"the link function {name} is not supported")


def decide(ctx: Context, scores: Value) -> Value:
    """Class positions of linear scores: the sign, or the largest."""
    return ctx.positive(scores) if scores.type.rank == 1 else ctx.first_of_largest(scores)


@converts(
    linear_model.PassiveAggressiveClassifier, linear_model.Perceptron, linear_model.RidgeClassifier,
    linear_model.RidgeClassifierCV, svm.LinearSVC,
)  # fmt: skip
def linear_classifier(ctx: Context, model: Any, columns: Columns) -> Lowered:
    scores = linear_scores(ctx, ctx.matrix(columns), model.coef_, model.intercept_)
    binarizer = getattr(model, "_label_binarizer", None)
    if binarizer is not None and binarizer.y_type_.startswith("multilabel"):
        return multilabel(ctx, ctx.positive(scores), {"decision_function": Output((scores,))})
    return ctx.classifier(model.classes_, decide(ctx, scores), decision=scores)


def multilabel(ctx: Context, labels: Value, methods: dict[str, Output]) -> Lowered:
    """A classifier that answers with a matrix of 0 and 1."""
    return Lowered("classifier", {"predict": Output((labels,)), **methods})


@converts(linear_model.LogisticRegression, linear_model.LogisticRegressionCV)
def logistic_regression(ctx: Context, model: Any, columns: Columns) -> Lowered:
    scores = linear_scores(ctx, ctx.matrix(columns), model.coef_, model.intercept_)
    if scores.type.rank == 1:
        proba = ctx.two_columns(ctx.b("sigmoid", scores))
    else:  # scikit-learn up to 1.7 still fitted one-versus-rest
        rest = getattr(model, "multi_class", None) == "ovr" or model.solver == "liblinear"
        proba = normalised(ctx, ctx.b("sigmoid", scores)) if rest else ctx.b("softmax", scores, axis=1)
    return ctx.classifier(model.classes_, decide(ctx, scores), proba=proba, decision=scores)


def normalised(ctx: Context, scores: Value) -> Value:
    """Rows divided by their sum; a row of zeros becomes uniform."""
    classes = scores.type.shape[1]
    assert isinstance(classes, int)
    total = ctx.b("sum", scores, axes=(1,), keepdims=True)
    empty = ctx.b("eq", total, 0.0)
    one = ctx.constant(1.0)
    return ctx.b("div", ctx.b("where", empty, one, scores), ctx.b("where", empty, ctx.constant(float(classes)), total))


@converts(linear_model.SGDClassifier)
def sgd_classifier(ctx: Context, model: Any, columns: Columns) -> Lowered:
    scores = linear_scores(ctx, ctx.matrix(columns), model.coef_, model.intercept_)
    binary = scores.type.rank == 1
    proba = None
    if model.loss == "log_loss":
        second = ctx.b("sigmoid", scores)
        proba = ctx.two_columns(second) if binary else normalised(ctx, second)
    elif model.loss == "modified_huber":
        second = ctx.b("div", ctx.b("add", ctx.b("clip", scores, lo=-1.0, hi=1.0), 1.0), 2.0)
        proba = ctx.two_columns(second) if binary else normalised(ctx, second)
    return ctx.classifier(model.classes_, decide(ctx, scores), proba=proba, decision=scores)


@converts(linear_model.SGDOneClassSVM)
def sgd_one_class(ctx: Context, model: Any, columns: Columns) -> Lowered:
    samples = ctx.vector(ctx.affine(ctx.matrix(columns), dense(model.coef_).reshape(-1, 1), None))
    decision = ctx.b("sub", samples, float(np.ravel(model.offset_)[0]))
    return outlier_detector(ctx, decision, ctx.b("ge", decision, 0.0), samples, "int32")


def outlier_detector(ctx: Context, decision: Value, inlier: Value, samples: Value, dtype: str = "int64") -> Lowered:
    """The result of an outlier detector: 1 for inliers, -1 for outliers."""
    labels = ctx.b("where", inlier, ctx.constant(1), ctx.constant(-1))
    return Lowered(
        "outlier",
        {
            "predict": Output((labels,), dtype=None if dtype == "int64" else dtype),
            "decision_function": Output((decision,)),
            "score_samples": Output((samples,)),
        },
    )


@converts(discriminant_analysis.LinearDiscriminantAnalysis)
def linear_discriminant(ctx: Context, model: Any, columns: Columns) -> Lowered:
    x = ctx.matrix(columns)
    scores = linear_scores(ctx, x, model.coef_, model.intercept_)
    proba = ctx.two_columns(ctx.b("sigmoid", scores)) if scores.type.rank == 1 else ctx.b("softmax", scores, axis=1)
    # As the library: the logarithm of no probability at all is that of the smallest normal number. A model that was fitted on
    # float32 takes it, and its logarithm, in the precision of the table, which a compiled model does not know: no method then.
    log_proba = None
    if model.coef_.dtype == np.float64:
        smallest = ctx.constant(np.finfo(np.float64).smallest_normal)
        log_proba = ctx.b("log", ctx.b("where", ctx.b("eq", proba, 0.0), smallest, proba))
    lowered = ctx.classifier(model.classes_, decide(ctx, scores), proba=proba, decision=scores, log_proba=log_proba)
    if log_proba is None:
        lowered = Lowered("classifier", {**lowered.methods, "predict_log_proba": WITHHELD})
    if model.solver == "lsqr":
        return lowered
    centred = ctx.b("sub", x, ctx.constant(model.xbar_, "mean")) if model.solver == "svd" else x
    projected = ctx.affine(centred, np.ascontiguousarray(model.scalings_[:, : model._max_components]), None)
    return Lowered("classifier", {**lowered.methods, "transform": Output((projected,))})
