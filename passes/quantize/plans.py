"""What becomes of a layer: its weights in 8 bits, the range of its inputs, and a bias that makes up for what rounding weights moves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mlec.ir import Value
from mlec.ir.op import Array
from mlec.passes.quantize.layers import Layer
from mlec.passes.quantize.numbers import Affine, quantized_weights

Kind = Literal["int8", "weights"]


@dataclass(frozen=True, eq=False)
class Plan:
    """One way to compute a layer with weights of 8 bits.

    Attributes:
        layer: which.
        kind: ``"int8"``: inputs in 8 bits as well; ``"weights"``: the inputs stay in float32.
        input: the numbers that inputs become.
        divisor: (k,), what each input channel is divided by before it is quantised, and its weights multiplied with; None: nothing.
        weights: i8, laid out as the layer's.
        scales: (n,) of float32: a sum times this is the result, but for the bias; of a table (rows, 1).
        bias: (n,) of float32, corrected.
    """

    layer: Layer
    kind: Kind
    input: Affine
    divisor: Array | None
    weights: Array
    scales: Array
    bias: Array


def plan_of(layer: Layer, kind: Kind, affine: Affine, mean: Array | None = None, divisor: Array | None = None) -> Plan:
    """Quantises the weights of a layer.

    Args:
        layer: which.
        kind: how.
        affine: the numbers that inputs (after the division) become.
        mean: (channels of the input,), the mean input: the error that rounded weights make of it is taken off the bias. None: it is not.
        divisor: see `Plan`.
    """
    wanted = layer.weights if divisor is None else layer.weights * divisor[:, None]
    weights, scales = quantized_weights(wanted)
    bias = layer.bias
    if mean is not None:
        error = wanted.astype(np.float64) - weights * scales.astype(np.float64)
        inputs = mean if divisor is None else mean / divisor
        bias = (bias + _of_mean(layer, error, inputs)).astype(np.float32)
    factor = affine.scale if kind == "int8" else 1.0
    return Plan(layer, kind, affine, divisor, weights, (scales * np.float64(factor)).astype(np.float32), bias)


def plans_of_tables(layers: Iterable[Layer]) -> dict[Layer, Plan]:
    """Those of layers that look up rows; what several of them read is one table again."""
    plans: dict[Layer, Plan] = {}
    rounded: dict[Value, Plan] = {}
    for layer in layers:
        if layer.constant not in rounded:
            weights, scales = quantized_weights(layer.weights.T)
            weights, scales = np.ascontiguousarray(weights.T), scales[:, None]
            rounded[layer.constant] = Plan(layer, "weights", Affine(1.0, 0), None, weights, scales, layer.bias)
        plans[layer] = replace(rounded[layer.constant], layer=layer)
    return plans


def _of_mean(layer: Layer, weights: Array, mean: Array) -> Array:
    """What the layer gives for its mean input, with other weights: of a convolution inside the image, where no padding is seen."""
    if not layer.is_conv:
        return np.asarray(mean @ weights)
    groups = layer.node.attrs["groups"]
    sums = weights.sum(axis=(0, 1))  # [c / groups, out]
    parts = sums.reshape(sums.shape[0], groups, -1)
    return np.asarray(np.einsum("gc,cgo->go", mean.reshape(groups, -1), parts)).reshape(-1)
