"""Trees and everything made of them: forests, boosting, isolation forests.

Each model becomes one `tree_ensemble`. scikit-learn's own trees round x to float32 and compare with a float64 threshold, so their
thresholds are rounded down to float32, which keeps every decision; histogram boosting compares float64 with float64.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn import dummy, ensemble, tree
from sklearn.ensemble._iforest import _average_path_length

from mlec.frontends.sklearn.columns import Columns, ComputedColumn
from mlec.frontends.sklearn.context import Array, Context, Lowered, Output
from mlec.frontends.sklearn.linear import inverse_link, outlier_detector
from mlec.frontends.sklearn.registry import convert, converts, transform
from mlec.frontends.trees import Ensemble, round_threshold_down
from mlec.ir import Value

CLASSIFIERS = (tree.DecisionTreeClassifier, tree.ExtraTreeClassifier)
REGRESSORS = (tree.DecisionTreeRegressor, tree.ExtraTreeRegressor)


def float_trees(ctx: Context, columns: Columns, n_outputs: int) -> Ensemble:
    return Ensemble(len(columns), n_outputs, threshold_dtype="f32", value_dtype="f64")


def add_tree(
    trees: Ensemble, model: Any, values: Array, *, features: Sequence[int] | None = None, output: int = 0
) -> None:
    """Adds one fitted tree. ``values``: a row for each node. ``features``: the columns that the tree was fitted on."""
    nodes = model.tree_
    feature = nodes.feature if features is None else np.asarray(features)[np.maximum(nodes.feature, 0)]
    trees.add_tree(
        nodes.children_left, nodes.children_right, feature, round_threshold_down(nodes.threshold), values,
        flags=np.asarray(nodes.missing_go_to_left, bool), output=output,
    )  # fmt: skip


def emit(ctx: Context, trees: Ensemble, x: Value, base: Any = 0.0) -> Value:
    return trees.emit(ctx.b, x, compare="le", base=base)


# -- trees and forests -----------------------------------------------------------------------------------------------


def node_values(model: Any) -> Array:
    """What each node predicts: (nodes, outputs) or (nodes, outputs * classes)."""
    values = model.tree_.value
    return np.asarray(values.reshape(len(values), -1), np.float64)


def trees_of(model: Any) -> Sequence[Any]:
    """The trees of a forest; a tree is its own only one."""
    members: Sequence[Any] = getattr(model, "estimators_", [model])
    return members


@converts(*CLASSIFIERS, ensemble.RandomForestClassifier, ensemble.ExtraTreesClassifier)
def classifier(ctx: Context, model: Any, columns: Columns) -> Lowered:
    members = trees_of(model)
    x = ctx.matrix(columns, dtype="f32")
    width = members[0].tree_.value.shape[2]
    trees = float_trees(ctx, columns, width * model.n_outputs_)
    for member in members:
        add_tree(trees, member, node_values(member))
    proba = emit(ctx, trees, x)
    if model is not members[0]:
        proba = ctx.b("div", proba, float(len(members)))
    if model.n_outputs_ == 1:
        return ctx.classifier(model.classes_, ctx.first_of_largest(proba), proba=proba)
    parts = [
        ctx.b("slice", proba, axis=1, start=i * width, stop=i * width + int(count))
        for i, count in enumerate(model.n_classes_)
    ]
    return Lowered(
        "classifier",
        {
            "predict": Output(tuple(map(ctx.first_of_largest, parts)), tuple(model.classes_), stack=True),
            "predict_proba": Output(tuple(parts), as_list=True),
        },
    )


@converts(*REGRESSORS, ensemble.RandomForestRegressor, ensemble.ExtraTreesRegressor)
def regressor(ctx: Context, model: Any, columns: Columns) -> Lowered:
    members = trees_of(model)
    x = ctx.matrix(columns, dtype="f32")
    trees = float_trees(ctx, columns, model.n_outputs_)
    for member in members:
        add_tree(trees, member, node_values(member))
    predicted = emit(ctx, trees, x)
    if model is not members[0]:
        predicted = ctx.b("div", predicted, float(len(members)))
    return ctx.regressor(ctx.vector(predicted) if model.n_outputs_ == 1 else predicted)


# -- boosting --------------------------------------------------------------------------------------------------------


def _boosted(ctx: Context, model: Any, columns: Columns) -> Value:
    """Raw scores of a GradientBoosting model, (n, trees per iteration)."""
    x = ctx.matrix(columns, dtype="f32", nan=False)
    iterations, width = model.estimators_.shape
    trees = float_trees(ctx, columns, width)
    for i in range(iterations):
        for k in range(width):
            member = model.estimators_[i, k]
            add_tree(trees, member, model.learning_rate * node_values(member), output=k)
    constant = isinstance(model.init_, str | dummy.DummyClassifier | dummy.DummyRegressor)
    if constant and getattr(model.init_, "strategy", "prior") not in ("stratified", "uniform"):
        base = model._raw_predict_init(np.zeros((1, len(columns)), np.float32))[0]
        return emit(ctx, trees, x, base)
    return ctx.b("add", _start(ctx, model, x), emit(ctx, trees, x))


def _start(ctx: Context, model: Any, x: Value) -> Value:
    """Raw scores of a model given as ``init``, (n, trees per iteration); it sees the input rounded to float32."""
    columns = tuple(ComputedColumn(x, i) for i in range(model.n_features_in_))
    first = convert(ctx, model.init_, columns, "init")
    if first.kind == "regressor":
        return ctx.as_columns(first.value("predict"))
    least = float(np.finfo(np.float64).eps)
    if "predict_proba" not in first.methods:
        ctx.refuse(f"init={type(model.init_).__name__} has no probabilities that can be compiled")
    row = np.zeros((1, model.n_features_in_), np.float32)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        rounded = copy.deepcopy(model.init_).predict_proba(row).dtype != np.float64
    if rounded:  # the logit of a float32 near 1 is as inexact as 1e-2, whatever it was computed from
        ctx.refuse(
            f"init={type(model.init_).__name__} computes its probabilities in float32, and their logits are not exact",
            "use init=None, or trees or forests, whose probabilities are float64",
        )
    proba = ctx.b("clip", first.value("predict_proba"), lo=least, hi=1 - least)
    if model._loss.is_multiclass:
        logs = ctx.b("log", proba)  # the symmetric logit: log p less the mean of the logs
        return ctx.b("sub", logs, ctx.b("mean", logs, axes=(1,), keepdims=True))
    second = ctx.column(proba, 1)
    logit = ctx.b("log", ctx.b("div", second, ctx.b("sub", ctx.constant(1.0), second)))
    halved = type(model._loss.link).__name__ == "HalfLogitLink"
    return ctx.as_columns(ctx.b("mul", logit, 0.5) if halved else logit)


@converts(ensemble.GradientBoostingRegressor)
def gradient_boosting_regressor(ctx: Context, model: Any, columns: Columns) -> Lowered:
    return ctx.regressor(ctx.vector(_boosted(ctx, model, columns)))


@converts(ensemble.GradientBoostingClassifier)
def gradient_boosting_classifier(ctx: Context, model: Any, columns: Columns) -> Lowered:
    return _boosted_classifier(ctx, model, _boosted(ctx, model, columns), zero_is_second=True)


def _boosted_classifier(ctx: Context, model: Any, scores: Value, *, zero_is_second: bool) -> Lowered:
    """``zero_is_second``: a score of exactly 0 means the second of two classes."""
    if scores.type.shape[1] == 1:
        decision = ctx.vector(scores)
        proba = ctx.two_columns(inverse_link(ctx, model._loss.link, decision))
        labels = ctx.positive(decision, or_zero=zero_is_second)
    else:
        decision, proba, labels = scores, ctx.b("softmax", scores, axis=1), ctx.first_of_largest(scores)
    return ctx.classifier(model.classes_, labels, proba=proba, decision=decision)


def _hist_boosted(ctx: Context, model: Any, columns: Columns) -> Value:
    """Raw scores of a HistGradientBoosting model, (n, trees per iteration)."""
    if model._preprocessor is not None:  # codes the categories, and puts those columns first
        columns = transform(ctx, model._preprocessor, columns, "preprocessor")
    x = ctx.matrix(columns, check=False)
    trees = Ensemble(len(columns), model.n_trees_per_iteration_, threshold_dtype="f64", value_dtype="f64")
    for iteration in model._predictors:
        for k, predictor in enumerate(iteration):
            nodes = predictor.nodes
            leaf = nodes["is_leaf"].astype(bool)
            categorical = np.flatnonzero(nodes["is_categorical"].astype(bool) & ~leaf)
            trees.add_tree(
                np.where(leaf, -1, nodes["left"].astype(np.int64)),
                np.where(leaf, -1, nodes["right"].astype(np.int64)),
                nodes["feature_idx"], nodes["num_threshold"], nodes["value"],
                flags=nodes["missing_go_to_left"].astype(bool),
                categories={int(i): predictor.raw_left_cat_bitsets[nodes["bitset_idx"][i]] for i in categorical},
                output=k,
            )  # fmt: skip
    return emit(ctx, trees, x, np.ravel(model._baseline_prediction))


@converts(ensemble.HistGradientBoostingRegressor)
def hist_gradient_boosting_regressor(ctx: Context, model: Any, columns: Columns) -> Lowered:
    return ctx.regressor(inverse_link(ctx, model._loss.link, ctx.vector(_hist_boosted(ctx, model, columns))))


@converts(ensemble.HistGradientBoostingClassifier)
def hist_gradient_boosting_classifier(ctx: Context, model: Any, columns: Columns) -> Lowered:
    return _boosted_classifier(ctx, model, _hist_boosted(ctx, model, columns), zero_is_second=False)


# -- ensembles of any estimator, which mostly are trees --------------------------------------------------------------


def are_trees(members: Sequence[Any], kinds: tuple[type, ...], n_classes: int | None = None) -> bool:
    """Whether all members are single-output trees (that know every class), so that one node can hold them."""
    return all(
        type(member) in kinds and member.n_outputs_ == 1 and (n_classes is None or member.n_classes_ == n_classes)
        for member in members
    )


def take(columns: Columns, features: Sequence[int]) -> Columns:
    return tuple(columns[i] for i in features)


def chain(ctx: Context, terms: Sequence[Value]) -> Value:
    """The sum from the first to the last."""
    total, *rest = ctx.aligned(terms)
    for term in rest:
        total = ctx.b("add", total, term)
    return total


def spread(ctx: Context, values: Value, classes: Sequence[int], n_classes: int) -> Value:
    """Columns for some of the classes as columns for all, zero for the others."""
    if list(classes) == list(range(n_classes)):
        return values
    placement = np.zeros((len(classes), n_classes))
    placement[np.arange(len(classes)), np.asarray(classes, np.int64)] = 1.0
    return ctx.b("matmul", values, ctx.constant(placement, "placement"))


@converts(ensemble.BaggingClassifier)
def bagging_classifier(ctx: Context, model: Any, columns: Columns) -> Lowered:
    members, features = model.estimators_, model.estimators_features_
    count = model.n_classes_
    decision: Value | None = None
    if are_trees(members, CLASSIFIERS, count):
        trees = float_trees(ctx, columns, count)
        for member, chosen in zip(members, features, strict=True):
            add_tree(trees, member, node_values(member), features=chosen)
        total = emit(ctx, trees, ctx.matrix(columns, dtype="f32"))
    else:
        lowered = [
            convert(ctx, member, take(columns, chosen), f"estimators.{i}")
            for i, (member, chosen) in enumerate(zip(members, features, strict=True))
        ]
        terms = []
        for member, part in zip(members, lowered, strict=True):
            if "predict_proba" in part.methods:
                votes = part.value("predict_proba")
            else:
                votes = ctx.b("one_hot", part.value("predict"), depth=len(member.classes_), dtype="f64")
            terms.append(spread(ctx, ctx.cast(votes, "f64"), member.classes_, count))
        total = chain(ctx, terms)
        if all("decision_function" in part.methods for part in lowered):
            decision = ctx.b(
                "div", chain(ctx, [part.value("decision_function") for part in lowered]), float(len(members))
            )
    proba = ctx.b("div", total, float(len(members)))
    return ctx.classifier(model.classes_, ctx.first_of_largest(proba), proba=proba, decision=decision)


@converts(ensemble.BaggingRegressor)
def bagging_regressor(ctx: Context, model: Any, columns: Columns) -> Lowered:
    members, features = model.estimators_, model.estimators_features_
    if are_trees(members, REGRESSORS):
        trees = float_trees(ctx, columns, 1)
        for member, chosen in zip(members, features, strict=True):
            add_tree(trees, member, node_values(member), features=chosen)
        total = ctx.vector(emit(ctx, trees, ctx.matrix(columns, dtype="f32")))
    else:
        total = chain(
            ctx,
            [
                convert(ctx, member, take(columns, chosen), f"estimators.{i}").value("predict")
                for i, (member, chosen) in enumerate(zip(members, features, strict=True))
            ],
        )
    return ctx.regressor(ctx.b("div", total, float(len(members))))


@converts(ensemble.AdaBoostClassifier)
def ada_boost_classifier(ctx: Context, model: Any, columns: Columns) -> Lowered:
    ctx.check(columns, nan=False)
    members, weights, count = model.estimators_, model.estimator_weights_, model.n_classes_
    if count == 1:
        ctx.refuse("it was fitted on one class only")

    def votes(member: Any, weight: float) -> Array:
        """What each of the member's classes adds to the scores, (classes of the member, classes)."""
        won = np.asarray(member.classes_)[:, None] == np.asarray(model.classes_)[None, :]
        return np.where(won, weight, -1 / (count - 1) * weight)

    pairs = list(zip(members, weights[: len(members)], strict=True))
    if are_trees(members, CLASSIFIERS):
        trees = float_trees(ctx, columns, count)
        for member, weight in pairs:
            add_tree(trees, member, votes(member, weight)[np.argmax(node_values(member), axis=1)])
        total = emit(ctx, trees, ctx.matrix(columns, dtype="f32", nan=False))
    else:
        total = chain(
            ctx,
            [
                ctx.b("gather", ctx.constant(votes(m, w), "votes"), convert(ctx, m, columns, f"estimators.{i}").value("predict"), axis=0)
                for i, (m, w) in enumerate(pairs)
            ],
        )  # fmt: skip
    scores = ctx.b("div", total, float(weights.sum()))
    if count > 2:
        proba = ctx.b("softmax", ctx.b("div", scores, float(count - 1)), axis=1)
        return ctx.classifier(model.classes_, ctx.first_of_largest(scores), proba=proba, decision=scores)
    decision = ctx.b("sub", ctx.column(scores, 1), ctx.column(scores, 0))
    both = ctx.b("div", ctx.as_columns(ctx.b("neg", decision), decision), 2.0)
    return ctx.classifier(
        model.classes_, ctx.positive(decision), proba=ctx.b("softmax", both, axis=1), decision=decision
    )


