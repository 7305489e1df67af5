"""cse: compute equal expressions once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mlec.ir import ConstantRef, Graph, GraphBuilder, Node
from mlec.pipeline import Pass, PassContext, PassResult, Remark


@dataclass(frozen=True)
class EliminateCommonSubexpressions(Pass):
    """Two nodes with the same op, operands and attributes become one. Equal constants become one as well."""

    name: ClassVar[str] = "cse"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        b = GraphBuilder(graph.name)
        b.adopt_interface(graph)
        first: dict[object, Node] = {}
        merged: list[Remark] = []
        for node in graph.nodes:
            key = _key(node, b, graph)
            twin = first.setdefault(key, node)
            if twin is node:
                b.keep(node)
                continue
            for mine, theirs in zip(node.outputs, twin.outputs, strict=True):
                b.replace(mine, theirs)
            if not node.is_constant:
                merged.append(Remark("applied", f"{node.name} is computed already", node.loc))
        if len(first) == len(graph.nodes):
            return PassResult(graph)
        return PassResult(b.finish(graph.outputs, signature=graph.given_signature), tuple(merged))


def _key(node: Node, b: GraphBuilder, graph: Graph) -> object:
    if node.is_constant and isinstance(node.attrs["value"], ConstantRef):
        array = graph.constants[node.attrs["value"].name]
        return ("constant", str(array.dtype), array.shape, array.tobytes() if array.nbytes <= 4096 else id(array))
    types = tuple(v.type for v in node.outputs)
    return (node.name, tuple(b.resolve(v) for v in node.inputs), attrs_key(node), types)


def attrs_key(node: Node) -> object:
    """Equal for nodes with the same attributes."""
    return tuple((k, v.digest if isinstance(v, Graph) else (type(v), repr(v))) for k, v in node.attrs.items())
