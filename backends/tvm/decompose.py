"""Ops as graphs of simpler ops: what a backend lowers when it has no template for the op itself.

Each function builds the op's meaning with a `GraphBuilder` from the node's operands. Sums of 16-bit floats are taken in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mlec.backends.tvm.registry import find, lowers
from mlec.ir.builder import GraphBuilder
from mlec.ir.dim import Dim, static, static_dims
from mlec.ir.dtype import DType
from mlec.ir.graph import Graph, Node, Value
from mlec.ops.quant import LIMITS, pool_geometry


def decompose(node: Node) -> Graph:
    """The node as a graph with the node's operands as inputs."""
    build = find(node.name, "graph")
    assert build is not None, node.name
    b = GraphBuilder(node.name)
    inputs = tuple(b.input(v.hint or f"x{i}", v.type) for i, v in enumerate(node.inputs))
    with b.at(node.loc):
        results = build(b, node, inputs)
    return b.finish([results] if isinstance(results, Value) else list(results))


def _wide(b: GraphBuilder, x: Value) -> Value:
    return b("cast", x, dtype=DType.F32) if x.type.dtype in (DType.F16, DType.BF16) else x


def _like(b: GraphBuilder, y: Value, x: Value) -> Value:
    return b("cast", y, dtype=x.type.dtype) if y.type.dtype is not x.type.dtype else y


def _softmax_parts(b: GraphBuilder, x: Value, axis: int) -> tuple[Value, Value, Value]:
    """``x - max(x)``, its exponential, and the sum of that."""
    top = b("max", x, axes=(axis,), keepdims=True)
    shifted = b("sub", x, top)
    e = b("exp", shifted)
    return shifted, e, b("sum", e, axes=(axis,), keepdims=True)


@lowers("softmax", form="graph")
def softmax(b: GraphBuilder, node: Node, operands: tuple[Value, ...]) -> Value:
    (x,) = operands
    _, e, total = _softmax_parts(b, _wide(b, x), node.attrs["axis"] % x.type.rank)
    return _like(b, b("div", e, total), x)


@lowers("log_softmax", form="graph")
def log_softmax(b: GraphBuilder, node: Node, operands: tuple[Value, ...]) -> Value:
    (x,) = operands
    shifted, _, total = _softmax_parts(b, _wide(b, x), node.attrs["axis"] % x.type.rank)
    return _like(b, b("sub", shifted, b("log", total)), x)


@lowers("logsumexp", form="graph")
def logsumexp(b: GraphBuilder, node: Node, operands: tuple[Value, ...]) -> Value:
    (x,) = operands
    axes, wide = node.attrs["axes"], _wide(b, x)
    top = b("max", wide, axes=axes, keepdims=True)
    finite = b("where", b("isfinite", top), top, b.constant(0.0, dtype=top.type.dtype))
    total = b("sum", b("exp", b("sub", wide, finite)), axes=axes, keepdims=True)
    result = _like(b, b("add", b("log", total), finite), x)
    return result if node.attrs["keepdims"] else b("reshape", result, shape=node.output.type.shape)


@lowers("layer_norm", form="graph")
def layer_norm(b: GraphBuilder, node: Node, operands: tuple[Value, ...]) -> Value:
    x, scale, bias = operands
    wide = _wide(b, x)
    axes = tuple(range(node.attrs["axis"] % x.type.rank, x.type.rank))
    normal = _standardized(b, wide, axes, node.attrs["eps"])
    return _like(b, b("add", b("mul", normal, _wide(b, scale)), _wide(b, bias)), x)


def _standardized(b: GraphBuilder, x: Value, axes: tuple[int, ...], eps: float) -> Value:
    centred = b("sub", x, b("mean", x, axes=axes, keepdims=True))
    variance = b("mean", b("mul", centred, centred), axes=axes, keepdims=True)
    return b("div", centred, b("sqrt", b("add", variance, eps)))


@lowers("rms_norm", form="graph")
def rms_norm(b: GraphBuilder, node: Node, operands: tuple[Value, ...]) -> Value:
    x, scale = operands
    wide = _wide(b, x)
    axes = tuple(range(node.attrs["axis"] % x.type.rank, x.type.rank))
    square = b("mean", b("mul", wide, wide), axes=axes, keepdims=True)
    normal = b("div", wide, b("sqrt", b("add", square, node.attrs["eps"])))
    return _like(b, b("mul", normal, _wide(b, scale)), x)


