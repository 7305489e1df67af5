"""Mixed precision: what is brought to 16 bits, what is not and why, and how far the results move."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch

import mlec
from mlec.backends.tvm.backend import TVMBackend
from mlec.errors import UsageError
from mlec.ir import GraphBuilder, SymDim, TensorType, run_graph
from mlec.ir.dtype import DType
from mlec.passes.precision import MixedPrecision
from mlec.pipeline import PassContext, TargetFacts
from mlec.target import Target

N = SymDim.named("n")
RNG = np.random.default_rng(0)
TINY_CACHE = PassContext(TargetFacts(cache_bytes=1000))
TILES = PassContext(TargetFacts(cache_bytes=1000, bf16_products=6.0))


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
