"""Real numbers in 8 bits: what one tensor of activations, and what the weights of one layer become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mlec.ir.op import Array

LEVELS = 256
LEAST_SCALE, MOST_SCALE = 2.0**-100, 2.0**100
"""Scales whose inverse float32 holds."""


@dataclass(frozen=True)
class Affine:
    """Activations as u8: ``(q - zero_point) * scale``. The real number 0 is one of them, as padding needs it."""

    scale: float
    zero_point: int

    @staticmethod
    def of(low: float, high: float) -> Affine:
        """The numbers between two bounds, and 0."""
        low, high = min(low, 0.0), max(high, 0.0)
        width = high - low
        if not np.isfinite(width) or width <= 0:
            return Affine(1.0, 0)
        scale = float(np.float32(min(max(width / (LEVELS - 1), LEAST_SCALE), MOST_SCALE)))
        return Affine(scale, int(np.clip(np.rint(-low / scale), 0, LEVELS - 1)))

    def rounded(self, numbers: Array) -> Array:
        """The nearest numbers that there are, in float64."""
        steps = np.clip(np.rint(numbers / self.scale) + self.zero_point, 0, LEVELS - 1)
        return np.asarray((steps - self.zero_point) * self.scale)

    @property
    def attrs(self) -> dict[str, Any]:
        """Of the ops `quantize` and `dequantize`."""
        return {"scale": self.scale, "zero_point": self.zero_point}


def quantized_weights(weights: Array) -> tuple[Array, Array]:
    """Weights ``[..., channels]`` as i8 between -127 and 127, and the scale of each channel (float32); NaN becomes 0."""
    axes = tuple(range(weights.ndim - 1))
    known = np.where(np.isfinite(weights), weights, 0).astype(np.float64)
    largest = np.max(np.abs(known), axis=axes, initial=0.0)
    scales = np.clip(largest / 127, LEAST_SCALE, MOST_SCALE).astype(np.float32)
    return np.clip(np.rint(known / scales.astype(np.float64)), -127, 127).astype(np.int8), scales