@lowers("batch_norm", form="graph")
def batch_norm(b: GraphBuilder, node: Node, operands: tuple[Value, ...]) -> Value:
    x, scale, bias, mean, var = operands
    factor = b("div", scale, b("sqrt", b("add", var, node.attrs["eps"])))
    rank = x.type.rank
    return b(
        "add",
        b("mul", b("sub", x, _on_channels(b, mean, rank)), _on_channels(b, factor, rank)),
        _on_channels(b, bias, rank),
    )


def _on_channels(b: GraphBuilder, v: Value, rank: int) -> Value:
    return b("reshape", v, shape=(1, v.type.shape[0], *(1,) * (rank - 2)))


@lowers("group_norm", form="graph")
def group_norm(b: GraphBuilder, node: Node, operands: tuple[Value, ...]) -> Value:
    x, scale, bias = operands
    n, channels, *space = x.type.shape
    groups = node.attrs["groups"]
    inner: Dim = static(channels) // groups
    for extent in space:
        inner = inner * extent
    grouped = b("reshape", _wide(b, x), shape=(n, groups, inner))
    normal = b("reshape", _standardized(b, grouped, (2,), node.attrs["eps"]), shape=x.type.shape)
    rank = x.type.rank
    scaled = b("mul", normal, _on_channels(b, _wide(b, scale), rank))
    return _like(b, b("add", scaled, _on_channels(b, _wide(b, bias), rank)), x)


@lowers("attention", form="graph")
def attention(b: GraphBuilder, node: Node, operands: tuple[Value, ...]) -> Value:
    q, k, v, *masks = operands
    wide_q, wide_k, wide_v = (_wide(b, x) for x in (q, k, v))
    perm = (*range(k.type.rank - 2), k.type.rank - 1, k.type.rank - 2)
    scores = b("matmul", b("mul", wide_q, node.attrs["scale"]), b("transpose", wide_k, perm=perm))
    hidden, fill = (b.constant(number, dtype=scores.type.dtype) for number in (-math.inf, node.attrs["fill"]))
    cap = node.attrs["cap"]
    if math.isfinite(cap):
        scores = b("mul", b("tanh", b("div", scores, cap)), cap)
    for m in masks:
        scores = b("where", m, scores, fill) if m.type.dtype.is_bool else b("add", scores, _wide(b, m))
    if node.attrs["causal"]:
        shape = scores.type.shape[-2:]
        rows, columns = (b("iota", shape=shape, axis=axis) for axis in (0, 1))
        scores = b("where", b("le", columns, rows), scores, hidden)
    _, e, total = _softmax_parts(b, scores, scores.type.rank - 1)
    return _like(b, b("matmul", b("div", e, total), wide_v), q)


@lowers("lstm", "gru", "rnn", form="graph")
def recurrence(b: GraphBuilder, node: Node, operands: tuple[Value, ...]) -> Sequence[Value]:
    """In float32; operands[1] is a state."""
    wide = [_wide(b, x) for x in operands]
    return [_like(b, y, operands[1]) for y in b.multi(node.op, *wide, **node.attrs)]


@lowers("matmul_packed", form="graph")
def matmul_packed(b: GraphBuilder, node: Node, operands: tuple[Value, ...]) -> Value:
    x, w = operands
    blocks, k, block = w.type.shape
    flat = b("reshape", b("transpose", w, perm=(1, 0, 2)), shape=(k, blocks * block))
    return b("matmul", x, b("slice", flat, axis=1, stop=node.attrs["n"]))


@lowers("matmul_narrow", form="graph")
def matmul_narrow(b: GraphBuilder, node: Node, operands: tuple[Value, ...]) -> Value:
    x, w = (b("cast", operand, dtype=DType.F32) for operand in operands)
    return b("matmul", x, w)


