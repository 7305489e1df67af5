"""Ops of neural networks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mlec.backends.tvm.compat import T, tirx
from mlec.backends.tvm.kernels import direct, mathlib
from mlec.backends.tvm.kernels.conv import conv, conv2d_nchwc, pack_transposed
from mlec.backends.tvm.kernels.elementwise import NotContiguousError
from mlec.backends.tvm.kernels.epilogue import Buffer, Dim, Expr
from mlec.backends.tvm.kernels.softmax import logsumexp, softmax
from mlec.backends.tvm.kernels.tile import product, unflatten
from mlec.backends.tvm.kernels.vector import cast_to, const, maximum, share
from mlec.backends.tvm.lower_elementwise import lower_node
from mlec.backends.tvm.lower_fused import Tail, lower_body, lower_decomposed, lowers_with_tail
from mlec.backends.tvm.lowering import Lowering, Tensor, lowers
from mlec.backends.tvm.region import Dims, Index, Region, element_rule
from mlec.ir.builder import GraphBuilder
from mlec.ir.graph import Node
from mlec.ir.op import Attrs

# -- convolution -----------------------------------------------------------------------------------------------------


@lowers_with_tail("conv")
def lower_conv(lowering: Lowering, node: Node, operands: tuple[Tensor, ...], tail: Tail) -> Tensor:
    x, w = operands
    rank = x.type.rank - 2
    return _convolution(lowering, node, x, w, tail, _per_axis(node.attrs, "strides", rank), _pads(node.attrs, rank))


@lowers_with_tail("conv_transpose")
def lower_conv_transpose(lowering: Lowering, node: Node, operands: tuple[Tensor, ...], tail: Tail) -> Tensor:
    """The convolution that it equals: zeros between the elements of x, weights flipped."""
    x, w = operands
    attrs, rank = node.attrs, x.type.rank - 2
    groups, dilations = attrs["groups"], _per_axis(attrs, "dilations", rank)
    pads, extra = _pads(attrs, rank), _per_axis(attrs, "output_padding", rank, 0)
    kernel = [int(str(d)) for d in w.shape[2:]]
    reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    befores = [r - p for r, p in zip(reach, pads[:rank], strict=True)]
    afters = [r - p + e for r, p, e in zip(reach, pads[rank:], extra, strict=True)]
    if w.array is not None:
        w = lowering.packed(w, f"flipped{groups}", lambda a: pack_transposed(a, groups))
    else:
        w = _flipped(lowering, node, w, groups)
    strides = _per_axis(attrs, "strides", rank)
    return _convolution(lowering, node, x, w, tail, (1,) * rank, (*befores, *afters), strides)


def _convolution(
    lowering: Lowering,
    node: Node,
    x: Tensor,
    w: Tensor,
    tail: Tail,
    strides: tuple[int, ...],
    pads: tuple[int, ...],
    input_dilations: tuple[int, ...] = (),
) -> Tensor:
    groups, dilations = node.attrs["groups"], _per_axis(node.attrs, "dilations", x.type.rank - 2)

    def build(name: str, dims: Dims) -> object:
        weights = [int(str(d)) for d in w.shape]
        epilogue = tail.epilogue(lowering, dims)
        shape, target = dims.shape(x.shape), lowering.target
        return conv(shape, weights, strides, pads, dilations, groups, x.dtype, target, epilogue, input_dilations, name)

    operands = (x, w, *tail.operands(lowering))
    return lowering.kernel(build, operands, [tail.type], node=node, strategy=f"direct convolution{tail}")[0]


def _flipped(lowering: Lowering, node: Node, w: Tensor, groups: int) -> Tensor:
    """`pack_transposed` of weights that are not constant."""
    b = GraphBuilder("weights")
    value = b.input("w", w.type)
    c, per_group, *kernel = w.shape
    each = int(str(c)) // groups
    rank = 3 + len(kernel)
    grouped = b("reshape", value, shape=(groups, each, per_group, *kernel))
    swapped = b("transpose", grouped, perm=(0, 2, 1, *range(3, rank)))
    flat = b("reshape", swapped, shape=(groups * per_group, each, *kernel))
    body = b.finish([b("flip", flat, axes=tuple(range(2, rank - 1)))])
    return lower_body(lowering, node, body, (w,))[0]


@lowers_with_tail("conv2d_nchwc")
def lower_conv2d_nchwc(lowering: Lowering, node: Node, operands: tuple[Tensor, ...], tail: Tail) -> Tensor:
    x, w = operands
    strides, dilations = _per_axis(node.attrs, "strides", 2), _per_axis(node.attrs, "dilations", 2)

    def build(name: str, dims: Dims) -> object:
        weights = [int(str(d)) for d in w.shape]
        epilogue = tail.epilogue(lowering, dims)
        shape, pads = dims.shape(x.shape), _pads(node.attrs, 2)
        return conv2d_nchwc(shape, weights, strides, pads, dilations, x.dtype, lowering.target, epilogue, name)

    operands = (x, w, *tail.operands(lowering))
    strategy = f"direct convolution on blocks of {x.shape[4]} and {w.shape[5]} channels{tail}"
    return lowering.kernel(build, operands, [tail.type], node=node, strategy=strategy)[0]


def _per_axis(attrs: Attrs, key: str, rank: int, default: int = 1) -> tuple[int, ...]:
    return tuple(attrs[key]) or (default,) * rank


def _pads(attrs: Attrs, rank: int) -> tuple[int, ...]:
    return tuple(attrs["pads"]) or (0,) * (2 * rank)


# -- pooling ---------------------------------------------------------------------------------------------------------


@lowers("max_pool", "avg_pool")
def lower_pool(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> Tensor:
    """One task for each window."""
    (x,) = operands
    attrs, kernel = node.attrs, tuple(node.attrs["kernel"])
    rank = len(kernel)
    strides = tuple(attrs["strides"]) or kernel
    dilations = _per_axis(attrs, "dilations", rank) if "dilations" in attrs else (1,) * rank
    pads = _pads(attrs, rank)
    is_max = node.name == "max_pool"
    acc = "float64" if x.dtype == "float64" else "float32"

    def build(name: str, dims: Dims) -> object:
        shape, result = dims.shape(x.shape), dims.shape(node.output.type.shape)

        def window(inputs: tuple[Buffer, ...], outputs: tuple[Buffer, ...], index: Expr) -> None:
            where = unflatten(index, result)
            total = direct.Cell(const(-math.inf if is_max else 0.0, acc))
            counted = direct.Cell(const(0.0, acc))

            def tap(taps: tuple[Expr, ...]) -> None:
                at = [
                    where[2 + i] * strides[i] + tirx.Cast("int64", t) * dilations[i] - pads[i]
                    for i, t in enumerate(taps)
                ]
                real = tirx.const(True, "bool")
                inside = tirx.const(True, "bool")
                for i, position in enumerate(at):
                    extent = shape[2 + i]
                    real = tirx.And(real, tirx.And(position >= 0, position < extent))
                    inside = tirx.And(inside, position < extent + pads[rank + i])
                with direct.if_(real):
                    value = share(cast_to(acc, inputs[0][_flat((*where[:2], *at, *where[2 + rank :]), shape)]))
                    total.set(maximum(share(total.get()), value) if is_max else total.get() + value)
                if not is_max:
                    with direct.if_(inside if attrs["count_include_pad"] else real):
                        counted.set(counted.get() + const(1.0, acc))

            direct.over(kernel, tap)
            value = total.get() if is_max else total.get() / counted.get()
            T.buffer_store(outputs[0], cast_to(x.dtype, value), [index])

        specs = [lowering.spec(x, dims)], [lowering.spec(node.output.type, dims)]
        return direct.direct(name, *specs, product(result), 2.0 * math.prod(kernel), window, lowering.spread)

    return lowering.kernel(build, (x,), [node.output.type], node=node, strategy="one window at a time")[0]


def _flat(indices: Sequence[Expr], shape: Sequence[Dim]) -> Expr:
    position = indices[0]
    for index, extent in zip(indices[1:], shape[1:], strict=True):
        position = position * extent + index
    return position


# -- normalisation ---------------------------------------------------------------------------------------------------


@lowers("softmax", "log_softmax")
def lower_softmax(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> Tensor:
    (x,) = operands

    def build(name: str, dims: Dims) -> object:
        logarithm = node.name == "log_softmax"
        return softmax(dims.shape(x.shape), node.attrs["axis"], x.dtype, lowering.target, logarithm, name)

    return lowering.kernel(build, (x,), [node.output.type], node=node, strategy="three passes over each line")[0]


@lowers("logsumexp")
def lower_logsumexp(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> Sequence[Tensor]:
    (x,) = operands
    axes = node.attrs["axes"]
    if len(axes) != 1:
        return lower_decomposed(lowering, node, operands)

    def build(name: str, dims: Dims) -> object:
        return logsumexp(dims.shape(x.shape), axes[0], node.attrs["keepdims"], x.dtype, lowering.target, name)

    return lowering.kernel(build, (x,), [node.output.type], node=node, strategy="two passes over each line")


lowers("layer_norm", "rms_norm", "batch_norm", "group_norm", "attention")(lower_decomposed)

# -- recurrence ------------------------------------------------------------------------------------------------------


@lowers("lstm", "gru", "rnn")
def lower_recurrence(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> Sequence[Tensor]:
    """One task for each sequence: the states stay where the results are."""
    x = operands[0]
    states = len(node.outputs) - 1
    gates = {"lstm": 4, "gru": 3, "rnn": 1}[node.name]
    hidden, features = int(str(node.outputs[1].type.shape[1])), int(str(x.shape[2]))
    dtype = x.dtype

    def build(name: str, dims: Dims) -> object:
        n, steps, _ = dims.shape(x.shape)

        def sequence(inputs: tuple[Buffer, ...], outputs: tuple[Buffer, ...], row: Expr) -> None:
            source, initial = inputs[0], inputs[1 : 1 + states]
            w_ih, w_hh, *biases = inputs[1 + states :]
            y, state = outputs[0], outputs[1:]
            for buffer, first in zip(state, initial, strict=True):
                with T.serial(hidden) as j:
                    T.buffer_store(buffer, first[row * hidden + j], [row * hidden + j])
            fed = T.alloc_buffer((gates * hidden,), dtype)
            back = T.alloc_buffer((gates * hidden,), dtype)
            with T.serial(steps) as turn:
                t = share(steps - 1 - turn if node.attrs["reverse"] else turn)
                with T.serial(gates * hidden) as g:
                    total = direct.Cell(biases[0][g])
                    with T.serial(features) as i:
                        total.set(total.get() + source[(row * steps + t) * features + i] * w_ih[g * features + i])
                    T.buffer_store(fed, total.get(), [g])
                    total.set(biases[1][g] if node.name == "gru" else const(0.0, dtype))
                    with T.serial(hidden) as i:
                        total.set(total.get() + state[0][row * hidden + i] * w_hh[g * hidden + i])
                    T.buffer_store(back, total.get(), [g])
                with T.serial(hidden) as j:
                    pre = [(share(fed[k * hidden + j]), share(back[k * hidden + j])) for k in range(gates)]
                    old = [share(s[row * hidden + j]) for s in state]
                    new = _STEPS[node.name](node.attrs, pre, old)
                    for buffer, value in zip(state, new, strict=True):
                        T.buffer_store(buffer, value, [row * hidden + j])
                    T.buffer_store(y, new[0], [(row * steps + t) * hidden + j])

        specs = [lowering.spec(o, dims) for o in operands], [lowering.spec(v.type, dims) for v in node.outputs]
        work = float(gates * hidden * (hidden + features) * (steps if isinstance(steps, int) else 8))
        return direct.direct(name, *specs, n, work, sequence, lowering.spread)

    return lowering.kernel(
        build, operands, [v.type for v in node.outputs], node=node, strategy="one sequence at a time"
    )


Gates = list[tuple[Expr, Expr]]


def _lstm_step(attrs: Attrs, gates: Gates, state: list[Expr]) -> list[Expr]:
    i, f, g, o = (share(a + b) for a, b in gates)
    c = share(mathlib.sigmoid(f) * state[1] + mathlib.sigmoid(i) * mathlib.tanh(g))
    return [share(mathlib.sigmoid(o) * mathlib.tanh(c)), c]


def _gru_step(attrs: Attrs, gates: Gates, state: list[Expr]) -> list[Expr]:
    (xr, hr), (xz, hz), (xn, hn) = gates
    r, z = mathlib.sigmoid(xr + hr), mathlib.sigmoid(xz + hz)
    candidate = mathlib.tanh(xn + r * hn)
    return [share((const(1.0, str(z.ty.dtype)) - z) * candidate + z * state[0])]


def _rnn_step(attrs: Attrs, gates: Gates, state: list[Expr]) -> list[Expr]:
    ((fed, back),) = gates
    total = share(fed + back)
    if attrs["activation"] == "tanh":
        return [mathlib.tanh(total)]
    zero = const(0.0, str(total.ty.dtype))
    return [share(tirx.Select(total < zero, zero, total))]


_STEPS = {"lstm": _lstm_step, "gru": _gru_step, "rnn": _rnn_step}

# -- resizing --------------------------------------------------------------------------------------------------------


@element_rule("resize")
def resize_element(region: Region, node: Node, indices: tuple[Index, ...]) -> Expr:
    """Interpolates along one axis after the other, the last one innermost."""
    if region.lanes.is_vector:
        raise NotContiguousError
    (x,) = node.inputs
    dtype = "float64" if x.type.dtype.itemsize == 8 else "float32"
    name = "float16" if x.type.dtype.value == "f16" else "bfloat16" if x.type.dtype.value == "bf16" else dtype

    def sample(done: tuple[Index, ...]) -> Expr:
        axis = len(done)
        if axis == x.type.rank:
            return cast_to(dtype, region.at(x, done))
        if axis < 2:
            return sample((*done, indices[axis]))
        size, source = region.dims(node.attrs["size"][axis - 2]), region.dims(x.type.shape[axis])
        at = tirx.Cast("float64", indices[axis])
        last = source - 1 if not isinstance(source, int) else tirx.const(source - 1, "int64")
        if node.attrs["mode"] == "nearest":
            return sample((*done, share(tirx.min(_floor(at * _ratio(source, size)), last))))
        if node.attrs["align_corners"]:
            position = at * _ratio(source, size, 1)
        else:
            position = (at + const(0.5, "float64")) * _ratio(source, size) - const(0.5, "float64")
        position = share(position)
        position = share(tirx.Select(position < const(0.0, "float64"), const(0.0, "float64"), position))
        low = share(tirx.min(_floor(position), last))
        high = share(tirx.min(low + 1, last))
        weight = share(tirx.Cast(dtype, position - tirx.Cast("float64", low)))
        first, second = sample((*done, low)), sample((*done, high))
        return share(first * (const(1.0, dtype) - weight) + second * weight)

    return share(cast_to(name, sample(())))


def _floor(x: Expr) -> Expr:
    return tirx.Cast("int64", tirx.floor(x))


def _ratio(source: Index, size: Index, less: int = 0) -> Expr:
    """``(source - less) / (size - less)``, 0 for a single position; in Python where both are known."""
    if isinstance(source, int) and isinstance(size, int):
        return const(float(np.float64(source - less) / (size - less)) if size > less else 0.0, "float64")
    over = tirx.Cast("float64", tirx.max(size - less, tirx.const(1, "int64")))
    return tirx.Cast("float64", source - less) / over


lowers("resize")(lower_node)
