"""Support vector machines with kernels.

libsvm's raw decision value of classes (i, j) is positive for i. scikit-learn keeps those values' coefficients in the private
attributes; the public ones have their sign flipped for two classes.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
from sklearn import svm

from mlec.frontends.sklearn.columns import Columns
from mlec.frontends.sklearn.context import BATCH, Array, Context, Lowered
from mlec.frontends.sklearn.linear import dense, outlier_detector
from mlec.frontends.sklearn.registry import converts
from mlec.ir import Value

LEAST_PROBABILITY = 1e-7
"""libsvm keeps the probabilities of a pair of classes this far from 0 and 1."""

COUPLING_TOLERANCE = 0.005
COUPLING_SWEEPS = 6
"""libsvm allows 100 sweeps and needs at most 5 (over millions of random and extreme pairs, up to 10 classes)."""


def kernel_values(ctx: Context, model: Any, columns: Columns) -> Value:
    """The kernel between each row and each support vector, (n, vectors)."""
    x = ctx.matrix(columns)
    if callable(model.kernel):
        ctx.refuse(
            "a kernel given as a Python function is not supported", "use a named kernel, or kernel='precomputed'"
        )
    if model.kernel == "precomputed":
        return ctx.b("gather", x, ctx.constant(model.support_, "support"), axis=1)
    vectors = dense(model.support_vectors_)
    if model.kernel == "rbf":
        squared = ctx.b("pairwise_distance", x, ctx.constant(vectors, "support_vectors"), metric="sqeuclidean")
        return ctx.b("exp", ctx.b("mul", squared, -float(model._gamma)))
    product = ctx.b("matmul", x, ctx.constant(np.ascontiguousarray(vectors.T), "support_vectors"))
    if model.kernel == "linear":
        return product
    shifted = ctx.b("add", ctx.b("mul", product, float(model._gamma)), float(model.coef0))
    return ctx.b("tanh", shifted) if model.kernel == "sigmoid" else integer_power(ctx, shifted, int(model.degree))


def integer_power(ctx: Context, base: Value, exponent: int) -> Value:
    """By repeated squaring, as libsvm does."""
    result: Value | None = None
    while exponent:
        if exponent & 1:
            result = base if result is None else ctx.b("mul", result, base)
        exponent >>= 1
        if exponent:
            base = ctx.b("mul", base, base)
    return result if result is not None else ctx.b("where", ctx.b("eq", base, base), ctx.constant(1.0), base)


def pair_weights(dual_coef: Array, n_support: Array) -> Array:
    """Coefficients of every support vector in every pair of classes, (vectors, pairs)."""
    classes = len(n_support)
    starts = np.concatenate([[0], np.cumsum(n_support)])
    pairs = list(combinations(range(classes), 2))
    weights = np.zeros((starts[-1], len(pairs)))
    for p, (i, j) in enumerate(pairs):
        of_i, of_j = slice(starts[i], starts[i + 1]), slice(starts[j], starts[j + 1])
        weights[of_i, p], weights[of_j, p] = dual_coef[j - 1, of_i], dual_coef[i, of_j]
    return weights


@converts(svm.SVC, svm.NuSVC)
def svc(ctx: Context, model: Any, columns: Columns) -> Lowered:
    classes = len(model.classes_)
    if model.break_ties and model.decision_function_shape == "ovo":
        ctx.refuse("break_ties=True with decision_function_shape='ovo': the source cannot predict so", "use 'ovr'")
    weights = pair_weights(dense(model._dual_coef_), np.asarray(model._n_support))
    raw = ctx.affine(kernel_values(ctx, model, columns), weights, model._intercept_)
    if classes == 2:
        decision = ctx.b("neg", ctx.vector(raw))
        labels = ctx.positive(decision, or_zero=True)
    else:
        votes, one_for_each = count_votes(ctx, raw, classes)
        decision = one_for_each if model.decision_function_shape == "ovr" else raw
        labels = ctx.first_of_largest(one_for_each if model.break_ties else votes)
    return ctx.classifier(model.classes_, labels, proba=_platt(ctx, model, raw), decision=decision)


def pair_members(classes: int) -> tuple[Array, Array]:
    """1.0 where a class is the first, and the second, of each pair of classes, (pairs, classes)."""
    pairs = np.array(list(combinations(range(classes), 2)))
    return np.eye(classes)[pairs[:, 0]], np.eye(classes)[pairs[:, 1]]


def count_votes(ctx: Context, raw: Value, classes: int) -> tuple[Value, Value]:
    """Votes of the pairs by libsvm's rule (a positive value is for the first), and scikit-learn's one-versus-rest scores.

    Both (n, classes) of f64.
    """
    first, second = pair_members(classes)

    def tally(wins: Value) -> Value:
        """``wins``: 1 where the first of a pair wins."""
        return ctx.b("add", ctx.b("matmul", wins, ctx.constant(first - second)), ctx.constant(second.sum(axis=0)))

    votes = tally(ctx.cast(ctx.b("gt", raw, 0.0), "f64"))
    # The scores count a value of exactly 0 for the first class, and are continuous: the summed values break ties.
    counted = tally(ctx.cast(ctx.b("ge", raw, 0.0), "f64"))
    confidence = ctx.b("matmul", raw, ctx.constant(first - second))
    bounded = ctx.b("div", confidence, ctx.b("mul", ctx.b("add", ctx.b("abs", confidence), 1.0), 3.0))
    return votes, ctx.b("add", counted, bounded)


def _platt(ctx: Context, model: Any, raw: Value) -> Value | None:
    """Platt's probabilities (n, classes), for an estimator that was fitted with them."""
    if not getattr(model, "probability", False) or model.probability == "deprecated" or len(model._probA) == 0:
        return None
    score = ctx.b(
        "add", ctx.b("mul", raw, ctx.constant(model._probA, "platt_a")), ctx.constant(model._probB, "platt_b")
    )
    first = ctx.b("clip", ctx.b("sigmoid", ctx.b("neg", score)), lo=LEAST_PROBABILITY, hi=1 - LEAST_PROBABILITY)
    return couple(ctx, first, len(model.classes_))


