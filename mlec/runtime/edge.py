"""From what a user passes - arrays, lists, tensors, DataFrames, strings - to the arrays that a graph takes.

Everything is checked against the `Signature` here, so that kernels never see a wrong shape or type: a mismatch is an
`InputError` that says what was expected and what came. Other libraries' objects are recognised by what they can do
(``__dlpack__``, ``iloc``, ``to_numpy``); none of those libraries is imported.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy import count_nonzero, isinf, vdot

from mlec.errors import InputError
from mlec.runtime.device import DeviceArray, DLDevice, borrow, device_of
from mlec.runtime.dims import evaluate, solved, symbols_of
from mlec.runtime.nested import Nesting
from mlec.runtime.program import Array
from mlec.signature import Coding, Signature, TableSpec, TensorSpec
from mlec.wording import plural

_Codes = np.ndarray[Any, np.dtype[np.int64]]

_DTYPES = {
    "f64": "float64",
    "f32": "float32",
    "f16": "float16",
    "i64": "int64",
    "i32": "int32",
    "i16": "int16",
    "i8": "int8",
    "u8": "uint8",
    "bool": "bool",
}

_ARRAY_LIKE = "pass a numpy array, a tensor, a DataFrame, or a list of rows; of a generator or a set make a list first"
_FEW_ROWS = 32
_PLAIN = frozenset({float, int, bool})
_FEW = 4096  # numbers: beyond, adding them up may start threads of the linear algebra library
_SQUARE = 1e76  # below the square of the largest float32


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of an element type of the IR, e.g. float32 for ``"f32"``."""
    if name == "bf16":
        import ml_dtypes  # numpy itself has no bfloat16

        dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return dtype
    return np.dtype(_DTYPES[name])


