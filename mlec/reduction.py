"""Makes a graph that shows a defect small, so that a person can read it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet

from mlec.ir import Graph, Value, extract, verify
from mlec.ir.dim import symbols_of


def reduce_graph(graph: Graph, fails: Callable[[Graph], bool], seconds: float = 10.0) -> Graph:
    """The smallest graph found that still fails.

    Parts are left away, largest first: outputs, what comes after a value, what comes before one (which then is an input), and the
    arrays that constants hold (which then are inputs, so that the text of the graph is all of it).

    Args:
        graph: one that fails.
        fails: says it of others; an error that it raises means no.
        seconds: after which no other graph is tried.

    Returns:
        The given graph itself, or a part of it.
    """
    end = time.monotonic() + seconds
    smaller: Graph | None = graph
    while smaller is not None:
        graph = smaller
        smaller = next((part for part in _parts(graph, end) if _still(fails, part)), None)
    return graph


def _still(fails: Callable[[Graph], bool], part: Graph) -> bool:
    try:
        verify(part)
        return fails(part)
    except Exception:  # whatever a graph that nobody wrote makes of a defective pass
        return False


def _parts(graph: Graph, end: float) -> Iterator[Graph]:
    """Graphs that are smaller than this one."""
    for part in _candidates(graph):
        if time.monotonic() > end:
            return
        if _size(part) < _size(graph):
            yield part


def _candidates(graph: Graph) -> Iterator[Graph]:
    nodes = graph.compute_nodes
    if len(graph.outputs) > 1:
        for output in graph.outputs:
            yield _part(graph, [output])
    for node in nodes[:-1]:
        yield _part(graph, node.outputs)
    for count in _halves(len(nodes)):
        early = {value for node in nodes[:count] for value in node.outputs}
        yield _part(graph, graph.outputs, early)
    for node in nodes:
        yield _part(graph, graph.outputs, set(node.outputs))
    arrays = [node for node in graph.nodes if node.is_constant and node.output.type.rank]
    yield _part(graph, graph.outputs, {node.output for node in arrays})
    for node in arrays:
        yield _part(graph, graph.outputs, {node.output})


def _halves(count: int) -> Iterator[int]:
    """Nearly all of so many, then less and less."""
    step = count // 2
    while step:
        yield count - step
        step //= 2


def _size(graph: Graph) -> tuple[int, int, int]:
    return len(graph.compute_nodes), len(graph.constants), len(graph.outputs)


def _part(graph: Graph, outputs: Sequence[Value], given: AbstractSet[Value] = frozenset()) -> Graph:
    """What computes the outputs, from these values instead of their operands; with the inputs that are read or tell a symbol."""
    cut = [value for node in graph.nodes for value in node.outputs if value in given]
    inputs = [*graph.inputs, *cut]
    whole = extract(graph, inputs, outputs, "reduced")
    read = [value for value, own in zip(inputs, whole.inputs, strict=True) if whole.use_count(own)]
    part = extract(graph, read, outputs, "reduced")
    told = {name for value in part.inputs for extent in value.type.shape for name in symbols_of(extent)}
    if told.issuperset(part.symbols):
        return part
    return extract(graph, [*graph.inputs, *(value for value in cut if value in read)], outputs, "reduced")
