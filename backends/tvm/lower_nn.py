"""Ops of neural networks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import takewhile

import numpy as np

from mlec.backends.tvm.compat import tirx
from mlec.backends.tvm.kernels.attention import AttentionSchedule, attention
from mlec.backends.tvm.kernels.conv import ConvSchedule, conv
from mlec.backends.tvm.kernels.conv_bf16 import NarrowConv, conv_bf16
from mlec.backends.tvm.kernels.conv_blocked import ConvTile, can_turn, conv2d_nchwc, conv_tiles
from mlec.backends.tvm.kernels.conv_int8 import NarrowConvSchedule
from mlec.backends.tvm.kernels.depthwise import DepthwiseSchedule, depthwise_nchwc
from mlec.backends.tvm.kernels.elementwise import NotContiguousError
from mlec.backends.tvm.kernels.epilogue import Expr
from mlec.backends.tvm.kernels.gemm_bf16 import has_tiles
from mlec.backends.tvm.kernels.matmul import MatmulSchedule, pointwise
from mlec.backends.tvm.kernels.norm import group_norm, layer_norm, line_schedules, rms_norm
from mlec.backends.tvm.kernels.pieces import passes_over
from mlec.backends.tvm.kernels.pool import PoolSchedule, pool
from mlec.backends.tvm.kernels.rnn import RecurrentSchedule, recurrent, recurrent_lanes
from mlec.backends.tvm.kernels.rnn_bf16 import pack_tiled, recurrent_bf16
from mlec.backends.tvm.kernels.rnn_layer import GATES, Cells, joined_biases, pack_recurrent
from mlec.backends.tvm.kernels.schedule import FoldSchedule, alternating
from mlec.backends.tvm.kernels.softmax import SoftmaxSchedule, are_cut, logsumexp, softmax
from mlec.backends.tvm.kernels.vector import cast_to, const, share
from mlec.backends.tvm.kernels.winograd import (
    WinogradSchedule,
    applicable,
    are_summable,
    conv2d_winograd,
    pack_winograd,
    worthwhile,
)
from mlec.backends.tvm.lower_direct import direct_recurrence, flipped_weights, transposed_geometry
from mlec.backends.tvm.lower_elementwise import lies_like
from mlec.backends.tvm.lower_fused import Head, Tail, lower_decomposed
from mlec.backends.tvm.lowering import Lowering, Tensor, Version
from mlec.backends.tvm.region import Dims, Index, Region
from mlec.backends.tvm.registry import lowers
from mlec.backends.tvm.scalar import TVM_NAMES
from mlec.ir.dim import product, static, static_dims
from mlec.ir.graph import Node
from mlec.ir.op import Array
from mlec.ir.types import TensorType
from mlec.ops.conv import blocked_weights, is_pointwise, unpaired_weights
from mlec.ops.pool import pool_geometry
from mlec.ops.windows import Geometry

# -- convolution -----------------------------------------------------------------------------------------------------


@lowers("conv", form="anchor")
def lower_conv(lowering: Lowering, node: Node, operands: tuple[Tensor, ...], tail: Tail) -> Tensor:
    x, w = operands
    return _convolution(lowering, node, x, w, tail, Geometry.of(node.attrs, x.type.rank - 2))


@lowers("conv_transpose", form="anchor")
def lower_conv_transpose(lowering: Lowering, node: Node, operands: tuple[Tensor, ...], tail: Tail) -> Tensor:
    """The convolution that it equals: zeros between the elements of x, weights flipped."""
    x, w = operands
    weights = flipped_weights(lowering, node, w)
    return _convolution(lowering, node, x, weights, tail, transposed_geometry(node.attrs, w.shape))


def _convolution(lowering: Lowering, node: Node, x: Tensor, w: Tensor, tail: Tail, g: Geometry) -> Tensor:
    operands = (x, w, *tail.operands(lowering))
    weights, groups, target = static_dims(w.shape), node.attrs["groups"], lowering.target
    space = node.output.type.shape[2:]
    if is_pointwise(weights[2:], g) and tail.is_flat(len(space)):
        return _pointwise(lowering, node, x, w, tail)

    def version(schedule: ConvSchedule) -> Version:
        def build(name: str, dims: Dims) -> object:
            shape, out, epilogue = dims.shape(x.shape), dims.shape(space), tail.epilogue(lowering, dims)
            return conv(shape, weights, g, groups, x.dtype, target, epilogue, name, schedule, out)

        return Version(build, operands, f"direct convolution{tail}")

    rows, columns = (1, *space)[-2:]
    schedules = ConvSchedule.candidates(weights[0] // groups, rows, columns, x.dtype, target)
    return lowering.scheduled(schedules, version, [tail.type], node=node)[0]


def _pointwise(lowering: Lowering, node: Node, x: Tensor, w: Tensor, tail: Tail) -> Tensor:
    """A convolution each of whose positions takes one position: the product of its weights and the image."""
    k, groups, target = static(w.shape[0]), node.attrs["groups"], lowering.target

    def version(schedule: MatmulSchedule) -> Version:
        def build(name: str, dims: Dims) -> object:
            epilogue = tail.epilogue(lowering, dims)
            return pointwise(dims.shape(x.shape), k, groups, x.dtype, target, epilogue, name, schedule)

        return Version(build, (x, w, *tail.operands(lowering)), f"product of weights and image{tail}")

    schedules = MatmulSchedule.candidates(k // groups, product(x.shape[2:]), x.dtype, target)
    return lowering.scheduled(schedules, version, [tail.type], node=node)[0]


NEAR = 1.5
"""Predicted cycles, as a multiple of the least, up to which a tile of a convolution is a candidate."""


@lowers("conv2d_nchwc", form="anchor")
def lower_conv2d_nchwc(lowering: Lowering, node: Node, operands: tuple[Tensor, ...], tail: Tail) -> Tensor:
    """By the definition, or by Winograd's sums, which need weights that are known."""
    x, w = operands
    g, weights, target = Geometry.of(node.attrs, 2), static_dims(w.shape), lowering.target
    turned = _plain_image(x) if can_turn(x.shape, weights, g) else None

    def version(schedule: ConvTile | WinogradSchedule) -> Version:
        return winograd(schedule) if isinstance(schedule, WinogradSchedule) else direct(schedule)

    def direct(tile: ConvTile) -> Version:
        def build(name: str, dims: Dims) -> object:
            shape, epilogue = dims.shape(x.shape), tail.epilogue(lowering, dims)
            return conv2d_nchwc(shape, weights, g, x.dtype, target, epilogue, name, tile, turned is not None)

        image = "" if turned is None else ", a plain image turned as it is padded"
        strategy = f"direct convolution on blocks of {x.shape[4]} and {w.shape[5]} channels{image}{tail}"
        return Version(build, (turned or x, w, *tail.operands(lowering)), strategy)

    def winograd(schedule: WinogradSchedule) -> Version:
        def build(name: str, dims: Dims) -> object:
            epilogue = tail.epilogue(lowering, dims)
            return conv2d_winograd(dims.shape(x.shape), weights, g.pads, target, epilogue, name, schedule)

        m = schedule.outputs
        packed = lowering.packed(w, f"winograd{m}", lambda a: pack_winograd(a, m))
        products = f"{(m + 2) ** 2} products in place of {9 * m**2}"
        strategy = f"Winograd convolution on blocks of {weights[5]} channels, {products}{tail}"
        return Version(build, (x, packed, *tail.operands(lowering)), strategy)

    def schedules() -> Iterator[ConvTile | WinogradSchedule]:
        rows, columns = static_dims(node.output.type.shape[2:4])
        extent = rows, columns
        tiles = conv_tiles(x.shape, weights, g, x.dtype, target)
        near = takewhile(lambda tile: tile.cycles <= NEAR * tiles[0].cycles, tiles)
        dense = (*g.strides, *g.dilations) == (1, 1, 1, 1)
        if not (dense and are_summable(w.array) and applicable(weights, extent, x.dtype, target)):
            return near
        sums = WinogradSchedule.candidates(extent, weights, target)
        return alternating(sums, near) if worthwhile(weights, extent, x.dtype, target) else alternating(near, sums)

    return lowering.scheduled(schedules(), version, [tail.type], node=node)[0]


