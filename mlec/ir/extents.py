"""Extents for what is symbolic, and graphs with those."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from mlec.ir.builder import GraphBuilder
from mlec.ir.dim import parse_dim, substitute
from mlec.ir.graph import Graph, Value
from mlec.ir.op import substitute_attrs
from mlec.signature import TensorSpec


def extents_near(graph: Graph, extent: int) -> dict[str, int]:
    """For each symbol of a graph this extent, or the nearest one that the model takes."""
    limits = graph.signature.symbols
    found = {}
    for name in graph.symbols:
        least, most = limits.get(name, (0, None))
        found[name] = max(least, extent if most is None else min(extent, most))
    return found


def with_extents(graph: Graph, extents: Mapping[str, int]) -> Graph:
    """The graph, and its signature, with numbers in the place of some of its symbols.

    Raises:
        TypeRuleError: an op does not take these extents.
    """
    b = GraphBuilder(graph.name)
    b.adopt_constants(graph.constants)
    values: dict[Value, Value] = {v: b.input(v.hint, v.type.substitute(extents)) for v in graph.inputs}
    for node in graph.nodes:
        if node.is_constant:
            results = b.copy_node(node)
        else:
            with b.at(node.loc):
                attrs = substitute_attrs(node.attrs, extents)
                hints = [v.hint for v in node.outputs]
                results = b.multi(node.op, *(values[v] for v in node.inputs), hints=hints, **attrs)
        values |= zip(node.outputs, results, strict=True)
    signature = msgspec.structs.replace(
        graph.signature,
        inputs=tuple(_with_extents(spec, extents) for spec in graph.signature.inputs),
        outputs=tuple(_with_extents(spec, extents) for spec in graph.signature.outputs),
        symbols={name: limits for name, limits in graph.signature.symbols.items() if name not in extents},
    )
    return b.finish([values[v] for v in graph.outputs], signature=signature)


def _with_extents(spec: TensorSpec, extents: Mapping[str, int]) -> TensorSpec:
    dims = (substitute(parse_dim(d), extents) for d in spec.shape)
    return msgspec.structs.replace(spec, shape=tuple(d if isinstance(d, int) else str(d) for d in dims))
