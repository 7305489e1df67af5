"""What the numbers inside a network are on calibration data: ranges, means, histograms. Batch after batch; few activations are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from mlec.ir import Graph, Trait, Value, extract, run_graph
from mlec.ir.dim import evaluate, symbols_of
from mlec.ir.op import Array
from mlec.passes.quantize.observers import Histogram
from mlec.pipeline import PassContext

MOST_BYTES = 1 << 28
"""Of the activations that one run may give back, and of those that are kept for later looks at them."""
MADE_ROWS = 64
WORTH_COMPILING = 2e9
"""Operations that the interpreter does about as fast as the compiler makes the kernel of one product."""

Batch = Sequence[Array]


def made_inputs(graph: Graph) -> list[list[Array]]:
    """Random inputs, for a graph without calibration data: normal floats, 0 and 1 elsewhere."""
    rng = np.random.default_rng(0)
    arrays: list[Array] = []
    for value in graph.inputs:
        shape = tuple(evaluate(dim, dict.fromkeys(symbols_of(dim), MADE_ROWS)) for dim in value.type.shape)
        numbers = rng.normal(size=shape) if value.type.dtype.is_float else rng.integers(0, 2, shape)
        arrays.append(numbers.astype(value.type.dtype.numpy))
    return [arrays]


def runner(graph: Graph, batches: Sequence[Batch], context: PassContext) -> Callable[[Batch], Sequence[Array]]:
    """Something that runs the graph: compiled, unless the interpreter is done with the batches before the compiler is."""
    rows = sum(max((len(array) for array in batch if array.ndim), default=1) for batch in batches)
    products = sum(node.op.has(Trait.CONTRACTION) for node in graph.nodes)
    work = evaluate(graph.cost.flops, dict.fromkeys(graph.symbols, 1)) * rows
    if context.trials is None or work < WORTH_COMPILING * products:
        return lambda inputs: run_graph(graph, inputs)
    return context.trials.compiled(graph)


def parts_of(graph: Graph, batches: Sequence[Batch], watched: Sequence[Value]) -> Iterator[Batch]:
    """The batches, cut into parts of so many rows that the watched values take `MOST_BYTES` at most."""
    if not _has_rows(graph):
        yield from batches
        return
    row = sum(evaluate(value.type.nbytes, dict.fromkeys(graph.symbols, 1)) for value in watched)
    most = max(1, MOST_BYTES // max(row, 1))
    for batch in batches:
        count = len(batch[0])
        for start, stop in pairwise([*range(0, count, most), count]):
            yield [array[start:stop] for array in batch]


def some_rows(graph: Graph, inputs: Batch, count: int) -> Batch:
    """So many rows of inputs, from all over; all of them where they are no more, or no rows."""
    rows = len(inputs[0]) if _has_rows(graph) else 0
    if rows <= count:
        return inputs
    picked = np.linspace(0, rows - 1, count).astype(int)
    return [array[picked] for array in inputs]


def _has_rows(graph: Graph) -> bool:
    """Whether all inputs have the same symbolic number of rows."""
    first = {str(value.type.shape[0]) if value.type.shape else "" for value in graph.inputs}
    return len(first) == 1 and first <= set(graph.symbols)


@dataclass(eq=False)
class Watched:
    """What was seen of one value.

    Attributes:
        axis: of its channels, counted from the end.
        largest: of each channel the largest magnitude.
        mean: of each channel.
        finite: whether all numbers are.
    """

    axis: int
    finite: bool = True
    low: float = np.inf
    high: float = -np.inf
    count: int = 0
    largest: Array = field(default_factory=lambda: np.zeros(1))
    sums: Array = field(default_factory=lambda: np.zeros(1))

    def add(self, array: Array) -> None:
        """Numbers that are not finite count as 0."""
        finite = bool(np.isfinite(array).all())
        self.finite &= finite
        known = array if finite else np.where(np.isfinite(array), array, 0)
        if not known.size:
            return
        self.low, self.high = min(self.low, float(known.min())), max(self.high, float(known.max()))
        axes = tuple(i for i in range(known.ndim) if i != known.ndim + self.axis)
        self.largest = np.maximum(self.largest, np.abs(known).max(axis=axes))
        self.sums = self.sums + known.sum(axis=axes, dtype=np.float64)
        self.count += known.size // known.shape[self.axis]

    @property
    def mean(self) -> Array:
        return np.asarray(self.sums / max(self.count, 1))


Place = tuple[Value, int]
"""A value, and the axis of its channels, counted from the end."""
Parts = Callable[[], Iterator[dict[Value, Array]]]
"""Goes through all batches, and gives the values that are watched part by part."""


def watch(
    graph: Graph, places: Sequence[Place], batches: Sequence[Batch], context: PassContext
) -> tuple[dict[Place, Watched], Parts]:
    """Runs the graph on the batches: what was seen, and something that goes through it again, running what was too much to keep.

    The outputs of the graph are among the values of each part.
    """
    values = list(dict.fromkeys([*(value for value, _ in places), *graph.outputs]))
    inner = [value for value in values if value not in graph.inputs]
    run = runner(extract(graph, graph.inputs, inner, f"{graph.name}_watched"), batches, context) if inner else None

    kept: dict[int, Sequence[Array]] = {}

    def parts() -> Iterator[dict[Value, Array]]:
        for number, part in enumerate(parts_of(graph, batches, values)):
            outputs = kept.get(number)
            if outputs is None:
                outputs = run(part) if run is not None else []
                if sum(array.nbytes for arrays in (*kept.values(), outputs) for array in arrays) <= MOST_BYTES:
                    kept[number] = outputs
            yield dict(zip(graph.inputs, part, strict=True)) | dict(zip(inner, outputs, strict=True))

    seen = {place: Watched(place[1]) for place in places}
    for part in parts():
        for place, found in seen.items():
            found.add(np.asarray(part[place[0]]))
    return seen, parts


def histograms(
    seen: Mapping[Place, Watched], divisors: Mapping[Value, Array], parts: Parts
) -> tuple[dict[Value, Histogram], dict[Value, Histogram]]:
    """Histograms of the values, and of those that are balanced with their channels (the last axis) divided."""
    plain = {value: Histogram.between(found.low, found.high) for (value, _), found in seen.items()}
    balanced = {}
    for value, divisor in divisors.items():
        found = seen[value, -1]
        most = float(np.max(found.largest / divisor))
        balanced[value] = Histogram.between(-most if found.low < 0 else 0.0, most)
    for part in parts():
        for value, histogram in plain.items():
            histogram.add(np.asarray(part[value]))
        for value, histogram in balanced.items():
            histogram.add(np.asarray(part[value]) / divisors[value])
    return plain, balanced
