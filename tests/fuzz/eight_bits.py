"""How far 8 bits may move the results of a graph: by a few times what errors of that size, drawn at random, move them.

The pass rounds what layers read, images that kernels hand over, and weights. What that does to the results depends on the graph: behind a
comparison, an error of a percent is one of all. So the same graph is run in float32 with errors of up to a step of 8 bits, twice what
rounding makes, on the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mlec.ir import DType, Graph, Node, Trait, Value
from mlec.ir.graph import constant_array
from mlec.ir.interp import bind_symbols, trace_graph
from mlec.ir.op import Array
from mlec.passes.quantize.layers import find_layers

DRAWS = 8
LARGE = 2
"""Times what the errors that were drawn move a result by: so much may those of 8 bits move it."""
MEANINGLESS = 0.25
"""An output that they move by so much of its scale tells nothing."""
ROUNDINGS = 512
"""Units of float32's eps that any output may move by: sums are taken in another order."""


def bounds_on_eight_bits(graph: Graph, inputs: Sequence[Array]) -> list[float]:
    """How far each output may move, in absolute numbers, where the pass took ``minmax`` for its ranges, of these inputs, and balanced none;
    infinitely far where such errors decide what it is.
    """
    known = trace_graph(graph, inputs)
    layers, _ = find_layers(graph)
    steps: dict[Value, float] = {}
    for layer in layers:
        held = list(_held(graph, layer.input))
        widest = max(_step(known[value]) for value in held)
        for value in held:
            steps[value] = max(widest, steps.get(value, 0.0))
    if any(layer.is_conv for layer in layers):
        for value in known:
            if value.type.rank >= 3 and value.type.dtype is DType.F32:
                steps.setdefault(value, _step(known[value]))
    products = {layer.node for layer in layers}
    moved = [_run(graph, inputs, steps, products, np.random.default_rng(seed)) for seed in range(DRAWS)]
    return [_bound(known[value], others) for value, *others in zip(graph.outputs, *moved, strict=True)]


def _held(graph: Graph, value: Value) -> Iterator[Value]:
    """The value, and what it is a pool, a view or a join of: all of them can be held in the same 8 bits, for any reader."""
    yield value
    node = graph.producer.get(value)
    if node is not None and (node.name in ("max_pool", "concat", "resize") or node.op.has(Trait.VIEW)):
        for operand in node.inputs:
            yield from _held(graph, operand)


def _step(array: Array) -> float:
    """Between two numbers of 8 bits, where all of the array and 0 are among them."""
    numbers = array.astype(np.float64)
    return float(np.max(numbers, initial=0.0) - np.min(numbers, initial=0.0)) / 255


def _run(
    graph: Graph, inputs: Sequence[Array], steps: Mapping[Value, float], products: set[Node], rng: np.random.Generator
) -> list[Array]:
    """The outputs, where these values are off by up to a step, and the weights of these products."""

    def off(array: Array, step: float | Array) -> Array:
        return np.asarray(array + step * rng.uniform(-1, 1, array.shape), array.dtype)

    def put(value: Value, array: Array) -> None:
        values[value] = off(array, steps[value]) if value in steps else array

    binding = bind_symbols([v.type for v in graph.inputs], [a.shape for a in inputs])
    values: dict[Value, Array] = {}
    for value, array in zip(graph.inputs, inputs, strict=True):
        put(value, array)
    with np.errstate(all="ignore"):
        for node in graph.nodes:
            if node.is_constant:
                values[node.output] = constant_array(node, graph.constants)
                continue
            operands = [values[v] for v in node.inputs]
            if node in products:
                axes = tuple(range(1, operands[1].ndim)) if node.name == "conv" else (0,)
                operands[1] = off(operands[1], np.max(np.abs(operands[1]), axes, keepdims=True) / 127)
            for value, array in zip(node.outputs, node.op.evaluate(operands, node.attrs, binding), strict=True):
                put(value, array)
    return [values[v] for v in graph.outputs]


def _bound(exact: Array, moved: Sequence[Array]) -> float:
    if exact.dtype.kind not in "fV":
        return 0.0 if all(np.array_equal(exact, other) for other in moved) else np.inf
    numbers = exact.astype(np.float64)
    noise = max(np.max(np.abs(other.astype(np.float64) - numbers), initial=0.0) for other in moved)
    scale = np.max(np.abs(numbers), initial=0.0)
    if not noise <= MEANINGLESS * scale:
        return np.inf
    return float(LARGE * noise + ROUNDINGS * np.finfo(np.float32).eps * scale)
