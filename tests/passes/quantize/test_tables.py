"""Tables of embeddings in 8 bits: what is written of them, when they stay in float32, and that kernels look rows up in one loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mlec
from mlec.ir import DType, Graph, GraphBuilder, run_graph, tensor, verify
from mlec.ir.op import Array
from mlec.passes.quantize import QuantizeInt8
from mlec.pipeline import PassContext, PassPipeline, PassResult, Tolerance

RNG = np.random.default_rng(0)
PICKS = RNG.integers(0, 300, (40, 6))
TABLE = (RNG.normal(size=(300, 16)) * np.exp2(RNG.integers(-6, 6, (300, 1)))).astype(np.float32)
"""Rows of very different size, as those of rare and of frequent words."""


def embedding(table: Array = TABLE, tied: bool = False) -> Graph:
    """Rows and positions, their mean, and a product: with the table transposed, or with other weights."""
    b = GraphBuilder("net")
    rows = b("gather", b.constant(table, "table"), b.input("picks", tensor(DType.I64, ("n", 6))), axis=0)
    found = b("add", rows, b.constant(np.ones((6, 16), np.float32)))
    weights = np.ascontiguousarray(table.T) if tied else RNG.normal(size=(16, 4)).astype(np.float32)
    return b.finish([b("matmul", b("mean", found, axes=(1,), keepdims=False), b.constant(weights))])


def quantized(graph: Graph, **options: object) -> PassResult:
    result = QuantizeInt8(calibration=PICKS, **options).run(graph, PassContext())  # type: ignore[arg-type]
    verify(result.graph)
    return result


def tables(graph: Graph) -> dict[DType, Array]:
    """What rows are looked up in, by element type."""
    found = [graph.constant_value(node.inputs[0]) for node in graph.nodes if node.name == "gather"]
    return {DType.of(array.dtype): array for array in found if array is not None}


def test_each_row_has_a_scale_of_its_own() -> None:
    graph = embedding()
    result = quantized(graph)
    found = tables(result.graph)
    weights, scales = found[DType.I8], found[DType.F32]
    assert (weights.shape, scales.shape) == (TABLE.shape, (300, 1))
    assert (np.abs(weights).max(axis=1) == 127).all()
    assert (np.abs(weights * scales - TABLE) <= 0.5001 * scales).all()
    finding = next(finding for finding in result.findings if finding["op"] == "gather")
    assert (finding["decision"], finding["weights"]) == ("weights", [300, 16])
    noise = np.sum((weights * scales - TABLE) ** 2)
    assert finding["sqnr_db"] == pytest.approx(10 * np.log10(np.sum(TABLE**2) / noise), abs=0.1)
    wanted, got = run_graph(graph, [PICKS])[0], run_graph(result.graph, [PICKS])[0]
    assert np.abs(wanted - got).max() < 0.02 * np.abs(wanted).max()


def test_an_output_layer_with_the_weights_of_the_table_has_the_same_numbers() -> None:
    result = quantized(embedding(tied=True), balance=0.0)
    product = next(node for node in result.graph.nodes if node.name == "matmul_int8")
    weights = result.graph.constant_value(product.inputs[1])
    assert weights is not None
    np.testing.assert_array_equal(weights.T, tables(result.graph)[DType.I8])


def test_rows_are_looked_up_and_scaled_in_the_kernel_that_reads_them() -> None:
    graph = quantized(embedding()).graph
    ready, _ = PassPipeline.parse("canonicalize,layout,fold-constants,fuse").run(graph)
    (first,) = (node for node in ready.compute_nodes if node.inputs[0].type.dtype is DType.I8)
    body = first.attrs["body"]
    assert isinstance(body, Graph)
    assert [node.name for node in body.compute_nodes][:4] == ["gather", "cast", "gather", "mul"]
    assert body.compute_nodes[-1].name in ("mean", "quantize")


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"min_sqnr": 60.0}, "min_sqnr is 60 dB"), ({"tolerance": Tolerance(rtol=1e-5)}, "lose too much")],
)
def test_a_table_that_loses_too_much_stays_in_float32(options: dict[str, object], reason: str) -> None:
    graph = embedding()
    result = quantized(graph, **options)
    assert list(tables(result.graph)) == [DType.F32]
    finding = next(finding for finding in result.findings if finding["op"] == "gather")
    assert finding["decision"] == "float32"
    assert reason in finding["reason"]


def test_a_table_that_is_not_finite_stays_in_float32() -> None:
    table = TABLE.copy()
    table[7, 3] = np.inf
    result = quantized(embedding(table), tolerance=Tolerance(rtol=9.0))
    assert list(tables(result.graph)) == [DType.F32]


def test_a_table_that_is_read_twice_is_there_once() -> None:
    b = GraphBuilder("net")
    x, table = b.input("picks", tensor(DType.I64, ("n", 6))), b.constant(TABLE, "table")
    pair = b("mul", b("gather", table, x, axis=0), b("gather", table, b("flip", x, axes=(1,)), axis=0))
    result = quantized(b.finish([pair]), tolerance=Tolerance(rtol=9.0))
    kinds = sorted(str(array.dtype) for array in result.graph.constants.values())
    assert kinds == ["float32", "int8"]


def test_tables_may_be_left_alone() -> None:
    result = quantized(embedding(), tables=False)
    assert list(tables(result.graph)) == [DType.F32]
    assert [finding["op"] for finding in result.findings] == ["matmul"]


def test_a_small_table_stays_as_it_is() -> None:
    result = quantized(embedding(np.resize(TABLE[:32], (300, 16))[:60]), measure=False)
    (remark,) = (remark for remark in result.remarks if remark.message.startswith("gather"))
    assert remark.message == "gather stays in float32: its table of 3,840 bytes is small"


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.EmbeddingBag(4000, 64), nn.Linear(64, 3)

    def forward(self, picks: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.table(picks))
        return out


def test_a_file_of_words_is_a_third_as_large(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, picks = Words().eval(), np.random.default_rng(1).integers(0, 4000, (64, 5))
    with torch.no_grad():
        wanted = module(torch.from_numpy(picks)).numpy()
    sizes = {}
    for precision in ("fp32", "int8"):
        given = {"calibration": picks} if precision == "int8" else {}
        with mlec.compile(module, torch.from_numpy(picks[:4]), precision=precision, **given) as model:
            model.save(tmp_path / precision)
            sizes[precision] = (tmp_path / precision).stat().st_size
            assert np.abs(np.asarray(model.run([picks])[0]) - wanted).max() < 0.02 * np.abs(wanted).max()
    assert sizes["fp32"] > 3 * sizes["int8"]
