"""Writes the graph in which layers work on 8 bits.

A convolution of 8 bits has the channels of its images last, and so has everything between two of them: elementwise ops, pools, means,
nearest neighbours and concatenations move there with it, and only what leaves such a region is transposed. What a layer reads is
quantised where it is made, so that between two layers only 8 bits are written and read: other readers (a residual sum, a mean) take
what these stand for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlec.ir import Graph, GraphBuilder, Location, Node, Trait, Value, apply_rules
from mlec.ir.dim import static, static_dims
from mlec.ir.dtype import DType
from mlec.ops.pool import pool_geometry
from mlec.ops.resize import nearest_positions
from mlec.passes.quantize import steps
from mlec.passes.quantize.halves import with_halves
from mlec.passes.quantize.images import (
    RANKS,
    array_as_image,
    counted,
    extents,
    image_of,
    tensor_of,
    window_attrs,
)
from mlec.passes.quantize.layers import Layer
from mlec.passes.quantize.numbers import Affine
from mlec.passes.quantize.plans import Plan
from mlec.passes.quantize.tables import rows_of

RULE = "quantize-int8"


def emit(graph: Graph, plans: Sequence[Plan], stored: Mapping[Value, Affine] | None = None) -> Graph:
    """The graph with these layers on 8 bits; ``stored``: what else kernels may hand over in 8 bits, see `stored_values`."""
    written = _Writer(graph, {plan.layer.node: plan for plan in plans}, stored or {}).run()
    return with_halves(apply_rules(written, steps.RULES)[0])


def result_of(b: GraphBuilder, plan: Plan, x: Value, weights: Value | None = None) -> Value:
    """The layer with its bias on quantised inputs (of a convolution with the channels last), as f32.

    Args:
        b: writes it.
        plan: of the layer.
        x: the inputs: u8, or as they are where only the weights are quantised.
        weights: in another order than the plan has them.
    """
    w = b.constant(plan.weights, plan.layer.constant.hint) if weights is None else weights
    if plan.layer.is_table:
        return rows_of(b, w, b.constant(plan.scales, "scale"), x)
    node = plan.layer.node
    if plan.kind == "weights":
        sums = b("matmul_narrow", x, w)
    elif node.name == "matmul":
        sums = b("cast", b("matmul_int8", x, w, zero_point=plan.input.zero_point), dtype=DType.F32)
    else:
        sums = b("cast", b("conv_int8", x, w, zero_point=plan.input.zero_point, **plan.layer.attrs), dtype=DType.F32)
    hint, scales = plan.layer.output.hint, b.constant(plan.scales, "scale")
    if not plan.bias.any():
        return b("mul", sums, scales, hint=hint)
    return b("add", b("mul", sums, scales), b.constant(plan.bias, "bias"), hint=hint)


def quantized(b: GraphBuilder, x: Value, plan: Plan) -> Value:
    """What the layer reads, of its float input."""
    if plan.divisor is not None:
        x = b("mul", x, b.constant((1 / plan.divisor).astype(np.float32), "balance"))
    return x if plan.kind == "weights" else b("quantize", x, **plan.input.attrs)


def source_of(graph: Graph, value: Value) -> Value:
    """The value that has all numbers of this one: what largest elements, nearest ones and views are of."""
    node = graph.producer.get(value)
    if node is not None and _picks(node):
        return source_of(graph, node.inputs[0])
    return value


def stored_values(graph: Graph, layers: Sequence[Layer]) -> list[Value]:
    """Images that no layer reads, but that a kernel writes and others read: pools and means, and what is beside these."""
    images: set[Value] = set()
    convolving = {node for layer in layers if layer.is_conv for node in (layer.node, layer.added)}
    for node in graph.nodes:
        convolved = node in convolving
        follows = any(value in images for value in node.inputs) and (node.op.has(Trait.ELEMENTWISE) or _stays(node))
        if convolved or follows:
            images.update(value for value in node.outputs if value.type.rank in RANKS)
    read = {source_of(graph, layer.input) for layer in layers}
    return [
        value
        for value in (value for node in graph.nodes for value in node.outputs)
        if value in images and value not in read and value not in graph.outputs and _is_stored(graph, value)
    ]


def _is_stored(graph: Graph, value: Value) -> bool:
    """Whether some reader takes it from memory, as elementwise ops mostly do not; and all of them stay on images."""
    readers = graph.users.get(value, ())
    return any(map(_stays, readers)) and all(node.op.has(Trait.ELEMENTWISE) or _stays(node) for node in readers)


def _picks(node: Node) -> bool:
    """Whether all numbers of the result are numbers of the operand."""
    return _is_pool(node, "max_pool") or _is_view(node) or _is_nearest(node)


def _stays(node: Node) -> bool:
    """Whether it makes an image of images, besides elementwise ops."""
    return (
        _is_pool(node, "max_pool")
        or _is_pool(node, "avg_pool")
        or _is_nearest(node)
        or _is_concat(node)
        or _is_mean(node)
    )


def _is_pool(node: Node, name: str) -> bool:
    return node.name == name and len(node.attrs["kernel"]) == node.output.type.rank - 2 in (1, 2)


def _is_nearest(node: Node) -> bool:
    return node.name == "resize" and node.attrs["mode"] == "nearest" and node.output.type.rank in RANKS


def _is_view(node: Node) -> bool:
    return node.op.has(Trait.VIEW) and len(node.inputs) == 1 and len(node.outputs) == 1


def _is_concat(node: Node) -> bool:
    """Of the channels of images."""
    if node.name != "concat":
        return False
    rank = node.output.type.rank
    return rank in RANKS and node.attrs["axis"] % rank == 1


def _is_mean(node: Node) -> bool:
    """Over all space."""
    rank = node.inputs[0].type.rank if node.inputs else 0
    return (
        node.name == "mean" and rank in RANKS[1:] and sorted(a % rank for a in node.attrs["axes"]) == [*range(2, rank)]
    )


@dataclass
class _Writer:
    """Goes through the nodes in order.

    Attributes:
        last: images with the channels last, by the old value, in f32; None where only their 8 bits are there.
        eight: images with the channels last, by the old value and what their numbers stand for, in 8 bits.
        plain: other tensors in 8 bits, and what they were divided by.
        wanted: images that some layer reads in 8 bits, and what these stand for.
    """

    graph: Graph
    plans: Mapping[Node, Plan]
    stored: Mapping[Value, Affine]
    b: GraphBuilder = field(init=False)
    last: dict[Value, Value | None] = field(default_factory=dict)
    eight: dict[tuple[Value, Affine], Value] = field(default_factory=dict)
    flat: dict[tuple[Value, Affine, int], Value] = field(default_factory=dict)
    wanted: dict[Value, Affine] = field(default_factory=dict)
    written: set[Value] = field(default_factory=set)

    def run(self) -> Graph:
        self.b = GraphBuilder(self.graph.name)
        self.b.adopt_interface(self.graph)
        biases = {plan.layer.added for plan in self.plans.values()} - {None}
        for plan in self.plans.values():
            if plan.kind == "int8" and plan.divisor is None:
                self.want(plan.layer.input, plan.input)
        for value, affine in self.stored.items():
            self.want(value, affine)
        for node in self.graph.nodes:
            with self.b.at(Location.merged((node.loc,), RULE)):
                done = self.layer(node) or node in biases or self.pool(node) or self.follower(node)
            if not done:
                for value in node.inputs:
                    self.need_plain(value)
                self.b.keep(node)
            for value in node.outputs:
                if self.last.get(value) is not None and value in self.wanted:
                    with self.b.at(Location.merged((node.loc,), RULE)):
                        self.channels_last(value, self.wanted[value])
        for value in self.graph.outputs:
            self.need_plain(value)
        return self.b.finish(self.graph.outputs, signature=self.graph.given_signature)

    def want(self, value: Value, affine: Affine) -> None:
        """Whoever makes this value should write it in 8 bits."""
        if value in self.wanted:
            return
        self.wanted[value] = affine
        node = self.graph.producer.get(value)
        if node is None:
            return
        if _picks(node) or _is_concat(node):
            for operand in node.inputs:
                self.want(operand, affine)

    # -- nodes ---------------------------------------------------------------------------------------------------

    def layer(self, node: Node) -> bool:
        plan = self.plans.get(node)
        if plan is None:
            return False
        layer = plan.layer
        if layer.is_conv:
            self.last[layer.output] = result_of(self.b, plan, self.channels_last(layer.input, plan.input))
            return True
        result = self.of_flattened_image(plan) or result_of(self.b, plan, self.rows(plan))
        self.b.replace(layer.output, result)
        return True

    def of_flattened_image(self, plan: Plan) -> Value | None:
        """A product of an image that was made a row, on the row with the channels last: the weights change their order instead."""
        node = self.graph.producer.get(plan.layer.input)
        if plan.kind != "int8" or plan.divisor is not None or node is None or node.name != "reshape":
            return None
        image = node.inputs[0]
        if image not in self.last or image.type.rank not in RANKS[1:] or node.output.type.rank != 2:
            return None
        if node.output.type.shape[0] != image.type.shape[0]:
            return None
        eight = self.channels_last(image, plan.input)
        (rows, columns), channels = extents(image), static(image.type.shape[1])
        moved = plan.weights.reshape(channels, rows, columns, -1).transpose(1, 2, 0, 3)
        weights = np.ascontiguousarray(moved.reshape(plan.weights.shape))
        flat = self.b("reshape", eight, shape=node.output.type.shape)
        return result_of(self.b, plan, flat, self.b.constant(weights, plan.layer.constant.hint))

    def pool(self, node: Node) -> bool:
        """Pools and nearest neighbours of 8 bits, where these are there."""
        if not (_is_pool(node, "max_pool") or _is_pool(node, "avg_pool") or _is_nearest(node)):
            return False
        (x,) = node.inputs
        affine = self.wanted.get(x)
        if affine is None or (x, affine) not in self.eight:
            return False
        if node.name == "avg_pool":
            self.last[node.output] = self.means(x, affine, window_attrs(node.attrs, x.type.rank))
            return True
        eight = self.eight[x, affine]
        if node.name == "max_pool":
            self.eight[node.output, affine] = self.b("max_pool_int8", eight, **window_attrs(node.attrs, x.type.rank))
        else:
            self.eight[node.output, affine] = self.nearest(eight, extents(node.output))
        self.wanted[node.output] = affine
        self.last[node.output] = None
        return True

    def means(self, x: Value, affine: Affine, attrs: Mapping[str, Any]) -> Value:
        """Of windows: their sums, times what one step of a number stands for, over how many there are."""
        geometry, kernel = pool_geometry(attrs), tuple(attrs["kernel"])
        given = {name: attrs[name] for name in ("kernel", "strides", "pads", "ceil_mode")}
        sums = self.b("sum_pool_int8", self.eight[x, affine], zero_point=affine.zero_point, **given)
        space = sums.type.shape[1:3]
        counts = counted(extents(x), static_dims(space), kernel, geometry, attrs["count_include_pad"])
        scale = (affine.scale / counts).astype(np.float32)
        if (scale == scale[:1, :1, :1]).all():
            scale = scale[:1, :1, :1]
        return self.b("mul", self.b("cast", sums, dtype=DType.F32), self.b.constant(scale, "scale"))

    def nearest(self, eight: Value, space: tuple[int, int]) -> Value:
        for axis, extent in enumerate(space, 1):
            given = static(eight.type.shape[axis])
            if extent != given:
                picked = self.b.constant(nearest_positions(extent, given), "nearest")
                eight = self.b("gather", eight, picked, axis=axis)
        return eight

    def follower(self, node: Node) -> bool:
        """Keeps the channels last through elementwise ops, concatenation and what is taken over all space."""
        if not any(value in self.last for value in node.inputs):
            return False
        if node.op.has(Trait.ELEMENTWISE):
            return self.elementwise(node)
        if _is_concat(node) and all(value in self.last for value in node.inputs):
            return self.concat(node)
        if node.name in ("mean", "sum", "max", "min"):
            return self.over_space(node)
        return False

    def elementwise(self, node: Node) -> bool:
        operands: list[Value] = []
        for value in node.inputs:
            fitting = self.operand(value, node.output)
            if fitting is None:
                return False
            operands.append(fitting)
        self.last[node.output] = self.b(node.op, *operands, hint=node.output.hint, **node.attrs)
        return True

    def operand(self, value: Value, like: Value) -> Value | None:
        """An operand of an elementwise op with its channels last: an image, a number for each channel, or a single one."""
        if value.type.rank == 0:
            return value
        constant, rank = self.graph.constant_value(value), like.type.rank
        if rank not in RANKS or (constant is None and value.type.rank != rank):
            return None
        if constant is not None:
            return self.b.constant(array_as_image(constant, rank), value.hint)
        return self.image(value) if value in self.last else image_of(self.b, value)

    def concat(self, node: Node) -> bool:
        affine = self.wanted.get(node.output)
        if affine is None:
            self.last[node.output] = self.b("concat", *map(self.image, node.inputs), axis=3)
            return True
        parts = [self.channels_last(value, affine) for value in node.inputs]
        self.eight[node.output, affine] = self.b("concat", *parts, axis=3)
        self.last[node.output] = None
        return True

    def over_space(self, node: Node) -> bool:
        (x,) = node.inputs
        rank = x.type.rank
        if rank not in RANKS[1:] or sorted(axis % rank for axis in node.attrs["axes"]) != [*range(2, rank)]:
            return False
        affine = self.wanted.get(x)
        if node.name == "mean" and affine is not None and (x, affine) in self.eight:
            whole = {"kernel": extents(x), "strides": (), "pads": (), "ceil_mode": False, "count_include_pad": True}
            self.last[node.output] = self.means(x, affine, whole)
        else:
            self.last[node.output] = self.b(node.op, self.image(x), axes=(1, 2), keepdims=True)
        return True

    # -- tensors in their forms ----------------------------------------------------------------------------------

    def image(self, value: Value) -> Value:
        """An image of `last` in f32: what its 8 bits stand for where it has them, each time anew, so that each reader does it itself."""
        affine = self.wanted.get(value)
        if affine is not None and (value, affine) in self.eight:
            return self.b("dequantize", self.eight[value, affine], **affine.attrs)
        found = self.last[value]
        assert found is not None
        return found

    def channels_last(self, value: Value, affine: Affine) -> Value:
        """An image in 8 bits with its channels last."""
        key = (value, affine)
        if key not in self.eight:
            if value in self.last:
                self.eight[key] = self.b("quantize", self.image(value), **affine.attrs)
            else:
                self.eight[key] = image_of(self.b, self.b("quantize", value, **affine.attrs))
        return self.eight[key]

    def rows(self, plan: Plan) -> Value:
        """What a product reads."""
        value = plan.layer.input
        key = (value, plan.input, id(plan.divisor) if plan.divisor is not None else 0)
        if plan.kind == "weights":
            self.need_plain(value)
            return quantized(self.b, value, plan)
        if key not in self.flat:
            found = None if plan.divisor is not None else self.view_of_image(value, plan.input)
            if found is None:
                self.need_plain(value)
                found = quantized(self.b, value, plan)
            self.flat[key] = found
        return self.flat[key]

    def view_of_image(self, value: Value, affine: Affine) -> Value | None:
        """A view of an image, in 8 bits, with the channels where they were."""
        if value in self.last:
            return tensor_of(self.b, self.channels_last(value, affine), value.type.rank)
        node = self.graph.producer.get(value)
        if node is None or not _is_view(node):
            return None
        inner = self.view_of_image(node.inputs[0], affine)
        return None if inner is None else self.b(node.op, inner, **node.attrs)

    def need_plain(self, value: Value) -> None:
        """Makes sure that the value is there in f32 with its channels in front."""
        if value not in self.last or value in self.written:
            return
        self.written.add(value)
        exact = self.last[value] if value in self.graph.outputs else None
        self.b.replace(value, tensor_of(self.b, exact or self.image(value), value.type.rank))