@converts(ensemble.AdaBoostRegressor)
def ada_boost_regressor(ctx: Context, model: Any, columns: Columns) -> Lowered:
    """The weighted median of the members' predictions."""
    ctx.check(columns, nan=False)
    members = model.estimators_
    if are_trees(members, REGRESSORS):
        trees = float_trees(ctx, columns, len(members))
        for i, member in enumerate(members):
            add_tree(trees, member, node_values(member), output=i)
        predictions = emit(ctx, trees, ctx.matrix(columns, dtype="f32", nan=False))
    else:
        predictions = ctx.as_columns(
            *(convert(ctx, member, columns, f"estimators.{i}").value("predict") for i, member in enumerate(members))
        )
    ordered, order = ctx.b.multi("sort", predictions, axis=1)
    weights = ctx.b("gather", ctx.constant(model.estimator_weights_[: len(members)], "weights"), order, axis=0)
    running = ctx.b("cumsum", weights, axis=1)
    half = ctx.b("mul", ctx.b("slice", running, axis=1, start=len(members) - 1, stop=len(members)), 0.5)
    median = ctx.b("argmax", ctx.cast(ctx.b("ge", running, half), "i64"), axis=1, keepdims=True)
    return ctx.regressor(ctx.vector(ctx.b("take_along_axis", ordered, median, axis=1)))