def _plain_image(x: Tensor) -> Tensor | None:
    """The image ``[n, c/b, b, h, w]`` that one in channel blocks is still to be made of, if it is."""
    source, perm = x.promised or (x, ())
    return source if perm == (0, 1, 3, 4, 2) else None


@lowers("conv2d_narrow", form="anchor")
def lower_conv2d_narrow(lowering: Lowering, node: Node, operands: tuple[Tensor, ...], tail: Tail) -> Tensor:
    """By what the processor has for bf16; else with operands that are widened as they are read."""
    x, w = operands
    if w.array is None or not all(isinstance(extent, int) for extent in x.shape[1:]):
        return tail.apply(lowering, node, lower_decomposed(lowering, node, operands)[0])
    attrs, target = node.attrs, lowering.target
    known = NarrowConv(
        static_dims(w.shape),
        static(x.shape[4]),
        attrs["outputs"],
        attrs["block"],
        Geometry.of(attrs, 2),
        attrs["groups"],
    )
    if not known.is_computed(target):
        return _widened_convolution(lowering, node, x, w, known, tail)
    packed = w if known.gathered == 0 else lowering.packed(w, f"gathered{known.gathered}", known.pack)
    operands = (x, packed, *tail.operands(lowering))

    def version(schedule: NarrowConvSchedule) -> Version:
        def build(name: str, dims: Dims) -> object:
            shape, epilogue = dims.shape(x.shape), tail.epilogue(lowering, dims)
            return conv_bf16(shape, known, target, epilogue, name, schedule, lowering.weights_nbytes)

        unit = "by AMX" if has_tiles(target) else "in vectors"
        return Version(build, operands, f"convolution of bf16 {unit} on channel blocks{tail}")

    return lowering.scheduled(known.schedules(x.shape, target), version, [tail.type], node=node)[0]


