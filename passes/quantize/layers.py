"""Which nodes of a graph can work on 8 bits: products and convolutions with known weights, and tables of which rows are looked up."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlec.ir import Graph, Node, Value
from mlec.ir.dtype import DType
from mlec.ir.op import Array
from mlec.ops.quant import MAX_TERMS
from mlec.passes.quantize.images import RANKS, window_attrs
from mlec.passes.quantize.tables import LEAST_BYTES, table_of
from mlec.pipeline import Remark

PRODUCTS = ("matmul", "conv")


@dataclass(frozen=True, eq=False)
class Layer:
    """A product or a convolution, and the bias behind it; or a table, as that of an embedding, of which rows are looked up.

    Attributes:
        node: of the product, or the `gather` of rows.
        weights: float32, the output channels last: ``[k, n]``, or ``[kh, kw, c / groups, out]``; of a table ``[rows, n]``.
        added: the node that adds the bias, if nothing else reads the product.
        bias: (n,), zeros without one.
    """

    node: Node
    weights: Array
    added: Node | None
    bias: Array

    @property
    def is_conv(self) -> bool:
        return self.node.name == "conv"

    @property
    def is_table(self) -> bool:
        return self.node.name == "gather"

    @property
    def input(self) -> Value:
        """What is multiplied; of a table the numbers of its rows."""
        return self.node.inputs[1 if self.is_table else 0]

    @property
    def constant(self) -> Value:
        """The weights as they are in the graph."""
        return self.node.inputs[0 if self.is_table else 1]

    @property
    def output(self) -> Value:
        """With the bias."""
        return (self.added or self.node).output

    @property
    def name(self) -> str:
        """Of the module in the source, or of the result."""
        leaves = self.node.loc.leaves
        return (leaves[-1].scope if leaves else "") or self.node.output.hint or self.node.name

    @property
    def channel_axis(self) -> int:
        """Of the input, counted from the end."""
        return channel_axis(self.input) if self.is_conv else -1

    @property
    def attrs(self) -> dict[str, Any]:
        """Of a convolution, over images: a sequence is one of a single row."""
        return window_attrs(self.node.attrs, self.input.type.rank)


def channel_axis(value: Value) -> int:
    """Of a tensor with its channels in front of space, counted from the end."""
    return 1 - value.type.rank


def find_layers(graph: Graph, tables: bool = True) -> tuple[list[Layer], list[Remark]]:
    """The layers in order, with or without tables, and remarks on what is none."""
    layers: list[Layer] = []
    missed: list[Remark] = []
    for node in graph.nodes:
        table = table_of(graph, node) if tables else None
        if table is not None and table.nbytes >= LEAST_BYTES:
            layers.append(Layer(node, table, None, np.zeros(table.shape[1], np.float32)))
        elif table is not None:
            reason = f"its table of {table.nbytes:,} bytes is small"
            missed.append(Remark("missed", f"gather stays in float32: {reason}", node.loc, "quantize-int8"))
        if node.name not in PRODUCTS or node.output.type.dtype is not DType.F32:
            continue
        reason = "".join(_reasons(graph, node))
        if reason:
            missed.append(Remark("missed", f"{node.name} stays in float32: {reason}", node.loc, "quantize-int8"))
            continue
        weights = graph.constant_value(node.inputs[1])
        assert weights is not None
        if node.name == "conv":
            image = weights if weights.ndim == 4 else weights[:, :, None]
            weights = np.ascontiguousarray(image.transpose(2, 3, 1, 0))
        added, bias = _bias(graph, node, weights.shape[-1])
        layers.append(Layer(node, weights, added, bias))
    return layers, missed


def _reasons(graph: Graph, node: Node) -> Iterator[str]:
    """Why a product can't work on 8 bits: the first reason, or nothing."""
    x, w = node.inputs
    weights = graph.constant_value(w)
    if weights is None:
        yield "its weights are not constant"
    elif graph.constant_value(x) is not None:
        yield "nothing in it depends on the inputs"
    elif not weights.size:
        yield "it has no weights"
    elif node.name == "matmul" and weights.ndim != 2:
        yield f"its weights have {weights.ndim} axes"
    elif node.name == "conv" and x.type.rank not in RANKS:
        yield "it is not of images or sequences"
    elif node.name == "conv" and not all(isinstance(extent, int) for extent in x.type.shape[1:]):
        yield "its image has a symbolic extent"
    elif (terms := _terms(node, weights)) > MAX_TERMS:
        yield f"sums of {terms} products may not fit 32 bits"


def _terms(node: Node, weights: Array) -> int:
    return weights.shape[0] if node.name == "matmul" else math.prod(weights.shape[1:])


def _bias(graph: Graph, node: Node, channels: int) -> tuple[Node | None, Array]:
    """The addition of one number for each channel behind a product, and these."""
    none = np.zeros(channels, np.float32)
    if graph.use_count(node.output) != 1 or node.output in graph.outputs:
        return None, none
    (user,) = graph.users[node.output]
    if user.name != "add" or user.output.type != node.output.type:
        return None, none
    other = user.inputs[1] if user.inputs[0] is node.output else user.inputs[0]
    array = graph.constant_value(other)
    if array is None:
        return None, none
    axis = 1 if node.name == "conv" else node.output.type.rank - 1
    full = array.reshape((1,) * (node.output.type.rank - array.ndim) + array.shape)
    if full.size != full.shape[axis]:
        return None, none
    return user, np.broadcast_to(full.reshape(-1), (channels,)).astype(np.float32)
