"""Naive Bayes classifiers."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn import naive_bayes

from mlec.frontends.sklearn.columns import Columns, TableColumn
from mlec.frontends.sklearn.context import BATCH, Context, Lowered, Output
from mlec.frontends.sklearn.encoders import Feature, encode
from mlec.frontends.sklearn.registry import converts
from mlec.ir import Value


def from_joint(ctx: Context, model: Any, joint: Value) -> Lowered:
    """The classifier of joint log likelihoods (n, classes)."""
    log_proba = ctx.b("sub", joint, ctx.b("logsumexp", joint, axes=(1,), keepdims=True))
    proba = ctx.b("exp", log_proba)
    lowered = ctx.classifier(model.classes_, ctx.first_of_largest(joint), proba=proba, log_proba=log_proba)
    return Lowered("classifier", {**lowered.methods, "predict_joint_log_proba": Output((joint,))})


@converts(naive_bayes.GaussianNB)
def gaussian(ctx: Context, model: Any, columns: Columns) -> Lowered:
    classes, features = model.theta_.shape
    constant = np.log(model.class_prior_) - 0.5 * np.sum(np.log(2.0 * np.pi * model.var_), axis=1)
    rows = ctx.b("reshape", ctx.matrix(columns), shape=(BATCH, 1, features))
    difference = ctx.b("sub", rows, ctx.constant(model.theta_.reshape(1, classes, features), "means"))
    scaled = ctx.b(
        "div", ctx.b("mul", difference, difference), ctx.constant(model.var_.reshape(1, classes, features), "variances")
    )
    exponent = ctx.b("mul", ctx.b("sum", scaled, axes=(2,)), 0.5)
    return from_joint(ctx, model, ctx.b("sub", ctx.constant(constant, "log_prior"), exponent))


@converts(naive_bayes.MultinomialNB)
def multinomial(ctx: Context, model: Any, columns: Columns) -> Lowered:
    weights = np.ascontiguousarray(model.feature_log_prob_.T)
    return from_joint(ctx, model, ctx.affine(ctx.matrix(columns), weights, model.class_log_prior_))


@converts(naive_bayes.ComplementNB)
def complement(ctx: Context, model: Any, columns: Columns) -> Lowered:
    prior = model.class_log_prior_ if len(model.classes_) == 1 else None
    return from_joint(
        ctx, model, ctx.affine(ctx.matrix(columns), np.ascontiguousarray(model.feature_log_prob_.T), prior)
    )


@converts(naive_bayes.CategoricalNB)
def categorical(ctx: Context, model: Any, columns: Columns) -> Lowered:
    """Categories are whole numbers from 0. Others are an error, as in the source, but NaN where another step computes them. The source
    cuts fractions off; here they are an error, too.
    """
    features, tables = [], []
    for column, terms in zip(columns, model.feature_log_prob_, strict=True):
        count = terms.shape[1]
        unknown = None if isinstance(column, TableColumn) else count
        features.append(Feature(np.arange(count), tuple(range(count)), unknown))
        tables.append(np.append(terms.T, np.full((1, len(terms)), np.nan), axis=0))
    starts = np.cumsum([0, *map(len, tables[:-1])])
    places = ctx.b("add", encode(ctx, columns, features), ctx.constant(starts, "start"))
    terms = ctx.b("gather", ctx.constant(np.concatenate(tables), "log_prob"), places, axis=0)
    joint = ctx.b("add", ctx.b("sum", terms, axes=(1,)), ctx.constant(model.class_log_prior_, "log_prior"))
    return from_joint(ctx, model, joint)


@converts(naive_bayes.BernoulliNB)
def bernoulli(ctx: Context, model: Any, columns: Columns) -> Lowered:
    x = ctx.matrix(columns)
    if model.binarize is not None:
        x = ctx.cast(ctx.b("gt", x, float(model.binarize)), "f64")
    absent = np.log(1 - np.exp(model.feature_log_prob_))
    weights = np.ascontiguousarray((model.feature_log_prob_ - absent).T)
    return from_joint(ctx, model, ctx.affine(x, weights, model.class_log_prior_ + absent.sum(axis=1)))
