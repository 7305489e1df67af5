"""Which nodes become row programs: a whole chain of preprocessing, small model, probabilities and labels.

In such a program every row of every value depends on the same row of the operands only, and rows are narrow. Several results
may leave it and values may be used more than once, because they are computed block by block of rows into cache. It is formed where
the other groups would need more than one kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlec.ir import Graph, Node, Trait
from mlec.ir.dim import Dim
from mlec.ops.rows import MOVES, OVER_COLUMNS, PRODUCTS, row_operands, rows_of

SHORT = 4
"""Products of a short program: each is code of its own, and wide ones are much of that."""

MIXES = PRODUCTS | OVER_COLUMNS | (MOVES - {"reshape", "broadcast_to"})


def find_row_groups(graph: Graph, taken: Sequence[Sequence[Node]]) -> list[list[Node]]:
    """Groups of at least two nodes, each in the order of the graph, of any size.

    Args:
        taken: the groups that would be formed otherwise.
    """
    kernel = {node: group[0] for group in taken for node in group}
    # Of one kind or the other, all of them: those of both might wait for each other.
    parts = _components(graph, short=True)
    if any(sum(node.name in PRODUCTS for node in part) > SHORT for part in parts):
        parts = _components(graph, short=False)
    parts = [part for part in parts if _pays(part)]
    return [part for part in parts if len({kernel.get(node, node) for node in part if node.name != "reshape"}) > 1]


def _pays(part: Sequence[Node]) -> bool:
    """Whether there is more to it than loops over elements: it mixes columns, or has only one."""
    mixes = any(node.name in MIXES for node in part)
    return mixes or all(node.output.type.shape[1:] in ((), (1,)) for node in part)


def _components(graph: Graph, short: bool) -> list[list[Node]]:
    """Neighbouring row-wise nodes between which no path leaves the group.

    What follows a wide product stays out, to become its epilogue. A node's level is the number of times that the longest path to
    it leaves row-wise nodes; so nodes of one level have only such nodes between them.
    """
    level: dict[Node, int] = {}
    leader: dict[Node, Node] = {}
    rows: dict[Node, Dim] = {}

    def find(node: Node) -> Node:
        while leader[node] is not node:
            node = leader[node]
        return node

    epilogues: set[Node] = set()
    for node in graph.nodes:
        if node.is_constant:
            continue
        n = rows_of(node, short)
        if (node.op.has(Trait.CONTRACTION) and n is None) or _continues(node, epilogues, graph):
            epilogues.add(node)
            n = None
        level[node] = 0
        by_row = row_operands(node) if n is not None else frozenset()
        for i, value in enumerate(node.inputs):
            producer = graph.producer.get(value)
            if producer is None or producer.is_constant:
                continue
            leaves = producer in rows and (i not in by_row or rows[producer] != n)
            level[node] = max(level[node], level[producer] + leaves)
        if n is None:
            continue
        rows[node], leader[node] = n, node
        for i in by_row:
            producer = graph.producer.get(node.inputs[i])
            if producer in rows and rows[producer] == n and level[producer] == level[node]:
                leader[find(node)] = find(producer)
    parts: dict[Node, list[Node]] = {}
    for node in rows:
        parts.setdefault(find(node), []).append(node)
    return [part for part in parts.values() if len(part) > 1]


def _continues(node: Node, epilogues: set[Node], graph: Graph) -> bool:
    """Whether it is better off as the next step of the epilogue of a product that is too wide for rows."""
    before = [v for v in node.inputs if graph.producer.get(v) in epilogues]
    return node.op.has(Trait.ELEMENTWISE) and any(
        v.type.shape == node.output.type.shape and graph.use_count(v) == 1 for v in before
    )
