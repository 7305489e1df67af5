"""A small network with a report, made without a backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlec.backends.base import KernelNote
from mlec.ir import Graph, GraphBuilder, Location, tensor
from mlec.measuring.cost_model import CostModel
from mlec.measuring.machine import Machine
from mlec.passes.pipelines import named_pipeline
from mlec.report import OptimizationReport, graph_picture
from mlec.runtime.program import KernelInfo

MACHINE = Machine(flops=1e11, flops64=5e10, bandwidth=1e10, kernel_seconds=5e-7)
HOSTILE = '<script>alert("1")</script>&\'\x1b[31m'


def perceptron(file: str = "net.py", name: str = "mlp", blocks: int = 2, width: int = 40) -> Graph:
    """``blocks`` times matmul, add, relu and a residual, then a softmax."""
    rng = np.random.default_rng(0)
    b = GraphBuilder(name)
    h = x = b.input("x", tensor("f32", ("n", width)))
    for i in range(blocks):
        with b.at(Location(file, 10 + i, f"layers.{i}")):
            weights = b.constant(rng.normal(size=(width, width)).astype(np.float32))
            bias = b.constant(rng.normal(size=width).astype(np.float32))
            h = b("add", b("relu", b("add", b("matmul", h, weights), bias)), h if i else x)
    with b.at(Location(file, 99, "head")):
        return b.finish([b("softmax", h, axis=-1)])


def report_of(graph: Graph, **fields: Any) -> OptimizationReport:
    """The report of the default pipeline, as `mlec.compile` fills it, with times that are made up."""
    after, records = named_pipeline("default").without("stability").run(graph)
    report = OptimizationReport(model={"name": graph.name, "source": "torch", "kind": "network"})
    report.add_passes(records, CostModel(MACHINE))
    kernels = [
        KernelInfo(f"{node.name}_{i}", node.name, str(node.loc), str(node.cost.flops), str(node.cost.bytes))
        for i, node in enumerate(after.compute_nodes)
    ]
    notes = {kernel.symbol: KernelNote(kernel.symbol, kernel.op, "one loop") for kernel in kernels}
    report.add_kernels(kernels, notes, {kernel.symbol: 1e-6 * (i + 1) for i, kernel in enumerate(kernels)})
    report.machine = MACHINE.to_dict()
    report.graphs = {"before": graph_picture(graph), "after": graph_picture(after)}
    report.timing = {
        "compile_seconds": 1.5,
        "predicted_seconds": {"1": 1e-6, "64": 2e-5},
        "measured": {"rows": 256, "compiled_ms": 0.25, "source_ms": 1.0, "speedup": 4.0},
    }
    report.memory = {"weights_bytes": 2048, "peak_bytes": 4096}
    report.parity = {
        "tolerance": {"rtol": 1e-4, "atol": 1e-6},
        "methods": {
            "run": {"method": "run", "rows": 256, "max_abs_error": 2e-7, "max_rel_error": 3e-7, "excess": 0.0042}
        },
    }
    for key, value in fields.items():
        setattr(report, key, value)
    return report


@pytest.fixture(scope="session")
def report() -> OptimizationReport:
    return report_of(perceptron())