class Edge:
    """The input side of one signature.

    Args:
        signature: what the graph takes.
        device: where its program runs, if that has a memory of its own: tensors that lie there stay there.

    Attributes:
        quick: of a table, what `single` does with an array.
    """

    def __init__(self, signature: Signature, device: DLDevice | None = None) -> None:
        self._inputs = signature.inputs
        self._names = tuple(spec.name for spec in signature.inputs)
        self._dtypes = tuple(numpy_dtype(spec.dtype) for spec in signature.inputs)
        self._limits = {name: limits for name, limits in signature.symbols.items() if limits != (0, None)}
        self._nesting = Nesting(() if signature.table else self._names)
        plain = self._nesting.is_flat and len(self._inputs) == 1 and self._inputs[0].limits is None
        self._only = self._dtypes[0] if plain else None
        self._table = _TableReader(signature.table, self._dtypes) if signature.table else None
        self.quick = self._table.quick if self._table else None
        self._device = device

    def read(self, inputs: object) -> list[Array]:
        """The graph's inputs.

        Args:
            inputs: a list or tuple with one item for each input, a mapping from input names, or the single input
                itself. A tabular model has one input, the table; a mapping from its feature names to columns is a table
                too. A model whose inputs are nested takes them as its source does, see `nested`.

        Returns:
            Host arrays; in the place of a tensor in the memory of the program's device a `DeviceArray`.

        Raises:
            InputError: wrong count, name, dtype, shape or value.
        """
        array = self.single(inputs)
        return self.read_closely(inputs) if array is None else [array]

    def read_closely(self, inputs: object) -> list[Array]:
        """`read` for what `single` leaves to it."""
        if not self._nesting.is_flat:
            items: Sequence[object] = self._nesting.flatten(inputs)
        elif isinstance(inputs, list | tuple):
            items = inputs
        elif isinstance(inputs, Mapping):
            items = self._by_name(inputs)
        else:
            items = (inputs,)
        expected = 1 if self._table else len(self._inputs)
        if len(items) != expected:
            names = "the table" if self._table else ", ".join(self._names)
            raise InputError(
                f"expected {plural(expected, 'input')} ({names}), got {len(items)}",
                code="E_INPUT_COUNT",
                hint="pass a list with one array for each input, e.g. run([x])",
            )
        if self._table:
            return self._table.read(items[0])
        return [self._take(*given) for given in zip(items, self._inputs, self._dtypes, strict=True)]

    def single(self, inputs: object) -> Array | None:
        """What `read` gives, where that is one array that is right as it comes; None: `read_closely` has to look."""
        if (type(inputs) is list or type(inputs) is tuple) and len(inputs) == 1:
            inputs = inputs[0]
        if type(inputs) is not np.ndarray:
            return None
        table = self._table
        if table is not None:
            return table.quick(inputs)
        return inputs if inputs.dtype is self._only else None

    def _take(self, item: object, spec: TensorSpec, dtype: np.dtype[Any]) -> Any:
        """One input of a model without a table."""
        if self._device is not None:
            where = device_of(item)
            if where is not None and where.kind == self._device.kind:
                return _borrowed(item, spec, dtype, self._device)
        array = _cast(as_array(item, spec.name), dtype, f"input {spec.name!r}")
        if spec.limits is not None and array.size:
            _check_limits(array, spec.name, *spec.limits)
        return array

    def bind(self, arrays: Sequence[Array]) -> dict[str, int]:
        """The values of the symbolic dims.

        Raises:
            InputError: a fixed extent differs, one symbol has two values, or a value is outside its limits.
        """
        binding: dict[str, int] = {}
        computed = False
        for array, spec in zip(arrays, self._inputs, strict=True):
            if array.ndim != len(spec.shape):
                raise _shape_error(spec, array, f"{len(spec.shape)} dimensions, not {array.ndim}")
            for axis, (extent, dim) in enumerate(zip(array.shape, spec.shape, strict=True)):
                if isinstance(dim, int):
                    if extent != dim:
                        raise _shape_error(spec, array, f"axis {axis} must be {dim}, not {extent}")
                elif dim.isidentifier():
                    if binding.setdefault(dim, extent) != extent:
                        raise _shape_error(
                            spec, array, f"axis {axis} must be {dim} = {binding[dim]} as elsewhere, not {extent}"
                        )
                else:
                    computed = True
        if computed:
            self._bind_computed(arrays, binding)
        for name, (least, most) in self._limits.items():
            value = binding.get(name)
            if value is not None and (value < least or (most is not None and value > most)):
                upper = "" if most is None else f" and at most {most}"
                raise InputError(
                    f"{name} must be at least {least}{upper}, got {value}",
                    code="E_INPUT_SHAPE",
                    hint="the model was exported or traced for these sizes alone: do that again with bounds or examples for others",
                )
        return binding

    def _bind_computed(self, arrays: Sequence[Array], binding: dict[str, int]) -> None:
        computed = [
            (spec, array, axis, extent, dim)
            for array, spec in zip(arrays, self._inputs, strict=True)
            for axis, (extent, dim) in enumerate(zip(array.shape, spec.shape, strict=True))
            if isinstance(dim, str) and not dim.isidentifier()
        ]
        computed.sort(
            key=lambda found: len(symbols_of(found[-1]))
        )  # what is wrong shows where no other symbol has a part in it
        for *_, extent, dim in computed:
            binding.update(solved(dim, extent, binding))
        for spec, array, axis, extent, dim in computed:
            value = evaluate(dim, binding)
            if value != extent:
                factor = re.fullmatch(r"(\d+)\*\w+", dim)
                equals = f" = {value}" if value is not None else f", a multiple of {factor[1]}" if factor else ""
                raise _shape_error(spec, array, f"axis {axis} must be {dim}{equals}, not {extent}")

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of what the source takes, in order: of a tabular model the table, of a network the arguments of its module."""
        return ("X",) if self._table else self._nesting.arguments

    def _by_name(self, inputs: Mapping[Any, object]) -> Sequence[object]:
        names = self._names
        if self._table:
            features = self._table.spec.feature_names or ()
            if set(features) & set(inputs):
                return ({name: inputs[name] for name in features if name in inputs} | dict(inputs),)
            if len(inputs) == 1 and ("X" in inputs or (len(names) == 1 and names[0] in inputs)):
                return tuple(inputs.values())
            columns = f", or its columns by name ({_listed(features)})" if features else ""
            raise InputError(
                f"expected the input X{columns}; got {_listed(inputs) or 'an empty mapping'}",
                code="E_INPUT_NAME",
                hint="pass the table itself, or {'X': table}" + (", or {column: values, ...}" if features else ""),
            )
        missing = [name for name in names if name not in inputs]
        unexpected = [str(name) for name in inputs if name not in names]
        if missing or unexpected:
            raise InputError(
                f"expected the inputs {', '.join(names)}; "
                + "; ".join(
                    f"{what}: {', '.join(which)}"
                    for what, which in (("missing", missing), ("unexpected", unexpected))
                    if which
                ),
                code="E_INPUT_NAME",
                hint="pass the inputs under these names, or a list of them in this order",
            )
        return [inputs[name] for name in names]


def _shape_error(spec: TensorSpec, array: Array, why: str) -> InputError:
    return InputError(
        f"input {spec.name!r}: expected shape {_shape_text(spec.shape)}, got {_shape_text(array.shape)}: {why}",
        code="E_INPUT_SHAPE",
        hint="pass an array of this shape; a name stands for any extent",
    )


def _borrowed(item: Any, spec: TensorSpec, dtype: np.dtype[Any], device: DLDevice) -> DeviceArray:
    """An input where it lies on the device; its values are only looked at, by its library, where they are positions in a table."""
    array = borrow(item, spec.name, device)
    if array.dtype != dtype.name:
        raise InputError(
            f"input {spec.name!r}: expected {dtype.name}, got {array.dtype} on {device}",
            code="E_INPUT_DTYPE",
            hint=f"inputs on a device are taken as they are: convert it there, e.g. x.to(torch.{dtype.name})",
        )
    if spec.limits is not None and array.nbytes:
        if not hasattr(item, "min"):
            raise InputError(
                f"input {spec.name!r} picks entries {spec.limits[0]} to {spec.limits[1]}, and {type(item).__name__} on {device} "
                "has no methods min and max to check that",
                code="E_INPUT_DTYPE",
                hint="pass a torch tensor, a cupy array, or a host array",
            )
        _check_limits(item, spec.name, *spec.limits)
    return array


def _listed(names: Iterable[object]) -> str:
    """The first of some names."""
    first = [str(name) for name in itertools.islice(names, 9)]
    return ", ".join(first[:8]) + (", ..." if len(first) > 8 else "")


def _shape_text(shape: Sequence[int | str]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def as_array(value: Any, name: str) -> Array:
    """Any array-like as a numpy array, without a copy where that is possible; a torch tensor on a device is copied to the host.

    Raises:
        InputError: it is no rectangular array, lies on another device, or is sparse.
    """
    if type(value) is np.ndarray:
        array: Array = value
        return array
    if hasattr(value, "detach") and hasattr(value, "cpu"):  # a torch tensor
        if getattr(value, "is_meta", False):
            raise InputError(
                f"input {name!r}: expected an array, got a tensor on the meta device, which has no elements",
                code="E_INPUT_DTYPE",
                hint="pass a tensor with values",
            )
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # not known to numpy, and exact in float32
            value = value.float()
    if hasattr(value, "tocsr"):
        raise InputError(
            f"input {name!r}: expected a dense array, got a sparse {type(value).__name__}",
            code="E_INPUT_DTYPE",
            hint="pass x.toarray()",
        )
    try:
        if hasattr(value, "to_numpy"):  # a DataFrame or Series
            return np.asarray(value.to_numpy())
        if hasattr(value, "__dlpack__") and not isinstance(value, np.ndarray | np.generic):
            return np.from_dlpack(value)
        array = np.asarray(value)
        if array.dtype.kind in "SU" and isinstance(value, list | tuple):  # numbers among them became text
            array = np.asarray(value, object)
    except (ValueError, TypeError, BufferError, RuntimeError) as error:
        where = device_of(value)
        away = where is not None and not where.is_host
        raise InputError(
            f"input {name!r}: {type(value).__name__} could not be read as an array: {error}",
            code="E_INPUT_DTYPE",
            hint=f"it lies on {where}: copy it to the host, e.g. x.get() of cupy"
            if away
            else "every row must have as many values as the others"
            if isinstance(value, list | tuple)
            else _ARRAY_LIKE,
        ) from error
    if array.dtype.kind in "OSU" and not array.ndim and not isinstance(value, int | np.ndarray | np.generic):
        raise InputError(
            f"input {name!r}: expected an array, got {type(value).__name__}", code="E_INPUT_DTYPE", hint=_ARRAY_LIKE
        )
    return array


def _check_limits(array: Any, name: str, least: int, most: int) -> None:
    """Refuses positions outside the table that they pick from."""
    if array.min() < least or array.max() > most:
        wrong = int(array[(array < least) | (array > most)][0])
        raise InputError(
            f"input {name!r} picks entries {least} to {most}, got {wrong}",
            code="E_INPUT_VALUE",
            hint="these are positions in a table of the model: check the encoding of the input",
        )


def _cast(array: Array, dtype: np.dtype[Any], where: str) -> Array:
    """The array with the element type that the graph takes, where that loses nothing the model could see.

    Integers become floats and float64 becomes the graph's float type; floats become integers only if each is integral.
    """
    if array.dtype == dtype:
        return array
    if array.dtype.kind == "O":
        array = _numbers(array, where)
    kind = array.dtype.kind
    if kind == "V" and array.dtype.name in ("bfloat16", "float8_e4m3fn"):
        kind = "f"
    else:
        _checked(array, dtype.name, where)
    if dtype.kind in "fV":
        with np.errstate(over="ignore"):  # too large a number becomes infinity, which `numbers` then judges
            return array.astype(dtype)
    if kind == "b":
        return array.astype(dtype)
    least, most = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    if kind == "f":
        # The largest float64 below 2**63 is 2**63 - 1024: comparing with `most` itself would round up.
        fits = (array >= least) & (array < most + 1.0) & (array == np.trunc(array))
    elif np.can_cast(array.dtype, dtype):
        return array.astype(dtype)
    else:
        fits = (array >= least) & (array <= most)
    if not fits.all():
        position = tuple(int(i) for i in np.argwhere(~fits)[0])
        raise InputError(
            f"{where}: expected {dtype.name}, got {array.dtype.name} with {array[position]} at {_shape_text(position)}",
            code="E_INPUT_DTYPE",
            hint=f"the values must be whole numbers from {least} to {most}",
        )
    return array.astype(dtype)


def _checked(array: Array, expected: str, where: str) -> Array:
    """The array, unless its elements are no real numbers."""
    if array.dtype.kind not in "biuf":
        what, hint = _no_numbers(array.dtype)
        raise InputError(f"{where}: expected {expected}, got {what}", code="E_INPUT_DTYPE", hint=hint)
    return array


_RECORDS = "make columns of the fields: pandas.DataFrame(x)"


def _no_numbers(dtype: np.dtype[Any]) -> tuple[str, str]:
    """What elements are that are no real numbers, with numpy's name for them, and what to pass instead."""
    if dtype.names is not None:
        return f"records of {_listed(dtype.names)}", f"numbers have one type each: {_RECORDS}"
    encode = "encode them as the model saw them in training"
    what, hint = {
        "c": ("complex numbers", "pass the real and imaginary parts as the model expects them"),
        "M": ("dates", f"dates are no numbers: {encode}"),
        "m": ("time spans", f"divide them by their unit, e.g. x / numpy.timedelta64(1, 's'), or {encode}"),
        "V": ("raw bytes", "say what they are: x.view(dtype)"),
    }.get(
        dtype.kind,
        (
            "text",
            "numbers held as text are converted by x.astype(float); encode words as the model saw them in training",
        ),
    )
    return f"{what} (dtype {dtype})", hint


