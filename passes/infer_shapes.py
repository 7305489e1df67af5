"""infer-shapes: derive every type again from the inputs on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mlec.errors import TypeRuleError
from mlec.ir import Graph, GraphBuilder, Node
from mlec.ir.dim_trace import origins
from mlec.ir.printer import print_node, value_names
from mlec.pipeline import Pass, PassContext, PassResult, Remark


@dataclass(frozen=True)
class InferShapes(Pass):
    """Applies each op's type rule in order. Of two extents that do not fit, the error says where each comes from."""

    name: ClassVar[str] = "infer-shapes"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        b = GraphBuilder(graph.name)
        b.adopt_interface(graph)
        refined: list[Remark] = []
        for node in graph.nodes:
            operands = [b.resolve(v).type for v in node.inputs]
            stated = tuple(v.type for v in node.outputs)
            try:
                types = stated if node.is_constant else node.op.result_types(operands, node.attrs)
            except TypeRuleError as error:
                raise _located(error, node, graph, b) from None
            if types == stated:
                b.keep(node)
                continue
            for value, new in zip(node.outputs, b.copy_node(node), strict=True):
                b.replace(value, new)
                if new.type != value.type:
                    refined.append(Remark("applied", f"{node.name}: {value.type} is {new.type}", node.loc))
        if not refined:
            return PassResult(graph)
        return PassResult(b.finish(graph.outputs, signature=graph.given_signature), tuple(refined))


def _located(error: TypeRuleError, node: Node, graph: Graph, b: GraphBuilder) -> TypeRuleError:
    """The error of a type rule with its place, the node, and the ways of the two extents through the graph as it is inferred so far."""
    inferred = b.finish([b.resolve(v) for v in node.inputs])
    names = {b.resolve(value): name for value, name in value_names(graph).items()}
    inputs = [b.resolve(v) for v in node.inputs]
    way = origins(error, inputs, inferred.producer, names, graph.signature.symbols)
    notes = (f"in {print_node(node, value_names(graph))}", *way)
    located = TypeRuleError(error.message, code=error.code, hint=error.hint, loc=node.loc, notes=notes)
    located.dims = error.dims
    return located
