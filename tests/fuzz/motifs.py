"""Small patterns that passes and kernels look for, spelled out as models have them; ops drawn one by one hardly ever make them.

Each takes rows of float32, ``(n, width)``, and gives values that read them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mlec.ir import DType, Value
from mlec.ir.op import Array

Call = Callable[..., Value]
"""Adds a call of an op, ``call("add", x, y)``; None where its result is no moderate number."""
Constant = Callable[[Array], Value]
Motif = Callable[[Call, Constant, Value, np.random.Generator], list[Value]]


def _weights(rng: np.random.Generator, *shape: int) -> Array:
    return (rng.normal(size=shape) / np.sqrt(max(1, shape[0]))).astype(np.float32)


def _width(x: Value) -> int:
    width = x.type.shape[-1]
    assert isinstance(width, int)
    return width


def heads(call: Call, constant: Constant, x: Value, rng: np.random.Generator) -> list[Value]:
    """Several narrow products of the same rows."""
    widths = [int(rng.choice([1, 2, 3, 6, 17])) for _ in range(int(rng.integers(2, 5)))]
    products = [call("matmul", x, constant(_weights(rng, _width(x), m))) for m in widths]
    return [call("add", y, constant(_weights(rng, m))) for y, m in zip(products, widths, strict=True)]


def sliced(call: Call, constant: Constant, x: Value, rng: np.random.Generator) -> list[Value]:
    """A part of a product's columns, behind something elementwise."""
    wide = int(rng.choice([4, 9, 24]))
    y = call("tanh", call("matmul", x, constant(_weights(rng, _width(x), wide))))
    start = int(rng.integers(wide))
    stop = int(rng.integers(start + 1, wide + 1))
    return [call("slice", y, axis=1, start=start, stop=stop, step=int(rng.choice([1, 1, 2])))]


def spelled_softmax(call: Call, constant: Constant, x: Value, rng: np.random.Generator) -> list[Value]:
    """exp(x - max) by its sum."""
    e = call("exp", call("sub", x, call("max", x, axes=(1,), keepdims=True)))
    return [call("div", e, call("sum", e, axes=(1,), keepdims=True))]


def spelled_norm(call: Call, constant: Constant, x: Value, rng: np.random.Generator) -> list[Value]:
    """A layer norm or an RMS norm."""
    if rng.random() < 0.5:
        x = call("sub", x, call("mean", x, axes=(1,), keepdims=True))
    square = call("mean", call("mul", x, x), axes=(1,), keepdims=True)
    y = call("mul", x, call("rsqrt", call("add", square, constant(np.float32(0.01)))))
    return [call("add", call("mul", y, constant(_weights(rng, _width(x)))), constant(_weights(rng, _width(x))))]


def gates(call: Call, constant: Constant, x: Value, rng: np.random.Generator) -> list[Value]:
    """SiLU and GELU by their formulas."""
    if rng.random() < 0.5:
        return [call("div", x, call("add", call("exp", call("neg", x)), constant(np.float32(1))))]
    erf = call("erf", call("mul", x, constant(np.float32(2**-0.5))))
    return [call("mul", call("mul", x, constant(np.float32(0.5))), call("add", erf, constant(np.float32(1))))]


def joined(call: Call, constant: Constant, x: Value, rng: np.random.Generator) -> list[Value]:
    """A concat of what is computed, copied, constant or empty."""
    parts = [x, call("relu", x), call("slice", x, axis=1, start=0, stop=int(rng.integers(_width(x) + 1)), step=1)]
    parts.append(call("matmul", x, constant(_weights(rng, _width(x), int(rng.choice([1, 5]))))))
    chosen = [parts[i] for i in rng.integers(len(parts), size=int(rng.integers(2, 5)))]
    return [call("concat", *chosen, axis=1)]


def constant_rows(call: Call, constant: Constant, x: Value, rng: np.random.Generator) -> list[Value]:
    """Rows that are the same for each sample, beside those of the sample, and reduced."""
    rows = constant(_weights(rng, int(rng.integers(1, 4)), _width(x)))
    apart = call("sub", call("reshape", x, shape=(x.type.shape[0], 1, _width(x))), rows)
    return [
        call("sum", call("mul", apart, apart), axes=(2,)),
        call("softmax", call("exp", call("neg", call("abs", apart))), axis=2),
    ]


