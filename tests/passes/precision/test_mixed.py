"""Mixed precision: what is brought to 16 bits, what is not and why, and how far the results move."""

import copy
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch

import mlec
from mlec.backends.tvm.backend import TVMBackend
from mlec.backends.tvm.kernels.gemm_bf16 import least_rows
from mlec.errors import UsageError
from mlec.ir import GraphBuilder, SymDim, TensorType, run_graph
from mlec.ir.dtype import DType
from mlec.passes.layout import ChooseLayout
from mlec.passes.precision import MixedPrecision
from mlec.pipeline import PassContext, TargetFacts
from mlec.target import Target

N = SymDim.named("n")
RNG = np.random.default_rng(0)
TINY_CACHE = PassContext(TargetFacts(cache_bytes=1000))
TILES = PassContext(TargetFacts(cache_bytes=1000, bf16_products=6.0, bf16_rows=least_rows, bf16_tiles=True))
PAIRS = PassContext(TargetFacts(cache_bytes=1000, bf16_products=2.0))


def perceptron(scale=1.0, rows=N, middle=70):
    """Two products with an activation between them; the first layer's results grow with ``scale``."""
    b = GraphBuilder("perceptron")
    x = b.input("x", TensorType((rows, 80), DType.F32))
    w, v = (
        (RNG.normal(size=shape) * s).astype(np.float32) for shape, s in (((80, middle), scale), ((middle, 60), 1.0))
    )
    hidden = b("relu", b("matmul", x, b.constant(w)))
    return b.finish([b("matmul", hidden, b.constant(v))])


def names(graph):
    return [node.name for node in graph.compute_nodes]


def missed(result):
    return [remark.message for remark in result.remarks if remark.kind == "missed"]


def difference(before, after):
    inputs = [RNG.normal(size=(50, 80)).astype(np.float32)]
    (wanted,), (got,) = run_graph(before, inputs), run_graph(after, inputs)
    assert got.dtype == wanted.dtype
    return np.max(np.abs(got - wanted)) / np.max(np.abs(wanted))


@pytest.mark.parametrize(("dtype", "bound"), [("fp16", 1e-3), ("bf16", 1e-2)])
def test_weights_behind_the_cache_are_read_in_16_bits(dtype, bound):
    graph = perceptron()
    after = MixedPrecision(dtype).run(graph, TINY_CACHE).graph
    assert names(after) == ["matmul_narrow", "relu", "matmul_narrow"]
    assert {array.dtype.itemsize for array in after.constants.values()} == {2}
    assert 0 < difference(graph, after) < bound


@pytest.mark.parametrize("rows", [N, 500])
def test_other_weights_are_rounded_and_stay_float32(rows):
    """Those in the cache, and those of many rows, whose arithmetic takes longer than reading them."""
    graph = perceptron(rows=rows)
    after = MixedPrecision().run(graph, PassContext() if rows is N else TINY_CACHE).graph
    assert names(after) == names(graph)
    for array in after.constants.values():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, array.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_small_weights_stay_and_the_report_says_so():
    graph = perceptron()
    result = MixedPrecision(min_weights=1 << 30).run(graph, PassContext())
    assert result.graph is graph
    assert {r.message for r in result.remarks if "weights" in r.message} == {
        "the weights of matmul stay in f32: fewer than 1,073,741,824 elements"
    }


def test_gpus_widen_no_weights_as_they_read_them():
    facts = TVMBackend().facts(Target.parse("cuda"))
    graph = perceptron()
    assert names(MixedPrecision().run(graph, PassContext(facts)).graph) == names(graph)


def test_rows_are_in_16_bits_where_the_processor_multiplies_them():
    graph = perceptron()
    after = MixedPrecision().run(graph, TILES).graph
    assert names(after) == ["cast", "matmul_narrow", "relu", "cast", "matmul_narrow"]
    assert difference(graph, after) < 2e-2
    assert "cast" not in names(MixedPrecision("fp16").run(graph, TILES).graph), "it has instructions for bf16 only"
    assert "cast" not in names(MixedPrecision(activations="never").run(graph, TILES).graph)
    few = perceptron(rows=3)
    assert "cast" not in names(MixedPrecision().run(few, TILES).graph), "three rows fill no tile"
    for rows, count in ((1, 0), (3, 1), (6, 2)):
        wide = perceptron(rows=rows, middle=800)
        assert names(MixedPrecision().run(wide, TILES).graph).count("cast") == count, (
            "of many weights they are worth one"
        )


