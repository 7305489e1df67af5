"""The pass: calibrates, judges each layer and then all of them together, and rewrites those that pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from mlec.ir import Graph, Value
from mlec.ir.op import Array
from mlec.passes.quantize.balance import divisor_of
from mlec.passes.quantize.emit import source_of, stored_values
from mlec.passes.quantize.guard import Budget, Verdict, guarded
from mlec.passes.quantize.judge import of_table, signal_to_noise
from mlec.passes.quantize.layers import Layer, channel_axis, find_layers
from mlec.passes.quantize.numbers import Affine
from mlec.passes.quantize.observers import METHODS, Histogram, check_method
from mlec.passes.quantize.plans import Plan, plan_of, plans_of_tables
from mlec.passes.quantize.race import Times, predicted, race
from mlec.passes.quantize.statistics import Batch, Parts, Place, Watched, histograms, made_inputs, watch
from mlec.pipeline import Pass, PassContext, PassResult, Remark, Tolerance

BETTER = 1.0
"""Decibels that balancing must be worth."""
SLOWER = 1.05
"""A layer may take so many times as long as in float32: within the noise, and its weights take a quarter of the memory."""
RUINS = "the outputs of the network lose too much with it"


@dataclass(frozen=True)
class QuantizeInt8(Pass):
    """Brings products and convolutions with known weights to 8 bits, where that keeps their results and is faster; so tables of embeddings.

    Options:
        calibration: inputs as the model will see them: batches of one array for each input of the graph, or the array of a single input.
            `mlec.compile` takes more forms. None calibrates on random numbers, which says nothing about a real model.
        method: how the range of activations is chosen: mse, minmax, percentile or entropy.
        percentile: of the numbers that method=percentile keeps.
        min_sqnr: decibels by which the results of a layer must exceed their error on the calibration data; else it stays in float32.
        balance: how much of the outliers of activations goes into weights (SmoothQuant), 0 to 1; 0 moves none.
        correct_bias: takes the mean error of rounded weights off the biases.
        tables: whether tables of which rows are looked up become 8 bits, too.
        measure: a layer that is not faster on 8 bits stays in float32. Those are timed for which that can't be predicted.
        max_accuracy_loss: the part of the rows of scores of classes by which accuracy may be expected to fall, on the calibration data:
            layers go back to float32 until it holds.
        max_error: the same of other outputs: the root mean square of the errors, relative to that of the results.
        tolerance: the bound on each number of all outputs; by default that of the pass.
    """

    calibration: Any = field(default=None, compare=False, repr=False)
    method: str = "mse"
    percentile: float = 99.99
    min_sqnr: float = 20.0
    balance: float = 0.5
    correct_bias: bool = True
    tables: bool = True
    measure: bool = True
    max_accuracy_loss: float = 0.005
    max_error: float = 0.1
    tolerance: Tolerance | None = field(default=None, compare=False, repr=False)
    name: ClassVar[str] = "quantize-int8"
    preserves: ClassVar[Tolerance] = Tolerance(rtol=0.2, atol=1e-3, signed_zeros=False, specials=False)
    before: ClassVar[str] = "layout"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        check_method(self.method, self.percentile)
        layers, remarks = find_layers(graph, self.tables)
        if not layers:
            return PassResult(graph, tuple(remarks))
        batches = _batches(graph, self.calibration)
        if self.calibration is None:
            remarks.append(
                Remark("missed", "calibrated on random numbers, for want of calibration data", rule=self.name)
            )
        plans, judged, stored, parts = self.judged(graph, layers, batches, context)
        best = [self.best(plans[layer], judged) for layer in layers]
        rows = max((len(array) for batch in batches for array in batch if array.ndim), default=1)
        racing = [plan for plan in best if self.measure and self.keeps(judged[plan]) and not plan.layer.is_table]
        gains = {plan: gain for plan in racing if (gain := predicted(plan, rows, context.target)) is not None}
        times = race([plan for plan in racing if plan not in gains], rows, context)
        decided = {plan: self.decide(judged[plan], times.get(plan), gains.get(plan)) for plan in best}
        chosen = [plan for plan in best if decided[plan][0]]
        if not chosen:
            verdict = Verdict(0, [], {}, [], [], graph)
        else:
            budget = Budget(self.max_accuracy_loss, self.max_error, self.tolerance or self.preserves)
            verdict = guarded(graph, chosen, stored, parts, batches, budget, context)
            decided |= dict.fromkeys(set(chosen).difference(verdict.kept), (False, RUINS))
        findings: list[Mapping[str, Any]] = []
        for plan in best:
            finding = self.finding(
                plan, judged[plan], times.get(plan), gains.get(plan), verdict.alone.get(plan), *decided[plan]
            )
            findings.append(finding)
            remarks.append(
                Remark("applied" if decided[plan][0] else "missed", _message(finding), plan.layer.node.loc, self.name)
            )
        summary = {"layers": len(best), **verdict.summary(self.max_accuracy_loss, self.max_error)}
        return PassResult(verdict.graph, tuple(remarks), tuple(findings), summary)

    def judged(
        self, graph: Graph, layers: Sequence[Layer], batches: Sequence[Batch], context: PassContext
    ) -> tuple[dict[Layer, list[Plan]], dict[Plan, float], dict[Value, Affine], Parts]:
        """The ways to compute each layer, the decibels of each, what else is handed over in 8 bits, and the calibration data.

        The preferred ones come first: on 8 bits, also balanced where its input channels are uneven; a product with its weights in 8 bits
        only; so tables, of which rows are a quarter of the bytes to read, so that they are not timed.
        """
        products = [layer for layer in layers if not layer.is_table]
        tables = plans_of_tables(layer for layer in layers if layer.is_table)
        sources = {layer: source_of(graph, layer.input) for layer in products}
        places: list[Place] = [(layer.input, layer.channel_axis) for layer in products]
        places += [(source, -1) for layer, source in sources.items() if source is not layer.input]
        handed = stored_values(graph, layers)
        places += [(value, channel_axis(value)) for value in handed]
        seen, parts = watch(graph, list(dict.fromkeys(places)), batches, context)
        divisors = self.divisors(products, seen)
        plain, balanced = histograms(seen, divisors, parts)
        ranges: dict[Value, Affine] = {source: self.affine(plain[source]) for source in sources.values()}
        plans: dict[Layer, list[Plan]] = {}
        for layer in products:
            mean = seen[layer.input, layer.channel_axis].mean if self.correct_bias else None
            plans[layer] = [plan_of(layer, "int8", ranges[sources[layer]], mean)]
            if not layer.is_conv and layer.input in divisors:
                affine = self.affine(balanced[layer.input])
                plans[layer].append(plan_of(layer, "int8", affine, mean, divisors[layer.input]))
            if not layer.is_conv:
                plans[layer].append(plan_of(layer, "weights", ranges[sources[layer]], mean))
        finite = {value: found.finite for (value, _), found in seen.items()}
        stored = {value: self.affine(plain[value]) for value in handed if finite[value]}
        judged = signal_to_noise(plans, finite, parts) | {plan: of_table(plan) for plan in tables.values()}
        return plans | {layer: [plan] for layer, plan in tables.items()}, judged, stored, parts

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
            return False, f"too far from float32: min_sqnr is {self.min_sqnr:g} dB"
        if gain is not None:
            return True, "near enough, and predicted to be faster"
        if times is None:
            return True, "near enough"
        faster = times[1] <= times[0] * SLOWER
        return faster, "near enough, and measured not to be slower" if faster else "measured to be slower on 8 bits"

    def finding(
        self,
        plan: Plan,
        sqnr: float,
        times: Times | None,
        gain: float | None,
        alone: float | None,
        kept: bool,
        reason: str,
    ) -> dict[str, Any]:
        layer, rounded = plan.layer, plan.kind == "int8"
        leaves = layer.node.loc.leaves
        return {
            "layer": layer.name,
            "location": str(leaves[0]) if leaves else "",
            "op": layer.node.name,
            "weights": list(layer.weights.shape),
            "method": self.method + (" balanced" if plan.divisor is not None else "") if rounded else None,
            "scale": plan.input.scale if rounded else None,
            "zero_point": plan.input.zero_point if rounded else None,
            "sqnr_db": round(sqnr, 2) if math.isfinite(sqnr) else None,
            "float32_us": round(times[0] * 1e6, 3) if times is not None else None,
            "int8_us": round(times[1] * 1e6, 3) if times is not None else None,
            "predicted_gain": round(gain, 2) if gain is not None else None,
            "output_error": float(f"{alone:.3g}") if alone is not None and math.isfinite(alone) else None,
            "decision": plan.kind if kept else "float32",
            "reason": reason,
        }


def _message(finding: Mapping[str, Any]) -> str:
    """The decision in words, with what it stands on."""
    what = {"int8": "on 8 bits", "weights": "with weights of 8 bits", "float32": "stays in float32"}[
        finding["decision"]
    ]
    numbers = []
    if finding["sqnr_db"] is not None:
        numbers.append(f"{finding['sqnr_db']:.1f} dB between its results and their error")
    if finding["int8_us"] is not None:
        numbers.append(f"{finding['int8_us']:.3g} us against {finding['float32_us']:.3g} us in float32")
    if finding["predicted_gain"] is not None:
        numbers.append(f"{finding['predicted_gain']:.2g} times as fast as float32 or more")
    if finding["output_error"] is not None:
        numbers.append(f"alone it moves the outputs by {finding['output_error']:.2%}")
    said = f"{finding['op']} {what}: {finding['reason']}"
    return f"{said} ({', '.join(numbers)})" if numbers else said


def _batches(graph: Graph, calibration: Any) -> list[list[Array]]:
    """Calibration data, as the graph's inputs."""
    if calibration is None:
        return made_inputs(graph)
    batches = [[calibration]] if hasattr(calibration, "__array__") else calibration
    return [
        [np.asarray(array, dtype=value.type.dtype.numpy) for array, value in zip(batch, graph.inputs, strict=True)]
        for batch in batches
    ]
