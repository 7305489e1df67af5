"""fuse: put each group of nodes into one ``fused`` node."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import ClassVar

from mlec.ir import Dim, Graph, GraphBuilder, Location, Node, Value
from mlec.ir.printer import print_node, value_names
from mlec.passes.fusion.cost import Costs, is_number
from mlec.passes.fusion.groups import Group, find_groups
from mlec.passes.fusion.rows import find_row_groups
from mlec.pipeline import Pass, PassContext, PassResult, Remark


@dataclass(frozen=True)
class FuseOperators(Pass):
    """Elementwise chains become one loop, with the slices, joins and lookups that they read; bias, activation and residual become the
    epilogue of the product before them; a sum of embeddings is computed by the norm that reads it; preprocessing with a small model and
    its results becomes one pass over the rows where the target has such kernels.

    Options:
        max_nodes: size limit of one kernel.
    """

    max_nodes: int = 40
    name: ClassVar[str] = "fuse"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        costs = Costs(graph, context.target)
        wanted: list[list[Node]] = []
        if context.target.row_programs:
            wanted = find_row_groups(
                graph, [group.nodes for group in find_groups(graph, self.max_nodes, costs, moves=False).groups]
            )
        programs = [part for part in wanted if len(part) <= self.max_nodes]
        elsewhere = frozenset(node for part in programs for node in part)
        grouping = find_groups(graph, self.max_nodes, costs, elsewhere)
        found = grouping.groups
        names = value_names(graph)
        remarks = [_applied(part, "one pass over the rows", _saved(part, graph)) for part in programs]
        remarks += [_too_long(part, self.max_nodes) for part in wanted if part not in programs]
        remarks += [remark for group in found for remark in _remarks(group, names)]
        groups = [group.nodes for group in found if len(group.nodes) > 1] + programs
        if not groups:
            return PassResult(graph, tuple(remarks))
        b = GraphBuilder(graph.name)
        b.adopt_interface(graph)
        for members in contracted_order(graph, groups):
            if len(members) > 1:
                _emit(b, graph, members, grouping.copied)
            else:
                b.keep(members[0])
        return PassResult(b.finish(graph.outputs, signature=graph.given_signature), tuple(remarks))


def contracted_order(graph: Graph, groups: Sequence[Sequence[Node]]) -> Iterator[list[Node]]:
    """The nodes in an order in which each group is in one place, after all that it reads: that of the graph, by last members.

    A node in several groups is read in these only, and never the last member.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    ordered = [sorted(group, key=order.__getitem__) for group in groups]
    inside = {node for unit in ordered for node in unit}
    units = {order[unit[-1]]: unit for unit in (*ordered, *([node] for node in graph.nodes if node not in inside))}
    places: dict[Node, set[int]] = {}
    for key, unit in units.items():
        for node in unit:
            places.setdefault(node, set()).add(key)
    waits = {
        key: {
            place
            for node in unit
            for v in node.inputs
            if (p := graph.producer.get(v)) is not None and key not in places[p]
            for place in places[p]
        }
        for key, unit in units.items()
    }
    readers: dict[int, list[int]] = {key: [] for key in units}
    for key, before in waits.items():
        for other in before:
            readers[other].append(key)
    ready = [key for key, before in waits.items() if not before]
    heapq.heapify(ready)
    while ready:
        key = heapq.heappop(ready)
        yield units[key]
        for reader in readers[key]:
            waits[reader].discard(key)
            if not waits[reader]:
                heapq.heappush(ready, reader)


def _emit(b: GraphBuilder, graph: Graph, members: Sequence[Node], copied: Set[Node]) -> None:
    """Replaces the nodes by a ``fused`` node whose body holds them, ``copied`` ones as others do. Scalars go into the body, arrays are
    operands.
    """
    inside = set(members)
    results = [
        v
        for node in members
        if node not in copied
        for v in node.outputs
        if v in graph.outputs or any(user not in inside for user in graph.users.get(v, ()))
    ]
    body = GraphBuilder("body")
    mapping: dict[Value, Value] = {}
    operands: list[Value] = []

    def operand(value: Value) -> Value:
        if value not in mapping:
            if is_number(graph, value):
                mapping[value] = body.copy_node(graph.producer[value])[0]
            else:
                mapping[value] = body.input(value.hint or f"x{len(operands)}", value.type)
                operands.append(value)
        return mapping[value]

    for node in members:
        copies = body.copy_node(node, [operand(v) for v in node.inputs])
        mapping.update(zip(node.outputs, copies, strict=True))
    with b.at(Location.merged((n.loc for n in members), "fuse")):
        hints = [v.hint for v in results]
        fused = b.multi("fused", *operands, hints=hints, body=body.finish([mapping[v] for v in results]))
    for result, value in zip(results, fused, strict=True):
        b.replace(result, value)


def _saved(members: Sequence[Node], graph: Graph) -> Dim:
    """Bytes of what no other node reads, stored and loaded."""
    inside = set(members)
    total: Dim = 0
    for value in (v for node in members for v in node.outputs):
        if value not in graph.outputs and all(user in inside for user in graph.users.get(value, ())):
            total = total + 2 * value.type.nbytes
    return total


def _applied(members: Sequence[Node], what: str, saved: Dim) -> Remark:
    chain = " + ".join(node.name for node in members)
    message = f"{what}: {chain}" + (f", {saved} bytes less to move" if saved != 0 else "")
    return Remark("applied", message, Location.merged((n.loc for n in members), "fuse"), "fuse")


def _too_long(members: Sequence[Node], max_nodes: int) -> Remark:
    chain = f"the {len(members)} nodes from {members[0].name} to {members[-1].name}"
    message = f"not one pass over the rows: {chain} are more than max_nodes = {max_nodes}"
    return Remark("missed", message, Location.merged((n.loc for n in members), "fuse"), "fuse")


def _remarks(group: Group, names: dict[Value, str]) -> list[Remark]:
    found: list[Remark] = []
    if len(group.nodes) > 1:
        found.append(_applied(group.nodes[::-1], "one kernel", group.saved))
    for node, reason in group.refused:
        text = print_node(node, names).splitlines()[0]
        size = node.output.type.nbytes
        message = f"not fused into {group.root.name}: {reason}; its {size} bytes are stored and loaded, at {text}"
        found.append(Remark("missed", message, node.loc, "fuse"))
    return found
