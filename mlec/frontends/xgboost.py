"""XGBoost: boosters, the scikit-learn estimators, and model files (JSON and UBJSON).

A live model is read from its own UBJSON dump, a file by our own readers; both are the same document, so there is one way in:

    XGBModel | Booster -> save_raw("ubj") -+
    file ----------------------------------+-> document -> `_Model` (checked) -> graph

Everything is float32, as in XGBoost: rows go left when ``x < threshold``, the sums start at the base margin and add tree by tree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mlec.errors import FrontendError, NotFittedModelError, UnsupportedModelError
from mlec.frontends import gbdt, ubjson
from mlec.frontends.base import LowerOptions, Oracle
from mlec.frontends.gbdt import Tree, damaged
from mlec.frontends.trees import DEFAULT_LEFT, Ensemble, category_words, check_category_words
from mlec.ir import DType, Graph, GraphBuilder, Location, Value
from mlec.signature import Coding, MethodSpec

Array = NDArray[Any]
F32 = np.float32

IDENTITY = {
    "reg:squarederror", "reg:linear", "reg:squaredlogerror", "reg:absoluteerror", "reg:pseudohubererror", "reg:quantileerror",
    "binary:logitraw", "rank:pairwise", "rank:ndcg", "rank:map",
}  # fmt: skip
LOGISTIC = {"binary:logistic", "reg:logistic"}
EXPONENTIAL = {"count:poisson", "reg:gamma", "reg:tweedie", "survival:cox", "survival:aft"}
HINGE = {"binary:hinge"}
SOFTMAX = {"multi:softprob", "multi:softmax"}
OBJECTIVES = IDENTITY | LOGISTIC | EXPONENTIAL | HINGE | SOFTMAX

ROLES = {"XGBClassifier": "classifier", "XGBRanker": "ranker", "XGBRegressor": "regressor", "XGBModel": "regressor"}
Role = Literal["booster", "classifier", "regressor", "ranker"]

CAT_STORED_SINCE = (3, 1)


@dataclass(frozen=True)
class ModelFile:
    """A parsed model file, not checked yet, and its very bytes."""

    path: Path
    document: dict[str, Any] = field(repr=False)
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class _Use:
    """How the model's caller predicts: what the estimator classes add to a booster.

    Attributes:
        role: whose ``predict`` is meant.
        name: of the class, for locations and messages.
        n_classes: of a classifier.
        returns_labels: a classifier made with the objective ``multi:softmax`` (its ``predict`` differs).
        missing: the value that stands for a missing one, besides NaN.
        inplace: predicts on the data as it is; a DMatrix refuses infinity.
    """

    role: Role
    name: str
    n_classes: int = 0
    returns_labels: bool = False
    missing: float = np.nan
    inplace: bool = True


class XGBoostFrontend:
    """Lowers XGBoost models. Stateless."""

    name = "xgboost"

    def accepts(self, model: object) -> bool:
        """Boosters, the scikit-learn estimators (and subclasses), and files that `load` read."""
        return isinstance(model, ModelFile) or bool(_class_names(model) & {"XGBModel", "Booster"})

    def lower(self, model: Any, options: LowerOptions) -> Graph:
        """The model as a graph.

        Raises:
            FrontendError: a damaged model.
            NotFittedModelError: an estimator without a booster.
            UnsupportedModelError: an objective or setting that cannot be lowered exactly.
        """
        if isinstance(model, ModelFile):
            with gbdt.reading(model.path):
                return _lowered(model.document, _use_of_file(model.document), gbdt.place(model.path))
        return _lowered(_document(_booster(model)), _use(model), "")

    def oracle(self, model: Any) -> Oracle:
        """The estimator's own methods, or the booster's ``predict`` on a DMatrix.

        Those of a file run in a process of their own; it has none where XGBoost isn't installed.
        """
        if isinstance(model, ModelFile):
            use = _use_of_file(model.document)
            methods = ("predict", "predict_proba") if use.role == "classifier" else ("predict",)
            return gbdt.file_oracle(self.name, use.name, model.data, methods, model.path)
        booster = _booster(model)
        use = _use(model)
        if use.role == "booster":
            functions: dict[str, Callable[[Any], Any]] = {"predict": _booster_predict(booster)}
        else:
            functions = {"predict": model.predict}
            if use.role == "classifier":
                functions["predict_proba"] = model.predict_proba
        if "c" not in (booster.feature_types or ()):
            return functions
        read = _Model.read(_document(booster), use)  # all of it: seconds for a large ensemble
        return {name: gbdt.with_categories(f, read.codings, read.names) for name, f in functions.items()}

    def sniff(self, head: bytes, path: Path) -> bool:
        return re.match(rb'\s*\{\s*"(learner|version)"\s*:', head) is not None or head.startswith(
            b"{L\0\0\0\0\0\0\0\x07learner{"
        )

    def load(self, path: Path, options: LowerOptions) -> ModelFile:
        """Reads a model file with our own readers.

        Raises:
            FrontendError: the file cannot be read, is neither JSON nor UBJSON, or may take more memory than there is.
        """
        data = gbdt.read_file(path)
        with gbdt.reading(path):
            document = ubjson.loads(data, memory=gbdt.MEMORY) if data.startswith(b"{L") else _from_json(data)
            if not isinstance(document, dict):
                raise damaged("the document is no object")
        return ModelFile(path, document, data)

    def open_file(self, file: IO[bytes], kind: str) -> Any:
        """The model in XGBoost itself; for the process of `SourceProcess` only.

        Args:
            file: with the content of one that `load` and `lower` accepted.
            kind: name of XGBoost's class for it.
        """
        import xgboost

        model = getattr(xgboost, kind)()
        model.load_model(bytearray(file.read()))
        return model


def _from_json(data: bytes) -> Any:
    gbdt.check_json(data)
    try:
        return json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise damaged(f"not valid JSON: {error}") from error


def _once(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names are all different: of two values of one name, readers may take either."""
    found = dict(members)
    if len(found) != len(members):
        raise ValueError(f"a name occurs twice in an object of {list(found)[:5]}"[:400])
    return found


