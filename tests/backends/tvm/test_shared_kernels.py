"""Nodes that differ in nothing but their operands share one kernel's code under names of their own."""

from __future__ import annotations

import numpy as np

from mlec.backends.tvm.backend import TVMBackend
from mlec.backends.tvm.lowering import Lowering
from mlec.backends.tvm.target import TargetInfo
from mlec.ir import DType, Graph, GraphBuilder, Value, run_graph, tensor
from mlec.ops.tree import sample_ensemble
from mlec.runtime.executable import Executable
from mlec.target import Target


def aliases(graph: Graph) -> dict[str, str]:
    return dict(Lowering(graph, TargetInfo.host()).run().aliases)


def run_and_compare(graph: Graph, *shape: int) -> Executable:
    module = TVMBackend().compile(graph, Target())
    executable = Executable(module.program, module.objects, module.constants)
    inputs = [np.random.default_rng(0).normal(size=shape).astype(np.float32)]
    for got, wanted in zip(executable.run(inputs), run_graph(graph, inputs), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    return executable


def test_repeated_layers_are_compiled_once() -> None:
    rng = np.random.default_rng(0)
    b = GraphBuilder()
    h = b.input("x", tensor("f32", ("n", 16)))
    for _ in range(3):
        w, c = rng.normal(size=(16, 16)).astype(np.float32) / 4, rng.normal(size=16).astype(np.float32)
        body = GraphBuilder("body")
        p, q, r = (body.input(k, tensor("f32", s)) for k, s in (("p", ("n", 16)), ("q", (16, 16)), ("r", (16,))))
        layer = body.finish([body("tanh", body("add", body("matmul", p, q), r))])
        h = b("fused", h, b.constant(w), b.constant(c), body=layer)
        h = b("matmul", h, b("transpose", b("matmul", b("transpose", h, perm=(1, 0)), h), perm=(1, 0)))
    graph = b.finish([h])
    found = aliases(graph)
    assert len(set(found.values())) == len(found) // 2 > 1
    executable = run_and_compare(graph, 5, 16)
    inputs = [np.zeros((2, 16), np.float32)]
    assert set(executable.time_kernels(inputs, 1)) == {kernel.symbol for kernel in executable.program.kernels}


def test_what_a_kernel_depends_on_keeps_it_apart() -> None:
    b = GraphBuilder()
    x = b.input("x", tensor("f32", ("n", 4)))
    y, z = b("exp", x), b("tanh", x)
    results: list[Value] = [
        b("mul", x, 2.0), b("mul", x, 3.0), b("mul", x, -0.0), b("mul", x, 0.0), b("add", y, y), b("add", y, z),
        b("sum", x, axes=(1,)), b("sum", x, axes=(0,)), b("clip", x, lo=0.0), b("clip", x, lo=-1.0),
    ]  # fmt: skip
    graph = b.finish(results)
    assert aliases(graph) == {}
    run_and_compare(graph, 3, 4)


def test_zero_points_are_in_packed_weights() -> None:
    """So kernels with different ones are the same, in a fused body as well; not where weights are computed."""
    rng = np.random.default_rng(0)
    b = GraphBuilder()
    x = b.input("x", tensor("f32", ("n", 16)))
    eight = b("quantize", x, scale=0.02, zero_point=128)
    computed = b("quantize", b("matmul", b("transpose", x, perm=(1, 0)), x), scale=0.1, dtype=DType.I8)
    results: list[Value] = []
    for zero_point in (3, 200):
        w = b.constant(rng.integers(-127, 128, (16, 16)).astype(np.int8))
        body = GraphBuilder("body")
        p, q = body.input("p", tensor("u8", ("n", 16))), body.input("q", tensor("i8", (16, 16)))
        sums = body("cast", body("matmul_int8", p, q, zero_point=zero_point), dtype=DType.F32)
        results.append(b("fused", eight, w, body=body.finish([body("neg", sums)])))
        results.append(b("cast", b("matmul_int8", eight, w, zero_point=zero_point), dtype=DType.F32))
        results.append(b("cast", b("matmul_int8", eight, computed, zero_point=zero_point), dtype=DType.F32))
    graph = b.finish(results)
    shared = [symbol for symbol in aliases(graph) if "matmul_int8" in symbol]
    assert len(shared) == 2
    run_and_compare(graph, 5, 16)


def test_ensembles_of_different_trees_are_different_kernels() -> None:
    rng = np.random.default_rng(1)
    first, second = (sample_ensemble(rng, "float32") for _ in range(2))
    b = GraphBuilder()
    x = b.input("x", tensor("f32", ("n", 4)))
    results = [
        b("tree_ensemble", x, *(b.constant(a) for a in arrays), compare="le") for arrays in (first, second, first)
    ]
    graph = b.finish(results)
    assert all(op.startswith("tree_ensemble") for op in aliases(graph))
    assert len(aliases(graph)) == 1
    run_and_compare(graph, 9, 4)


def test_a_transposition_made_before_is_not_made_again() -> None:
    b = GraphBuilder()
    x = b.input("x", tensor("f32", ("n", 3, 4)))
    turned = b("transpose", x, perm=(0, 2, 1))
    graph = b.finish(
        [b("exp", turned), b("exp", b("relu", turned)), b("exp", b("transpose", b("neg", x), perm=(0, 2, 1)))]
    )
    run_and_compare(graph, 3, 3, 4)
