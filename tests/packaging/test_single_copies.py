"""Weights of 8 bits that kernels read in another order are stored in that one alone."""

from __future__ import annotations

import numpy as np

from mlec.backends.tvm.backend import TVMBackend
from mlec.ir import DType, GraphBuilder, parse_graph, print_graph, run_graph, tensor
from mlec.packaging.single_copies import unpacked, with_single_copies
from mlec.target import Target


def test_products_and_convolutions() -> None:
    rng = np.random.default_rng(0)

    def weights(*shape: int) -> np.ndarray:
        return rng.integers(-128, 128, shape).astype(np.int8)

    b = GraphBuilder("net")
    x = b.input("x", tensor(DType.U8, ("n", 6, 6, 8)))
    h = b("conv_int8", x, b.constant(weights(3, 3, 8, 20), "w"), pads=(1, 1, 1, 1), zero_point=3)
    h = b("quantize", b("cast", h, dtype=DType.F32), scale=300.0, zero_point=128)
    g = b("conv_int8", h, b.constant(weights(2, 3, 10, 34), "v"), groups=2, dilations=(1, 2))
    flat = b("reshape", b("quantize", b("cast", g, dtype=DType.F32), scale=300.0), shape=("n", 5 * 2 * 34))
    graph = b.finish([b("matmul_int8", flat, b.constant(weights(340, 7), "u"))])

    module = TVMBackend().compile(graph, Target())
    tensors = {**graph.constants, **module.constants}
    slim, left = with_single_copies(graph, tensors, set(module.program.constants))
    assert left.keys() == module.constants.keys(), "all that is left is what kernels read"
    again = parse_graph(print_graph(slim), left)
    images = rng.integers(0, 256, (3, 6, 6, 8)).astype(np.uint8)
    wanted = run_graph(graph, [images])[0]
    np.testing.assert_array_equal(run_graph(again, [images])[0], wanted)
    back = unpacked(again)
    assert not any(node.name == "unpack_int8" for node in back.nodes)
    assert sorted(a.shape for a in back.constants.values()) == sorted(a.shape for a in graph.constants.values())
    np.testing.assert_array_equal(run_graph(back, [images])[0], wanted)


def test_other_weights_stay() -> None:
    b = GraphBuilder("net")
    x = b.input("x", tensor(DType.U8, ("n", 8)))
    w = np.ones((8, 16), np.int8)
    graph = b.finish([b("matmul_int8", x, b.constant(w, "w"))])
    other = np.zeros((1, 1, 12, 64), np.int8)
    same, left = with_single_copies(graph, {"w": w, "w.quads1": other}, {"w.quads1"})
    assert same is graph
    assert left.keys() == {"w", "w.quads1"}
    assert unpacked(graph) is graph
