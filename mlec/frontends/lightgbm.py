"""LightGBM: boosters, the scikit-learn estimators, and model files.

All are read from LightGBM's model text (a live model writes it itself), which is checked before use. Everything is float64, as in
LightGBM: rows go left when ``x <= threshold``, and the sums start at 0 and add tree by tree.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mlec.errors import FrontendError, NotFittedModelError, UnsupportedModelError
from mlec.frontends import gbdt
from mlec.frontends.base import LowerOptions, Oracle
from mlec.frontends.gbdt import Tree, damaged
from mlec.frontends.trees import DEFAULT_LEFT, NAN_IS_ZERO, ZERO_IS_MISSING, Ensemble, check_category_words
from mlec.ir import DType, Graph, GraphBuilder, Location, Value
from mlec.ops.tree import ZERO_LIMIT
from mlec.signature import Coding, Labels, MethodSpec, Scalar

Array = NDArray[Any]

IDENTITY = {
    "regression",
    "regression_l1",
    "huber",
    "fair",
    "quantile",
    "mape",
    "lambdarank",
    "rank_xendcg",
    "custom",
    "none",
}
SQUARED = {"regression", "regression_l1", "huber", "fair", "quantile", "mape"}
"""Objectives that ``reg_sqrt`` applies to."""
EXPONENTIAL = {"poisson", "gamma", "tweedie"}
LOGISTIC = {"binary", "multiclassova", "cross_entropy"}
OBJECTIVES = IDENTITY | EXPONENTIAL | LOGISTIC | {"multiclass", "cross_entropy_lambda"}

CATEGORICAL, LEFT = 1, 2
MISSING_NONE, MISSING_ZERO, MISSING_NAN = 0, 1, 2

ROLES: dict[str, gbdt.Kind] = {
    "LGBMClassifier": "classifier",
    "LGBMRanker": "ranker",
    "LGBMRegressor": "regressor",
    "LGBMModel": "regressor",
}


@dataclass(frozen=True)
class ModelFile:
    """The text of a model file, not checked yet."""

    path: Path
    text: str = field(repr=False)


class LightGBMFrontend:
    """Lowers LightGBM models. Stateless."""

    name = "lightgbm"

    def accepts(self, model: object) -> bool:
        """Boosters, the scikit-learn estimators (and subclasses), and files that `load` read."""
        return isinstance(model, ModelFile) or bool(_class_names(model) & {"LGBMModel", "Booster"})

    def lower(self, model: Any, options: LowerOptions) -> Graph:
        """The model as a graph.

        When a model knows the categories of pandas columns, but not which columns they are, the columns are taken from a DataFrame
        in ``options.example_inputs``.

        Raises:
            FrontendError: a damaged model.
            NotFittedModelError: an estimator without a booster.
            UnsupportedModelError: an objective or setting that cannot be lowered exactly.
        """
        if isinstance(model, ModelFile):
            with gbdt.reading(model.path):
                place = Location(file=gbdt.place(model.path), scope="Booster")
                return _lower(_Model.read(model.text), None, "Booster", options, place)
        name = type(model).__name__
        text = _booster(model).model_to_string()
        estimator = None if _role(model) is None else model
        return _lower(_Model.read(text), estimator, name, options, Location(scope=name))

    def oracle(self, model: Any) -> Oracle:
        """The estimator's or booster's own methods.

        Those of a file run in a process of their own; it has none where LightGBM isn't installed.
        """
        if isinstance(model, ModelFile):
            return gbdt.file_oracle(self.name, "Booster", model.text.encode(), ("predict",), model.path)
        methods = ("predict", "predict_proba", "decision_function") if _role(model) == "classifier" else ("predict",)
        functions: dict[str, Callable[[Any], Any]] = {m: getattr(model, m) for m in methods if hasattr(model, m)}
        read = _Model.read(_booster(model).model_to_string())
        try:
            codings = read.codings(LowerOptions())
        except UnsupportedModelError:
            return functions  # which columns hold categories is known to the examples only; they have pandas' category type
        return {name: gbdt.with_categories(f, codings, read.names) for name, f in functions.items()}

    def sniff(self, head: bytes, path: Path) -> bool:
        return head.replace(b"\r\n", b"\n").startswith(b"tree\nversion=")

    def load(self, path: Path, options: LowerOptions) -> ModelFile:
        """Reads a model file.

        Raises:
            FrontendError: the file cannot be read, is not UTF-8, or may take more memory than there is.
        """
        data = gbdt.read_file(path)
        with gbdt.reading(path):
            gbdt.check_memory(4 * len(data) + 64 * data.count(b"\n"))  # its lines
            try:
                return ModelFile(path, data.decode())
            except UnicodeDecodeError as error:
                raise damaged(f"not valid UTF-8: {error}") from error

    def open_file(self, file: IO[bytes], kind: str) -> Any:
        """The model in LightGBM itself; for the process of `SourceProcess` only.

        Args:
            file: with the content of one that `load` and `lower` accepted.
            kind: ``"Booster"``.
        """
        import lightgbm

        return getattr(lightgbm, kind)(model_str=file.read().decode())


def _class_names(model: object) -> set[str]:
    return {c.__name__ for c in type(model).__mro__ if c.__module__.split(".")[0] == "lightgbm"}


def _role(model: object) -> gbdt.Kind | None:
    names = _class_names(model)
    return next((role for name, role in ROLES.items() if name in names), None)


def _booster(model: Any) -> Any:
    if _role(model) is None:
        return model
    if not model.__sklearn_is_fitted__():
        raise NotFittedModelError(f"this {type(model).__name__} is not fitted", hint="call fit first")
    return model.booster_


# -- reading the text ------------------------------------------------------------------------------------------------


def _number(fields: Mapping[str, str], key: str, default: int | None = None) -> int:
    text = fields.get(key, default)
    try:
        return gbdt.integer(text)
    except (TypeError, ValueError) as error:
        raise damaged(f"{key!r}: expected an integer, got {str(text)[:80]!r}") from error


def _array(fields: Mapping[str, str], key: str, dtype: type, count: int) -> Array:
    text = fields.get(key, "")
    gbdt.check_memory(40 * len(text))  # words and numbers of one or two digits
    parts = text.split()
    if len(parts) != count:
        raise damaged(f"{key!r}: expected {count} numbers, got {len(parts)}")
    try:
        return np.array([int(p) for p in parts] if dtype is np.int64 else [float(p) for p in parts], dtype)
    except (ValueError, OverflowError) as error:
        raise damaged(f"{key!r}: {error}") from error


def _tree(fields: Mapping[str, str], n_features: int) -> Tree:
    """The inner nodes come first, then the leaves."""
    leaves = _number(fields, "num_leaves")
    if _number(fields, "is_linear", 0):
        raise UnsupportedModelError(
            "the model has linear trees (linear_tree=True), whose leaves are regressions",
            hint="train with linear_tree=False",
        )
    leaf_values = _array(fields, "leaf_value", np.float64, leaves)
    if leaves == 0:
        raise damaged("a tree without leaves")
    inner = leaves - 1
    left, right, feature = (_array(fields, k, np.int64, inner) if inner else np.zeros(0, np.int64) for k in
                            ("left_child", "right_child", "split_feature"))  # fmt: skip
    threshold = _array(fields, "threshold", np.float64, inner) if inner else np.zeros(0)
    decision = _array(fields, "decision_type", np.int64, inner) if inner else np.zeros(0, np.int64)
    if ((feature < 0) | (feature >= n_features)).any():
        raise damaged(f"a split tests a feature out of {n_features}")
    for child in (left, right):
        if ((child < -leaves) | (child >= inner)).any():
            raise damaged(f"a child out of {inner} nodes and {leaves} leaves")
    is_category = (decision & CATEGORICAL) != 0
    return Tree(
        _joined(np.where(left >= 0, left, inner + ~left), np.full(leaves, -1)),
        _joined(np.where(right >= 0, right, inner + ~right), np.full(leaves, -1)),
        _joined(feature, np.zeros(leaves, np.int64)),
        _joined(_of_dropped_zeros(threshold), np.zeros(leaves)),
        _joined(np.where(is_category, 0, _flags(decision)), np.zeros(leaves, np.int64)),
        _joined(np.zeros(inner), leaf_values),
        _category_sets(fields, threshold, np.flatnonzero(is_category)),
    )


def _joined(inner: Array, leaves: Array) -> Array:
    return np.concatenate([inner, leaves])


def _flags(decision: Array) -> Array:
    missing = (decision >> 2) & 3
    if (missing == 3).any():
        raise damaged("'decision_type': unknown kind of missing value")
    left = np.where((missing != MISSING_NONE) & ((decision & LEFT) != 0), DEFAULT_LEFT, 0)
    return (
        left | np.where(missing != MISSING_NAN, NAN_IS_ZERO, 0) | np.where(missing == MISSING_ZERO, ZERO_IS_MISSING, 0)
    )


def _of_dropped_zeros(threshold: Array) -> Array:
    """Thresholds that decide on x as LightGBM's do on the row it makes of x, where values up to ``ZERO_LIMIT`` become 0."""
    tiny = np.abs(threshold) <= ZERO_LIMIT
    return np.where(tiny, np.where(threshold >= 0, ZERO_LIMIT, np.nextafter(-ZERO_LIMIT, -np.inf)), threshold)


