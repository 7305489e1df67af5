"""How well layers do on 8 bits: each beside itself in float32, on the same inputs.

Each result of a layer has an error of its own, so some hundred rows of them tell what all would, and nothing is compiled for it: rows, or
windows of images, are multiplied with the weights, and the same with the numbers that their 8 bits stand for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from mlec.ir import Value
from mlec.ir.dim import static_dims
from mlec.ir.op import Array
from mlec.ops.windows import Geometry
from mlec.passes.quantize.layers import Layer
from mlec.passes.quantize.plans import Plan
from mlec.passes.quantize.statistics import Parts

MOST_ROWS = 1024
"""Of the rows or windows that a layer reads in one part of the calibration data, so many, drawn at random, are looked at."""


def signal_to_noise(
    plans: Mapping[Layer, Sequence[Plan]], finite: Mapping[Value, bool], parts: Parts
) -> dict[Plan, float]:
    """For each plan, the power of the layer's results over that of their errors, in decibels; NaN where results are not finite.

    Every layer reads what the float32 network gives it.

    Args:
        plans: of each layer, the ways to compute it.
        finite: of what layers read, whether all numbers in it are finite.
        parts: the numbers that layers read.
    """
    powers = {plan: np.zeros(2) for group in plans.values() for plan in group}
    rng = np.random.default_rng(0)
    for part in parts():
        for layer, group in plans.items():
            rows = _rows(layer, np.asarray(part[layer.input]), rng)
            with np.errstate(over="ignore", invalid="ignore"):
                wanted = _product(layer, rows, layer.weights) + layer.bias
                for plan in group:
                    error = wanted - _on_eight_bits(plan, rows)
                    powers[plan] += [_power(wanted), _power(error)]
    return {plan: _decibels(*found) if finite[plan.layer.input] else math.nan for plan, found in powers.items()}


def of_table(plan: Plan) -> float:
    """The same of a table of which rows are looked up, by all of them."""
    table = plan.layer.weights
    if not np.isfinite(table).all():
        return math.nan
    return _decibels(_power(table), _power(table - plan.weights * plan.scales))


def _rows(layer: Layer, x: Array, rng: np.random.Generator) -> Array:
    """Some of the rows that a layer multiplies with its weights: ``[rows, terms]``, of a convolution ``[rows, taps, channels]``."""
    if not layer.is_conv:
        rows = x.reshape(-1, x.shape[-1])
        return rows[_picked(len(rows), rng)]
    x = x if x.ndim == 4 else x[:, :, None]
    geometry = Geometry.of(layer.attrs, 2)
    taps = layer.weights.shape[:2]
    extents = static_dims(geometry.positions(x.shape[2:], taps))
    image, *corner = np.unravel_index(_picked(len(x) * math.prod(extents), rng), (len(x), *extents))
    places, inside = [], []
    for axis in (0, 1):
        at = (corner[axis] * geometry.strides[axis] - geometry.before[axis])[:, None] + np.arange(
            taps[axis]
        ) * geometry.dilations[axis]
        inside.append((at >= 0) & (at < x.shape[2 + axis]))
        places.append(np.clip(at, 0, x.shape[2 + axis] - 1))
    (down, across), (within, beside) = places, inside
    found = x[image[:, None, None], :, down[:, :, None], across[:, None, :]]  # [rows, kh, kw, channels]
    known = np.where((within[:, :, None] & beside[:, None, :])[..., None], found, np.float32(0))
    return known.reshape(len(known), -1, x.shape[1])


def _picked(count: int, rng: np.random.Generator) -> Array:
    return (
        np.arange(count) if count <= MOST_ROWS else np.sort(rng.choice(count, MOST_ROWS, replace=False, shuffle=False))
    )


def _product(layer: Layer, rows: Array, weights: Array) -> Array:
    """``[rows, output channels]``"""
    if not layer.is_conv:
        return np.asarray(rows @ weights)
    groups, channels = layer.node.attrs["groups"], weights.shape[-1]
    split = rows.reshape(*rows.shape[:2], groups, -1).transpose(2, 0, 1, 3).reshape(groups, len(rows), -1)
    columns = weights.reshape(split.shape[-1], groups, -1).transpose(1, 0, 2)
    return np.asarray((split @ columns).transpose(1, 0, 2).reshape(len(rows), channels))


def _on_eight_bits(plan: Plan, rows: Array) -> Array:
    """What the layer makes of the rows by the plan."""
    given = rows if plan.divisor is None else rows * (1 / plan.divisor).astype(np.float32)
    steps = (plan.input.rounded(given) / plan.input.scale).astype(np.float32) if plan.kind == "int8" else given
    return _product(plan.layer, steps, plan.weights.astype(np.float32)) * plan.scales + plan.bias


def _power(numbers: Array) -> float:
    return float(np.sum(numbers.astype(np.float64) ** 2))


def _decibels(signal: float, noise: float) -> float:
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
