"""Elementwise semantics on special values, and loops over every kind of shape."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import pytest

import mlec.ops  # noqa: F401  (fills the table)
from mlec.backends.tvm.backend import TVMBackend
from mlec.ir import OPS, Graph, GraphBuilder, Trait, run_graph, tensor
from mlec.ir.dtype import DType
from mlec.ir.op import Array
from mlec.runtime.executable import Executable
from mlec.target import Target

SPECIAL = [
    np.nan,
    np.inf,
    -np.inf,
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1.5,
    2.5,
    -0.5,
    -1.5,
    -2.5,
    3.7,
    -3.7,
    1e-40,
    -1e-40,
    80.0,
    -80.0,
    1e30,
]
UNARY = [
    name
    for name, op in OPS.items()
    if op.has(Trait.ELEMENTWISE)
    and len(op.operands) == 1
    and name not in ("cast", "logical_not", "quantize", "dequantize")
]
OF_BITS = ["bitwise_and", "bitwise_or", "bitwise_xor", "left_shift", "right_shift"]
BINARY = [
    name
    for name, op in OPS.items()
    if op.has(Trait.ELEMENTWISE) and len(op.operands) == 2 and not name.startswith("logical") and name not in OF_BITS
]


def compiled(graph: Graph, threads: int = 1) -> Executable:
    module = TVMBackend().compile(graph, Target())
    return Executable(module.program, module.objects, module.constants, num_threads=threads)


def check(graph: Graph, inputs: Sequence[Array], rtol: float) -> None:
    for i, (got, wanted) in enumerate(zip(compiled(graph).run(inputs), run_graph(graph, inputs), strict=True)):
        node = graph.producer[graph.outputs[i]]
        assert got.dtype == wanted.dtype
        np.testing.assert_allclose(
            got.astype(np.float64),
            wanted.astype(np.float64),
            rtol=rtol,
            atol=rtol if node.name == "gelu" else 1e-37,  # 1 + erf cancels
            err_msg=f"{node.name} of {node.inputs}",
        )


@pytest.mark.parametrize(("dtype", "rtol"), [("f32", 1e-5), ("f64", 1e-13), ("f16", 2e-3), ("bf16", 1.6e-2)])
def test_unary_ops_on_special_values(dtype: str, rtol: float) -> None:
    kind = DType.of(dtype)
    values = np.asarray(SPECIAL * 3, kind.numpy)
    b = GraphBuilder()
    x = b.input("x", tensor(kind, ("n",)))
    attrs = {"clip": {"lo": -1.0, "hi": 2.0}}
    # Huge arguments of the circular functions differ between C libraries, subnormal 16-bit ones between roundings.
    skipped = {"sin", "cos", "tan"}
    graph = b.finish([b(name, x, **attrs.get(name, {})) for name in UNARY if name not in skipped])
    check(graph, [values], rtol)


@pytest.mark.parametrize(("dtype", "rtol"), [("f32", 1e-5), ("f64", 1e-13), ("f16", 2e-3)])
def test_binary_ops_on_special_values(dtype: str, rtol: float) -> None:
    kind = DType.of(dtype)
    values = np.asarray(SPECIAL, kind.numpy)
    b = GraphBuilder()
    x, y = b.input("x", tensor(kind, ("n", 1))), b.input("y", tensor(kind, (len(SPECIAL),)))
    graph = b.finish([b(name, x, y) for name in BINARY])
    check(graph, [values[:, None], values], rtol)


@pytest.mark.parametrize("dtype", ["i64", "i32", "i16", "i8", "u8"])
def test_integer_ops(dtype: str) -> None:
    kind = DType.of(dtype)
    limits = np.iinfo(kind.numpy)
    values = np.asarray(
        [0, 1, 2, 3, 7, limits.max, limits.min, limits.max - 1]
        + [limits.max - 2] * (limits.min == 0)
        + [-1, -2, -7] * (limits.min < 0),
        kind.numpy,
    )
    b = GraphBuilder()
    x, y = b.input("x", tensor(kind, ("n", 1))), b.input("y", tensor(kind, (len(values),)))
    binary = [b(name, x, y) for name in BINARY if name not in ("div", "pow", "atan2", "hypot")]
    bits = [b(name, x, y) for name in OF_BITS]
    shifts = [b(f"{way}_shift", x, b.constant(by, dtype=kind)) for way in ("left", "right") for by in (0, 3, 7, 100)]
    unary = [b(name, x) for name in ("neg", "abs", "sign", "relu")]
    check(b.finish([*binary, *bits, *shifts, *unary]), [values[:, None], values], 0)


def test_casts() -> None:
    b = GraphBuilder()
    names = ["f64", "f32", "f16", "bf16", "i64", "i32", "i16", "i8", "u8", "bool"]
    values = np.asarray([0, 1, 2, 100, 3.7, 0.2, 99.99])
    inputs = [b.input(name, tensor(name, ("n",))) for name in names]
    arrays = [values.astype(DType.of(name).numpy) for name in names]
    results = [b("cast", x, dtype=DType.of(name)) for x in inputs for name in names if str(x.type.dtype) != name]
    specials = b.input("specials", tensor("f32", (3,)))
    results.append(b("cast", specials, dtype=DType.BOOL))
    check(b.finish(results), [*arrays, np.asarray([np.nan, np.inf, -0.0], np.float32)], 0)


def test_conditions_do_not_believe_their_opposites() -> None:
    """TVM's simplifier takes ``not (x < y)`` for ``x >= y``; with NaN neither holds."""
    b = GraphBuilder()
    x, y = (b.input(name, tensor("f32", (3,))) for name in "xy")
    one, two, three = (b.constant(v, dtype=DType.F32) for v in (1.0, 2.0, 3.0))
    less = b("lt", x, y)
    body = GraphBuilder("body")
    p, q = (body.input(name, tensor("f32", (3,))) for name in "pq")
    inner = body("where", body("ge", p, q), body.constant(2.0, dtype=DType.F32), body.constant(3.0, dtype=DType.F32))
    fused = b(
        "fused", x, y, body=body.finish([body("where", body("lt", p, q), body.constant(1.0, dtype=DType.F32), inner)])
    )
    opposite = GraphBuilder("body")
    p, q = (opposite.input(name, tensor("f32", (3,))) for name in "pq")
    negated = b("fused", x, y, body=opposite.finish([opposite("logical_not", opposite("lt", p, q))]))
    graph = b.finish(
        [b("where", less, one, b("where", b("ge", x, y), two, three)), fused, b("logical_not", less), negated]
    )
    check(graph, [np.asarray([np.nan, 1, 2], np.float32), np.asarray([1, 2, 1], np.float32)], 0)


