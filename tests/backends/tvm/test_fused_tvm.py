"""Bodies of fused nodes: every form that has one kernel, and forms that fall apart into several."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mlec.backends.tvm.backend import TVMBackend
from mlec.ir import Graph, GraphBuilder, Value, run_graph, tensor
from mlec.ir.dim import static_dims
from mlec.ir.op import Array
from mlec.runtime.executable import Executable
from mlec.target import Target

Body = Callable[[GraphBuilder, dict[str, Value]], Value]


def fused(shapes: dict[str, tuple[int | str, ...]], body: Body, constants: str = "") -> Graph:
    """A graph of one fused node; operands named in ``constants`` are constants."""
    rng = np.random.default_rng(0)
    b, inner = GraphBuilder(), GraphBuilder("body")
    operands = []
    for name, shape in shapes.items():
        kind = tensor("f32", shape)
        if name in constants:
            operands.append(b.constant(rng.normal(size=static_dims(shape)).astype(np.float32)))
        else:
            operands.append(b.input(name, kind))
    values = {name: inner.input(name, tensor("f32", shape)) for name, shape in shapes.items()}
    return b.finish([b("fused", *operands, body=inner.finish([body(inner, values)]))])


def layer(b: GraphBuilder, v: dict[str, Value]) -> Value:
    return b("gelu", b("add", b("matmul", v["x"], v["w"]), v["c"]))


def residual(b: GraphBuilder, v: dict[str, Value]) -> Value:
    return b("add", b("mul", b("add", b("matmul", v["x"], v["w"]), v["c"]), 0.5), b("relu", v["r"]))


def scaled_scores(b: GraphBuilder, v: dict[str, Value]) -> Value:
    turned = b("transpose", v["k"], perm=(0, 1, 3, 2))
    return b("add", b("mul", b("matmul", v["q"], turned), 0.25), v["m"])


def variance(b: GraphBuilder, v: dict[str, Value]) -> Value:
    centred = b("sub", v["x"], v["m"])
    return b("mean", b("mul", centred, centred), axes=(1,))


def root_of_sum(b: GraphBuilder, v: dict[str, Value]) -> Value:
    return b("div", v["s"], b("sqrt", b("sum", b("mul", v["x"], v["x"]), axes=(1,))))


def broadcast_sums(b: GraphBuilder, v: dict[str, Value]) -> Value:
    difference = b("sub", b("reshape", v["x"], shape=("n", 1, 20)), v["m"])
    return b("exp", b("neg", b("sum", b("mul", difference, difference), axes=(2,))))


def outer_sums(b: GraphBuilder, v: dict[str, Value]) -> Value:
    return b("max", b("mul", v["x"], v["m"]), axes=(0, 2))


def count_positive(b: GraphBuilder, v: dict[str, Value]) -> Value:
    return b("any", b("gt", v["x"], 1.5), axes=(1,))


def sines(b: GraphBuilder, v: dict[str, Value]) -> Value:
    return b("relu", b("sum", b("sin", v["x"]), axes=(1,)))


def convolution(b: GraphBuilder, v: dict[str, Value]) -> Value:
    y = b("conv", v["x"], v["w"], pads=(1, 1, 1, 1))
    return b("relu", b("add", b("add", y, v["c"]), v["r"]))


def pointwise(b: GraphBuilder, v: dict[str, Value]) -> Value:
    return b("relu", b("add", b("add", b("conv", v["x"], v["w"]), v["c"]), v["r"]))


def blocked_convolution(b: GraphBuilder, v: dict[str, Value]) -> Value:
    return b("relu", b("add", b("conv2d_nchwc", v["x"], v["w"], pads=(1, 1, 1, 1)), v["c"]))


def turned_convolution(b: GraphBuilder, v: dict[str, Value]) -> Value:
    x = b("transpose", v["x"], perm=(0, 1, 3, 4, 2))
    return b("relu", b("add", b("conv2d_nchwc", x, v["w"], pads=(1, 1, 1, 1)), v["c"]))


def normalised(b: GraphBuilder, v: dict[str, Value]) -> Value:
    return b("tanh", b("add", b("layer_norm", v["x"], v["s"], v["c"]), v["x"]))


def sharpened(b: GraphBuilder, v: dict[str, Value]) -> Value:
    return b("mul", b("softmax", b("mul", v["x"], 2.0)), v["x"])


def through_libm(b: GraphBuilder, v: dict[str, Value]) -> Value:
    return b("sin", b("add", b("matmul", v["x"], v["w"]), v["c"]))


def moves(b: GraphBuilder, v: dict[str, Value]) -> Value:
    joined = b("concat", b("relu", v["x"]), b("slice", v["x"], axis=1, start=2, stop=9), axis=1)
    return b("exp", b("transpose", b("pad", joined, before=(1, 0), after=(0, 2), value=1.0), perm=(1, 0)))


def two_products(b: GraphBuilder, v: dict[str, Value]) -> Value:
    return b("matmul", b("relu", b("matmul", v["x"], v["w"])), b("transpose", v["w"], perm=(1, 0)))


def comparison(b: GraphBuilder, v: dict[str, Value]) -> Value:
    return b("cast", b("gt", b("matmul", v["x"], v["w"]), v["c"]), dtype="i32")


X, W, C = ("n", 20), (20, 37), (37,)
CASES: dict[str, tuple[dict[str, tuple[int | str, ...]], Body, str, int]] = {
    "layer": ({"x": X, "w": W, "c": C}, layer, "wc", 1),
    "residual": ({"x": X, "w": W, "c": C, "r": ("n", 37)}, residual, "wc", 1),
    "three axes": ({"x": ("n", "t", 20), "w": W, "c": C, "r": ("t", 37)}, residual, "wc", 1),
    "two dynamic operands": ({"q": ("n", 2, "t", 8), "k": ("n", 2, 5, 8), "m": ("t", 5)}, scaled_scores, "", 1),
    "reduction after elementwise": ({"x": X, "m": ("n", 1)}, variance, "", 1),
    "reduction in the middle": ({"x": X, "s": ("n",)}, root_of_sum, "", 1),
    "distances": ({"x": X, "m": (5, 20)}, broadcast_sums, "m", 1),
    "sums over outer axes": ({"x": ("t", 3, 21), "m": (3, 1)}, outer_sums, "", 1),
    "any": ({"x": X}, count_positive, "", 1),
    "reduction of libm": ({"x": X}, sines, "", 2),
    "convolution": ({"x": ("n", 4, 9, 7), "w": (6, 4, 3, 3), "c": (6, 1, 1), "r": ("n", 6, 9, 7)}, convolution, "wc", 1),
    "pointwise": ({"x": ("n", 5, "t", 7), "w": (6, 5, 1, 1), "c": (6, 1, 1), "r": ("n", 6, "t", 7)}, pointwise, "wc", 1),
    "pointwise by row": ({"x": ("n", 5, "t", 7), "w": (6, 5, 1, 1), "c": ("t", 1), "r": (1, 6, 1, 1)}, pointwise, "wr", 1),
    "pointwise by column": ({"x": ("n", 5, "t", 7), "w": (6, 5, 1, 1), "c": (7,), "r": ()}, pointwise, "wc", 1),
    "pointwise of a column": ({"x": ("n", 5, 9, 1), "w": (6, 5, 1, 1), "c": (6, 1, 1), "r": ("n", 6, 9, 1)}, pointwise, "wc", 1),
    "blocked": ({"x": ("n", 2, 9, 7, 8), "w": (3, 2, 3, 8, 3, 16), "c": (1, 3, 1, 1, 16)}, blocked_convolution, "wc", 1),
    "turned": ({"x": ("n", 2, 8, 9, 11), "w": (3, 2, 3, 8, 3, 16), "c": (1, 3, 1, 1, 16)}, turned_convolution, "wc", 1),
    "turned before": ({"x": ("n", 2, 8, 9, 5), "w": (3, 2, 3, 8, 3, 16), "c": (1, 3, 1, 1, 16)}, turned_convolution, "wc", 2),
    "norm": ({"x": X, "s": (20,), "c": (20,)}, normalised, "sc", 1),
    "softmax": ({"x": ("n", 200)}, sharpened, "", 3),
    "softmax of few columns": ({"x": X}, sharpened, "", 1),
    "libm": ({"x": X, "w": W, "c": C}, through_libm, "wc", 2),
    "moves": ({"x": X}, moves, "", 1),
    "two products": ({"x": X, "w": W}, two_products, "w", 3),
    "comparison": ({"x": X, "w": W, "c": C}, comparison, "wc", 1),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bodies(case: str) -> None:
    shapes, body, constants, kernels = CASES[case]
    graph = fused(shapes, body, constants)
    module = TVMBackend().compile(graph, Target())
    assert len(module.program.kernels) == kernels, [note.strategy for note in module.notes]
    executable = Executable(module.program, module.objects, module.constants, num_threads=2)
    for n in (0, 1, 3, 8, 50):
        rng = np.random.default_rng(n)
        inputs = [_draw(rng, [{"n": n, "t": 4}.get(str(d), d) for d in v.type.shape]) for v in graph.inputs]
        (got,), (wanted,) = executable.run(inputs), run_graph(graph, inputs)
        assert got.dtype == wanted.dtype
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)


def _draw(rng: np.random.Generator, shape: list[int]) -> Array:
    return rng.normal(size=shape).astype(np.float32)


def test_body_with_symbols_of_its_own() -> None:
    inner = GraphBuilder("body")
    p = inner.input("p", tensor("f32", ("rows", 3)))
    body = inner.finish(
        [inner("concat", inner("exp", p), inner("iota", shape=("rows", 1), axis=0, dtype="f32"), axis=1)]
    )
    b = GraphBuilder()
    x = b.input("x", tensor("f32", ("n", 3)))
    graph = b.finish([b("fused", x, body=body), b("fused", b("concat", x, x, axis=0), body=body)])
    module = TVMBackend().compile(graph, Target())
    inputs = [np.arange(6, dtype=np.float32).reshape(2, 3)]
    got = Executable(module.program, module.objects, module.constants).run(inputs)
    for a, r in zip(got, run_graph(graph, inputs), strict=True):
        np.testing.assert_allclose(a, r, rtol=1e-6)


def test_packed_weights_replace_the_originals() -> None:
    module = TVMBackend().compile(fused({"x": X, "w": W, "c": C}, layer, "wc"), Target())
    assert len(module.constants) == 2
    assert [a.shape for a in module.constants.values() if a.ndim == 2] == []
