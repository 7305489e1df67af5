"""What becomes of the outputs of a run when some value within it comes out differently."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from heapq import heappop, heappush

import numpy as np

from mlec.ir import Graph, Node, Value
from mlec.ir.op import Array
from mlec.passes.stability.wide import WideGraph


class Consequences:
    """Follows changed values through one run, no further than they change something.

    Where all that is changed goes through one value, what follows is remembered by its bits: a hundred layers of which each loses all
    numbers cost no more than one.

    Args:
        wide: the graph.
        order: the position of each of its nodes, `positions`.
        inputs: of the run.
        exact: every value of the run.

    Attributes:
        evaluated: the nodes that were evaluated, in order.
    """

    def __init__(
        self, wide: WideGraph, order: Mapping[Node, int], inputs: Sequence[Array], exact: Mapping[Value, Array]
    ) -> None:
        self.wide, self.exact = wide, exact
        self.evaluated: list[Node] = []
        self._order, self._bound = order, wide.bound(inputs)
        self._outputs = frozenset(wide.graph.outputs)
        self._seen: dict[tuple[Value, bytes], Mapping[Value, Array]] = {}

    def of(self, stated: Mapping[Value, Array]) -> Mapping[Value, Array]:
        """The outputs that change, and what they become, if these values are as stated."""
        graph, order = self.wide.graph, self._order
        changed: dict[Value, Array] = {}
        waiting: dict[Value, int] = {}  # changed values, and how many of their users are still to be evaluated
        queue: list[int] = []
        queued: set[int] = set()
        outputs: list[tuple[Value, Array]] = []
        marks: list[tuple[tuple[Value, bytes], int]] = []

        def change(value: Value, array: Array) -> None:
            if np.array_equal(array, self.exact[value], equal_nan=array.dtype.kind == "f"):
                return
            changed[value] = array
            users = graph.users.get(value, ())
            if users:
                waiting[value] = len(users)
            for node in users:
                if order[node] not in queued:
                    queued.add(order[node])
                    heappush(queue, order[node])
            if value in self._outputs:
                outputs.append((value, array))

        for value, array in stated.items():
            change(value, self.wide.widened(array))
        while queue:
            if len(waiting) == 1:
                (value,) = waiting
                if waiting[value] == len(graph.users[value]):
                    key = value, _digest(changed[value])
                    if key in self._seen:
                        outputs += self._seen[key].items()
                        break
                    marks.append((key, len(outputs)))
            node = graph.nodes[heappop(queue)]
            with np.errstate(all="ignore"):
                operands = [changed.get(v, self.exact[v]) for v in node.inputs]
                results = self.wide.evaluated(node, operands, self._bound)
            self.evaluated.append(node)
            for value in set(node.inputs) & waiting.keys():
                waiting[value] -= 1
                if not waiting[value]:
                    del waiting[value]
            for value, array in zip(node.outputs, results, strict=True):
                change(value, array)
        for key, start in marks:
            self._seen[key] = dict(outputs[start:])
        return dict(outputs)


def positions(graph: Graph) -> dict[Node, int]:
    """The place of each node in the order of its graph."""
    return {node: i for i, node in enumerate(graph.nodes)}


def _digest(array: Array) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=16).digest()
