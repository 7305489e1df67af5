"""Which nodes become row programs: a whole chain of preprocessing, small model, probabilities and labels.

In such a program every row of every value depends on the same row of the operands only, and rows are narrow. Several results
may leave it and values may be used more than once, because they are computed block by block of rows into cache. It is formed where
the other groups would need more than one kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mlec.ir import Graph, Node, Trait, Value
from mlec.ir.dim import Dim, SymDim, symbols_of
from mlec.ir.types import TensorType

MAX_COLUMNS = 128
"""Of any value: a block of so many columns fits the L1 cache."""
MAX_PRODUCT = 16
"""Columns of a product; wider ones are better off with the tiles of a matrix product."""
MIXES = frozenset({"matmul", "matmul_packed", "gather", "concat", "slice"})
OVER_COLUMNS = frozenset({"sum", "mean", "max", "min", "argmax", "argmin", "softmax", "log_softmax", "logsumexp"})
BY_ELEMENT = frozenset({"sin", "cos", "tan", "atan", "atan2", "pow", "floordiv", "mod"})
"""Elementwise ops that have no vector form."""


def find_row_groups(graph: Graph, taken: Sequence[Iterable[Node]], max_nodes: int) -> list[list[Node]]:
    """Groups of at least two nodes, each in the order of the graph.

    Args:
        taken: the groups that would be formed otherwise.
    """
    kernel = {node: i for i, group in enumerate(taken) for node in group}
    parts = [part for part in _components(graph) if len(part) <= max_nodes and _pays(part)]
    return [part for part in parts if len({kernel.get(node, id(node)) for node in part if node.name != "reshape"}) > 1]


def _pays(part: Sequence[Node]) -> bool:
    """Whether there is more to it than loops over elements: it mixes columns, or has only one."""
    mixes = any(node.name in MIXES or node.name in OVER_COLUMNS for node in part)
    return mixes or all(node.output.type.shape[1:] in ((), (1,)) for node in part)


def _components(graph: Graph) -> list[list[Node]]:
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
        n = _rows_of(node, graph)
        if (node.op.has(Trait.CONTRACTION) and n is None) or _continues(node, epilogues, graph):
            epilogues.add(node)
            n = None
        level[node] = 0
        for value in node.inputs:
            producer = graph.producer.get(value)
            if producer is None or producer.is_constant:
                continue
            leaves = producer in rows and (n is None or rows[producer] != n)
            level[node] = max(level[node], level[producer] + leaves)
        if n is None:
            continue
        rows[node], leader[node] = n, node
        for value in node.inputs:
            producer = graph.producer.get(value)
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


def _rows_of(node: Node, graph: Graph) -> Dim | None:
    """The extent over whose rows the node works one by one; None if it does not, or rows are wide."""
    if len(node.outputs) != 1 or node.output.type.rank not in (1, 2):
        return None
    n = node.output.type.shape[0]
    if not isinstance(n, SymDim) or str(n) not in symbols_of(n):
        return None
    if not _narrow(node.output.type, n) or any(v.type.symbols and not _narrow(v.type, n) for v in node.inputs):
        return None
    rows = [v for v in node.inputs if v.type.symbols]
    fixed = [v for v in node.inputs if not v.type.symbols]
    rank = node.output.type.rank
    if node.op.has(Trait.ELEMENTWISE):
        aligned = all(v.type.rank == rank for v in rows) and all(v.type.rank <= rank for v in fixed)
        fits = aligned and node.name not in BY_ELEMENT
    elif node.name in OVER_COLUMNS:
        axes = node.attrs["axes"] if "axes" in node.attrs else (node.attrs["axis"],)
        x = node.inputs[0].type
        fits = x.rank == 2 and x.dtype.is_float and len(axes) == 1 and axes[0] % 2 == 1
    elif node.name in ("matmul", "matmul_packed"):
        small = rank == 2 and int(str(node.output.type.shape[1])) <= MAX_PRODUCT
        fits = small and rows == [node.inputs[0]] and _is_array(node.inputs[1], graph)
    elif node.name == "gather":
        fits = _by_columns(node) and rows == [node.inputs[0]] and node.inputs[1].type.rank == 1
    elif node.name in ("concat", "slice"):
        fits = _by_columns(node) and not fixed
    else:
        fits = node.name == "broadcast_to" or (node.name == "reshape" and node.output.type.shape[1:] in ((), (1,)))
    return n if fits else None


def _narrow(kind: TensorType, n: Dim) -> bool:
    """Whether it is ``n`` rows of few columns, of a type that lanes hold."""
    if kind.rank not in (1, 2) or kind.shape[0] != n or (kind.dtype.is_float and kind.dtype.bits < 32):
        return False
    return all(isinstance(d, int) and d <= MAX_COLUMNS for d in kind.shape[1:])


def _by_columns(node: Node) -> bool:
    return node.output.type.rank == 2 and node.attrs["axis"] % 2 == 1


def _is_array(value: Value, graph: Graph) -> bool:
    producer = graph.producer.get(value)
    return producer is not None and producer.is_constant and value.type.rank >= 2