def _numbers(array: Array, where: str) -> Array:
    """An array of Python objects as an array of numbers; missing values become NaN."""
    values = array.ravel().tolist()
    unusual = () if _PLAIN.issuperset(map(type, values)) else enumerate(values)
    for position, value in unusual:
        if _is_missing(value):
            values[position] = math.nan
        elif not isinstance(value, int | float | np.number | np.bool_):
            place = tuple(int(i) for i in np.unravel_index(position, array.shape))
            raise InputError(
                f"{where}: expected numbers, got {value!r} ({type(value).__name__}) at {_shape_text(place)}",
                code="E_INPUT_DTYPE",
                hint="convert it as for training, e.g. strings by float() or by the encoder used there",
            )
    numbers = np.array(values, dtype=None if values else np.float64)
    if numbers.dtype.kind == "O":  # integers beyond 64 bits
        try:
            numbers = numbers.astype(np.float64)
        except OverflowError as error:
            raise InputError(
                f"{where}: {error}", code="E_INPUT_VALUE", hint="pass numbers that a float64 can hold: below 1.8e308"
            ) from error
    return numbers.reshape(array.shape)


def _is_missing(value: object) -> bool:
    """Whether a value stands for a missing one: None, NaN, pandas.NA, NaT."""
    if value is None:
        return True
    if isinstance(value, float | np.floating):
        return bool(value != value)
    return type(value).__name__ in ("NAType", "NaTType")