# -- whose predict is meant ------------------------------------------------------------------------------------------


def _class_names(model: object) -> set[str]:
    return {c.__name__ for c in type(model).__mro__ if c.__module__.split(".")[0] == "xgboost"}


def _booster(model: Any) -> Any:
    if "Booster" in _class_names(model):
        return model
    if not model.__sklearn_is_fitted__():
        raise NotFittedModelError(f"this {type(model).__name__} is not fitted", hint="call fit first")
    return model.get_booster()


def _document(booster: Any) -> dict[str, Any]:
    document: dict[str, Any] = ubjson.loads(bytes(booster.save_raw("ubj")))
    return document


def _use(model: Any) -> _Use:
    names = _class_names(model)
    if "Booster" in names:
        return _Use("booster", "Booster", inplace=False)
    role: Any = next(role for name, role in ROLES.items() if name in names)
    missing = np.nan if model.missing is None else float(model.missing)
    inplace = model.booster != "gblinear"
    if role != "classifier":
        return _Use(role, type(model).__name__, missing=missing, inplace=inplace)
    softmax = model.objective == "multi:softmax"
    return _Use(role, type(model).__name__, int(model.n_classes_), softmax, missing, inplace)


def _use_of_file(document: dict[str, Any]) -> _Use:
    """A file that an estimator saved is used as that estimator uses it after ``load_model``; any other as a booster."""
    learner = _get(document, "learner", dict)
    attributes = learner.get("attributes")
    text = attributes.get("scikit_learn") if isinstance(attributes, dict) else None
    try:
        kind = json.loads(text).get("_estimator_type") if isinstance(text, str) else None
    except (ValueError, AttributeError, RecursionError) as error:
        raise damaged(f"learner.attributes.scikit_learn is not valid: {error}") from error
    linear = _get(_get(learner, "gradient_booster", dict), "name", str) == "gblinear"
    if kind == "classifier":
        n_classes = max(2, _number(_get(learner, "learner_model_param", dict), "num_class", 0))
        softmax = _get(_get(learner, "objective", dict), "name", str) == "multi:softmax"
        return _Use("classifier", "XGBClassifier", n_classes, softmax, inplace=not linear)
    if kind in ("regressor", "ranker"):
        return _Use(kind, "XGBRegressor" if kind == "regressor" else "XGBRanker", inplace=not linear)
    return _Use("booster", "Booster", inplace=False)


def _booster_predict(booster: Any) -> Callable[[Any], Any]:
    def predict(table: Any) -> Any:
        import xgboost

        if isinstance(table, xgboost.DMatrix):
            return booster.predict(table)
        if hasattr(table, "columns"):
            return booster.predict(xgboost.DMatrix(table, enable_categorical=True))
        names, types = booster.feature_names, booster.feature_types
        return booster.predict(
            xgboost.DMatrix(table, feature_names=names, feature_types=types, enable_categorical=True)
        )

    return predict


