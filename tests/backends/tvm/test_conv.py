"""Convolutions against torch in float64: strides, pads, dilations, groups, odd channel counts, symbolic batch and length."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mlec.backends.tvm.compat import tirx
from mlec.backends.tvm.kernels.conv import conv, pack_transposed
from mlec.backends.tvm.kernels.conv_blocked import _rows_of_positions, can_turn, conv2d_nchwc
from mlec.backends.tvm.kernels.depthwise import depthwise_nchwc
from mlec.backends.tvm.kernels.epilogue import BufferSpec, Epilogue
from mlec.backends.tvm.kernels.matmul import pointwise
from mlec.backends.tvm.kernels.vector import select
from mlec.backends.tvm.target import TargetInfo
from mlec.ir import GraphBuilder, run_graph, tensor
from mlec.ops.conv import blocked_weights
from mlec.ops.windows import Geometry
from tests.backends.tvm.kernel_helpers import HOST, compile_kernel, geometry, same_by_threads
from tests.backends.tvm.test_elementwise_tvm import compiled

BATCHES = (0, 1, 2, 5, 33)


def normal(shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def reference(x, w, strides, pads, dilations, groups=1):
    rank = x.ndim - 2
    padded = np.pad(x, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)]).astype("float64")
    function = (torch.conv1d, torch.conv2d, torch.conv3d)[rank - 1]
    arguments = (torch.from_numpy(padded), torch.from_numpy(w.astype("float64")), None, strides, 0, dilations, groups)
    return function(*arguments).numpy()


def to_blocks(x, block):
    n, c, h, w = x.shape
    return np.ascontiguousarray(x.reshape(n, c // block, block, h, w).transpose(0, 1, 3, 4, 2))


def from_blocks(y):
    n, kb, p, q, k = y.shape
    return y.transpose(0, 1, 4, 2, 3).reshape(n, kb * k, p, q)


def assert_close(got, want, terms, dtype="float32"):
    unit = 1e-5 if dtype == "float32" else 1e-13
    np.testing.assert_allclose(got, want, rtol=unit, atol=unit * terms**0.5)


BLOCKED = [
    # c, h, w, k, kernel, strides, pads, dilations, in block, out block
    (1, 8, 8, 16, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 16),
    (3, 19, 17, 32, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 3, 16),
    (32, 8, 8, 32, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 16, 16),
    (16, 4, 4, 48, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 16, 16),
    (48, 9, 11, 40, (3, 2), (2, 1), (1, 0, 2, 1), (1, 2), 16, 8),
    (24, 14, 13, 64, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 8, 16),
    (16, 9, 9, 16, (1, 1), (2, 2), (0, 0, 0, 0), (1, 1), 16, 16),
    (12, 5, 40, 12, (5, 1), (1, 1), (0, 0, 0, 0), (1, 1), 4, 4),
    (16, 3, 3, 16, (3, 3), (1, 1), (4, 4, 4, 4), (2, 2), 16, 16),
]


@pytest.mark.parametrize("case", BLOCKED, ids=str)
def test_on_channel_blocks(case):
    c, h, width, k, kernel, strides, pads, dilations, b, kb = case
    n = tirx.Var("n", "int64")
    run = compile_kernel(
        conv2d_nchwc(
            (n, c // b, h, width, b),
            (k // kb, c // b, kernel[0], b, kernel[1], kb),
            geometry(strides, pads, dilations),
            "float32",
            HOST,
        )
    )
    w = normal((k, c, *kernel), seed=1)
    for batch in BATCHES:
        x = normal((batch, c, h, width))
        want = reference(x, w, strides, pads, dilations)
        got = run(to_blocks(x, b), blocked_weights(w, b, kb), out=(batch, k // kb, *want.shape[2:], kb))
        assert_close(from_blocks(got), want, c * kernel[0] * kernel[1])


TURNED = [
    # c, h, w, k, kernel, strides, pads, dilations, block; the width is no multiple of the block, or is one; columns that nothing meets
    (16, 9, 21, 32, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 16),
    (32, 50, 48, 16, (3, 5), (1, 3), (1, 2, 1, 0), (1, 1), 16),
    (24, 7, 8, 16, (1, 3), (1, 1), (2, 0, 0, 3), (1, 2), 8),
    (8, 6, 19, 16, (3, 3), (1, 4), (0, 1, 0, 0), (1, 1), 4),
]


@pytest.mark.parametrize("case", TURNED, ids=str)
def test_plain_images_come_into_blocks_as_they_are_padded(case):
    c, h, width, k, kernel, strides, pads, dilations, b = case
    g, w_shape = geometry(strides, pads, dilations), (k // 16, c // b, kernel[0], b, kernel[1], 16)
    x_shape = (tirx.Var("n", "int64"), c // b, h, width, b)
    assert can_turn(x_shape, w_shape, g)
    run = compile_kernel(conv2d_nchwc(x_shape, w_shape, g, "float32", HOST, turned=True))
    w = normal((k, c, *kernel), seed=1)
    for batch in (0, 1, 3):
        x = normal((batch, c, h, width))
        want = reference(x, w, strides, pads, dilations)
        plain, packed = x.reshape(batch, c // b, b, h, width), blocked_weights(w, b, 16)
        got = same_by_threads(run, plain, packed, out=(batch, k // 16, *want.shape[2:], 16))
        assert_close(from_blocks(got), want, c * kernel[0] * kernel[1])


def test_plain_images_of_few_columns_or_without_padding_do_not_come_into_blocks_by_the_way():
    padded, w_shape = geometry((1, 1), (1,) * 4), (1, 1, 3, 16, 3, 16)
    assert can_turn((1, 1, 9, 16, 16), w_shape, padded)
    assert not can_turn((1, 1, 9, 15, 16), w_shape, padded)
    assert not can_turn((1, 1, 9, 16, 16), w_shape, geometry((1, 1)))
    assert not can_turn((1, 16, 9, 16, 1), (1, 16, 3, 1, 3, 16), padded)


@pytest.mark.parametrize("kernel", [1, 3])
def test_large_image_is_shared_by_threads_and_keeps_its_epilogue(kernel):
    x, w, bias, pad = normal((1, 32, 40, 44)), normal((64, 32, kernel, kernel), seed=1), normal(64, seed=2), kernel // 2

    def apply(acc, where, extra):
        i, block, p, q, channel = where
        total = acc + extra[0][block, channel] + extra[1][i, block, p, q, channel]
        return select(total < 0.0, 0.0, total)

    shape = (1, 4, 40, 44, 16)
    epilogue = Epilogue((BufferSpec((4, 16), "float32"), BufferSpec(shape, "float32")), apply)
    func = conv2d_nchwc(
        (1, 2, 40, 44, 16), (4, 2, kernel, 16, kernel, 16), geometry((1, 1), (pad,) * 4), "float32", HOST, epilogue
    )
    residual = normal((1, 64, 40, 44), seed=3)
    got = compile_kernel(func)(
        to_blocks(x, 16), blocked_weights(w, 16, 16), bias.reshape(4, 16), to_blocks(residual, 16), out=shape
    )
    want = np.maximum(reference(x, w, (1, 1), (pad,) * 4, (1, 1)) + bias[:, None, None] + residual, 0)
    assert_close(from_blocks(got), want, 32 * kernel**2)


PLAIN = [
    # x shape after the batch, w shape, strides, pads, dilations, groups
    ((4, 9), (8, 4, 3), (1,), (1, 1), (1,), 1),
    ((6, 50), (9, 2, 5), (2,), (2, 1), (3,), 3),
    ((16, 8, 8), (16, 1, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 16),
    ((8, 21, 37), (16, 1, 3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 8),
    ((4, 10, 18), (6, 2, 3, 2), (2, 1), (1, 0, 1, 2), (1, 2), 2),
    ((3, 7, 100), (5, 3, 3, 7), (1, 3), (0, 3, 0, 2), (2, 1), 1),
    ((2, 4, 5, 6), (4, 2, 3, 2, 3), (1, 2, 1), (1, 0, 1, 1, 1, 0), (1, 1, 2), 1),
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_on_plain_tensors(case, dtype):
    shape, w_shape, strides, pads, dilations, groups = case
    n = tirx.Var("n", "int64")
    run = compile_kernel(conv((n, *shape), w_shape, geometry(strides, pads, dilations), groups, dtype, HOST))
    w = normal(w_shape, dtype, 1)
    for batch in BATCHES:
        x = normal((batch, *shape), dtype)
        want = reference(x, w, strides, pads, dilations, groups)
        assert_close(run(x, w, out=want.shape, dtype=dtype), want, w[0].size, dtype)


POINTWISE = [
    # x shape after the batch, output channels, groups; the vectors and rows that are left after whole tiles
    ((16, 7, 11), 24, 1),
    ((5, 3), 1, 1),
    ((6, 9, 1), 9, 3),
    ((260, 1, 1), 260, 1),
    ((20, 2, 5, 37), 14, 2),
]


@pytest.mark.parametrize("case", POINTWISE, ids=str)
def test_pointwise_on_plain_tensors(case):
    """By any extents of space, with a bias for each channel and something to add to each element."""
    (c, *space), k, groups = case
    n, *known = (tirx.Var(name, "int64") for name in "ndhw")
    rank, weights, bias = len(space), normal((k, c // groups, *[1] * len(space)), seed=1), normal(k, seed=2)

    def apply(acc, where, extra):
        return acc + extra[0][where[1]] + extra[1][where]

    for target, extents in (HOST, known[-rank:]), (TargetInfo.for_cpu("x86-64-v3"), space):
        inputs = (BufferSpec((k,), "float32"), BufferSpec((n, k, *extents), "float32"))
        func = pointwise((n, c, *extents), k, groups, "float32", target, Epilogue(inputs, apply))
        run = compile_kernel(func, target)
        for batch in (0, 1, 3):
            x, r = normal((batch, c, *space)), normal((batch, k, *space), seed=3)
            want = reference(x, weights, *[(1,) * rank, (0,) * 2 * rank, (1,) * rank], groups)
            want = want + bias.reshape(k, *[1] * rank) + r
            assert_close(run(x, weights, bias, r, out=want.shape), want, c // groups)


def test_pointwise_is_shared_by_threads_and_keeps_what_is_not_finite():
    x, w = with_special_values(normal((2, 96, 28, 28))), normal((300, 96, 1, 1), seed=1)
    run = compile_kernel(pointwise(x.shape, 300, 1, "float32", HOST))
    want = reference(x, w, (1, 1), (0,) * 4, (1, 1))
    assert_same_special_values(same_by_threads(run, x, w, out=want.shape), want, 96)


def test_symbolic_length():
    n, t = tirx.Var("n", "int64"), tirx.Var("t", "int64")
    epilogue = Epilogue((BufferSpec((8,), "float32"),), lambda acc, where, extra: acc + extra[0][where[1]])
    run = compile_kernel(conv((n, 4, t), (8, 4, 3), geometry((2,), (1, 1)), 1, "float32", HOST, epilogue))
    w, bias = normal((8, 4, 3), seed=1), normal(8, seed=2)
    for length in (1, 2, 17, 64, 201):
        x = normal((2, 4, length))
        want = reference(x, w, (2,), (1, 1), (1,)) + bias[:, None]
        assert_close(run(x, w, bias, out=want.shape), want, 12)


def test_symbolic_extents_that_padding_has_made():
    """Of ``h + 2`` and ``w + 4``: the result is what tells ``h`` and ``w``."""
    b, w = GraphBuilder(), normal((5, 3, 3, 5), seed=1)
    x = b.input("x", tensor("f32", ("n", 3, "h", "w")))
    padded = b("pad", x, before=(0, 0, 1, 2), after=(0, 0, 1, 2), value=0.0, mode="edge")
    graph = b.finish([b("relu", b("conv", padded, b.constant(w)))])
    model = compiled(graph)
    for shape in ((2, 3, 7, 19), (0, 3, 4, 5)):
        given = normal(shape)
        np.testing.assert_allclose(model.run([given])[0], run_graph(graph, [given])[0], rtol=1e-4, atol=1e-5)


TRANSPOSED = [
    # x shape, w shape, stride, padding, output padding, dilation, groups
    ((2, 4, 7), (4, 3, 3), (2,), (1,), (1,), (1,), 1),
    ((1, 4, 5, 6), (4, 2, 3, 4), (2, 3), (1, 0), (0, 2), (1, 2), 2),
    ((1, 2, 3, 4, 3), (2, 3, 2, 3, 2), (1, 2, 2), (0, 1, 0), (0, 1, 0), (1, 1, 1), 1),
]


@pytest.mark.parametrize("case", TRANSPOSED, ids=str)
def test_transposed(case):
    shape, w_shape, stride, padding, extra, dilation, groups = case
    x, w = normal(shape), normal(w_shape, seed=1)
    rank = len(shape) - 2
    function = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)[rank - 1]
    arguments = (
        torch.from_numpy(x).double(),
        torch.from_numpy(w).double(),
        None,
        stride,
        padding,
        extra,
        groups,
        dilation,
    )
    want = function(*arguments).numpy()
    packed = pack_transposed(w, groups)
    before = [d * (k - 1) - p for d, k, p in zip(dilation, w_shape[2:], padding, strict=True)]
    after = [b + e for b, e in zip(before, extra, strict=True)]
    equal = Geometry((1,) * rank, tuple(before), tuple(after), dilation, stride)
    func = conv(shape, packed.shape, equal, groups, "float32", HOST)
    assert_close(compile_kernel(func)(x, packed, out=want.shape), want, w[:, 0].size)


@pytest.mark.skipif(HOST.vector_registers < 32, reason="blocks of 16 channels leave no registers over")
def test_weights_of_small_images_are_fetched_ahead():
    x, w = normal((2, 128, 5, 6)), normal((512, 128, 3, 3), seed=1)  # 2.4 MB
    target = replace(HOST, l2_bytes=1 << 20)
    func = conv2d_nchwc((2, 8, 5, 6, 16), (32, 8, 3, 16, 3, 16), geometry((1, 1), (1,) * 4), "float32", target)
    assert "prefetch" in str(func)
    got = compile_kernel(func)(to_blocks(x, 16), blocked_weights(w, 16, 16), out=(2, 32, 5, 6, 16))
    assert_close(from_blocks(got), reference(x, w, (1, 1), (1,) * 4, (1, 1)), 128 * 9)


@pytest.mark.parametrize("case", BLOCKED, ids=str)
def test_on_channel_blocks_of_256_bits(case):
    c, h, width, k, kernel, strides, pads, dilations, _, _ = case
    b, kb = 4 if c % 4 == 0 else 1, 8 if k % 8 == 0 else 4
    target = TargetInfo.for_cpu("x86-64-v3")
    w_shape = (k // kb, c // b, kernel[0], b, kernel[1], kb)
    func = conv2d_nchwc((2, c // b, h, width, b), w_shape, geometry(strides, pads, dilations), "float32", target)
    x, w = normal((2, c, h, width)), normal((k, c, *kernel), seed=1)
    want = reference(x, w, strides, pads, dilations)
    got = compile_kernel(func, target)(
        to_blocks(x, b), blocked_weights(w, b, kb), out=(2, k // kb, *want.shape[2:], kb)
    )
    assert_close(from_blocks(got), want, c * kernel[0] * kernel[1])


DEPTHWISE = [
    # c, h, w, kernel, strides, pads, dilations, block
    (16, 7, 5, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 16),
    (24, 9, 40, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 8),
    (16, 6, 61, (5, 3), (1, 2), (2, 0, 1, 3), (1, 1), 16),
    (8, 11, 30, (3, 3), (1, 1), (2, 3, 4, 1), (2, 3), 4),
    (16, 3, 3, (3, 3), (1, 1), (4, 4, 4, 4), (2, 2), 16),
    (48, 4, 26, (1, 7), (1, 1), (0, 3, 0, 3), (1, 1), 16),
    (32, 40, 1, (4, 1), (3, 1), (0, 0, 0, 0), (1, 1), 32),
]


@pytest.mark.parametrize("cpu", ["host", "x86-64-v3"])
@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
def test_depthwise_on_channel_blocks(case, cpu):
    c, h, width, kernel, strides, pads, dilations, b = case
    target = HOST if cpu == "host" else TargetInfo.for_cpu(cpu)
    func = depthwise_nchwc(
        (tirx.Var("n", "int64"), c // b, h, width, b),
        (c // b, *kernel, b),
        geometry(strides, pads, dilations),
        "float32",
        target,
    )
    run = compile_kernel(func, target)
    w = normal((c, 1, *kernel), seed=1)
    packed = np.ascontiguousarray(w.reshape(c // b, b, *kernel).transpose(0, 2, 3, 1))
    for batch in BATCHES:
        x = normal((batch, c, h, width))
        want = reference(x, w, strides, pads, dilations, c)
        got = run(to_blocks(x, b), packed, out=(batch, c // b, *want.shape[2:], b))
        assert_close(from_blocks(got), want, kernel[0] * kernel[1])


def test_the_positions_of_a_pointwise_convolution_are_shared_by_threads_in_rows_of_equal_length():
    two = replace(HOST, cores=2)
    narrow = (1, 6, 1, 16, 1, 16)  # 96 channels to 16: nothing to share but positions
    assert _rows_of_positions(112 * 112, narrow, 12, two) == 4
    assert _rows_of_positions(7 * 35, narrow, 12, two) == 1  # too little work
    assert _rows_of_positions(12547, narrow, 12, two) == 1  # a prime number
    assert _rows_of_positions(49, (60, 20, 1, 16, 1, 16), 12, two) == 1  # the weights are larger: tasks share channels


def with_special_values(x):
    """Some elements of the first image that are not finite."""
    flat = x[0].reshape(-1)
    flat[3::97], flat[41::101], flat[67::89] = np.nan, np.inf, -np.inf
    return x


def assert_same_special_values(got, want, terms):
    """NaN and infinities where the reference has them, there and nowhere else."""
    want = want.astype("float32")
    finite = np.isfinite(want)
    assert not finite[0].all()
    assert finite.any()
    np.testing.assert_array_equal(got[~finite], want[~finite])
    assert_close(np.where(finite, got, 0), np.where(finite, want, 0), terms)


@pytest.mark.parametrize("case", BLOCKED[1:7], ids=str)
def test_what_is_not_finite_stays_in_its_windows_on_channel_blocks(case):
    c, h, width, k, kernel, strides, pads, dilations, b, kb = case
    w_shape = (k // kb, c // b, kernel[0], b, kernel[1], kb)
    func = conv2d_nchwc((2, c // b, h, width, b), w_shape, geometry(strides, pads, dilations), "float32", HOST)
    x, w = normal((2, c, h, width)), normal((k, c, *kernel), seed=1)
    x[0, 1, 2, 1:3], x[0, 0, h - 1, width - 1] = (np.nan, np.inf), -np.inf
    want = reference(x, w, strides, pads, dilations)
    got = compile_kernel(func)(to_blocks(x, b), blocked_weights(w, b, kb), out=(2, k // kb, *want.shape[2:], kb))
    assert_same_special_values(from_blocks(got), want, c * kernel[0] * kernel[1])


def test_what_is_not_finite_stays_in_its_windows_of_an_image_that_comes_into_blocks():
    x, w, g = with_special_values(normal((2, 32, 20, 21))), normal((16, 32, 3, 3), seed=1), geometry((2, 2), (1,) * 4)
    x[1, 5, 19, 20] = np.inf
    run = compile_kernel(conv2d_nchwc((2, 2, 20, 21, 16), (1, 2, 3, 16, 3, 16), g, "float32", HOST, turned=True))
    want = reference(x, w, (2, 2), (1,) * 4, (1, 1))
    got = run(x.reshape(2, 2, 16, 20, 21), blocked_weights(w, 16, 16), out=(2, 1, *want.shape[2:], 16))
    assert_same_special_values(from_blocks(got), want, 32 * 9)


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_what_is_not_finite_stays_in_its_windows(case):
    shape, w_shape, strides, pads, dilations, groups = case
    x, w = with_special_values(normal((2, *shape))), normal(w_shape, seed=1)
    want = reference(x, w, strides, pads, dilations, groups)
    func = conv(x.shape, w_shape, geometry(strides, pads, dilations), groups, "float32", HOST)
    assert_same_special_values(compile_kernel(func)(x, w, out=want.shape), want, w[0].size)


@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
def test_what_is_not_finite_stays_in_its_channel(case):
    c, h, width, kernel, strides, pads, dilations, b = case
    x, w = with_special_values(normal((2, c, h, width))), normal((c, 1, *kernel), seed=1)
    want = reference(x, w, strides, pads, dilations, c)
    func = depthwise_nchwc(
        (2, c // b, h, width, b), (c // b, *kernel, b), geometry(strides, pads, dilations), "float32", HOST
    )
    packed = np.ascontiguousarray(w.reshape(c // b, b, *kernel).transpose(0, 2, 3, 1))
    got = from_blocks(compile_kernel(func)(to_blocks(x, b), packed, out=(2, c // b, *want.shape[2:], b)))
    assert_same_special_values(got, want, kernel[0] * kernel[1])