class _TableReader:
    """Splits a table into the graph's inputs as a `TableSpec` says."""

    def __init__(self, spec: TableSpec, dtypes: Sequence[np.dtype[Any]]) -> None:
        self.spec = spec
        every = tuple(range(spec.n_features))
        self._read = sorted({column for feed in spec.feeds for column in feed.columns})
        self._feeds = [
            (feed, feed.columns == every, [_Coder(coding) for coding in feed.codings], dtype)
            for feed, dtype in zip(spec.feeds, dtypes, strict=True)
        ]

        feed, whole, coders, dtype = self._feeds[0] if len(self._feeds) == 1 else (None, False, [], None)
        plain = feed is not None and whole and not coders and dtype is not None and dtype.char in "fd"
        self._plain = dtype if plain else None
        self._width = spec.n_features if plain else None
        self._accepted = (feed.numbers if feed is not None else None) or spec.numbers

    def read(self, table: object) -> list[Array]:
        """One array of shape (n, columns) for each feed."""
        columns: _Frame | _Matrix
        if type(table) is not np.ndarray and _is_frame(table):
            columns = _Frame(table)
            if self.spec.by_name and self.spec.feature_names and all(isinstance(name, str) for name in columns.names):
                columns.arrange(self.spec.feature_names, self._read)
            else:
                self._check_names(columns.names)
        else:
            columns = _Matrix(as_array(table, "X"))
        rows, width = columns.shape
        if width != self.spec.n_features:
            raise InputError(
                f"X has {width} features, but the model expects {self.spec.n_features} features as input",
                code="E_INPUT_SHAPE",
                hint="pass the columns of the training data in their order"
                + (f": {_listed(self.spec.feature_names)}" if self.spec.feature_names else ""),
            )
        arrays = []
        for feed, whole, coders, dtype in self._feeds:
            if coders:
                codes = np.empty((rows, len(coders)), dtype)
                for i, (coder, column) in enumerate(zip(coders, feed.columns, strict=True)):
                    codes[:, i] = columns.codes(column, coder, self._name(column))
                arrays.append(codes)
                continue
            numbers = columns.numbers(None if whole else feed.columns)
            array = _cast(numbers, dtype, "X")
            accepted = feed.numbers or self.spec.numbers
            if accepted != "any" and numbers.dtype.kind not in "biu":
                self._check_numbers(array, numbers, feed.columns, accepted)
            arrays.append(array)
        return arrays

    def quick(self, table: Array) -> Array | None:
        """The one input of the graph for a table of few plain numbers; None: `read` must look closer."""
        dtype = table.dtype
        if table.ndim != 2 or table.shape[1] != self._width or (dtype is not self._plain and dtype.char not in "fd"):
            return None
        if self._accepted == "any" and dtype is self._plain:
            return table
        # A sum of squares that is finite has no NaN or infinity in it, and one as small no number beyond float32.
        # (`vdot`, as other products warn of what overflows; `float`, as so does comparing a float32 with more than it holds.)
        if table.size <= _FEW and float(vdot(table, table)) < _SQUARE:
            return table if dtype is self._plain else table.astype(self._plain)
        if self._accepted == "nan" and dtype is self._plain and not count_nonzero(isinf(table)):
            return table
        return None

    def _check_names(self, names: Sequence[object]) -> None:
        """The check scikit-learn makes: the columns of the fit, in its order."""
        expected = self.spec.feature_names
        if expected is None or not all(isinstance(name, str) for name in names) or tuple(names) == expected:
            return
        unseen = sorted(str(name) for name in set(names) - set(expected))
        missing = sorted(set(expected) - {str(name) for name in names})
        notes = [f"not seen when the model was fitted: {', '.join(unseen)}"] if unseen else []
        notes += [f"seen when the model was fitted, and missing now: {', '.join(missing)}"] if missing else []
        if notes:
            raise InputError(
                "the column names differ from those the model was fitted with",
                code="E_INPUT_NAME",
                notes=tuple(notes),
                hint=f"the table needs the columns {_listed(expected)}, in this order; a file has their names in its first row",
            )
        raise InputError(
            "the columns are not in the order the model was fitted with",
            code="E_INPUT_NAME",
            notes=(f"expected: {', '.join(expected)}", f"got: {', '.join(map(str, names))}"),
            hint="select them in order: X[names]",
        )

    def _check_numbers(self, array: Array, given: Array, positions: Sequence[int], accepted: str) -> None:
        bad = np.isinf(array) if accepted == "nan" else ~np.isfinite(array)
        if not bad.any():
            return
        row, column = (int(i) for i in np.argwhere(bad)[0])
        value = given[row, column]
        what = (
            "NaN"
            if np.isnan(value)
            else "infinity"
            if np.isinf(value)
            else f"{value}, too large for {array.dtype.name}"
        )
        raise InputError(
            f"X contains {what} at row {row}, column {self._name(positions[column])}",
            code="E_INPUT_VALUE",
            hint="the source model refuses it too: "
            + ("impute or drop such rows" if what == "NaN" else "replace such values, or drop their rows"),
        )

    def _name(self, column: int) -> str:
        names = self.spec.feature_names
        return f"{column} ({names[column]!r})" if names else str(column)


