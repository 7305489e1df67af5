"""Vectors that multiply pairs of bf16 (AVX512_BF16): which processors do, their code, and products against float64."""

import re

import ml_dtypes
import numpy as np
import pytest

from mlec.backends.tvm.compat import IRModule, tirx
from mlec.backends.tvm.kernels.conv_bf16 import NarrowConv, conv_bf16
from mlec.backends.tvm.kernels.epilogue import BufferSpec, Epilogue
from mlec.backends.tvm.kernels.gemm import gemm
from mlec.backends.tvm.kernels.gemm_bf16 import bf16_products
from mlec.backends.tvm.kernels.int8 import Dots
from mlec.backends.tvm.pipeline import compile_for_cpu
from mlec.backends.tvm.target import TargetInfo
from mlec.ops.conv import paired_weights
from mlec.ops.linalg import pack_narrow
from tests.backends.tvm.kernel_helpers import HOST, compile_kernel, geometry, same_by_threads

BF16 = ml_dtypes.bfloat16
X86 = "x86_64-unknown-linux-gnu"
ZEN4 = TargetInfo.for_cpu("znver4", X86)
here = pytest.mark.skipif(
    Dots.of_bf16(HOST) is None, reason="this processor's vectors multiply no bf16 faster than float32"
)


@pytest.mark.parametrize(
    ("cpu", "attributes", "products"),
    [
        ("znver4", (), 2),
        ("znver5", (), 2),
        ("znver4", ("-avx512bf16",), 1),
        ("znver3", (), 1),
        ("cooperlake", (), 1),
        ("sapphirerapids", ("-amx-bf16",), 1),
        ("sapphirerapids", (), 6),
    ],
)
def test_processors_whose_vectors_multiply_pairs(cpu, attributes, products):
    """Intel's have the instructions too, half as many in a cycle."""
    target = TargetInfo.for_cpu(cpu, X86, attributes)
    assert bf16_products(target) == products
    assert (Dots.of_bf16(target) is not None) == (products == 2)


def code_of(func, target=ZEN4):
    """Assembly of a program."""
    name = str(func.attrs["global_symbol"])
    return compile_for_cpu(IRModule({name: func}), target.tvm_target()).inspect_source("asm")


def longest_loop(code):
    """Of the instructions from a label to the jump back to it, without another label between: those that multiply the most pairs."""
    blocks = re.split(r"^(\.L\w+):", code, flags=re.MULTILINE)
    loops = [
        found[0]
        for label, body in zip(blocks[1::2], blocks[2::2], strict=True)
        if (found := re.match(rf"(?s).*?\bj\w+\s+{re.escape(label)}\b", body))
    ]
    return max(loops, key=lambda body: body.count("vdpbf16ps"))


def product_code():
    return gemm((tirx.Var("m", "int64"),), 256, 256, "bfloat16", 32, ZEN4, narrow="bfloat16")


def convolution_code():
    shape = paired_weights(np.zeros((64, 64, 3, 3), np.float32), 16, 1).shape
    conv = NarrowConv(shape, 16, 64, 16, geometry((1, 1), (1,) * 4, (1, 1)), 1)
    return conv_bf16((tirx.Var("n", "int64"), 4, 14, 14, 16), conv, ZEN4)


@pytest.mark.parametrize("make", [product_code, convolution_code])
def test_code(make):
    """On any machine: one instruction for each two products, of operands in registers or from where they lie, not from the stack."""
    loop = longest_loop(code_of(make()))
    assert loop.count("vdpbf16ps") >= 40
    assert "(%rsp)" not in loop
    assert "vpslld" not in loop
    assert "vfmadd" not in loop


def drawn(m, n, k):
    """Rows with some NaN, infinities and subnormal numbers, weights, and the products of what bf16 holds of them, in float64."""
    rng = np.random.default_rng(m + n + k)
    a, w = rng.normal(size=(m, k)).astype(BF16), rng.normal(size=(k, n)).astype(BF16)
    if m > 2 and k:
        a[1, k // 2], a[2, -1], a[m // 2, 0] = np.nan, np.inf, 1e-40
    with np.errstate(invalid="ignore"):
        return a, w, a.astype("float64") @ w.astype("float64")


def assert_close(got, want, k):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * max(k, 1) ** 0.5)


@here
@pytest.mark.parametrize(
    ("n", "k", "block"),
    [(48, 64, 32), (10, 61, 16), (16, 1, 16), (100, 33, 32), (70, 513, 32), (300, 2, 32), (33, 40, 32)],
)
def test_products(n, k, block):
    """Rows that are no whole tiles, columns that are no whole vectors, sums over an odd number, by one thread and by several."""
    a, w, want = drawn(520, n, k)
    packed = pack_narrow(w, block)
    run = compile_kernel(gemm((tirx.Var("m", "int64"),), n, k, "bfloat16", block, HOST, narrow="bfloat16"))
    for m in (*range(34), 300, 520):
        assert_close(run(a[:m], packed, out=(m, n)), want[:m], k)
    assert_close(same_by_threads(run, a, packed, out=(520, n)), want, k)
    for m in (1, 7, 33):
        alone = compile_kernel(gemm((m,), n, k, "bfloat16", block, HOST, narrow="bfloat16"))
        assert_close(alone(a[:m], packed, out=(m, n)), want[:m], k)


@here
def test_a_row_has_the_same_bits_in_every_batch():
    """Also where a long sum is cut into parts, and weights come from far."""
    n, k = 300, 4097
    a, w, _ = drawn(100, n, k)
    packed = pack_narrow(w, 32)
    run = compile_kernel(
        gemm((tirx.Var("m", "int64"),), n, k, "bfloat16", 32, HOST, narrow="bfloat16", program_weights=1 << 40)
    )
    whole = run(a, packed, out=(100, n))
    for m in (1, 2, 6, 8, 9, 37):
        np.testing.assert_array_equal(run(a[:m], packed, out=(m, n)), whole[:m])


@here
def test_epilogue():
    """A bias and a residual sum; the result in bf16, rounded once."""
    m, t, n, k = tirx.Var("m", "int64"), 3, 37, 18

    def apply(acc, where, extra):
        i, j, column = where
        return acc + extra[0][column] + extra[1][i, j, column]

    epilogue = Epilogue((BufferSpec((n,), "float32"), BufferSpec((m, t, n), "float32")), apply, "bfloat16")
    run = compile_kernel(gemm((m, t), n, k, "bfloat16", 32, HOST, epilogue, narrow="bfloat16"))
    rng = np.random.default_rng(0)
    w, bias = rng.normal(size=(k, n)).astype(BF16), rng.normal(size=n).astype("float32")
    for rows in (0, 1, 5, 50):
        a, added = rng.normal(size=(rows, t, k)).astype(BF16), rng.normal(size=(rows, t, n)).astype("float32")
        want = a.astype("float64") @ w.astype("float64") + bias + added
        got = run(a, pack_narrow(w, 32), bias, added, out=(rows, t, n), dtype=BF16)
        np.testing.assert_allclose(got.astype("float32"), want, rtol=2**-8, atol=1e-5)
