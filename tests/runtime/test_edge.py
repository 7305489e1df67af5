"""What users may pass, what the graph gets, and what is refused in which words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlec.errors import InputError
from mlec.runtime.edge import Edge
from mlec.signature import Coding, ColumnFeed, Signature, TableSpec, TensorSpec

pd = pytest.importorskip("pandas")
pl = pytest.importorskip("polars")

NET = Signature((TensorSpec("x", "f32", ("n", 3)),), ())
IDS = Signature((TensorSpec("ids", "i32", ("n", "t")), TensorSpec("mask", "bool", ("n", "t"))), ())


def table(names: tuple[str, ...] | None = None, numbers: Any = "any", dtype: str = "f32") -> Edge:
    spec = TableSpec(3, (ColumnFeed((0, 1, 2)),), names, numbers)
    return Edge(Signature((TensorSpec("X", dtype, ("n", 3)),), (), table=spec))


def mixed(**coding: Any) -> Edge:
    """Columns age, city, size: the outer two are numbers, city is coded."""
    city = Coding(("bern", "paris"), **coding)
    spec = TableSpec(3, (ColumnFeed((0, 2)), ColumnFeed((1,), (city,))), ("age", "city", "size"))
    inputs = (TensorSpec("numbers", "f32", ("n", 2)), TensorSpec("codes", "i64", ("n", 1)))
    return Edge(Signature(inputs, (), table=spec))


def refused(edge: Edge, inputs: object) -> InputError:
    with pytest.raises(InputError) as caught:
        edge.bind(edge.read(inputs))
    return caught.value


def test_integers_beyond_64_bits() -> None:
    assert table(dtype="f64").read([[[10**30, 1, 2]]])[0].tolist() == [[1e30, 1.0, 2.0]]
    assert refused(table(), [[[10**400, 1, 2]]]).code == "E_INPUT_VALUE"


def test_a_list_of_mixed_rows_is_as_the_array_of_them() -> None:
    rows = [[30.5, "bern", 2], [41, "paris", None]]
    edge = mixed()
    for given in (rows, [tuple(row) for row in rows], tuple(rows)):
        numbers, codes = edge.read([given])
        np.testing.assert_array_equal(numbers, np.array([[30.5, 2], [41, np.nan]], np.float32))
        assert codes.tolist() == [[0], [1]]
    assert edge.read([[[1, "bern", 2]]])[0].tolist() == [[1.0, 2.0]], (
        "no missing value that makes numpy keep the objects"
    )


def test_what_is_no_number_is_named_as_numpy_names_it() -> None:
    for given, says, hint in (
        (np.array([["1", "2", "3"]]), "got text (dtype <U1)", "x.astype(float)"),
        (np.zeros((1, 3), "M8[s]"), "got dates (dtype datetime64[s])", "dates"),
        (np.zeros((1, 3), "m8[s]"), "got time spans (dtype timedelta64[s])", "timedelta64(1, 's')"),
        (np.zeros((1, 3), "c16"), "got complex numbers (dtype complex128)", "imaginary"),
        (np.zeros((1, 3), "V4"), "got raw bytes (dtype |V4)", "x.view"),
        (np.zeros(3, [("a", "f4"), ("b", "f4")]), "got records of a, b", "pandas.DataFrame(x)"),
    ):
        error = refused(table(), [given])
        assert says in error.message
        assert hint in str(error.hint)
        assert error.code == "E_INPUT_DTYPE"


class TestNetworks:
    @pytest.mark.parametrize(
        "value",
        [
            [[1, 2, 3], [4, 5, 6]],
            np.array([[1.0, 2, 3], [4, 5, 6]]),
            np.array([[1, 2, 3], [4, 5, 6]], np.uint8),
            np.array([[1, 2, 3], [4, 5, 6]], object),
            np.array([[1, 2, 3], [4, 5, 6]], ">f4"),
            np.array([[1, 4], [2, 5], [3, 6]], np.float32).T,
            pd.DataFrame({"a": [1, 4], "b": [2, 5], "c": [3.0, 6.0]}),
            pl.DataFrame({"a": [1, 4], "b": [2, 5], "c": [3.0, 6.0]}),
        ],
        ids=["list", "float64", "uint8", "object", "big-endian", "transposed", "pandas", "polars"],
    )
    def test_array_likes(self, value: Any) -> None:
        (x,) = Edge(NET).read([value])
        assert x.dtype == np.float32
        assert x.dtype.isnative
        np.testing.assert_array_equal(x, [[1, 2, 3], [4, 5, 6]])

    def test_right_array_is_passed_as_it_is(self) -> None:
        x = np.ones((2, 3), np.float32)
        assert Edge(NET).read([x])[0] is x

    def test_torch_tensors(self) -> None:
        torch = pytest.importorskip("torch")
        x = torch.arange(6.0).reshape(2, 3)
        (got,) = Edge(NET).read(x)
        assert got.ctypes.data == x.data_ptr()
        for tensor in (x.double(), x.clone().requires_grad_(), x.bfloat16(), x.half(), x.long(), x.T.contiguous().T):
            np.testing.assert_array_equal(Edge(NET).read([tensor])[0], x.numpy())

    def test_by_name(self) -> None:
        ids, mask = np.ones((2, 5), np.int32), np.ones((2, 5), bool)
        got = Edge(IDS).read({"mask": mask, "ids": ids})
        assert got[0] is ids
        assert got[1] is mask
        error = refused(Edge(IDS), {"ids": ids, "msak": mask})
        assert error.message == "expected the inputs ids, mask; missing: mask; unexpected: msak"

    def test_count(self) -> None:
        error = refused(Edge(IDS), [np.ones((2, 5), np.int32)])
        assert error.message == "expected 2 inputs (ids, mask), got 1"
        assert error.code == "E_INPUT_COUNT"

    @pytest.mark.parametrize(
        ("shape", "why"),
        [((2, 4), "axis 1 must be 3, not 4"), ((3,), "2 dimensions, not 1"), ((1, 2, 3), "2 dimensions, not 3")],
    )
    def test_shape(self, shape: tuple[int, ...], why: str) -> None:
        error = refused(Edge(NET), [np.ones(shape, np.float32)])
        assert error.code == "E_INPUT_SHAPE"
        assert error.message.startswith("input 'x': expected shape (n, 3), got (")
        assert error.message.endswith(why)

    def test_symbols_are_the_same_everywhere(self) -> None:
        edge = Edge(IDS)
        arrays = edge.read([np.ones((2, 5), np.int32), np.ones((2, 5), bool)])
        assert edge.bind(arrays) == {"n": 2, "t": 5}
        error = refused(edge, [np.ones((2, 5), np.int32), np.ones((2, 6), bool)])
        assert "axis 1 must be t = 5 as elsewhere, not 6" in error.message

    def test_limits_and_expressions(self) -> None:
        inputs = (TensorSpec("x", "f32", ("2*t+1",)), TensorSpec("y", "f32", ("t",)))
        edge = Edge(Signature(inputs, (), symbols={"t": (1, 4)}))
        assert edge.bind([np.ones(5), np.ones(2)]) == {"t": 2}
        assert "axis 0 must be 2*t+1 = 5, not 6" in refused(edge, [np.ones(6), np.ones(2)]).message
        assert "t must be at least 1 and at most 4, got 5" in refused(edge, [np.ones(11), np.ones(5)]).message
        assert "got 0" in refused(edge, [np.ones(1), np.ones(0)]).message

    def test_symbols_that_only_expressions_tell(self) -> None:
        inputs = (
            TensorSpec("x", "f32", ("n+t", 3)),
            TensorSpec("y", "f32", ("2*n",)),
            TensorSpec("z", "f32", ("3*t+1",)),
        )
        edge = Edge(Signature(inputs, (), symbols={"n": (0, 4)}))

        def given(x: int, y: int, z: int) -> list[Any]:
            return [np.ones(shape, np.float32) for shape in ((x, 3), y, z)]

        assert edge.bind(given(5, 4, 10)) == {"n": 2, "t": 3}
        assert edge.bind(given(0, 0, 1)) == {"n": 0, "t": 0}
        assert "axis 0 must be n+t = 5, not 6" in refused(edge, given(6, 4, 10)).message
        assert "axis 0 must be 3*t+1 = 10, not 9" in refused(edge, given(5, 4, 9)).message
        assert "n must be at least 0 and at most 4, got 5" in refused(edge, given(8, 10, 10)).message
        alone = Edge(Signature((TensorSpec("y", "f32", ("2*n",)),), ()))
        assert "axis 0 must be 2*n, a multiple of 2, not 65" in refused(alone, [np.ones(65, np.float32)]).message

    @pytest.mark.parametrize("value", [[[1.0, 2.0]], [[True, False]], np.array([[1, 2]], np.uint64), [[-0.0, 7.0]]])
    def test_integral_values_become_integers(self, value: Any) -> None:
        (x,) = Edge(Signature((TensorSpec("x", "i64", ("n", 2)),), ())).read([value])
        assert x.dtype == np.int64
        np.testing.assert_array_equal(x, value)

    @pytest.mark.parametrize(
        ("dtype", "value"),
        [
            ("i64", 1.5),
            ("i64", np.nan),
            ("i64", np.inf),
            ("i64", 2.0**63),
            ("i64", np.uint64(2**63)),
            ("i32", 2**31),
            ("i8", 128.0),
            ("u8", -1),
            ("bool", 2),
            ("bool", 0.5),
        ],
    )
    def test_nothing_is_cut_to_an_integer(self, dtype: str, value: Any) -> None:
        edge = Edge(Signature((TensorSpec("x", dtype, ("n", 2)),), ()))
        error = refused(edge, [np.array([[0, 0], [0, value]])])
        assert error.code == "E_INPUT_DTYPE"
        assert "(1, 1)" in error.message

    @pytest.mark.parametrize("dtype", ["i64", "i32", "i16", "i8", "u8"])
    def test_integer_extremes_pass(self, dtype: str) -> None:
        from mlec.runtime.edge import numpy_dtype

        info = np.iinfo(numpy_dtype(dtype))
        values = np.array([info.min, info.max], object)
        (x,) = Edge(Signature((TensorSpec("x", dtype, (2,)),), ())).read([values])
        assert x.tolist() == [info.min, info.max]

    @pytest.mark.parametrize(
        "value",
        [
            np.array([["1", "2", "3"]]),
            np.array([["1", 2, 3]], object),
            np.array([[1j, 2, 3]]),
            np.array([["2020-01-01"] * 3], "M8[D]"),
            [[1, 2], [3]],
            object(),
        ],
        ids=["text", "text among numbers", "complex", "dates", "ragged", "object"],
    )
    def test_what_is_no_number(self, value: Any) -> None:
        assert refused(Edge(NET), [value]).code == "E_INPUT_DTYPE"

    def test_sparse_is_refused_with_a_hint(self) -> None:
        sparse = pytest.importorskip("scipy.sparse").csr_matrix(np.eye(3))
        assert refused(Edge(NET), [sparse]).hint == "pass x.toarray()"

    @pytest.mark.parametrize("make", [lambda: None, lambda: "hello", lambda: {1, 2}, lambda: (i for i in range(3))])
    @pytest.mark.parametrize("kind", ["network", "table"])
    def test_nonsense_is_called_what_it_is(self, make: Any, kind: str) -> None:
        edge = Edge(NET) if kind == "network" else table()
        for wrap in (lambda value: value, lambda value: [value]):
            value = make()
            error = refused(edge, wrap(value))
            assert f"expected an array, got {type(value).__name__}" in error.message
            assert error.hint

    def test_rows_by_name(self) -> None:
        assert "expected an array, got dict" in refused(Edge(NET), [{"a": 1}]).message
        assert refused(table(), [{"a": 1}]).message == "column 'a': expected a sequence of values, got int"
        error = refused(table(), [[{"a": 1, "b": 2, "c": 3}]])
        assert "got a list of dict" in error.message
        assert "pandas.DataFrame(rows)" in str(error.hint)

    def test_ragged_lists(self) -> None:
        assert refused(Edge(NET), [[[1, 2, 3], [3]]]).hint == "every row must have as many values as the others"


class TestTables:
    @pytest.mark.parametrize("n", [0, 1, 2, 5, 1000])
    @pytest.mark.parametrize("make", [np.asarray, pd.DataFrame, lambda x: pl.DataFrame(x, schema=["a", "b", "c"])])
    def test_numbers(self, n: int, make: Any) -> None:
        X = np.random.default_rng(0).standard_normal((n, 3))
        (got,) = table().read([make(X)])
        np.testing.assert_array_equal(got, X.astype(np.float32))
        assert table(dtype="f64").read(make(X))[0].dtype == np.float64

    def test_frame_of_many_types(self) -> None:
        frame = pd.DataFrame({"a": pd.array([1, None], dtype="Int64"), "b": [True, False], "c": ["x", "y"]})
        frame["c"] = pd.Categorical([1.5, 2.5])
        np.testing.assert_array_equal(table().read([frame])[0], np.float32([[1, 1, 1.5], [np.nan, 0, 2.5]]))
        rows = pl.DataFrame({"a": [1, None], "b": [True, False], "c": [1.5, 2.5]})
        np.testing.assert_array_equal(table().read([rows])[0], np.float32([[1, 1, 1.5], [np.nan, 0, 2.5]]))

    @pytest.mark.parametrize("value", [np.ones(3), [1.0, 2.0, 3.0], pd.Series([1.0, 2, 3]), 1.0])
    def test_one_row_must_be_two_dimensional(self, value: Any) -> None:
        error = refused(table(), (value,))
        assert "expected a 2-D array" in error.message
        assert "x.reshape(1, -1)" in (error.hint or "")

    def test_number_of_features(self) -> None:
        error = refused(table(), [np.ones((2, 4))])
        assert error.message == "X has 4 features, but the model expects 3 features as input"
        assert refused(table(("a", "b", "c")), [np.ones((2, 4))]).hint.endswith("in their order: a, b, c")

    def test_names_as_scikit_learn_checks_them(self) -> None:
        edge = table(("a", "b", "c"))
        X = np.ones((2, 3))
        for good in (X, pd.DataFrame(X), pd.DataFrame(X, columns=["a", "b", "c"]), {"a": [1], "b": [2], "c": [3]}):
            edge.read([good])
        error = refused(edge, pd.DataFrame(X, columns=["a", "B", "c"]))
        assert error.code == "E_INPUT_NAME"
        assert "not seen when the model was fitted: B" in str(error)
        assert "missing now: b" in str(error)
        assert "order" in refused(edge, pd.DataFrame(X, columns=["a", "c", "b"])).message
        table(None).read([pd.DataFrame(X, columns=["z", "y", "x"])])

    def test_a_mapping_of_columns_is_a_table(self) -> None:
        edge = table(("a", "b", "c"))
        np.testing.assert_array_equal(edge.read({"a": [1, 2], "b": [3, 4], "c": [5, 6]})[0], [[1, 3, 5], [2, 4, 6]])
        for edge_ in (edge, table()):
            np.testing.assert_array_equal(edge_.read({"X": np.ones((1, 3))})[0], np.ones((1, 3)))
            assert refused(edge_, {"zzz": np.ones((1, 3))}).code == "E_INPUT_NAME"
        assert refused(edge, {"z": [1]}).message == "expected the input X, or its columns by name (a, b, c); got z"
        assert refused(edge, {}).message.endswith("got an empty mapping")
        assert "missing now: c" in str(refused(edge, {"a": [1], "b": [2]}))
        assert "different lengths" in refused(edge, {"a": [1], "b": [2], "c": [3, 4]}).message

    @pytest.mark.parametrize(
        ("numbers", "value", "what"),
        [
            ("finite", np.nan, "NaN"),
            ("finite", np.inf, "infinity"),
            ("finite", 1e300, "1e+300, too large for float32"),
            ("nan", -np.inf, "infinity"),
            ("nan", np.nan, None),
            ("any", np.inf, None),
            ("any", np.nan, None),
            ("finite", 3e38, None),
        ],
    )
    def test_which_numbers_are_taken(self, numbers: str, value: float, what: str | None) -> None:
        X = np.full((5, 3), 3e38)  # the sum overflows, yet all are finite
        X[3, 1] = value
        edge = table(("a", "b", "c"), numbers)
        if what is None:
            np.testing.assert_array_equal(edge.read(X)[0], X.astype(np.float32))
        else:
            error = refused(edge, X)
            assert error.message == f"X contains {what} at row 3, column 1 ('b')"
            assert error.hint

    @pytest.mark.parametrize("n", [0, 1, 300])
    @pytest.mark.parametrize("kind", ["object", "category", "str", "polars", "array", "mapping"])
    def test_codes(self, n: int, kind: str) -> None:
        cities = [["paris", "bern", "oslo"][i % 3] for i in range(n)]
        columns = {"age": np.arange(n) * 1.0, "city": cities, "size": np.arange(n)}
        frame: Any = columns
        if kind == "polars":
            frame = pl.DataFrame(columns, schema_overrides={"city": pl.Categorical})
        elif kind != "mapping":
            frame = pd.DataFrame(columns)
            frame = frame.to_numpy() if kind == "array" else frame.astype({"city": kind})
        numbers, codes = mixed(unknown=7).read([frame])
        np.testing.assert_array_equal(numbers, np.stack([np.arange(n), np.arange(n)], axis=1))
        assert numbers.dtype == np.float32
        np.testing.assert_array_equal(codes[:, 0], [[1, 0, 7][i % 3] for i in range(n)])
        assert codes.dtype == np.int64
        assert codes.shape == (n, 1)

    @pytest.mark.parametrize("missing", [None, np.nan, pd.NA, pd.NaT, float("nan")])
    def test_missing_categories(self, missing: Any) -> None:
        frame = pd.DataFrame({"age": [1.0, 2], "city": np.array(["bern", missing], object), "size": [1, 2]})
        assert mixed(missing=9, unknown=7).read([frame])[1].tolist() == [[0], [9]]
        error = refused(mixed(unknown=7), frame)
        assert error.message.startswith("column 1 ('city'), row 1: the value is missing")
        coding = Coding((None, "bern"), codes=(-1, 4))
        spec = TableSpec(3, (ColumnFeed((1,), (coding,)),))
        edge = Edge(Signature((TensorSpec("codes", "i32", ("n", 1)),), (), table=spec))
        assert edge.read([frame])[0].tolist() == [[4], [-1]]

    @pytest.mark.parametrize("n", [3, 90])
    def test_categorical_columns(self, n: int) -> None:
        cities = pd.Categorical((["bern", "paris", None] * n)[:n], ["nowhere", "paris", "bern"])
        frame = pd.DataFrame({"age": [1.0] * n, "city": cities, "size": 1})
        expected = ([0, 1, 9] * n)[:n]
        for edge in (mixed(missing=9, unknown=7), mixed(missing=9)):  # without a code for categories of no row, too
            assert edge.read([frame])[1].ravel().tolist() == expected
            renamed = frame.assign(city=frame["city"].cat.rename_categories({"bern": "paris", "paris": "bern"}))
            assert edge.read([renamed])[1].ravel().tolist() == ([1, 0, 9] * n)[:n]
            assert edge.read([frame.iloc[[0, 1]]])[1].ravel().tolist() == [0, 1]
        error = refused(mixed(unknown=7), frame)
        assert error.message.startswith("column 1 ('city'), row 2: the value is missing")
        only_missing = frame.assign(city=pd.Categorical([None] * n))
        assert set(mixed(missing=9).read([only_missing])[1].ravel().tolist()) == {9}

    @pytest.mark.parametrize("n", [2, 90])
    @pytest.mark.parametrize("at_once", [True, False])
    def test_columns_of_every_kind(self, n: int, at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        if not at_once:  # a pandas without that function
            monkeypatch.delattr(pd.DataFrame, "_iter_column_arrays")
        frame = pd.DataFrame(
            {"age": pd.Series([1, None] * (n // 2), dtype="Int64"), "city": "bern", "size": [True, False] * (n // 2)}
        )
        numbers, codes = mixed().read([frame])
        np.testing.assert_array_equal(numbers, [[1, 1], [np.nan, 0]] * (n // 2))
        assert not codes.any()
        late = frame.assign(age=pd.Timestamp("2020-01-01"))
        assert refused(mixed(), late).code == "E_INPUT_DTYPE"
        assert "column 'age'" in refused(mixed(), frame.assign(age="old")).message

    def test_columns_of_one_name(self) -> None:
        spec = TableSpec(2, (ColumnFeed((1,), (Coding(("a", "b")),)),))
        edge = Edge(Signature((TensorSpec("codes", "i64", ("n", 1)),), (), table=spec))
        frame = pd.DataFrame([["b", "a"]] * 90, columns=["x", "x"])
        assert not edge.read([frame])[0].any()

    def test_none_and_nan_told_apart(self) -> None:
        frame = pd.DataFrame({"age": [1.0] * 4, "city": pd.Series([None, np.nan, pd.NA, "x"], dtype=object), "size": 1})
        assert mixed(unknown=7, missing=8, nan=5).read([frame])[1].ravel().tolist() == [8, 5, 8, 7]
        assert mixed(unknown=7, missing=8, none=4).read([frame])[1].ravel().tolist() == [4, 8, 8, 7]

    def test_unknown_category(self) -> None:
        frame = pd.DataFrame({"age": [1.0], "city": ["oslo"], "size": [1]})
        error = refused(mixed(), frame)
        assert error.code == "E_INPUT_VALUE"
        assert error.message == "column 1 ('city'), row 0: unknown category 'oslo'; the model knows 'bern', 'paris'"

    def test_numeric_categories_match_across_types(self) -> None:
        spec = TableSpec(1, (ColumnFeed((0,), (Coding((1, 2, 10), unknown=99),)),))
        edge = Edge(Signature((TensorSpec("codes", "i64", ("n", 1)),), (), table=spec))
        for X in ([[10], [2], [3]], np.array([[10.0], [2.0], [3.0]], np.float32), pd.DataFrame([[10.0], [2.0], [3.0]])):
            assert edge.read((X,))[0].tolist() == [[2], [1], [99]]

    def test_text_where_numbers_belong(self) -> None:
        frame = pd.DataFrame({"a": [1.0, 2], "b": [1, 2], "c": ["1", "2"]})
        error = refused(table(("a", "b", "c")), frame)
        assert error.code == "E_INPUT_DTYPE"
        assert "'c'" in error.message
        assert error.hint
