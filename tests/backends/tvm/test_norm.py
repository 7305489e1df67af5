"""Normalisations against numpy in float64."""

import numpy as np
import pytest

from mlec.backends.tvm.compat import tirx
from mlec.backends.tvm.kernels.epilogue import BufferSpec, Epilogue
from mlec.backends.tvm.kernels.norm import group_norm, layer_norm, rms_norm
from tests.backends.tvm.kernel_helpers import HOST, compile_kernel

BATCHES = (0, 1, 2, 33)
TOLERANCE = {"float32": 3e-6, "float64": 1e-13}


def normal(shape, dtype, seed=0):
    return (np.random.default_rng(seed).normal(size=shape) * 2 + 1).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("shape", "axis"), [((7,), -1), ((5, 64), -1), ((3, 100), -1), ((3, 5, 6), 2)])
def test_lines(shape, axis, dtype):
    n = tirx.Var("n", "int64")
    run_layer = compile_kernel(layer_norm((n, *shape), axis, 1e-5, dtype, HOST))
    run_rms = compile_kernel(rms_norm((n, *shape), axis, 1e-5, dtype, HOST))
    axes = tuple(range(axis % (len(shape) + 1), len(shape) + 1))
    scale, bias = (normal([*(1,), *shape][axes[0] :], dtype, seed) for seed in (1, 2))
    for batch in BATCHES:
        x = normal((batch, *shape), dtype)
        wide = x.astype(np.longdouble)
        centred = wide - wide.mean(axis=axes, keepdims=True)
        want = centred / np.sqrt((centred**2).mean(axis=axes, keepdims=True) + 1e-5) * scale + bias
        got = run_layer(x, scale, bias, out=x.shape, dtype=dtype)
        np.testing.assert_allclose(got, want.astype(dtype), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        want = wide / np.sqrt((wide**2).mean(axis=axes, keepdims=True) + 1e-5) * scale
        got = run_rms(x, scale, out=x.shape, dtype=dtype)
        np.testing.assert_allclose(got, want.astype(dtype), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_residual_after_layer_norm_and_nan_in_one_row():
    shape = (4, 3, 20)
    epilogue = Epilogue((BufferSpec(shape, "float32"),), lambda acc, where, extra: acc + extra[0][where])
    x, residual, ones = normal(shape, "float32"), normal(shape, "float32", 1), np.ones(20, "float32")
    x[1, 2, 3] = np.nan
    got = compile_kernel(layer_norm(shape, -1, 1e-5, "float32", HOST, epilogue))(x, ones, ones, residual, out=shape)
    centred = x - x.mean(-1, keepdims=True)
    want = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) + 1 + residual
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("channels", "space", "groups"), [(6, (5, 7), 3), (8, (40,), 8), (4, (), 2), (4, (3, 3), 1)])
def test_groups(channels, space, groups):
    run = compile_kernel(group_norm((tirx.Var("n", "int64"), channels, *space), groups, 1e-5, "float32", HOST))
    scale, bias = normal(channels, "float32", 1), normal(channels, "float32", 2)
    for batch in BATCHES:
        x = normal((batch, channels, *space), "float32")
        grouped = x.reshape(batch, groups, channels // groups * int(np.prod(space))).astype("float64")
        centred = grouped - grouped.mean(2, keepdims=True)
        unit = (centred / np.sqrt((centred**2).mean(2, keepdims=True) + 1e-5)).reshape(x.shape)
        along = (-1, *[1] * len(space))
        want = unit * scale.reshape(along) + bias.reshape(along)
        np.testing.assert_allclose(run(x, scale, bias, out=x.shape), want, rtol=3e-6, atol=3e-6)