def couple(ctx: Context, first: Value, classes: int) -> Value:
    """One probability for each class from those of the pairs (for the first class of each), as libsvm couples them.

    libsvm minimises p'Qp over distributions p by sweeps of coordinate descent, and stops at a fixed tolerance; each row
    stops by itself here, too.
    """
    b = ctx.b
    pairs = list(combinations(range(classes), 2))
    of_first, of_second, of_both = (np.zeros((len(pairs), classes, classes)) for _ in range(3))
    for p, (i, j) in enumerate(pairs):
        of_first[p, j, j] = of_second[p, i, i] = 1.0
        of_both[p, i, j] = of_both[p, j, i] = -1.0
    second = b("sub", ctx.constant(1.0), first)
    terms = [
        b("matmul", b("mul", left, right), ctx.constant(placed.reshape(len(pairs), -1), "pair_terms"))
        for left, right, placed in ((first, first, of_first), (second, second, of_second), (first, second, of_both))
    ]
    q = b("reshape", b("add", b("add", terms[0], terms[1]), terms[2]), shape=(BATCH, classes, classes))
    rows = [b("reshape", b("slice", q, axis=1, start=t, stop=t + 1), shape=(BATCH, classes)) for t in range(classes)]
    diagonal = [b("slice", row, axis=1, start=t, stop=t + 1) for t, row in enumerate(rows)]
    one_hot = np.eye(classes)
    proba = b("broadcast_to", ctx.constant(np.full((1, classes), 1.0 / classes)), shape=(BATCH, classes))
    running: Value | None = None  # the rows that have not stopped
    for _ in range(COUPLING_SWEEPS):
        qp = b("sum", b("mul", q, b("reshape", proba, shape=(BATCH, 1, classes))), axes=(2,))
        pqp = b("sum", b("mul", proba, qp), axes=(1,), keepdims=True)
        error = b("max", b("abs", b("sub", qp, pqp)), axes=(1,), keepdims=True)
        going = b("ge", error, COUPLING_TOLERANCE / classes)
        running = going if running is None else b("logical_and", running, going)
        swept = proba
        for t in range(classes):
            qp_t = b("slice", qp, axis=1, start=t, stop=t + 1)
            step = b("div", b("sub", pqp, qp_t), diagonal[t])
            grown = b("add", step, 1.0)
            inner = b("add", b("mul", step, diagonal[t]), b("mul", qp_t, 2.0))
            pqp = b("div", b("div", b("add", pqp, b("mul", step, inner)), grown), grown)
            qp = b("div", b("add", qp, b("mul", step, rows[t])), grown)
            swept = b("div", b("add", swept, b("mul", step, ctx.constant(one_hot[t]))), grown)
        proba = b("where", running, swept, proba)
    return proba


@converts(svm.SVR, svm.NuSVR)
def svr(ctx: Context, model: Any, columns: Columns) -> Lowered:
    return ctx.regressor(_single(ctx, model, columns))


@converts(svm.OneClassSVM)
def one_class_svm(ctx: Context, model: Any, columns: Columns) -> Lowered:
    decision = _single(ctx, model, columns)
    samples = ctx.b("add", decision, float(np.ravel(model.offset_)[0]))
    return outlier_detector(ctx, decision, ctx.b("gt", decision, 0.0), samples)


def _single(ctx: Context, model: Any, columns: Columns) -> Value:
    """The decision value of a machine with one function, (n,)."""
    values = kernel_values(ctx, model, columns)
    return ctx.vector(ctx.affine(values, np.ascontiguousarray(dense(model._dual_coef_).T), model._intercept_))
