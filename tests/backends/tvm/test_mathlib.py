"""Elementary functions against numpy in a wider format, over random, special and subnormal arguments."""

import numpy as np
import pytest
import torch
from scipy import special

from bench.accuracy import FUNCTIONS, errors
from mlec.backends.tvm.compat import T, prim_func, tvm
from mlec.backends.tvm.kernels import mathlib
from mlec.backends.tvm.kernels.vector import broadcast, cast_to, is_nan, load, maximum, minimum, reduce_lanes, store
from mlec.backends.tvm.target import TargetInfo

HOST = TargetInfo.host()


def compiled(function, dtype, lanes, arguments=1):
    """A callable that applies ``function`` to flat arrays whose length is a multiple of ``lanes``."""

    def run(*arrays):
        n = arrays[0].size
        with prim_func("kernel") as kernel:
            inputs = [T.arg(f"x{i}", T.buffer((n,), dtype)) for i in range(arguments)]
            out = T.arg("y", T.buffer((n,), dtype))
            with T.serial(n // lanes) as i:
                store(out, function(*(load(x, [i * lanes], lanes) for x in inputs)), [i * lanes])
        module = tvm.compile(kernel.func, HOST.tvm_target())
        result = tvm.runtime.empty((n,), dtype)
        module["kernel"](*(tvm.runtime.tensor(a) for a in arrays), result)
        return result.numpy()

    return run


def arguments(dtype):
    rng = np.random.default_rng(0)
    info = np.finfo(dtype)
    special_values = [0.0, -0.0, np.inf, -np.inf, np.nan, 1, -1, info.tiny, -info.tiny, info.max, -info.max, info.eps]
    special_values += [
        info.smallest_subnormal,
        info.tiny / 8,
        88.72,
        88.73,
        -87.4,
        -103.9,
        709.7,
        709.8,
        -745.2,
        1 - info.eps,
    ]
    values = np.concatenate(
        [
            special_values,
            rng.normal(size=20000),
            rng.uniform(-110, 110, 20000),
            rng.uniform(-6, 6, 20000),
            rng.uniform(-760, 760, 4000),
            np.exp(rng.uniform(-80, 80, 20000)) * rng.choice([-1, 1], 20000),
        ]
    )
    return np.resize(values, -(-values.size // 16) * 16).astype(dtype)


def float32_numbers(step):
    """Every so many-th bit pattern; 16 or a multiple."""
    patterns = np.arange(0, 1 << 32, step, np.uint64)
    return np.resize(patterns, -(-patterns.size // 16) * 16).astype(np.uint32).view(np.float32)


WORST = {
    "exp": (5.19920921, -4.4511361483848422, 236.03333433480054), "expm1": (0.405379146, 0.35002631449374544, 0.34706255935621527),
    "log": (1.41228855, 0.70689565472505023), "log1p": (0.412294775, 0.39866217925091813, 0.41319433289055552),
    "tanh": (0.550550938, -0.550262451, -0.51990470707650305), "sigmoid": (-1.10128641, -1.11071944, -1.1093141213120248),
    "softplus": (0.341094702, -0.43658588435237067), "erf": (-1.01589882, 1.0189589609600307),
    "silu": (-16.6997337, -5.20885134, -36.905066132803896, -21.072371465437215),
    "gelu": (-0.248212397, -1.673511065390497),
}  # fmt: skip
"""Where `bench.accuracy` found the largest errors."""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_stays_within_its_error_bound(name, dtype):
    dense = float32_numbers(9973 if dtype == "float32" else 99_991)
    with np.errstate(invalid="ignore"):
        x = np.concatenate([arguments(dtype), dense.astype(dtype), np.resize(WORST.get(name, 0), 16).astype(dtype)])
    got = compiled(FUNCTIONS[name].ours, dtype, HOST.lanes(np.dtype(dtype).itemsize * 8))(x)
    zeros = x == 0
    with np.errstate(all="ignore"):
        want = FUNCTIONS[name].reference(x[zeros].astype(np.longdouble))
    np.testing.assert_array_equal(np.signbit(got[zeros]), np.signbit(want))
    error = errors(FUNCTIONS[name], x, got)
    assert error.max() <= 2, f"{error.max():.2f} units in the last place at {x[error.argmax()]!r}"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gelu_has_its_limits(dtype):
    x = np.array([-np.inf, -1e30, -50, np.inf, 1e30, 50, np.nan, 0], dtype)
    with np.errstate(invalid="ignore"):
        want = np.where(x < 0, 0, x)
    np.testing.assert_array_equal(compiled(mathlib.gelu, dtype, 8)(x), want)


def test_gelu_of_negative_numbers_does_not_cancel():
    x = np.linspace(-3, -1e-3, 4096).astype("float32")
    want = x * special.ndtr(x.astype("float64"))
    np.testing.assert_allclose(compiled(mathlib.gelu, "float32", 16)(x), want, rtol=6e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exponentials_of_negative_numbers(dtype):
    x = -np.abs(arguments(dtype))
    got = compiled(mathlib.exp_of_negative, dtype, 16)(x)
    wide = np.exp(x.astype(np.longdouble))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(x))
    normal = wide > 2 * np.finfo(dtype).tiny
    assert np.max(np.abs(got[normal] - wide[normal]) / np.spacing(wide[normal].astype(dtype))) <= 2
    assert np.all(got[wide < np.finfo(dtype).tiny / 2] == 0)
    assert np.all(got[np.isinf(x)] == 0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("lanes", [1, 5, 32])
def test_any_number_of_lanes_gives_the_same_bits(dtype, lanes):
    x = arguments(dtype)[: 320 * 20]
    function = lambda v: mathlib.tanh(v) + mathlib.erf(v)  # noqa: E731
    np.testing.assert_array_equal(compiled(function, dtype, lanes)(x), compiled(function, dtype, 16)(x))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extrema_and_nan_test_follow_numpy(dtype):
    values = np.array([0, 1, -1, np.inf, -np.inf, np.nan, 2, -3], dtype)
    a, b = (np.ascontiguousarray(m).ravel() for m in np.meshgrid(values, values))
    np.testing.assert_array_equal(compiled(maximum, dtype, 8, 2)(a, b), np.maximum(a, b))
    np.testing.assert_array_equal(compiled(minimum, dtype, 8, 2)(a, b), np.minimum(a, b))
    got = compiled(lambda v: cast_to(dtype, is_nan(v)), dtype, 8)(a)
    np.testing.assert_array_equal(got, np.isnan(a))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_lanes_reduce_in_a_fixed_order(dtype):
    x = np.random.default_rng(0).normal(size=7 * 8).astype(dtype)

    def spread(v):
        return broadcast(reduce_lanes(v, lambda p, q: p + q), 7)

    got = compiled(spread, dtype, 7)(x)
    np.testing.assert_allclose(got, np.repeat(x.reshape(-1, 7).sum(1), 7), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sigmoid_is_zero_where_that_of_libraries_is(dtype):
    end = np.log(np.finfo(dtype).max)
    x = np.array([-end * 1.0001, -end * 0.9999, -end - 20, -np.inf, np.nan], dtype)
    got = compiled(FUNCTIONS["sigmoid"].ours, dtype, 1)(x)
    np.testing.assert_array_equal(got == 0, torch.sigmoid(torch.from_numpy(x)).numpy() == 0)
    np.testing.assert_array_equal(got == 0, [True, False, True, True, False])
