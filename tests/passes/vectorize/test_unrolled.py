"""Random unrolled programs: the graphs of loops, with and without the pass."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mlec
from mlec.ir import DType, Graph, GraphBuilder, Value, run_graph, tensor, verify
from mlec.passes.pipelines import named_pipeline
from mlec.passes.vectorize import Vectorize
from mlec.pipeline import PassContext
from mlec.tolerance import check_equal

FEATURES = 6


class Program:
    """A loop over ``steps`` with a body of random ops, unrolled into a graph."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.b = GraphBuilder(f"program{seed}")
        self.steps = int(self.rng.integers(3, 7))
        self.x = self.b.input("x", tensor(DType.F32, ("n", self.steps, FEATURES)))
        self.shared = self.b.input("s", tensor(DType.F32, ("n", FEATURES)))
        self.square = self._weights(FEATURES, FEATURES)

    def graph(self) -> Graph:
        body = [int(c) for c in self.rng.integers(0, 13, int(self.rng.integers(1, 7)))]
        own = self.rng.random() < 0.5  # weights of each step's own
        places = self.rng.permutation(self.steps) if self.rng.random() < 0.3 else np.arange(self.steps)
        state = self.shared if self.rng.random() < 0.4 else None
        picks = [int(p) for p in self.rng.integers(0, 3, 20)]
        results: list[Value] = []
        for step in range(self.steps):
            results.append(self._body(body, picks, int(places[step]), own, state))
            if state is not None:
                state = results[-1]
        outputs = [self._together(results)]
        if self.rng.random() < 0.4:
            outputs.append(self.b("neg", results[int(self.rng.integers(self.steps))]))
        if self.rng.random() < 0.2:
            outputs += results
        return self.b.finish(outputs)

    def _weights(self, *shape: int) -> Value:
        return self.b.constant((self.rng.normal(size=shape) / 3).astype(np.float32), "w")

    def _body(self, body: list[int], picks: list[int], place: int, own: bool, state: Value | None) -> Value:
        b = self.b
        cut = b("slice", self.x, axis=1, start=place, stop=place + 1)
        values = [b("reshape", cut, shape=self.shared.type.shape), self.shared if state is None else state]
        for i, choice in enumerate(body):
            v, other = values[-1 - picks[2 * i] % 2], values[picks[2 * i + 1] % len(values)]
            values.append(self._op(choice, v, other, own))
        return values[-1]

    def _op(self, choice: int, v: Value, other: Value, own: bool) -> Value:
        b = self.b
        match choice:
            case 0:
                return b("tanh", v)
            case 1:
                return b("add", v, other)
            case 2:
                return b("mul", v, b("sigmoid", other))
            case 3:
                return b("matmul", v, self._weights(FEATURES, FEATURES) if own else self.square)
            case 4:
                return b("softmax", v, axis=1)
            case 5:
                return b("sub", v, b("mean", v, axes=(1,), keepdims=True))
            case 6:
                return b("maximum", v, self._weights(FEATURES) if own else 0.25)
            case 7:
                return b("slice", b("concat", v, other, axis=1), axis=1, start=2, stop=2 + FEATURES)
            case 8:
                pairs = b("reshape", v, shape=("n", 2, 3))
                turned = b("transpose", b("sub", pairs, b("max", pairs, axes=(2,), keepdims=True)), perm=(0, 2, 1))
                return b("reshape", turned, shape=v.type.shape)
            case 9:
                return b("pad", b("slice", v, axis=1, start=1, stop=5), before=(0, 1), after=(0, 1))
            case 10:
                return b("gather", v, b.constant(np.array([5, 0, 1, 1, 4, 2])), axis=1)
            case 11:
                values, places = b.multi("topk", v, k=FEATURES, axis=1)
                return b("add", values, b("cast", places, dtype=DType.F32))
            case _:
                ones = [b.constant(np.full(FEATURES, value, np.float32)) for value in (1, 0)]
                scale = self._weights(FEATURES) if own else ones[0]
                return b("layer_norm", v, scale, ones[1])

    def _together(self, results: list[Value]) -> Value:
        b = self.b
        match int(self.rng.integers(4)):
            case 0:
                shape = results[0].type.shape
                return b("concat", *[b("reshape", r, shape=(shape[0], 1, *shape[1:])) for r in results], axis=1)
            case 1:
                return b("concat", *results, axis=int(self.rng.integers(2)))
            case 2:
                total = results[0]
                for r in results[1:]:
                    total = b("add", total, r)
                return total
            case _:
                out = b("broadcast_to", b.constant(np.float32(0)), shape=self.x.type.shape)
                for i in self.rng.permutation(self.steps):
                    ends = [b("slice", out, axis=1, start=s, stop=e) for s, e in ((0, i), (i + 1, self.steps)) if s < e]
                    new = b("reshape", results[i], shape=("n", 1, FEATURES))
                    parts = [new, *ends] if i == 0 else [*ends[:1], new, *ends[1:]]
                    out = b("concat", *parts, axis=1)
                return out


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.integers(0, 1 << 32))
def test_unrolled_programs_keep_their_results(seed: int) -> None:
    graph = Program(seed).graph()
    result = Vectorize(lanes=2 + seed % 3).run(graph, PassContext()).graph
    verify(result)
    check_equal(graph, result, Vectorize.preserves, f"vectorize on seed {seed}", seeds=(0,))


@pytest.mark.parametrize("seed", range(3))
def test_unrolled_programs_compile(seed: int) -> None:
    graph = Program(seed).graph()
    rng = np.random.default_rng(seed)
    inputs = [rng.normal(size=(5, *v.type.shape[1:])).astype(np.float32) for v in graph.inputs]
    found = mlec.compile(graph, passes=named_pipeline("O2"), progress=False).run(inputs)
    for wanted, got in zip(run_graph(graph, inputs), found, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