# -- reading the document --------------------------------------------------------------------------------------------


def _get(node: Mapping[str, Any], key: str, kind: type) -> Any:
    value = node.get(key)
    if not isinstance(value, kind):
        raise damaged(f"{key!r}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def _number(node: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """An integer parameter; the format writes them as text."""
    value = node.get(key, default)
    try:
        return gbdt.integer(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise damaged(f"{key!r}: expected an integer, got {str(value)[:80]!r}") from error


def _array(node: Mapping[str, Any], key: str, dtype: Any, count: int | None = None) -> Array:
    """A flat array of numbers, of ``count`` entries when given."""
    value = node.get(key)
    if not isinstance(value, list | np.ndarray):
        raise damaged(f"{key!r}: expected an array, got {type(value).__name__}")
    if isinstance(value, np.ndarray) and value.ndim == 1 and _holds(dtype, value.dtype):
        exact = value.astype(dtype, copy=False)
    else:
        try:
            array = np.asarray(value) if len(value) else np.zeros(0)
            with np.errstate(all="ignore"):
                exact = array.astype(dtype)
        except (ValueError, TypeError, OverflowError) as error:
            raise damaged(f"{key!r}: expected numbers: {error}") from error
        if (
            array.ndim != 1
            or array.dtype.kind not in "biuf"
            or (np.dtype(dtype).kind == "i" and not (exact == array).all())
        ):
            raise damaged(f"{key!r}: expected a flat array of {np.dtype(dtype).name}")
    if count is not None and len(exact) != count:
        raise damaged(f"{key!r}: expected {count} entries, got {len(exact)}")
    return exact


@cache
def _holds(dtype: Any, stored: np.dtype[Any]) -> bool:
    """Whether ``dtype`` holds every value of another one, so that nothing is to be checked."""
    return stored.kind in "biuf" and np.can_cast(stored, dtype, "safe")


def _base_scores(text: object, n_outputs: int) -> Array:
    """``"[5E-1,2E-1]"``, or before version 3.1 ``"5E-1"``, as float32; one value stands for all outputs."""
    parts = str(text).strip().removeprefix("[").removesuffix("]").split(",")
    try:
        with np.errstate(all="ignore"):
            scores = np.array([float(part) for part in parts], np.float64).astype(F32)
    except ValueError as error:
        raise damaged(f"'base_score': expected numbers, got {str(text)[:80]!r}") from error
    if len(scores) not in (1, n_outputs):
        raise damaged(f"'base_score': expected {n_outputs} numbers, got {len(scores)}")
    return np.array(np.broadcast_to(scores, n_outputs))


def _as_margin(objective: str, scores: Array) -> Array:
    """The base score as XGBoost adds it: it is stored in the space of the predictions."""
    with np.errstate(all="ignore"):
        if objective in LOGISTIC:
            bounded = np.minimum(np.maximum(scores, F32(1e-6)), F32(1) - F32(1e-6))
            return (-np.log((F32(1) / bounded - F32(1)).astype(np.float64))).astype(F32)
        if objective in EXPONENTIAL:
            return np.log(scores.astype(np.float64)).astype(F32)
    return scores


@dataclass(frozen=True)
class _Model:
    """A model document, checked.

    Attributes:
        base: (n_outputs,) float32 margins.
        names: of the features, when it was trained on named ones.
        codings: of the columns that were pandas categories.
        ensemble: of a tree booster.
        weights: (n_features + 1, n_outputs) of a linear booster, the bias last.
        code_columns: features with categorical splits, as a mask.
    """

    objective: str
    n_features: int
    n_outputs: int
    base: Array
    names: tuple[str, ...] | None
    codings: Mapping[int, Coding]
    ensemble: Callable[[Array], Ensemble] | None = None
    weights: Array | None = None
    code_columns: Array | None = None

    @staticmethod
    def read(document: Mapping[str, Any], use: _Use) -> _Model:
        learner = _get(document, "learner", dict)
        objective = _get(_get(learner, "objective", dict), "name", str)
        if objective not in OBJECTIVES:
            raise UnsupportedModelError(
                f"the XGBoost objective {objective!r} is not known", hint=f"known: {', '.join(sorted(OBJECTIVES))}"
            )
        params = _get(learner, "learner_model_param", dict)
        n_features = _number(params, "num_feature")
        n_outputs = max(_number(params, "num_class", 0), _number(params, "num_target", 1), 1)
        if not (0 <= n_features <= gbdt.MAX_FEATURES and n_outputs <= gbdt.MAX_OUTPUTS):
            raise damaged(f"{n_features} features and {n_outputs} outputs are out of range")
        scores = _base_scores(params.get("base_score"), n_outputs)
        base = _as_margin(objective, scores)
        names, types = (_feature_texts(learner, key, n_features) for key in ("feature_names", "feature_types"))
        booster = _get(learner, "gradient_booster", dict)
        kind = _get(booster, "name", str)
        if kind == "gblinear":
            model = _get(booster, "model", dict)
            weights = _array(model, "weights", F32, (n_features + 1) * n_outputs).reshape(n_features + 1, n_outputs)
            return _Model(objective, n_features, n_outputs, base, names, {}, weights=weights)
        drop = None
        if kind == "dart":
            drop = _array(booster, "weight_drop", F32)
            booster = _get(booster, "gbtree", dict)
        elif kind != "gbtree":
            raise UnsupportedModelError(
                f"the XGBoost booster {kind!r} is not known", hint="known: gbtree, dart, gblinear"
            )
        model = _get(booster, "model", dict)
        if not model.get("trees") and _number(params, "boost_from_average", 0):
            base = scores  # XGBoost estimates the base score in the first round; before that, it takes it for a margin
        codings = _codings(model.get("cats"), n_features)
        if types and names and not codings and "c" in types and _version(document) < CAT_STORED_SINCE:
            raise UnsupportedModelError(
                "this model has categorical features, but XGBoost before 3.1 did not store their categories",
                hint="train it again with XGBoost 3.1 or newer, or on integer codes without feature names",
            )
        if codings and not np.isnan(use.missing):
            raise UnsupportedModelError(
                f"missing={use.missing} on categorical columns compares with codes that depend on the data passed in",
                hint="train with missing=np.nan",
            )
        trees = _trees(model, n_features, n_outputs, _n_rounds(learner, use), drop, base, use.inplace)
        return _Model(
            objective, n_features, n_outputs, base, names, codings, trees.build, code_columns=trees.code_columns
        )


def _version(document: Mapping[str, Any]) -> tuple[int, ...]:
    version = document.get("version")
    return (
        tuple(int(v) for v in version)
        if isinstance(version, list) and all(isinstance(v, int) for v in version)
        else (0,)
    )


def _feature_texts(learner: Mapping[str, Any], key: str, n_features: int) -> tuple[str, ...] | None:
    texts = learner.get(key) or []
    if not isinstance(texts, list) or len(texts) not in (0, n_features) or not all(isinstance(t, str) for t in texts):
        raise damaged(f"{key!r}: expected {n_features} texts")
    if key == "feature_names" and len(set(texts)) != len(texts):
        raise damaged(f"{key!r}: a name occurs twice")
    return tuple(texts) or None


def _codings(cats: Any, n_features: int) -> dict[int, Coding]:
    """The stored categories, by column.

    A value that is not among them is an error at the edge, as XGBoost means it to be (it misses some: a search for the place of
    an unseen value may end at its neighbour).
    """
    columns = cats.get("enc", []) if isinstance(cats, dict) else []
    if not isinstance(columns, list) or len(columns) not in (0, n_features):
        raise damaged(f"'cats.enc': expected {n_features} entries")
    found: dict[int, Coding] = {}
    for i, column in enumerate(columns):
        if not isinstance(column, dict):
            raise damaged(f"'cats.enc': entry {i} is no object")
        values: list[Any]
        if "offsets" in column:
            offsets = _array(column, "offsets", np.int64)
            letters = (_array(column, "values", np.int64) & 0xFF).astype(np.uint8).tobytes()
            if len(offsets) and (offsets[0] != 0 or offsets[-1] != len(letters) or (np.diff(offsets) < 0).any()):
                raise damaged(f"'cats.enc': the offsets of entry {i} do not fit its values")
            if not letters.isascii():
                raise UnsupportedModelError(
                    f"column {i} has categories with characters beyond ASCII, which XGBoost stores damaged (it counts characters, "
                    "not bytes), so that they cannot be told apart",
                    hint="rename the categories, or train on integer codes",
                )
            values = [letters[a:z].decode() for a, z in pairwise(offsets)]
        else:
            values = _array(column, "values", np.int64).tolist()
        if len(set(values)) != len(values):
            raise damaged(f"'cats.enc': entry {i} lists a category twice")
        if values:
            found[i] = Coding(tuple(values), missing=gbdt.MISSING_CODE)
    return found


# -- trees -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trees:
    """The trees that predict.

    Attributes:
        build: the ensemble, given the position of each feature's column.
        code_columns: (n_features,) whether a feature has categorical splits.
    """

    build: Callable[[Array], Ensemble]
    code_columns: Array


def _n_rounds(learner: Mapping[str, Any], use: _Use) -> int | None:
    """The estimators stop at the best iteration; a booster uses all trees."""
    attributes = learner.get("attributes")
    if use.role == "booster" or not isinstance(attributes, dict) or "best_iteration" not in attributes:
        return None
    return _number(attributes, "best_iteration") + 1


def _n_used(model: Mapping[str, Any], n_trees: int, tree_info: Array, rounds: int | None) -> int:
    if rounds is None:
        return n_trees
    if "iteration_indptr" in model:
        starts = _array(model, "iteration_indptr", np.int64)
    else:
        groups = int(tree_info.max(initial=0)) + 1
        layer = max(1, _number(_get(model, "gbtree_model_param", dict), "num_parallel_tree", 1)) * groups
        starts = np.arange(0, n_trees + 1, layer)
    if not 0 < rounds < len(starts) or not 0 <= starts[rounds] <= n_trees:
        raise damaged(
            f"'best_iteration' is {rounds - 1}, but there are {len(starts) - 1} iterations of {n_trees} trees"
        )
    return int(starts[rounds])


def _trees(
    model: Mapping[str, Any],
    n_features: int,
    n_outputs: int,
    rounds: int | None,
    drop: Array | None,
    base: Array,
    inplace: bool,
) -> _Trees:
    listed = _get(model, "trees", list)
    tree_info = _array(model, "tree_info", np.int64, len(listed))
    if ((tree_info < 0) | (tree_info >= n_outputs)).any():
        raise damaged(f"'tree_info': a tree adds to an output out of {n_outputs}")
    if drop is not None and len(drop) != len(listed):
        raise damaged(f"'weight_drop': expected {len(listed)} entries, got {len(drop)}")
    by_id: dict[int, Mapping[str, Any]] = {}
    for i, tree in enumerate(listed):
        if not isinstance(tree, dict):
            raise damaged(f"tree {i} is no object")
        by_id[_number(tree, "id", i)] = tree
    if set(by_id) != set(range(len(listed))):
        raise damaged("'trees': the ids are not 0, 1, 2 ...")
    used = _n_used(model, len(listed), tree_info, rounds)
    trees: list[Tree] = []
    words = 0
    for i in range(used):
        trees.append(_tree(by_id[i], i, n_features, n_outputs))
        words += sum(map(len, trees[-1].categories.values()))
        check_category_words(1, words)
    alone = {int(output) for tree, output in zip(trees, tree_info, strict=False) if tree.values.ndim == 1}
    if alone and len(alone) < n_outputs:
        raise damaged(f"'tree_info': {len(alone)} of {n_outputs} outputs have trees; each iteration adds to every one")
    code_columns, number_columns = np.zeros(n_features, bool), np.zeros(n_features, bool)
    for tree in trees:
        numeric = tree.left >= 0
        numeric[list(tree.categories)] = False
        code_columns[tree.feature[list(tree.categories)]] = True
        number_columns[tree.feature[numeric]] = True
    if (code_columns & number_columns).any():
        raise UnsupportedModelError(
            f"feature {int(np.argmax(code_columns & number_columns))} has both numeric and categorical splits",
            hint="give each feature one type, and train again",
        )

    def build(position: Array) -> Ensemble:
        ensemble = Ensemble(n_features, n_outputs, threshold_dtype="f32", value_dtype="f32")
        for i, tree in enumerate(trees):
            output = 0 if tree.values.ndim == 2 else int(tree_info[i])
            values = tree.values
            if drop is not None:
                # Predicting in place, DART takes the base margin out of the sum of base and leaf; on a DMatrix it never enters.
                alone = (values + base[output]) - base[output] if inplace else values
                values = alone * drop[i]
            tree.add_to(ensemble, position, output, values)
        return ensemble

    return _Trees(build, code_columns)


def _tree(tree: Mapping[str, Any], number: int, n_features: int, n_outputs: int) -> Tree:
    try:
        return _checked_tree(tree, n_features, n_outputs)
    except FrontendError as error:
        error.loc = error.loc or f"tree {number}"
        raise


def _checked_tree(tree: Mapping[str, Any], n_features: int, n_outputs: int) -> Tree:
    params = _get(tree, "tree_param", dict)
    count = _number(params, "num_nodes")
    left, right = (_array(tree, f"{side}_children", np.int64, count) for side in ("left", "right"))
    feature = _array(tree, "split_indices", np.int64, count)
    threshold = _array(tree, "split_conditions", F32, count)
    default_left = _array(tree, "default_left", np.int64, count) != 0
    inner = left >= 0
    if ((left < -1) | (right < -1) | (inner & (right < 0))).any():
        raise damaged("a node has a left child only, or one below -1, which stands for none")
    if ((feature[inner] < 0) | (feature[inner] >= n_features)).any():
        raise damaged(f"a split tests a feature out of {n_features}")
    feature = np.where(inner, feature, 0)
    width = max(1, _number(params, "size_leaf_vector", 1))
    values = threshold
    if width > 1:
        if width != n_outputs:
            raise damaged(f"the leaves hold {width} values, but the model has {n_outputs} outputs")
        rows = _array(tree, "leaf_weights", F32)
        leaf_rows = np.where(inner, 0, right)
        if len(rows) % width or ((leaf_rows < 0) | (leaf_rows >= len(rows) // width)).any():
            raise damaged("'leaf_weights' does not hold a row for each leaf")
        values = rows.reshape(-1, width)[leaf_rows]
    categories = _category_sets(tree, inner) if "split_type" in tree else {}
    # XGBoost sends the set to the right, `tree_ensemble` to the left: such nodes are mirrored.
    mirrored = np.zeros(count, bool)
    mirrored[list(categories)] = True
    return Tree(
        np.where(mirrored, right, left), np.where(mirrored, left, right), feature, threshold,
        np.where(default_left ^ mirrored, DEFAULT_LEFT, 0), values, categories,
    )  # fmt: skip


def _category_sets(tree: Mapping[str, Any], inner: Array) -> dict[int, Array]:
    kinds = _array(tree, "split_type", np.int64, len(inner))
    nodes = _array(tree, "categories_nodes", np.int64)
    starts = _array(tree, "categories_segments", np.int64, len(nodes))
    sizes = _array(tree, "categories_sizes", np.int64, len(nodes))
    codes = _array(tree, "categories", np.int64)
    if not kinds.any() and not len(nodes):
        return {}
    if sorted(nodes.tolist()) != np.flatnonzero((kinds == 1) & inner).tolist():
        raise damaged("'categories_nodes' are not the categorical splits")
    if ((starts < 0) | (sizes < 0) | (starts > len(codes)) | (sizes > len(codes) - starts)).any():
        raise damaged("'categories_segments' lie outside of 'categories'")
    if sizes.sum() > len(codes):
        raise damaged("'categories_sizes' are more than there are 'categories'")
    check_category_words(len(nodes), int(codes.max(initial=-1)) // 32 + 1)
    return {int(n): category_words(codes[s : s + k]) for n, s, k in zip(nodes, starts, sizes, strict=True)}


# -- the graph -------------------------------------------------------------------------------------------------------


def _lowered(document: Mapping[str, Any], use: _Use, file: str) -> Graph:
    return _lower(_Model.read(document, use), use, Location(file=file, scope=use.name))


def _lower(model: _Model, use: _Use, location: Location) -> Graph:
    b = GraphBuilder(use.name)
    with b.at(location):
        strict = not use.inplace and not np.isinf(use.missing)
        table = gbdt.table_input(
            b, DType.F32, model.n_features,
            names=model.names, codings=model.codings, numbers="nan" if strict else "any",
        )  # fmt: skip
        margin = _margin(b, _present(b, table.x, model, use), table.position, model, location)
        if use.role == "classifier":
            return gbdt.finish(b, table, _classifier(b, margin, model, use), ("predict", "predict_proba"), "classifier")
        value = _prediction(b, margin, model.objective)
        if value.type.shape[1] == 1:
            value = gbdt.one_column(b, value)
        kind: gbdt.Kind = "ranker" if use.role == "ranker" or model.objective.startswith("rank:") else "regressor"
        return gbdt.finish(b, table, [(MethodSpec("predict", ()), value)], ("predict",), kind)


def _present(b: GraphBuilder, x: Value, model: _Model, use: _Use) -> Value:
    """x with NaN for missing values, and with the codes that XGBoost takes for invalid outside of every set."""
    if not np.isnan(use.missing):
        x = b("where", b("eq", x, float(F32(use.missing))), b.constant(np.nan, dtype=DType.F32), x)
    if model.code_columns is not None and model.code_columns.any() and not model.codings:
        # A code between -1 and 0 is invalid, and not code 0; codes above 0 are rounded down by the split anyway.
        whole = b("floor", x)
        x = whole if model.code_columns.all() else b("where", b.constant(model.code_columns, "coded"), whole, x)
    return x


def _margin(b: GraphBuilder, x: Value, position: Array, model: _Model, location: Location) -> Value:
    """(n, n_outputs): the sum before the link."""
    if model.ensemble is not None:
        place = Location(location.file, 0, f"{location.scope}.trees")
        return model.ensemble(position).emit(b, x, compare="lt", base=model.base, location=place, hint="margin")
    assert model.weights is not None
    # Missing values contribute nothing; XGBoost adds the base margin of output 0 to all outputs of a linear booster.
    known = b("where", b("isnan", x), b.constant(0.0, dtype=DType.F32), x)
    intercept = model.weights[-1] + model.base[0]
    return b(
        "add",
        b("matmul", known, b.constant(model.weights[:-1].copy(), "weights")),
        b.constant(intercept, "bias"),
        hint="margin",
    )


def _prediction(b: GraphBuilder, margin: Value, objective: str) -> Value:
    """(n, outputs): what ``Booster.predict`` returns, in XGBoost's own formulas."""
    if objective in LOGISTIC:
        power = _exp(b, b("minimum", b("neg", margin), 88.7))
        return b("div", 1.0, b("add", power, 1.0), hint="probability")
    if objective in EXPONENTIAL:
        return _exp(b, margin)
    if objective in HINGE:
        return b("cast", b("gt", margin, 0.0), dtype=DType.F32)
    if objective == "multi:softmax":
        return b("cast", b("argmax", margin, axis=1, keepdims=True), dtype=DType.F32)
    if objective == "multi:softprob":
        power = _exp(b, b("sub", margin, b("max", margin, axes=(1,), keepdims=True)))
        # XGBoost sums in double and divides in float.
        total = b("sum", b("cast", power, dtype=DType.F64), axes=(1,), keepdims=True)
        return b("div", power, b("cast", total, dtype=DType.F32), hint="probabilities")
    return margin


def _exp(b: GraphBuilder, x: Value) -> Value:
    """exp of float32, rounded once: what the C library's ``expf`` gives in all but a few cases in a thousand."""
    return b("cast", b("exp", b("cast", x, dtype=DType.F64)), dtype=DType.F32)


def _classifier(b: GraphBuilder, margin: Value, model: _Model, use: _Use) -> list[tuple[MethodSpec, Value]]:
    """``predict`` and ``predict_proba`` of XGBClassifier, which decide by the shape of the booster's prediction."""
    prediction = _prediction(b, margin, model.objective)
    columns = prediction.type.shape[1]
    if columns != 1 and use.n_classes != 2:
        labels = b("argmax", prediction, axis=1, hint="labels")
    else:
        above = b("gt", prediction, 0.5)
        if columns != 1:  # several labels at once
            labels = b("cast", above, dtype=DType.F64, hint="labels")
        elif use.returns_labels:
            labels = gbdt.one_column(b, b("cast", prediction, dtype=DType.I32, hint="labels"))
        else:
            labels = gbdt.one_column(b, b("cast", above, dtype=DType.I64, hint="labels"))
    if use.returns_labels:
        probabilities = b("softmax", margin, axis=1, hint="probabilities")
    elif columns == 1:
        probabilities = gbdt.two_classes(b, prediction)
    elif columns == use.n_classes or use.n_classes == 2:
        probabilities = prediction
    else:
        raise UnsupportedModelError(
            f"a classifier of {use.n_classes} classes whose booster has {columns} outputs",
            hint="compile its booster: model.get_booster()",
        )
    return [(MethodSpec("predict", ()), labels), (MethodSpec("predict_proba", ()), probabilities)]
