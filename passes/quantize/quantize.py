"""The pass: calibrates, judges each layer, and rewrites those that pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from mlec.ir import Graph, Value
from mlec.ir.op import Array
from mlec.passes.quantize.balance import divisor_of
from mlec.passes.quantize.emit import emit, source_of
from mlec.passes.quantize.judge import signal_to_noise
from mlec.passes.quantize.layers import Layer, find_layers
from mlec.passes.quantize.numbers import Affine
from mlec.passes.quantize.observers import METHODS, Histogram, check_method
from mlec.passes.quantize.plans import Plan, plan_of
from mlec.passes.quantize.race import Times, predicted, race
from mlec.passes.quantize.statistics import Batch, Place, Watched, histograms, made_inputs, watch
from mlec.pipeline import Pass, PassContext, PassResult, Remark, Tolerance

BETTER = 1.0
"""Decibels that balancing must be worth."""
SLOWER = 1.05
"""A layer may take so many times as long as in float32: within the noise, and its weights take a quarter of the memory."""


@dataclass(frozen=True)
class QuantizeInt8(Pass):
    """Brings products and convolutions with known weights to 8 bits, where that keeps their results and is faster.

    Options:
        calibration: inputs as the model will see them: batches of one array for each input of the graph, or the array of a single input.
            `mlec.compile` takes more forms. None calibrates on random numbers, which says nothing about a real model.
        method: how the range of activations is chosen: mse, minmax, percentile or entropy.
        percentile: of the numbers that method=percentile keeps.
        min_sqnr: decibels by which the results of a layer must exceed their error on the calibration data; else it stays in float32.
        balance: how much of the outliers of activations goes into weights (SmoothQuant), 0 to 1; 0 moves none.
        correct_bias: takes the mean error of rounded weights off the biases.
        measure: a layer that is not faster on 8 bits stays in float32. Those are timed for which that can't be predicted.
    """

    calibration: Any = field(default=None, compare=False, repr=False)
    method: str = "mse"
    percentile: float = 99.99
    min_sqnr: float = 20.0
    balance: float = 0.5
    correct_bias: bool = True
    measure: bool = True
    name: ClassVar[str] = "quantize-int8"
    preserves: ClassVar[Tolerance] = Tolerance(rtol=0.2, atol=1e-3, signed_zeros=False, specials=False)
    before: ClassVar[str] = "layout"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        check_method(self.method, self.percentile)
        layers, remarks = find_layers(graph)
        if not layers:
            return PassResult(graph, tuple(remarks))
        batches = _batches(graph, self.calibration)
        if self.calibration is None:
            remarks.append(
                Remark("missed", "calibrated on random numbers, for want of calibration data", rule=self.name)
            )
        plans, judged = self.judged(graph, layers, batches, context)
        best = [self.best(plans[layer], judged) for layer in layers]
        rows = max((len(array) for batch in batches for array in batch if array.ndim), default=1)
        racing = [plan for plan in best if self.measure and self.keeps(judged[plan])]
        gains = {plan: gain for plan in racing if (gain := predicted(plan, rows, context.target)) is not None}
        times = race([plan for plan in racing if plan not in gains], rows, context)
        chosen: list[Plan] = []
        findings: list[Mapping[str, Any]] = []
        for plan in best:
            kept, reason = self.decide(judged[plan], times.get(plan), gains.get(plan))
            node, what = plan.layer.node, "on 8 bits" if plan.kind == "int8" else "with weights of 8 bits"
            message = f"{node.name} {what if kept else 'stays in float32'}: {reason}"
            remarks.append(Remark("applied" if kept else "missed", message, node.loc, self.name))
            findings.append(self.finding(plan, judged[plan], times.get(plan), gains.get(plan), kept, reason))
            if kept:
                chosen.append(plan)
        return PassResult(emit(graph, chosen) if chosen else graph, tuple(remarks), tuple(findings))

    def judged(
        self, graph: Graph, layers: Sequence[Layer], batches: Sequence[Batch], context: PassContext
    ) -> tuple[dict[Layer, list[Plan]], dict[Plan, float]]:
        """The ways to compute each layer, and the decibels of each.

        The preferred ones come first: on 8 bits, also balanced where its input channels are uneven; a product with its weights in 8 bits
        only.
        """
        sources = {layer: source_of(graph, layer.input) for layer in layers}
        places: list[Place] = [(layer.input, layer.channel_axis) for layer in layers]
        places += [(source, -1) for layer, source in sources.items() if source is not layer.input]
        seen, parts = watch(graph, list(dict.fromkeys(places)), batches, context)
        divisors = self.divisors(layers, seen)
        plain, balanced = histograms(seen, divisors, parts)
        ranges: dict[Value, Affine] = {source: self.affine(plain[source]) for source in sources.values()}
        plans: dict[Layer, list[Plan]] = {}
        for layer in layers:
            mean = seen[layer.input, layer.channel_axis].mean if self.correct_bias else None
            plans[layer] = [plan_of(layer, "int8", ranges[sources[layer]], mean)]
            if not layer.is_conv and layer.input in divisors:
                affine = self.affine(balanced[layer.input])
                plans[layer].append(plan_of(layer, "int8", affine, mean, divisors[layer.input]))
            if not layer.is_conv:
                plans[layer].append(plan_of(layer, "weights", ranges[sources[layer]], mean))
        finite = {value: found.finite for (value, _), found in seen.items()}
        return plans, signal_to_noise(plans, finite, parts)

    def divisors(self, layers: Sequence[Layer], seen: Mapping[Place, Watched]) -> dict[Value, Array]:
        readers: dict[Value, list[Layer]] = {}
        for layer in layers:
            if not layer.is_conv:
                readers.setdefault(layer.input, []).append(layer)
        found = {value: divisor_of(seen[value, -1].largest, group, self.balance) for value, group in readers.items()}
        return {value: divisor for value, divisor in found.items() if divisor is not None}

    def affine(self, histogram: Histogram) -> Affine:
        return Affine.of(*METHODS[self.method](histogram, self.percentile))

    def keeps(self, sqnr: float) -> bool:
        """Whether results are near enough; NaN is not."""
        return sqnr >= self.min_sqnr

    def best(self, plans: Sequence[Plan], judged: Mapping[Plan, float]) -> Plan:
        """The first way that keeps the results, or else the first; balanced only where that is clearly better."""
        plain, *others = plans
        balanced = next(
            (plan for plan in others if plan.kind == "int8" and judged[plan] > judged[plain] + BETTER), None
        )
        first = balanced or plain
        weights = next((plan for plan in others if plan.kind == "weights"), None)
        return (
            weights if weights is not None and not self.keeps(judged[first]) and self.keeps(judged[weights]) else first
        )

    def decide(self, sqnr: float, times: Times | None, gain: float | None) -> tuple[bool, str]:
        """Whether a layer may work on 8 bits, and why."""
        if math.isnan(sqnr):
            return False, "its results on the calibration data are not finite"
        if not self.keeps(sqnr):
            return False, f"{sqnr:.1f} dB between its results and their error, less than {self.min_sqnr:g}"
        near = f"{sqnr:.1f} dB between its results and their error"
        if gain is not None:
            return True, f"{near}, predicted to be {gain:.2g} times as fast as float32 or more"
        if times is None:
            return True, near
        taken = f"measured: {times[1] * 1e6:.3g} us against {times[0] * 1e6:.3g} us in float32"
        return (True, f"{near}, {taken}") if times[1] <= times[0] * SLOWER else (False, f"slower on 8 bits: {taken}")

    def finding(
        self, plan: Plan, sqnr: float, times: Times | None, gain: float | None, kept: bool, reason: str
    ) -> dict[str, Any]:
        layer = plan.layer
        leaves = layer.node.loc.leaves
        return {
            "layer": layer.name,
            "location": str(leaves[0]) if leaves else "",
            "op": layer.node.name,
            "weights": list(layer.weights.shape),
            "method": self.method + (" balanced" if plan.divisor is not None else ""),
            "scale": plan.input.scale,
            "zero_point": plan.input.zero_point,
            "sqnr_db": round(sqnr, 2) if math.isfinite(sqnr) else None,
            "float32_us": round(times[0] * 1e6, 3) if times is not None else None,
            "int8_us": round(times[1] * 1e6, 3) if times is not None else None,
            "predicted_gain": round(gain, 2) if gain is not None else None,
            "decision": plan.kind if kept else "float32",
            "reason": reason,
        }


def _batches(graph: Graph, calibration: Any) -> list[list[Array]]:
    """Calibration data, as the graph's inputs."""
    if calibration is None:
        return made_inputs(graph)
    batches = [[calibration]] if hasattr(calibration, "__array__") else calibration
    return [
        [np.asarray(array, dtype=value.type.dtype.numpy) for array, value in zip(batch, graph.inputs, strict=True)]
        for batch in batches
    ]
