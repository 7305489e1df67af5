from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

import mlec
from mlec import registry
from mlec.backends.base import CompileOptions
from mlec.ir import DType, Graph, GraphBuilder, tensor
from mlec.measuring.cost_model import REQUANTISING, CostModel, Work, family_of, operations_of
from mlec.measuring.machine import Machine, this_machine
from mlec.reporting.schema import Roofline
from mlec.signature import Coding, ColumnFeed, Signature, TableSpec
from mlec.target import Target

MACHINE = Machine(
    flops=4e11, flops64=2e11, bandwidth=2e10, threads=2, core_flops=2e11, core_flops64=1e11,
    copies=((1 << 15, 8e10), (1 << 20, 8e10), (1 << 27, 1e10)), kernel_seconds=1e-7, dispatch_seconds=1e-6, call_seconds=2e-6,
)  # fmt: skip


def product(rows: int | str = "n", width: int = 256) -> Graph:
    b = GraphBuilder("g")
    x = b.input("x", tensor("f32", (rows, width)))
    weights = b.constant(np.ones((width, width), np.float32))
    return b.finish([b("relu", b("matmul", x, weights))])


def test_a_product_takes_its_part_of_the_peak() -> None:
    work = Work({"product": 2 * 10**9}, weights=10**4, values=10**4, bits=32)
    one, two = (CostModel(MACHINE, threads).seconds(work, held=10**4) for threads in (1, 2))
    assert 0.01 < one < 0.02
    assert two == pytest.approx(one / 2, rel=0.01)
    wide = Work(work.operations, work.weights, work.values, bits=64)
    assert CostModel(MACHINE, 1).seconds(wide, held=10**4) == pytest.approx(2 * one, rel=0.01)


def test_small_kernels_take_one_thread_and_the_overhead_of_a_call() -> None:
    work = Work({"simple": 100}, weights=0, values=400, bits=32)
    one, two = (CostModel(MACHINE, threads).seconds(work, held=0) for threads in (1, 2))
    assert one == two
    assert MACHINE.kernel_seconds < one < 2 * MACHINE.kernel_seconds


def test_weights_come_from_where_all_weights_are() -> None:
    work = Work({"product": 2 * 10**5}, weights=4 * 10**5, values=10**3, bits=32)
    model = CostModel(MACHINE, 1)
    cached, beyond = model.seconds(work, held=4 * 10**5), model.seconds(work, held=1 << 28)
    assert cached == pytest.approx(4e5 / 8e10 + 1e-7, rel=0.1)
    assert beyond == pytest.approx(4e5 / 1e10 + 1e-7, rel=0.1)


def test_a_graph_is_predicted_at_its_extents_and_views_cost_nothing() -> None:
    model = CostModel(MACHINE, 1)
    graph = product()
    few, many = (model.graph_seconds(graph, {"n": n}) for n in (64, 6400))
    assert 50 < (many - MACHINE.call_seconds) / (few - MACHINE.call_seconds) < 200
    b = GraphBuilder("g")
    x = b.input("x", tensor("f32", ("n", 4)))
    assert model.graph_seconds(b.finish([b("reshape", x, shape=("n", 2, 2))]), {"n": 10**6}) == MACHINE.call_seconds


def test_a_fused_node_counts_what_is_in_its_body() -> None:
    optimized, _ = mlec.optimize(product())
    (node,) = [n for n in optimized.compute_nodes if "body" in n.attrs]
    counted = operations_of(node, {"n": 10})
    assert counted["product"] == 2 * 10 * 256 * 256
    assert counted["simple"] == 10 * 256


@pytest.mark.parametrize(
    ("name", "shape", "attrs", "family"),
    [
        ("conv_transpose", (32, 16, 3, 3), {"strides": (1, 1), "pads": (1, 1, 1, 1)}, "convolution"),
        ("conv", (16, 32, 3, 3), {"strides": (1, 1), "pads": (1, 1, 1, 1)}, "winograd"),
        ("conv", (16, 32, 3, 3), {"strides": (2, 2), "pads": (1, 1, 1, 1)}, "convolution"),
        ("conv", (16, 32, 1, 1), {"strides": (1, 1), "pads": (0, 0, 0, 0)}, "convolution"),
    ],
)
def test_families_of_convolutions(name: str, shape: tuple[int, ...], attrs: dict[str, object], family: str) -> None:
    b = GraphBuilder("g")
    x = b.input("x", tensor("f32", ("n", 32, 16, 16)))
    attrs = {**attrs, "dilations": (1, 1), "groups": 1}
    graph = b.finish([b(name, x, b.constant(np.ones(shape, np.float32)), **attrs)])
    assert [family_of(node) for node in graph.compute_nodes] == [family]


