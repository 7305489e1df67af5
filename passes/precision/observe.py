"""Where the values inside a graph lie on example inputs."""

from __future__ import annotations

from collections.abc import Sequence

from mlec.ir import Graph, Value, extract, run_graph
from mlec.ir.op import Array
from mlec.passes.stability.intervals import Interval, interval_of

MOST_ROWS = 64
"""Of the examples; the reference interpreter is slow."""


def observe(graph: Graph, values: Sequence[Value], batches: Sequence[Sequence[Array]]) -> dict[Value, Interval]:
    """From the smallest to the largest number of each value, on the first rows of the first batch."""
    inner = [value for value in dict.fromkeys(values) if value not in graph.inputs]
    rows = {value.type.shape[0] for value in graph.inputs if value.type.symbols and value.type.shape}
    cut = slice(MOST_ROWS) if len(rows) == 1 and all(value.type.symbols for value in graph.inputs) else slice(None)
    inputs = [array[cut] if array.ndim else array for array in batches[0]]
    outputs = run_graph(extract(graph, graph.inputs, inner, f"{graph.name}_observed"), inputs) if inner else []
    seen = dict(zip((*graph.inputs, *inner), (*inputs, *outputs), strict=True))
    return {value: interval_of(array) for value, array in seen.items() if array.dtype.kind in "fiuV"}
