"""Recurrent layers against torch: batches and lengths that do not divide the blocks, both directions."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch

from mlec.backends.tvm.compat import tirx
from mlec.backends.tvm.kernels.gemm_bf16 import has_tiles
from mlec.backends.tvm.kernels.rnn import recurrent, recurrent_lanes
from mlec.backends.tvm.kernels.rnn_bf16 import pack_tiled, recurrent_bf16
from mlec.backends.tvm.kernels.rnn_layer import GATES, STATES, Cells, joined_biases, pack_recurrent
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
    run = compile_kernel(recurrent(Cells(kind, activation, n, t, features, hidden, reverse, dtype), target), target)
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
    run = compile_kernel(recurrent(Cells("rnn", "sigmoid", 5, 9, 4, 20, False, "float32"), HOST), HOST)
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
    run = compile_kernel(recurrent(Cells(kind, "tanh", n, steps, features, hidden, False, "float32"), HOST))
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


def layer(kind, n, steps, features, hidden, seed=0):
    """Operands of an op: x, states, matrices, biases."""
    rng = np.random.default_rng(seed)
    gates = GATES[kind]
    shapes = [
        (n, steps, features),
        *[(n, hidden)] * len(STATES[kind]),
        (gates * hidden, features),
        (gates * hidden, hidden),
    ]
    shapes += [(gates * hidden,)] * (2 if kind == "gru" else 1)
    return [(rng.normal(size=s) / np.sqrt(s[-1])).astype(np.float32) for s in shapes]


def evaluated(kind, operands):
    attrs = {"activation": "tanh"} if kind == "rnn" else {}
    return lookup(kind).evaluate(operands, {"reverse": False, **attrs}, {})


def narrowed(kind, operands):
    """With matrices of bf16."""
    first = 1 + len(STATES[kind])
    matrices = [w.astype(ml_dtypes.bfloat16) for w in operands[first : first + 2]]
    return [*operands[:first], *matrices, *operands[first + 2 :]]


class Compiled:
    """A layer for any number of sequences: called with the operands of the op."""

    def __init__(self, kind, features, hidden, target=HOST, narrow=False, rows="float32"):
        cells = Cells(kind, "tanh", tirx.Var("n", "int64"), tirx.Var("t", "int64"), features, hidden, False, "float32")
        program = recurrent_bf16(cells, target, rows=rows) if narrow else recurrent(cells, target, rows=rows)
        self.kind, self.narrow, self.hidden, self.target = kind, narrow, hidden, target
        self.run = compile_kernel(program, target)

    def __call__(self, x, *operands):
        states = len(STATES[self.kind])
        initial, (w_ih, w_hh, *biases) = operands[:states], operands[states:]
        packed = packed_weights(self.kind, w_ih, w_hh, biases, recurrent_lanes("float32", self.target))
        if self.narrow:
            packed[:2] = [pack_tiled(w, GATES[self.kind]) for w in (w_ih, w_hh)]
        return self.run(x, *initial, *packed, out=[(*x.shape[:2], self.hidden)] + [(len(x), self.hidden)] * states)


tiles_only = pytest.mark.skipif(not has_tiles(HOST), reason="needs a matrix unit for bf16")


@pytest.mark.parametrize("narrow", [False, pytest.param(True, marks=tiles_only)])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_a_sequence_gives_the_same_bits_in_any_batch(kind, narrow):
    """One or two take other ways than a tile of them; threads share many."""
    operands = layer(kind, 200, 9, 5, 40)
    x, *operands = narrowed(kind, operands) if narrow else operands
    states, rest = operands[: len(STATES[kind])], operands[len(STATES[kind]) :]
    run = Compiled(kind, 5, 40, narrow=narrow)
    whole = run(x, *states, *rest)
    for n in (1, 2, 3, 7, 17, 64):
        for got, want in zip(run(x[:n], *[s[:n] for s in states], *rest), whole, strict=True):
            np.testing.assert_array_equal(got, want[:n])


@pytest.mark.parametrize("narrow", [False, pytest.param(True, marks=tiles_only)])
def test_threads_that_share_units_give_the_same_bits(narrow):
    """Those of a wide layer, where a step is much work: as if its weights did not fit the cache."""
    operands = layer("lstm", 3, 20, 5, 304)
    x, h, c, *weights = narrowed("lstm", operands) if narrow else operands
    one, several = (Compiled("lstm", 5, 304, replace(HOST, l2_bytes=size), narrow) for size in (1 << 30, 1))
    for n in (1, 3):
        for a, b in zip(several(x[:n], h[:n], c[:n], *weights), one(x[:n], h[:n], c[:n], *weights), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_subnormal_numbers_and_negative_zeros(kind):
    """Without biases, of such inputs and states come such results."""
    x, *operands = layer(kind, 7, 5, 6, 20)
    for state in (x, *operands[: len(STATES[kind])]):
        state *= np.float32(1e-40)
    for bias in operands[2 + len(STATES[kind]) :]:
        bias[:] = 0
    x[0], x[1, 2] = -0.0, np.finfo(np.float32).smallest_subnormal
    for got, want in zip(Compiled(kind, 6, 20)(x, *operands), evaluated(kind, [x, *operands]), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-43)
        assert 1e-42 < np.abs(got).max() < np.finfo(np.float32).tiny


@tiles_only
@pytest.mark.parametrize(("kind", "features", "hidden"), [("lstm", 3, 20), ("gru", 40, 33), ("rnn", 64, 80)])
@pytest.mark.parametrize("rows", ["float32", "bfloat16"])
def test_bf16_by_a_matrix_unit(kind, features, hidden, rows):
    """Batches that are no whole tiles, units that are no whole steps. A state that rounds the other way makes the largest differences."""
    run = Compiled(kind, features, hidden, narrow=True, rows=rows)
    for n, steps in ((0, 3), (1, 5), (16, 1), (33, 7), (150, 3)):
        x, *operands = narrowed(kind, layer(kind, n, steps, features, hidden))
        given = x.astype(ml_dtypes.bfloat16) if rows == "bfloat16" else x
        for got, want in zip(run(given, *operands), evaluated(kind, [x, *operands]), strict=True):
            np.testing.assert_allclose(got, want, atol=4e-3)
            assert n == 0 or np.mean(np.abs(got - want)) < 2e-5


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_rows_of_bf16_without_a_matrix_unit(kind):
    """They are widened; the state is not rounded."""
    target = TargetInfo.for_cpu("x86-64-v3")
    x, *operands = layer(kind, 7, 4, 5, 20)
    x = x.astype(ml_dtypes.bfloat16)
    wide = evaluated(kind, [x.astype(np.float32), *operands])
    for got, want in zip(Compiled(kind, 5, 20, target, rows="bfloat16")(x, *operands), wide, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@tiles_only
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_what_is_not_finite_stays_in_its_sequence_of_a_matrix_unit(kind):
    x, *operands = narrowed(kind, layer(kind, 21, 5, 3, 20))
    run = Compiled(kind, 3, 20, narrow=True)
    plain = run(x, *operands)[0]
    x[4, 2, 1], x[20, 0, 0], x[9, 3, 2] = np.nan, np.nan, np.inf
    y = run(x, *operands)[0]
    others = [i for i in range(21) if i not in (4, 9, 20)]
    np.testing.assert_array_equal(y[others], plain[others])
    np.testing.assert_array_equal(y[4, :2], plain[4, :2])
    assert np.isnan(y[4, 2:]).all()
    assert np.isnan(y[20]).all()
    assert np.isfinite(y[9]).all()  # gates are saturated
