"""Which nodes go into one kernel.

A group has a root (whose result leaves the group), elementwise nodes on the root's shape, and at most one anchor: the
contraction, reduction or normalisation whose result they transform in registers (its epilogue). A producer joins when all
its users are in the group, so nothing is computed twice and no value leaves the group in the middle; going from the results
backwards, users come before producers. A reduction also takes the elementwise nodes on its operand's shape (its prologue), whether
it is the root or has an epilogue: what it reduces is never in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mlec.ir import Graph, Node, Trait, Value
from mlec.ir.types import Shape

ANCHORS = Trait.CONTRACTION | Trait.REDUCTION | Trait.NORMALISATION
SECOND_ANCHOR = "the kernel has its product or reduction already"
PROLOGUE_ROOTS = frozenset({"sum", "mean", "max", "min"})


@dataclass
class Group:
    """Nodes that become one kernel, in reverse order of execution; ``refused`` says which producers stayed out and why."""

    root: Node
    shape: Shape
    nodes: list[Node] = field(default_factory=list)
    anchor: Node | None = None
    refused: list[tuple[Node, str]] = field(default_factory=list)


def find_groups(graph: Graph, max_nodes: int, elsewhere: frozenset[Node] = frozenset()) -> list[Group]:
    """Every group that could be formed without ``elsewhere``, also those of one node; each node is in one group at most."""
    taken = set(elsewhere)
    groups: list[Group] = []
    for root in reversed(graph.nodes):
        if root in taken or root.is_constant or len(root.outputs) != 1:
            continue
        if not (root.op.has(Trait.ELEMENTWISE) or root.name in PROLOGUE_ROOTS):
            continue
        group = Group(root, root.output.type.shape, [root], None if root.op.has(Trait.ELEMENTWISE) else root)
        if group.anchor is None:
            _grow(group, root, graph, taken, max_nodes)
        if group.anchor is not None and group.anchor.name in PROLOGUE_ROOTS:
            _take_prologue(group, group.anchor, graph, taken, max_nodes)
        groups.append(group)
        taken.update(group.nodes)
    return groups


def _take_prologue(group: Group, reduction: Node, graph: Graph, taken: set[Node], max_nodes: int) -> None:
    """Adds what is computed for each element that the reduction reads."""
    found = Group(group.root, reduction.inputs[0].type.shape, list(group.nodes), reduction)
    _grow(found, reduction, graph, taken, max_nodes)
    group.refused += found.refused
    # What comes after another product or reduction is better off as its epilogue.
    if not any(reason is SECOND_ANCHOR for _, reason in found.refused):
        group.nodes = found.nodes


def _grow(group: Group, start: Node, graph: Graph, taken: set[Node], max_nodes: int) -> None:
    """Adds producers, from the operands of ``start`` on."""
    members = set(group.nodes)
    outputs = set(graph.outputs)
    order = {node: i for i, node in enumerate(graph.nodes)}
    frontier = {p for v in start.inputs if (p := graph.producer.get(v)) is not None}
    while frontier:
        node = max(frontier, key=order.__getitem__)  # users first
        frontier.remove(node)
        reason = _refusal(node, group, graph, taken, outputs, members, max_nodes)
        if reason is not None:
            if reason:
                group.refused.append((node, reason))
            continue
        members.add(node)
        group.nodes.append(node)
        if node.op.has(Trait.ELEMENTWISE):
            frontier |= {p for v in node.inputs if (p := graph.producer.get(v)) is not None and p not in members}
        else:
            group.anchor = node


def _refusal(
    node: Node, group: Group, graph: Graph, taken: set[Node], outputs: set[Value], members: set[Node], max_nodes: int
) -> str | None:
    """Why a producer stays out of the group: None if it joins, empty if that is nothing worth telling."""
    anchor = node.op.has(ANCHORS) and not node.op.has(Trait.ELEMENTWISE)
    if node.is_constant or node in taken or len(node.outputs) != 1 or not (anchor or node.op.has(Trait.ELEMENTWISE)):
        return ""
    value = node.output
    if value.type.shape != group.shape:
        return (
            ""
            if not node.op.has(Trait.ELEMENTWISE)
            else "it has another shape, and would be computed again for each element"
        )
    if value in outputs:
        return "its result is an output of the graph"
    users = graph.users.get(value, ())
    if not all(user in members for user in users):
        return f"its result has {len(users)} users, not all of them in the group"
    if anchor and group.anchor is not None:
        return SECOND_ANCHOR
    if len(group.nodes) >= max_nodes:
        return f"the kernel has {max_nodes} nodes already"
    return None