class _Coder(dict[Any, int]):
    """The code of each value that one column may hold; what is missing or unknown gets the model's code for that."""

    def __init__(self, coding: Coding) -> None:
        codes = coding.codes if coding.codes is not None else range(len(coding.categories))
        super().__init__(zip(coding.categories, codes, strict=True))
        self._missing = self.get(None, coding.missing)
        self._nan = self._missing if coding.nan is None else coding.nan
        if coding.none is not None:
            self[None] = coding.none
        self._unknown = coding.unknown
        self._known = coding.categories
        self._last: tuple[Any, _Codes] = None, np.empty(0, np.int64)  # categories of pandas, and their codes

    def __missing__(self, value: object) -> int:
        """The code of a value that is not listed.

        Raises:
            KeyError: the model has none for it.
        """
        code = self._other(value)
        if code is None:
            raise KeyError(value)
        return code

    def _other(self, value: object) -> int | None:
        if not _is_missing(value):
            return self._unknown
        return self._nan if isinstance(value, float | np.floating) else self._missing

    def encode(self, values: Sequence[Any], column: str) -> _Codes:
        """The code of each value.

        Raises:
            InputError: a missing or unknown value for which the model has no code.
        """
        try:
            return np.fromiter(map(self.__getitem__, values), np.int64, len(values))
        except KeyError as error:
            raise self._unlisted(values, column) from error
        except TypeError as error:
            raise InputError(
                f"column {column}: expected plain values: {error}",
                code="E_INPUT_DTYPE",
                hint="pass text, numbers or None in this column",
            ) from error

    def encode_categorical(self, array: Any, column: str) -> _Codes | None:
        """The code of each value of a categorical array of pandas; None if a category has none, be it in a row or not, or if values
        are missing that have none.
        """
        categories, codes = self._last
        try:
            if array.categories is not categories:
                codes = self.encode(array.categories.tolist(), column)
                self._last = array.categories, codes
            places: Array = array.codes
            missing = places < 0
            if not missing.any():
                return codes[places]
            first = int(missing.argmax())
            of_missing = self.encode(array[first : first + 1].tolist(), column)
        except InputError:
            return None
        codes = np.append(codes, of_missing)
        return codes[places]  # -1 stands for the last one

    def _unlisted(self, values: Sequence[Any], column: str) -> InputError:
        """The error for the first value without a code."""
        row, value = next((i, v) for i, v in enumerate(values) if v not in self and self._other(v) is None)
        known = ", ".join(map(repr, self._known[:8])) + (", ..." if len(self._known) > 8 else "")
        return InputError(
            f"column {column}, row {row}: "
            + ("the value is missing" if _is_missing(value) else f"unknown category {value!r}")
            + f"; the model knows {known}",
            code="E_INPUT_VALUE",
            hint="the source model refuses it too: encode it as in training, impute it, or drop such rows",
        )


