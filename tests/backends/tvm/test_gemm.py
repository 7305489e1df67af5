"""Matrix products against numpy: shapes that do not divide the tiles, every dtype, epilogues, special values."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from mlec.backends.tvm.backend import TVMBackend
from mlec.backends.tvm.compat import tirx
from mlec.backends.tvm.kernels.epilogue import BufferSpec, Epilogue
from mlec.backends.tvm.kernels.gemm import GemmSchedule, column_block, gemm, pack_gemm
from mlec.backends.tvm.kernels.gemm_bf16 import least_rows, pairs_of_step
from mlec.backends.tvm.kernels.matmul import matmul
from mlec.backends.tvm.kernels.vector import select
from mlec.backends.tvm.target import TargetInfo
from mlec.ir import DType, GraphBuilder, tensor
from mlec.ops.linalg import pack_narrow
from mlec.runtime.executable import Executable
from mlec.target import Target
from tests.backends.tvm.kernel_helpers import HOST, compile_kernel

ROWS = (0, 1, 2, 5, 7, 8, 11, 33, 1000)
TOLERANCE = {"float32": 2e-5, "float64": 1e-13, "float16": 2e-3}


def symbol(name):
    return tirx.Var(name, "int64")


def normal(shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def assert_close(got, want, dtype="float32", terms=1):
    np.testing.assert_allclose(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * max(1, terms) ** 0.5)


@pytest.mark.parametrize(
    ("n", "k", "dtype"),
    [(64, 64, "float32"), (10, 70, "float32"), (100, 33, "float64"), (1, 30, "float64"), (50, 40, "float16")],
)
def test_packed_product_with_symbolic_rows(n, k, dtype):
    block = column_block(n, dtype, HOST)
    run = compile_kernel(gemm((symbol("m"),), n, k, dtype, block, HOST))
    w = normal((k, n), dtype, 1)
    for m in ROWS:
        a = normal((m, k), dtype)
        want = (a.astype("float64") @ w.astype("float64")).astype(dtype)
        assert_close(run(a, pack_gemm(w, block), out=(m, n), dtype=dtype), want, dtype, k)


@pytest.mark.parametrize("target", [HOST, TargetInfo.for_cpu("x86-64-v3")], ids=["host", "avx2"])
@pytest.mark.parametrize("n", [70, 80, 100, 128])
def test_columns_that_do_not_fill_the_tiles(n, target):
    """Blocks of 32 columns are four vectors of one processor and two of another; the last tile has those that are left."""
    k = 30
    run = compile_kernel(gemm((symbol("m"),), n, k, "float32", 32, target))
    w = normal((k, n), seed=1)
    for m in ROWS:
        a = normal((m, k))
        assert_close(run(a, pack_gemm(w, 32), out=(m, n)), a @ w, terms=k)


NARROW = {"int8": np.int8, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def narrow_operands(m, n, k, narrow, rows="float32"):
    w = (20 * normal((k, n), seed=1)).astype(NARROW[narrow])
    return normal((m, k)).astype(NARROW.get(rows, rows)), w


@pytest.mark.parametrize("narrow", NARROW)
@pytest.mark.parametrize(
    ("n", "k", "cpu"), [(1, 30, "host"), (300, 33, "host"), (40, 1, "x86-64-v3"), (70, 64, "x86-64-v2")]
)
def test_narrow_weights_are_widened(n, k, narrow, cpu):
    """By tiles that read them themselves, and from panels that are widened once, for all of an odd sum."""
    target = HOST if cpu == "host" else TargetInfo.for_cpu(cpu)
    block = column_block(n, "float32", target)
    run = compile_kernel(gemm((symbol("m"),), n, k, "float32", block, target, narrow=narrow), target)
    a, w = narrow_operands(300, n, k, narrow)
    want, packed = a @ w.astype("float32"), pack_narrow(w, block)
    for m in (0, 1, 2, 5, 8, 11, 33, 300):
        assert_close(run(a[:m], packed, out=(m, n)), want[:m], terms=400 * k)


@pytest.mark.parametrize("narrow", ["float16", "bfloat16"])
def test_narrow_rows_times_narrow_weights(narrow):
    n, k, block = 70, 33, 32
    run = compile_kernel(gemm((symbol("m"),), n, k, narrow, block, HOST, narrow=narrow))
    a, w = narrow_operands(50, n, k, narrow, narrow)
    for m in (1, 6, 50):
        got = run(a[:m], pack_narrow(w, block), out=(m, n))
        assert_close(got, a[:m].astype("float32") @ w.astype("float32"), terms=400 * k)


@pytest.mark.parametrize(("n", "k", "block"), [(48, 64, 32), (10, 60, 16), (100, 160, 32), (30, 34, 32), (70, 512, 32)])
def test_bfloat16_rows_times_bfloat16_weights_by_the_matrix_unit_where_there_is_one(n, k, block):
    """17 pairs of k (34) divide into no steps, and are widened."""
    run = compile_kernel(gemm((symbol("m"),), n, k, "bfloat16", block, HOST, narrow="bfloat16"))
    a, w = narrow_operands(520, n, k, "bfloat16", "bfloat16")
    want, packed = a.astype("float32") @ w.astype("float32"), pack_narrow(w, block)
    for m in (0, 1, 2, 3, 7, 11, 15, 16, 17, 33, 48, 300, 520):
        assert_close(run(a[:m], packed, out=(m, n)), want[:m], terms=400 * k)
    alone = compile_kernel(gemm((7,), n, k, "bfloat16", block, HOST, narrow="bfloat16"))
    assert_close(alone(a[:7], packed, out=(7, n)), want[:7], terms=400 * k)


@pytest.mark.parametrize(("n", "k"), [(0, 32), (5, 0), (0, 0)])
def test_bfloat16_products_of_nothing(n, k):
    for target in ("cpu", "cpu:sapphirerapids"):
        b = GraphBuilder()
        x = b.input("x", tensor("bf16", ("n", k)))
        graph = b.finish([b("matmul_narrow", x, b.constant(np.zeros((k, n), DType.BF16.numpy)))])
        module = TVMBackend().compile(graph, Target.parse(target))
        if target == "cpu":
            (found,) = Executable(module.program, module.objects, module.constants).run(
                [np.ones((3, k), DType.BF16.numpy)]
            )
            assert found.shape == (3, n)
            assert not found.any()


def test_steps_of_the_matrix_unit():
    tiles = replace(HOST, vector_bits=512, features=frozenset({"amx-tile", "amx-bf16"}))
    assert [pairs_of_step(k, tiles) for k in (768, 60, 34, 33)] == [16, 15, 0, 0]
    assert pairs_of_step(768, replace(tiles, features=frozenset())) == 0
    assert [least_rows(n, k) for n, k in ((512, 512), (128, 128), (64, 32))] == [2, 5, 20]


@pytest.mark.parametrize("narrow", ["int8", "bfloat16"])
def test_narrow_weights_give_the_same_bits_as_wide_ones(narrow):
    """In every batch, and where a long sum is cut into parts."""
    n, k, block = 100, 203, 32
    m = symbol("m")
    default = next(GemmSchedule.candidates(m, n, k, "float32", block, HOST, narrow))
    whole = replace(default, mc=4 * default.mr, nc=2 * default.nr)
    kernels = [
        compile_kernel(gemm((m,), n, k, "float32", block, HOST, schedule=s, narrow=narrow, program_weights=program))
        for s, program in ((whole, 1 << 40), (replace(whole, kc=64), 0))
    ]
    wide = compile_kernel(gemm((m,), n, k, "float32", block, HOST))
    a, w = narrow_operands(100, n, k, narrow)
    want = wide(a, pack_gemm(w.astype("float32"), block), out=(100, n))
    for run in kernels:
        for rows in (1, 9, 37, 100):
            np.testing.assert_array_equal(run(a[:rows], pack_narrow(w, block), out=(rows, n)), want[:rows])


@pytest.mark.parametrize(("m", "n", "k"), [(3, 0, 4), (0, 5, 4), (3, 5, 0)])
def test_empty_product(m, n, k):
    w = np.zeros((k, n), "float32")
    got = compile_kernel(gemm((m,), n, k, "float32", 16, HOST))(normal((m, k)), pack_gemm(w, 16), out=(m, n))
    np.testing.assert_array_equal(got, np.zeros((m, n)))


@pytest.mark.parametrize("m", [1, 7, 24, 300])
def test_packed_product_with_static_rows_and_many_columns(m):
    n, k, block = 1500, 384, 32
    a, w = normal((m, k)), normal((k, n), seed=1)
    got = compile_kernel(gemm((m,), n, k, "float32", block, HOST))(a, pack_gemm(w, block), out=(m, n))
    assert_close(got, a @ w, terms=k)


@pytest.mark.parametrize("block", [3, 8, 16, 48])
def test_any_block_will_do(block):
    a, w = normal((9, 20)), normal((20, 50), seed=1)
    got = compile_kernel(gemm((9,), 50, 20, "float32", block, HOST))(a, pack_gemm(w, block), out=(9, 50))
    assert_close(got, a @ w, terms=20)


def test_a_row_has_the_same_bits_in_every_batch():
    run = compile_kernel(gemm((symbol("m"),), 300, 200, "float32", 32, HOST))
    a, w = normal((1000, 200)), pack_gemm(normal((200, 300), seed=1), 32)
    whole = run(a, w, out=(1000, 300))
    for m in (1, 3, 7, 8, 37):
        np.testing.assert_array_equal(run(a[:m], w, out=(m, 300)), whole[:m])


@pytest.mark.parametrize(("cpu", "dtype"), [("host", "float32"), ("host", "float16"), ("x86-64-v3", "float64")])
def test_a_long_sum_in_parts_has_the_same_bits(cpu, dtype):
    """Sums that wait in memory go on where they were; 37 rows are six tiles and one that overlaps, or begin with one."""
    n, k, target = 150, 203, HOST if cpu == "host" else TargetInfo.for_cpu(cpu)
    block = column_block(n, dtype, target)
    default = next(GemmSchedule.candidates(symbol("m"), n, k, dtype, block, target))
    whole = replace(default, mc=4 * default.mr, nc=2 * default.nr)
    w = pack_gemm(normal((k, n), dtype, 1), block)
    one, several = (
        compile_kernel(gemm((symbol("m"),), n, k, dtype, block, target, schedule=s), target)
        for s in (whole, replace(whole, kc=64))
    )
    for m in (9, 37, 100):
        a = normal((m, k), dtype)
        want = one(a, w, out=(m, n), dtype=dtype)
        np.testing.assert_array_equal(several(a, w, out=(m, n), dtype=dtype), want)


def test_long_sums_are_cut_where_rows_and_weights_exceed_the_caches():
    def depth(k):
        return next(GemmSchedule.candidates(100, 64, k, "float32", 32, replace(HOST, l2_bytes=2 << 20))).kc

    assert depth(2048) == 2048
    assert depth(8192) == 512
    assert 25088 / 50 < depth(25088) <= 512


@pytest.mark.parametrize(("n", "k", "dtype"), [(300, 203, "float32"), (70, 30, "float64"), (40, 9, "float32")])
def test_weights_that_leave_l2_are_fetched_ahead_and_the_bits_stay(n, k, dtype):
    block, m = column_block(n, dtype, HOST), symbol("m")
    w = pack_gemm(normal((k, n), dtype, 1), block)
    plain, ahead = (gemm((m,), n, k, dtype, block, HOST, program_weights=b) for b in (0, 1 << 40))
    assert "prefetch" not in plain.script()
    assert "prefetch" in ahead.script()
    run, other = compile_kernel(plain), compile_kernel(ahead)
    for rows in (6, 37, 1000):
        a = normal((rows, k), dtype)
        want = run(a, w, out=(rows, n), dtype=dtype)
        np.testing.assert_array_equal(other(a, w, out=(rows, n), dtype=dtype), want)


def test_epilogue_sees_logical_indices_and_any_dtype():
    m, t, n, k = symbol("m"), 3, 37, 16

    def apply(acc, where, extra):
        i, j, col = where
        bias, residual = extra
        return select(acc + bias[col] < 0.0, 0.0, acc + bias[col]) + residual[i, j, col]

    epilogue = Epilogue((BufferSpec((n,), "float32"), BufferSpec((m, t, n), "float32")), apply, "float64")
    run = compile_kernel(gemm((m, t), n, k, "float32", 32, HOST, epilogue))
    w, bias = normal((k, n), seed=1), normal(n, seed=2)
    for rows in (0, 1, 5, 50):
        a, residual = normal((rows, t, k)), normal((rows, t, n), seed=3)
        want = np.maximum(a @ w + bias, 0) + residual
        got = run(a, pack_gemm(w, 32), bias, residual, out=(rows, t, n), dtype="float64")
        assert_close(got, want, terms=k)


def test_nan_and_infinity_reach_only_their_row():
    a, w = normal((20, 30)), normal((30, 40), seed=1)
    a[3, 5], a[12, 7] = np.nan, np.inf
    got = compile_kernel(gemm((20,), 40, 30, "float32", 32, HOST))(a, pack_gemm(w, 32), out=(20, 40))
    assert_close(got, a @ w, terms=30)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_product_of_computed_matrices_with_symbolic_extents(transpose, dtype):
    b, m, n, k = (symbol(name) for name in "bmnk")
    run = compile_kernel(matmul((b, 2), (1, 2), m, n, k, dtype, HOST, transpose))
    for shape in ((1, 1, 1, 1), (3, 5, 7, 9), (0, 4, 4, 4), (2, 33, 50, 20), (1, 300, 65, 8), (2, 3, 4, 0)):
        batch, rows, columns, depth = shape
        x, y = normal((batch, 2, rows, depth), dtype), normal((1, 2, depth, columns), dtype, 1)
        given = np.swapaxes(y, -1, -2) if transpose else y
        assert_close(run(x, given, out=(batch, 2, rows, columns), dtype=dtype), x @ y, dtype, depth)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
    ("n", "dtype"), [(64, "float32"), (80, "float32"), (130, "float32"), (72, "float64"), (40, "float16")]
)
def test_product_of_computed_matrices_with_static_columns(n, dtype, transpose):
    """Blocks of one to four vectors; whole ones are turned in squares."""
    b, m, k = symbol("b"), symbol("m"), 37
    run = compile_kernel(matmul((b,), (b,), m, n, k, dtype, HOST, transpose))
    for batch, rows in ((1, 1), (2, 13), (1, 300), (0, 3)):
        x, y = normal((batch, rows, k), dtype), normal((batch, k, n), dtype, 1)
        given = np.swapaxes(y, -1, -2) if transpose else y
        want = (x.astype("float64") @ y.astype("float64")).astype(dtype)
        assert_close(run(x, given, out=(batch, rows, n), dtype=dtype), want, dtype, k)


@pytest.mark.parametrize("n", [1, 3, 40])
def test_product_with_a_plain_matrix_and_an_epilogue(n):
    m = symbol("m")
    epilogue = Epilogue((BufferSpec((n,), "float64"),), lambda acc, where, extra: acc + extra[0][where[-1]])
    run = compile_kernel(matmul((), (), m, n, 30, "float64", HOST, epilogue=epilogue))
    w, bias = normal((30, n), "float64", 1), normal(n, "float64", 2)
    for rows in ROWS:
        a = normal((rows, 30), "float64")
        assert_close(run(a, w, bias, out=(rows, n), dtype="float64"), a @ w + bias, "float64", 30)


def test_integer_product():
    a, b = np.arange(35, dtype=np.int64).reshape(5, 7), np.arange(21, dtype=np.int64).reshape(7, 3) - 10
    got = compile_kernel(matmul((), (), 5, 3, 7, "int64", HOST))(a, b, out=(5, 3), dtype="int64")
    np.testing.assert_array_equal(got, a @ b)


def test_one_row_is_shared_by_threads_where_all_weights_of_a_program_exceed_l2():
    def shared(program_weights):
        func = gemm((1,), 512, 784, "float32", 64, replace(HOST, l2_bytes=2 << 20), program_weights=program_weights)
        return "T.parallel" in func.script()

    assert not shared(1 << 20)
    assert shared(3 << 20)