@converts(ensemble.IsolationForest)
def isolation_forest(ctx: Context, model: Any, columns: Columns) -> Lowered:
    members = model.estimators_
    x = ctx.matrix(columns, dtype="f32", check=False)
    trees = float_trees(ctx, columns, 1)
    for i, (member, features) in enumerate(zip(members, model.estimators_features_, strict=True)):
        depths = model._decision_path_lengths[i] + model._average_path_length_per_tree[i] - 1.0
        add_tree(trees, member, np.asarray(depths, np.float64), features=features)
    depth = ctx.vector(emit(ctx, trees, x))
    unit = float(len(members) * _average_path_length([model._max_samples])[0])

    def scores(depths: Array) -> Array:
        """The decision function of total depths, as the library computes it."""
        exponents = -(depths / unit if unit else np.ones_like(depths))
        return np.asarray(-(2**exponents) - model.offset_)

    exponent = ctx.b("neg", ctx.b("div", depth, unit)) if unit else ctx.b("sub", ctx.b("mul", depth, 0.0), 1.0)
    samples = ctx.b("neg", ctx.b("pow", ctx.constant(2.0), exponent))
    decision = ctx.b("sub", samples, float(model.offset_))
    # The offset mostly is the score of a training row. Comparing depths keeps that row an inlier however powers are rounded.
    inlier = ctx.b("ge", depth, least_positive(lambda depth: bool(scores(np.array([depth]))[0] >= 0)))
    return outlier_detector(ctx, decision, inlier, samples)


def least_positive(holds: Callable[[float], bool]) -> float:
    """The smallest float64 >= 0 for which a monotone condition holds; infinity when it never does."""
    low, high = 0, int(np.float64(np.inf).view(np.int64))  # floats >= 0 are ordered as their bits
    while low < high:
        middle = (low + high) // 2
        if holds(float(np.int64(middle).view(np.float64))):
            high = middle
        else:
            low = middle + 1
    return float(np.int64(low).view(np.float64))
