"""Transformers that bring each feature to a given distribution: powers and quantiles."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.polynomial import chebyshev
from scipy import special
from sklearn import preprocessing
from sklearn.preprocessing._data import BOUNDS_THRESHOLD

from mlec.frontends.sklearn.columns import Columns
from mlec.frontends.sklearn.context import Array, Context, Lowered
from mlec.frontends.sklearn.registry import converts
from mlec.frontends.trees import Ensemble
from mlec.ir import Value

LEAST = float(BOUNDS_THRESHOLD - np.spacing(1))
"""scikit-learn keeps the quantiles that it brings to a normal distribution this far from 0 and 1."""

NORMAL_DEGREE = 32
"""Of the polynomial for the normal quantile, which then is right to some 1e-13."""


@converts(preprocessing.PowerTransformer)
def power_transformer(ctx: Context, model: Any, columns: Columns) -> Lowered:
    x = ctx.matrix(columns)
    exponents = np.asarray(model.lambdas_, np.float64)
    if model.method == "box-cox":
        powered = _box_cox(ctx, ctx.b("log", x), ctx.constant(exponents, "lambda"))
    else:  # Yeo-Johnson: Box-Cox of 1 + |x|, by one exponent for x >= 0 and by another for the rest, mirrored
        positive = ctx.b("ge", x, 0.0)
        exponent = ctx.b("where", positive, ctx.constant(exponents, "lambda"), ctx.constant(2.0 - exponents, "lambda"))
        magnitude = _box_cox(ctx, ctx.b("log1p", ctx.b("abs", x)), exponent)
        powered = ctx.b("where", positive, magnitude, ctx.b("neg", magnitude))
    if model.standardize:
        powered = ctx.b("sub", powered, ctx.constant(model._scaler.mean_, "mean"))
        powered = ctx.b("div", powered, ctx.constant(model._scaler.scale_, "scale"))
    return ctx.transformed(powered, like=columns)


def _box_cox(ctx: Context, logs: Value, exponent: Value) -> Value:
    """``(exp(exponent * logs) - 1) / exponent``, which for an exponent of 0 is ``logs``."""
    zero = ctx.b("lt", ctx.b("abs", exponent), float(np.finfo(np.float64).eps))
    divisor = ctx.b("where", zero, ctx.constant(1.0), exponent)
    return ctx.b("where", zero, logs, ctx.b("div", ctx.b("expm1", ctx.b("mul", exponent, logs)), divisor))


@converts(preprocessing.QuantileTransformer)
def quantile_transformer(ctx: Context, model: Any, columns: Columns) -> Lowered:
    x = ctx.matrix(columns)
    quantiles, references = np.asarray(model.quantiles_, np.float64), np.asarray(model.references_, np.float64)
    # Where quantiles repeat, the mean of the first and the last place among them.
    forward = interpolate(ctx, x, quantiles, references)
    backward = interpolate(ctx, ctx.b("neg", x), -quantiles[::-1], -references[::-1])
    y = ctx.b("mul", ctx.b("sub", forward, backward), 0.5)
    lowest, highest = ctx.constant(quantiles[0], "lowest"), ctx.constant(quantiles[-1], "highest")
    if model.output_distribution == "uniform":
        at_top, at_bottom = ctx.b("eq", x, highest), ctx.b("eq", x, lowest)
    else:
        at_top = ctx.b("gt", ctx.b("add", x, BOUNDS_THRESHOLD), highest)
        at_bottom = ctx.b("lt", ctx.b("sub", x, BOUNDS_THRESHOLD), lowest)
    y = ctx.b("where", at_bottom, ctx.constant(0.0), ctx.b("where", at_top, ctx.constant(1.0), y))
    return ctx.transformed(y if model.output_distribution == "uniform" else _normal_quantile(ctx, y), like=columns)


def interpolate(ctx: Context, x: Value, points: Array, heights: Array) -> Value:
    """Linear interpolation of each column of x, as `numpy.interp` computes it.

    Args:
        x: (n, columns), without infinities.
        points: (k, columns), in ascending order.
        heights: (k,) at the points; the first and the last hold beyond them.
    """
    count, width = points.shape
    trees = Ensemble(width, width, threshold_dtype="f64", value_dtype="f64")
    left, right, point, passed = _search_tree(count)
    for i in range(width):
        trees.add_tree(left, right, np.full(len(left), i), points[point, i], passed, output=i)
    reached = ctx.cast(trees.emit(ctx.b, x, compare="lt", base=0.0, hint="place"), "i64")
    place = ctx.b("add", reached, ctx.constant(np.arange(width) * (count + 1), "offset"))
    with np.errstate(divide="ignore", invalid="ignore"):  # between equal points lies nothing
        slopes = np.diff(heights)[:, None] / np.diff(points, axis=0)
    flat = np.zeros((1, width))
    starts = np.broadcast_to(heights[:, None], points.shape)
    slope, x0, y0 = (
        ctx.b("gather", ctx.constant(np.ravel(table, order="F"), hint), place, axis=0)
        for table, hint in (
            (np.concatenate([flat, slopes, flat]), "slope"),
            (np.concatenate([points[:1], points]), "point"),
            (np.concatenate([starts[:1], starts]), "height"),
        )
    )
    return ctx.b("add", ctx.b("mul", slope, ctx.b("sub", x, x0)), y0)


@lru_cache
def _search_tree(count: int) -> tuple[Array, Array, Array, Array]:
    """A balanced tree that finds how many of ``count`` ascending points are at most x: for each node its left child (x below the
    point; -1 at leaves), its right child, the index of its point, and at leaves the number.
    """
    nodes: list[tuple[int, int, int, int]] = []
    waiting = [(0, count)]  # what the subtree of each node, in order, has to tell apart: the numbers from least to most
    for least, most in waiting:
        if least == most:
            nodes.append((-1, -1, 0, least))
        else:
            middle = (least + most) // 2
            nodes.append((len(waiting), len(waiting) + 1, middle, 0))
            waiting += [(least, middle), (middle + 1, most)]
    left, right, point, passed = np.array(nodes).T
    return left, right, point, passed.astype(np.float64)


def _normal_quantile(ctx: Context, y: Value) -> Value:
    """The quantile function of the normal distribution, of y no nearer than `LEAST` to 0 and 1.

    It is a smooth function of ``sqrt(-2 log(min(y, 1 - y)))``, which a Chebyshev series stands for (by Clenshaw's recurrence).
    """
    y = ctx.b("clip", y, lo=LEAST, hi=1 - LEAST)
    tail = ctx.b("minimum", y, ctx.b("sub", ctx.constant(1.0), y))
    root = ctx.b("sqrt", ctx.b("mul", ctx.b("log", tail), -2.0))
    low, high = np.sqrt(-2 * np.log([0.5, LEAST]))
    u = ctx.b("div", ctx.b("sub", root, float((high + low) / 2)), float((high - low) / 2))
    first, *rest = _normal_series()
    twice = ctx.b("mul", u, 2.0)
    now, before = ctx.b("mul", u, 0.0), ctx.constant(0.0)
    for coefficient in reversed(rest):
        now, before = ctx.b("add", ctx.b("sub", ctx.b("mul", twice, now), before), float(coefficient)), now
    quantile = ctx.b("add", ctx.b("sub", ctx.b("mul", u, now), before), float(first))
    return ctx.b("where", ctx.b("lt", y, 0.5), quantile, ctx.b("neg", quantile))


@lru_cache
def _normal_series() -> Array:
    """Chebyshev coefficients of the quantile of a tail, over its square root of -2 log brought to [-1, 1]."""
    low, high = np.sqrt(-2 * np.log([0.5, LEAST]))

    nodes = chebyshev.chebpts1(NORMAL_DEGREE + 1)
    roots = nodes * (high - low) / 2 + (high + low) / 2
    return np.asarray(chebyshev.chebfit(nodes, special.ndtri_exp(-(roots**2) / 2), NORMAL_DEGREE))
