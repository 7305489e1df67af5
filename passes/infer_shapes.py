"""infer-shapes: derive every type again from the inputs on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mlec.errors import TypeRuleError
from mlec.ir import Graph, GraphBuilder, Node, Value
from mlec.ir.printer import print_node, value_names
from mlec.pipeline import Pass, PassContext, PassResult, Remark

TRACE_LENGTH = 4


@dataclass(frozen=True)
class InferShapes(Pass):
    """Applies each op's type rule in order. A mismatch is traced back to where the operands' shapes came from."""

    name: ClassVar[str] = "infer-shapes"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        b = GraphBuilder(graph.name)
        b.adopt_interface(graph)
        refined: list[Remark] = []
        for node in graph.nodes:
            try:
                b.keep(node)
            except TypeRuleError as error:
                raise TypeRuleError(
                    error.message, code=error.code, hint=error.hint, loc=node.loc, notes=_trace(node, graph)
                ) from None
            for value in node.outputs:
                now = b.resolve(value).type
                if now != value.type:
                    refined.append(Remark("applied", f"{node.name}: {value.type} is {now}", node.loc))
        if not refined:
            return PassResult(graph)
        return PassResult(b.finish(graph.outputs, signature=graph.given_signature), tuple(refined))


def _trace(node: Node, graph: Graph) -> tuple[str, ...]:
    """For each operand, the chain of nodes that gave it its shape."""
    names = value_names(graph)
    lines: list[str] = [f"in {print_node(node, names)}"]
    for value in node.inputs:
        lines.append(f"%{names[value]}: {value.type} comes from")
        current: Value | None = value
        for _ in range(TRACE_LENGTH):
            producer = graph.producer.get(current) if current is not None else None
            if producer is None:
                lines.append(
                    f"    an input of the graph: %{names[current]}" if current is not None else "    a constant"
                )
                break
            lines.append(f"    {print_node(producer, names)}{f'  at {producer.loc}' if str(producer.loc) else ''}")
            current = producer.inputs[0] if producer.inputs else None
    return tuple(lines)
