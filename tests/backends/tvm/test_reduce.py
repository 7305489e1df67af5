"""Reductions, softmax and their relatives against numpy: every axis, NaN, infinities, ties, empty batches."""

from dataclasses import replace

import numpy as np
import pytest

from mlec.backends.tvm.compat import tirx
from mlec.backends.tvm.kernels import pieces, tile
from mlec.backends.tvm.kernels.epilogue import BufferSpec, Epilogue, Prologue
from mlec.backends.tvm.kernels.reduce import arg_reduce, reduce, reduced_shape
from mlec.backends.tvm.kernels.softmax import are_cut, logsumexp, softmax
from mlec.backends.tvm.kernels.vector import load
from tests.backends.tvm.kernel_helpers import HOST, compile_kernel, same_by_threads

BATCHES = (0, 1, 2, 5, 70)
TOLERANCE = {"float32": 2e-6, "float64": 1e-14, "float16": 1e-3}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def sample(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return rng.random(shape) < 0.8
    return (rng.normal(size=shape) * (1 if dtype.startswith("f") else 4)).astype(dtype)


def with_special_values(x):
    flat = x.reshape(-1)
    flat[3::17], flat[5::29], flat[7::31] = np.nan, np.inf, -np.inf
    return x


def batch_of(shape):
    return (tirx.Var("n", "int64"), *shape)


CASES = [
    ("sum", (10,), (1,), False, "float32"),
    ("sum", (7, 300), (-1,), True, "float32"),
    ("mean", (8, 5, 5), (2, 3), False, "float32"),
    ("mean", (2, 6, 5, 16), (2, 3), False, "float32"),
    ("mean", (33, 7), (1,), False, "float64"),
    ("sum", (5, 6, 7), (1, 3), True, "float64"),
    ("prod", (4, 9), (1, 2), False, "float32"),
    ("sum", (40,), (0,), False, "float32"),
    ("max", (70,), (1,), False, "float32"),
    ("min", (9, 20), (1,), True, "float64"),
    ("max", (9, 5), (1,), False, "int64"),
    ("min", (90,), (1,), False, "int32"),
    ("sum", (90,), (1,), False, "int64"),
    ("mean", (50,), (1,), False, "float16"),
    ("any", (5,), (1,), False, "bool"),
    ("all", (33, 4), (1,), True, "bool"),
    ("mean", (0,), (1,), False, "float32"),
    ("mean", (0, 20), (1,), True, "float64"),
    ("prod", (0,), (1,), False, "int32"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reduction(case):
    op, shape, axes, keepdims, dtype = case
    run = compile_kernel(reduce(op, batch_of(shape), axes, keepdims, dtype, HOST))
    for batch in BATCHES:
        if 0 in axes and not batch:
            continue
        x = sample((batch, *shape), dtype)
        wide = x.astype("float64") if dtype.startswith("f") else x
        want = np.asarray(getattr(np, op)(wide, axis=axes, keepdims=keepdims)).astype(dtype)
        got = run(x, out=reduced_shape(x.shape, axes, keepdims), dtype=dtype)
        unit = TOLERANCE.get(dtype, 0)
        np.testing.assert_allclose(got, want, rtol=unit, atol=unit * 10)


@pytest.mark.parametrize("op", ["sum", "mean", "max", "min", "prod"])
@pytest.mark.parametrize("axes", [(1,), (2,)])
def test_special_values_spread_as_in_numpy(op, axes):
    x = with_special_values(sample((6, 9, 70), "float32"))
    got = compile_kernel(reduce(op, x.shape, axes, False, "float32", HOST))(x, out=reduced_shape(x.shape, axes, False))
    np.testing.assert_allclose(got, getattr(np, op)(x.astype("float64"), axis=axes), rtol=1e-5)


def test_whole_tensor_symbolic_length_and_epilogue():
    n, t = tirx.Var("n", "int64"), tirx.Var("t", "int64")
    epilogue = Epilogue((BufferSpec((n, 3), "float32"),), lambda acc, where, extra: acc * extra[0][where])
    run = compile_kernel(reduce("sum", (n, 3, t), (2,), False, "float32", HOST, epilogue))
    for batch, length in ((0, 5), (2, 0), (3, 1), (4, 77), (1, 400)):
        x, factor = sample((batch, 3, length), "float32"), sample((batch, 3), "float32", 1)
        np.testing.assert_allclose(
            run(x, factor, out=(batch, 3)), x.sum(2, dtype="float64") * factor, rtol=1e-5, atol=1e-5
        )
    x = sample((9, 13), "float64")
    got = compile_kernel(reduce("sum", (9, 13), (0, 1), False, "float64", HOST))(x, out=(), dtype="float64")
    np.testing.assert_allclose(got, x.sum())


@pytest.mark.parametrize("op", ["argmax", "argmin"])
@pytest.mark.parametrize(("shape", "axis"), [((10,), -1), ((5, 19), 1), ((1, 4), 1), ((3, 2, 40), 2), ((1003,), 1)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "int32", "uint8"])
def test_first_extremum_wins_and_the_first_nan_before_all(op, shape, axis, dtype):
    run = compile_kernel(arg_reduce(op, batch_of(shape), axis, False, dtype, HOST))
    for batch in BATCHES:
        x = np.random.default_rng(0).integers(0, 4, (batch, *shape)).astype(dtype)
        if dtype.startswith("float"):
            x = with_special_values(x)
        want = getattr(np, op)(x, axis=axis)
        np.testing.assert_array_equal(run(x, out=want.shape, dtype="int64"), want)


@pytest.fixture
def eager_threads(monkeypatch):
    """Rows of 64 Ki elements are worth threads, so that those of tests can be cut into pieces."""
    monkeypatch.setattr(tile, "SERIAL_WORK", 5 << 16)


LONG = [
    ("sum", (100_003,), (0,), "float32"),
    ("mean", (3, 70_000), (1,), "float64"),
    ("max", (2, 33_000, 3), (0, 1, 2), "float32"),
    ("min", (3, 90_001), (1,), "int64"),
    ("all", (400_001,), (0,), "bool"),
    ("sum", (50_001, 3), (0,), "float32"),
    ("max", (2, 1100, 1050), (1,), "float32"),
    ("mean", (70, 3, 1000), (0, 2), "float16"),
]
"""Of one or more lines, of lines side by side, few and many, and of several short lines to a piece."""


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_rows_give_the_same_bits_by_any_number_of_threads(case, symbolic, eager_threads):
    op, shape, axes, dtype = case
    x = sample(shape, dtype)
    if op == "max":
        x[..., -1] = np.nan if shape[0] == 2 else 7
    extents = tuple(tirx.Var(f"n{i}", "int64") for i in range(len(shape))) if symbolic else shape
    func = reduce(op, extents, axes, False, dtype, HOST)
    assert "T.parallel" in func.script()
    wide = x.astype("float64") if dtype.startswith("f") else x
    want = np.asarray(getattr(np, op)(wide, axis=axes))
    got = same_by_threads(compile_kernel(func), x, out=want.shape, dtype=dtype)
    unit = TOLERANCE.get(dtype, 0)
    np.testing.assert_allclose(got, want.astype(dtype), rtol=unit * 5, atol=unit * len(x) ** 0.5)


@pytest.mark.parametrize("symbolic", [False, True])
def test_lines_side_by_side_that_are_longer_than_a_piece(symbolic, eager_threads, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 256)
    x = sample((700, 300), "float32")
    extents = (tirx.Var("n", "int64"), tirx.Var("m", "int64")) if symbolic else x.shape
    got = compile_kernel(reduce("sum", extents, (0,), False, "float32", HOST))(x, out=(300,))
    np.testing.assert_allclose(got, x.sum(0, dtype="float64"), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("axes", [(0, 1, 2), (0, 1), (1, 2)])
def test_long_rows_that_are_computed_as_they_are_read(axes, eager_threads):
    """Axes of what is computed stay apart: some lines are a piece."""
    shape = (3, 90, 480)
    twice = Prologue((BufferSpec(shape, "float32"),), lambda at, width, x: load(x[0], list(at), width) * 2.0)
    kept = reduced_shape(shape, axes, True)
    epilogue = Epilogue((BufferSpec(kept, "float32"),), lambda acc, at, extra: acc + extra[0][at])
    x, bias = sample(shape, "float32"), sample(kept, "float32", 1)
    run = compile_kernel(reduce("sum", shape, axes, True, "float32", HOST, epilogue, twice))
    want = 2 * x.sum(axes, dtype="float64", keepdims=True) + bias
    np.testing.assert_allclose(same_by_threads(run, x, bias, out=kept), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("op", ["argmax", "argmin"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "uint8"])
def test_the_first_extremum_of_a_long_line_by_any_number_of_threads(op, dtype, symbolic, eager_threads):
    """Ties within a piece, across pieces and in the last one, which is shorter than a vector; a NaN in a later piece."""
    lines = np.random.default_rng(0).integers(1, 5, (4, 3 * 32768 + 5)).astype(dtype)
    lines[0, [40_000, 70_000]] = lines[1, -1] = 9
    lines[2, [5, 99]] = lines[1, -2] = 0
    if dtype.startswith("float"):
        lines[3, [80_000, 80_001]], lines[3, 7] = np.nan, np.inf
    extents = (tirx.Var("n", "int64"), tirx.Var("t", "int64")) if symbolic else lines.shape
    run = compile_kernel(arg_reduce(op, extents, 1, False, dtype, HOST))
    np.testing.assert_array_equal(same_by_threads(run, lines, out=4, dtype="int64"), getattr(np, op)(lines, axis=1))
    short = lines[:, :1].copy()
    if symbolic:
        np.testing.assert_array_equal(run(short, out=4, dtype="int64"), np.zeros(4))


@pytest.mark.parametrize("op", ["argmax", "argmin"])
@pytest.mark.parametrize(("columns", "dtype"), [(21, "float32"), (70, "float64"), (5, "int64")])
@pytest.mark.parametrize("symbolic", [False, True])
def test_the_first_extrema_of_a_tall_table_by_any_number_of_threads(op, columns, dtype, symbolic, eager_threads):
    """In pieces of some rows: of equal ones the first wins wherever the cuts are, and the first NaN before all."""
    x = sample((40_007, columns), dtype)
    x[[70, 30_000, 40_006], 0] = x.max() + 1, x.max() + 1, x.min() - 1
    if dtype.startswith("f"):
        x[[123, 39_000], 1] = np.nan
        x[:, 2], x[:, 3] = -np.inf, np.inf
    rows = tirx.Var("rows", "int64") if symbolic else len(x)
    func = arg_reduce(op, (rows, columns), 0, False, dtype, HOST)
    assert "T.parallel" in func.script()
    got = same_by_threads(compile_kernel(func), x, out=columns, dtype="int64")
    np.testing.assert_array_equal(got, getattr(np, op)(x, axis=0))


def reference_softmax(x, axis):
    e = np.exp(x - x.max(axis=axis, keepdims=True, initial=-np.inf))
    return e / e.sum(axis=axis, keepdims=True)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("shape", "axis"), [((10,), -1), ((3, 100), -1), ((7, 20), 1), ((5, 3, 3), 1)])
def test_softmax_and_its_logarithm(shape, axis, dtype):
    for log_space in (False, True):
        run = compile_kernel(softmax(batch_of(shape), axis, dtype, HOST, log_space))
        for batch in BATCHES:
            x = sample((batch, *shape), dtype) * 5
            if batch > 2:
                x[0], x[1, ..., 1], x[2, ..., 0] = -np.inf, np.nan, 3000
            want = reference_softmax(x.astype(np.longdouble), axis)
            if log_space:
                shifted = x.astype(np.longdouble) - x.max(axis=axis, keepdims=True, initial=-np.inf)
                want = shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))
            got = run(x, out=x.shape, dtype=dtype)
            np.testing.assert_allclose(got, want.astype(dtype), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_softmax_over_a_symbolic_axis():
    n, t = tirx.Var("n", "int64"), tirx.Var("t", "int64")
    run = compile_kernel(softmax((n, t), -1, "float32", HOST))
    for shape in ((0, 3), (2, 1), (3, 17), (2, 200)):
        x = sample(shape, "float32")
        np.testing.assert_allclose(run(x, out=shape), reference_softmax(x.astype("float64"), -1), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("axis", [1, 2])
def test_logsumexp(axis):
    x = sample((6, 20, 30), "float32")
    x[0], x[1, 3, 4], x[2, 5] = -np.inf, np.inf, np.nan
    x[3] += 1000
    with np.errstate(all="ignore"):
        want = np.logaddexp.reduce(x.astype("float64"), axis=axis)
    got = compile_kernel(logsumexp(x.shape, axis, False, "float32", HOST))(x, out=want.shape)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_a_line_worth_threads_is_shared():
    roomy = replace(HOST, l2_bytes=1 << 30)
    for count, shared in ((3, False), (4, True)):
        shape = 1, count * pieces.PIECE
        assert are_cut(shape, 1, "float32", roomy) is shared
        assert ("T.parallel" in softmax(shape, 1, "float32", roomy).script()) is shared


SMALL = replace(HOST, l2_bytes=64 << 10)
"""A processor for which 128 KiB are far away."""


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((6, 2 * 32768 + 5), 1), ((3000, 37), 0), ((2, 70, 1100), 1), ((20, 33_000), 0)],
    ids=["line", "narrow", "wide", "wider than a piece"],
)
def test_softmax_of_what_exceeds_the_caches_by_any_number_of_threads(shape, axis, dtype, symbolic):
    """Pieces of nothing but minus infinity, lines of it, an infinity and a NaN in one piece only, and all values far below zero."""
    x = sample(shape, dtype) * 5
    lines = np.moveaxis(x, axis, -1)  # a view
    half = shape[axis] * 4 // 5
    for number, fill in enumerate([(slice(0, half), -np.inf), (slice(None), -np.inf), (half, np.inf), (half, np.nan)]):
        lines[..., number, fill[0]] = fill[1]
    lines[..., 4, :] = lines[..., 4, :] - 2000
    lines[..., 4, :half] = -np.inf
    extents = tuple(tirx.Var(f"n{i}", "int64") for i in range(len(shape))) if symbolic else shape
    wide = x.astype(np.longdouble)
    shifted = wide - wide.max(axis=axis, keepdims=True)
    logarithm = shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))
    summed = np.logaddexp.reduce(wide, axis=axis)
    unit = TOLERANCE[dtype] * 5
    for func, want in (
        (softmax(extents, axis, dtype, SMALL), np.exp(logarithm)),
        (softmax(extents, axis, dtype, SMALL, True), logarithm),
        (logsumexp(extents, axis, False, dtype, SMALL), summed),
    ):
        got = same_by_threads(compile_kernel(func), x, out=want.shape, dtype=dtype)
        np.testing.assert_allclose(got, want.astype(dtype), rtol=unit, atol=unit)
