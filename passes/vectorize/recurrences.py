"""Recurrences that have an op: the steps of an unrolled recurrent cell become one ``lstm``, ``gru`` or ``rnn``.

Only its state keeps a step from being batched with the others. The op keeps the loop, without a node for each turn, and multiplies the
inputs of several turns at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from mlec.ir import Graph, GraphBuilder, Location, Node, Value
from mlec.ir.op import Array
from mlec.passes.fusion.fuse import contracted_order
from mlec.passes.vectorize.affine import Source, offset_of, weights_of
from mlec.passes.vectorize.cells import READS, Cell, Turn, cells_at
from mlec.pipeline import Remark
from mlec.wording import plural

RULE = "resolve-recurrences"

BOUNDED = frozenset({"tanh", "sigmoid", "softmax"})

Run = tuple[Turn, ...]


def resolve_recurrences(graph: Graph, least: int) -> tuple[Graph, list[Remark]]:
    """The graph (the same object if nothing changed) in which at least so many steps of a recurrence are one op."""
    found = [run for run in _runs(graph) if len(run) >= least]
    runs = [run for run in found if _order(graph, [run]) is not None]
    if not runs:
        return graph, []
    order = _order(graph, runs)
    if order is None:  # they wait for each other
        runs = runs[:1]
        order = _order(graph, runs)
        assert order is not None
    b = GraphBuilder(graph.name)
    b.adopt_interface(graph)
    replaced = {node: run for run in runs for turn in run for node in turn.cell.nodes}
    for members in order:
        if members[0] in replaced:
            with b.at(Location.merged((node.loc for node in members), RULE)):
                _write(b, graph, replaced[members[0]])
        else:
            b.keep(members[0])
    return b.finish(graph.outputs, signature=graph.given_signature), [_remark(graph, run) for run in runs]


def _order(graph: Graph, runs: Sequence[Run]) -> list[list[Node]] | None:
    """The nodes in an order in which those of each run are together; None if what a run reads waits for what it gives."""
    groups = [[node for turn in run for node in turn.cell.nodes] for run in runs]
    order = list(contracted_order(graph, groups))
    return order if sum(map(len, order)) == len(graph.nodes) else None


# -- finding ---------------------------------------------------------------------------------------------------------


def _runs(graph: Graph) -> Iterator[Run]:
    """The longest runs of equal steps that follow each other."""
    cells = [cell for node in graph.nodes for cell in cells_at(graph, node)]
    readers: dict[Value, list[Cell]] = {}
    for cell in cells:
        for source in cell.sources:
            if source.axis is None:
                readers.setdefault(source.value, []).append(cell)
    taken: set[Node] = set()

    def after(cell: Cell) -> Iterator[Turn]:
        """The steps that go on from what a cell gives."""
        for reader in readers.get(cell.states[0], ()):
            turn = reader.turn(graph, cell.states[0])
            fits = turn is not None and turn.follows(cell) and taken.isdisjoint(reader.nodes)
            if turn is not None and fits and _alone(graph, cell, turn):
                yield turn

    for start in cells:  # in the order of the graph: the first step of each run comes first
        for second in after(start) if taken.isdisjoint(start.nodes) else ():
            first = _like(graph, start, second)
            if first is None or (start.finite and not _is_finite(graph, first.h)):
                continue
            run = [first, second]
            while (turn := next((t for t in after(run[-1].cell) if t.key == second.key), None)) is not None:
                run.append(turn)
            taken.update(node for turn in run for node in turn.cell.nodes)
            yield tuple(run)
            break


def _like(graph: Graph, cell: Cell, turn: Turn) -> Turn | None:
    """A cell that no step is known to come before, as the same step as another one."""
    turns = (cell.turn(graph, source.value) for source in cell.sources if source.axis is None)
    return next((found for found in turns if found is not None and found.key == turn.key), None)


def _is_finite(graph: Graph, value: Value) -> bool:
    """Whether no element is infinite: what is made of constants and the results of bounded functions only."""
    waiting, seen = [value], set[Value]()
    while waiting:
        v = waiting.pop()
        node, array = graph.producer.get(v), graph.constant_value(v)
        if v in seen or (node is not None and node.name in BOUNDED):
            continue
        seen.add(v)
        if array is not None and not np.isinf(array).any():
            continue
        if node is None or array is not None or node.name not in ("add", "sub", "mul", "broadcast_to"):
            return False
        waiting += node.inputs
    return True


def _alone(graph: Graph, cell: Cell, turn: Turn) -> bool:
    """Whether nothing but the step and the one before it reads what the op does not give of each: of the states, all but the first."""
    nodes = cell.nodes | turn.cell.nodes
    return not any(v in graph.outputs or any(user not in nodes for user in graph.users[v]) for v in cell.states[1:])


# -- writing ---------------------------------------------------------------------------------------------------------


def _write(b: GraphBuilder, graph: Graph, run: Run) -> None:
    cell, state = run[0].cell, Source(run[0].h)
    hidden, dtype = cell.gates[0].width, state.value.type.dtype.numpy
    fed, back = ([i for i, reads in enumerate(READS[cell.op]) if reads[j]] for j in range(2))

    def rows(arrays: Iterable[Array], hint: str = "") -> Value:
        return b.constant(np.ascontiguousarray(np.concatenate(list(arrays)), dtype), hint)

    def name(gate: int, source: Source) -> str:
        return next(t.weights.hint for t in cell.gates[gate].terms if t.source == source)

    def weights(gate: int, *sources: Source) -> Array:
        terms = cell.gates[gate].terms
        return _sign(cell, gate) * np.hstack([weights_of(graph, terms, s) for s in sources])

    def offset(gate: int) -> Array:
        return _sign(cell, gate) * np.broadcast_to(offset_of(graph, cell.gates[gate].terms), (hidden,))

    biases = [rows(offset(gate) for gate in fed)]
    if fed != back:
        biases.append(rows(np.zeros(hidden) if gate in fed else offset(gate) for gate in back))
    x, reverse = _inputs(b, run)
    before = [_like_state(b, v, state.value) for v in (state.value, *cell.before[1:]) if v is not None]
    attrs = {"activation": cell.activation} if cell.activation else {}
    w_ih = rows((weights(gate, *run[0].inputs) for gate in fed), name(fed[0], run[0].inputs[0]))
    w_hh = rows((weights(gate, state) for gate in back), name(back[0], state))
    states, _, *last = b.multi(cell.op, x, *before, w_ih, w_hh, *biases, reverse=reverse, **attrs)
    for i, turn in enumerate(run):
        place = len(run) - 1 - i if reverse else i
        cut = b("slice", states, axis=1, start=place, stop=place + 1)
        b.replace(turn.cell.states[0], b("reshape", cut, shape=state.value.type.shape))
    for old, new in zip(run[-1].cell.states[1:], last, strict=True):
        b.replace(old, new)


def _like_state(b: GraphBuilder, value: Value, state: Value) -> Value:
    value = b.resolve(value)
    return value if value.type == state.type else b("broadcast_to", value, shape=state.type.shape)


def _sign(cell: Cell, gate: int) -> int:
    """Of what the update gate of a turned gru is of: one minus its sigmoid is the sigmoid of the negative."""
    return -1 if cell.turned and gate == 1 else 1


def _inputs(b: GraphBuilder, run: Run) -> tuple[Value, bool]:
    """What all steps read besides the state, ``[n, steps, features]``, and whether the last step comes first there."""
    columns = list(zip(*(turn.inputs for turn in run), strict=True))
    reverse = {_gap(column) for column in columns} == {-1}
    parts = [_sequence(b, column[::-1] if reverse else column) for column in columns]
    return parts[0] if len(parts) == 1 else b("concat", *parts, axis=2), reverse


def _gap(column: Sequence[Source]) -> int:
    """From each place of a sequence to the next; 0 where that differs, or values come from elsewhere."""
    first = column[0]
    gaps = {b.place - a.place for a, b in pairwise(column)}
    same = first.axis is not None and all(s.value is first.value and s.axis == first.axis for s in column)
    return gaps.pop() if same and len(gaps) == 1 else 0


def _sequence(b: GraphBuilder, column: Sequence[Source]) -> Value:
    """What the steps read, one after the other along axis 1."""
    first = column[0]
    value, axis = b.resolve(first.value), first.axis
    if _gap(column) == 1 and axis is not None:
        low, high = first.place, column[-1].place + 1
        whole = (low, high) == (0, value.type.shape[axis])
        part = value if whole else b("slice", value, axis=axis, start=low, stop=high)
        return part if axis == 1 else b("transpose", part, perm=(1, 0, 2))
    shape = (first.rows, 1, first.features)
    if axis is None and all(s == first for s in column):
        return b("broadcast_to", b("reshape", value, shape=shape), shape=(first.rows, len(column), first.features))
    return b("concat", *[_step(b, s) for s in column], axis=1)


def _step(b: GraphBuilder, source: Source) -> Value:
    value = b.resolve(source.value)
    if source.axis is not None:
        value = b("slice", value, axis=source.axis, start=source.place, stop=source.place + 1)
    shape = (source.rows, 1, source.features)
    return value if value.type.shape == shape else b("reshape", value, shape=shape)


def _remark(graph: Graph, run: Run) -> Remark:
    before = sum(len(turn.cell.nodes) for turn in run)
    op = run[0].cell.op
    text = f"{plural(len(run), 'step')} of a recurrence became one {op}: {before} nodes to 1, sums may round otherwise"
    return Remark("applied", text, graph.producer[run[0].cell.states[0]].loc, RULE)