@pytest.mark.parametrize(
    "examples", [None, [[RNG.normal(size=(9, 80)).astype(np.float32)]]], ids=["unseen", "examples"]
)
def test_what_overflows_fp16_stays_float32(examples):
    """The first product reaches 1e6: the rows of the second stay as they are, those of the first do not."""
    graph = perceptron(scale=1e3)
    given = replace(TINY_CACHE, given_ranges={"x": (-5.0, 5.0)})
    found = MixedPrecision("fp16", activations="always", examples=examples).run(graph, given)
    assert names(found.graph) == ["cast", "matmul_narrow", "relu", "matmul_narrow"]
    (reason,) = missed(found)
    assert "its rows stay in f32: their magnitudes" in reason
    assert "beyond 65504 f16 is infinite" in reason
    inside = MixedPrecision("bf16", activations="always", examples=examples).run(graph, given)
    assert names(inside.graph) == ["cast", "matmul_narrow", "relu", "cast", "matmul_narrow"]


def test_weights_that_overflow_fp16_stay_float32():
    found = MixedPrecision("fp16").run(perceptron(scale=1e5), TINY_CACHE)
    assert names(found.graph) == ["matmul", "relu", "matmul_narrow"]
    assert any("the weights of matmul stay in f32: numbers up to" in reason for reason in missed(found))


def test_one_cast_serves_all_products_and_none_is_undone():
    """A row that is picked from a table of 16 bits goes into products as it is."""
    b = GraphBuilder("embedding")
    i = b.input("i", TensorType((N,), DType.I64))
    table, w, v = (b.constant(RNG.normal(size=(70, 70)).astype(np.float32)) for _ in range(3))
    row = b("gather", table, i, axis=0)
    graph = b.finish([b("add", b("matmul", row, w), b("matmul", row, v)), row])
    after = MixedPrecision().run(graph, TILES).graph
    assert sorted(names(after)) == ["add", "cast", "gather", "matmul_narrow", "matmul_narrow"]
    (cast,) = (node for node in after.compute_nodes if node.name == "cast")
    assert cast.output is after.outputs[1]


def recurrence(kind, rows=N, scale=1.0):
    """A layer of few weights for its inputs and many for its state."""
    b = GraphBuilder(kind)
    gates = {"lstm": 4, "gru": 3, "rnn": 1}[kind]
    x = b.input("x", TensorType((rows, 9, 5), DType.F32))
    state = b.input("h", TensorType((rows, 70), DType.F32))
    arrays = [RNG.normal(size=(gates * 70, k)) * scale / 9 for k in (5, 70)] + [RNG.normal(size=gates * 70)] * (
        1 + (kind == "gru")
    )
    states = [state] * (2 if kind == "lstm" else 1)
    attrs = {"activation": "tanh"} if kind == "rnn" else {}
    return b.finish(
        b.multi(kind, x, *states, *(b.constant(a.astype(np.float32)) for a in arrays), reverse=False, **attrs)
    )


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_recurrent_layers_multiply_in_16_bits_where_the_processor_does(kind):
    graph = recurrence(kind)
    found = MixedPrecision().run(graph, TILES)
    (node,) = found.graph.compute_nodes
    first = len(node.outputs)
    assert [str(v.type.dtype) for v in node.inputs[first : first + 2]] == ["bf16", "bf16"]
    assert {v.type.dtype for v in (*node.inputs[:first], *node.inputs[first + 2 :], *node.outputs)} == {DType.F32}
    assert any("inputs, states and matrices are multiplied in bf16" in r.message for r in found.remarks)
    assert not any("reads them in f32" in r.message for r in found.remarks)
    assert MixedPrecision().run(found.graph, TILES).graph is found.graph
    inputs = [RNG.normal(size=(50, *shape)).astype(np.float32) for shape in ((9, 5), (70,))]
    for got, want in zip(run_graph(found.graph, inputs), run_graph(graph, inputs), strict=True):
        assert 0 < np.max(np.abs(got - want)) < 3e-2


