"""Normalisations against numpy in float64."""

import numpy as np
import pytest

from mlec.backends.tvm.compat import tirx
from mlec.backends.tvm.kernels import tile
from mlec.backends.tvm.kernels.epilogue import BufferSpec, Epilogue, Prologue
from mlec.backends.tvm.kernels.norm import group_norm, layer_norm, rms_norm
from mlec.backends.tvm.kernels.vector import load
from tests.backends.tvm.kernel_helpers import HOST, compile_kernel, same_by_threads

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


@pytest.fixture
def eager_threads(monkeypatch):
    """Rows of 44 Ki elements are worth threads, so that those of tests are cut into pieces."""
    monkeypatch.setattr(tile, "SERIAL_WORK", 1 << 19)


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("centred", [False, True])
def test_long_lines_give_the_same_bits_by_any_number_of_threads(centred, symbolic, eager_threads):
    """Far from zero, with a NaN in the last piece of one line; also where they are computed first and wait in the result."""
    shape = (3, 3 * 32768 + 7)
    x = normal(shape, "float32") + 30 * centred
    x[1, -1] = np.nan
    scale, bias = (normal(shape[1:], "float32", seed) for seed in (1, 2))
    extents = (tirx.Var("n", "int64"), tirx.Var("t", "int64")) if symbolic else shape
    wide = x.astype("float64") * 2
    centre = wide - wide.mean(1, keepdims=True) if centred else wide
    want = centre / np.sqrt((centre**2).mean(1, keepdims=True) + 1e-5) * scale + bias * centred
    twice = Prologue((BufferSpec(extents, "float32"),), lambda at, width, x: load(x[0], list(at), width) * 2.0)
    norm, factors = (layer_norm, (scale, bias)) if centred else (rms_norm, (scale,))
    made = compile_kernel(norm(extents, 1, 1e-5, "float32", HOST, prologue=twice))
    got = same_by_threads(made, x, *factors, out=shape)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    plain = compile_kernel(norm(extents, 1, 1e-5, "float32", HOST))
    np.testing.assert_array_equal(same_by_threads(plain, 2 * x, *factors, out=shape), got)


@pytest.mark.parametrize(("channels", "space"), [(50, (33, 31)), (2, (300, 301))], ids=["many to a piece", "in parts"])
def test_long_groups_give_the_same_bits_by_any_number_of_threads(channels, space, eager_threads):
    n, h, w = (tirx.Var(name, "int64") for name in "nhw")
    x = normal((2, 2 * channels, *space), "float32")
    scale, bias = normal(2 * channels, "float32", 1), normal(2 * channels, "float32", 2)
    grouped = x.reshape(2, 2, -1).astype("float64")
    centred = grouped - grouped.mean(2, keepdims=True)
    unit = (centred / np.sqrt((centred**2).mean(2, keepdims=True) + 1e-5)).reshape(x.shape)
    for extents in (x.shape, (n, 2 * channels, h, w)):
        run = compile_kernel(group_norm(extents, 2, 1e-5, "float32", HOST))
        got = same_by_threads(run, x, scale, bias, out=x.shape)
        np.testing.assert_allclose(got, unit * scale[:, None, None] + bias[:, None, None], rtol=1e-5, atol=1e-5)


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
