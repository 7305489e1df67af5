"""Recurrent layers against torch: batches and lengths that do not divide the blocks, both directions."""

import numpy as np
import pytest
import torch

from mlec.backends.tvm.compat import tirx
from mlec.backends.tvm.kernels.rnn import recurrent, recurrent_lanes
from mlec.backends.tvm.kernels.rnn_layer import GATES, joined_biases, pack_recurrent
from mlec.backends.tvm.target import TargetInfo
from mlec.ir import lookup
from tests.backends.tvm.kernel_helpers import HOST, compile_kernel


def packed_weights(kind, w_ih, w_hh, biases, lanes):
    """As the lowering packs them."""
    joined = [joined_biases(*biases), biases[1]] if kind == "gru" else biases
    return [pack_recurrent(w, GATES[kind], lanes) for w in (w_ih, w_hh, *joined)]


@pytest.mark.parametrize(("cpu", "reverse"), [("host", False), ("host", True), ("x86-64-v3", False)])
@pytest.mark.parametrize(("kind", "dtype", "features", "hidden", "activation"), [
    ("lstm", "float32", 3, 20, "tanh"),
    ("lstm", "float64", 8, 16, "tanh"),
    ("gru", "float32", 5, 48, "tanh"),
    ("gru", "float64", 2, 3, "tanh"),
    ("rnn", "float32", 7, 33, "tanh"),
    ("rnn", "float32", 4, 16, "relu"),
])  # fmt: skip
def test_against_torch(kind, dtype, features, hidden, activation, cpu, reverse):
    target = HOST if cpu == "host" else TargetInfo.for_cpu(cpu)
    n, t = tirx.Var("n", "int64"), tirx.Var("t", "int64")
    run = compile_kernel(recurrent(kind, n, t, features, hidden, reverse, dtype, target, activation), target)
    torch.manual_seed(0)
    options = {"nonlinearity": activation} if kind == "rnn" else {}
    layer = getattr(torch.nn, kind.upper())(features, hidden, batch_first=True, **options).to(getattr(torch, dtype))
    w_ih, w_hh, b_ih, b_hh = (p.detach().numpy() for p in layer.parameters())
    biases = [b_ih, b_hh] if kind == "gru" else [b_ih + b_hh]
    lanes = recurrent_lanes(dtype, target)
    packed = packed_weights(kind, w_ih, w_hh, biases, lanes)
    rng = np.random.default_rng(0)
    for batch, steps in ((0, 3), (1, 1), (1, 21), (2, 8), (5, 10), (9, 0), (33, 3)):
        x = rng.normal(size=(batch, steps, features)).astype(dtype)
        states = [rng.normal(size=(batch, hidden)).astype(dtype) for _ in range(1 + (kind == "lstm"))]
        got = run(x, *states, *packed, out=[(batch, steps, hidden)] + [(batch, hidden)] * len(states), dtype=dtype)
        want = [np.zeros((batch, steps, hidden)), *states]
        if batch and steps:
            given = [torch.from_numpy(s)[None] for s in states]
            ordered = torch.from_numpy(x[:, ::-1].copy() if reverse else x)
            with torch.no_grad():
                y, last = layer(ordered, tuple(given) if kind == "lstm" else given[0])
            y = y.numpy()[:, ::-1] if reverse else y.numpy()
            want = [y, *(s[0].numpy() for s in (last if kind == "lstm" else [last]))]
        unit = 1e-5 if dtype == "float32" else 1e-12
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=unit, atol=unit)


def test_a_plain_recurrence_with_a_sigmoid():
    rng = np.random.default_rng(0)
    x, h, w, u, b = (rng.normal(size=s).astype(np.float32) for s in ((5, 9, 4), (5, 20), (20, 4), (20, 20), (20,)))
    run = compile_kernel(recurrent("rnn", 5, 9, 4, 20, False, "float32", HOST, "sigmoid"), HOST)
    packed = [pack_recurrent(a, 1, recurrent_lanes("float32", HOST)) for a in (w, u, b)]
    got = run(x, h, *packed, out=[(5, 9, 20), (5, 20)], dtype="float32")
    wanted = lookup("rnn").evaluate([x, h, w, u, b], {"activation": "sigmoid", "reverse": False}, {})
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_what_is_not_finite_stays_in_its_sequence(kind):
    """From its step on, and among sequences of a tile as well as in one that is left."""
    rng = np.random.default_rng(0)
    n, steps, features, hidden, count = 6, 7, 3, 20, GATES[kind]
    x, h, c = (rng.normal(size=s).astype(np.float32) for s in ((n, steps, features), (n, hidden), (n, hidden)))
    w, u = (rng.normal(size=(count * hidden, k)).astype(np.float32) for k in (features, hidden))
    biases = [rng.normal(size=count * hidden).astype(np.float32) for _ in range(2 if kind == "gru" else 1)]
    states = [h, c] if kind == "lstm" else [h]
    packed = packed_weights(kind, w, u, biases, recurrent_lanes("float32", HOST))
    run = compile_kernel(recurrent(kind, n, steps, features, hidden, False, "float32", HOST))
    out = [(n, steps, hidden), *[(n, hidden)] * len(states)]
    plain = run(x, *states, *packed, out=out)[0]
    x[1, 3, 2], x[5, 2, 0], x[2, 4, 1] = np.nan, np.nan, np.inf
    y = run(x, *states, *packed, out=out)[0]
    for row, step in ((1, 3), (5, 2)):
        np.testing.assert_array_equal(y[row, :step], plain[row, :step])
        assert np.isnan(y[row, step:]).all()
    np.testing.assert_array_equal(y[[0, 3, 4]], plain[[0, 3, 4]])
    np.testing.assert_array_equal(y[2, :4], plain[2, :4])
    assert np.isfinite(y[2]).all()  # gates are saturated
