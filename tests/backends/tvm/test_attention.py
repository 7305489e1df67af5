"""Attention against numpy in float64: masks of every kind, symbolic lengths, broadcast heads."""

from dataclasses import replace

import numpy as np
import pytest

from mlec.backends.tvm.compat import tirx
from mlec.backends.tvm.kernels.attention import attention
from mlec.backends.tvm.kernels.epilogue import BufferSpec
from tests.backends.tvm.kernel_helpers import HOST, compile_kernel, same_by_threads


def normal(shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def reference(q, k, v, mask, scale, causal):
    scores = (q.astype("float64") * scale) @ np.swapaxes(k.astype("float64"), -1, -2)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    if causal:
        scores = np.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -np.inf)
    e = np.exp(scores - scores.max(-1, keepdims=True, initial=-np.inf))
    return (e / e.sum(-1, keepdims=True)) @ v.astype("float64")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("d", "e"), [(16, 16), (20, 7), (64, 64)])
def test_symbolic_lengths(d, e, causal, dtype):
    b, m, t = (tirx.Var(name, "int64") for name in "bmt")
    run = compile_kernel(attention((b, 2, m, d), (b, 2, t, d), (b, 2, t, e), [], d**-0.5, causal, dtype, HOST))
    for batch, rows, columns in ((0, 3, 3), (1, 1, 1), (1, 9, 0), (2, 5, 9), (1, 33, 33), (1, 8, 70)):
        q, k = normal((batch, 2, rows, d), dtype), normal((batch, 2, columns, d), dtype, 1)
        v = normal((batch, 2, columns, e), dtype, 2)
        got = run(q, k, v, out=(batch, 2, rows, e), dtype=dtype)
        unit = 5e-6 if dtype == "float32" else 1e-13
        np.testing.assert_allclose(got, reference(q, k, v, None, d**-0.5, causal), rtol=unit, atol=unit)


