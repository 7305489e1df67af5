"""vectorize: what the source does in many small equal steps becomes one operation on arrays.

A loop over rows, time steps, heads or experts leaves as many copies of its body in the graph. Where the results come together again
(concatenated, or summed up), the copies are compared node by node, from the results up to the slices or weights in which they
differ (`plan`), and one batched copy takes their place (`emit`, with a rule for each op in `batching`). Sums of products of all
lanes are one product, and what follows a wide product stays beside it (`products`). Steps of an LSTM, a gated recurrent unit or a plain
recurrence (`cells`) become the op that loops over them (`recurrences`). What another recurrence cannot batch stays in steps, but work in
it that does not depend on the steps before, such as the product with the input, is done once, unless the steps are so narrow that
backends make them one pass over rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mlec.ir import Graph, apply_rules
from mlec.passes.vectorize import emit, moves, recurrences
from mlec.passes.vectorize.pairs import PAIRS
from mlec.passes.vectorize.products import PRODUCTS
from mlec.passes.vectorize.sliding import SLIDING
from mlec.passes.vectorize.sweep import Sweep
from mlec.pipeline import Pass, PassContext, PassResult, Remark, Tolerance, approx

MAX_SWEEPS = 16
"""Each takes one more level of nested loops."""


@dataclass(frozen=True)
class Vectorize(Pass):
    """Many small equal steps, as unrolled loops leave them, become operations on whole arrays.

    Options:
        lanes: the least number of steps that is worth it.
    """

    lanes: int = 4
    name: ClassVar[str] = "vectorize"
    before: ClassVar[str] = "layout"
    preserves: ClassVar[Tolerance] = approx(
        1e-5, 1e-6, roundings=8
    )  # sums and products may be taken in another order, and are rounded once then

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        remarks: list[Remark] = []
        for _ in range(MAX_SWEEPS):
            graph, done = _resolved(graph, self.lanes, context)
            remarks += done
            sweep = Sweep(graph)
            if not context.takes(emit.RULE):
                break
            sweep.take_joined(self.lanes)
            if not sweep.trees:  # nothing comes together any more
                sweep.take_equal(self.lanes)
            if not sweep.trees:
                break
            graph, done = sweep.rewritten()
            remarks += done
        changed = (*SLIDING, *PRODUCTS) if remarks else ()  # other graphs keep the products that later passes look for
        edits = PassResult.of_edits(*apply_rules(graph, context.taken((*PAIRS, *changed))))
        return PassResult(edits.graph, (*remarks, *sweep.missed, *edits.remarks))


def _resolved(graph: Graph, lanes: int, context: PassContext) -> tuple[Graph, list[Remark]]:
    """The graph without chains of moves and recurrent cells; a layer of these is seen once the one before is resolved."""
    remarks: list[Remark] = []
    while True:
        if context.takes(moves.RULE):
            graph, moved = moves.resolve_moves(graph)
            remarks += moved
        if not context.takes(recurrences.RULE):
            return graph, remarks
        graph, done = recurrences.resolve_recurrences(graph, lanes)
        remarks += done
        if not done:
            return graph, remarks
