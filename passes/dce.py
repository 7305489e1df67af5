"""dce: drop what no output needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mlec.ir import Graph, GraphBuilder
from mlec.pipeline import Pass, PassContext, PassResult, Remark


@dataclass(frozen=True)
class EliminateDeadCode(Pass):
    """Removes nodes whose results are never used. The inputs stay: they are the interface."""

    name: ClassVar[str] = "dce"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        b = GraphBuilder(graph.name)
        b.adopt_interface(graph)
        for node in graph.nodes:
            b.keep(node)
        cleaned = b.finish(graph.outputs, signature=graph.given_signature)
        kept = set(cleaned.nodes)
        dead = [n for n in graph.nodes if n not in kept]
        if not dead:
            return PassResult(graph)
        return PassResult(cleaned, tuple(Remark("applied", f"{n.name} is never used", n.loc) for n in dead))