@lowers("matmul_narrow_packed", form="graph")
def matmul_narrow_packed(b: GraphBuilder, node: Node, operands: tuple[Value, ...]) -> Value:
    x, w = operands
    if w.type.rank == 4:
        blocks, pairs, block, two = w.type.shape
        w = b("reshape", b("transpose", w, perm=(0, 1, 3, 2)), shape=(blocks, pairs * two, block))
    blocks, k, block = w.type.shape
    flat = b("reshape", b("transpose", w, perm=(1, 0, 2)), shape=(k, blocks * block))
    rows = b("slice", flat, axis=0, stop=x.type.shape[-1])
    return b("matmul_narrow", x, b("slice", rows, axis=1, stop=node.attrs["n"]))


@lowers("conv2d_nchwc", form="graph")
def conv2d_nchwc(b: GraphBuilder, node: Node, operands: tuple[Value, ...]) -> Value:
    x, w = operands
    n, blocks, height, width, block = x.type.shape
    out_blocks, _, r, _, s, out_block = w.type.shape
    plain_x = b("reshape", b("transpose", x, perm=(0, 1, 4, 2, 3)), shape=(n, blocks * block, height, width))
    flat_w = b("transpose", w, perm=(0, 5, 1, 3, 2, 4))
    plain_w = b("reshape", flat_w, shape=(out_blocks * out_block, blocks * block, r, s))
    y = b("conv", plain_x, plain_w, **node.attrs)
    split = b("reshape", y, shape=(n, out_blocks, out_block, *y.type.shape[2:]))
    return b("transpose", split, perm=(0, 1, 3, 4, 2))