def test_families_of_products_in_fewer_bits() -> None:
    b = GraphBuilder("g")
    bytes_, halves = b.input("x", tensor("u8", ("n", 64))), b.input("h", tensor("bf16", ("n", 64)))
    images, singles = b.input("i", tensor("u8", ("n", 8, 8, 16))), b.input("s", tensor("f32", ("n", 64)))
    narrow = b.constant(np.ones((64, 32), DType.BF16.numpy))
    results = [
        b("matmul_int8", bytes_, b.constant(np.ones((64, 32), np.int8))),
        b("conv_int8", images, b.constant(np.ones((3, 3, 16, 32), np.int8))),
        b("conv_int8", images, b.constant(np.ones((3, 3, 1, 16), np.int8)), groups=16),
        b("matmul_narrow", halves, narrow),
        b("matmul_narrow", singles, narrow),
    ]
    found = [family_of(node) for node in b.finish(results).compute_nodes]
    assert found == ["product of bytes", "product of bytes", "depthwise", "product of bf16", "product"]


def test_the_way_back_to_bytes_counts_for_each_result_of_a_convolution() -> None:
    b = GraphBuilder("g")
    x = b.input("x", tensor("u8", ("n", 8, 8, 16)))
    (node,) = b.finish([b("conv_int8", x, b.constant(np.ones((1, 1, 16, 32), np.int8)))]).compute_nodes
    found = operations_of(node, {"n": 3})
    assert found == {"product of bytes": 3 * 64 * 32 * 16 * 2, "simple": 3 * 64 * 32 * REQUANTISING}


@pytest.mark.parametrize("kind", ["matmul_int8", "matmul"])
def test_functions_behind_a_product_of_bytes_take_their_time(kind: str) -> None:
    """Behind one of floats the rates have them, as most of the networks that these were fitted on have activations there."""
    predicted = []
    for function in ("relu", "gelu"):
        b = GraphBuilder("g")
        x, w = b.input("x", tensor("f32" if kind == "matmul" else "u8", ("n", 64))), np.ones((64, 32))
        product = b(kind, x, b.constant(w.astype(np.float32 if kind == "matmul" else np.int8)))
        graph = b.finish([b(function, b("cast", product, dtype=DType.F32))])
        module = registry.backend_of("cpu").compile(mlec.optimize(graph)[0], Target(), CompileOptions())
        predicted.append(CostModel(MACHINE).module_seconds(module, {"n": 64})[0])
    assert (predicted[1] > 1.2 * predicted[0]) == (kind == "matmul_int8")


def test_products_in_fewer_bits_have_peaks_of_their_own() -> None:
    """The same number tells passes whether bytes are worth it, kernels when to use threads, and reports how fast they could be."""
    machine = msgspec.structs.replace(MACHINE, byte_products=20.0, bf16_products=6.0)
    assert (machine.peak(8, 1), machine.peak(16, 1)) == (20 * machine.peak(32, 1), 6 * machine.peak(32, 1))
    roofline = msgspec.convert(msgspec.to_builtins(machine), Roofline)
    assert [roofline.peak(bits) for bits in (8, 16, 32, 64)] == [machine.peak(bits) for bits in (8, 16, 32, 64)]
    model = CostModel(machine, 1)

    def arithmetic(family: str) -> float:
        return model.seconds(Work({family: 10**12}, 0, 0, 32), 0) - machine.kernel_seconds

    assert arithmetic("product") == pytest.approx(20 * arithmetic("product of bytes"))
    assert arithmetic("product") == pytest.approx(6 * arithmetic("product of bf16"))


def test_what_the_processor_has_is_what_the_backend_says() -> None:
    facts = registry.backend_of("cpu").facts(Target())
    assert (this_machine().byte_products, this_machine().bf16_products) == (facts.byte_products, facts.bf16_products)


def test_every_op_has_a_family() -> None:
    import mlec.ops  # noqa: F401
    from mlec.ir.op import OPS
    from mlec.measuring.cost_model import FAMILIES, RATES

    assert set(FAMILIES.values()) <= set(RATES)
    assert set(FAMILIES) <= set(OPS)


def test_what_reading_the_inputs_takes() -> None:
    import pandas as pd
    import torch

    def seconds(signature: Signature, *inputs: Any, rows: int = 10) -> float:
        module: Any = SimpleNamespace(notes=(), constants={}, program=SimpleNamespace(kernels=()), signature=signature)
        return CostModel(MACHINE, 1).module_seconds(module, {"n": rows}, inputs)[0]

    array, tensor, frame = np.ones((10, 2), np.float32), torch.ones(10, 2), pd.DataFrame(np.ones((10, 2)))
    plain = product().signature
    assert seconds(plain) == seconds(plain, array) < seconds(plain, tensor) < seconds(plain, tensor, tensor)
    assert seconds(plain, frame) > seconds(plain, array)
    feed = ColumnFeed((0, 1), (Coding(("x",)),) * 2)
    coded = msgspec.structs.replace(plain, table=TableSpec(2, (feed,)))
    assert seconds(coded) == seconds(coded, frame) > seconds(plain, frame)
    assert seconds(coded, rows=10**6) > seconds(coded) + 2 * 10**6 * 1e-9
