"""Winograd convolutions against torch in float64, and against the direct ones where an input is not finite or too large."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mlec.backends.tvm.compat import tirx
from mlec.backends.tvm.kernels.epilogue import BufferSpec, Epilogue
from mlec.backends.tvm.kernels.winograd import (
    TOLERANCE,
    WinogradSchedule,
    are_summable,
    conv2d_winograd,
    pack_winograd,
    worthwhile,
)
from mlec.backends.tvm.target import TargetInfo
from mlec.ops.conv import blocked_weights
from tests.backends.tvm.kernel_helpers import HOST, compile_kernel, same_by_threads

CASES = [
    # c, h, w, k, pads
    (16, 8, 8, 32, (1, 1, 1, 1)),
    (32, 5, 7, 16, (1, 1, 1, 1)),
    (16, 9, 4, 48, (0, 2, 3, 0)),
    (16, 3, 3, 16, (0, 0, 0, 0)),
    (16, 2, 61, 16, (4, 4, 4, 4)),
]


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def reference(x, w, pads):
    padded = np.pad(x, [(0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])]).astype("float64")
    return torch.conv2d(torch.from_numpy(padded), torch.from_numpy(w.astype("float64"))).numpy()


def compiled(outputs, c, h, width, k, pads, target, weights, epilogue=None):
    """The kernel for squares of so many outputs a side, as a function of plain images, of which any number of threads makes the same."""
    b = target.lanes(32)
    w_shape = (k // b, c // b, 3, b, 3, b)
    extent = h + pads[0] + pads[2] - 2, width + pads[1] + pads[3] - 2
    schedules = WinogradSchedule.candidates(extent, w_shape, target)
    options = {"schedule": next(s for s in schedules if s.outputs == outputs)}
    options |= {} if epilogue is None else {"epilogue": epilogue}
    func = conv2d_winograd((tirx.Var("n", "int64"), c // b, h, width, b), w_shape, pads, target, **options)
    run, packed = compile_kernel(func, target), blocked_weights(weights, b, b)
    sums = pack_winograd(packed, outputs)

    def call(x, *extra):
        n, p, q = len(x), h + pads[0] + pads[2] - 2, width + pads[1] + pads[3] - 2
        blocks = np.ascontiguousarray(x.reshape(n, c // b, b, h, width).transpose(0, 1, 3, 4, 2))
        y = same_by_threads(run, blocks, sums, *extra, out=(n, k // b, p, q, b))
        return y.transpose(0, 1, 4, 2, 3).reshape(n, k, p, q)

    return call


@pytest.mark.parametrize("outputs", [2, 4])
@pytest.mark.parametrize("cpu", ["host", "x86-64-v3"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_torch(case, cpu, outputs):
    c, h, width, k, pads = case
    target = HOST if cpu == "host" else TargetInfo.for_cpu(cpu)
    w = normal((k, c, 3, 3), 1)
    call = compiled(outputs, *case, target, w)
    for batch in (0, 1, 2, 5, 33):
        x = normal((batch, c, h, width))
        want = reference(x, w, pads)
        np.testing.assert_allclose(call(x), want, rtol=0, atol=TOLERANCE[outputs] * np.max(np.abs(want), initial=0))


@pytest.mark.parametrize("outputs", [2, 4])
@pytest.mark.parametrize(("offset", "scale"), [(0, 1), (3, 0.1), (0, 1e-30)])
def test_many_channels_stay_within_the_declared_tolerance(outputs, offset, scale):
    """Also where all inputs have one sign, as after a ReLU, and where products are subnormal."""
    c, h, width, k = 576, 12, 13, 32
    x, w = (normal((1, c, h, width)) * scale + offset).astype("float32"), normal((k, c, 3, 3), 1) / 100
    want = reference(x, w, (1, 1, 1, 1))
    got = compiled(outputs, c, h, width, k, (1, 1, 1, 1), HOST, w)(x)
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE[outputs] * np.max(np.abs(want)))


@pytest.mark.parametrize("outputs", [2, 4])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_what_is_not_finite_stays_in_its_windows(value, outputs):
    x, w = normal((2, 32, 12, 11)), normal((32, 32, 3, 3), 1) / 100
    x[1, 5, 6, 6], x[1, 5, 6, 7] = value, value
    with np.errstate(over="ignore", invalid="ignore"):
        want = reference(x, w, (1, 1, 1, 1)).astype("float32")
    got = compiled(outputs, 32, 12, 11, 32, (1, 1, 1, 1), HOST, w)(x)
    finite = np.isfinite(want)
    assert (~finite).any() == (not np.isfinite(value))
    np.testing.assert_array_equal(got[~finite], want[~finite])
    np.testing.assert_allclose(got[finite], want[finite], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("outputs", [2, 4])
def test_epilogue(outputs):
    b = HOST.lanes(32)
    x, w, bias, residual = normal((3, 32, 7, 6)), normal((32, 32, 3, 3), 1), normal(32, 2), normal((3, 32, 7, 6), 3)
    n = tirx.Var("n", "int64")

    def apply(acc, where, extra):
        i, block, p, q, channel = where
        return acc + extra[0][block, channel] + extra[1][i, block, p, q, channel]

    specs = BufferSpec((32 // b, b), "float32"), BufferSpec((n, 32 // b, 7, 6, b), "float32")
    call = compiled(outputs, 32, 7, 6, 32, (1, 1, 1, 1), HOST, w, Epilogue(specs, apply))
    blocked = np.ascontiguousarray(residual.reshape(3, 32 // b, b, 7, 6).transpose(0, 1, 3, 4, 2))
    want = reference(x, w, (1, 1, 1, 1)) + bias[:, None, None] + residual
    np.testing.assert_allclose(call(x, bias.reshape(-1, b), blocked), want, rtol=1e-4, atol=2e-4)


def test_chosen_for_many_channels_only():
    def shape(c, k):
        return (k // 16, c // 16, 3, 16, 3, 16)

    target = TargetInfo.for_cpu("skylake-avx512")
    assert worthwhile(shape(64, 64), (56, 56), "float32", target)
    assert not worthwhile(shape(64, 64), (56, 56), "float64", target)
    assert not worthwhile(shape(16, 16), (1, 9), "float32", target)
    assert not worthwhile(shape(512, 512), (7, 7), "float32", target), "17 MB of weights for 16 squares"
    assert not worthwhile((4, 64, 3, 1, 3, 16), (56, 56), "float32", target), "plain input"
    assert not any(s.outputs == 4 for s in WinogradSchedule.candidates((56, 56), shape(1024, 64), target)), "tolerance"
    assert are_summable(normal((3, 3)))
    for weight in (np.nan, np.inf, -1e38):
        assert not are_summable(np.array([1, weight], "float32"))
    assert not are_summable(None)


@pytest.mark.parametrize("outputs", [2, 4])
def test_weights_that_do_not_stay_in_the_cache(outputs):
    x, w = normal((2, 64, 11, 10)), normal((64, 64, 3, 3), 1)
    call = compiled(outputs, 64, 11, 10, 64, (1, 1, 1, 1), replace(HOST, l2_bytes=1 << 18), w)
    np.testing.assert_allclose(call(x), reference(x, w, (1, 1, 1, 1)), rtol=1e-5, atol=3e-4)


@pytest.mark.parametrize("outputs", [2, 4])
@pytest.mark.parametrize("cores", [2, 3, 16])
def test_tasks_shared_by_output_channels_compute_the_same(cores, outputs):
    case = 16, 9, 7, 80, (1, 1, 1, 1)
    w = normal((80, 16, 3, 3), 1)
    alone, shared = (compiled(outputs, *case, replace(HOST, cores=n), w) for n in (1, cores))
    for batch in (0, 1, 2, 3, 9):
        x = normal((batch, 16, 9, 7))
        np.testing.assert_array_equal(shared(x), alone(x))
