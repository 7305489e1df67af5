"""Writes the packs of a tree as nodes that compute all lanes at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mlec.ir import Graph, GraphBuilder, Location, Node, Value
from mlec.ir.op import Array
from mlec.passes.vectorize.batching import batching, index_array
from mlec.passes.vectorize.lanes import Batch, Lanes
from mlec.passes.vectorize.plan import Cut, Joined, Pack, Pick, Reordered, Shared, Stacked, Step, Values

RULE = "vectorize"


class Emission:
    """The packs of all trees of one graph, each made once all that it reads is there.

    Attributes:
        made: number of nodes for each pack.
    """

    def __init__(self, b: GraphBuilder, graph: Graph, packs: Mapping[Values, Pack]) -> None:
        self.b = b
        self.graph = graph
        self.packs = packs
        self.made: dict[Values, int] = {}
        self._arrays: dict[Value, Array] = {}
        self._done: dict[Values, Lanes] = {}
        self._results: dict[tuple[Node, ...], Sequence[Lanes]] = {}

    def emit(self, lanes: Values) -> None:
        """Makes a pack, whose operands are made."""
        located = [p for v in lanes if (p := self.graph.producer.get(v)) is not None and not p.is_constant]
        batch = self.batch(lanes)
        with self.b.at(Location.merged((n.loc for n in located), RULE)):
            self._done[lanes] = self._emit(batch, self.packs[lanes])
        self.made[lanes] = batch.made

    def batch(self, lanes: Values) -> Batch:
        return Batch(self.b, len(lanes), self._arrays)

    def lanes(self, lanes: Values) -> Lanes:
        """A pack that is made."""
        return self._done[lanes]

    def lane(self, nodes: tuple[Node, ...], output: int, index: int) -> Value:
        """What one of the nodes that became one gave, for those who read it outside the trees."""
        return self.batch(tuple(n.outputs[output] for n in nodes)).lane(self._results[nodes][output], index)

    def _emit(self, batch: Batch, pack: Pack) -> Lanes:
        match pack:
            case Shared(value):
                return Lanes(batch.b.resolve(value))
            case Stacked(arrays, hint):
                return Lanes(batch.constant(np.stack(arrays), hint), 0)
            case Cut():
                return cut(batch, pack)
            case Step():
                return self._step(batch, pack)
            case Pick(nodes, operand):
                return pick(batch, nodes, self._done[operand])
            case Reordered(lanes, order):
                return reordered(batch, self._done[lanes], order)
            case Joined(values):
                return joined(batch, tuple(map(batch.b.resolve, values)))

    def _step(self, batch: Batch, pack: Step) -> Lanes:
        if pack.nodes not in self._results:
            first = pack.nodes[0]
            operands = [self._done[lanes] for lanes in pack.operands]
            rule = batching(first.op)
            assert rule is not None
            if any(o.axis is not None for o in operands):
                self._results[pack.nodes] = rule.rule(batch, first, operands)
            else:
                results = batch.multi(first.name, *(o.value for o in operands), **first.attrs)
                self._results[pack.nodes] = [Lanes(v) for v in results]
        return self._results[pack.nodes][pack.output]


def cut(batch: Batch, pack: Cut) -> Lanes:
    """Slices of one tensor: a part of it seen in another shape where they lie side by side, else its elements by index."""
    source, axis = batch.b.resolve(pack.source), pack.axis
    shape, width, starts = source.type.shape, pack.width, pack.starts
    if pack.side_by_side:
        stop, step = starts[-1] + width, pack.gap if width == 1 else 1
        whole = starts[0] == 0 and stop == shape[axis] and step == 1
        part = source if whole else batch("slice", source, axis=axis, start=starts[0], stop=stop, step=step)
        return Lanes(batch.reshape(part, (*shape[:axis], batch.count, width, *shape[axis + 1 :])), axis)
    if pack.interleaved:
        return Lanes(batch.reshape(source, (*shape[:axis], width, batch.count, *shape[axis + 1 :])), axis + 1)
    rows = [[start + pack.step * i for i in range(width)] for start in starts]
    return Lanes(batch("gather", source, batch.constant(index_array(rows), "places"), axis=axis), axis)


def pick(batch: Batch, nodes: tuple[Node, ...], operand: Lanes) -> Lanes:
    """Slices that start at another place in each lane: by index in all lanes, one after the other."""
    first = nodes[0]
    axis = first.attrs["axis"] % first.output.type.rank
    extent, width = first.inputs[0].type.shape[axis], first.output.type.shape[axis]
    assert isinstance(extent, int)
    assert isinstance(width, int)
    own = 0 if operand.axis is None else extent
    source = operand.value if operand.axis is None else batch.folded(operand, axis)
    places = [
        [lane * own + n.attrs["start"] + n.attrs["step"] * i for i in range(width)] for lane, n in enumerate(nodes)
    ]
    return Lanes(batch("gather", source, batch.constant(index_array(places), "places"), axis=axis), axis)


def reordered(batch: Batch, lanes: Lanes, order: tuple[int, ...]) -> Lanes:
    """The lanes with these numbers."""
    if lanes.axis is None:
        return lanes
    if order == tuple(range(order[0], order[0] + len(order))):
        return Lanes(batch("slice", lanes.value, axis=lanes.axis, start=order[0], stop=order[-1] + 1), lanes.axis)
    return Lanes(batch("gather", lanes.value, batch.constant(index_array(order), "lanes"), axis=lanes.axis), lanes.axis)


def joined(batch: Batch, values: Values) -> Lanes:
    """Values from anywhere: beside each other in an axis that they have, a symbolic first one left alone."""
    shape = values[0].type.shape
    if not shape:
        single = [batch.reshape(v, (1,)) for v in values]
        return Lanes(batch("concat", *single, axis=0), 0)
    axis = 1 if len(shape) > 1 and not isinstance(shape[0], int) else 0
    return batch.split(batch("concat", *values, axis=axis), axis)
