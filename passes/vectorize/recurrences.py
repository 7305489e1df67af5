"""Recurrences that have an op: the steps of an unrolled plain recurrent cell become one ``rnn``.

A step is ``h = f(x[:, t] w + h u + biases)`` with f tanh or relu and the same weights in each; only its state keeps it from being
batched. The op keeps the loop, without a node for each turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mlec.ir import Graph, GraphBuilder, Location, Node, Value
from mlec.ir.dim import static
from mlec.ir.op import Array
from mlec.pipeline import Remark

RULE = "resolve-recurrences"
ACTIVATIONS = frozenset({"tanh", "relu"})


@dataclass(frozen=True)
class _Step:
    """One turn of a recurrence.

    Attributes:
        node: its activation, which gives the state.
        inner: the nodes before it that nothing else reads.
        x: the tensor ``[n, t, features]`` of which it reads one place of axis 1.
        place: that place.
        state: the state ``[n, hidden]`` that it reads.
        weights: of the input ``[features, hidden]`` and of the state ``[hidden, hidden]``.
        biases: the constants that are added.
    """

    node: Node
    inner: tuple[Node, ...]
    x: Value
    place: int
    state: Value
    weights: tuple[Value, Value]
    biases: tuple[Value, ...]

    def leads_to(self, after: _Step, gap: int) -> bool:
        same = (self.x, self.node.name, self.weights) == (after.x, after.node.name, after.weights)
        alike = same and sorted(map(id, self.biases)) == sorted(map(id, after.biases))
        return alike and after.state is self.node.output and after.place == self.place + gap


def resolve_recurrences(graph: Graph, least: int) -> tuple[Graph, list[Remark]]:
    """The graph (the same object if nothing changed) in which at least so many steps of a recurrence are one op."""
    runs = [run for run in _runs(graph) if len(run) >= least]
    if not runs:
        return graph, []
    b = GraphBuilder(graph.name)
    b.adopt_interface(graph)
    first = {run[0].node: run for run in runs}
    gone = {node for run in runs for step in run for node in (step.node, *step.inner)}
    for node in graph.nodes:
        if node in first:
            run = first[node]
            with b.at(Location.merged([step.node.loc for step in run], RULE)):
                _write(b, graph, run)
        elif node not in gone:
            b.keep(node)
    return b.finish(graph.outputs, signature=graph.given_signature), [_remark(run) for run in runs]


def _write(b: GraphBuilder, graph: Graph, run: Sequence[_Step]) -> None:
    step = run[0]
    places = [s.place for s in run]
    low, high = min(places), max(places) + 1
    x, h0 = b.resolve(step.x), b.resolve(step.state)
    if (low, high) != (0, x.type.shape[1]):
        x = b("slice", x, axis=1, start=low, stop=high)
    w_ih, w_hh = (b.constant(np.ascontiguousarray(_array(graph, w).T), w.hint) for w in step.weights)
    bias = np.zeros(static(h0.type.shape[1]), h0.type.dtype.numpy)
    for value in step.biases:
        bias = bias + _array(graph, value)
    states, _ = b.multi(
        "rnn", x, h0, w_ih, w_hh, b.constant(bias), activation=step.node.name, reverse=places[-1] < places[0]
    )
    for s in run:
        cut = b("slice", states, axis=1, start=s.place - low, stop=s.place - low + 1)
        b.replace(s.node.output, b("reshape", cut, shape=s.node.output.type.shape))


def _array(graph: Graph, value: Value) -> Array:
    array = graph.constant_value(value)
    assert array is not None
    return array


def _remark(run: Sequence[_Step]) -> Remark:
    before = sum(1 + len(step.inner) for step in run)
    text = f"{len(run)} steps of a recurrence became one rnn: {before} nodes to 1, sums may round otherwise"
    return Remark("applied", text, run[0].node.loc, RULE)


def _runs(graph: Graph) -> Iterator[list[_Step]]:
    """The longest runs of steps that follow each other, forwards or backwards in time."""
    by_state: dict[Value, list[_Step]] = {}
    steps = [step for node in graph.nodes for step in _steps_at(graph, node)]
    for step in steps:
        by_state.setdefault(step.state, []).append(step)
    taken: set[Node] = set()
    for start in steps:  # in the order of the graph: the first step of each run comes first
        if start.node in taken:
            continue
        followed = [after for after in by_state.get(start.node.output, ()) if abs(after.place - start.place) == 1]
        for second in followed:
            gap = second.place - start.place
            run = [start]
            while (after := _next(run[-1], gap, by_state)) is not None and after.node not in taken:
                run.append(after)
            if len(run) > 1:
                taken.update(step.node for step in run)
                yield run
                break


def _next(step: _Step, gap: int, by_state: dict[Value, list[_Step]]) -> _Step | None:
    return next((after for after in by_state.get(step.node.output, ()) if step.leads_to(after, gap)), None)


def _steps_at(graph: Graph, node: Node) -> Iterator[_Step]:
    """What a node is as a step: nothing, or one step, or two where either product could be that of the state."""
    if node.name not in ACTIVATIONS or node.output.type.rank != 2 or not node.output.type.dtype.is_float:
        return
    inner, terms = _terms(graph, node)
    kind = node.output.type
    products = [p for v in terms if (p := _product(graph, v)) is not None]
    others = [v for v in terms if _product(graph, v) is None]
    hidden = (static(kind.shape[1]),) if isinstance(kind.shape[1], int) else None
    if len(products) != 2 or any((a := graph.constant_value(v)) is None or a.shape not in ((), hidden) for v in others):
        return
    for first, second in (products, products[::-1]):
        found = _place(graph, first.inputs[0])
        if found is not None and second.inputs[0].type == kind:
            weights = first.inputs[1], second.inputs[1]
            yield _Step(node, (*inner, *products), *found, second.inputs[0], weights, tuple(others))


def _terms(graph: Graph, node: Node) -> tuple[list[Node], list[Value]]:
    """The additions before a node that only it reads, and what they add."""
    inner: list[Node] = []
    terms: list[Value] = []
    waiting = [node.inputs[0]]
    while waiting:
        value = waiting.pop()
        producer = graph.producer.get(value)
        whole = value.type == node.output.type and graph.use_count(value) == 1
        if producer is not None and producer.name == "add" and whole:
            inner.append(producer)
            waiting += producer.inputs
        else:
            terms.append(value)
    return inner, terms


def _product(graph: Graph, value: Value) -> Node | None:
    """The product by a constant matrix that gives a value which is read once."""
    node = graph.producer.get(value)
    if node is None or node.name != "matmul" or graph.use_count(value) != 1 or node.inputs[0].type.rank != 2:
        return None
    weights = graph.constant_value(node.inputs[1])
    return node if weights is not None and weights.ndim == 2 else None


def _place(graph: Graph, value: Value) -> tuple[Value, int] | None:
    """The tensor of three axes of which a value is one place of axis 1, and which."""
    view = graph.producer.get(value)
    cut = graph.producer.get(view.inputs[0]) if view is not None and view.name == "reshape" else None
    if cut is None or cut.name != "slice" or cut.output.type.rank != 3 or cut.attrs["axis"] % 3 != 1:
        return None
    n, one, features = cut.output.type.shape
    start = cut.attrs["start"]
    known = isinstance(start, int) and isinstance(cut.inputs[0].type.shape[1], int)
    return (cut.inputs[0], start) if known and one == 1 and value.type.shape == (n, features) else None