@pytest.mark.parametrize("shape", [(3, 2, 10, 21), (3, 1, 1, 21), (10, 21), (3, 1, 10, 1)])
@pytest.mark.parametrize("kind", ["bool", "float32"])
def test_masks(shape, kind):
    n = tirx.Var("n", "int64")
    mask_type = BufferSpec((n, *shape[1:]) if shape[0] == 3 else shape, kind)
    q_shape, k_shape = (n, 2, 10, 16), (n, 2, 21, 16)
    run = compile_kernel(attention(q_shape, k_shape, k_shape, [mask_type], 0.25, False, "float32", HOST))
    q, k, v = normal((3, 2, 10, 16)), normal((3, 2, 21, 16), seed=1), normal((3, 2, 21, 16), seed=2)
    mask = np.random.default_rng(3).random(shape) < 0.6
    mask[..., 0] = True
    if kind == "float32":
        mask = np.where(mask, normal(shape), -np.inf).astype("float32")
    got = run(q, k, v, mask, out=(3, 2, 10, 16))
    np.testing.assert_allclose(got, reference(q, k, v, mask, 0.25, False), rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_capped_scores_with_a_mask_that_hides_and_one_that_is_added(dtype):
    """In that order; rows whose keys are all hidden weigh them by what is added."""
    n = tirx.Var("n", "int64")
    specs = [BufferSpec((10, 21), "bool"), BufferSpec((n, 1, 1, 21), dtype)]
    shape, keys = (n, 2, 10, 16), (n, 2, 21, 16)
    run = compile_kernel(attention(shape, keys, keys, specs, 0.7, False, dtype, HOST, fill=-1e4, cap=2.5))
    q, k, v = normal((3, 2, 10, 16), dtype), normal((3, 2, 21, 16), dtype, 1), normal((3, 2, 21, 16), dtype, 2)
    keep, added = np.random.default_rng(3).random((10, 21)) < 0.6, normal((3, 1, 1, 21), dtype, 4)
    keep[4] = False
    scores = 2.5 * np.tanh((q * 0.7) @ np.swapaxes(k, -1, -2) / 2.5)
    scores = np.where(keep, scores, np.asarray(-1e4, dtype)) + added
    e = np.exp(scores - scores.max(-1, keepdims=True))
    got = run(q, k, v, keep, added, out=(3, 2, 10, 16), dtype=dtype)
    unit = 1e-5 if dtype == "float32" else 1e-11  # what is added is rounded beside what hides
    hidden = np.arange(10) == 4
    wanted = e / e.sum(-1, keepdims=True) @ v
    np.testing.assert_allclose(got[:, :, ~hidden], wanted[:, :, ~hidden], rtol=unit, atol=unit)
    np.testing.assert_allclose(got[:, :, hidden], wanted[:, :, hidden], rtol=100 * unit, atol=100 * unit)


def test_row_without_a_visible_key_is_nan_and_shared_keys_broadcast():
    q, k, v = normal((2, 3, 4, 8)), normal((1, 3, 5, 8), seed=1), normal((3, 5, 8), seed=2)
    mask = np.ones((4, 5), bool)
    mask[2] = False
    func = attention(q.shape, k.shape, v.shape, [BufferSpec((4, 5), "bool")], 1.0, False, "float32", HOST)
    got = compile_kernel(func)(q, k, v, mask, out=(2, 3, 4, 8))
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(got, reference(q, k, v, mask, 1.0, False), rtol=5e-6, atol=5e-6)
    assert np.isnan(got[:, :, 2]).all()


@pytest.mark.parametrize("causal", [False, True])
def test_heads_lie_between_the_axes_of_rows(causal):
    """q, k, v as products of rows leave them, [n, rows, heads, depth], and the result for the product that follows."""
    n, order = tirx.Var("n", "int64"), (0, 2, 1, 3)
    heads, m, t, d, e = 3, 37, 45, 20, 24
    shapes = (n, heads, m, d), (n, heads, t, d), (n, heads, t, e)
    run = compile_kernel(attention(*shapes, [], 0.3, causal, "float32", HOST, orders=[order] * 4))
    for batch in (0, 1, 4):
        q, k = normal((batch, m, heads, d)), normal((batch, t, heads, d), seed=1)
        v = normal((batch, t, heads, e), seed=2)
        got = run(q, k, v, out=(batch, m, heads, e))
        want = reference(*(x.transpose(order) for x in (q, k, v)), None, 0.3, causal).transpose(order)
        np.testing.assert_allclose(got, want, rtol=5e-6, atol=5e-6)


def test_what_is_not_finite_reaches_what_depends_on_it():
    """Of a query its own row, of a key all rows of its head, of a value its column: as in numpy, in every part of a tile."""
    shape = (2, 2, 19, 20)
    q, k, v = (normal(shape, seed=seed) for seed in range(3))
    q[0, 0, 3, 5], q[0, 0, 18, 0], k[0, 1, 17, 2] = np.nan, np.inf, np.nan
    v[1, 0, 4, 7], v[1, 1, 18, 19] = np.inf, np.nan
    with np.errstate(invalid="ignore"):
        want = reference(q, k, v, None, 0.2, False)
    assert 0 < np.isnan(want).sum() < want.size
    got = compile_kernel(attention(shape, shape, shape, [], 0.2, False, "float32", HOST))(q, k, v, out=shape)
    np.testing.assert_allclose(got, want, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_the_queries_of_a_head_are_shared_by_threads_and_keep_their_bits(causal, symbolic):
    """In 4 and 5 parts, of 64 queries and more; the last one's last tile is not whole."""
    m, t, d, n = 333, 300, 20, tirx.Var("n", "int64")
    mask = BufferSpec((m, t), "float32")
    q, k, v = normal((1, m, d)), normal((1, t, d), seed=1), normal((1, t, d), seed=2)
    added = normal((m, t), seed=3)
    want = reference(q, k, v, added, 0.3, causal)
    shapes = ((n, tirx.Var("m", "int64"), d), (n, tirx.Var("t", "int64"), d)) if symbolic else ((1, m, d), (1, t, d))
    if symbolic:
        mask = BufferSpec((shapes[0][1], shapes[1][1]), "float32")
    seen = set()
    for cores in (2, 16):
        func = attention(*shapes, shapes[1], [mask], 0.3, causal, "float32", replace(HOST, cores=cores))
        got = same_by_threads(compile_kernel(func), q, k, v, added, out=(1, m, d))
        np.testing.assert_allclose(got, want, rtol=5e-6, atol=5e-6)
        seen.add(got.tobytes())
    assert len(seen) == 1
