"""Estimators made of estimators: pipelines, column transformers, unions, searches, voting, stacking, calibration."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn import (
    calibration,
    compose,
    ensemble,
    frozen,
    model_selection,
    multiclass,
    multioutput,
    pipeline,
    preprocessing,
)
from sklearn.base import is_classifier
from sklearn.model_selection._search_successive_halving import HalvingGridSearchCV, HalvingRandomSearchCV

from mlec.errors import NotFittedModelError
from mlec.frontends.sklearn.columns import Columns, ComputedColumn, is_sparse, marked
from mlec.frontends.sklearn.context import BATCH, Array, Context, Lowered, Output
from mlec.frontends.sklearn.linear import multilabel, normalised
from mlec.frontends.sklearn.preprocessing import apply_function
from mlec.frontends.sklearn.registry import convert, converts, transform
from mlec.frontends.sklearn.svm import pair_members
from mlec.frontends.sklearn.trees import chain
from mlec.ir import Value


def is_absent(step: Any) -> bool:
    return step is None or (isinstance(step, str) and step == "passthrough")


@converts(pipeline.Pipeline)
def pipeline_of_steps(ctx: Context, model: Any, columns: Columns) -> Lowered:
    *transformers, (last_name, last) = model.steps
    for name, transformer in transformers:
        columns = transform(ctx, transformer, columns, name)
    return Lowered("transformer", columns=columns) if is_absent(last) else convert(ctx, last, columns, last_name)


@converts(compose.ColumnTransformer)
def column_transformer(ctx: Context, model: Any, columns: Columns) -> Lowered:
    weights = model.transformer_weights or {}
    result: Columns = ()
    for name, transformer, _ in model.transformers_:
        # The names, masks, slices and functions that select columns were resolved to positions at fit.
        positions = model._transformer_to_input_indices[name]
        if len(positions) == 0 or (isinstance(transformer, str) and transformer == "drop"):
            continue
        made = transform(ctx, transformer, tuple(columns[i] for i in positions), name)
        result += _weighted(ctx, made, weights.get(name))
    return Lowered("transformer", columns=marked(result, getattr(model, "sparse_output_", False)))


@converts(pipeline.FeatureUnion)
def feature_union(ctx: Context, model: Any, columns: Columns) -> Lowered:
    weights = model.transformer_weights or {}
    result: Columns = ()
    for name, transformer in model.transformer_list:
        if not (isinstance(transformer, str) and transformer == "drop"):
            result += _weighted(ctx, transform(ctx, transformer, columns, name), weights.get(name))
    return Lowered("transformer", columns=marked(result, is_sparse(result)))


def _weighted(ctx: Context, columns: Columns, weight: float | None) -> Columns:
    if weight is None or not columns:
        return columns
    return ctx.transformed(ctx.b("mul", ctx.matrix(columns, check=False), float(weight)), like=columns).columns or ()


@converts(
    model_selection.GridSearchCV, model_selection.RandomizedSearchCV, HalvingGridSearchCV, HalvingRandomSearchCV,
)  # fmt: skip
def search(ctx: Context, model: Any, columns: Columns) -> Lowered:
    if not hasattr(model, "best_estimator_"):
        raise NotFittedModelError(
            f"{type(model).__name__} holds no fitted estimator", hint="search with refit=True", loc=ctx.location
        )
    return convert(ctx, model.best_estimator_, columns, "best_estimator")


@converts(model_selection.FixedThresholdClassifier, model_selection.TunedThresholdClassifierCV)
def threshold_classifier(ctx: Context, model: Any, columns: Columns) -> Lowered:
    estimator = getattr(model, "estimator_", model.estimator)
    part = convert(ctx, estimator, columns, "estimator")
    tuned = isinstance(model, model_selection.TunedThresholdClassifierCV)
    label = model._curve_scorer._get_pos_label() if tuned else model.pos_label
    classes = np.asarray(model.classes_)
    if label is not None and label not in classes:
        ctx.refuse(f"pos_label={label!r} is none of its labels", f"use one of {', '.join(map(repr, classes.tolist()))}")
    positive = 1 if label is None else int(np.flatnonzero(classes == label)[0])
    asked = model._get_response_method()
    method = next(name for name in ([asked] if isinstance(asked, str) else asked) if hasattr(estimator, name))
    if method not in part.methods:
        ctx.refuse(f"{type(estimator).__name__}.{method} is not supported", "use another response_method")
    score = part.value(method)
    if method == "predict_proba":
        score = ctx.column(score, positive)
    elif positive == 0:
        score = ctx.b("neg", score)
    threshold = model.best_threshold_ if tuned else model.threshold
    if threshold == "auto":
        threshold = 0.5 if method == "predict_proba" else 0.0
    above = ctx.b("ge", score, float(threshold))
    labels = ctx.b("where", above, ctx.constant(positive), ctx.constant(1 - positive))
    return Lowered("classifier", {**part.methods, "predict": Output((labels,), (classes,))})


@converts(frozen.FrozenEstimator)
def frozen_estimator(ctx: Context, model: Any, columns: Columns) -> Lowered:
    return convert(ctx, model.estimator, columns, "estimator")


# -- voting and stacking ---------------------------------------------------------------------------------------------


def members_of(model: Any) -> list[tuple[str, Any]]:
    """Names and fitted estimators of a voting or stacking model, without the dropped ones."""
    names = [name for name, estimator in model.estimators if not (isinstance(estimator, str) and estimator == "drop")]
    return list(zip(names, model.estimators_, strict=True))


def class_positions(ctx: Context, codes: Value, classes: Array, among: Array) -> Value:
    """Positions in ``classes`` as positions in ``among``, the classes of the whole model."""
    positions = np.searchsorted(among, classes)
    if np.array_equal(positions, np.arange(len(among))):
        return codes
    return ctx.b("gather", ctx.constant(positions, "class"), codes, axis=0)


def average(ctx: Context, values: list[Value], weights: list[float] | None) -> Value:
    """The (weighted) mean, summed in order."""
    if weights is None:
        return ctx.b("div", chain(ctx, ctx.aligned(values)), float(len(values)))
    values = [ctx.cast(value, "f64") for value in values]
    terms = [ctx.b("mul", value, float(weight)) for value, weight in zip(values, weights, strict=True)]
    return ctx.b("div", chain(ctx, terms), float(np.sum(np.asarray(weights, np.float64))))


@converts(ensemble.VotingClassifier)
def voting_classifier(ctx: Context, model: Any, columns: Columns) -> Lowered:
    parts = [convert(ctx, member, columns, name) for name, member in members_of(model)]
    weights, count = model._weights_not_none, len(model.classes_)
    if model.voting == "soft":
        probabilities = [part.value("predict_proba") for part in parts]
        proba = average(ctx, probabilities, weights)
        lowered = ctx.classifier(model.classes_, ctx.first_of_largest(proba), proba=proba)
        tables = ctx.aligned(probabilities)
        if not model.flatten_transform:  # (members, n, classes)
            tables = [ctx.b("reshape", table, shape=(1, *table.type.shape)) for table in tables]
        together = ctx.b("concat", *tables, axis=1 if model.flatten_transform else 0) if len(tables) > 1 else tables[0]
        return Lowered("classifier", {**lowered.methods, "transform": Output((together,))})
    encoded = np.arange(count)
    votes = [
        class_positions(ctx, part.value("predict"), np.asarray(member.classes_), encoded)
        for part, member in zip(parts, model.estimators_, strict=True)
    ]
    ballots = [ctx.b("one_hot", vote, depth=count, dtype="f64") for vote in votes]
    if weights is not None:
        ballots = [ctx.b("mul", ballot, float(weight)) for ballot, weight in zip(ballots, weights, strict=True)]
    lowered = ctx.classifier(model.classes_, ctx.first_of_largest(chain(ctx, ballots)))
    return Lowered("classifier", {**lowered.methods, "transform": Output((ctx.as_columns(*votes),))})


@converts(ensemble.VotingRegressor)
def voting_regressor(ctx: Context, model: Any, columns: Columns) -> Lowered:
    predictions = [convert(ctx, member, columns, name).value("predict") for name, member in members_of(model)]
    predicted = average(ctx, predictions, model._weights_not_none)
    return Lowered("regressor", {"predict": Output((predicted,)), "transform": Output((ctx.as_columns(*predictions),))})


@converts(ensemble.StackingClassifier, ensemble.StackingRegressor)
def stacking(ctx: Context, model: Any, columns: Columns) -> Lowered:
    classifier = isinstance(model, ensemble.StackingClassifier)
    if classifier and isinstance(model._label_encoder, list):
        ctx.refuse("several outputs are not supported", "fit one model for each output")
    meta: Columns = ()
    dtypes: list[Any] = [np.float64] if model.passthrough else []
    for (name, member), method in zip(members_of(model), model.stack_method_, strict=True):
        part = convert(ctx, member, columns, name)
        value = part.value(method)
        labelled = method == "predict" and bool(part.methods["predict"].classes)
        dtypes.append(np.asarray(member.classes_).dtype if labelled else np.float64)
        if labelled:
            value = ctx.b("gather", ctx.constant(np.asarray(member.classes_, np.float64), "label"), value, axis=0)
        value = ctx.cast(value, "f64")
        made = ctx.transformed(value if value.type.rank == 2 else ctx.as_columns(value)).columns or ()
        if classifier and method == "predict_proba" and len(model.classes_) == 2:
            made = made[1:]
        meta += made
    if model.passthrough:
        meta += columns
    final = convert(ctx, model.final_estimator_, meta, "final_estimator")
    outputs = dict(final.methods)
    if classifier:
        encoded = np.arange(len(model.classes_))
        labels = class_positions(ctx, final.value("predict"), np.asarray(model.final_estimator_.classes_), encoded)
        outputs["predict"] = Output((labels,), (np.asarray(model.classes_),))
    outputs["transform"] = Output((ctx.matrix(meta, check=False),), dtype=np.result_type(*dtypes).name)
    return Lowered(final.kind, outputs)


# -- calibration -----------------------------------------------------------------------------------------------------


@converts(calibration.CalibratedClassifierCV)
def calibrated_classifier(ctx: Context, model: Any, columns: Columns) -> Lowered:
    probabilities = [
        _calibrated(ctx, member, convert(ctx, member.estimator, columns, f"calibrated.{i}"))
        for i, member in enumerate(model.calibrated_classifiers_)
    ]
    proba = average(ctx, probabilities, None)
    return ctx.classifier(model.classes_, ctx.first_of_largest(proba), proba=proba)


def _calibrated(ctx: Context, member: Any, part: Lowered) -> Value:
    """Probabilities of one calibrated classifier, (n, classes)."""
    if member.method not in ("sigmoid", "isotonic", "temperature"):
        ctx.refuse(f"method={member.method!r} is not supported", "use 'sigmoid', 'isotonic' or 'temperature'")
    classes = len(member.classes)
    if member.method == "temperature":
        return _tempered(ctx, member, part)
    if hasattr(member.estimator, "decision_function"):
        scores = part.value("decision_function")
        responses = (
            [scores] if scores.type.rank == 1 else [ctx.column(scores, i) for i in range(len(member.calibrators))]
        )
    else:
        scores = part.value("predict_proba")
        responses = (
            [ctx.column(scores, 1)] if classes == 2 else [ctx.column(scores, i) for i in range(len(member.calibrators))]
        )
    calibrated = [
        _isotonic(ctx, calibrator, response) if member.method == "isotonic" else _platt(ctx, calibrator, response)
        for calibrator, response in zip(member.calibrators, (ctx.cast(r, "f64") for r in responses), strict=True)
    ]
    if classes == 2:
        proba = ctx.two_columns(calibrated[0])
    else:
        if len(calibrated) != classes:
            ctx.refuse("a member of the calibration has not seen every class")
        proba = normalised(ctx, ctx.as_columns(*calibrated))
    above = ctx.b("logical_and", ctx.b("gt", proba, 1.0), ctx.b("le", proba, 1.0 + 1e-5))
    return ctx.b("where", above, ctx.constant(1.0), proba)


def _tempered(ctx: Context, member: Any, part: Lowered) -> Value:
    (calibrator,) = member.calibrators
    if hasattr(member.estimator, "decision_function"):
        logits = ctx.cast(part.value("decision_function"), "f64")
        if logits.type.rank == 1:
            logits = ctx.as_columns(ctx.b("neg", logits), logits)
    else:
        logits = ctx.b("log", ctx.b("add", ctx.cast(part.value("predict_proba"), "f64"), 1e-12))
    return ctx.b("softmax", ctx.b("mul", logits, float(calibrator.beta_)), axis=1)


def _platt(ctx: Context, calibrator: Any, scores: Value) -> Value:
    score = ctx.b("add", ctx.b("mul", scores, float(calibrator.a_)), float(calibrator.b_))
    return ctx.b("sigmoid", ctx.b("neg", score))


def _isotonic(ctx: Context, calibrator: Any, scores: Value) -> Value:
    """Linear interpolation between the fitted points, as `numpy.interp` rounds it."""
    x, y = np.asarray(calibrator.X_thresholds_, np.float64), np.asarray(calibrator.y_thresholds_, np.float64)
    clipped = ctx.b("clip", scores, lo=float(calibrator.X_min_), hi=float(calibrator.X_max_))
    slopes = np.append(np.diff(y) / np.diff(x), 0.0)
    reached = ctx.cast(ctx.b("ge", ctx.as_columns(clipped), ctx.constant(x[None, :], "points")), "i64")
    left = ctx.b("sub", ctx.b("sum", reached, axes=(1,)), 1)
    slope, x0, y0 = (
        ctx.b("gather", ctx.constant(table, hint), left, axis=0)
        for table, hint in ((slopes, "slope"), (x, "x"), (y, "y"))
    )
    return ctx.b("add", ctx.b("mul", slope, ctx.b("sub", clipped, x0)), y0)


# -- several targets or classes --------------------------------------------------------------------------------------


def _binary_score(ctx: Context, part: Lowered) -> Value:
    """How much a classifier of two classes, or a regressor on them, is for the second, (n,)."""
    if "decision_function" in part.methods:
        return part.value("decision_function")
    return part.value("predict") if part.kind == "regressor" else ctx.column(part.value("predict_proba"), 1)


def _binary_threshold(estimator: Any) -> float:
    """The score above which the second class is predicted."""
    return 0.0 if hasattr(estimator, "decision_function") and is_classifier(estimator) else 0.5


@converts(multiclass._ConstantPredictor)
def constant_predictor(ctx: Context, model: Any, columns: Columns) -> Lowered:
    """What scikit-learn puts in where a label is the same on all rows."""
    (label,) = model.y_
    score = ctx.b("broadcast_to", ctx.constant([float(label)], "label"), shape=(BATCH,))
    return Lowered(
        "classifier", {"decision_function": Output((score,)), "predict_proba": Output((ctx.two_columns(score),))}
    )


@converts(multiclass.OneVsOneClassifier)
def one_versus_one(ctx: Context, model: Any, columns: Columns) -> Lowered:
    if model.pairwise_indices_ is not None:
        ctx.refuse("its estimators take kernels, each a part of the columns", "use a named kernel")
    parts = [convert(ctx, member, columns, f"estimators.{i}") for i, member in enumerate(model.estimators_)]
    if any(part.kind != "classifier" for part in parts):
        ctx.refuse("its estimators are no classifiers", "use a classifier")
    first, second = pair_members(len(model.classes_))
    wins = ctx.cast(as_matrix(ctx, [part.value("predict") for part in parts]), "f64")
    difference = ctx.constant(second - first)
    votes = ctx.b("add", ctx.b("matmul", wins, difference), ctx.constant(first.sum(axis=0)))
    confidence = ctx.b("matmul", as_matrix(ctx, [_binary_score(ctx, part) for part in parts]), difference)
    bounded = ctx.b("div", confidence, ctx.b("mul", ctx.b("add", ctx.b("abs", confidence), 1.0), 3.0))
    scores = ctx.b("add", votes, bounded)
    if model.n_classes_ > 2:
        return ctx.classifier(model.classes_, ctx.first_of_largest(scores), decision=scores)
    decision = ctx.column(scores, 1)
    labels = ctx.positive(decision, threshold=_binary_threshold(model.estimators_[0]))
    return ctx.classifier(model.classes_, labels, decision=decision)


def as_matrix(ctx: Context, vectors: list[Value]) -> Value:
    return ctx.as_columns(*(ctx.cast(vector, "f64") for vector in vectors))


@converts(multiclass.OneVsRestClassifier)
def one_versus_rest(ctx: Context, model: Any, columns: Columns) -> Lowered:
    parts = [convert(ctx, member, columns, f"estimators.{i}") for i, member in enumerate(model.estimators_)]
    scores = [_binary_score(ctx, part) for part in parts]
    threshold = _binary_threshold(model.estimators_[0])
    together = ctx.as_columns(*scores)
    single = len(parts) == 1
    methods: dict[str, Output] = {}
    if all("decision_function" in part.methods for part in parts):
        methods["decision_function"] = Output((scores[0] if single else together,))
    if all("predict_proba" in part.methods for part in parts):
        seconds = [ctx.column(part.value("predict_proba"), 1) for part in parts]
        proba = ctx.two_columns(seconds[0]) if single else ctx.as_columns(*seconds)
        if not model.multilabel_:
            total = ctx.b("sum", proba, axes=(1,), keepdims=True)
            one = ctx.b.constant(1.0, dtype=total.type.dtype)
            proba = ctx.b("div", proba, ctx.b("where", ctx.b("eq", total, 0.0), one, total))
        methods["predict_proba"] = Output((proba,))
    if model.multilabel_:
        return multilabel(ctx, ctx.positive(together, threshold=threshold), methods)
    labels = ctx.positive(scores[0], threshold=threshold) if single else ctx.first_of_largest(together)
    return Lowered("classifier", {"predict": Output((labels,), (np.asarray(model.classes_),)), **methods})


@converts(multioutput.MultiOutputRegressor)
def multi_output_regressor(ctx: Context, model: Any, columns: Columns) -> Lowered:
    predictions = [
        convert(ctx, m, columns, f"estimators.{i}").value("predict") for i, m in enumerate(model.estimators_)
    ]
    return ctx.regressor(ctx.as_columns(*predictions))


@converts(multioutput.MultiOutputClassifier)
def multi_output_classifier(ctx: Context, model: Any, columns: Columns) -> Lowered:
    parts = [convert(ctx, member, columns, f"estimators.{i}") for i, member in enumerate(model.estimators_)]
    labels = tuple(part.value("predict") for part in parts)
    methods = {"predict": Output(labels, tuple(np.asarray(m.classes_) for m in model.estimators_), stack=True)}
    if all("predict_proba" in part.methods for part in parts):
        methods["predict_proba"] = Output(tuple(part.value("predict_proba") for part in parts), as_list=True)
    return Lowered("classifier", methods)


@converts(multioutput.RegressorChain)
def regressor_chain(ctx: Context, model: Any, columns: Columns) -> Lowered:
    predictions: list[Value] = []
    for i, member in enumerate(model.estimators_):
        predictions.append(convert(ctx, member, columns, f"estimators.{i}").value("predict"))
        columns += (ComputedColumn(ctx.as_columns(predictions[-1]), 0),)
    return ctx.regressor(ctx.as_columns(*(predictions[list(model.order_).index(j)] for j in range(len(predictions)))))


@converts(multioutput.ClassifierChain)
def classifier_chain(ctx: Context, model: Any, columns: Columns) -> Lowered:
    outputs: dict[str, list[Value]] = {}
    for i, member in enumerate(model.estimators_):
        part = convert(ctx, member, columns, f"estimators.{i}")
        classes = np.asarray(member.classes_)
        if len(classes) != 2 or classes.dtype.kind not in "biuf":
            ctx.refuse("each label must have two values, which are numbers", "encode the labels as 0 and 1")
        labels = ctx.b("gather", ctx.constant(classes.astype(np.float64), "label"), part.value("predict"), axis=0)
        given = {"predict": labels}
        if "predict_proba" in part.methods:
            given["predict_proba"] = ctx.column(part.value("predict_proba"), 1)
        if "decision_function" in part.methods:
            given["decision_function"] = part.value("decision_function")
        for name, value in given.items():
            outputs.setdefault(name, []).append(value)
        columns += (ComputedColumn(ctx.as_columns(ctx.cast(given[model.chain_method_], "f64")), 0),)
    order = np.argsort(model.order_)
    methods = {name: Output((as_matrix(ctx, [values[i] for i in order]),)) for name, values in outputs.items()}
    return Lowered("classifier", methods)


@converts(compose.TransformedTargetRegressor)
def transformed_target(ctx: Context, model: Any, columns: Columns) -> Lowered:
    predicted = convert(ctx, model.regressor_, columns, "regressor").value("predict")
    matrix = predicted if predicted.type.rank == 2 else ctx.as_columns(predicted)
    with ctx.inside("transformer", model.transformer_):
        restored = ctx.cast(_inverse(ctx, model.transformer_, matrix), str(matrix.type.dtype))
    flat = model._training_dim == 1 and restored.type.shape[1] == 1
    return ctx.regressor(ctx.vector(restored) if flat else restored)


def _inverse(ctx: Context, model: Any, x: Value) -> Value:
    """``model.inverse_transform(x)``."""
    if isinstance(model, preprocessing.FunctionTransformer):
        function = model.inverse_func
        if function is None:
            return x
        made = None if model.inv_kw_args else apply_function(ctx, function, ctx.cast(x, "f64"))
        if made is None:
            ctx.refuse(
                f"the inverse function {getattr(function, '__qualname__', function)!r} cannot be read",
                "use a numpy function",
            )
        return made
    x = ctx.cast(x, "f64")
    if isinstance(model, preprocessing.MinMaxScaler):
        return ctx.b("div", ctx.b("sub", x, ctx.constant(model.min_, "min")), ctx.constant(model.scale_, "scale"))
    if isinstance(model, preprocessing.MaxAbsScaler):
        return ctx.b("mul", x, ctx.constant(model.scale_, "scale"))
    if isinstance(model, preprocessing.StandardScaler):
        centre, scale = (model.mean_ if model.with_mean else None), (model.scale_ if model.with_std else None)
    elif isinstance(model, preprocessing.RobustScaler):
        centre, scale = (
            (model.center_ if model.with_centering else None),
            (model.scale_ if model.with_scaling else None),
        )
    else:
        ctx.refuse("its inverse is not supported", "use a scaler, or a numpy function and its inverse")
    if scale is not None:
        x = ctx.b("mul", x, ctx.constant(scale, "scale"))
    return x if centre is None else ctx.b("add", x, ctx.constant(centre, "centre"))