def test_recurrent_layers_that_multiply_in_float32():
    """No unit for 16 bits, one sequence, as it is asked for, or matrices that do not fit the format."""
    for graph, options, context in (
        (recurrence("lstm"), {}, TINY_CACHE),
        (recurrence("lstm"), {}, PAIRS),
        (recurrence("lstm", rows=1), {}, TILES),
        (recurrence("lstm"), {"activations": "never"}, TILES),
        (recurrence("lstm", scale=1e-39), {}, TILES),
    ):
        (node,) = MixedPrecision(**options).run(graph, context).graph.compute_nodes
        assert {v.type.dtype for v in node.inputs} == {DType.F32}


def test_a_second_run_changes_nothing():
    after = MixedPrecision().run(perceptron(), PassContext()).graph
    assert MixedPrecision().run(after, PassContext()).graph is after


def test_settings():
    with pytest.raises(UsageError, match="auto, always, never, got 'sometimes'"):
        MixedPrecision(activations="sometimes").run(perceptron(), PassContext())


class Network(torch.nn.Module):
    """An embedding, two products, a norm and a convolution."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(300, 64)
        self.inner, self.norm = torch.nn.Linear(64, 128), torch.nn.LayerNorm(128)
        self.conv = torch.nn.Conv1d(128, 64, 3, padding=1)
        self.out = torch.nn.Linear(64, 80)

    def forward(self, i):
        x = self.norm(torch.relu(self.inner(self.table(i))))
        return self.out(self.conv(x.transpose(1, 2)).mean(2))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Network().eval(), torch.randint(0, 300, (6, 10))


@pytest.mark.parametrize(
    ("precision", "half", "passes"),
    [
        ("fp16", torch.float16, "default,mixed-precision{dtype = fp16, activations = always, min_weights = 64}"),
        ("bf16", torch.bfloat16, "default"),
    ],
)
def test_end_to_end(network, precision, half, passes, tmp_path):
    """The error is no larger than torch's own in that type; the file takes about half, and comes back the same."""
    module, i = network
    wanted = module(i).detach().numpy()
    with torch.no_grad():
        theirs = module.to(half)(i).float().numpy()
        module.float()
    torch.manual_seed(0)
    module = Network().eval()
    compiled = mlec.compile(module, (i,), precision=precision, passes=passes, progress=False)
    (got,) = compiled.run([i.numpy()])
    scale = np.abs(wanted).max()
    assert got.dtype == np.float32
    assert 0 < np.abs(got - wanted).max() / scale <= 1.2 * np.abs(theirs - wanted).max() / scale
    parity = compiled.report.parity
    assert parity["tolerance"]["rtol"] == {"fp16": 0.01, "bf16": 0.05}[precision]
    assert 0 < parity["methods"]["run"]["max_rel_error"] < parity["tolerance"]["rtol"] / 2
    path = tmp_path / "m.mle"
    size = compiled.save(path).sections["weights"]
    plain = sum(parameter.nbytes for parameter in module.parameters())
    assert size < 0.6 * plain
    np.testing.assert_array_equal(mlec.load(path).run([i.numpy()])[0], got)


def test_the_original_workflow(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(80, 80), torch.nn.LayerNorm(80), torch.nn.Linear(80, 8))
    done = mlec.export_model(module, tmp_path / "m.mle", input_shape=(1, 80), quantization="fp16")
    assert done["success"], done
    assert done["report"]["model"]["precision"] == "fp16"
    (found,) = (entry for entry in done["report"]["passes"] if entry["name"] == "mixed-precision")
    assert found["applied"]
    assert any("layer_norm stays in f32" in str(remark) for remark in found["missed"])


