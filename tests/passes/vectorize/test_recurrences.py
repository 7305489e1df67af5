"""Unrolled recurrent cells: layers, directions and where they start; and what only looks like one."""

from __future__ import annotations

from collections.abc import Sequence

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


@pytest.mark.parametrize("activation", ["tanh", "relu", "sigmoid"])
@pytest.mark.parametrize(
    ("places", "loop"),
    [
        (range(6), (6, False)),
        (range(5, -1, -1), (6, True)),
        (range(1, 5), (4, False)),
        ((0, 2, 4, 1, 3, 5), (6, False)),
    ],
)
def test_the_steps_of_a_cell_become_one_loop(activation: str, places: Sequence[int], loop: tuple[int, bool]) -> None:
    cells = Cells()
    states = cells.layer([cells.at(t) for t in places], activation)
    graph = cells.b.finish([cells.b("concat", *states, axis=1), states[1]])
    assert loops(resolved(graph)) == [loop]


def test_layers_that_are_unrolled_together_become_one_loop_each() -> None:
    cells = Cells()
    graph = cells.b.finish([cells.layer(cells.layer([cells.at(t) for t in range(STEPS)]))[-1]])
    assert loops(resolved(resolved(graph))) == [(6, False)] * 2


@pytest.mark.parametrize("kind", ["activation", "few", "weights", "coupled", "read"])
def test_what_only_looks_like_it_stays(kind: str) -> None:
    cells = Cells()
    b, h = cells.b, cells.h
    w, u = cells.weights(HIDDEN if kind == "coupled" else FEATURES, HIDDEN), cells.weights(HIDDEN, HIDDEN)
    other, found = cells.h, []
    for t in range(3 if kind == "few" else STEPS):
        w = cells.weights(FEATURES, HIDDEN) if kind == "weights" else w
        product = b("matmul", h, u)
        found.append(product)
        value = other if kind == "coupled" else cells.at(t)
        h = b("silu" if kind == "activation" else "tanh", b("add", b("matmul", value, w), product))
        other = b("exp", h)  # what the next step reads waits for this one
    graph = b.finish([h, *(found if kind == "read" else ())])
    assert resolve_recurrences(graph, 4)[0] is graph


def test_an_lstm_whose_cell_states_are_read_stays() -> None:
    cells = Cells()
    b, h, c = cells.b, cells.h, cells.h
    w, u = cells.weights(FEATURES, 4 * HIDDEN), cells.weights(HIDDEN, 4 * HIDDEN)
    states = []
    for t in range(STEPS):
        gates = b("add", b("matmul", cells.at(t), w), b("matmul", h, u))
        i, f, g, o = (b("slice", gates, axis=1, start=k * HIDDEN, stop=(k + 1) * HIDDEN) for k in range(4))
        c = b("add", b("mul", b("sigmoid", f), c), b("mul", b("sigmoid", i), b("tanh", g)))
        h = b("mul", b("sigmoid", o), b("tanh", c))
        states.append(c)
    found = resolved(b.finish([h, c]))
    assert [n.name for n in found.nodes if n.name in ("lstm", "sigmoid")] == ["lstm"]
    graph = b.finish([h, *states])
    assert resolve_recurrences(graph, 4)[0] is graph
