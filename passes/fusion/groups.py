"""Which nodes go into one kernel.

A group has a root (whose result leaves the group), nodes on the root's shape or on one that broadcasts to it, and at most one anchor: the
contraction, reduction or normalisation whose result they transform in registers (its epilogue). Going from the results backwards, users
come before producers. Reductions and norms of lines also take what computes each element that they read (their prologue), whether they are
the root or have an epilogue: what they read is never in memory. Elementwise groups and prologues take moves of elements as well, where
vectors stay vectors: slices, joins, lookups of rows.

A producer can join when all that reads its result is in groups that compute it; whether it does is a matter of its price (`cost`). What
several groups read, and is cheap, is computed in each.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from mlec.ir import Dim, Graph, Node, Trait, Value
from mlec.ir.dim import product
from mlec.ir.op import attr_symbols
from mlec.ir.types import Shape
from mlec.passes.fusion.cost import Costs
from mlec.pipeline import nominal

ANCHORS = Trait.CONTRACTION | Trait.REDUCTION | Trait.NORMALISATION
SECOND_ANCHOR = "the kernel has its product or reduction already"
REDUCTIONS = frozenset({"sum", "mean", "max", "min"})
NORMS = frozenset({"layer_norm", "rms_norm"})
MOVES = frozenset({"slice", "concat", "gather", "broadcast_to"})
MOST_PLACES = 4
"""A value that a kernel needs at more positions relative to its result is not computed in it: its code grows with each."""


Way = tuple[tuple[Node, int], ...]
"""The moves, with the number of the operand, between the result of a kernel and a value that it needs."""


@dataclass
class Group:
    """Nodes that become one kernel, in reverse order of execution.

    Attributes:
        shape: of what the kernel loops over.
        anchor: see above.
        refused: the producers that stayed out, and why.
        times: how often each element of a member is computed, by the position at which the kernel needs it: for each way through moves.
        saved: bytes that are not stored and loaded.
    """

    root: Node
    shape: Shape
    nodes: list[Node] = field(default_factory=list)
    anchor: Node | None = None
    refused: list[tuple[Node, str]] = field(default_factory=list)
    times: dict[Node, dict[Way, float]] = field(default_factory=dict)
    saved: Dim = 0


@dataclass(frozen=True)
class Grouping:
    """All groups of a graph, also those of one node, and the nodes that several of them compute."""

    groups: list[Group]
    copied: Set[Node] = frozenset()


def find_groups(
    graph: Graph, max_nodes: int, costs: Costs, elsewhere: Set[Node] = frozenset(), moves: bool = True
) -> Grouping:
    """Every group that could be formed without ``elsewhere``. A node is in several only if no other node reads it.

    Args:
        moves: whether they take moves of elements.
    """
    search = _Search(graph, max_nodes, costs, moves)
    grouping = Grouping(search.groups(elsewhere, frozenset()))
    wanted = {node for group in grouping.groups for node, _ in group.refused if search.is_cheap(node)}
    while wanted != grouping.copied:
        grouping = Grouping(search.groups(elsewhere, wanted), wanted)
        homes: dict[Node, list[Group]] = {}
        for group in grouping.groups:
            for node in group.nodes:
                homes.setdefault(node, []).append(group)
        wanted = {n for n in wanted if len(homes.get(n, ())) > 1 and _is_everywhere(n, graph, homes)}
    return grouping


def _is_everywhere(node: Node, graph: Graph, homes: Mapping[Node, list[Group]]) -> bool:
    """Whether all groups that read the result of a node compute it themselves."""
    return all(
        homes.get(user) and all(node in group.times for group in homes[user]) for user in graph.users[node.output]
    )


def find_epilogues(graph: Graph) -> Set[Node]:
    """The elementwise nodes that can be computed where the kernel of a product, reduction or norm stores its result."""
    found: set[Node] = set()
    for node in graph.nodes:
        if node.op.has(Trait.ELEMENTWISE):
            for value in node.inputs:
                producer = graph.producer.get(value)
                if producer is None or value.type.shape != node.output.type.shape or graph.use_count(value) > 1:
                    continue
                if producer in found or (producer.op.has(ANCHORS) and not producer.op.has(Trait.ELEMENTWISE)):
                    found.add(node)
    return found


class _Search:
    """What is known of a graph whatever the groups, and those that are being formed.

    Attributes:
        copied: the nodes to compute in all groups that read them.
        taken: those that are in a group already.
    """

    def __init__(self, graph: Graph, max_nodes: int, costs: Costs, moves: bool) -> None:
        self.graph = graph
        self.max_nodes = max_nodes
        self.costs = costs
        self.moves = moves
        self.outputs = set(graph.outputs)
        self.epilogues = find_epilogues(graph)
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.copied: Set[Node] = frozenset()
        self.taken: set[Node] = set()

    def is_cheap(self, node: Node) -> bool:
        """Whether a node with several users may be computed in each: reading its operands again, which lie in memory, is no more."""
        users = len(self.graph.users.get(node.outputs[0], ()))
        if users < 2 or not node.op.has(Trait.ELEMENTWISE) or node.output in self.outputs or node in self.epilogues:
            return False
        for operand in node.inputs:
            producer = self.graph.producer.get(operand)
            if producer is not None and producer.op.has(Trait.ELEMENTWISE) and self.graph.use_count(operand) == 1:
                return False  # that would be computed with it
        return self.costs.price(node, users, users, (), node.output.type.shape).pays

    def groups(self, elsewhere: Set[Node], copied: Set[Node]) -> list[Group]:
        """All groups, from the last root to the first."""
        self.copied, self.taken = copied, set(elsewhere)
        found: list[Group] = []
        fronted = REDUCTIONS | NORMS if self.moves else REDUCTIONS
        for root in reversed(self.graph.nodes):
            if root in self.taken or root in self.copied or root.is_constant or len(root.outputs) != 1:
                continue
            elementwise = root.op.has(Trait.ELEMENTWISE)
            if not (elementwise or root.name in fronted):
                continue
            group = Group(root, root.output.type.shape, [root], None if elementwise else root, times={root: {(): 1.0}})
            if group.anchor is None:
                self.grow(group, root, moves=False)
            if group.anchor is None and self.moves:
                self.grow(group, *group.nodes, moves=True)
            if group.anchor is not None and group.anchor.name in fronted:
                self.take_prologue(group, group.anchor)
            found.append(group)
            self.taken.update(node for node in group.nodes if node not in self.copied)
        return found

    def take_prologue(self, group: Group, anchor: Node) -> None:
        """Adds what is computed for each element that the anchor reads."""
        found = Group(group.root, anchor.inputs[0].type.shape, list(group.nodes), anchor, times=dict(group.times))
        found.times[anchor] = {(): 1.0}
        first = self.graph.producer.get(anchor.inputs[0])
        if first is None:
            return
        self.grow(found, anchor, moves=self.moves, operands=(anchor.inputs[0],))
        group.refused += found.refused
        # What comes after another product or reduction is better off as its epilogue.
        if not any(reason is SECOND_ANCHOR for _, reason in found.refused):
            group.nodes, group.times, group.saved = found.nodes, found.times, group.saved + found.saved

    def grow(self, group: Group, *starts: Node, moves: bool, operands: tuple[Value, ...] | None = None) -> None:
        """Adds producers, from the operands of ``starts``, or some of them, on."""
        members = set(group.nodes)
        known = {node for node, _ in group.refused}
        given = operands if operands is not None else tuple(v for start in starts for v in start.inputs)
        frontier = {p for v in given if (p := self.graph.producer.get(v)) is not None and p not in members}
        while frontier:
            node = max(frontier, key=self.order.__getitem__)  # users first
            frontier.remove(node)
            reason = self.refusal(node, group, members, moves)
            if reason is not None:
                if reason and node not in known:
                    group.refused.append((node, reason))
                continue
            group.refused = [entry for entry in group.refused if entry[0] is not node]
            members.add(node)
            group.nodes.append(node)
            if node.op.has(Trait.ELEMENTWISE) or node.name in MOVES:
                frontier |= {
                    p for v in node.inputs if (p := self.graph.producer.get(v)) is not None and p not in members
                }
            else:
                group.anchor = node
                group.times[node] = {(): 1.0}
                group.saved = group.saved + 2 * node.output.type.nbytes

    def refusal(self, node: Node, group: Group, members: Set[Node], moves: bool) -> str | None:
        """Why a producer stays out of the group: None if it joins, empty if that is nothing worth telling."""
        elementwise = node.op.has(Trait.ELEMENTWISE)
        anchor = node.op.has(ANCHORS) and not elementwise
        moving = moves and node.name in MOVES and attr_symbols(node.attrs) <= _told(node)
        if node.is_constant or node in self.taken or len(node.outputs) != 1 or not (anchor or elementwise or moving):
            return ""
        value = node.output
        if anchor and value.type.shape != group.shape:
            return ""
        if value in self.outputs:
            return "its result is an output of the graph"
        users = self.graph.users.get(value, ())
        inside = [user for user in users if user in members]
        if len(inside) < len(users) and node not in self.copied:
            return f"its result has {len(users)} users, not all of them in the group"
        if any(user in self.copied and node not in self.copied for user in inside):
            return "what reads its result is computed in several kernels"
        if anchor:
            return SECOND_ANCHOR if group.anchor is not None else self.full(group)
        return self.price(node, group, inside, moving)

    def price(self, node: Node, group: Group, users: list[Node], moving: bool) -> str | None:
        """Whether to compute the elements of a value where they are needed."""
        ways: dict[Way, float] = {}
        hoists = group.anchor is None or group.anchor.name in REDUCTIONS | NORMS
        for user in users:
            for position, operand in enumerate(user.inputs):
                if operand is node.output:
                    for way, times in group.times[user].items():
                        step = ((user, position),) if user.name in MOVES - {"broadcast_to"} else ()
                        ways[way + step] = max(ways.get(way + step, 0.0), times * _per_element(user, position, hoists))
        if any(step[0].name == "gather" and step[1] == 0 for way in ways for step in way[-1:]):
            return "only some of its elements are looked up"
        reason = self.full(group)
        if reason is not None:
            return reason
        if moving and not _keeps_vectors(node, group, ways):
            return "neighbours in the result are none in its operands"
        times, kernels = max(1.0, sum(ways.values())), len(self.graph.users[node.output]) if node in self.copied else 1
        if (times > 1 or node.output.type.shape != group.shape) and node in self.epilogues:
            return "it is part of the kernel that makes its operand"
        price = self.costs.price(node, times * kernels, kernels, group.nodes, group.shape)
        if not price.pays:
            return f"it would cost more than it saves: {price}"
        if len(ways) > MOST_PLACES:
            return f"it would be computed at {len(ways)} places"
        group.times[node] = ways
        group.saved = group.saved + price.saved
        return None

    def full(self, group: Group) -> str | None:
        return f"the kernel has {self.max_nodes} nodes already" if len(group.nodes) >= self.max_nodes else None


def _told(node: Node) -> Set[str]:
    """The symbols that are an extent of an operand by themselves: what moves elements by others needs the graph around it."""
    return {str(d) for v in node.inputs for d in v.type.shape if not isinstance(d, int)}


def _per_element(user: Node, position: int, hoists: bool) -> float:
    """How often an operand's element is computed when each element of the result is computed once.

    Args:
        hoists: what is the same along the last axes is computed before the loop over these; tiles do so for each vector.
    """
    operand, result = user.inputs[position].type.shape, user.output.type.shape
    read = result
    if hoists and (user.op.has(Trait.ELEMENTWISE) or user.name == "broadcast_to"):
        last = max((i for i, d in enumerate(operand) if d != 1), default=-1)
        read = result[: len(result) - len(operand) + last + 1]
    elif user.name == "concat":
        read = operand
    elif user.name == "gather" and position == 1:
        axis = user.attrs["axis"] % user.inputs[0].type.rank
        read = result[: axis + len(operand)]
    return nominal(product(read)) / max(1, nominal(product(operand)))


def _keeps_vectors(node: Node, group: Group, ways: Mapping[Way, float]) -> bool:
    """Whether consecutive elements of what the kernel computes are consecutive elements of the node's operands."""
    last = node.output.type.rank - 1
    if last < 0 or any(step[0].name == "gather" and step[1] == 1 for way in ways for step in way):
        return False
    if node.name == "broadcast_to":
        return True
    axis: int = node.attrs["axis"] % node.inputs[0].type.rank
    if node.name == "gather":
        return axis < node.inputs[0].type.rank - 1
    if axis != last:
        return node.name == "slice" or group.anchor is None
    if node.name == "slice":
        return bool(node.attrs["step"] == 1)
    # The loop over the last axis is cut at the joins: they must lie where the result has them.
    joins = [v.type.shape[-1] for v in node.inputs]
    plain = node.output.type.shape[-1] == group.shape[-1] and not any(ways)
    return group.anchor is None and plain and all(isinstance(d, int) for d in joins)
