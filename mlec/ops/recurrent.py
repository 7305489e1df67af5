"""Recurrent layers over axis 1 of ``x [n, t, features]``: one direction of one layer each.

Matrices, and x, may be of 16 bits where states and biases are f32: then what a matrix multiplies is rounded to 16 bits there, and all else
is computed in f32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mlec.ir.dtype import DType
from mlec.ir.op import Array, Attrs, Case, Cost, OpDef, Trait, moved_bytes, register
from mlec.ir.types import TensorType
from mlec.ops.common import N, bool_attr, choice_attr, floats, operands, require, same_dtype
from mlec.ops.elementwise import sigmoid

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": sigmoid,
}
"""Of a plain recurrence."""


def _recurrent_type(gates: int, states: int) -> Callable[[Sequence[TensorType], Attrs], Sequence[TensorType]]:
    def infer(types: Sequence[TensorType], attrs: Attrs) -> Sequence[TensorType]:
        x, h0 = types[0], types[1]
        require(x.rank == 3 and h0.rank == 2, f"needs x [n, t, i] and h0 [n, h], got {x} and {h0}", "E_SHAPE")
        hidden = h0.shape[1]
        w_ih, w_hh, *biases = types[1 + states :]
        multiplied, kept = same_dtype([w_ih, w_hh]), same_dtype([*types[1 : 1 + states], *biases])
        require(x.dtype in (multiplied, kept), f"needs x of {kept} or as the matrices, got {x}", "E_DTYPE")
        narrow = multiplied in (DType.F16, DType.BF16) and kept is DType.F32
        require(narrow or multiplied is kept, f"states of {kept} do not go with matrices of {multiplied}", "E_DTYPE")
        for t in types[1 : 1 + states]:
            require(t.shape == (x.shape[0], hidden), f"states must be [{x.shape[0]}, {hidden}], got {t}", "E_SHAPE")
        require(
            w_ih.shape == (hidden * gates, x.shape[2]),
            f"w_ih must be [{hidden * gates}, {x.shape[2]}], got {w_ih}",
            "E_SHAPE",
        )
        require(
            w_hh.shape == (hidden * gates, hidden), f"w_hh must be [{hidden * gates}, {hidden}], got {w_hh}", "E_SHAPE"
        )
        for b in biases:
            require(b.shape == (hidden * gates,), f"biases must be [{hidden * gates}], got {b}", "E_SHAPE")
        return [TensorType((x.shape[0], x.shape[1], hidden), kept), *types[1 : 1 + states]]

    return infer


def _recurrent_cost(inputs: Sequence[TensorType], results: Sequence[TensorType], attrs: Attrs) -> Cost:
    x, states = inputs[0], len(results) - 1
    w_ih, w_hh = inputs[1 + states : 3 + states]
    return Cost(x.shape[0] * x.shape[1] * (w_ih.size + w_hh.size) * 2, moved_bytes(inputs, results))


def _steps(x: Array, reverse: bool) -> range:
    return range(x.shape[1] - 1, -1, -1) if reverse else range(x.shape[1])


def _product(rows: Array, weights: Array, dtype: np.dtype[np.generic]) -> Array:
    """Rows times the transposed matrix, in the type of the states; see above where the matrix has another."""
    if weights.dtype == dtype:
        return np.asarray(rows @ weights.T)
    return np.asarray(rows.astype(weights.dtype).astype(dtype) @ weights.astype(dtype).T)


def _lstm(
    x: Array, h0: Array, c0: Array, w_ih: Array, w_hh: Array, b: Array, reverse: bool
) -> tuple[Array, Array, Array]:
    h, c, hidden = h0, c0, h0.shape[1]
    y = np.zeros((*x.shape[:2], hidden), h0.dtype)
    for t in _steps(x, reverse):
        gates = _product(x[:, t], w_ih, h.dtype) + _product(h, w_hh, h.dtype) + b
        i, f, g, o = (gates[:, k * hidden : (k + 1) * hidden] for k in range(4))
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        y[:, t] = h
    return y, h, c


def _gru(x: Array, h0: Array, w_ih: Array, w_hh: Array, b_ih: Array, b_hh: Array, reverse: bool) -> tuple[Array, Array]:
    h, hidden = h0, h0.shape[1]
    y = np.zeros((*x.shape[:2], hidden), h0.dtype)
    for t in _steps(x, reverse):
        xi, hi = _product(x[:, t], w_ih, h.dtype) + b_ih, _product(h, w_hh, h.dtype) + b_hh
        r = sigmoid(xi[:, :hidden] + hi[:, :hidden])
        z = sigmoid(xi[:, hidden : 2 * hidden] + hi[:, hidden : 2 * hidden])
        candidate = np.tanh(xi[:, 2 * hidden :] + r * hi[:, 2 * hidden :])
        h = (1 - z) * candidate + z * h
        y[:, t] = h
    return y, h


def _rnn(
    x: Array, h0: Array, w_ih: Array, w_hh: Array, b: Array, activation: str, reverse: bool
) -> tuple[Array, Array]:
    h = h0
    y = np.zeros((*x.shape[:2], h0.shape[1]), h0.dtype)
    for t in _steps(x, reverse):
        total = _product(x[:, t], w_ih, h.dtype) + _product(h, w_hh, h.dtype) + b
        h = ACTIVATIONS[activation](total)
        y[:, t] = h
    return y, h


def _recurrent_sample(
    gates: int, states: int, biases: int, activations: Sequence[str] = ()
) -> Callable[[np.random.Generator], Case]:
    def sample(rng: np.random.Generator) -> Case:
        h, i = 4, 3
        weights = (floats(rng, gates * h, i, low=-1, high=1), floats(rng, gates * h, h, low=-1, high=1))
        state = tuple(floats(rng, N, h) for _ in range(states))
        bias = tuple(floats(rng, gates * h) for _ in range(biases))
        attrs = {"activation": str(rng.choice(activations))} if activations else {}
        return Case((floats(rng, N, 5, i), *state, *weights, *bias), {"reverse": bool(rng.integers(2)), **attrs})

    return sample


_REVERSE = bool_attr("reverse")
register(
    OpDef(
        "lstm", operands("x h0 c0 w_ih w_hh b"), (_REVERSE,), _recurrent_type(4, 2), _lstm, _recurrent_sample(4, 2, 1), _recurrent_cost,
        Trait.CONTRACTION, 512.0, "long short-term memory over axis 1; gates in the order i f g o; gives all h, last h, last c",
    )
)  # fmt: skip
register(
    OpDef(
        "gru", operands("x h0 w_ih w_hh b_ih b_hh"), (_REVERSE,), _recurrent_type(3, 1), _gru, _recurrent_sample(3, 1, 2), _recurrent_cost,
        Trait.CONTRACTION, 512.0, "gated recurrent unit over axis 1; gates in the order r z n; gives all h, last h",
    )
)  # fmt: skip
register(
    OpDef(
        "rnn", operands("x h0 w_ih w_hh b"), (choice_attr("activation", *ACTIVATIONS), _REVERSE), _recurrent_type(1, 1), _rnn,
        _recurrent_sample(1, 1, 1, tuple(ACTIVATIONS)), _recurrent_cost,
        Trait.CONTRACTION, 512.0, "plain recurrence over axis 1; gives all h, last h",
    )
)  # fmt: skip
