"""Where trees of equal steps may start: what joins the results of many steps, and steps that are equal by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mlec.ir import Graph, Node, Trait, Value
from mlec.passes.vectorize.batching import batching
from mlec.passes.vectorize.plan import Search, Values

REDUCTIONS = {
    "add": "sum", "mul": "prod", "maximum": "max", "minimum": "min", "logical_and": "all", "logical_or": "any",
}  # fmt: skip
"""What an associative op is over an axis."""


@dataclass(frozen=True)
class Root:
    """A place where many values become one.

    Attributes:
        node: the node that gives the result.
        nodes: all nodes that the result replaces.
        parts: what is joined, in order.
        groups: of these, alike ones: indices of ``parts``.
    """

    node: Node
    nodes: tuple[Node, ...]
    parts: Values
    groups: tuple[tuple[int, ...], ...]

    @property
    def reduction(self) -> str:
        """The op over the lane axis; empty where the parts are put one after the other."""
        return "" if self.node.name == "concat" else REDUCTIONS[self.node.name]


def find_roots(graph: Graph, least: int) -> Iterator[Root]:
    """Concatenations, and chains of one associative op, of at least so many alike values; in the order of the graph."""
    for node in graph.nodes:
        if node.name == "concat":
            nodes, parts = [node], list(node.inputs)
        elif node.name in REDUCTIONS and not _continues(graph, node):
            nodes, parts = _chain(graph, node)
        else:
            continue
        alike: dict[object, list[int]] = {}
        for i, value in enumerate(parts):
            alike.setdefault(_kind(graph, value), []).append(i)
        groups = tuple(tuple(found) for found in alike.values() if len(found) >= least)
        if groups:
            yield Root(node, tuple(nodes), tuple(parts), groups)


def _kind(graph: Graph, value: Value) -> object:
    """Equal for values that could be the same step of different lanes. What is seen in another shape is what it was."""
    node = graph.producer.get(value)
    if node is None or node.is_constant:
        return (None, value.type)
    attrs = {k: v for k, v in node.attrs.items() if node.name != "slice" or k not in ("start", "stop")}
    own = (node.name, value.type, repr(attrs))
    return (own, _kind(graph, node.inputs[0])) if node.name == "reshape" else own


def _continues(graph: Graph, node: Node) -> bool:
    """Whether the node is an inner one of a chain."""
    users = graph.users.get(node.output, ())
    return graph.use_count(node.output) == 1 and len(users) == 1 and _same_chain(users[0], node)


def _same_chain(user: Node, node: Node) -> bool:
    return user.name == node.name and user.output.type == node.output.type


def _chain(graph: Graph, node: Node) -> tuple[list[Node], list[Value]]:
    """The nodes of a chain, and its ends from left to right."""
    nodes: list[Node] = []
    parts: list[Value] = []
    waiting = [node.output]
    while waiting:
        value = waiting.pop()
        producer = graph.producer.get(value)
        inner = (
            producer is not None and _same_chain(node, producer) and (producer is node or graph.use_count(value) == 1)
        )
        if producer is not None and inner:
            nodes.append(producer)
            waiting += reversed(producer.inputs)
        else:
            parts.append(value)
    return nodes, parts


def find_equal(graph: Graph, search: Search, least: int) -> list[Values]:
    """At least so many values each, computed by equal steps from slices of the same tensors; the largest expressions first.

    Expressions are compared by a number that each distinct one gets, whatever place the slices are at.
    """
    numbers: dict[object, int] = {}
    number: dict[Value, int] = {}  # only of values that depend on slices
    members: dict[int, list[Value]] = {}
    for node in graph.nodes:
        key = _expression(node, number)
        if key is None:
            continue
        computes = not (node.name == "slice" or node.op.has(Trait.VIEW))
        for i, value in enumerate(node.outputs):
            number[value] = numbers.setdefault((key, i), len(numbers))
            if computes and i == 0:
                members.setdefault(number[value], []).append(value)
    found = [tuple(values) for values in members.values() if len(values) >= least]
    return sorted(found, key=lambda values: -search.height(values[0]))


def _expression(node: Node, number: dict[Value, int]) -> object | None:
    operands = tuple(number.get(v, v) for v in node.inputs)
    if node.name == "slice" and isinstance(node.attrs["start"], int) and isinstance(node.attrs["stop"], int):
        return ("slice", operands, node.attrs["axis"], node.attrs["step"], node.output.type)
    if all(v not in number for v in node.inputs) or batching(node.op) is None:
        return None
    return (node.name, operands, repr(dict(node.attrs)), tuple(v.type for v in node.outputs))
