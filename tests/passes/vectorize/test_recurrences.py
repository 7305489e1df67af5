"""Unrolled recurrent cells: layers, directions and where they start; and what only looks like one."""

from __future__ import annotations

import numpy as np
import pytest

from mlec.ir import Graph, GraphBuilder, Value, tensor, verify
from mlec.passes.vectorize import Vectorize
from mlec.passes.vectorize.recurrences import resolve_recurrences
from mlec.tolerance import check_equal

STEPS, FEATURES, HIDDEN = 6, 3, 5


class Cells:
    """Builds steps of recurrent cells over ``x [n, 6, 3]`` from the state ``h [n, 5]``."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.b = GraphBuilder("cells")
        self.x = self.b.input("x", tensor("f32", ("n", STEPS, FEATURES)))
        self.h = self.b.input("h", tensor("f32", ("n", HIDDEN)))

    def weights(self, *shape: int) -> Value:
        return self.b.constant(self.rng.normal(size=shape).astype(np.float32) / 2)

    def at(self, t: int) -> Value:
        return self.b("reshape", self.b("slice", self.x, axis=1, start=t, stop=t + 1), shape=("n", FEATURES))

    def layer(self, inputs: list[Value], activation: str = "tanh") -> list[Value]:
        b, h, states = self.b, self.h, []
        w, u = self.weights(inputs[0].type.shape[1], HIDDEN), self.weights(HIDDEN, HIDDEN)  # type: ignore[arg-type]
        bias, offset = self.weights(HIDDEN), self.weights(HIDDEN)
        for v in inputs:
            h = b(activation, b("add", b("add", b("matmul", h, u), offset), b("add", b("matmul", v, w), bias)))
            states.append(h)
        return states


def resolved(graph: Graph) -> Graph:
    found = resolve_recurrences(graph, 4)[0]
    verify(found)
    check_equal(graph, found, Vectorize.preserves, "cells", seeds=(0, 1))
    return found


def loops(graph: Graph) -> list[tuple[object, object]]:
    return [(n.inputs[0].type.shape[1], n.attrs["reverse"]) for n in graph.nodes if n.name == "rnn"]


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize(
    ("places", "loop"), [(range(6), (6, False)), (range(5, -1, -1), (6, True)), (range(1, 5), (4, False))]
)
def test_the_steps_of_a_cell_become_one_loop(activation: str, places: range, loop: tuple[int, bool]) -> None:
    cells = Cells()
    states = cells.layer([cells.at(t) for t in places], activation)
    graph = cells.b.finish([cells.b("concat", *states, axis=1), states[1]])
    assert loops(resolved(graph)) == [loop]


def test_layers_that_are_unrolled_together_become_one_loop_each() -> None:
    cells = Cells()
    graph = cells.b.finish([cells.layer(cells.layer([cells.at(t) for t in range(STEPS)]))[-1]])
    assert loops(resolved(resolved(graph))) == [(6, False)] * 2


@pytest.mark.parametrize("kind", ["sigmoid", "few", "order", "weights"])
def test_what_only_looks_like_it_stays(kind: str) -> None:
    cells = Cells()
    b, h = cells.b, cells.h
    w, u = cells.weights(FEATURES, HIDDEN), cells.weights(HIDDEN, HIDDEN)
    for t in {"few": (0, 1, 2), "order": (0, 2, 4, 1, 3, 5)}.get(kind, range(STEPS)):
        w = cells.weights(FEATURES, HIDDEN) if kind == "weights" else w
        h = b("sigmoid" if kind == "sigmoid" else "tanh", b("add", b("matmul", cells.at(t), w), b("matmul", h, u)))
    graph = b.finish([h])
    assert resolve_recurrences(graph, 4)[0] is graph
