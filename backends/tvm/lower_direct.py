"""Lowerings to `kernels.direct`: ops without a tuned template for their operands, and all of them on a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mlec.backends.tvm.compat import T, tirx
from mlec.backends.tvm.kernels import direct, mathlib
from mlec.backends.tvm.kernels.epilogue import Buffer, Dim, Expr
from mlec.backends.tvm.kernels.tile import product, unflatten
from mlec.backends.tvm.kernels.vector import cast_to, const, maximum, share
from mlec.backends.tvm.lowering import Lowering, Tensor
from mlec.backends.tvm.region import Dims
from mlec.ir.graph import Node
from mlec.ir.op import Attrs

# -- pooling ---------------------------------------------------------------------------------------------------------


def direct_pool(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> Tensor:
    """One task for each window."""
    (x,) = operands
    attrs, kernel = node.attrs, tuple(node.attrs["kernel"])
    rank = len(kernel)
    strides = tuple(attrs["strides"]) or kernel
    dilations = per_axis(attrs, "dilations", rank) if "dilations" in attrs else (1,) * rank
    pads = pads_of(attrs, rank)
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


# -- recurrence ------------------------------------------------------------------------------------------------------


def direct_recurrence(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> Sequence[Tensor]:
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


# -- attributes ------------------------------------------------------------------------------------------------------


def per_axis(attrs: Attrs, key: str, rank: int, default: int = 1) -> tuple[int, ...]:
    """An attribute with one number for each spatial axis."""
    return tuple(attrs[key]) or (default,) * rank


def pads_of(attrs: Attrs, rank: int) -> tuple[int, ...]:
    """All paddings before, then all after."""
    return tuple(attrs["pads"]) or (0,) * (2 * rank)
