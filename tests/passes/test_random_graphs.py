"""Random graphs through every pipeline, the reference interpreter before against after."""

from __future__ import annotations

import numpy as np
import pytest

import mlec.ops
from mlec.ir import DType, Graph, GraphBuilder, Trait, Value, tensor, verify
from mlec.ir.op import OPS
from mlec.passes.pipelines import named_pipeline
from mlec.pipeline import EXACT, PassContext, TargetFacts
from mlec.tolerance import check_equal

assert mlec.ops.OPS
UNARY = sorted(
    n
    for n, op in OPS.items()
    if op.has(Trait.ELEMENTWISE)
    and len(op.operands) == 1
    and n not in ("cast", "logical_not", "quantize", "dequantize")
)
SAFE_UNARY = [
    n for n in UNARY if n not in ("log", "log1p", "sqrt", "rsqrt", "tan", "exp", "expm1", "isnan", "isinf", "isfinite")
]
BINARY = ["add", "sub", "mul", "maximum", "minimum"]


def random_graph(seed: int) -> Graph:
    """A connected chain of 3 to 25 ops on images and rows, with shared values, constants and neutral elements."""
    rng = np.random.default_rng(seed)
    b = GraphBuilder(f"random{seed}")
    image = rng.random() < 0.4
    x = b.input("x", tensor(DType.F32, ("n", 8, 6, 6) if image else ("n", 8)))
    values: list[Value] = [x]
    for _ in range(int(rng.integers(3, 26))):
        value = values[int(rng.integers(max(0, len(values) - 4), len(values)))]
        values.append(step(b, value, values, rng))
    outputs = [values[-1], *(v for v in values[1:-1] if rng.random() < 0.1)]
    return b.finish(outputs)


def step(b: GraphBuilder, value: Value, values: list[Value], rng: np.random.Generator) -> Value:
    shape, rank = value.type.shape, value.type.rank
    channels = shape[1]
    assert isinstance(channels, int)

    def weights(*dims: int) -> Value:
        return b.constant((rng.normal(size=dims) / np.sqrt(max(1, np.prod(dims[1:])))).astype(np.float32), "w")

    choice = int(rng.integers(10))
    if choice <= 2:
        return b(str(rng.choice(SAFE_UNARY)), value)
    if choice <= 4:
        same = [v for v in values if v.type == value.type]
        other = same[int(rng.integers(len(same)))] if rng.random() < 0.6 else float(rng.choice([0.0, 1.0, 0.5]))
        return b(str(rng.choice(BINARY)), value, other)
    if choice == 5 and rank == 2:
        return b("add", b("matmul", value, weights(channels, int(rng.choice([1, 4, 8, 20])))), 0.1)
    if choice == 5:
        out = int(rng.choice([4, 8, 16]))
        return b("conv", value, weights(out, channels, 3, 3), pads=(1, 1, 1, 1))
    if choice == 6 and channels > 1:
        return b(
            "batch_norm",
            value,
            weights(channels),
            weights(channels),
            weights(channels),
            b.constant(np.full(channels, 0.7, np.float32)),
        )
    if choice == 7:
        return b("softmax", value, axis=1)
    if choice == 8 and rank == 4:
        return b("max_pool", value, kernel=(2, 2), strides=(1, 1), pads=(0, 0, 1, 1))
    if choice == 9 and rank == 4:
        return b("mean", value, axes=(2, 3))
    return b("transpose", b("transpose", value, perm=[1, 0, *range(2, rank)]), perm=[1, 0, *range(2, rank)])


@pytest.mark.parametrize("seed", range(60))
def test_optimised_graphs_compute_the_same(seed: int) -> None:
    graph = random_graph(seed)
    verify(graph)
    for level in ("O1", "O2", "O3"):
        pipeline = named_pipeline(level)
        optimised, _ = pipeline.run(graph, PassContext(TargetFacts(vector_bytes=16 << (seed % 3))))
        tolerance = EXACT
        for p in pipeline:
            tolerance = tolerance.then(p.preserves)
        # Sums are taken in another order once weights are packed: a few ulp more than the passes themselves declare.
        check_equal(
            graph,
            optimised,
            tolerance.then(type(tolerance)(rtol=1e-4, atol=1e-5)),
            f"{level} on seed {seed}",
            seeds=(0,),
        )


@pytest.mark.parametrize("seed", range(60, 75))
def test_each_pass_keeps_what_it_declares(seed: int) -> None:
    named_pipeline("O3").verified("numeric").run(
        random_graph(seed), PassContext(TargetFacts(vector_bytes=16 << (seed % 3)))
    )