@pytest.mark.parametrize("n", [0, 1, 2, 5, 16, 33, 1000, 20000])
def test_every_extent(n: int) -> None:
    rng = np.random.default_rng(n)
    inputs = [rng.normal(size=(n, 37)).astype(np.float32), rng.normal(size=(n, 3, 5)), rng.random((n, 6)) < 0.5]
    for got, wanted in zip(_loops().run(inputs), run_graph(_loops_graph(), inputs), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-12)


@functools.cache
def _loops_graph() -> Graph:
    b = GraphBuilder()
    x, y = b.input("x", tensor("f32", ("n", 37))), b.input("y", tensor("f64", ("n", 3, 5)))
    z = b.input("z", tensor("bool", ("n", 6)))
    row = b.constant(np.arange(37, dtype=np.float32))
    column = b("slice", x, axis=1, start=3, stop=4)
    return b.finish([
        b("add", x, row), b("mul", x, column), b("tanh", x), b("concat", x, b("exp", x), column, axis=1),
        b("transpose", y, perm=(2, 0, 1)), b("concat", y, y, axis=0), b("pad", x, before=(0, 2), after=(0, 3), mode="edge"),
        b("reshape", b("transpose", y, perm=(0, 2, 1)), shape=("n", 15)), b("logical_not", z), b("flip", x, axes=(0, 1)),
        b("cast", z, dtype=DType.F32), b("slice", x, axis=1, start=0, stop=37, step=2), b("cast", column, dtype=DType.I64),
    ])  # fmt: skip


@functools.cache
def _loops() -> Executable:
    return compiled(_loops_graph(), threads=2)


def test_constants_inputs_and_repeats_as_outputs() -> None:
    b = GraphBuilder()
    x = b.input("x", tensor("f32", ("n", 3)))
    table = b.constant(np.arange(6, dtype=np.float32).reshape(2, 3))
    filled = b("broadcast_to", b.constant(2.5, dtype=DType.F32), shape=("n", 2))
    number = b.constant(1, dtype=DType.I64)
    y = b("relu", x)
    graph = b.finish(
        [x, y, y, table, b("transpose", table, perm=(1, 0)), filled, number, b("reshape", x, shape=(3, "n"))]
    )
    inputs = [np.asarray([[1, -2, 3], [4, 5, -6]], np.float32)]
    check_values(compiled(graph).run(inputs), run_graph(graph, inputs))


def check_values(got: Sequence[Array], wanted: Sequence[Array]) -> None:
    for a, r in zip(got, wanted, strict=True):
        assert a.dtype == r.dtype
        np.testing.assert_array_equal(a, r)


def test_scalars() -> None:
    b = GraphBuilder()
    x, y = b.input("x", tensor("f32", ())), b.input("y", tensor("f32", ("n",)))
    graph = b.finish([b("exp", x), b("add", x, y), b("reshape", x, shape=(1, 1)), b("broadcast_to", x, shape=("n", 2))])
    inputs = [np.asarray(0.5, np.float32), np.arange(4, dtype=np.float32)]
    for got, wanted in zip(compiled(graph).run(inputs), run_graph(graph, inputs), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6)
