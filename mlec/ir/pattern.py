"""Patterns over graphs, as data: what a rewrite rule looks for.

P("add", P("matmul", "x", "w"), "b")          any add of a matmul and something, either way round
P("mul", "x", Const(1))                        multiplication by a constant that is 1 everywhere
P("reshape", P("reshape", "x", bind="inner"))  binds the inner node under the name "inner"
P(Trait.INVOLUTION, "x")                       any op with that trait
P("div", "x", AnyOf(P("sqrt", "v"), "v"))      whichever of these fits first
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import permutations

import numpy as np

from mlec.ir.graph import Graph, Node, Value
from mlec.ir.op import Array, Trait


@dataclass(frozen=True)
class Const:
    """A constant operand; with ``value``, one whose elements all equal it. ``bind`` names it in the match."""

    value: float | int | bool | None = None
    bind: str = ""


@dataclass(frozen=True, init=False)
class AnyOf:
    """Several spellings: each is tried in turn, also where a later part of the pattern does not fit the first one that fits here."""

    choices: tuple[P | Const | AnyOf | str, ...]

    def __init__(self, *choices: P | Const | AnyOf | str) -> None:
        object.__setattr__(self, "choices", choices)


@dataclass(frozen=True, init=False)
class P:
    """A node of one of the ops named (separated by ``|``) or with a trait, with operands that match in turn.

    A string as operand matches any value and binds it; the same string twice must match the same value. Without operand
    patterns, any operands match. Commutative ops are tried both ways round.
    """

    ops: frozenset[str] | Trait
    operands: tuple[P | Const | AnyOf | str, ...]
    bind: str = ""

    def __init__(self, ops: str | Trait, *operands: P | Const | AnyOf | str, bind: str = "") -> None:
        object.__setattr__(self, "ops", frozenset(ops.split("|")) if isinstance(ops, str) else ops)
        object.__setattr__(self, "operands", operands)
        object.__setattr__(self, "bind", bind)


@dataclass
class Match:
    """What a pattern matched: values and nodes by the names in the pattern, and every node that takes part."""

    node: Node
    values: dict[str, Value] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    constants: dict[str, Array] = field(default_factory=dict)
    matched: tuple[Node, ...] = ()

    def __getitem__(self, name: str) -> Value:
        return self.values[name]


def match(pattern: P | AnyOf, node: Node, graph: Graph) -> Match | None:
    """The first way in which the pattern fits at ``node``, or None."""
    choices = pattern.choices if isinstance(pattern, AnyOf) else (pattern,)
    found = (m for choice in choices if isinstance(choice, P) for m in _node(choice, node, graph, Match(node)))
    return next(found, None)


def _node(pattern: P, node: Node, graph: Graph, found: Match) -> Iterator[Match]:
    if not (node.op.has(pattern.ops) if isinstance(pattern.ops, Trait) else node.name in pattern.ops):
        return
    nodes = {**found.nodes, pattern.bind: node} if pattern.bind else found.nodes
    start = Match(found.node, found.values, nodes, found.constants, (*found.matched, node))
    if not pattern.operands:
        yield start
        return
    if len(pattern.operands) != len(node.inputs):
        return
    orders = [node.inputs]
    if node.op.has(Trait.COMMUTATIVE) and len(node.inputs) == 2:
        orders = [tuple(p) for p in permutations(node.inputs)]
    for order in orders:
        yield from _operands(pattern.operands, order, graph, start)


def _operands(
    patterns: tuple[P | Const | AnyOf | str, ...], values: tuple[Value, ...], graph: Graph, found: Match
) -> Iterator[Match]:
    if not patterns:
        yield found
        return
    for step in _operand(patterns[0], values[0], graph, found):
        yield from _operands(patterns[1:], values[1:], graph, step)


def _operand(pattern: P | Const | AnyOf | str, value: Value, graph: Graph, found: Match) -> Iterator[Match]:
    if isinstance(pattern, AnyOf):
        for choice in pattern.choices:
            yield from _operand(choice, value, graph, found)
    elif isinstance(pattern, str):
        if found.values.get(pattern, value) is value:
            yield Match(found.node, {**found.values, pattern: value}, found.nodes, found.constants, found.matched)
    elif isinstance(pattern, Const):
        array = graph.constant_value(value)
        if array is None or (pattern.value is not None and not (array.size and bool(np.all(array == pattern.value)))):
            return
        if not pattern.bind:
            yield found
            return
        values, constants = {**found.values, pattern.bind: value}, {**found.constants, pattern.bind: array}
        yield Match(found.node, values, found.nodes, constants, found.matched)
    else:
        producer = graph.producer.get(value)
        if producer is not None and len(producer.outputs) == 1:
            yield from _node(pattern, producer, graph, found)