def convolutions(outputs=64, groups=1, **image):
    """A convolution, a pool, and two convolutions that read what it gives, whose results are added to it."""
    b = GraphBuilder("convolutions")
    x = b.input("x", TensorType((N, 3, image.get("rows", 16), 16), DType.F32))

    def weights(*shape):
        return b.constant((RNG.normal(size=shape) / np.sqrt(shape[1] * 9)).astype(np.float32))

    y = b("max_pool", b("relu", b("conv", x, weights(64, 3, 3, 3), pads=(1,) * 4)), kernel=(2, 2), strides=(2, 2))
    z = b("relu", b("conv", y, weights(outputs, 64 // groups, 3, 3), pads=(1,) * 4, groups=groups))
    return b.finish([b("add", y, b("conv", z, weights(64, outputs, 1, 1)))])


def test_images_are_in_16_bits_where_the_processor_multiplies_them():
    """What a pool gives is what it gives of rounded numbers; a residual sum reads what the convolution beside it does."""
    graph = convolutions()
    found = MixedPrecision().run(graph, TILES)
    wanted = ["cast", "cast", "conv", "relu", "cast", "max_pool", "cast", "conv", "relu", "cast", "cast", "conv", "add"]
    assert names(found.graph) == wanted
    assert sum("are multiplied in bf16" in remark.message for remark in found.remarks) == 3
    for node in found.graph.nodes:
        if node.name == "conv":
            assert found.graph.producer[node.inputs[0]].inputs[0].type.dtype is DType.BF16
    x = [RNG.normal(size=(3, 3, 16, 16)).astype(np.float32)]
    (wanted,), (got,) = run_graph(graph, x), run_graph(found.graph, x)
    assert 0 < np.max(np.abs(got - wanted)) < 0.02 * np.max(np.abs(wanted))
    assert MixedPrecision().run(found.graph, TILES).graph is found.graph
    for context, options in ((PassContext(), {}), (TILES, {"dtype": "fp16"}), (TILES, {"activations": "never"})):
        assert "cast" not in names(MixedPrecision(**options).run(graph, context).graph)


def test_what_leaves_the_graph_is_not_rounded():
    graph = convolutions()
    inner = next(node.output for node in graph.nodes if node.name == "max_pool")
    both = replace(graph, outputs=(*graph.outputs, inner))
    after = MixedPrecision().run(both, TILES).graph
    x = [RNG.normal(size=(1, 3, 16, 16)).astype(np.float32)]
    got = run_graph(after, x)[1]
    assert not np.array_equal(got, got.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_convolutions_that_winograds_sums_suit_stay_float32():
    """Where vectors multiply pairs; the blocks of the others are those of float32."""
    pairs, graph = replace(PAIRS.target, vector_bytes=64), convolutions()
    facts = replace(pairs, winograd=lambda before, after, extent: (before, after, *extent) == (64, 64, 8, 8))
    found = MixedPrecision().run(graph, PassContext(facts))
    (reason,) = (r.message for r in found.remarks if "its kernel reads them in f32" in r.message)
    assert reason.endswith("its kernel reads them in f32: Winograd's sums take less time")
    after = ChooseLayout().run(found.graph, PassContext(facts)).graph
    kernels = [node for node in after.nodes if node.name in ("conv2d_narrow", "conv2d_nchwc")]
    assert [node.name for node in kernels] == ["conv2d_narrow", "conv2d_nchwc", "conv2d_narrow"]
    assert [node.inputs[0].type.shape[-1] for node in kernels] == [1, 16, 16]
    x = [RNG.normal(size=(2, 3, 16, 16)).astype(np.float32)]
    (wanted,), (got,) = run_graph(graph, x), run_graph(after, x)
    assert 0 < np.max(np.abs(got - wanted)) < 0.02 * np.max(np.abs(wanted))
    every = MixedPrecision().run(graph, PassContext(pairs)).graph
    assert names(ChooseLayout().run(every, PassContext(pairs)).graph).count("conv2d_narrow") == 3


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (convolutions(groups=4), "its 4 groups have 16 and 16 channels, not multiples of 32"),
        (convolutions(outputs=62), "sums of 576 products for 62 channels do not fill tiles"),
        (convolutions(rows=N), "its image has a symbolic extent"),
    ],
    ids=["groups", "outputs", "symbolic"],
)
def test_convolutions_that_fill_no_tiles_stay_float32(graph, reason):
    found = MixedPrecision().run(graph, TILES)
    assert any(remark.message.endswith(f"its kernel reads them in f32: {reason}") for remark in found.remarks)


def test_the_layout_keeps_images_of_16_bits_in_blocks():
    """No transposition between convolutions; the 3 channels of the image are read as they lie."""
    graph = MixedPrecision().run(convolutions(), TILES).graph
    facts = replace(TILES.target, vector_bytes=64)
    after = ChooseLayout().run(graph, PassContext(facts)).graph
    found = names(after)
    assert (found.count("conv2d_narrow"), found.count("conv"), found.count("transpose")) == (3, 0, 1)
    blocks = [node.inputs[0].type.shape[-1] for node in after.nodes if node.name == "conv2d_narrow"]
    assert blocks == [1, 32, 32]
    x = [RNG.normal(size=(2, 3, 16, 16)).astype(np.float32)]
    (wanted,), (got,) = run_graph(graph, x), run_graph(after, x)
    np.testing.assert_allclose(got, wanted, rtol=1e-2, atol=1e-2)
    plain = ChooseLayout().run(graph, PassContext(replace(facts, bf16_products=1.0))).graph
    assert "conv2d_narrow" not in names(plain)


class Images(torch.nn.Module):
    """A stem, a residual block, a depthwise convolution and a grouped one."""

    def __init__(self):
        super().__init__()
        self.stem, self.first = torch.nn.Conv2d(3, 64, 5, stride=2, padding=2), torch.nn.Conv2d(64, 64, 3, padding=1)
        self.deep = torch.nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.grouped, self.last = torch.nn.Conv2d(64, 64, 3, groups=2), torch.nn.Conv2d(64, 24, 1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.first(x))
        return self.last(torch.relu(self.grouped(torch.relu(self.deep(x))))).mean((2, 3))


def test_images_end_to_end():
    """No further from float32 than torch's own bf16, and as torch has it where numbers are infinite or none."""
    torch.manual_seed(0)
    module, x = Images().eval(), torch.randn(3, 3, 21, 37)
    with torch.no_grad():
        wanted = module(x).numpy()
        theirs = copy.deepcopy(module).to(torch.bfloat16)(x.to(torch.bfloat16)).float().numpy()
    compiled = mlec.compile(module, (x,), precision="bf16", progress=False)
    (got,) = compiled.run([x.numpy()])
    scale = np.abs(wanted).max()
    assert np.abs(got - wanted).max() / scale <= max(1.2 * np.abs(theirs - wanted).max() / scale, 1e-3)
    for rows in (0, 1):
        np.testing.assert_allclose(compiled.run([x.numpy()[:rows]])[0], got[:rows], rtol=1e-6, atol=1e-6)
    x[1, 2, 5, 6] = float("nan")
    np.testing.assert_array_equal(np.isnan(compiled.run([x.numpy()])[0]).any(axis=1), [False, True, False])


def test_depthwise_convolutions_read_16_bits_and_compute_in_32():
    """Half as much to read and write where that counts; no sum is in fewer bits, and nothing but the image is rounded."""
    b = GraphBuilder("deep")
    x = b.input("x", TensorType((2, 64, 12, 12), DType.F32))
    deep = b("conv", b("relu", x), b.constant(RNG.normal(size=(64, 1, 3, 3)).astype(np.float32)), groups=64)
    wide = b.constant((RNG.normal(size=(64, 64, 3, 3)) / 24).astype(np.float32))
    graph = b.finish([b("conv", deep, wide)])
    found = MixedPrecision().run(graph, TILES).graph
    assert names(found) == ["relu", "cast", "cast", "conv", "cast", "cast", "conv"]
    after = ChooseLayout().run(found, PassContext(replace(TILES.target, vector_bytes=64))).graph
    (kernel,) = (node for node in after.nodes if node.name == "depthwise2d_nchwc")
    assert [v.type.dtype for v in (*kernel.inputs, kernel.output)] == [DType.BF16, DType.F32, DType.F32]
    assert kernel.inputs[0].type.shape[-1] == 32
    x = [RNG.normal(size=(2, 64, 12, 12)).astype(np.float32)]
    (wanted,), (got,) = run_graph(graph, x), run_graph(after, x)
    assert 0 < np.max(np.abs(got - wanted)) < 0.02 * np.max(np.abs(wanted))
