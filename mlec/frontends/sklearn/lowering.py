"""A fitted estimator as a graph with its signature."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal

import msgspec
import numpy as np
from sklearn.compose import ColumnTransformer
from sklearn.pipeline import Pipeline

from mlec.errors import FrontendError, TypeRuleError
from mlec.frontends.base import LowerOptions
from mlec.frontends.sklearn import (  # noqa: F401  importing a family fills the table of converters
    clusters,
    compose,
    decomposition,
    distributions,
    encoders,
    gaussian,
    kernels,
    linear,
    naive_bayes,
    neighbors,
    neural,
    preprocessing,
    svm,
    trees,
)
from mlec.frontends.sklearn.columns import Columns, TableColumn
from mlec.frontends.sklearn.context import WITHHELD, Array, Context, Lowered, Numbers, Output
from mlec.frontends.sklearn.preprocessing import scalar
from mlec.frontends.sklearn.registry import convert
from mlec.ir import DType, Graph, Value, verify
from mlec.signature import ColumnFeed, FrameSpec, Labels, MethodSpec, Signature, TableSpec, TensorSpec

METHODS = (
    "predict", "predict_proba", "predict_log_proba", "predict_joint_log_proba", "decision_function", "score_samples", "transform",
)  # fmt: skip


def lower(model: Any, options: LowerOptions) -> Graph:
    """The whole of `SklearnFrontend.lower`."""
    names = feature_names(model)
    width = count_features(model, options)
    root = "pipeline" if isinstance(model, Pipeline) else ""
    columns = tuple(TableColumn(i) for i in range(width))
    ctx = Context(_identifier(type(model).__name__), width)
    lowered = convert(ctx, model, columns, root)
    if any(len(_checks(ctx, feed)) > 1 for feed in ctx.feeds):
        # Which columns are checked how is known only now: again, with an input for each kind of check.
        ctx = Context(ctx.b.name, width, ctx.numbers)
        lowered = convert(ctx, model, columns, root)
    with ctx.inside(root, model):
        methods = _methods(ctx, model, lowered)
        if not methods:
            ctx.refuse("it has no method that could be compiled", "compile an estimator with predict or transform")
        if not ctx.feeds:
            ctx.refuse("its result does not depend on its input")
        absent = [name for name in METHODS if name not in methods and hasattr(model, name)]
        if absent:
            options.notes.append(
                f"{ctx.location}: the compiled model does not offer {', '.join(absent)}; its source does"
            )
        outputs, specs = _outputs(ctx, methods)
    graph = ctx.b.finish(outputs)
    signature = Signature(
        inputs=tuple(_tensor_spec(value, value.hint) for value in graph.inputs),
        outputs=tuple(_tensor_spec(value, name) for value, name in zip(outputs, _output_names(specs), strict=True)),
        symbols={"n": (0, None)},
        table=_table(ctx, model, names),
        methods=specs,
        run=_run(lowered.kind, [spec.name for spec in specs]),
        kind=lowered.kind,
    )
    graph = graph.with_signature(_as_the_model_answers(model, signature, lowered.columns))
    verify(graph)
    return graph


def _as_the_model_answers(model: Any, signature: Signature, columns: Columns | None) -> Signature:
    """Notes which methods answer tables of float32 or integers in kind, and which return DataFrames. Each estimator has rules of its own:
    one row asks a copy (predicting can change an estimator: a search tree counts its visits).
    """
    table = signature.table
    assert table is not None
    copied = copy.deepcopy(model)

    def answer(name: str, dtype: type) -> Any:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            for number in (0, 1):
                with suppress(Exception):  # a row of zeros may be refused
                    return getattr(copied, name)(_row(table, dtype, number))
        return None

    coded = any(feed.codings for feed in table.feeds)
    methods = []
    for spec in signature.methods:
        if not any(spec.labels) and not coded:
            float32, *integers = (_dtype(answer(spec.name, t)) == t for t in (np.float32, np.int32, np.int64))
            spec = msgspec.structs.replace(spec, float32=float32, integers=all(integers))
        if spec.name == "transform":
            transformed = answer("transform", np.float64)
            own, dtype = _own_dtype(signature, spec), _dtype(transformed)
            if isinstance(dtype, np.dtype) and dtype.name != own and dtype.kind in "biuf":
                spec = msgspec.structs.replace(spec, dtype=dtype.name)
            spec = msgspec.structs.replace(spec, frame=_frame(transformed, signature, spec, columns))
        methods.append(spec)
    return msgspec.structs.replace(signature, methods=tuple(methods))


def _row(table: TableSpec, dtype: type, number: int) -> Any:
    """One row: the number in all columns, but of each column of categories the first of them."""
    values: list[Any] = [dtype(number)] * table.n_features
    for feed in table.feeds:
        for column, coding in zip(feed.columns, feed.codings, strict=False):
            values[column] = coding.categories[0] if coding.categories else None
    if table.feature_names is not None:
        import pandas as pd

        return pd.DataFrame({name: [value] for name, value in zip(table.feature_names, values, strict=True)})
    coded = any(feed.codings for feed in table.feeds)
    row: Array = np.empty((1, table.n_features), object if coded else dtype)
    row[0] = values
    return row


def _dtype(answer: Any) -> Any:
    """Of an array or of all columns of a DataFrame."""
    dtypes = list(getattr(answer, "dtypes", [getattr(answer, "dtype", None)]))
    return dtypes[0] if len(set(dtypes)) == 1 else None


def _own_dtype(signature: Signature, spec: MethodSpec) -> str:
    return spec.dtype or np.dtype(DType.of(signature.outputs[spec.outputs[0]].dtype).numpy).name


def _frame(answer: Any, signature: Signature, spec: MethodSpec, columns: Columns | None) -> FrameSpec | None:
    """The form of a DataFrame that ``transform`` answered."""
    library = type(answer).__module__.partition(".")[0]
    names = tuple(getattr(answer, "columns", ()))
    if library not in ("pandas", "polars") or not all(isinstance(name, str) for name in names):
        return None
    dtypes = tuple(np.asarray(answer[name]).dtype.name for name in names) if len(set(names)) == len(names) else ()
    own = _own_dtype(signature, spec)
    table = signature.table
    assert table is not None
    places: Sequence[str | int] = (
        table.feature_names if table.by_name and table.feature_names else range(table.n_features)
    )
    passed = tuple(places[c.position] if isinstance(c, TableColumn) and c.fill is None else None for c in columns or ())
    return FrameSpec(
        library="pandas" if library == "pandas" else "polars",
        columns=names,
        dtypes=dtypes if dtypes and set(dtypes) != {own} else None,
        passed=passed if any(p is not None for p in passed) else (),
    )


def feature_names(model: Any) -> tuple[str, ...] | None:
    """Names of the columns that the model was fitted with, if it was a table with names."""
    names = getattr(model, "feature_names_in_", None)
    return None if names is None else tuple(map(str, names))


def count_features(model: Any, options: LowerOptions) -> int:
    """Number of columns that the model takes.

    Raises:
        FrontendError: neither the model nor the example inputs tell.
    """
    first = model
    while isinstance(first, Pipeline):
        first = next((step for _, step in first.steps if not compose.is_absent(step)), None)
    width = getattr(first, "n_features_in_", None)
    if width is None and options.example_inputs:
        shape = np.shape(options.example_inputs[0])
        width = shape[1] if len(shape) == 2 else None
    if width is None:
        with suppress(TypeRuleError, AttributeError, ValueError, IndexError):
            if first is not None:  # else a pipeline of nothing but "passthrough"
                # What is unsupported or not fitted says so itself.
                convert(Context("guess", 1), first, (TableColumn(0),))
        raise FrontendError(
            f"{type(model).__name__} does not say how many columns it takes",
            hint="pass example_inputs=X",
            code="E_EXAMPLE",
        )
    return int(width)


def _methods(ctx: Context, model: Any, lowered: Lowered) -> dict[str, tuple[Output, Literal["", "log"]]]:
    """What the compiled model offers: those of the source's methods that were lowered."""
    made: dict[str, Output] = dict(lowered.methods)
    if lowered.columns is not None and "transform" not in made and hasattr(model, "transform"):
        made["transform"] = Output((ctx.matrix(lowered.columns, check=False),), dtype=lowered.dtype)
    methods: dict[str, tuple[Output, Literal["", "log"]]] = {}
    for name in METHODS:
        if not hasattr(model, name):
            continue
        if name in made:
            if made[name] is not WITHHELD:
                methods[name] = made[name], ""
        elif name == "predict_log_proba" and "predict_proba" in made:
            methods[name] = made["predict_proba"], "log"
    return methods


