"""Recurrent cells: the formulas of one step of an LSTM, a gated recurrent unit or a plain recurrence, in the spellings that sources have.

A cell is told by what it does with its gates; the gates are sums of products of an input and of the state before (`affine`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mlec.ir import AnyOf, Const, Graph, Match, Node, P, Value
from mlec.ir.pattern import match
from mlec.passes.vectorize.affine import Affine, Source, affine

ACTIVATIONS = frozenset({"tanh", "relu", "sigmoid"})


def _gate(op: str, name: str) -> AnyOf:
    """An activation of a gate, or the columns of one gate of an activation of several."""
    return AnyOf(P(op, name), P("slice", P(op, name), bind=f"cut {name}"))


_C = P("add", P("mul", _gate("sigmoid", "f"), "c"), P("mul", _gate("sigmoid", "i"), _gate("tanh", "g")), bind="c")
LSTM = P("mul", _gate("sigmoid", "o"), P("tanh", _C))

_NEW, _Z = P("tanh", "new"), _gate("sigmoid", "z")
_REST = P("sub", Const(1), _Z)
GRU = AnyOf(
    P("add", P("mul", _REST, _NEW), P("mul", _Z, "h")),
    P("add", P("mul", _Z, P("sub", "h", _NEW)), _NEW),
    P("sub", _NEW, P("mul", _Z, P("sub", _NEW, "h"))),
)
"""``(1 - z) * new + z * h``"""
TURNED_GRU = P("add", P("mul", _REST, "h"), P("mul", _Z, _NEW))
"""``z * new + (1 - z) * h``: the other way round, which is the first with the negative of what the sigmoid is of."""
MOVED_GRU = AnyOf(
    P("add", P("mul", _Z, P("sub", _NEW, "h")), "h"),
    P("sub", "h", P("mul", _Z, P("sub", "h", _NEW))),
)
"""``h + z * (new - h)``: the same, but of an infinite ``h`` it is no number."""
RESET = P("mul", _gate("sigmoid", "r"), "hidden")

READS = {
    "lstm": ((True, True),) * 4,
    "gru": ((True, True), (True, True), (True, False), (False, True)),
    "rnn": ((True, True),),
}
"""Of each gate, in the order of the op's weights, whether it reads the input and the state. The last of a gru has two parts."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One step of a recurrence.

    Attributes:
        op: that loops over such steps.
        activation: of a plain recurrence; else empty.
        turned: whether the update gate of a gru is one minus that of the op.
        states: h, and c of an lstm.
        before: what they were in the step before, as far as the formula tells, before any broadcast; else None.
        gates: sums, in the order of ``READS``.
        finite: whether it is what the op computes only where the state before is finite; it is then again.
        nodes: those that give the states, and those that nothing else reads.
    """

    op: str
    activation: str
    turned: bool
    states: tuple[Value, ...]
    before: tuple[Value | None, ...]
    gates: tuple[Affine, ...]
    finite: bool
    nodes: frozenset[Node]

    @property
    def sources(self) -> tuple[Source, ...]:
        """What the gates read, in the order of the formula."""
        return tuple(dict.fromkeys(t.source for gate in self.gates for t in gate.terms if t.source is not None))

    def turn(self, graph: Graph, h: Value) -> Turn | None:
        """The cell as a step after that which gave ``h``; None if the gates don't read this as they should."""
        state = Source(h)
        inputs = tuple(s for s in self.sources if s != state)
        reads = READS[self.op]
        for gate, (input_too, state_too) in zip(self.gates, reads, strict=True):
            wanted = {*(inputs if input_too else ()), *((state,) if state_too else ())}
            if {t.source for t in gate.terms if t.source is not None} != wanted:
                return None
            if any(t.source == state and not self.nodes.issuperset(t.nodes) for t in gate.terms):
                return None  # something else reads what is computed of the state
        kind = self.states[0].type
        if self.before[0] not in (None, _unbroadcast(graph, h)):
            return None
        if not inputs or h.type != kind or any(s.rows != kind.shape[0] for s in inputs):
            return None
        role: dict[Source | None, int] = {None: -2, state: -1, **{s: i for i, s in enumerate(inputs)}}
        weights = tuple(
            tuple((role[t.source], t.weights, t.rows, t.columns) for t in gate.terms) for gate in self.gates
        )
        return Turn(self, h, inputs, (self.op, self.activation, self.turned, weights))


