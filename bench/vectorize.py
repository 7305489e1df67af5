"""``python -m bench.vectorize``: loops of 64 steps, unrolled into graphs, compiled with and without the pass ``vectorize``.

Some are graphs, others torch models as people write them (`torch_loops`).

Each loop is timed in one process, both ways in turn, with one thread; nodes are those of the graph that is compiled.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import click
import numpy as np

import mlec
from mlec.ir import Graph, GraphBuilder, Value, tensor
from mlec.passes.pipelines import named_pipeline

STEPS = 64
FEATURES = 16
RANDOM = np.random.default_rng(0)


def _row(b: GraphBuilder, x: Value, i: int) -> Value:
    cut = b("slice", x, axis=1, start=i, stop=i + 1)
    return b("reshape", cut, shape=(x.type.shape[0], *x.type.shape[2:]))


def _stacked(b: GraphBuilder, rows: list[Value]) -> Value:
    first, *rest = rows[0].type.shape
    return b("concat", *[b("reshape", r, shape=(first, 1, *rest)) for r in rows], axis=1)


def _weights(b: GraphBuilder, *shape: int) -> Value:
    return b.constant(RANDOM.normal(size=shape).astype(np.float32) / 4)


def assigned_rows() -> Graph:
    """``for i in range(64): out[:, i] = softmax(x[:, i])``"""
    b = GraphBuilder("assigned_rows")
    x = b.input("x", tensor("f32", ("n", STEPS, FEATURES)))
    out = b("broadcast_to", b.constant(np.float32(0)), shape=x.type.shape)
    for i in range(STEPS):
        ends = [b("slice", out, axis=1, start=s, stop=e) for s, e in ((0, i), (i + 1, STEPS)) if s < e]
        new = b("softmax", b("slice", x, axis=1, start=i, stop=i + 1), axis=2)
        out = b("concat", *([new, *ends] if i == 0 else [ends[0], new, *ends[1:]]), axis=1)
    return b.finish([out])


def standardized_rows() -> Graph:
    """``stack([(r - mean(r)) / std(r) for r in x.unbind(1)])``"""
    b = GraphBuilder("standardized_rows")
    x = b.input("x", tensor("f32", ("n", STEPS, FEATURES)))
    rows = []
    for i in range(STEPS):
        r = _row(b, x, i)
        centred = b("sub", r, b("mean", r, axes=(1,), keepdims=True))
        variance = b("mean", b("mul", centred, centred), axes=(1,), keepdims=True)
        rows.append(b("div", centred, b("sqrt", b("add", variance, 1e-5))))
    return b.finish([_stacked(b, rows)])


def heads() -> Graph:
    """``cat([relu(x @ w[i] + b[i]) for i in range(64)])``"""
    b = GraphBuilder("heads")
    x = b.input("x", tensor("f32", ("n", STEPS)))
    parts = [b("relu", b("add", b("matmul", x, _weights(b, STEPS, 8)), _weights(b, 8))) for _ in range(STEPS)]
    return b.finish([b("concat", *parts, axis=1)])


def centres() -> Graph:
    """``stack([((x - c[i]) ** 2).sum(-1) for i in range(64)])``"""
    b = GraphBuilder("centres")
    x = b.input("x", tensor("f32", ("n", FEATURES)))
    found = []
    for _ in range(STEPS):
        d = b("sub", x, _weights(b, FEATURES))
        found.append(b("sum", b("mul", d, d), axes=(1,)))
    return b.finish([_stacked(b, found)])


def recurrence(activation: str = "tanh", width: int = FEATURES) -> Graph:
    """``h = tanh(x[:, t] @ w + h @ u); y[t] = h @ v``"""
    b = GraphBuilder(f"recurrence_{activation}_{width}")
    x = b.input("x", tensor("f32", ("n", STEPS, width)))
    h = b("mul", _row(b, x, 0), 0.0)
    w, u, v = _weights(b, width, width), _weights(b, width, width), _weights(b, width, 4)
    results = []
    for t in range(STEPS):
        h = b(activation, b("add", b("matmul", _row(b, x, t), w), b("matmul", h, u)))
        results.append(b("matmul", h, v))
    return b.finish([_stacked(b, results)])


def experts() -> Graph:
    """``sum(g[:, i:i + 1] * (relu(x @ w[i] + b[i]) @ u[i] + c[i]) for i in range(64))`` with ``g = softmax(x @ v)``"""
    b = GraphBuilder("experts")
    x = b.input("x", tensor("f32", ("n", FEATURES)))
    gates = b("softmax", b("matmul", x, _weights(b, FEATURES, STEPS)), axis=1)
    parts = []
    for i in range(STEPS):
        h = b("relu", b("add", b("matmul", x, _weights(b, FEATURES, FEATURES)), _weights(b, FEATURES)))
        result = b("add", b("matmul", h, _weights(b, FEATURES, FEATURES)), _weights(b, FEATURES))
        parts.append(b("mul", result, b("slice", gates, axis=1, start=i, stop=i + 1)))
    return b.finish([functools.reduce(lambda left, right: b("add", left, right), parts)])


def shared_mlps() -> Graph:
    """``stack([softmax(relu(relu(r @ w1) @ w2) @ w3) for r in x.unbind(1)])``"""
    b = GraphBuilder("shared_mlps")
    x = b.input("x", tensor("f32", ("n", STEPS, FEATURES)))
    w1, w2, w3 = _weights(b, FEATURES, 32), _weights(b, 32, 32), _weights(b, 32, 4)
    rows = []
    for i in range(STEPS):
        hidden = b("relu", b("matmul", b("relu", b("matmul", _row(b, x, i), w1)), w2))
        rows.append(b("softmax", b("matmul", hidden, w3), axis=1))
    return b.finish([_stacked(b, rows)])


def windows() -> Graph:
    """``cat([(x[:, i:i + 8] * w).sum(1, keepdim=True) for i in range(64)])``"""
    b = GraphBuilder("windows")
    x, w = b.input("x", tensor("f32", ("n", STEPS + 7))), _weights(b, 8)
    cuts = [b("slice", x, axis=1, start=i, stop=i + 8) for i in range(STEPS)]
    return b.finish([b("concat", *[b("sum", b("mul", c, w), axes=(1,), keepdims=True) for c in cuts], axis=1)])


LOOPS: dict[str, Callable[[], Graph]] = {
    f.__name__: f for f in (assigned_rows, standardized_rows, heads, centres, recurrence, experts, shared_mlps, windows)
}


def of_torch(name: str) -> Graph:
    """The graph of a torch model whose ``forward`` is a loop."""
    import torch

    from bench.torch_loops import TORCH_LOOPS

    torch.manual_seed(0)
    model = TORCH_LOOPS[name](STEPS).eval()
    graph = mlec.lower(model, example_inputs=(torch.randn(3, *model.shape),))
    return replace(graph, name=name)


TORCH = (
    "heads_in_a_list", "expert_modules", "channels", "ensemble", "euler_steps", "time_distributed", "lstm_cells", "gru_cell",
    "written_lstm", "standardized_modules", "pair_distances", "updates", "spectra",
)  # fmt: skip
"""Those of `torch_loops`."""
LOOPS |= {name: functools.partial(of_torch, name) for name in TORCH}


def best(call: Callable[[], Any], seconds: float) -> float:
    """The shortest of as many calls as fit into the time, in microseconds."""
    shortest, end = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        call()
        shortest = min(shortest, time.perf_counter() - start)
    return shortest * 1e6


def row_of(graph: Graph, batches: tuple[int, ...], seconds: float) -> str:
    """One line of the table."""
    both = []
    for pipeline in (named_pipeline("O2").without("vectorize"), named_pipeline("O2")):
        start = time.perf_counter()
        model = mlec.compile(graph, passes=pipeline, num_threads=1, validate=False, progress=False)
        both.append((model, time.perf_counter() - start, len(pipeline.run(graph)[0].compute_nodes)))
    cells = [f"{both[0][2]} -> {both[1][2]}", f"{both[0][1]:.1f} -> {both[1][1]:.1f}"]
    for n in batches:
        x = np.random.default_rng(0).normal(size=(n, *graph.inputs[0].type.shape[1:])).astype(np.float32)
        apart, together = (best(functools.partial(model.run, [x]), seconds) for model, _, _ in both)
        cells.append(f"{apart:.1f} -> {together:.1f} ({apart / together:.1f}x)")
    return " | ".join(("", graph.name, *cells, "")).strip()


@click.command()
@click.argument("names", nargs=-1)
@click.option("--seconds", default=0.5, help="for each measurement")
def main(names: tuple[str, ...], seconds: float) -> None:
    """Prints the table for the loops NAMES, by default all."""
    batches = (1, 64, 1024)
    print("| loop | nodes | seconds to compile | " + " | ".join(f"microseconds, {n} rows" for n in batches) + " |")
    print("|" + "---|" * (3 + len(batches)))
    for name in names or LOOPS:
        print(row_of(LOOPS[name](), batches, seconds), flush=True)


if __name__ == "__main__":
    main()