def _outputs(
    ctx: Context, methods: dict[str, tuple[Output, Literal["", "log"]]]
) -> tuple[list[Value], tuple[MethodSpec, ...]]:
    """The graph's outputs, each once, and which of them a method returns."""
    outputs: list[Value] = []
    specs = []
    for name, (output, function) in methods.items():
        positions = []
        for value in output.values:
            if value not in outputs:
                outputs.append(value)
            positions.append(outputs.index(value))
        specs.append(
            MethodSpec(
                name=name, outputs=tuple(positions), labels=tuple(_labels(ctx, classes) for classes in output.classes),
                dtype=output.dtype, function=function, as_list=output.as_list, stack=output.stack,
            )
        )  # fmt: skip
    return outputs, tuple(specs)


def _labels(ctx: Context, classes: Array | None) -> Labels | None:
    if classes is None:
        return None
    try:
        values = tuple(scalar(value) for value in classes)
    except TypeError as error:
        ctx.refuse(f"class labels may be strings, numbers or booleans; {error}")
    return Labels(values=values, dtype=classes.dtype.str if classes.dtype.kind == "U" else classes.dtype.name)


def _output_names(specs: tuple[MethodSpec, ...]) -> list[str]:
    """A name for each output: that of the first method that returns it."""
    names: dict[int, str] = {}
    for spec in specs:
        for i, position in enumerate(spec.outputs):
            names.setdefault(position, spec.name if len(spec.outputs) == 1 else f"{spec.name}_{i}")
    return [names[position] for position in range(len(names))]