def _category_sets(fields: Mapping[str, str], threshold: Array, nodes: Array) -> dict[int, Array]:
    if len(nodes) == 0:
        return {}
    count = _number(fields, "num_cat")
    bounds = (
        _array(fields, "cat_boundaries", np.int64, count + 1) if 0 < count <= len(threshold) else np.zeros(1, np.int64)
    )
    rows = threshold[nodes]
    if ((rows < 0) | (rows >= len(bounds) - 1) | (rows != np.floor(rows))).any():
        raise damaged(f"a categorical split refers to a set out of {count}")
    words = _array(fields, "cat_threshold", np.int64, int(bounds[-1]))
    if bounds[0] != 0 or (np.diff(bounds) < 0).any() or ((words < 0) | (words >> 32 != 0)).any():
        raise damaged("'cat_boundaries' and 'cat_threshold' are no sets of categories")
    check_category_words(len(nodes), int(np.diff(bounds).max()))
    bits = words.astype(np.uint32)
    return {int(n): bits[bounds[int(r)] : bounds[int(r) + 1]] for n, r in zip(nodes, rows, strict=True)}


@dataclass(frozen=True)
class _Model:
    """A model text, checked.

    Attributes:
        objective, options: name and the words after it, e.g. ``sigmoid:1``.
        n_outputs: trees of an iteration.
        average: the outputs are means over the iterations (random forests).
        names, infos: of the features; an info is ``[least:most]``, the codes of a categorical feature, or ``none``.
        pandas_categories: categories of each pandas category column, in the order of the columns.
    """

    objective: str
    options: tuple[str, ...]
    n_features: int
    n_outputs: int
    average: bool
    names: tuple[str, ...]
    infos: tuple[str, ...]
    trees: tuple[Tree, ...]
    pandas_categories: Sequence[Any] | None

    @staticmethod
    def read(text: str) -> _Model:
        lines = text.replace("\r\n", "\n").split("\n")
        if lines[0] != "tree":
            raise damaged(f"expected the line 'tree' first, got {lines[0][:80]!r}")
        end = next((i for i, line in enumerate(lines) if line == "end of trees"), None)
        if end is None:
            raise damaged("the line 'end of trees' is missing: the text is cut off")
        starts = [i for i, line in enumerate(lines[:end]) if line.startswith("Tree=")]
        header = _fields(lines[1 : starts[0] if starts else end])
        n_features = _number(header, "max_feature_idx") + 1
        n_outputs = _number(header, "num_tree_per_iteration", _number(header, "num_class"))
        if not (0 < n_features <= gbdt.MAX_FEATURES and 0 < n_outputs <= gbdt.MAX_OUTPUTS):
            raise damaged(f"{n_features} features and {n_outputs} outputs are out of range")
        if len(starts) % n_outputs:
            raise damaged(f"{len(starts)} trees are no whole number of iterations of {n_outputs}")
        objective, *options = header.get("objective", "none").split() or ["none"]
        if objective not in OBJECTIVES:
            raise UnsupportedModelError(
                f"the LightGBM objective {objective!r} is not known", hint=f"known: {', '.join(sorted(OBJECTIVES))}"
            )
        names, infos = (tuple(header.get(key, "").split(" ")) for key in ("feature_names", "feature_infos"))
        if len(names) != n_features or len(infos) != n_features:
            raise damaged(f"expected {n_features} feature names and infos, got {len(names)} and {len(infos)}")
        trees = []
        for number, (a, z) in enumerate(zip(starts, [*starts[1:], end], strict=True)):
            try:
                trees.append(_tree(_fields(lines[a + 1 : z]), n_features))
            except FrontendError as error:
                error.loc = error.loc or f"tree {number}"
                raise
        return _Model(
            objective, tuple(options), n_features, n_outputs, "average_output" in header, names, infos, tuple(trees),
            _pandas_categories(lines[end:]),
        )  # fmt: skip

    def option(self, key: str) -> float:
        """A number after the objective's name, e.g. 1.0 for ``sigmoid:1``."""
        text = next((o.partition(":")[2] for o in self.options if o.startswith(f"{key}:")), "1")
        try:
            return float(text)
        except ValueError as error:
            raise damaged(f"'objective': {key} is {text[:80]!r}") from error

    def codings(self, options: LowerOptions) -> dict[int, Coding]:
        """How the pandas category columns become codes; a missing or unseen value is NaN to LightGBM."""
        if not self.pandas_categories:
            return {}
        frame = _example_frame(options, self.n_features)
        if frame is not None:
            columns = [i for i, dtype in enumerate(frame.dtypes) if type(dtype).__name__ == "CategoricalDtype"]
        else:
            columns = [i for i, info in enumerate(self.infos) if info != "none" and not info.startswith("[")]
        if len(columns) != len(self.pandas_categories) or (frame is None and not self._fits(columns)):
            raise UnsupportedModelError(
                f"the model stores the categories of {len(self.pandas_categories)} columns, but not which columns they are",
                hint="pass a DataFrame as example: compile(model, example_inputs=(frame,)), with the column types of the training",
            )
        unknown = gbdt.MISSING_CODE
        return {
            column: Coding(_scalars(values), unknown=unknown, missing=unknown)
            for column, values in zip(columns, self.pandas_categories, strict=True)
        }

    def _fits(self, columns: Sequence[int]) -> bool:
        """Whether the codes seen in training lie within the categories."""
        assert self.pandas_categories is not None
        for column, values in zip(columns, self.pandas_categories, strict=True):
            codes = self.infos[column].split(":")
            if not all(c.lstrip("-").isdigit() and int(c) < len(values) for c in codes):
                return False
        return True

    def known_names(self, options: LowerOptions) -> tuple[str, ...] | None:
        """The columns' names, when they are known for sure: LightGBM writes ``_`` for spaces, and checks no names itself."""
        frame = _example_frame(options, self.n_features)
        if frame is not None and all(isinstance(c, str) for c in frame.columns):
            if tuple(c.replace(" ", "_") for c in frame.columns) == self.names:
                return tuple(frame.columns)
            return None
        return None if any("_" in name for name in self.names) else self.names


