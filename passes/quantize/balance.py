"""Moves outliers of activations into weights, where some channels are far larger than the others.

With one scale for a whole tensor, a channel a hundred times larger than the rest leaves that one or two steps of the 256. Dividing
every channel by a number and multiplying the weights that read it with the same number changes no result, but evens out what has to be
rounded: ``max|x_j| ** strength / max|w_j| ** (1 - strength)`` shares the difficulty between both.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlec.ir.op import Array
from mlec.passes.quantize.layers import Layer

UNEVEN = 8.0
"""From this ratio of the largest channel to the median one on, balancing is tried."""
MOST = 1e4


def divisor_of(largest: Array, readers: Sequence[Layer], strength: float) -> Array | None:
    """What to divide each channel by, float32; None where the channels are even enough.

    Args:
        largest: (k,), the largest magnitude of each channel.
        readers: the products that read them.
        strength: 0 leaves all to the activations, 1 evens them out.
    """
    median = float(np.median(largest))
    if strength <= 0 or median <= 0 or float(largest.max()) < UNEVEN * median:
        return None
    weights = np.max([np.abs(layer.weights).max(axis=1) for layer in readers], axis=0)
    known = (largest > 0) & (weights > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        divisor = np.where(known, largest**strength / weights ** (1 - strength), 1.0)
    middle = float(np.exp(np.mean(np.log(divisor[known])))) if known.any() else 1.0
    return np.clip(np.where(known, divisor / middle, 1.0), 1 / MOST, MOST).astype(np.float32)
