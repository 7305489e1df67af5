"""Random graphs around what rules look for: those of the golden tests, of which each rule has one, with other numbers and more around them.

Ops that are drawn one by one hardly ever make what a rule looks for.
"""

from __future__ import annotations

import numpy as np

from mlec.ir import Graph, GraphBuilder, Value, parse_graph
from mlec.ir.op import SYMBOLIC_EXTENT, Array
from mlec.pipeline import PassPipeline
from mlec.tolerance import random_inputs
from tests.fuzz.graphs import Sample
from tests.fuzz.twins import twin
from tests.passes.test_golden import CASES, SEPARATOR, constants, header

FILES = tuple(path for path in CASES if path.parent.name != "quantize-int8")
"""On 8 bits results move further than any order of sums explains: `eight_bits` has the bounds for that."""

AROUND = ("neg", "relu", "sin", "tanh", "abs", "sigmoid")
"""What may come before the inputs and after the results."""


def golden(number: int) -> tuple[Graph, PassPipeline]:
    """A graph that rules apply to, and the passes that have them."""
    text = FILES[number % len(FILES)].read_text()
    before = text.partition(SEPARATOR)[0]
    graph = parse_graph(before[before.index("graph @") :], constants(text))
    return graph, PassPipeline.parse(header(text, "passes")[0])


def random_rule_sample(seed: int) -> tuple[Sample, PassPipeline]:
    """A variation of a golden test's graph, and its passes."""
    rng = np.random.default_rng([seed, 5])
    graph, pipeline = golden(seed)
    graph = _varied(graph, rng)
    if rng.random() < 0.4:
        graph = twin(graph, rng)
    return Sample(graph, random_inputs(graph, rng, dict.fromkeys(graph.symbols, SYMBOLIC_EXTENT))), pipeline


def _varied(graph: Graph, rng: np.random.Generator) -> Graph:
    """Other arrays as constants, more outputs, and something before inputs and after outputs."""
    b = GraphBuilder(graph.name)
    b.adopt_interface(graph)
    share = float(rng.choice([0.0, 0.3]))

    def followed(value: Value) -> Value:
        return b(str(rng.choice(AROUND)), value) if value.type.dtype.is_float and rng.random() < share else value

    for value in graph.inputs:
        b.replace(value, followed(value))
    outputs = list(graph.outputs)
    more = float(rng.choice([0.0, 0.1]))
    for node in graph.nodes:
        array = graph.constants.get(getattr(node.attrs.get("value"), "name", "")) if node.is_constant else None
        if array is not None and array.dtype.kind == "f":
            b.replace(node.output, b.constant(_other(array, rng), node.output.hint))
            continue
        b.keep(node)
        outputs += [value for value in node.outputs if not node.is_constant and rng.random() < more]
    return b.finish([followed(b.resolve(value)) for value in outputs])


def _other(array: Array, rng: np.random.Generator) -> Array:
    """Random numbers, of which some are zero, one or negative now and then."""
    other = rng.uniform(0.5, 2.0, array.shape)
    kind = rng.random()
    if kind < 0.2:
        other = np.where(rng.random(array.shape) < 0.3, rng.choice([0.0, 1.0, -1.0], array.shape), other)
    elif kind < 0.5:
        other = other * rng.choice([-1, 1], array.shape)
    return other.astype(array.dtype)
