"""Slices, joins and lookups inside of kernels: one kernel, and the results of several."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mlec.backends.base import CompiledModule
from mlec.backends.tvm.backend import TVMBackend
from mlec.ir import Graph, GraphBuilder, Value, run_graph, tensor
from mlec.ir.op import Array
from mlec.passes.fusion import FuseOperators
from mlec.pipeline import PassContext
from mlec.runtime.executable import Executable
from mlec.target import Target

Make = Callable[[GraphBuilder], Value]
RNG = np.random.default_rng(0)


def numbers(*shape: int, dtype: str = "float32") -> Array:
    return RNG.normal(size=shape).astype(dtype)


def rotary(width: int, first: int) -> Make:
    """x * cos + join(-right, left) * sin, cut at ``first``."""

    def make(b: GraphBuilder) -> Value:
        x = b.input("x", tensor("f32", ("n", 5, 3, width)))
        cos, sin = (b.input(name, tensor("f32", ("n", 5, 1, width))) for name in ("cos", "sin"))
        left = b("slice", x, axis=3, start=0, stop=width - first, step=1)
        right = b("slice", x, axis=3, start=width - first, stop=width, step=1)
        half = b("concat", b("neg", right), left, axis=3)
        return b("add", b("mul", x, cos), b("mul", half, sin))

    return make


def joined(b: GraphBuilder) -> Value:
    """Two joins that are cut at different places, beside a line for all rows."""
    x, y = (b.input(name, tensor("f32", ("n", 2, 33))) for name in ("x", "y"))
    part = b("slice", x, axis=2, start=5, stop=18, step=1)
    first = b("concat", b("relu", b("slice", x, axis=2, start=0, stop=20, step=1)), b("neg", y), part, axis=2)
    second = b("concat", y, x, axis=2)
    return b("mul", b("add", b("exp", first), second), b.constant(numbers(66)))


def gated(b: GraphBuilder) -> Value:
    x = b.input("x", tensor("f32", ("n", 7, 300)))
    first, second = (b("slice", x, axis=2, start=start, stop=start + 150, step=1) for start in (0, 150))
    return b("mul", first, b("sigmoid", second))


def ids(b: GraphBuilder, name: str) -> Value:
    return b.input(name, tensor("i64", ("n", 9)))


def embedding_sum(b: GraphBuilder) -> Value:
    words, places = b.constant(numbers(40, 37)), b.constant(numbers(9, 37))
    return b("add", b("gather", words, ids(b, "x"), axis=0), places)


def embedding_norm(dtype: str, op: str, tail: bool = False) -> Make:
    def make(b: GraphBuilder) -> Value:
        words, kinds = b.constant(numbers(40, 37, dtype=dtype)), b.constant(numbers(2, 37, dtype=dtype))
        total = b("add", b("gather", words, ids(b, "x"), axis=0), b("gather", kinds, ids(b, "y"), axis=0))
        factors = [b.constant(numbers(37, dtype=dtype)) for _ in range(2 if op == "layer_norm" else 1)]
        made = b(op, b("add", total, b.constant(numbers(1, 9, 37, dtype=dtype))), *factors)
        return b("relu", b("mul", made, factors[0])) if tail else made

    return make


def sum_of_embeddings(b: GraphBuilder) -> Value:
    return b("sum", b("gather", b.constant(numbers(40, 37)), ids(b, "x"), axis=0), axes=(1,))


def optimised(make: Make) -> tuple[Graph, Graph]:
    b = GraphBuilder()
    graph = b.finish([make(b)])
    return graph, FuseOperators().run(graph, PassContext(TVMBackend().facts(Target()))).graph


def inputs_of(graph: Graph, rows: int) -> list[Array]:
    rng = np.random.default_rng(rows)
    shapes = [(v.type, tuple(rows if not isinstance(d, int) else d for d in v.type.shape)) for v in graph.inputs]
    return [
        rng.normal(size=shape).astype(np.float32) if kind.dtype.is_float else rng.integers(0, 2, shape)
        for kind, shape in shapes
    ]


def compiled(graph: Graph) -> CompiledModule:
    return TVMBackend().compile(graph, Target())


@pytest.mark.parametrize(
    "make",
    [
        rotary(64, 32), rotary(10, 5), rotary(37, 20), joined, gated, embedding_sum, embedding_norm("float32", "layer_norm"),
        embedding_norm("float16", "layer_norm"), embedding_norm("float32", "rms_norm", tail=True), sum_of_embeddings,
    ],
    ids=["rotary", "rotary of 10", "rotary in 20 and 17", "joins", "gate", "sum", "norm", "norm of f16", "rms norm, tail", "bag"],
)  # fmt: skip
def test_one_kernel_gives_the_results_of_several(make: Make) -> None:
    graph, fused = optimised(make)
    several, one = compiled(graph), compiled(fused)
    assert len(one.program.kernels) == 1, [note.strategy for note in one.notes]
    apart = Executable(several.program, several.objects, several.constants, num_threads=1)
    models = [Executable(one.program, one.objects, one.constants, num_threads=threads) for threads in (1, 2)]
    for rows in (1, 0, 3, 200):
        given = inputs_of(graph, rows)
        (got,), (wanted,) = models[0].run(given), apart.run(given)
        # A product and a sum in one kernel are rounded once.
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(got.astype(float), run_graph(graph, given)[0].astype(float), rtol=1e-2, atol=1e-2)
        assert models[1].run(given)[0].tobytes() == got.tobytes()


def turned(b: GraphBuilder) -> Value:
    """Neighbours of what the norm reads are none in x."""
    x = b.input("x", tensor("f32", (37, "n")))
    return b("layer_norm", b("exp", b("transpose", x, perm=(1, 0))), b.constant(numbers(37)), b.constant(numbers(37)))


def of_two_axes(b: GraphBuilder) -> Value:
    x = b.input("x", tensor("f32", ("n", 5, 7)))
    return b("layer_norm", b("relu", x), b.constant(numbers(5, 7)), b.constant(numbers(5, 7)), axis=1)


def other_result(b: GraphBuilder) -> Value:
    x = b.input("x", tensor("f32", ("n", 37)))
    return b("gt", b("rms_norm", b("exp", x), b.constant(numbers(37))), 0.5)


@pytest.mark.parametrize("make", [turned, of_two_axes, other_result])
def test_norms_that_cannot_compute_what_they_read(make: Make) -> None:
    """All in one body, as a text may have it."""
    graph, _ = optimised(make)
    b, body = GraphBuilder(), GraphBuilder("body")
    values = {v: body.input(v.hint, v.type) for v in graph.inputs}
    operands = [b.input(v.hint, v.type) for v in graph.inputs]
    for node in graph.nodes:
        if node.is_constant:
            array = graph.constant_value(node.output)
            assert array is not None
            if array.ndim == 0:
                values[node.output] = body.copy_node(node)[0]
                continue
            operands.append(b.constant(array))
            values[node.output] = body.input("c", node.output.type)
        else:
            values[node.output] = body.copy_node(node, [values[v] for v in node.inputs])[0]
    fused = b.finish([b("fused", *operands, body=body.finish([values[v] for v in graph.outputs]))])
    module = compiled(fused)
    given = [
        np.random.default_rng(3)
        .normal(size=[4 if not isinstance(d, int) else d for d in v.type.shape])
        .astype(np.float32)
        for v in graph.inputs
    ]
    (got,) = Executable(module.program, module.objects, module.constants, num_threads=1).run(given)
    np.testing.assert_allclose(got, run_graph(graph, given)[0], rtol=1e-5, atol=1e-5)
