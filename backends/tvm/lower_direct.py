"""Lowerings to `kernels.direct`: ops without a tuned template for their operands, and all of them on a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mlec.backends.tvm.compat import T, tirx
from mlec.backends.tvm.kernels import direct
from mlec.backends.tvm.kernels.conv import pack_transposed
from mlec.backends.tvm.kernels.epilogue import Buffer, Dim, Expr
from mlec.backends.tvm.kernels.rnn_layer import GATES, advance, gate_sums
from mlec.backends.tvm.kernels.tile import if_, product, unflatten
from mlec.backends.tvm.kernels.vector import CELL_SCOPE, cast_to, const, int64, is_nan, maximum, select, share
from mlec.backends.tvm.lower_fused import lower_body
from mlec.backends.tvm.lower_tree import constant_ensemble, wide_position
from mlec.backends.tvm.lowering import Lowering, Tensor
from mlec.backends.tvm.region import Dims
from mlec.backends.tvm.registry import CUDA, lowers
from mlec.ir.builder import GraphBuilder
from mlec.ir.dim import static, static_dims
from mlec.ir.graph import Node
from mlec.ir.op import Attrs
from mlec.ops.pool import pool_geometry
from mlec.ops.tree import DEFAULT_LEFT, NAN_IS_ZERO, OPERANDS, POSITIONS, ZERO_IS_MISSING, ZERO_LIMIT
from mlec.ops.windows import Geometry, per_axis

# -- pooling ---------------------------------------------------------------------------------------------------------


@lowers("max_pool", "avg_pool", on=CUDA)
def direct_pool(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> Tensor:
    """One task for each window."""
    (x,) = operands
    attrs, kernel, geometry = node.attrs, tuple(node.attrs["kernel"]), pool_geometry(node.attrs)
    rank = len(kernel)
    is_max = node.name == "max_pool"
    acc = "float64" if x.dtype == "float64" else "float32"

    def build(name: str, dims: Dims) -> object:
        shape, result = dims.shape(x.shape), dims.shape(node.output.type.shape)

        def window(inputs: tuple[Buffer, ...], outputs: tuple[Buffer, ...], index: Expr) -> None:
            where = unflatten(index, result)
            total = direct.variable(const(-math.inf if is_max else 0.0, acc))
            counted = direct.variable(const(0.0, acc))

            def tap(taps: tuple[Expr, ...]) -> None:
                at = [
                    where[2 + i] * geometry.strides[i]
                    + tirx.Cast("int64", t) * geometry.dilations[i]
                    - geometry.before[i]
                    for i, t in enumerate(taps)
                ]
                real = tirx.const(True, "bool")
                inside = tirx.const(True, "bool")
                for i, position in enumerate(at):
                    extent = shape[2 + i]
                    real = tirx.And(real, tirx.And(position >= 0, position < extent))
                    inside = tirx.And(inside, position < extent + geometry.after[i])
                with if_(real):
                    value = share(cast_to(acc, inputs[0][_flat((*where[:2], *at, *where[2 + rank :]), shape)]))
                    total.set(maximum(share(total.value), value) if is_max else total.value + value)
                if not is_max:
                    with if_(inside if attrs["count_include_pad"] else real):
                        counted.set(counted.value + const(1.0, acc))

            direct.over(kernel, tap)
            value = total.value if is_max else total.value / counted.value
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


@lowers("lstm", "gru", "rnn", on=CUDA)
def direct_recurrence(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> Sequence[Tensor]:
    """One task for each sequence: the states stay where the results are."""
    x = operands[0]
    states = len(node.outputs) - 1
    gates = GATES[node.name]
    hidden, features = static(node.outputs[1].type.shape[1]), static(x.shape[2])
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
            fed, back = (T.alloc_buffer((gates * hidden,), dtype, scope=CELL_SCOPE.get()) for _ in range(2))
            with T.serial(steps) as turn:
                t = share(steps - 1 - turn if node.attrs["reverse"] else turn)
                with T.serial(gates * hidden) as g:
                    total = direct.variable(biases[0][g])
                    with T.serial(features) as i:
                        total.set(total.value + source[(row * steps + t) * features + i] * w_ih[g * features + i])
                    T.buffer_store(fed, total.value, [g])
                    total.set(biases[1][g] if node.name == "gru" else const(0.0, dtype))
                    with T.serial(hidden) as i:
                        total.set(total.value + state[0][row * hidden + i] * w_hh[g * hidden + i])
                    T.buffer_store(back, total.value, [g])
                with T.serial(hidden) as j:
                    forward, fed_back = (
                        [share(buffer[k * hidden + j]) for k in range(gates)] for buffer in (fed, back)
                    )
                    old = [share(s[row * hidden + j]) for s in state]
                    sums = gate_sums(node.name, forward, fed_back)
                    new = advance(node.name, node.attrs.get("activation", "tanh"), sums, old)
                    for buffer, value in zip(state, new, strict=True):
                        T.buffer_store(buffer, value, [row * hidden + j])
                    T.buffer_store(y, new[0], [(row * steps + t) * hidden + j])

        specs = [lowering.spec(o, dims) for o in operands], [lowering.spec(v.type, dims) for v in node.outputs]
        work = float(gates * hidden * (hidden + features) * (steps if isinstance(steps, int) else 8))
        return direct.direct(name, *specs, n, work, sequence, lowering.spread)

    return lowering.kernel(
        build, operands, [v.type for v in node.outputs], node=node, strategy="one sequence at a time"
    )


# -- products --------------------------------------------------------------------------------------------------------


def direct_convolution(lowering: Lowering, node: Node, x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
    """One task for each element of the result; arguments as those of `kernels.conv.conv`."""
    groups = node.attrs["groups"]
    outputs, channels, *kernel = static_dims(w.shape)
    acc = "float64" if x.dtype == "float64" else "float32"

    def build(name: str, dims: Dims) -> object:
        shape, result = dims.shape(x.shape), dims.shape(node.output.type.shape)

        def element(inputs: tuple[Buffer, ...], results: tuple[Buffer, ...], index: Expr) -> None:
            n, k, *position = unflatten(index, result)
            first = k // (outputs // groups) * channels
            total = direct.variable(const(0.0, acc))

            def tap(taps: tuple[Expr, ...]) -> None:
                c, *offsets = taps
                inside = tirx.const(True, "bool")
                at = []
                for i, offset in enumerate(offsets):
                    spread = position[i] * geometry.strides[i] + offset * geometry.dilations[i] - geometry.before[i]
                    if (apart := geometry.input_dilations[i]) > 1:
                        inside = tirx.And(inside, tirx.EQ(spread % apart, int64(0)))
                        spread = spread // apart
                    inside = tirx.And(inside, tirx.And(spread >= 0, spread < shape[2 + i]))
                    at.append(spread)
                with if_(inside):
                    value = cast_to(acc, inputs[0][_flat((n, first + c, *at), shape)])
                    weight = cast_to(acc, inputs[1][_flat((k, c, *offsets), (outputs, channels, *kernel))])
                    total.set(total.value + value * weight)

            direct.over((channels, *kernel), tap)
            T.buffer_store(results[0], cast_to(x.dtype, total.value), [index])

        specs = [lowering.spec(t, dims) for t in (x, w)], [lowering.spec(node.output.type, dims)]
        return direct.direct(name, *specs, product(result), channels * math.prod(kernel), element, lowering.spread)

    return lowering.kernel(build, (x, w), [node.output.type], node=node, strategy="one element at a time")[0]


def flipped_weights(lowering: Lowering, node: Node, w: Tensor) -> Tensor:
    """Weights of a transposed convolution as `pack_transposed` makes them."""
    groups = node.attrs["groups"]
    if w.array is not None:
        return lowering.packed(w, f"flipped{groups}", lambda a: pack_transposed(a, groups))
    b = GraphBuilder("weights")
    value = b.input("w", w.type)
    c, per_group, *kernel = w.shape
    each = static(c) // groups
    rank = 3 + len(kernel)
    grouped = b("reshape", value, shape=(groups, each, per_group, *kernel))
    swapped = b("transpose", grouped, perm=(0, 2, 1, *range(3, rank)))
    flat = b("reshape", swapped, shape=(groups * per_group, each, *kernel))
    body = b.finish([b("flip", flat, axes=tuple(range(2, rank - 1)))])
    return lower_body(lowering, node, body, (w,))[0]


def transposed_geometry(attrs: Attrs, weights: Sequence[Dim]) -> Geometry:
    """That of the convolution that a transposed one equals: its windows go one step at a time over an image with gaps."""
    rank = len(weights) - 2
    given, extra = Geometry.of(attrs, rank), per_axis(attrs, "output_padding", rank, 0, least=0)
    reach = [d * (static(k) - 1) for d, k in zip(given.dilations, weights[2:], strict=True)]
    before = tuple(r - p for r, p in zip(reach, given.before, strict=True))
    after = tuple(r - p + e for r, p, e in zip(reach, given.after, extra, strict=True))
    return Geometry((1,) * rank, before, after, given.dilations, given.strides)


# -- reductions ------------------------------------------------------------------------------------------------------


@lowers("sum", "mean", "prod", "max", "min", "any", "all", "argmax", "argmin", on=CUDA)
def direct_reduction(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> Tensor:
    """One task for each result: ``sum`` to ``all``, ``argmax`` and ``argmin``."""
    (x,) = operands
    is_arg = node.name.startswith("arg")
    axes = {a % x.type.rank for a in ([node.attrs["axis"]] if is_arg else node.attrs["axes"])}
    acc = {"float16": "float32", "bfloat16": "float32"}.get(x.dtype, x.dtype)

    def build(name: str, dims: Dims) -> object:
        shape = dims.shape(x.shape)
        kept = [extent for axis, extent in enumerate(shape) if axis not in axes]
        summed = [extent for axis, extent in enumerate(shape) if axis in axes]

        def element(inputs: tuple[Buffer, ...], results: tuple[Buffer, ...], index: Expr) -> None:
            outer = list(unflatten(index, kept))

            def read(inner: tuple[Expr, ...]) -> Expr:
                left, right = iter(outer), iter(inner)
                return inputs[0][
                    _flat([next(right) if axis in axes else next(left) for axis in range(len(shape))], shape)
                ]

            if is_arg:
                value = direct.arg_element(node.name, summed[0], x.dtype, read)
            else:
                value = cast_to(x.dtype, direct.reduce_element(node.name, summed, acc, read))
            T.buffer_store(results[0], value, [index])

        specs = [lowering.spec(x, dims)], [lowering.spec(node.output.type, dims)]
        work = math.prod(extent for extent in summed if isinstance(extent, int))
        return direct.direct(name, *specs, product(kept), float(work), element, lowering.spread)

    return lowering.kernel(build, operands, [node.output.type], node=node, strategy="one result at a time")[0]


# -- trees -----------------------------------------------------------------------------------------------------------


@lowers("tree_ensemble", on=CUDA)
def direct_tree_ensemble(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> Tensor:
    """One task for each row, which walks all trees in order."""
    constant_ensemble(node, operands)
    x, *structure = operands
    names = OPERANDS.split()[1:]
    structure = [wide_position(t) if name in POSITIONS else t for name, t in zip(names, structure, strict=True)]
    leq = node.attrs["compare"] == "le"
    used = {name: t for name, t in zip(names, structure, strict=True) if t.array is not None and t.array.size}
    distinct = list({id(t): t for t in used.values()}.values())  # one constant may be several operands

    def build(name: str, dims: Dims) -> object:
        rows, features = dims.shape(x.shape)
        trees, width = (static(structure[names.index(k)].shape[a]) for k, a in (("roots", 0), ("values", 1)))
        outputs = static(structure[names.index("base")].shape[0])
        words = static(structure[names.index("categories")].shape[1])

        def row(inputs: tuple[Buffer, ...], results: tuple[Buffer, ...], index: Expr) -> None:
            buffer_of = dict(zip(map(id, distinct), inputs[1:], strict=True))
            arrays = {name: buffer_of[id(t)] for name, t in used.items()}
            with T.serial(outputs) as k:
                T.buffer_store(results[0], arrays["base"][k], [index * outputs + k])
            if not trees:
                return
            with T.serial(trees) as tree:
                at = direct.variable(arrays["roots"][tree])
                if "feature" in arrays:  # else every tree is a leaf
                    with T.While(at.value >= 0):
                        here = share(at.value)
                        value = share(inputs[0][index * features + arrays["feature"][here]])
                        left = _goes_left(value, here, arrays, leq, words)
                        at.set(tirx.if_then_else(left, arrays["left"][here], arrays["right"][here]))
                leaf = share(-1 - at.value)
                with T.serial(width) as v:
                    place = share(tirx.Cast("int64", arrays["output"][tree]) + index * outputs + v)
                    T.buffer_store(results[0], results[0][place] + arrays["values"][leaf * width + v], [place])

        specs = [lowering.spec(t, dims) for t in (x, *distinct)], [lowering.spec(node.output.type, dims)]
        return direct.direct(name, *specs, rows, 16.0 * trees, row, lowering.spread)

    return lowering.kernel(build, (x, *distinct), [node.output.type], node=node, strategy="one row at a time")[0]


def _goes_left(x: Expr, node: Expr, arrays: dict[str, Buffer], leq: bool, words: int) -> Expr:
    """The routing rule of `mlec.ops.tree`."""
    dtype = str(x.ty.dtype)
    flags = share(tirx.Cast("int32", arrays["flags"][node]))
    is_nan_x = share(is_nan(x))
    numeric = tirx.const(True, "bool")
    if "category" in arrays:
        numeric = share(arrays["category"][node] < 0)
    as_zero = share(tirx.And(is_nan_x, tirx.And(_has(flags, NAN_IS_ZERO), numeric)))
    value = share(select(as_zero, const(0.0, dtype), x))
    tiny = share(tirx.And(value >= const(-ZERO_LIMIT, dtype), value <= const(ZERO_LIMIT, dtype)))
    zero_missing = tirx.And(tirx.And(_has(flags, ZERO_IS_MISSING), numeric), tiny)
    threshold = share(arrays["threshold"][node])
    decided = direct.variable(value <= threshold if leq else value < threshold)
    missing = share(tirx.Or(share(is_nan(value)), zero_missing))
    if "category" in arrays:
        category = share(arrays["category"][node])
        with if_(category >= 0):
            decided.set(const(False, "bool"))
            known = share(tirx.And(value > const(-1.0, dtype), value < const(32.0 * words, dtype)))
            with if_(known):
                code = share(tirx.Cast("int32", value))
                word = share(arrays["categories"][category * words + (code >> 5)])
                decided.set(tirx.NE((word >> (code & 31)) & 1, 0))
    return share(select(missing, _has(flags, DEFAULT_LEFT), decided.value))


def _has(flags: Expr, bit: int) -> Expr:
    return share(tirx.NE(flags & bit, 0))