@dataclass(frozen=True, eq=False)
class Turn:
    """A cell that reads a state.

    Attributes:
        cell: what it does.
        h: the state, of an lstm the first of the two.
        inputs: what it reads besides.
        key: equal for steps that differ in these only.
    """

    cell: Cell
    h: Value
    inputs: tuple[Source, ...]
    key: object

    def follows(self, before: Cell) -> bool:
        """Whether its states are those that a cell gives."""
        given = zip(self.cell.before, before.states, strict=False)
        same = before.op == self.cell.op and all(own is None or own is theirs for own, theirs in given)
        return same and self.h is before.states[0]


def cells_at(graph: Graph, node: Node) -> Iterator[Cell]:
    """The cells whose state a node could give."""
    if len(node.outputs) != 1 or node.output.type.rank != 2 or not node.output.type.dtype.is_float:
        return
    if not isinstance(node.output.type.shape[1], int):
        return
    if node.name in ACTIVATIONS:
        yield from _cell(graph, node, "rnn", [affine(graph, node.inputs[0])], [], activation=node.name)
    elif node.name == "mul" and (m := match(LSTM, node, graph)) is not None:
        gates = [_gate_of(graph, m, name) for name in "ifgo"]
        yield from _cell(graph, node, "lstm", gates, m.matched, (None, m["c"]), c=m.nodes["c"])
    elif node.name in ("add", "sub"):
        for pattern, turned, finite in ((GRU, False, False), (TURNED_GRU, True, False), (MOVED_GRU, True, True)):
            m = match(pattern, node, graph)
            if m is not None and (found := _candidate(graph, m["new"])) is not None:
                r, new = found
                gates = [
                    _gate_of(graph, r, "r"),
                    _gate_of(graph, m, "z"),
                    affine(graph, *new),
                    affine(graph, r["hidden"]),
                ]
                adds = _sum(graph, m["new"])[0]
                matched = (*m.matched, *r.matched, *adds)
                yield from _cell(graph, node, "gru", gates, matched, (m["h"],), turned=turned, finite=finite)


def _cell(
    graph: Graph,
    node: Node,
    op: str,
    gates: Iterable[Affine | None],
    matched: Iterable[Node],
    before: tuple[Value | None, ...] = (None,),
    c: Node | None = None,
    activation: str = "",
    turned: bool = False,
    finite: bool = False,
) -> Iterator[Cell]:
    """The cell, if all gates are sums of products and what is in between is read by nothing else."""
    sums = tuple(gate for gate in gates if gate is not None)
    if len(sums) < len(READS[op]) or any(gate.width != node.output.type.shape[1] for gate in sums):
        return
    states = (node,) if c is None else (node, c)
    own = {n for n in matched if n not in states}
    found = own.union(*(gate.nodes for gate in sums))
    outputs = set(graph.outputs)
    while outside := {
        n
        for n in found
        if n.output in outputs or any(u not in found and u not in states for u in graph.users[n.output])
    }:
        found -= outside
    if own <= found:
        results = tuple(n.output for n in states)
        stems = tuple(None if v is None else _unbroadcast(graph, v) for v in before)
        yield Cell(op, activation, turned, results, stems, sums, finite, frozenset({*states, *found}))


def _unbroadcast(graph: Graph, value: Value) -> Value:
    """What a value repeats: of the zeros that a state starts from, one."""
    node = graph.producer.get(value)
    return node.inputs[0] if node is not None and node.name == "broadcast_to" else value


def _gate_of(graph: Graph, m: Match, name: str) -> Affine | None:
    """What the activation of a gate is of."""
    cut = m.nodes.get(f"cut {name}")
    if cut is None:
        return affine(graph, m[name])
    start, stop = cut.attrs["start"], cut.attrs["stop"]
    plain = cut.attrs["axis"] % 2 == 1 and cut.attrs["step"] == 1 and isinstance(start, int) and isinstance(stop, int)
    return affine(graph, m[name], columns=(start, stop)) if plain else None


def _candidate(graph: Graph, value: Value) -> tuple[Match, list[Value]] | None:
    """Of the sum that is the new state before its activation, the part behind the reset gate, and the rest."""
    _, summands = _sum(graph, value)
    resets: dict[Value, Match] = {}
    for v in summands:
        producer = graph.producer.get(v)
        m = match(RESET, producer, graph) if producer is not None else None
        if m is not None:
            resets[v] = m
    if len(resets) != 1:
        return None
    ((reset, m),) = resets.items()
    return m, [v for v in summands if v is not reset]


def _sum(graph: Graph, value: Value) -> tuple[list[Node], list[Value]]:
    """The additions that give a value, and what they add."""
    nodes: list[Node] = []
    summands: list[Value] = []
    waiting = [value]
    while waiting:
        v = waiting.pop()
        node = graph.producer.get(v)
        if node is not None and node.name == "add" and v.type == value.type:
            nodes.append(node)
            waiting += reversed(node.inputs)
        else:
            summands.append(v)
    return nodes, summands