def eight_bits(call: Call, constant: Constant, x: Value, rng: np.random.Generator) -> list[Value]:
    """A layer on 8 bits, with or without a way back into them."""
    zero, out, dtype = int(rng.choice([0, 0, 7, 128])), int(rng.choice([1, 4, 16, 33])), DType.U8
    q = call("quantize", x, scale=float(rng.choice([0.02, 0.1])), zero_point=zero, dtype=dtype)
    w = constant(rng.integers(-127, 128, (_width(x), out)).astype(np.int8))
    sums = call("cast", call("matmul_int8", q, w, zero_point=zero), dtype=DType.F32)
    y = call("add", call("mul", sums, constant(np.float32(0.002))), constant(_weights(rng, out)))
    y = call("relu", y) if rng.random() < 0.5 else y
    if rng.random() < 0.5:
        q = call("quantize", y, scale=0.05, zero_point=3, dtype=DType.I8)
        y = call("dequantize", q, scale=0.05, zero_point=3)
    return [y]


def narrow(call: Call, constant: Constant, x: Value, rng: np.random.Generator) -> list[Value]:
    """A product by weights of 16 bits."""
    dtype = DType.F16 if rng.random() < 0.5 else DType.BF16
    w = call("cast", constant(_weights(rng, _width(x), int(rng.choice([3, 16, 40])))), dtype=dtype)
    return [call("matmul_narrow", x, w)]


def attention(call: Call, constant: Constant, x: Value, rng: np.random.Generator) -> list[Value]:
    """Attention by its formula, its queries, keys and values from one product or three."""
    t, d, n = int(rng.integers(1, 5)), 4, x.type.shape[0]
    if rng.random() < 0.5:
        whole = call("matmul", x, constant(_weights(rng, _width(x), 3 * t * d)))
        parts = [call("slice", whole, axis=1, start=i * t * d, stop=(i + 1) * t * d, step=1) for i in range(3)]
    else:
        parts = [call("matmul", x, constant(_weights(rng, _width(x), t * d))) for _ in range(3)]
    q, k, v = (call("reshape", part, shape=(n, t, d)) for part in parts)
    scores = call("mul", call("matmul", q, call("transpose", k, perm=(0, 2, 1))), constant(np.float32(0.5)))
    y = call("matmul", call("softmax", scores, axis=2), v)
    return [call("slice", y, axis=1, start=0, stop=1, step=1) if rng.random() < 0.5 else y]


def images(call: Call, constant: Constant, x: Value, rng: np.random.Generator) -> list[Value]:
    """Convolutions, and what networks have between them: biases, activations, sums with what was before, joins, pools."""
    channels, size = int(rng.choice([1, 3, 8, 17])), int(rng.choice([2, 5, 8]))
    rows = call("matmul", x, constant(_weights(rng, _width(x), channels * size * size)))
    y = call("reshape", rows, shape=(x.type.shape[0], channels, size, size))
    for _ in range(int(rng.integers(1, 4))):
        given, channels, taps = y, int(y.type.shape[1]), int(rng.choice([1, 3, 3]))
        depthwise = rng.random() < 0.3
        out = channels if depthwise or rng.random() < 0.5 else int(rng.choice([1, 4, 16, 33]))
        weights = rng.normal(size=(out, 1 if depthwise else channels, taps, taps)) / np.sqrt(channels * taps * taps)
        y = call(
            "conv", given, constant(weights.astype(np.float32)), strides=(1, 1) if rng.random() < 0.7 else (2, 2),
            pads=(taps // 2,) * 4, dilations=(1, 1), groups=channels if depthwise else 1,
        )  # fmt: skip
        y = call("add", y, constant(_weights(rng, out, 1, 1))) if rng.random() < 0.7 else y
        y = call(str(rng.choice(["relu", "silu", "tanh"])), y) if rng.random() < 0.7 else y
        if y.type == given.type and rng.random() < 0.6:
            y = call("add", y, given) if rng.random() < 0.6 else call("concat", y, given, axis=1)
        if rng.random() < 0.3:
            pool = {"kernel": (2, 2), "strides": (1, 1), "pads": (1, 0, 0, 1), "ceil_mode": bool(rng.random() < 0.5)}
            y = call(str(rng.choice(["max_pool", "avg_pool"])), y, **pool)
    return [call("mean", y, axes=(2, 3), keepdims=bool(rng.random() < 0.5)) if rng.random() < 0.5 else y]


MOTIFS: tuple[Motif, ...] = (
    heads, sliced, spelled_softmax, spelled_norm, gates, joined, constant_rows, eight_bits, narrow, attention, images,
)  # fmt: skip
