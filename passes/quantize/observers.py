"""Between which numbers the activations of a layer count: observers, which look at a histogram of them.

A range that covers every number wastes steps on the few that lie far out; one that is too narrow clips too many. Each method is
another answer:

* ``minmax``: covers everything.
* ``percentile``: leaves out the same small part at either end.
* ``mse``: makes the mean squared error of rounding and clipping the least.
* ``entropy``: makes the distribution of the 256 numbers most like that of the activations (least Kullback-Leibler divergence).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlec.errors import UsageError
from mlec.ir.op import Array
from mlec.passes.quantize.numbers import LEVELS, Affine

BINS = 2048
CANDIDATES = 96
"""Ranges that a search tries."""

NEVER = 1e-9
"""Probability of what should not occur at all, where its logarithm is taken."""

Range = tuple[float, float]


@dataclass(eq=False)
class Histogram:
    """How often numbers occur between two bounds, in `BINS` equal bins. What is added comes in any number of parts.

    Attributes:
        low, high: all numbers lie between them.
        counts: (BINS,) of int64.
    """

    low: float
    high: float
    counts: Array

    @classmethod
    def between(cls, low: float, high: float) -> Histogram:
        return cls(low, high, np.zeros(BINS, np.int64))

    def add(self, numbers: Array) -> None:
        """Counts numbers; those that are not finite, or beyond the bounds, are left out or count at the ends."""
        flat = numbers.reshape(-1)
        flat = flat[np.isfinite(flat)]
        width = self.high - self.low
        if width <= 0:
            self.counts[0] += flat.size
            return
        places = ((flat - np.float32(self.low)) * np.float32(BINS / width)).astype(np.int64)
        self.counts += np.bincount(np.clip(places, 0, BINS - 1), minlength=BINS)

    @property
    def centres(self) -> Array:
        """The number that stands for each bin."""
        step = (self.high - self.low) / BINS
        return np.asarray(self.low + step * (np.arange(BINS) + 0.5))


def minmax(histogram: Histogram, percentile: float = 100.0) -> Range:
    return histogram.low, histogram.high


def by_percentile(histogram: Histogram, percentile: float) -> Range:
    """The range without ``(100 - percentile) / 2`` percent of the numbers at either end."""
    total = histogram.counts.sum()
    left_out = (100.0 - percentile) / 200.0 * total
    below = np.cumsum(histogram.counts)
    above = np.cumsum(histogram.counts[::-1])[::-1]
    kept = np.flatnonzero((below > left_out) & (above > left_out))
    if not kept.size:
        return histogram.low, histogram.high
    step = (histogram.high - histogram.low) / BINS
    return histogram.low + step * kept[0], histogram.low + step * (kept[-1] + 1)


def squared_error(histogram: Histogram, candidate: Range) -> float:
    """Sum of the squared errors that 8 bits over a range make."""
    centres = histogram.centres
    return float(np.sum(histogram.counts * (Affine.of(*candidate).rounded(centres) - centres) ** 2))


def by_squared_error(histogram: Histogram, percentile: float = 100.0) -> Range:
    """Narrows both ends together, then either by itself."""
    best = (histogram.low, histogram.high)
    parts = np.linspace(1.0, 1.0 / CANDIDATES, CANDIDATES)
    for low_moves, high_moves in ((True, True), (True, False), (False, True)):
        low, high = best
        tried = [(low * part if low_moves else low, high * part if high_moves else high) for part in parts]
        best = min(tried, key=lambda candidate: squared_error(histogram, candidate))
    return best


def divergence(counts: Array, first: int, last: int) -> float:
    """How much is lost (Kullback-Leibler, in nats) when the bins ``first`` up to ``last`` are kept, in `LEVELS` groups of equal width.

    What lies outside counts at the ends, as clipping puts it there. A group spreads its own numbers evenly over those of its bins that hold
    any.
    """
    kept = counts[first:last].astype(np.float64)
    clipped = kept.copy()
    clipped[0] += counts[:first].sum()
    clipped[-1] += counts[last:].sum()
    groups = np.arange(last - first) * LEVELS // (last - first)
    occupied = clipped > 0
    sums = np.bincount(groups, kept, minlength=LEVELS)
    sharing = np.bincount(groups, occupied, minlength=LEVELS)
    spread = np.where(occupied, sums[groups] / np.maximum(sharing[groups], 1), 0.0)
    total, of_kept = clipped.sum(), kept.sum()
    if not of_kept:
        return float("inf")
    wanted, given = clipped[occupied] / total, np.maximum(spread[occupied] / of_kept, NEVER)
    return float(np.sum(wanted * np.log(wanted / given)))


def by_entropy(histogram: Histogram, percentile: float = 100.0) -> Range:
    """Narrows both ends together; 0 stays inside. It is exact in any range, so the many zeros behind a ReLU do not count."""
    step = (histogram.high - histogram.low) / BINS
    zero = min(max(round(-histogram.low / step), 0), BINS) if step > 0 else 0
    counts = histogram.counts.copy()
    at = min(max(int(-histogram.low / step), 0), BINS - 1) if step > 0 else 0
    beside = np.delete(counts[max(at - 2, 0) : at + 3], at - max(at - 2, 0))
    counts[at] = min(counts[at], int(beside.mean()))
    best, least = (0, BINS), np.inf
    for part in np.linspace(1.0, LEVELS / BINS, CANDIDATES):
        first, last = round(zero * (1 - part)), round(zero + (BINS - zero) * part)
        if last - first < LEVELS:
            break
        lost = divergence(counts, first, last)
        if lost < least:
            best, least = (first, last), lost
    return histogram.low + step * best[0], histogram.low + step * best[1]


METHODS: dict[str, Callable[[Histogram, float], Range]] = {
    "mse": by_squared_error,
    "minmax": minmax,
    "percentile": by_percentile,
    "entropy": by_entropy,
}
"""By name, the range that a histogram tells; the second argument is the percentile."""


def check_method(name: str, percentile: float) -> None:
    """Refuses a method that there is not, and a percentile that is none.

    Raises:
        UsageError: naming the methods.
    """
    if name not in METHODS:
        raise UsageError(f"method takes {', '.join(METHODS)}, got {name!r}", hint="mse is the default")
    if not 50.0 < percentile <= 100.0:
        raise UsageError(f"percentile must be above 50 and at most 100, got {percentile}", hint="99.99 is the default")
