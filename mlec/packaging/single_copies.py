"""Weights of 8 bits are in a file once, in the order that its kernels read them in: the graph takes its own from these."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

import mlec.ops  # noqa: F401  (fills the op table)
from mlec.ir import ConstantRef, DType, Graph, GraphBuilder, Node
from mlec.ir.op import Array
from mlec.ops.quant import unpack

PACKED = ".quads"
"""In the name that the backend gives to packed weights, between that of the weights and the number of segments."""


def with_single_copies(
    graph: Graph, tensors: Mapping[str, Array], read: Collection[str]
) -> tuple[Graph, dict[str, Array]]:
    """The graph on packed weights, and the tensors without what can be unpacked from others.

    Args:
        graph: of the model.
        tensors: what the file would hold, by name.
        read: names of those that kernels read.
    """
    b = GraphBuilder(graph.name)
    b.adopt_interface(graph)
    left = dict(tensors)
    for node in graph.nodes:
        found = _twin(node, graph, tensors) if _name_of(node) not in read else None
        if found is None:
            b.keep(node)
            continue
        name, groups = found
        b.adopt_constants({name: tensors[name]})
        left.pop(_name_of(node), None)
        with b.at(node.loc):
            packed = b.constant(tensors[name])
            plain = b("unpack_int8", packed, shape=node.output.type.shape, groups=groups, hint=node.output.hint)
        b.replace(node.output, plain)
    if len(left) == len(tensors):
        return graph, left
    return b.finish(graph.outputs, signature=graph.given_signature), left


def unpacked(graph: Graph) -> Graph:
    """The graph as it was: its weights are constants."""
    if not any(node.name == "unpack_int8" for node in graph.nodes):
        return graph
    b = GraphBuilder(graph.name)
    b.adopt_interface(graph)
    for node in graph.nodes:
        packed = graph.constant_value(node.inputs[0]) if node.name == "unpack_int8" else None
        if packed is None:
            b.keep(node)
            continue
        with b.at(node.loc):
            b.replace(node.output, b.constant(unpack(packed, **node.attrs), node.output.hint))
    return b.finish(graph.outputs, signature=graph.given_signature)


def _name_of(node: Node) -> str:
    value = node.attrs.get("value")
    return value.name if isinstance(value, ConstantRef) else ""


def _twin(node: Node, graph: Graph, tensors: Mapping[str, Array]) -> tuple[str, int] | None:
    """The packed form of a constant, and its groups, if there is one that holds the same weights."""
    name = _name_of(node)
    if not name or node.output.type.dtype is not DType.I8 or node.output.type.rank < 2:
        return None
    plain = graph.constants[name]
    for other, packed in tensors.items():
        if not other.startswith(f"{name}{PACKED}") or packed.ndim != 4:
            continue
        for groups in range(1, plain.shape[-1] + 1):
            blocks = groups * -(-plain.shape[-1] // groups // 16)
            if plain.shape[-1] % groups or packed.shape[0] != blocks:
                continue
            if np.array_equal(unpack(packed, plain.shape, groups), plain):
                return other, groups
    return None
