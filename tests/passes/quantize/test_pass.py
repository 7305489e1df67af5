"""What the pass decides and writes, on graphs made here: the interpreter runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from mlec.errors import UsageError
from mlec.ir import DType, Graph, GraphBuilder, Value, run_graph, tensor, verify
from mlec.ir.op import Array
from mlec.passes.quantize import QuantizeInt8
from mlec.passes.quantize.emit import emit
from mlec.passes.quantize.layers import find_layers
from mlec.passes.quantize.numbers import Affine
from mlec.passes.quantize.plans import plan_of
from mlec.passes.quantize.statistics import MOST_BYTES, parts_of
from mlec.pipeline import PassContext, PassPipeline, PassResult, Tolerance

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(200, 8)).astype(np.float32)


def weights(*shape: int) -> Array:
    """The same numbers whichever tests ran before."""
    return (np.random.default_rng(shape).normal(size=shape) / np.sqrt(np.prod(shape[:-1]))).astype(np.float32)


def built(build: Callable[[GraphBuilder, Value], Value], *shape: int | str) -> Graph:
    b = GraphBuilder("net")
    x = b.input("x", tensor(DType.F32, shape))
    return b.finish([build(b, x)])


def names(graph: Graph) -> list[str]:
    return [node.name for node in graph.compute_nodes]


def distance(graph: Graph, other: Graph, inputs: Sequence[Array]) -> float:
    """Largest error relative to the largest result."""
    wanted, got = run_graph(graph, inputs)[0], run_graph(other, inputs)[0]
    return float(np.abs(wanted - got).max() / np.abs(wanted).max())


def quantized(graph: Graph, data: Array, **options: object) -> PassResult:
    result = QuantizeInt8(calibration=data, **options).run(graph, PassContext())  # type: ignore[arg-type]
    verify(result.graph)
    return result


@pytest.mark.parametrize(("method", "bound"), [("mse", 0.05), ("minmax", 0.05), ("percentile", 0.05), ("entropy", 0.2)])
def test_every_method_keeps_a_network(method: str, bound: float) -> None:
    graph = built(
        lambda b, x: b("matmul", b("relu", b("matmul", x, b.constant(weights(8, 32)))), b.constant(weights(32, 4))),
        "n",
        8,
    )
    result = quantized(graph, ROWS, method=method)
    assert names(result.graph).count("matmul_int8") == 2
    assert distance(graph, result.graph, [ROWS]) < bound  # entropy clips the largest numbers
    assert {finding["method"] for finding in result.findings} == {method}


def test_channels_that_are_uneven_are_balanced() -> None:
    scale = np.ones(8, np.float32)
    scale[3] = 300.0
    w = weights(8, 16)
    w[3] /= 300

    def build(b: GraphBuilder, x: Value) -> Value:
        return b("matmul", b("mul", x, b.constant(scale)), b.constant(w))

    graph = built(build, "n", 8)
    anything = {"min_sqnr": 0.0, "max_accuracy_loss": 1.0, "tolerance": Tolerance(rtol=9.0)}
    plain, balanced = (quantized(graph, ROWS, balance=strength, **anything) for strength in (0.0, 0.5))
    assert plain.findings[0]["method"] == "mse"
    assert balanced.findings[0]["method"] == "mse balanced"
    assert balanced.findings[0]["sqnr_db"] > plain.findings[0]["sqnr_db"] + 10
    assert distance(graph, balanced.graph, [ROWS]) < 0.3 * distance(graph, plain.graph, [ROWS])


def test_a_product_whose_inputs_cannot_be_rounded_keeps_only_its_weights_in_8_bits() -> None:
    scale = np.ones(8, np.float32)
    scale[3] = 1e4
    w = weights(8, 16)
    w[3] = 0
    graph = built(lambda b, x: b("matmul", b("mul", x, b.constant(scale)), b.constant(w)), "n", 8)
    result = quantized(graph, ROWS, balance=0.0)
    assert result.findings[0]["decision"] == "weights"
    assert "matmul_narrow" in names(result.graph)
    assert distance(graph, result.graph, [ROWS]) < 0.02


def test_layers_beyond_the_budget_stay_as_they_are() -> None:
    graph = built(lambda b, x: b("matmul", x, b.constant(weights(8, 4))), "n", 8)
    result = quantized(graph, ROWS, min_sqnr=90.0)
    assert result.graph is graph
    assert result.findings[0]["decision"] == "float32"
    assert "min_sqnr is 90 dB" in result.findings[0]["reason"]


def test_results_that_are_not_finite_stay_as_they_are() -> None:
    graph = built(lambda b, x: b("matmul", b("log", x), b.constant(weights(8, 4))), "n", 8)
    result = quantized(graph, ROWS)
    assert result.graph is graph
    assert "not finite" in result.findings[0]["reason"]


def test_bias_correction_takes_the_mean_error_away() -> None:
    data = (np.abs(ROWS) + 1).astype(np.float32)
    graph = built(lambda b, x: b("matmul", x, b.constant(weights(8, 64) + 0.3)), "n", 8)
    errors = []
    for correct in (False, True):
        result = quantized(graph, data, correct_bias=correct)
        error = run_graph(result.graph, [data])[0] - run_graph(graph, [data])[0]
        errors.append(np.abs(error.mean(axis=0)).mean())
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_bias_correction_of_convolutions(groups: int) -> None:
    """Of a constant image, the error inside is what is corrected."""
    w = weights(8, 8 // groups, 3, 3) + 0.2
    graph = built(lambda b, x: b("conv", x, b.constant(w), groups=groups), "n", 8, 5, 5)
    data = np.broadcast_to(np.abs(RNG.normal(size=(1, 8, 1, 1))), (4, 8, 5, 5)).astype(np.float32)
    (layer,) = find_layers(graph)[0]
    affine = Affine.of(0.0, float(data.max()))
    rounded = affine.rounded(data).astype(np.float32)  # so that only the weights make errors
    plans = [plan_of(layer, "int8", affine, mean) for mean in (None, rounded.mean(axis=(0, 2, 3)))]
    without, corrected = (distance(graph, emit(graph, [plan]), [rounded]) for plan in plans)
    assert corrected < 1e-5 < without


def residual(b: GraphBuilder, x: Value) -> Value:
    h = b("relu", b("conv", x, b.constant(weights(8, 3, 3, 3)), pads=(1, 1, 1, 1)))
    h = b("max_pool", h, kernel=(2, 2))
    g = b("add", b("conv", h, b.constant(weights(8, 8, 3, 3)), pads=(1, 1, 1, 1)), b.constant(weights(8, 1, 1)))
    g = b("relu", b("add", h, g))
    both = b("concat", g, h, axis=1)
    last = b("relu", b("conv", both, b.constant(weights(4, 16, 1, 1))))
    return b("matmul", b("reshape", last, shape=("n", 64)), b.constant(weights(64, 5)))


def test_between_layers_images_stay_in_8_bits() -> None:
    graph = built(residual, "n", 3, 8, 8)
    images = RNG.normal(size=(32, 3, 8, 8)).astype(np.float32)
    result = quantized(graph, images)
    found = names(result.graph)
    assert found.count("conv_int8") == 3
    assert found.count("max_pool_int8") == 1
    assert found.count("transpose") == 1  # of the input
    concat = next(node for node in result.graph.nodes if node.name == "concat")
    assert concat.output.type.dtype is DType.U8
    assert distance(graph, result.graph, [images]) < 0.06


def stored_between_kernels(graph: Graph) -> dict[str, set[str]]:
    """The element types of the images that kernels hand over, by the op that ends each."""
    ready, _ = PassPipeline.parse("canonicalize,sink-transposes,canonicalize,layout,fold-constants,fuse").run(graph)
    found: dict[str, set[str]] = {}
    for node in ready.compute_nodes:
        body = node.attrs.get("body")
        last = body.compute_nodes[-1].name if isinstance(body, Graph) else node.name
        if node.output.type.rank == 4 and node.output.type.shape[1:3] != (1, 1):
            found.setdefault(last, set()).add(str(node.output.type.dtype))
    return found


def sequences(b: GraphBuilder, x: Value) -> Value:
    h = b("relu", b("add", b("conv", x, b.constant(weights(16, 4, 5)), pads=(2, 2)), b.constant(weights(16, 1))))
    h = b("max_pool", h, kernel=(2,))
    g = b("conv", h, b.constant(weights(16, 1, 3)), pads=(2, 2), dilations=(2,), groups=16)
    h = b("relu", b("add", h, b("mul", g, b.constant(weights(16, 1)))))
    h = b("relu", b("conv", h, b.constant(weights(24, 16, 1)), strides=(2,)))
    h = b("avg_pool", b("concat", h, h, axis=1), kernel=(3,), strides=(2,), pads=(1, 1), count_include_pad=False)
    h = b("relu", b("conv", h, b.constant(weights(16, 48, 1))))
    return b("matmul", b("mean", h, axes=(2,), keepdims=False), b.constant(weights(16, 6)))


def squeezing(b: GraphBuilder, x: Value) -> Value:
    def half(x: Value, plus: float) -> Value:
        sixth, most = b.constant(np.float32(1 / 6)), b.constant(np.float32(6.0))
        return b("mul", b("minimum", b("relu", b("add", x, b.constant(np.float32(plus)))), most), sixth)

    h = b("conv", x, b.constant(weights(16, 3, 3, 3)), pads=(1, 1, 1, 1))
    h = b("mul", h, half(h, 3.0))
    s = b("mean", h, axes=(2, 3), keepdims=True)
    s = b("relu", b("conv", s, b.constant(weights(8, 16, 1, 1))))
    h = b("mul", h, half(b("conv", s, b.constant(weights(16, 8, 1, 1))), 3.0))
    h = b("conv", h, b.constant(weights(8, 16, 1, 1)))
    h = b("relu", b("conv", b("resize", h, size=(16, 12), mode="nearest"), b.constant(weights(8, 8, 3, 3))))
    h = b("avg_pool", h, kernel=(3, 3), strides=(2, 2), pads=(1, 1, 1, 1), ceil_mode=True)
    h = b("relu", b("conv", h, b.constant(weights(8, 8, 1, 1))))
    return b(
        "matmul", b("reshape", b("mean", h, axes=(2, 3), keepdims=True), shape=("n", 8)), b.constant(weights(8, 5))
    )


@pytest.mark.parametrize(("build", "shape"), [(sequences, (4, 40)), (squeezing, (3, 8, 8))])
def test_networks_stay_in_8_bits_from_input_to_output(
    build: Callable[[GraphBuilder, Value], Value], shape: tuple[int, ...]
) -> None:
    graph = built(build, "n", *shape)
    data = RNG.normal(size=(32, *shape)).astype(np.float32)
    result = quantized(graph, data)
    assert {finding["decision"] for finding in result.findings} == {"int8"}
    found = names(result.graph)
    assert not {"conv", "max_pool", "avg_pool", "mean", "resize", "matmul"} & set(found)
    assert found.count("sum_pool_int8") == 2 + (build is squeezing)
    assert distance(graph, result.graph, [data]) < 0.08
    for op, dtypes in stored_between_kernels(result.graph).items():
        assert dtypes == {"u8"}, op


def test_what_only_others_than_layers_read_is_in_float32_again_where_8_bits_cost_too_much() -> None:
    graph = built(squeezing, "n", 3, 8, 8)
    data = RNG.normal(size=(32, 3, 8, 8)).astype(np.float32)
    error = quantized(graph, data).summary["error"]
    result = quantized(graph, data, max_error=error * 0.97, max_accuracy_loss=1.0, tolerance=Tolerance(rtol=9.0))
    assert result.summary["error"] <= error


def test_an_output_inside_a_region_is_not_rounded() -> None:
    def build(b: GraphBuilder, x: Value) -> Value:
        return b("relu", b("conv", x, b.constant(weights(4, 3, 1, 1))))

    b = GraphBuilder("net")
    x = b.input("x", tensor(DType.F32, ("n", 3, 4, 4)))
    h = build(b, x)
    graph = b.finish([h, b("conv", h, b.constant(weights(2, 4, 1, 1)))])
    images = RNG.normal(size=(8, 3, 4, 4)).astype(np.float32)
    result = quantized(graph, images)
    wanted, got = run_graph(graph, [images])[0], run_graph(result.graph, [images])[0]
    assert len(np.unique(got)) > 200, "more numbers than 8 bits have"
    assert np.abs(wanted - got).max() < 0.05 * np.abs(wanted).max()


def test_adjacent_layers_share_what_they_read() -> None:
    def build(b: GraphBuilder, x: Value) -> Value:
        h = b("relu", x)
        return b("add", b("matmul", h, b.constant(weights(8, 4))), b("matmul", h, b.constant(weights(8, 4))))

    result = quantized(built(build, "n", 8), ROWS)
    assert names(result.graph).count("quantize") == 1


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda b, x: b("matmul", x, b("transpose", x, perm=(1, 0))), "not constant"),
        (lambda b, x: b("matmul", x, b.constant(np.zeros((8, 0), np.float32))), "no weights"),
        (lambda b, x: b("conv", b("reshape", x, shape=("n", 1, 2, 2, 2)), b.constant(weights(2, 1, 1, 1, 2))), "not of images"),
    ],
)  # fmt: skip
def test_why_a_product_stays_in_float32(build: Callable[[GraphBuilder, Value], Value], reason: str) -> None:
    graph = built(build, "n", 8)
    result = quantized(graph, ROWS)
    assert result.graph is graph
    assert reason in result.remarks[0].message


def test_a_layer_reads_one_of_several_results_of_a_node() -> None:
    def build(b: GraphBuilder, x: Value) -> Value:
        largest, _ = b.multi("topk", x, k=4, axis=1)
        return b("matmul", largest, b.constant(weights(4, 3)))

    graph = built(build, "n", 8)
    result = quantized(graph, ROWS)
    assert "matmul_int8" in names(result.graph)
    assert distance(graph, result.graph, [ROWS]) < 0.05


def test_rows_are_taken_in_parts() -> None:
    graph = built(lambda b, x: b("relu", x), "n", 1 << 16)
    batch = [np.zeros((2500, 1 << 16), np.float32)]
    parts = list(parts_of(graph, [batch], graph.outputs))
    assert sum(len(part[0]) for part in parts) == 2500
    assert all(part[0].nbytes <= MOST_BYTES for part in parts)
    assert len(parts) > 1


@dataclass
class Clock:
    """Trials that take the times they are told, by kernels without a name that says more, as narrow products are made into."""

    seconds: dict[str, float]

    def compiled(self, graph: Graph) -> Callable[[Sequence[Array]], Sequence[Array]]:
        return lambda inputs: run_graph(graph, inputs)

    def times(self, graph: Graph, inputs: Sequence[Array]) -> Sequence[tuple[str, str, float]]:
        run_graph(graph, inputs)
        return [
            ("fused", str(n.loc), self.seconds[n.name])
            for n in graph.compute_nodes
            if n.name.startswith(("matmul", "conv"))
        ]


@pytest.mark.parametrize(("eight", "decision"), [(0.5e-6, "int8"), (2e-6, "float32")])
def test_what_is_slower_on_8_bits_stays_in_float32(eight: float, decision: str) -> None:
    graph = built(lambda b, x: b("matmul", x, b.constant(weights(8, 4))), "n", 8)
    clock = Clock({"matmul": 1e-6, "matmul_int8": eight})
    result = QuantizeInt8(calibration=ROWS).run(graph, PassContext(trials=clock))
    assert result.findings[0]["decision"] == decision
    assert (result.findings[0]["float32_us"], result.findings[0]["int8_us"]) == (1.0, pytest.approx(eight * 1e6))
    assert (result.graph is graph) == (decision == "float32")


def test_a_pipeline_of_ones_own() -> None:
    graph = built(lambda b, x: b("matmul", x, b.constant(weights(8, 4))), "n", 8)
    import mlec

    pipeline = PassPipeline([mlec.InferShapes(), mlec.QuantizeInt8(calibration=ROWS), mlec.CheckNumerics()])
    assert str(pipeline) == "infer-shapes,quantize-int8,stability"
    optimized, report = mlec.optimize(graph, pipeline)
    assert "matmul_int8" in names(optimized)
    assert report.quantization[0]["decision"] == "int8"


def test_options_that_make_no_sense() -> None:
    graph = built(lambda b, x: b("matmul", x, b.constant(weights(8, 4))), "n", 8)
    with pytest.raises(UsageError, match="method takes"):
        QuantizeInt8(calibration=ROWS, method="median").run(graph, PassContext())
