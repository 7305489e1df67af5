"""Multi-layer perceptrons.

They are computed in float64 throughout, as by the library. In float32 they would not hold the bound of 1e-5 on the very data they were
trained on where that is not scaled: large hidden values cancel in the next layer, whatever the precision of the first one. Measured, as
the error relative to the output's scale (hidden layers of 100, and of 64 and 64, all of it in float32 / all but the first layer):

    ReLU, housing data as it is (counts to 1e4)     3e-5 to 8e-5 / 3e-5 to 7e-5
    ReLU, years and numbers near 1e6 as they are    3e-3 to 2e-2 / 3e-3 to 1e-2
    ReLU, digits, or the same data scaled           7e-8 to 1e-6 / 7e-8 to 8e-7

A compiled model does not know which of these rows it will get.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn import neural_network

from mlec.frontends.sklearn.columns import Columns
from mlec.frontends.sklearn.context import Context, Lowered, Output
from mlec.frontends.sklearn.linear import multilabel
from mlec.frontends.sklearn.registry import converts
from mlec.ir import Value

ACTIVATIONS = {"tanh": "tanh", "logistic": "sigmoid", "relu": "relu", "exp": "exp"}


def forward(ctx: Context, model: Any, columns: Columns) -> Value:
    """The last layer's activation, (n, outputs)."""
    x = ctx.matrix(columns)
    layers = list(zip(model.coefs_, model.intercepts_, strict=True))
    for i, (weights, bias) in enumerate(layers):
        with ctx.inside(f"layer{i}", model):
            x = ctx.b("add", ctx.b("matmul", x, ctx.constant(weights, "weights")), ctx.constant(bias, "bias"))
            activation = model.out_activation_ if i == len(layers) - 1 else model.activation
            if activation == "softmax":
                x = ctx.b("softmax", x, axis=1)
            elif activation != "identity":
                x = ctx.b(ACTIVATIONS[activation], x)
    return x


@converts(neural_network.MLPClassifier)
def mlp_classifier(ctx: Context, model: Any, columns: Columns) -> Lowered:
    outputs = forward(ctx, model, columns)
    if model._label_binarizer.y_type_.startswith("multilabel"):
        return multilabel(ctx, ctx.positive(outputs, threshold=0.5), {"predict_proba": Output((outputs,))})
    if model.n_outputs_ == 1:
        second = ctx.vector(outputs)
        return ctx.classifier(model.classes_, ctx.positive(second, threshold=0.5), proba=ctx.two_columns(second))
    return ctx.classifier(model.classes_, ctx.first_of_largest(outputs), proba=outputs)


@converts(neural_network.MLPRegressor)
def mlp_regressor(ctx: Context, model: Any, columns: Columns) -> Lowered:
    outputs = forward(ctx, model, columns)
    return ctx.regressor(ctx.vector(outputs) if outputs.type.shape[1] == 1 else outputs)


@converts(neural_network.BernoulliRBM)
def bernoulli_rbm(ctx: Context, model: Any, columns: Columns) -> Lowered:
    weights = np.ascontiguousarray(model.components_.T)
    return ctx.transformed(ctx.b("sigmoid", ctx.affine(ctx.matrix(columns), weights, model.intercept_hidden_)))
