"""How fast layers are on 8 bits: predicted, and where that leaves a doubt, each timed beside itself in float32, as kernels of one graph
that is compiled on the side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlec.ir import Graph, GraphBuilder, Location, TensorType, Value
from mlec.ir.dim import evaluate, symbols_of
from mlec.ir.dtype import DType
from mlec.ir.op import Array
from mlec.ops.windows import Geometry
from mlec.passes.quantize.emit import result_of
from mlec.passes.quantize.images import shape_of_image
from mlec.passes.quantize.plans import Plan
from mlec.pipeline import PassContext, TargetFacts

ROWS = 64
"""Extent of symbolic dims, at most: as in the calibration data where that has fewer."""
MOST_WORK = 4e9
"""Operations of all layers, in float32: with large ones there are fewer rows."""
Times = tuple[float, float]
"""Seconds of one call in float32, and on 8 bits."""

CERTAIN = 1.5
"""So much faster, a layer is not timed."""
LEAST_WORK = 2e6
"""Operations of a layer from which on the calls of kernels do not count."""
REACHED = 0.5
"""Of what the processor multiplies at most, what products of bytes do with all that is around them."""
WINOGRAD = 3.0
"""How much faster than its multiplications a convolution of 3 x 3 in float32 can be; of other windows it is by none."""


def predicted(plan: Plan, rows: int, facts: TargetFacts) -> float | None:
    """How many times faster than in float32 a layer is at least; None where that is not certain to be more than `CERTAIN`.

    Segments of 64 bytes and blocks of 16 columns are what is multiplied at once (see `mlec.backends.tvm.kernels.int8`).
    """
    layer = plan.layer
    segment, columns = layer.weights.shape[-2], layer.weights.shape[-1]
    if plan.kind != "int8" or layer.node.attrs.get("groups", 1) != 1:
        return None
    if layer.is_conv:
        segment *= layer.weights.shape[1]
    if evaluate(layer.node.cost.flops, dict.fromkeys(_symbols(plan), min(rows, ROWS))) < LEAST_WORK:
        return None
    used = segment / (-(-segment // 64) * 64) * columns / (-(-columns // 16) * 16)
    gain = REACHED * used * facts.byte_products / (WINOGRAD if _may_save_products(plan) else 1)
    return gain if gain >= CERTAIN else None


def _may_save_products(plan: Plan) -> bool:
    """Whether float32 may take Winograd's sums: their windows are 3 x 3, side by side in steps of one."""
    layer = plan.layer
    if not layer.is_conv or layer.weights.shape[:2] != (3, 3):
        return False
    geometry = Geometry.of(layer.attrs, 2)
    return all(step == 1 for step in (*geometry.strides, *geometry.dilations))


def _symbols(plan: Plan) -> frozenset[str]:
    return frozenset().union(*(symbols_of(dim) for dim in plan.layer.output.type.shape))


def race(plans: Sequence[Plan], rows: int, context: PassContext) -> dict[Plan, Times]:
    """Times each plan beside its layer in float32; nothing where that cannot be measured here. Layers that are alike run once.

    Only the kernel of the product counts, whatever it became, with the bias behind it, and on 8 bits also with the way back to them: what
    is converted or transposed before a layer is shared by all that read it, and mostly done where it is made.
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
    work = evaluate(graph.cost.flops, dict.fromkeys(graph.symbols, 1))
    rows = max(1, min(rows, ROWS, int(MOST_WORK // max(work, 1))))
    taken: dict[str, float] = {}
    for op, location, seconds in context.trials.times(graph, _inputs(graph, rows)):
        if op != "transpose":
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
    space = (1,) * (layer.input.type.rank - 2)
    weights = np.ascontiguousarray(layer.weights.transpose(3, 2, 0, 1))
    weights = weights if len(space) == 2 else weights[:, :, 0]
    return b("add", b("conv", x, b.constant(weights), **layer.node.attrs), b.constant(layer.bias.reshape(-1, *space)))


def _in_eight(b: GraphBuilder, plan: Plan, number: int) -> Value:
    layer = plan.layer
    shape = layer.input.type.shape
    given = TensorType(
        shape_of_image(shape) if layer.is_conv else shape, DType.U8 if plan.kind == "int8" else DType.F32
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
