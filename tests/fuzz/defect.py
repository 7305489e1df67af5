"""What a check found, and how it is made small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlec.ir import Graph
from mlec.ir.op import SYMBOLIC_EXTENT
from mlec.reduction import reduce_graph
from mlec.tolerance import random_inputs
from tests.fuzz.graphs import Sample


@dataclass(frozen=True)
class Defect:
    """What went wrong.

    Attributes:
        text, pipeline: what, with which passes.
        graph: shows it.
        again: the same check of another graph.
    """

    text: str
    pipeline: str
    graph: Graph
    again: Callable[[Sample], Defect | None] = lambda sample: None

    def __str__(self) -> str:
        return f"{self.pipeline}: {self.text}\n{self.graph}"

    def reduced(self, seconds: float = 60.0) -> Graph:
        """The smallest graph found that the same is wrong with."""

        def fails(graph: Graph) -> bool:
            inputs = random_inputs(graph, np.random.default_rng(0), dict.fromkeys(graph.symbols, SYMBOLIC_EXTENT))
            return self.again(Sample(graph, inputs)) is not None

        return reduce_graph(self.graph, fails, seconds)