def _widened_convolution(lowering: Lowering, node: Node, x: Tensor, w: Tensor, known: NarrowConv, tail: Tail) -> Tensor:
    """A convolution of bf16 where nothing multiplies it."""
    if known.groups != 1:
        return tail.apply(lowering, node, lower_decomposed(lowering, node, (x, w))[0])

    def pack(weights: Array) -> Array:
        return blocked_weights(unpaired_weights(weights, known.b, known.outputs, 1), known.b, known.block)

    packed = lowering.packed(w, "blocked", pack)
    shapes = static_dims(packed.shape), known.geometry, x.dtype, lowering.target
    operands = (x, packed, *tail.operands(lowering))

    def version(tile: ConvTile) -> Version:
        def build(name: str, dims: Dims) -> object:
            epilogue = tail.epilogue(lowering, dims)
            wide = replace(epilogue, out_dtype=epilogue.out_dtype or "float32")
            return conv2d_nchwc(dims.shape(x.shape), *shapes, wide, name, tile)

        return Version(build, operands, f"direct convolution on channel blocks, bf16 widened as it is read{tail}")

    return lowering.scheduled(iter(conv_tiles(x.shape, *shapes)), version, [tail.type], node=node)[0]


@lowers("depthwise2d_nchwc", form="anchor")
def lower_depthwise2d_nchwc(lowering: Lowering, node: Node, operands: tuple[Tensor, ...], tail: Tail) -> Tensor:
    x, w = operands
    g, weights, target = Geometry.of(node.attrs, 2), static_dims(w.shape), lowering.target
    windows = (weights, g, x.dtype, target)
    operands = (x, w, *tail.operands(lowering))

    def version(schedule: DepthwiseSchedule) -> Version:
        def build(name: str, dims: Dims) -> object:
            epilogue = tail.epilogue(lowering, dims)
            return depthwise_nchwc(dims.shape(x.shape), *windows, epilogue, name, schedule, w.dtype)

        return Version(build, operands, f"depthwise convolution on blocks of {x.shape[4]} channels{tail}")

    schedules = DepthwiseSchedule.candidates(x.shape, *windows)
    return lowering.scheduled(schedules, version, [tail.type], node=node)[0]