def _fields(lines: Sequence[str]) -> dict[str, str]:
    pairs = [line.partition("=") for line in lines if line]
    fields = {key: value for key, _, value in pairs}
    if len(fields) != len(pairs):
        raise damaged(f"a line occurs twice among {', '.join(list(fields)[:5])}"[:400])
    return fields


def _pandas_categories(lines: Sequence[str]) -> Sequence[Any] | None:
    mark = "pandas_categorical:"
    text = next((line.removeprefix(mark) for line in reversed(lines) if line.startswith(mark)), "null")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(f"'pandas_categorical' is not valid JSON: {error}") from error
    if value is not None and not (isinstance(value, list) and all(isinstance(v, list) for v in value)):
        raise damaged("'pandas_categorical': expected a list of lists")
    return value


def _scalars(values: Sequence[Any]) -> tuple[Scalar, ...]:
    if not all(isinstance(v, str | int | float) for v in values) or len(set(values)) != len(values):
        raise UnsupportedModelError(
            "the categories of a column are not distinct strings, numbers or booleans",
            hint="convert the column before training",
        )
    return tuple(values)


def _example_frame(options: LowerOptions, n_features: int) -> Any:
    """The example, when it is a DataFrame of as many columns."""
    example: Any = options.example_inputs[0] if options.example_inputs else None
    if hasattr(example, "dtypes") and hasattr(example, "columns") and len(example.columns) == n_features:
        return example
    return None


