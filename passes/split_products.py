"""split-products: make q, k and v each by a product of its own, where one product makes them side by side.

Attention reads its operands where they lie, but whole: parts of wider rows would be copied out first. As many rows times fewer
columns cost the same arithmetic, so the product is split instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mlec.ir import Graph, GraphBuilder, Match, Miss, Node, P, Rule, Trait, Value, apply_rules
from mlec.ir.dim import product, static_dims
from mlec.ir.op import Array
from mlec.pipeline import Pass, PassContext, PassResult, Tolerance, ulp


@dataclass(frozen=True)
class SplitProducts(Pass):
    """Products whose columns attention reads in parts become one product for each part."""

    name: ClassVar[str] = "split-products"
    preserves: ClassVar[Tolerance] = ulp(16)  # a library may sum in another order for another number of columns

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        return PassResult.of_edits(*apply_rules(graph, context.taken((PickColumns(),))))


class PickColumns(Rule):
    """slice(columns of matmul(x, w) + b) -> matmul(x, columns of w) + columns of b, where attention reads all of the slices"""

    pattern = P("slice", "joined")

    def check(self, m: Match, graph: Graph) -> Miss | None:
        found = _product_of_columns(graph, m.node)
        if found is None:
            return Miss()
        cuts = graph.users[m["joined"]]
        columns = [_picked_columns(cut, found[1].shape[1]) for cut in cuts if cut.name == "slice"]
        if len(columns) < len(cuts) or graph.use_count(m["joined"]) > len(cuts):
            return Miss()
        if not all(only_attention_reads(graph, cut.output) for cut in cuts) or any(c is None for c in columns):
            return Miss()
        every = np.concatenate([c for c in columns if c is not None])
        return None if len(np.unique(every)) == len(every) else Miss("its columns would be computed twice")

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        found = _product_of_columns(graph, m.node)
        assert found is not None
        whole, weights, biases = found
        columns = _picked_columns(m.node, weights.shape[1])
        x, w = whole.inputs
        result = b("matmul", x, b.constant(np.ascontiguousarray(weights[:, columns]), w.hint))
        for bias in biases:
            result = b("add", result, b.constant(np.ascontiguousarray(bias[columns]), m.node.output.hint))
        return b("reshape", result, shape=m.node.output.type.shape)


def _product_of_columns(graph: Graph, cut: Node) -> tuple[Node, Array, list[Array]] | None:
    """The product whose columns a slice cuts, its constant weights, and the constant rows that are added to it."""
    value = cut.inputs[0]
    producer = graph.producer.get(value)
    if producer is not None and producer.name == "reshape":
        value = producer.inputs[0]
        producer = graph.producer.get(value) if graph.use_count(value) == 1 else None
    biases: list[Array] = []
    while producer is not None and producer.name == "add":
        rows = [(graph.constant_value(bias), x) for x, bias in (producer.inputs, producer.inputs[::-1])]
        fitting = [(bias, x) for bias, x in rows if bias is not None and bias.shape == value.type.shape[-1:]]
        if not fitting:
            return None
        bias, value = fitting[0]
        biases.insert(0, bias)
        producer = graph.producer.get(value) if graph.use_count(value) == 1 else None
    weights = graph.constant_value(producer.inputs[1]) if producer is not None and producer.name == "matmul" else None
    if producer is None or weights is None or weights.ndim != 2:
        return None
    return producer, weights, biases


def _picked_columns(cut: Node, count: int) -> Array | None:
    """Which of the ``count`` columns of a matrix, whose rows the trailing axes of the slice's operand are, the slice keeps."""
    shape, attrs = cut.inputs[0].type.shape, cut.attrs
    axis = attrs["axis"] % len(shape)
    first = next((i for i in range(len(shape)) if product(shape[i:]) == count), len(shape))
    if axis < first or not isinstance(attrs["start"], int) or not isinstance(attrs["stop"], int):
        return None
    columns = np.arange(count).reshape(static_dims(shape[first:]))
    return columns.take(range(attrs["start"], attrs["stop"], attrs["step"]), axis - first).reshape(-1)


def only_attention_reads(graph: Graph, value: Value) -> bool:
    """Whether a value goes into attention and nowhere else, on its way through views."""
    users = graph.users.get(value, ())
    if not users or graph.use_count(value) != sum(user.inputs.count(value) for user in users):
        return False
    return all(
        user.name == "attention" or (user.op.has(Trait.VIEW) and only_attention_reads(graph, user.output))
        for user in users
    )
