"""sink-transposes on random chains of views and ops: the same results, never more bytes moved; remarks; whole attention layers."""

from __future__ import annotations

import numpy as np
import pytest

from mlec.ir import Dim, Graph, GraphBuilder, Value, tensor, verify
from mlec.passes.pipelines import named_pipeline
from mlec.passes.sink_transposes import SinkTransposes, bytes_moved
from mlec.pipeline import PassContext, PassPipeline, Tolerance
from mlec.tolerance import check_equal

CLEAN = "canonicalize,cse,dce"


def random_graph(seed: int) -> Graph:
    rng = np.random.default_rng(seed)
    b = GraphBuilder("g")
    values = [b.input("x", tensor("f32", ("n", 4, 6)))]
    for _ in range(int(rng.integers(4, 18))):
        x = values[int(rng.integers(max(0, len(values) - 3), len(values)))]
        values.append(step(b, x, values, rng))
    return b.finish([values[-1], *(v for v in values[1:-1] if rng.random() < 0.15)])


def step(b: GraphBuilder, x: Value, values: list[Value], rng: np.random.Generator) -> Value:
    shape, rank = x.type.shape, x.type.rank
    axis, last = int(rng.integers(rank)), shape[-1]
    extent = shape[axis]

    def weights(*dims: int) -> Value:
        return b.constant(rng.normal(size=dims).astype(np.float32) / 2)

    choice = int(rng.integers(13))
    if choice < 4:
        return b("transpose", x, perm=tuple(int(i) for i in rng.permutation(rank)))
    if choice == 4:
        same = [v for v in values if v.type == x.type]
        return b("add", b("tanh", x), same[int(rng.integers(len(same)))])
    if choice == 5 and isinstance(last, int):
        return b("add", x, weights(last))
    if choice == 6 and isinstance(last, int) and rank > 1:
        return b("matmul", x, weights(last, last))
    if choice == 7 and isinstance(last, int):
        return b("layer_norm", x, weights(last), weights(last))
    if choice == 8 and isinstance(extent, int):
        return b("softmax", x, axis=axis)
    if choice == 9 and isinstance(extent, int) and extent > 1:
        return b("slice", x, axis=axis, start=1, stop=extent)
    if choice == 10 and isinstance(extent, int):
        return b("sub", x, b("max", x, axes=(axis,), keepdims=True))
    if choice == 11:
        return b("concat", x, x, axis=axis)
    return b("reshape", x, shape=another_shape(shape, rng))


def another_shape(shape: tuple[Dim, ...], rng: np.random.Generator) -> tuple[Dim, ...]:
    """One axis split, two merged, or an axis of extent 1 more or less."""
    ways: list[tuple[Dim, ...]] = []
    for i, extent in enumerate(shape):
        if isinstance(extent, int):
            ways += [
                (*shape[:i], part, extent // part, *shape[i + 1 :]) for part in range(2, extent) if extent % part == 0
            ]
        if i + 1 < len(shape):
            ways.append((*shape[:i], extent * shape[i + 1], *shape[i + 2 :]))
        if extent == 1 and len(shape) > 1:
            ways.append((*shape[:i], *shape[i + 1 :]))
        ways.append((*shape[:i], 1, *shape[i:]))
    fitting = [way for way in ways if len(way) <= 6]
    return fitting[int(rng.integers(len(fitting)))]


def moved(graph: Graph) -> int:
    return sum(bytes_moved(graph, node) for node in graph.nodes if node.name == "transpose")


@pytest.mark.parametrize("seed", range(80))
def test_random_chains(seed: int) -> None:
    graph = random_graph(seed)
    plain, _ = PassPipeline.parse(CLEAN).run(graph, PassContext())
    sunk, _ = PassPipeline.parse(f"canonicalize,cse,sink-transposes,{CLEAN}").run(graph, PassContext())
    verify(sunk)
    check_equal(graph, sunk, Tolerance(1e-4, 1e-5), f"seed {seed}", seeds=(0,))
    assert moved(sunk) <= moved(plain)


def test_the_chains_hold_transposes_that_sink() -> None:
    applied = 0
    for seed in range(80):
        graph, _ = PassPipeline.parse("canonicalize,cse").run(random_graph(seed), PassContext())
        applied += sum(r.kind == "applied" for r in SinkTransposes().run(graph, PassContext()).remarks)
    assert applied > 5


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_layers_of_torch_move_nothing(batch_first: bool) -> None:
    torch = pytest.importorskip("torch")
    import mlec

    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=batch_first).eval()
    torch.nn.init.normal_(layer.self_attn.in_proj_bias)
    shape = ("n", 6, 16) if batch_first else (6, "n", 16)
    graph = mlec.lower(layer, input_shapes={"src": shape})
    assert moved(graph) > 0
    optimised, records = named_pipeline("O2").without("fuse", "layout").run(graph, PassContext())
    remarks = [r.message for record in records for r in record.remarks if r.kind == "applied"]
    assert any("moved through" in message for message in remarks)
    assert any("slice(columns of matmul" in message for message in remarks)
    assert moved(optimised) == 0
    assert not [node for node in optimised.nodes if node.name == "slice"]
