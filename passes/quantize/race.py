"""How fast layers are on 8 bits: each beside itself in float32, as kernels of one graph that is compiled and timed on the side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlec.ir import Graph, GraphBuilder, Location, TensorType, Value
from mlec.ir.dim import evaluate
from mlec.ir.dtype import DType
from mlec.ir.op import Array
from mlec.passes.quantize.emit import LAST, result_of
from mlec.passes.quantize.plans import Plan
from mlec.pipeline import PassContext

ROWS = 64
"""Extent of symbolic dims, at most: as in the calibration data where that has fewer."""
Times = tuple[float, float]
"""Seconds of one call in float32, and on 8 bits."""


def race(plans: Sequence[Plan], rows: int, context: PassContext) -> dict[Plan, Times]:
    """Times each plan beside its layer in float32; nothing where that cannot be measured here. Layers that are alike run once.

    Only the kernel of the product counts, with the bias behind it, and on 8 bits also with the way back to them: what is converted before a
    layer is shared by all that read it, and mostly done where it is made.
    """
    if context.trials is None or not plans:
        return {}
    alike: dict[object, list[Plan]] = {}
    for plan in plans:
        alike.setdefault(_form(plan), []).append(plan)
    b = GraphBuilder("race")
    outputs: list[Value] = []
    for i, group in enumerate(alike.values()):
        with b.at(Location(scope=f"float {i}")):
            outputs.append(_in_float(b, group[0], i))
        with b.at(Location(scope=f"int {i}")):
            outputs.append(_in_eight(b, group[0], i))
    graph = b.finish(outputs)
    taken: dict[str, float] = {}
    for op, location, seconds in context.trials.times(graph, _inputs(graph, min(rows, ROWS))):
        if op.startswith(("matmul", "conv", "depthwise")):
            taken[location] = taken.get(location, 0.0) + seconds
    return {
        plan: (taken[f"float {i}"], taken[f"int {i}"])
        for i, group in enumerate(alike.values())
        for plan in group
        if f"float {i}" in taken and f"int {i}" in taken
    }


def _form(plan: Plan) -> object:
    """What the time of a layer depends on."""
    layer = plan.layer
    return plan.kind, str(layer.input.type), layer.weights.shape, tuple(sorted(map(str, layer.node.attrs.items())))


def _in_float(b: GraphBuilder, plan: Plan, number: int) -> Value:
    layer = plan.layer
    x = b.input(f"x{number}", layer.input.type)
    if not layer.is_conv:
        return b("add", b("matmul", x, b.constant(layer.weights)), b.constant(layer.bias))
    weights = np.ascontiguousarray(layer.weights.transpose(3, 2, 0, 1))
    return b("add", b("conv", x, b.constant(weights), **layer.node.attrs), b.constant(layer.bias.reshape(-1, 1, 1)))


def _in_eight(b: GraphBuilder, plan: Plan, number: int) -> Value:
    layer = plan.layer
    shape = layer.input.type.shape
    given = TensorType(
        tuple(shape[axis] for axis in LAST) if layer.is_conv else shape, DType.U8 if plan.kind == "int8" else DType.F32
    )
    result = result_of(b, plan, b.input(f"q{number}", given))
    return b("quantize", result, scale=1.0, zero_point=128) if plan.kind == "int8" else result


def _inputs(graph: Graph, rows: int) -> list[Array]:
    rng = np.random.default_rng(0)
    arrays: list[Array] = []
    for value in graph.inputs:
        shape = tuple(evaluate(dim, dict.fromkeys(graph.symbols, rows)) for dim in value.type.shape)
        numbers = rng.integers(0, 256, shape) if value.type.dtype is DType.U8 else rng.normal(size=shape)
        arrays.append(numbers.astype(value.type.dtype.numpy))
    return arrays