# -- the graph -------------------------------------------------------------------------------------------------------


def _lower(model: _Model, estimator: Any, name: str, options: LowerOptions, location: Location) -> Graph:
    if estimator is not None and estimator.get_params().get("pred_early_stop"):
        raise UnsupportedModelError(
            "pred_early_stop predicts with a part of the trees", hint="set_params(pred_early_stop=False)"
        )
    b = GraphBuilder(name)
    with b.at(location):
        table = gbdt.table_input(
            b, DType.F64, model.n_features,
            names=model.known_names(options), codings=model.codings(options), numbers="any",
        )  # fmt: skip
        ensemble = Ensemble(model.n_features, model.n_outputs, threshold_dtype="f64", value_dtype="f64")
        for i, tree in enumerate(model.trees):
            tree.add_to(ensemble, table.position, i % model.n_outputs)
        trees = Location(location.file, 0, f"{location.scope}.trees")
        raw = ensemble.emit(b, table.x, compare="le", base=0.0, location=trees, hint="raw_score")
        prediction = _prediction(b, raw, model)
        role = None if estimator is None else _role(estimator)
        if role == "classifier":
            return gbdt.finish(b, table, _classifier(b, raw, prediction, estimator), ("predict", "predict_proba"), role)
        kind: gbdt.Kind = role or ("ranker" if model.objective in ("lambdarank", "rank_xendcg") else "regressor")
        return gbdt.finish(b, table, [(MethodSpec("predict", ()), _flat(b, prediction))], ("predict",), kind)


