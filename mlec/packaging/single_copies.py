"""What kernels read in an order of their own is in a file once, in that order, and the graph takes its own from there.

* Weights of 8 bits: the graph unpacks them.
* Leaves of trees: they have no order but that which children and roots give them, so the graph's refer to the kernels' table. Positions
  that only the graph reads are as narrow as they can be.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import numpy as np

import mlec.ops  # noqa: F401  (fills the op table)
from mlec.ir import ConstantRef, DType, Graph, GraphBuilder, Node, Value
from mlec.ir.op import Array
from mlec.ops.quant import unpack
from mlec.ops.tree import NARROW, OPERANDS, POSITIONS
from mlec.passes.trees.arrays import Ints, Trees

PACKED = ".quads"
"""In the name that the backend gives to packed weights, between that of the weights and the number of segments."""


def with_single_copies(
    graph: Graph, tensors: Mapping[str, Array], read: Collection[str]
) -> tuple[Graph, dict[str, Array]]:
    """The graph on what kernels read, and the tensors that either of them needs.

    Args:
        graph: of the model.
        tensors: its constants and those of the kernels, by name.
        read: names of those that kernels read.
    """
    b = _builder(graph, tensors)
    packed = {name: tensors[name] for name in read}
    for node in graph.nodes:
        with b.at(node.loc):
            new = _on_packed_weights(b, graph, node, packed) or _on_packed_leaves(b, graph, node, packed)
        if new is None:
            b.keep(node)
        else:
            b.replace(node.output, new)
    slim = b.finish(graph.outputs, signature=graph.given_signature)
    slim = _with_narrow_positions(slim, {**tensors, **slim.constants}, packed)
    every = {**tensors, **slim.constants}
    return slim, {name: array for name, array in every.items() if name in slim.constants or name in packed}


def unpacked(graph: Graph, tensors: Mapping[str, Array]) -> Graph:
    """The graph as it was: its weights are constants, its leaves those of its trees.

    Args:
        graph: of a file.
        tensors: in the file; those that the graph does not name are not looked at: each may have to be decoded.
    """
    if not any(node.name in ("unpack_int8", "tree_ensemble") for node in graph.nodes):
        return graph
    b = GraphBuilder(graph.name, taken=tensors)
    b.adopt_interface(graph)
    for node in graph.nodes:
        with b.at(node.loc):
            new = _plain_weights(b, graph, node) or _own_leaves(b, graph, node)
        if new is None:
            b.keep(node)
        else:
            b.replace(node.output, new)
    return b.finish(graph.outputs, signature=graph.given_signature)


def _builder(graph: Graph, tensors: Mapping[str, Array]) -> GraphBuilder:
    """Of a copy of the graph in which new constants have names that no tensor has."""
    b = GraphBuilder(graph.name)
    b.adopt_constants({**tensors, **graph.constants})
    b.adopt_interface(graph)
    return b


def _name_of(node: Node) -> str:
    """Of the array that a node stands for; empty for others."""
    value = node.attrs.get("value")
    return value.name if isinstance(value, ConstantRef) else ""


# -- weights of 8 bits ---------------------------------------------------------------------------------------------------


def _on_packed_weights(b: GraphBuilder, graph: Graph, node: Node, packed: Mapping[str, Array]) -> Value | None:
    """A constant as what unpacks it, if kernels read the same weights packed, and not as they are."""
    name = _name_of(node)
    if not name or name in packed or node.output.type.dtype is not DType.I8 or node.output.type.rank < 2:
        return None
    plain = graph.constants[name]
    for other, array in packed.items():
        if not other.startswith(f"{name}{PACKED}") or array.ndim != 4:
            continue
        for groups in range(1, plain.shape[-1] + 1):
            blocks = groups * -(-plain.shape[-1] // groups // 16)
            if plain.shape[-1] % groups or array.shape[0] != blocks:
                continue
            if np.array_equal(unpack(array, plain.shape, groups), plain):
                return b("unpack_int8", b.constant(array), shape=plain.shape, groups=groups, hint=node.output.hint)
    return None


def _plain_weights(b: GraphBuilder, graph: Graph, node: Node) -> Value | None:
    packed = graph.constant_value(node.inputs[0]) if node.name == "unpack_int8" else None
    return None if packed is None else b.constant(unpack(packed, **node.attrs), node.output.hint)


# -- leaves of trees -----------------------------------------------------------------------------------------------------


def _on_packed_leaves(b: GraphBuilder, graph: Graph, node: Node, packed: Mapping[str, Array]) -> Value | None:
    """Trees on a table that kernels read, if it has all their leaves, and no kernel reads these as they are."""
    trees = Trees.of(node, graph) if node.name == "tree_ensemble" else None
    if trees is None or any(array is trees.values for array in packed.values()):
        return None
    for table in sorted(_tables(trees, packed.values()), key=len):
        rows = _rows_in(table, trees.values)
        if rows is not None:
            left, right, roots = (_with_leaves(codes, rows) for codes in (trees.left, trees.right, trees.roots))
            changed = replace(trees, left=left, right=right, roots=roots, values=table)
            return changed.emit(b, graph, node, node.inputs[0])
    return None


def _with_leaves(codes: Ints, rows: Ints) -> Ints:
    """Children or roots whose leaves are these rows."""
    moved = codes.copy()
    moved[codes < 0] = ~rows[~codes[codes < 0]]
    return moved


def _tables(trees: Trees, arrays: Iterable[Array]) -> list[Array]:
    """Arrays that rows of values can be of."""
    form = trees.values.dtype, trees.values.shape[1:]
    return [array for array in arrays if (array.dtype, array.shape[1:]) == form and array.size]


def _rows_in(table: Array, values: Array) -> Ints | None:
    """i64[L]: where each row of ``values`` is in the table, bit for bit; None if one is not."""
    rows, wanted = _as_bytes(table), _as_bytes(values)
    known, first = np.unique(rows, return_index=True)
    found = first[np.minimum(np.searchsorted(known, wanted), len(known) - 1)]
    return found if np.array_equal(rows[found], wanted) else None


def _as_bytes(rows: Array) -> Array:
    """[rows, V] as [rows] of so many bytes each: equal where all bits are."""
    return np.ascontiguousarray(rows).view(f"V{rows.itemsize * rows.shape[1]}").reshape(-1)


def _own_leaves(b: GraphBuilder, graph: Graph, node: Node) -> Value | None:
    """Trees on the leaves that they use, with positions as wide as kernels read them; None if they are so already."""
    trees = Trees.of(node, graph) if node.name == "tree_ensemble" else None
    if trees is None:
        return None
    own = trees.rebuilt(trees.left, trees.right, trees.roots)
    narrow = any(value.type.dtype in NARROW for value in _positions(node))
    return own.emit(b, graph, node, node.inputs[0]) if narrow or len(own.values) < len(trees.values) else None


def _with_narrow_positions(graph: Graph, tensors: Mapping[str, Array], packed: Mapping[str, Array]) -> Graph:
    """The graph with narrower constants, where no kernel reads them and they are nothing but positions in trees."""
    b = _builder(graph, tensors)
    for node in graph.nodes:
        array = graph.constants.get(_name_of(node)) if _name_of(node) not in packed else None
        if array is None or array.dtype != np.int32 or not _is_position(node.output, graph):
            b.keep(node)
            continue
        forms = (array.astype(dtype.numpy) for dtype in NARROW)
        with b.at(node.loc):
            b.replace(
                node.output,
                b.constant(next((form for form in forms if np.array_equal(form, array)), array), node.output.hint),
            )
    return b.finish(graph.outputs, signature=graph.given_signature)


def _is_position(value: Value, graph: Graph) -> bool:
    return value not in graph.outputs and all(value in _positions(node) for node in graph.users[value])


def _positions(node: Node) -> list[Value]:
    """Operands of trees that count nodes, leaves, features, sets or outputs; of rank 1, which no other integers of 32 bits are."""
    if node.name != "tree_ensemble":
        return []
    return [value for name, value in zip(OPERANDS.split(), node.inputs, strict=True) if name in POSITIONS]