# -- pooling ---------------------------------------------------------------------------------------------------------


@lowers("max_pool", "avg_pool", form="anchor")
def lower_pool(lowering: Lowering, node: Node, operands: tuple[Tensor, ...], tail: Tail) -> Tensor:
    (x,) = operands
    kernel, g = tuple(node.attrs["kernel"]), pool_geometry(node.attrs)
    rank = len(kernel)
    counts = bool(node.attrs.get("count_include_pad", False))

    operands, out, target = (x, *tail.operands(lowering)), node.output.type.shape[2 : 2 + rank], lowering.target

    def version(schedule: PoolSchedule) -> Version:
        def build(name: str, dims: Dims) -> object:
            shape, windows, epilogue = dims.shape(x.shape), dims.shape(out), tail.epilogue(lowering, dims)
            return pool(node.name, shape, kernel, g, windows, counts, x.dtype, target, epilogue, name, schedule)

        return Version(build, operands, f"windows{tail}")

    schedules = PoolSchedule.candidates(x.shape, kernel, g, out, x.dtype, target)
    return lowering.scheduled(schedules, version, [tail.type], node=node)[0]


# -- normalisation ---------------------------------------------------------------------------------------------------


@lowers("softmax", "log_softmax")
def lower_softmax(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> Tensor:
    (x,) = operands
    axis, target = node.attrs["axis"], lowering.target

    def version(schedule: SoftmaxSchedule) -> Version:
        def build(name: str, dims: Dims) -> object:
            return softmax(dims.shape(x.shape), axis, x.dtype, target, node.name == "log_softmax", name, schedule)

        return Version(build, (x,), _passes_over_lines(lowering, x, axis, "three"))

    schedules = SoftmaxSchedule.candidates(x.shape, axis, x.dtype, node.name, target)
    return lowering.scheduled(schedules, version, [node.output.type], node=node)[0]


@lowers("logsumexp")
def lower_logsumexp(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> Sequence[Tensor]:
    (x,) = operands
    axes = node.attrs["axes"]
    if len(axes) != 1:
        return lower_decomposed(lowering, node, operands)

    def version(schedule: SoftmaxSchedule) -> Version:
        def build(name: str, dims: Dims) -> object:
            keepdims = node.attrs["keepdims"]
            return logsumexp(dims.shape(x.shape), axes[0], keepdims, x.dtype, lowering.target, name, schedule)

        return Version(build, (x,), _passes_over_lines(lowering, x, axes[0], "two"))

    schedules = SoftmaxSchedule.candidates(x.shape, axes[0], x.dtype, node.name, lowering.target)
    return lowering.scheduled(schedules, version, [node.output.type], node=node)


def _passes_over_lines(lowering: Lowering, x: Tensor, axis: int, whole: str) -> str:
    line = x.shape[axis % len(x.shape) :]
    return passes_over(line, whole, lambda: are_cut(static_dims(line), 0, x.dtype, lowering.target))


@lowers("layer_norm", "rms_norm", form="anchor")
def lower_line_norm(lowering: Lowering, node: Node, operands: tuple[Tensor, ...], tail: Tail) -> Tensor:
    return _line_norm(lowering, node, operands, tail, None)


@lowers("layer_norm", "rms_norm", form="prologue")
def lower_line_norm_of(
    lowering: Lowering, node: Node, head: Head, factors: tuple[Tensor, ...], tail: Tail
) -> Tensor | None:
    """Lines are computed once, where their results will be; None where these have another type, or a line is no run of elements."""
    x = head.output.type
    if node.attrs["axis"] % x.rank != x.rank - 1 or tail.type.dtype != x.dtype:
        return None
    return _line_norm(lowering, node, (*head.operands(lowering), *factors), tail, head)


def _line_norm(lowering: Lowering, node: Node, operands: tuple[Tensor, ...], tail: Tail, head: Head | None) -> Tensor:
    x = node.inputs[0].type
    template = layer_norm if node.name == "layer_norm" else rms_norm

    axis, eps, dtype, target = node.attrs["axis"], node.attrs["eps"], TVM_NAMES[x.dtype], lowering.target
    operands = (*operands, *tail.operands(lowering))

    def version(schedule: FoldSchedule) -> Version:
        def build(name: str, dims: Dims) -> object:
            epilogue, prologue = tail.epilogue(lowering, dims), head.prologue(lowering, dims) if head else None
            shape = dims.shape(x.shape)
            return template(shape, axis, eps, dtype, target, epilogue, name, schedule, prologue)

        over = (0,) if head is None and lies_like(x, tail.type) else ()
        return Version(build, operands, f"statistics{f' of {head}' if head else ''}, then one pass{tail}", over=over)

    schedules = line_schedules(product(x.shape[axis:]), dtype, target)
    return lowering.scheduled(schedules, version, [tail.type], node=node)[0]


@lowers("group_norm")
def lower_group_norm(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> Sequence[Tensor]:
    x = operands[0]

    groups, eps, target = node.attrs["groups"], node.attrs["eps"], lowering.target

    def version(schedule: FoldSchedule) -> Version:
        def build(name: str, dims: Dims) -> object:
            return group_norm(dims.shape(x.shape), groups, eps, x.dtype, target, name, schedule)

        return Version(build, operands, "statistics, then one pass")

    schedules = line_schedules(product(x.shape[1:]) // groups, x.dtype, target)
    return lowering.scheduled(schedules, version, [node.output.type], node=node)


@lowers("attention")
def lower_attention(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> Tensor:
    """Heads are read and written where they lie: transposes around it that keep the last axis cost nothing."""
    q, k, v, *masks = operands
    lying = [_as_it_lies(x) for x in (q, k, v)]
    rank = node.output.type.rank
    wanted = _wanted_order(lowering, node)
    y_order = tuple(wanted.index(axis) for axis in range(rank))
    made = TensorType(tuple(node.output.type.shape[axis] for axis in wanted), node.output.type.dtype)

    memory = (*(x for x, _ in lying), *masks)

    def version(schedule: AttentionSchedule) -> Version:
        def build(name: str, dims: Dims) -> object:
            specs = [lowering.spec(mask, dims) for mask in masks]
            scale, causal = node.attrs["scale"], node.attrs["causal"]
            shapes = dims.shape(q.shape), dims.shape(k.shape), dims.shape(v.shape)
            orders = [*(order for _, order in lying), y_order]
            fill, cap, target = node.attrs["fill"], node.attrs["cap"], lowering.target
            return attention(*shapes, specs, scale, causal, q.dtype, target, name, orders, schedule, fill, cap)

        return Version(build, memory, "one head at a time, scores in cache")

    schedules = AttentionSchedule.candidates(q.shape[-2], k.shape[-2], q.dtype, lowering.target)
    with lowering.variant(y_order):
        (y,) = lowering.scheduled(schedules, version, [made], node=node)
    return y if y_order == tuple(range(rank)) else Tensor(node.output.type, transposed=(y, y_order))


def _as_it_lies(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The tensor in memory, and which of its axes each axis of ``x`` is."""
    if x.transposed is not None and x.transposed[1][-1] == len(x.shape) - 1:
        return x.transposed
    return x, tuple(range(len(x.shape)))


def _wanted_order(lowering: Lowering, node: Node) -> tuple[int, ...]:
    """The order of axes in which all readers of a node's result want it, if they want the same and keep the last axis."""
    graph, value = lowering.graph, node.output
    plain = tuple(range(value.type.rank))
    users = graph.users.get(value, ())
    wanted = {tuple(user.attrs["perm"]) if user.name == "transpose" else plain for user in users}
    if len(wanted) != 1 or value in graph.outputs:
        return plain
    (order,) = wanted
    return order if order[-1] == plain[-1] else plain


# -- recurrence ------------------------------------------------------------------------------------------------------


@lowers("lstm", "gru", "rnn")
def lower_recurrence(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> Sequence[Tensor]:
    """Matrices of bf16 by a matrix unit, where there is one; elsewhere those of 16 bits are widened now."""
    x, state, states, target = operands[0], operands[1], len(node.outputs) - 1, lowering.target
    w_ih, w_hh, *biases = operands[1 + states :]
    arrays = [w.array for w in (w_ih, w_hh, *biases) if w.array is not None]
    if state.dtype not in ("float32", "float64") or (w_hh.dtype != state.dtype and len(arrays) < 2 + len(biases)):
        return lower_decomposed(lowering, node, operands)
    if len(arrays) < 2 + len(biases):
        return direct_recurrence(lowering, node, operands)
    gates, tiled = GATES[node.name], w_hh.dtype == "bfloat16" and has_tiles(target)
    lanes = recurrent_lanes(state.dtype, target)
    if node.name == "gru":
        biases[0] = lowering.packed(biases[0], "joined", lambda b_ih: joined_biases(b_ih, arrays[3]))
    if tiled:
        matrices = [lowering.packed(w, "tiled", lambda a: pack_tiled(a, gates)) for w in (w_ih, w_hh)]
    else:
        matrices = [_gates_packed(lowering, _widened(w, state), gates, lanes) for w in (w_ih, w_hh)]
    operands = (*operands[: 1 + states], *matrices, *(_gates_packed(lowering, b, gates, lanes) for b in biases))
    hidden, features = static(state.shape[1]), static(x.shape[2])
    reverse, activation = node.attrs["reverse"], node.attrs.get("activation", "tanh")

    def version(schedule: RecurrentSchedule | None) -> Version:
        def build(name: str, dims: Dims) -> object:
            n, steps, _ = dims.shape(x.shape)
            cells = Cells(node.name, activation, n, steps, features, hidden, reverse, state.dtype)
            return (
                recurrent_bf16(cells, target, name, x.dtype)
                if schedule is None
                else recurrent(cells, target, name, schedule, x.dtype)
            )

        return Version(
            build, operands, "tiles of sequences, bf16 by bf16 in a matrix unit" if tiled else "tiles of sequences"
        )

    types = [v.type for v in node.outputs]
    if tiled:
        made = version(None)
        return lowering.kernel(made.build, made.operands, types, node=node, strategy=made.strategy, multiplied=16)
    schedules = RecurrentSchedule.candidates(node.name, x.shape[0], x.shape[1], hidden, state.dtype, target)
    return lowering.scheduled(schedules, version, types, node=node)


def _gates_packed(lowering: Lowering, w: Tensor, gates: int, lanes: int) -> Tensor:
    return lowering.packed(w, f"gates{lanes}", lambda a: pack_recurrent(a, gates, lanes))


def _widened(w: Tensor, like: Tensor) -> Tensor:
    """A constant in the type of another tensor."""
    if w.dtype == like.dtype or w.array is None:
        return w
    return Tensor(TensorType(w.shape, like.type.dtype), w.array.astype(like.type.dtype.numpy), name=w.name)


# -- resizing --------------------------------------------------------------------------------------------------------


@lowers("resize", form="element")
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