def _flat(b: GraphBuilder, value: Value) -> Value:
    return gbdt.one_column(b, value) if value.type.shape[1] == 1 else value


def _prediction(b: GraphBuilder, raw: Value, model: _Model) -> Value:
    """(n, outputs): what ``Booster.predict`` returns, in LightGBM's own formulas."""
    if model.average and model.trees:
        raw = b("div", raw, float(len(model.trees) // model.n_outputs))
    objective = model.objective
    if objective in LOGISTIC:
        slope = model.option("sigmoid")
        return b("div", 1.0, b("add", b("exp", b("mul", raw, -slope)), 1.0), hint="probability")
    if objective in EXPONENTIAL:
        return b("exp", raw)
    if objective == "cross_entropy_lambda":
        return b("log1p", b("exp", raw))
    if objective == "multiclass":
        return b("softmax", raw, axis=1, hint="probabilities")
    if objective in SQUARED and "sqrt" in model.options:
        return b("mul", b("mul", b("sign", raw), raw), raw)
    return raw


def _classifier(b: GraphBuilder, raw: Value, prediction: Value, estimator: Any) -> list[tuple[MethodSpec, Value]]:
    decision = [(MethodSpec("decision_function", ()), _flat(b, raw))] if hasattr(estimator, "decision_function") else []
    if callable(estimator.objective_):
        # With an objective of the user's own, LightGBM returns raw scores from all methods.
        scores = _flat(b, raw)
        return [(MethodSpec("predict", ()), scores), (MethodSpec("predict_proba", ()), scores), *decision]
    probabilities = gbdt.two_classes(b, prediction) if prediction.type.shape[1] == 1 else prediction
    classes = estimator.classes_
    values = tuple(None if isinstance(v, float) and v != v else v for v in classes.tolist())
    labels = Labels(values, str(classes.dtype))
    return [
        (MethodSpec("predict", (), (labels,)), b("argmax", probabilities, axis=1, hint="labels")),
        (MethodSpec("predict_proba", ()), probabilities),
        *decision,
    ]
