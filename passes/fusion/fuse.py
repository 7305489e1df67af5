"""fuse: put each group of nodes into one ``fused`` node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mlec.ir import ConstantRef, Graph, GraphBuilder, Location, Value
from mlec.ir.printer import print_node, value_names
from mlec.passes.fusion.groups import Group, find_groups
from mlec.pipeline import Pass, PassContext, PassResult, Remark


@dataclass(frozen=True)
class FuseOperators(Pass):
    """Elementwise chains become one loop; bias, activation and residual become the epilogue of the product before them.

    Options:
        max_nodes: size limit of one kernel.
    """

    max_nodes: int = 40
    name: ClassVar[str] = "fuse"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        found = find_groups(graph, self.max_nodes)
        groups = [group for group in found if len(group.nodes) > 1]
        by_root = {group.root: group for group in groups}
        inside = {node for group in groups for node in group.nodes}
        names = value_names(graph)
        remarks = [remark for group in found for remark in _remarks(group, names)]
        b = GraphBuilder(graph.name)
        b.adopt_interface(graph)
        for node in graph.nodes:
            if node in by_root:
                _emit(b, graph, by_root[node])
            elif node not in inside:
                b.keep(node)
        if not groups:
            return PassResult(graph, tuple(remarks))
        return PassResult(b.finish(graph.outputs, signature=graph.given_signature), tuple(remarks))


def _emit(b: GraphBuilder, graph: Graph, group: Group) -> None:
    """Replaces the group's root by a ``fused`` node whose body holds the group. Scalars go into the body, arrays are operands."""
    chosen = set(group.nodes)
    members = [node for node in graph.nodes if node in chosen]
    body = GraphBuilder("body")
    mapping: dict[Value, Value] = {}
    operands: list[Value] = []

    def operand(value: Value) -> Value:
        if value not in mapping:
            producer = graph.producer.get(value)
            if producer is not None and producer.is_constant and not isinstance(producer.attrs["value"], ConstantRef):
                mapping[value] = body.copy_node(producer)[0]
            else:
                mapping[value] = body.input(value.hint or f"x{len(operands)}", value.type)
                operands.append(value)
        return mapping[value]

    for node in members:
        results = body.copy_node(node, [operand(v) for v in node.inputs])
        mapping.update(zip(node.outputs, results, strict=True))
    root = group.root.output
    with b.at(Location.merged((n.loc for n in members), "fuse")):
        fused = b("fused", *operands, hint=root.hint, body=body.finish([mapping[root]]))
    b.replace(root, fused)


def _remarks(group: Group, names: dict[Value, str]) -> list[Remark]:
    found: list[Remark] = []
    if len(group.nodes) > 1:
        chain = " + ".join(node.name for node in reversed(group.nodes))
        loc = Location.merged((n.loc for n in reversed(group.nodes)), "fuse")
        found.append(Remark("applied", f"one kernel: {chain}", loc, "fuse"))
    for node, reason in group.refused:
        text = print_node(node, names).splitlines()[0]
        message = f"not fused into {group.root.name}: {reason}, at {text}"
        found.append(Remark("missed", message, node.loc, "fuse"))
    return found