def _run(kind: str, names: list[str]) -> tuple[str, ...]:
    """The methods whose results ``run`` returns."""
    wanted = {
        "classifier": ("predict", "predict_proba" if "predict_proba" in names else "decision_function"),
        "outlier": ("predict", "decision_function"),
        "transformer": ("transform",),
    }.get(kind, ("predict",))
    return tuple(name for name in wanted if name in names) or tuple(names[:1])


def _table(ctx: Context, model: Any, names: tuple[str, ...] | None) -> TableSpec:
    """How the source's table becomes the inputs. The check of all numbers is the mildest; feeds of a stricter one say so."""
    order: tuple[Numbers, ...] = ("any", "nan", "finite")
    checks = [min(_checks(ctx, feed), key=order.index) for feed in ctx.feeds]
    plain = [check for feed, check in zip(ctx.feeds, checks, strict=True) if not feed.codings]
    whole: Numbers = min(plain, key=order.index, default="any")
    feeds = tuple(
        feed if feed.codings or check == whole else ColumnFeed(columns=feed.columns, numbers=check)
        for feed, check in zip(ctx.feeds, checks, strict=True)
    )
    return TableSpec(ctx.n_features, feeds, names, whole, by_name=_finds_by_name(model))


def _checks(ctx: Context, feed: ColumnFeed) -> set[Numbers]:
    """The checks of the columns of a feed; of codes there are none."""
    return {"any"} if feed.codings else {ctx.numbers.get(i, "any") for i in feed.columns}


def _finds_by_name(model: Any) -> bool:
    """Whether every reader of the table is a ColumnTransformer, which finds the columns of a DataFrame by name.

    Histogram boosting on categories reads its table by one.
    """
    if isinstance(model, ColumnTransformer) or getattr(model, "_preprocessor", None) is not None:
        return True
    if isinstance(model, Pipeline):
        first = next((step for _, step in model.steps if not compose.is_absent(step)), None)
        return first is not None and _finds_by_name(first)
    for attribute in ("best_estimator_", "regressor_"):
        if hasattr(model, attribute):
            return _finds_by_name(getattr(model, attribute))
    return False


def _tensor_spec(value: Value, name: str) -> TensorSpec:
    shape = tuple(extent if isinstance(extent, int) else str(extent) for extent in value.type.shape)
    return TensorSpec(name=name, dtype=value.type.dtype.value, shape=shape)


def _identifier(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name).lower() or "model"
