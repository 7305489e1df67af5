"""How a compiled model looks from outside: tensors, table columns, label decoding, estimator methods.

The frontends write a `Signature`, the artifact's metadata carries it as JSON, and the runtime reads it. It is plain data
(msgspec structs), so that neither the compiler nor the source library is needed to run a model:

* `TensorSpec` - one input or output of the graph.
* `TableSpec` - how one table (array or DataFrame) that the source estimator takes becomes the graph's inputs: which
  columns feed which input, and how strings and other categories become integer codes.
* `MethodSpec` - one estimator method (``predict``, ``predict_proba`` ...): which outputs it returns, and how integer
  classes become the source's labels, and arrays its DataFrames.
"""

# Annotations are not postponed here: msgspec would compile the text of each when the first file is loaded, which takes 1 ms.

from typing import Literal

import msgspec

Scalar = str | int | float | bool | None
"""A category or class label as JSON can hold it. A NaN label is written as None."""


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor of the graph's interface.

    Attributes:
        name: unique among the inputs (or the outputs).
        dtype: name of the element type as the IR writes it: f64 f32 f16 bf16 i64 i32 i16 i8 u8 bool.
        shape: an int, or the text of a symbolic dim such as ``"n"`` or ``"2*n+1"``, for each axis.
        limits: smallest and largest value of an input that picks entries by their positions; others are an `InputError`.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    limits: tuple[int, int] | None = None


class Coding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the values of one column become integer codes.

    Attributes:
        categories: the known values; the code of a value is its position (or ``codes[position]``).
        codes: the codes when they are not 0, 1, 2 ...
        unknown: the code of a value not listed; None makes such a value an `InputError`.
        missing: the code of a missing value (None, NaN, pandas.NA, NaT); None makes it an `InputError`, unless a
            category is None, which then stands for all of them.
        none: the code of None where the source tells it from the other missing values.
        nan: the code of NaN where the source tells it from the other missing values.
    """

    categories: tuple[Scalar, ...]
    codes: tuple[int, ...] | None = None
    unknown: int | None = None
    missing: int | None = None
    none: int | None = None
    nan: int | None = None


class ColumnFeed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one graph input of shape (n, len(columns)) is filled with.

    Attributes:
        columns: positions of the table's columns.
        codings: one for each column when the input holds codes; empty when it holds the numbers themselves.
        numbers: which numbers the source accepts in these columns; None: as in the whole table.
    """

    columns: tuple[int, ...]
    codings: tuple[Coding, ...] = ()
    numbers: Literal["finite", "nan", "any"] | None = None


class TableSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one table becomes the graph's inputs.

    Attributes:
        n_features: number of columns that the source was fitted with.
        feature_names: their names, when the source was fitted on a DataFrame.
        feeds: one for each graph input, in order.
        numbers: which numbers the source accepts: "finite" (NaN and infinity are an `InputError`, as in the source),
            "nan" (NaN stands for a missing value, infinity is an error) or "any".
        by_name: the source finds the columns of a DataFrame by their names: in any order, among others.
    """

    n_features: int
    feeds: tuple[ColumnFeed, ...]
    feature_names: tuple[str, ...] | None = None
    numbers: Literal["finite", "nan", "any"] = "any"
    by_name: bool = False


class Labels(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The source's class labels.

    Attributes:
        values: label of class 0, 1, 2 ...
        dtype: numpy dtype of the array that the source returns, e.g. ``"int64"``, ``"<U10"``, ``"object"``, ``"bool"``.
    """

    values: tuple[Scalar, ...]
    dtype: str


class FrameSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The DataFrame that a transformer returns instead of an array.

    Attributes:
        library: whose DataFrame it is.
        columns: their names.
        dtypes: numpy dtype of each column, where they are not all that of the graph output.
        passed: for each column the table's column that it is, and whose dtype it keeps: its position, or where the source finds columns
            by their names its name; None for a computed column.
    """

    library: Literal["pandas", "polars"]
    columns: tuple[str, ...]
    dtypes: tuple[str, ...] | None = None
    passed: tuple[str | int | None, ...] = ()


class MethodSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One estimator method of the source.

    Attributes:
        name: ``"predict"``, ``"predict_proba"``, ``"decision_function"``, ``"transform"``, ``"score_samples"`` ...
        outputs: positions of the graph outputs it returns; several make a list, as multi-output estimators do.
        labels: for each output, the labels its integers stand for, or None. Empty: none is decoded.
        dtype: numpy dtype of the returned array when it is not that of the graph output.
        function: applied to the output on the host: "" (none) or "log" (``predict_log_proba``).
        as_list: return a list even for one output.
        stack: put several decoded outputs side by side as columns of one array (multi-output ``predict``).
        float32: return float32 for a table of float32, as the source does.
        integers: return a table's own integer dtype for a table of one, as the source does.
        frame: return a DataFrame.
    """

    name: str
    outputs: tuple[int, ...]
    labels: tuple[Labels | None, ...] = ()
    dtype: str | None = None
    function: Literal["", "log"] = ""
    as_list: bool = False
    stack: bool = False
    float32: bool = False
    integers: bool = False
    frame: FrameSpec | None = None


class Signature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The interface of a compiled model.

    Attributes:
        inputs, outputs: of the graph, in order.
        symbols: for each symbolic dim the smallest and the largest value (None: unbounded) that the model takes.
        table: set for tabular estimators.
        methods: the estimator methods of the source.
        run: names of the methods whose results ``run`` returns, in order (a classifier: predict, predict_proba);
            empty: ``run`` returns the graph outputs.
        kind: what the source is.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    symbols: dict[str, tuple[int, int | None]] = {}
    table: TableSpec | None = None
    methods: tuple[MethodSpec, ...] = ()
    run: tuple[str, ...] = ()
    kind: Literal["network", "classifier", "regressor", "transformer", "clusterer", "outlier", "ranker"] = "network"

    def method(self, name: str) -> MethodSpec | None:
        """The method of that name, or None."""
        return next((m for m in self.methods if m.name == name), None)
