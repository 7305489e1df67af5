"""How well, and how fast, layers do on 8 bits: each beside itself in float32, on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mlec.ir import Graph, GraphBuilder
from mlec.passes.quantize.emit import FIRST, LAST, permuted, quantized, result_of
from mlec.passes.quantize.plans import Plan
from mlec.passes.quantize.statistics import Batch, parts_of, runner
from mlec.pipeline import PassContext


def signal_to_noise(
    graph: Graph, plans: Sequence[Plan], batches: Sequence[Batch], context: PassContext
) -> dict[Plan, float]:
    """For each plan, the power of the layer's results over that of their errors, in decibels; NaN where results are not finite.

    Every layer reads what the float32 network gives it.
    """
    b = GraphBuilder(f"{graph.name}_judged")
    b.adopt_interface(graph)
    for node in graph.nodes:
        b.keep(node)
    outputs = []
    for plan in plans:
        layer = plan.layer
        x = layer.input
        ours = (
            permuted(b, result_of(b, plan, permuted(b, quantized(b, x, plan), LAST)), FIRST)
            if layer.is_conv
            else result_of(b, plan, quantized(b, x, plan))
        )
        axes = tuple(range(layer.output.type.rank))
        error = b("sub", layer.output, ours)
        outputs += [b("sum", b("mul", v, v), axes=axes, keepdims=False) for v in (layer.output, error)]
    run = runner(b.finish(outputs), batches, context)
    powers = np.zeros((len(plans), 2))
    watched = [plan.layer.output for plan in plans]
    for part in parts_of(graph, batches, watched):
        powers += np.array([float(np.asarray(value)) for value in run(part)]).reshape(-1, 2)
    return {plan: _decibels(signal, noise) for plan, (signal, noise) in zip(plans, powers, strict=True)}


def _decibels(signal: float, noise: float) -> float:
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