@lowers("conv2d_narrow", form="graph")
def conv2d_narrow(b: GraphBuilder, node: Node, operands: tuple[Value, ...]) -> Value:
    x, w = (b("cast", operand, dtype=DType.F32) for operand in operands)
    n, _, height, width, block = x.type.shape
    blocks, cb, r, s, pairs, columns, two = static_dims(w.type.shape)
    attrs = {name: value for name, value in node.attrs.items() if name not in ("outputs", "block")}
    outputs, out_block, groups = node.attrs["outputs"], node.attrs["block"], node.attrs["groups"]
    turned = b("transpose", w, perm=(0, 5, 1, 4, 6, 2, 3))
    padded = b("reshape", turned, shape=(groups, blocks // groups * columns, cb, pairs * two, r, s))
    kept = b("slice", b("slice", padded, axis=1, stop=outputs // groups), axis=3, stop=block)
    plain_w = b("reshape", kept, shape=(outputs, cb * static(block), r, s))
    plain_x = b(
        "reshape", b("transpose", x, perm=(0, 1, 4, 2, 3)), shape=(n, groups * cb * static(block), height, width)
    )
    y = b("conv", plain_x, plain_w, **attrs)
    split = b("reshape", y, shape=(n, outputs // out_block, out_block, *y.type.shape[2:]))
    return b("transpose", split, perm=(0, 1, 3, 4, 2))


@lowers("depthwise2d_nchwc", form="graph")
def depthwise2d_nchwc(b: GraphBuilder, node: Node, operands: tuple[Value, ...]) -> Value:
    x, w = operands
    n, blocks, height, width, block = x.type.shape
    _, r, s, _ = w.type.shape
    x = _like(b, x, w)
    plain_x = b("reshape", b("transpose", x, perm=(0, 1, 4, 2, 3)), shape=(n, blocks * block, height, width))
    plain_w = b("reshape", b("transpose", w, perm=(0, 3, 1, 2)), shape=(blocks * block, 1, r, s))
    y = b("conv", plain_x, plain_w, groups=blocks * block, **node.attrs)
    split = b("reshape", y, shape=(n, blocks, block, *y.type.shape[2:]))
    return b("transpose", split, perm=(0, 1, 3, 4, 2))


@lowers("nearest", form="graph")
def nearest(b: GraphBuilder, node: Node, operands: tuple[Value, ...]) -> tuple[Value, ...]:
    attrs = node.attrs
    distances = b("pairwise_distance", *operands, metric=attrs["metric"], p=attrs["p"])
    return tuple(b.multi("topk", distances, k=attrs["k"], axis=1, largest=False))


@lowers("quantize", form="graph")
def quantize(b: GraphBuilder, node: Node, operands: tuple[Value, ...]) -> Value:
    (x,) = operands
    dtype, zero_point = node.attrs["dtype"], node.attrs["zero_point"]
    low, high = LIMITS[dtype]
    steps = b("round", b("mul", x, b.constant(1 / node.attrs["scale"], dtype=DType.F32)))
    known = b("where", b("isnan", steps), b.constant(0.0, dtype=DType.F32), steps)
    inside = b("clip", known, lo=low - zero_point, hi=high - zero_point)
    return b("cast", b("add", inside, float(zero_point)), dtype=dtype)


@lowers("dequantize", form="graph")
def dequantize(b: GraphBuilder, node: Node, operands: tuple[Value, ...]) -> Value:
    exact = b("cast", _centred(b, operands[0], node.attrs["zero_point"]), dtype=DType.F32)
    return b("mul", exact, node.attrs["scale"])


def _centred(b: GraphBuilder, x: Value, zero_point: int) -> Value:
    return b("sub", b("cast", x, dtype=DType.I32), zero_point)


@lowers("matmul_int8", form="graph")
def matmul_int8(b: GraphBuilder, node: Node, operands: tuple[Value, ...]) -> Value:
    a, w = operands
    return b("matmul", _centred(b, a, node.attrs["zero_point"]), b("cast", w, dtype=DType.I32))


@lowers("conv_int8", form="graph")
def conv_int8(b: GraphBuilder, node: Node, operands: tuple[Value, ...]) -> Value:
    x, w = operands
    images = b("transpose", _centred(b, x, node.attrs["zero_point"]), perm=(0, 3, 1, 2))
    weights = b("transpose", b("cast", w, dtype=DType.I32), perm=(3, 2, 0, 1))
    attrs = {name: value for name, value in node.attrs.items() if name != "zero_point"}
    return b("transpose", b("conv", images, weights, **attrs), perm=(0, 2, 3, 1))


@lowers("unpack_int8", form="graph")
def unpack_int8(b: GraphBuilder, node: Node, operands: tuple[Value, ...]) -> Value:
    blocks, segments, quads, _ = static_dims(operands[0].type.shape)
    shape, groups = node.attrs["shape"], node.attrs["groups"]
    split = b("reshape", operands[0], shape=(groups, blocks // groups, segments, quads, 16, 4))
    turned = b("transpose", split, perm=(2, 3, 5, 0, 1, 4))
    padded = b("reshape", turned, shape=(segments, 4 * quads, groups, blocks // groups * 16))
    rows = b("slice", padded, axis=1, stop=math.prod(shape[:-1]) // segments)
    return b("reshape", b("slice", rows, axis=3, stop=shape[-1] // groups), shape=shape)


@lowers("max_pool_int8", form="graph")
def max_pool_int8(b: GraphBuilder, node: Node, operands: tuple[Value, ...]) -> Value:
    images = b("transpose", b("cast", operands[0], dtype=DType.F32), perm=(0, 3, 1, 2))
    pooled = b("relu", b("max_pool", images, **node.attrs))  # padding is 0 here, and no byte is below it
    return b("cast", b("transpose", pooled, perm=(0, 2, 3, 1)), dtype=DType.U8)


@lowers("sum_pool_int8", form="graph")
def sum_pool_int8(b: GraphBuilder, node: Node, operands: tuple[Value, ...]) -> Value:
    """A convolution with ones, and as much more padding at the end as the last windows hang over."""
    (x,) = operands
    geometry, kernel, channels = pool_geometry(node.attrs), tuple(node.attrs["kernel"]), static(x.type.shape[3])
    ceil = node.attrs["ceil_mode"]
    after = [end + (stride - 1 if ceil else 0) for end, stride in zip(geometry.after, geometry.strides, strict=True)]
    images = b("transpose", _centred(b, x, node.attrs["zero_point"]), perm=(0, 3, 1, 2))
    ones = b.constant(np.ones((channels, 1, *kernel), np.int32))
    convolved = b(
        "conv", images, ones, strides=geometry.strides, pads=(*geometry.before, *after), dilations=geometry.dilations, groups=channels,
    )  # fmt: skip
    sums = b("transpose", convolved, perm=(0, 2, 3, 1))
    for axis, extent in enumerate(node.output.type.shape[1:3], 1):
        if sums.type.shape[axis] != extent:
            sums = b("slice", sums, axis=axis, stop=static(extent))
    return sums
