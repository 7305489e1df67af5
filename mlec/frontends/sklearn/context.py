"""The state of one lowering: the graph being built, the inputs made so far, and where in the model we are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils import get_tags

from mlec.errors import UnsupportedModelError
from mlec.frontends.sklearn.columns import Column, Columns, ComputedColumn, TableColumn, is_sparse, runs
from mlec.ir import DType, GraphBuilder, Location, SymDim, Value, tensor
from mlec.signature import Coding, ColumnFeed

Array = NDArray[Any]
Kind = Literal["classifier", "regressor", "transformer", "clusterer", "outlier"]
Numbers = Literal["any", "nan", "finite"]

BATCH = SymDim.named("n")


@dataclass(frozen=True)
class Output:
    """What one method of an estimator returns.

    Attributes:
        values: in the graph; several make a list (or one array, see ``stack``).
        classes: for each value the labels that its integers stand for, or None. Empty: no value holds labels.
        dtype: numpy dtype of the result where it is not the value's.
        as_list: the method returns a list even for one value.
        stack: the values become the columns of one array.
    """

    values: tuple[Value, ...]
    classes: tuple[Array | None, ...] = ()
    dtype: str | None = None
    as_list: bool = False
    stack: bool = False


WITHHELD = Output(())
"""A method of the source that the compiled model must not have, because it could not answer exactly."""


@dataclass(frozen=True)
class Lowered:
    """One estimator in the graph.

    Attributes:
        methods: by name; a transformer's ``transform`` is `columns` instead.
        columns: what a transformer makes of its input.
        dtype: numpy dtype of what ``transform`` returns, where it is not float64.
    """

    kind: Kind
    methods: Mapping[str, Output] = field(default_factory=dict)
    columns: Columns | None = None
    dtype: str | None = None

    def value(self, method: str) -> Value:
        """The only value of a method."""
        (value,) = self.methods[method].values
        return value


class Context:
    """What converters work with.

    ```python
    @converts(StandardScaler)
    def standard_scaler(ctx, scaler, columns):
        x = ctx.matrix(columns, nan=True)
        return ctx.transformed(ctx.b("sub", x, ctx.constant(scaler.mean_)), like=columns)
    ```
    """

    def __init__(self, name: str, n_features: int, levels: Mapping[int, Numbers] | None = None) -> None:
        """Columns of the table that differ in ``levels``, the checks of their numbers, do not share an input."""
        self.b = GraphBuilder(name)
        self.n_features = n_features
        self.levels = levels or {}
        self.feeds: list[ColumnFeed] = []
        self.numbers: dict[int, Numbers] = {}
        """For each table column that is read as numbers, the strictest check that its readers make."""
        self._inputs: dict[tuple[object, ...], Value] = {}
        self._matrices: dict[tuple[object, ...], Value] = {}
        self._scope: list[str] = []
        self._estimator: object = None

    # -- where we are --------------------------------------------------------------------------------------------

    @contextmanager
    def inside(self, step: str, estimator: object) -> Iterator[None]:
        """Nodes made inside the block, and refusals, name this part of the model."""
        outer = self._estimator
        if step:
            self._scope.append(step)
        self._estimator = estimator
        try:
            with self.b.at(self.location):
                yield
        finally:
            if step:
                self._scope.pop()
            self._estimator = outer

    @property
    def location(self) -> Location:
        """Path of the current estimator in the model, and its class."""
        return Location(scope=": ".join(filter(None, (".".join(self._scope), type(self._estimator).__name__))))

    def refuse(self, reason: str, hint: str | None = None) -> NoReturn:
        """Raises `UnsupportedModelError` for the current estimator."""
        raise UnsupportedModelError(f"{type(self._estimator).__name__}: {reason}", hint=hint, loc=self.location)

    # -- reading columns -----------------------------------------------------------------------------------------

    def matrix(self, columns: Columns, *, nan: bool | None = None, dtype: str = "f64", check: bool = True) -> Value:
        """The columns as numbers, (n, len(columns)).

        Args:
            nan: whether the reader takes NaN; by default what the current estimator's tags say.
            dtype: "f64", or "f32" for the estimators that round their input first.
            check: the reader refuses infinity (and NaN, see ``nan``), as almost all do.
        """
        self.check(columns, nan=nan if check else True, infinity=not check)
        key = (columns, dtype)
        if key not in self._matrices:
            parts = [self._run(columns[first:last], dtype) for first, last in runs(columns, self.levels)]
            if not parts:
                self.refuse("no column is left for it", "select at least one column")
            self._matrices[key] = parts[0] if len(parts) == 1 else self.b("concat", *parts, axis=1)
        return self._matrices[key]

    def codes(self, column_codings: Sequence[tuple[TableColumn, Coding]], hint: str) -> Value:
        """Integer codes of table columns, (n, len(column_codings)) of i64; they are coded before the graph runs."""
        key = (hint, tuple(column_codings))
        if key not in self._inputs:
            positions = tuple(column.position for column, _ in column_codings)
            feed = ColumnFeed(
                columns=positions, codings=tuple(_filled(column, coding) for column, coding in column_codings)
            )
            self._inputs[key] = self._feed(hint, "i64", feed)
        return self._inputs[key]

    def check(self, columns: Columns, *, nan: bool | None = None, infinity: bool = False) -> None:
        """Notes what numbers the current estimator accepts in its input.

        Args:
            nan: by default what its tags say.
        """
        accepts_nan = get_tags(self._estimator).input_tags.allow_nan if nan is None else nan
        for column in columns:
            if isinstance(column, TableColumn):
                mended = column.fill is not None and column.missing is None
                wanted: Numbers = "any" if infinity else "nan" if accepts_nan or mended else "finite"
                self._require(column.position, wanted)
            elif column.origin is not None and not accepts_nan:
                self._require(column.origin, "finite")

    def _require(self, position: int, wanted: Numbers) -> None:
        order: tuple[Numbers, ...] = ("any", "nan", "finite")
        self.numbers[position] = max(self.numbers.get(position, "any"), wanted, key=order.index)

    def _run(self, columns: Columns, dtype: str) -> Value:
        first = columns[0]
        if isinstance(first, ComputedColumn):
            width = first.matrix.type.shape[1]
            whole = first.index == 0 and len(columns) == width
            part = (
                first.matrix
                if whole
                else self.b("slice", first.matrix, axis=1, start=first.index, stop=first.index + len(columns))
            )
            return self.cast(part, dtype)
        table_columns = [column for column in columns if isinstance(column, TableColumn)]
        filled = any(column.fill is not None for column in table_columns)
        positions = tuple(column.position for column in table_columns)
        x = self._numbers(positions, "f64" if filled else dtype)
        return self.cast(self._fill(x, table_columns), dtype) if filled else x

    def _numbers(self, positions: tuple[int, ...], dtype: str) -> Value:
        key = (positions, dtype)
        if key not in self._inputs:
            hint = "X" if len(positions) == self.n_features else f"X{len(self.feeds)}"
            self._inputs[key] = self._feed(hint, dtype, ColumnFeed(columns=positions))
        return self._inputs[key]

    def _feed(self, hint: str, dtype: str, feed: ColumnFeed) -> Value:
        taken = {value.hint for value in self._inputs.values()}
        name = hint if hint not in taken else f"{hint}_{len(self.feeds)}"
        self.feeds.append(feed)
        return self.b.input(name, tensor(dtype, (BATCH, len(feed.columns))))

    def _fill(self, x: Value, columns: Sequence[TableColumn]) -> Value:
        """Missing values of a numeric input replaced; a column without a fill keeps what it has."""
        for column in columns:
            if isinstance(column.fill, str) or isinstance(column.missing, str):
                self.refuse(
                    f"column {column.position} of the table holds strings, but is read as numbers here",
                    "encode the column first, e.g. by a OneHotEncoder or an OrdinalEncoder",
                )
        filled = np.array([column.fill is not None for column in columns])
        fills = np.array([math.nan if column.fill is None else float(column.fill) for column in columns])
        marks = np.array([math.nan if column.missing is None else float(column.missing) for column in columns])
        missing = self.where_missing(x, marks)
        if not filled.all():
            missing = self.b("logical_and", missing, self.constant(filled, "filled"))
        return self.b("where", missing, self.constant(fills, "fill"), x)

    def where_missing(self, x: Value, marks: Array) -> Value:
        """Where each column of x equals its mark; a NaN mark stands for NaN."""
        tests = []
        if np.isnan(marks).any():
            nans = self.b("isnan", x)
            tests.append(nans if np.isnan(marks).all() else self.b("logical_and", nans, self.constant(np.isnan(marks))))
        if not np.isnan(marks).all():
            tests.append(self.b("eq", x, self.constant(marks, "missing")))
        return tests[0] if len(tests) == 1 else self.b("logical_or", *tests)

    # -- building ------------------------------------------------------------------------------------------------

    def constant(self, array: ArrayLike, hint: str = "") -> Value:
        """A constant; floats become f64 and integers i64, as scikit-learn computes."""
        data = np.asarray(array)
        if data.dtype.kind in "iu":
            data = data.astype(np.int64)
        elif data.dtype.kind != "b":
            data = data.astype(np.float64)
        return self.b.constant(data, hint)

    def cast(self, value: Value, dtype: str) -> Value:
        return value if value.type.dtype is DType.of(dtype) else self.b("cast", value, dtype=DType.of(dtype))

    def column(self, matrix: Value, index: int) -> Value:
        """Column ``index`` of a matrix, (n,)."""
        return self.b("reshape", self.b("slice", matrix, axis=1, start=index, stop=index + 1), shape=(BATCH,))

    def vector(self, matrix: Value) -> Value:
        """(n, 1) as (n,)."""
        return self.b("reshape", matrix, shape=(BATCH,))

    def aligned(self, values: Sequence[Value]) -> list[Value]:
        """The same values in one float type: f64 unless all have another."""
        dtypes = {value.type.dtype for value in values}
        return list(values) if len(dtypes) == 1 else [self.cast(value, "f64") for value in values]

    def as_columns(self, *vectors: Value) -> Value:
        """Vectors of (n,) side by side, (n, len(vectors))."""
        columns = [self.b("reshape", v, shape=(BATCH, 1)) for v in self.aligned(vectors)]
        return columns[0] if len(columns) == 1 else self.b("concat", *columns, axis=1)

    def affine(self, x: Value, weights: ArrayLike, bias: ArrayLike | None) -> Value:
        """``x @ weights + bias``; weights (features, outputs)."""
        product = self.b("matmul", x, self.constant(weights, "coef"))
        return product if bias is None or not np.any(bias) else self.b("add", product, self.constant(bias, "intercept"))

    # -- results -------------------------------------------------------------------------------------------------

    def transformed(
        self, matrix: Value, *, like: Columns | None = None, dtype: str | None = None, sparse: bool = False
    ) -> Lowered:
        """The result of a transformer.

        Args:
            like: the input columns, when each output holds NaN only where its input does.
            dtype: of what ``transform`` returns, where it is not float64.
            sparse: the source returns a sparse matrix.
        """
        width = matrix.type.shape[1]
        assert isinstance(width, int)
        origins = [None] * width if like is None else [column.origin for column in like]
        sparse = sparse or (like is not None and is_sparse(like))
        columns = tuple(ComputedColumn(matrix, i, origins[i], sparse) for i in range(width))
        return Lowered("transformer", columns=columns, dtype=dtype)

    def regressor(self, predicted: Value) -> Lowered:
        """The result of a regressor: (n,) or (n, outputs)."""
        return Lowered("regressor", {"predict": Output((predicted,))})

    def classifier(
        self, classes: ArrayLike, labels: Value, *, proba: Value | None = None, decision: Value | None = None,
        log_proba: Value | None = None,
    ) -> Lowered:  # fmt: skip
        """The result of a classifier with one output; ``labels`` are positions in ``classes``."""
        methods = {"predict": Output((labels,), (np.asarray(classes),))}
        given = {"predict_proba": proba, "decision_function": decision, "predict_log_proba": log_proba}
        methods |= {name: Output((value,)) for name, value in given.items() if value is not None}
        return Lowered("classifier", methods)

    def first_of_largest(self, scores: Value) -> Value:
        """Position of the largest score in each row, (n,) of i64; the first among equals."""
        return self.b("argmax", scores, axis=1)

    def positive(self, scores: Value, *, or_zero: bool = False, threshold: float = 0.0) -> Value:
        """1 where a score is above the threshold (or equal to it), else 0; i64."""
        return self.cast(self.b("ge" if or_zero else "gt", scores, threshold), "i64")

    def two_columns(self, second: Value) -> Value:
        """Probabilities of both classes from those of the second, (n, 2)."""
        return self.as_columns(self.b("sub", self.b.constant(1.0, dtype=second.type.dtype), second), second)


def _filled(column: TableColumn, coding: Coding) -> Coding:
    """The coding of a column whose missing values are filled in: they get the code of what is filled in."""
    if column.fill is None:
        return coding
    codes = coding.codes if coding.codes is not None else tuple(range(len(coding.categories)))
    known = dict(zip(coding.categories, codes, strict=True))
    code = known.get(column.fill, coding.unknown)
    if column.missing is not None:
        if code is None:
            known.pop(column.missing, None)
        else:
            known[column.missing] = code
    elif column.absent == "any":
        known.pop(None, None)
        coding = msgspec.structs.replace(coding, missing=code, none=None, nan=None)
    else:
        coding = msgspec.structs.replace(coding, **{column.absent: code})
    return msgspec.structs.replace(coding, categories=tuple(known), codes=tuple(known.values()))


def is_table(columns: Columns) -> bool:
    return all(isinstance(column, TableColumn) for column in columns)


__all__ = ["BATCH", "Array", "Column", "Columns", "Context", "Lowered", "Output", "is_table"]
