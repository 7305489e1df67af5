"""Writes the graph in which layers work on 8 bits.

A convolution of 8 bits has the channels of its images last, and so has everything between two of them: elementwise ops, pools, sums and
concatenations move there with it, and only what leaves such a region is transposed. What a layer reads is quantised where it is
made, so that between two layers only 8 bits are written and read: other readers (a residual sum, a mean) take what these stand for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mlec.ir import Graph, GraphBuilder, Location, Node, Trait, Value
from mlec.ir.dim import static_dims
from mlec.ir.dtype import DType
from mlec.passes.quantize.numbers import Affine
from mlec.passes.quantize.plans import Plan

RULE = "quantize-int8"
LAST = (0, 2, 3, 1)
FIRST = (0, 3, 1, 2)
"""Axes that move the channels of an image behind its space, and back."""


def emit(graph: Graph, plans: Sequence[Plan]) -> Graph:
    """The graph with these layers on 8 bits."""
    return _Writer(graph, {plan.layer.node: plan for plan in plans}).run()


def result_of(b: GraphBuilder, plan: Plan, x: Value, weights: Value | None = None) -> Value:
    """The layer with its bias on quantised inputs (of a convolution with the channels last), as f32.

    Args:
        b: writes it.
        plan: of the layer.
        x: the inputs: u8, or f32 where only the weights are quantised.
        weights: in another order than the plan has them.
    """
    w = b.constant(plan.weights, plan.layer.node.inputs[1].hint) if weights is None else weights
    node = plan.layer.node
    if plan.kind == "weights":
        sums = b("matmul_narrow", x, w)
    elif node.name == "matmul":
        sums = b("cast", b("matmul_int8", x, w, zero_point=plan.input.zero_point), dtype=DType.F32)
    else:
        sums = b("cast", b("conv_int8", x, w, zero_point=plan.input.zero_point, **node.attrs), dtype=DType.F32)
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
    """The value that has all numbers of this one: what pools and views are of."""
    node = graph.producer.get(value)
    if node is not None and (_is_pool(node) or _is_view(node)):
        return source_of(graph, node.inputs[0])
    return value


def permuted(b: GraphBuilder, x: Value, perm: tuple[int, ...]) -> Value:
    """The transposed tensor; a view where only axes of extent 1 move."""
    moved = [axis for axis in perm if x.type.shape[axis] != 1]
    if moved == sorted(moved):
        return b("reshape", x, shape=tuple(x.type.shape[axis] for axis in perm))
    return b("transpose", x, perm=perm)


def _is_pool(node: Node) -> bool:
    return node.name == "max_pool" and node.output.type.rank == 4


def _is_view(node: Node) -> bool:
    return node.op.has(Trait.VIEW) and len(node.inputs) == 1 and len(node.outputs) == 1


def _is_concat(node: Node) -> bool:
    """Of the channels of images."""
    return node.name == "concat" and node.output.type.rank == 4 and node.attrs["axis"] % 4 == 1


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
        if _is_pool(node) or _is_view(node) or _is_concat(node):
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
        if image not in self.last or image.type.rank != 4 or node.output.type.rank != 2:
            return None
        if node.output.type.shape[0] != image.type.shape[0]:
            return None
        channels, rows, columns = static_dims(image.type.shape[1:])
        eight = self.channels_last(image, plan.input)
        moved = plan.weights.reshape(channels, rows, columns, -1).transpose(1, 2, 0, 3)
        weights = np.ascontiguousarray(moved.reshape(plan.weights.shape))
        flat = self.b("reshape", eight, shape=node.output.type.shape)
        return result_of(self.b, plan, flat, self.b.constant(weights, plan.layer.node.inputs[1].hint))

    def pool(self, node: Node) -> bool:
        """max_pool on 8 bits, where these are there"""
        if not _is_pool(node) or len(node.attrs["kernel"]) != 2:
            return False
        (x,) = node.inputs
        affine = self.wanted.get(x)
        if affine is None or (x, affine) not in self.eight:
            return False
        self.eight[node.output, affine] = self.b("max_pool_int8", self.eight[x, affine], **node.attrs)
        self.wanted[node.output] = affine
        self.last[node.output] = None
        return True

    def follower(self, node: Node) -> bool:
        """Keeps the channels last through elementwise ops, concatenation and global means."""
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
        constant = self.graph.constant_value(value)
        if like.type.rank != 4 or (constant is None and value.type.rank != 4):
            return None
        if constant is not None:
            full = constant.reshape((1,) * (4 - constant.ndim) + constant.shape)
            return self.b.constant(np.ascontiguousarray(full.transpose(LAST)), value.hint)
        return self.image(value) if value in self.last else permuted(self.b, value, LAST)

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
        if x.type.rank != 4 or sorted(axis % 4 for axis in node.attrs["axes"]) != [2, 3]:
            return False
        reduced = self.b(node.op, self.image(x), axes=(1, 2), keepdims=False)
        self.b.replace(node.output, self.b("reshape", reduced, shape=node.output.type.shape, hint=node.output.hint))
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
                self.eight[key] = permuted(self.b, self.b("quantize", value, **affine.attrs), LAST)
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
            return permuted(self.b, self.channels_last(value, affine), FIRST)
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
        self.b.replace(value, permuted(self.b, exact or self.image(value), FIRST))