def _is_frame(table: object) -> bool:
    """Whether the columns of a table must be read one by one: a DataFrame, or a mapping from names to columns."""
    return isinstance(table, Mapping) or (hasattr(table, "columns") and hasattr(table, "to_numpy"))


class _Matrix:
    """A table in one two-dimensional array."""

    def __init__(self, array: Array) -> None:
        if array.ndim == 1 and array.dtype.kind == "O" and array.size and isinstance(array[0], Mapping):
            raise InputError(
                f"expected a 2-D array with a row for each sample, got a list of {type(array[0]).__name__}",
                code="E_INPUT_DTYPE",
                hint="of rows by name make a DataFrame: pandas.DataFrame(rows)",
            )
        if array.dtype.names is not None:
            raise InputError(
                f"expected a 2-D array with a row for each sample, got {_no_numbers(array.dtype)[0]}",
                code="E_INPUT_DTYPE",
                hint=_RECORDS,
            )
        if array.ndim != 2:
            raise InputError(
                "expected a 2-D array with a row for each sample, got "
                + ("a scalar" if not array.ndim else f"a {array.ndim}-D array of shape {_shape_text(array.shape)}"),
                code="E_INPUT_SHAPE",
                hint="for a single row pass x.reshape(1, -1), for a single feature x.reshape(-1, 1)",
            )
        self._array = array
        self.shape: tuple[int, int] = array.shape

    def numbers(self, positions: Sequence[int] | None) -> Array:
        """These columns (None: all) as an array of shape (n, columns)."""
        part = self._array if positions is None else self._array[:, list(positions)]
        return _numbers(part, "X") if part.dtype.kind == "O" else part

    def codes(self, position: int, coder: _Coder, name: str) -> _Codes:
        """The code of each value of one column."""
        return coder.encode(self._array[:, position].tolist(), name)


