"""Row programs: one kernel for chains of columns, products and results, whatever the number of rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import mlec.ops  # noqa: F401  (fills the table)
from mlec.backends.tvm.backend import TVMBackend
from mlec.backends.tvm.kernels.rows import VERTICAL
from mlec.ir import Graph, GraphBuilder, Value, parse_graph, run_graph, tensor
from mlec.ir.op import Array
from mlec.ops.rows import OVER_COLUMNS, rows_of
from mlec.passes.fusion import FuseOperators
from mlec.pipeline import PassPipeline
from mlec.runtime.executable import Executable
from mlec.target import Target
from tests.backends.tvm.kernel_helpers import by_threads

Body = Callable[[GraphBuilder, Value, str], list[Value]]
ROWS = (0, 1, 2, 5, 16, 33, 1000)


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape)


def array(b: GraphBuilder, values: Array, dtype: str) -> Value:
    return b.constant(values.astype({"f32": np.float32, "f64": np.float64}[dtype]))


def logistic(b: GraphBuilder, x: Value, dtype: str) -> list[Value]:
    scaled = b("div", b("sub", x, array(b, normal(30), dtype)), array(b, np.abs(normal(30, seed=1)) + 0.1, dtype))
    margin = b("add", b("matmul", scaled, array(b, normal(30, 1), dtype)), array(b, normal(1), dtype))
    flat = b("reshape", margin, shape=x.type.shape[:1])
    p = b("sigmoid", flat)
    columns = [b("reshape", v, shape=(x.type.shape[0], 1)) for v in (b("sub", 1.0, p), p)]
    return [b("cast", b("gt", flat, 0.0), dtype="i64"), b("concat", *columns, axis=1), flat]


def polynomial(b: GraphBuilder, x: Value, dtype: str) -> list[Value]:
    first, second = (b.constant(picks) for picks in np.triu_indices(5))
    ones = b("broadcast_to", array(b, np.ones((1, 1)), dtype), shape=(x.type.shape[0], 1))
    products = b("mul", b("gather", x, first, axis=1), b("gather", x, second, axis=1))
    return [b("matmul", b("concat", ones, x, products, axis=1), array(b, normal(21, 3), dtype))]


def several_products(b: GraphBuilder, x: Value, dtype: str) -> list[Value]:
    hidden = b("relu", b("add", b("matmul", x, array(b, normal(9, 8), dtype)), array(b, normal(8), dtype)))
    return [hidden, b("tanh", b("matmul", hidden, array(b, normal(8, 2), dtype)))]


def multinomial(b: GraphBuilder, x: Value, dtype: str) -> list[Value]:
    scores = b("add", b("matmul", b("sub", x, array(b, normal(19), dtype)), array(b, normal(19, 11), dtype)), 0.5)
    log_scores = b("sub", scores, b("logsumexp", scores, axes=(1,), keepdims=True))
    return [b("argmax", scores, axis=1), b("softmax", scores, axis=-1), b("log_softmax", scores, axis=1), log_scores]


def reduced(b: GraphBuilder, x: Value, dtype: str) -> list[Value]:
    norm = b("sqrt", b("sum", b("mul", x, x), axes=(1,), keepdims=True))
    ends = [b(op, x, axes=(1,), keepdims=True) for op in ("min", "max", "mean")]
    return [b("div", x, norm), b("concat", *ends, axis=1), b("argmin", x, axis=1)]


def imputed(b: GraphBuilder, x: Value, dtype: str) -> list[Value]:
    missing = b("isnan", x)
    filled = b("where", missing, array(b, normal(12), dtype), x)
    tail = b("slice", filled, axis=1, start=7, stop=12)
    return [missing, b("concat", tail, b("cast", missing, dtype=dtype), axis=1), b("maximum", tail, 0.5)]


CASES: dict[str, tuple[Body, int]] = {
    "logistic": (logistic, 30),
    "polynomial": (polynomial, 5),
    "several products": (several_products, 9),
    "imputed": (imputed, 12),
    "multinomial": (multinomial, 19),
    "reduced": (reduced, 6),
}


def compiled(case: str, dtype: str, target: Target, rows: int | str = "n") -> tuple[Graph, Executable, int]:
    body, features = CASES[case]
    b = GraphBuilder()
    x = b.input("x", tensor(dtype, (rows, features)))
    graph = b.finish(body(b, x, dtype))
    fused, _ = PassPipeline([FuseOperators()]).run(graph)
    module = TVMBackend().compile(fused, target)
    executable = Executable(module.program, module.objects, module.constants, num_threads=1)
    return graph, executable, len(module.program.kernels)


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("case", CASES)
def test_one_kernel_that_computes_the_graph(case: str, dtype: str) -> None:
    graph, executable, kernels = compiled(case, dtype, Target())
    assert kernels == (3 if case == "reduced" else 1)  # what has nothing but an input in common is not one program
    for n in ROWS:
        x = normal(n, CASES[case][1], seed=n).astype({"f32": np.float32, "f64": np.float64}[dtype])
        x[n // 3 :: 7, ::4] = np.nan
        x[n // 2 :: 11, 1] = -np.inf
        x[n // 5 :: 13, 2] = np.inf
        x[n // 4 :: 17, :3] = -0.0
        x[n // 6 :: 19] *= np.finfo(x.dtype).tiny
        with np.errstate(all="ignore"):
            want = run_graph(graph, [x])
        for ours, theirs in zip(executable.run([x]), want, strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_allclose(ours, theirs, rtol=2e-5 if dtype == "f32" else 1e-12, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "rows"), [(case, 5 + 14 * i) for i, case in enumerate(CASES, 1)] + [("imputed", 1000)]
)
def test_a_number_of_rows_that_is_known(case: str, rows: int) -> None:
    graph, executable, kernels = compiled(case, "f32", Target(), rows=rows)
    assert kernels == (3 if case == "reduced" else 1)
    x = normal(rows, CASES[case][1]).astype(np.float32)
    for ours, theirs in zip(executable.run([x]), run_graph(graph, [x]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-5)


def test_rows_that_are_a_multiple_of_an_extent() -> None:
    graph = parse_graph("""
        graph @g(%x: f32[n, 12]) -> (f32[3*n, 1], i64[3*n]) {
          %rows = reshape(%x) {shape = [3*n, 4]} : f32[3*n, 4]
          %w = constant {value = 0.5} : f32[4, 3]
          %scores = matmul(%rows, %w) : f32[3*n, 3]
          %best = max(%scores) {axes = [1], keepdims = true} : f32[3*n, 1]
          %where = argmax(%rows) {axis = 1, keepdims = false} : i64[3*n]
          return %best, %where
        }""")
    fused, _ = PassPipeline([FuseOperators()]).run(graph)
    module = TVMBackend().compile(fused, Target())
    assert any(note.strategy.startswith("row program") for note in module.notes)
    for rows in (0, 1, 7, 200):
        x = normal(rows, 12).astype(np.float32)
        got = Executable(module.program, module.objects, module.constants).run([x])
        for ours, theirs in zip(got, run_graph(graph, [x]), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_what_has_as_many_rows_by_chance_is_none_of_them() -> None:
    """As many weights as rows, a bias of as many columns as rows, and a product of rows with themselves."""
    b = GraphBuilder()
    x = b.input("x", tensor("f32", (16, 16)))
    w = b("tanh", b("concat", x, b("neg", x), axis=1))
    hidden = b("add", b("matmul", x, array(b, normal(16, 16), "f32")), array(b, normal(16), "f32"))
    both = b("matmul", b("slice", w, axis=1, start=0, stop=16), b("slice", w, axis=1, start=16, stop=32))
    along_rows = b("softmax", b("gather", hidden, b.constant(np.arange(16)[::-1].copy()), axis=0), axis=0)
    graph = b.finish([b("concat", hidden, both, axis=1), b("add", along_rows, b("max", x, axes=(1,)))])
    fused, _ = PassPipeline([FuseOperators()]).run(graph)
    module = TVMBackend().compile(fused, Target())
    inputs = [normal(16, 16, seed=1).astype(np.float32)]
    got = Executable(module.program, module.objects, module.constants).run(inputs)
    for ours, theirs in zip(got, run_graph(graph, inputs), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_row_has_the_same_bits_in_every_batch_and_for_any_number_of_threads(case: str) -> None:
    _, one, _ = compiled(case, "f64", Target())
    x = normal(20_000, CASES[case][1])

    def run(threads: int) -> list[Array]:
        one.num_threads = threads
        return one.run([x])

    results = by_threads(run)
    whole = results.pop(1)
    for several in results.values():
        for ours, theirs in zip(several, whole, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    for rows in (1, 2, 7, 12, 17, 27):  # one by one, in blocks of one vector, and of two
        for ours, theirs in zip(one.run([x[:rows]]), whole, strict=True):
            np.testing.assert_array_equal(ours, theirs[:rows])


def test_columns_of_integers() -> None:
    b = GraphBuilder()
    x = b.input("x", tensor("i64", ("n", 3)))
    doubled = b("mul", x, 2)
    graph = b.finish([b("concat", doubled, b("cast", b("gt", doubled, 4), dtype="i64"), axis=1)])
    fused, _ = PassPipeline([FuseOperators()]).run(graph)
    module = TVMBackend().compile(fused, Target())
    assert len(module.program.kernels) == 1
    inputs = [np.arange(111).reshape(37, 3)]
    got = Executable(module.program, module.objects, module.constants).run(inputs)
    np.testing.assert_array_equal(got[0], run_graph(graph, inputs)[0])


def test_a_processor_with_fewer_registers() -> None:
    graph, executable, kernels = compiled("logistic", "f64", Target.parse("cpu:x86-64-v3"))
    assert kernels == 1
    x = normal(37, 30)
    for ours, theirs in zip(executable.run([x]), run_graph(graph, [x]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_wide_rows_and_functions_of_the_c_library_stay_out() -> None:
    b = GraphBuilder()
    x = b.input("x", tensor("f32", ("n", 4)))
    wide = b.input("wide", tensor("f32", ("n", 500)))
    product = b("matmul", b("sin", x), array(b, normal(4, 2), "f32"))
    graph = b.finish([b("relu", product), b("matmul", wide, array(b, normal(500, 2), "f32"))])
    fused, _ = PassPipeline([FuseOperators()]).run(graph)
    assert [node.name for node in fused.nodes if not node.is_constant] == ["sin", "fused", "matmul"]


def test_what_mixes_columns_is_the_same_for_the_rule_and_the_kernels() -> None:
    assert set(VERTICAL) == OVER_COLUMNS


def test_16_bit_floats_stay_out() -> None:
    b = GraphBuilder()
    x = b.input("x", tensor("f16", ("n", 4)))
    graph = b.finish([b("concat", b("relu", x), b("neg", x), axis=1)])
    assert all(rows_of(node) is None for node in graph.nodes)


def test_a_product_with_one_number_everywhere() -> None:
    graph = parse_graph("""
        graph @g(%x: f32[n, 5]) -> (f32[n, 1], f32[n, 2]) {
          %w = constant {value = 0.5} : f32[5, 1]
          %doubled = add(%x, %x) : f32[n, 5]
          %sum = matmul(%doubled, %w) : f32[n, 1]
          %both = concat(%sum, %sum) {axis = 1} : f32[n, 2]
          return %sum, %both
        }""")
    fused, _ = PassPipeline([FuseOperators()]).run(graph)
    module = TVMBackend().compile(fused, Target())
    (note,) = module.notes
    assert note.strategy.startswith("row program")
    x = normal(37, 5).astype(np.float32)
    got = Executable(module.program, module.objects, module.constants).run([x])
    for ours, theirs in zip(got, run_graph(graph, [x]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("columns", "by_rows"), [(1, True), (10, False)])
def test_a_product_and_its_bias_alone_are_left_to_the_tiles(columns: int, by_rows: bool) -> None:
    b = GraphBuilder()
    x = b.input("x", tensor("f32", ("n", 30)))
    product = b("matmul", x, array(b, normal(30, columns), "f32"))
    fused, _ = PassPipeline([FuseOperators()]).run(b.finish([b("add", product, array(b, normal(columns), "f32"))]))
    (note,) = TVMBackend().compile(fused, Target()).notes
    assert note.strategy.startswith("row program" if by_rows else "gemm")