class _Frame:
    """A table by columns: a pandas or polars DataFrame, or a mapping from names to columns."""

    def __init__(self, table: Any) -> None:
        self._table = table
        names = table if isinstance(table, Mapping) else table.columns
        self.names: list[object] = names.tolist() if hasattr(names, "tolist") else list(names)  # pandas is quicker so
        if isinstance(table, Mapping):
            for name, column in table.items():
                if not hasattr(column, "__len__") or isinstance(column, str | bytes | Mapping) or not np.ndim(column):
                    raise InputError(
                        f"column {name!r}: expected a sequence of values, got {type(column).__name__}",
                        code="E_INPUT_DTYPE",
                        hint="a mapping has whole columns, {name: values, ...}; of rows by name make pandas.DataFrame(rows)",
                    )
            lengths = {len(column) for column in table.values()}
            if len(lengths) > 1:
                raise InputError(
                    f"the columns have different lengths: {sorted(lengths)}",
                    code="E_INPUT_SHAPE",
                    hint="give each column one value for each row",
                )
            rows = lengths.pop() if lengths else 0
        else:
            rows = len(table)
        self.shape = (rows, len(self.names))
        self._positions: list[int] | None = None
        self._given = self.names

    def arrange(self, names: Sequence[str], needed: Sequence[int]) -> None:
        """From now on, position i is the column called ``names[i]``; only those at ``needed`` must be there.

        Raises:
            InputError: naming the columns that are missing.
        """
        places = {name: position for position, name in reversed(list(enumerate(self.names)))}
        missing = [names[i] for i in needed if names[i] not in places]
        if missing:
            raise InputError(
                f"columns are missing: {', '.join(missing)}",
                code="E_INPUT_NAME",
                hint=f"the model reads {', '.join(names[i] for i in needed)}",
            )
        if list(names) != self.names:
            self._positions = [places.get(name, -1) for name in names]
            self.names = list(names)
            self.shape = (self.shape[0], len(names))

    def numbers(self, positions: Sequence[int] | None) -> Array:
        """These columns (None: all) as an array of shape (n, columns)."""
        if positions is None and self._positions is None and not isinstance(self._table, Mapping):
            matrix = np.asarray(self._table.to_numpy())
            if matrix.dtype.kind in "biuf":
                return matrix
        positions = range(len(self.names)) if positions is None else positions
        parts = []
        for position in positions:
            column = self._column(position)
            array = column if type(column) is np.ndarray else np.asarray(column.to_numpy())
            if array.dtype.kind not in "biuf":
                where = f"column {self.names[position]!r}"
                array = _numbers(array, where) if array.dtype.kind == "O" else _checked(array, "numbers", where)
            parts.append(array)
        if self.shape[0] <= _FEW_ROWS:
            return np.array(parts).T if parts else np.empty((self.shape[0], 0))
        return np.stack(parts, axis=1) if parts else np.empty((self.shape[0], 0))

    def codes(self, position: int, coder: _Coder, name: str) -> _Codes:
        """The code of each value of one column."""
        column = self._column(position)
        array = getattr(column, "array", column)
        if hasattr(array, "categories"):
            codes = coder.encode_categorical(array, name)
            if codes is not None:
                return codes
        return coder.encode(column.tolist() if hasattr(column, "tolist") else column.to_list(), name)

    @cached_property
    def _arrays(self) -> Sequence[Any] | None:
        """The arrays of a pandas table's columns, where this pandas has a function for them: columns by name take it ten times as long."""
        arrays_of = getattr(self._table, "_iter_column_arrays", None)
        arrays = list(arrays_of()) if arrays_of is not None else []
        return arrays if len(arrays) == len(self._given) else None

    @cached_property
    def _told_apart(self) -> bool:
        """Whether the names of the table tell its columns apart."""
        names = self._given
        return all(isinstance(name, str) for name in names) and len(set(names)) == len(names)

    def _column(self, position: int) -> Any:
        place = position if self._positions is None else self._positions[position]
        if self._arrays is not None:
            return self._arrays[place]
        if isinstance(self._table, Mapping):
            return np.asarray(self._table[self.names[position]])
        if self._told_apart:
            return self._table[self._given[place]]  # takes pandas a third of the time that positions take
        if hasattr(self._table, "iloc"):
            return self._table.iloc[:, place]
        return self._table[:, place]
