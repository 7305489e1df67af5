"""Each observer against an oracle that tries everything, element by element."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlec.errors import UsageError
from mlec.passes.quantize.numbers import LEVELS, Affine, quantized_weights
from mlec.passes.quantize.observers import (
    BINS,
    METHODS,
    NEVER,
    Histogram,
    by_entropy,
    by_percentile,
    by_squared_error,
    check_method,
    divergence,
    squared_error,
)

Array = np.ndarray


def histogram_of(numbers: Array) -> Histogram:
    histogram = Histogram.between(float(numbers.min()), float(numbers.max()))
    for part in np.array_split(numbers, 7):
        histogram.add(part)
    return histogram


@pytest.fixture(scope="module")
def normal() -> Array:
    """Mostly near 0, with a few numbers far out."""
    rng = np.random.default_rng(0)
    return np.concatenate([rng.normal(size=20_000), [-9.0, 30.0, 28.0]]).astype(np.float32)


def test_counting_in_parts_is_counting_at_once(normal: Array) -> None:
    found = histogram_of(np.concatenate([normal, [np.float32(np.nan)]])[:-1])
    wanted, _ = np.histogram(normal, BINS, (float(normal.min()), float(normal.max())))
    assert found.counts.sum() == normal.size
    assert np.abs(found.counts - wanted).sum() <= 0.002 * normal.size  # float32 edges


def test_what_is_not_finite_is_not_counted() -> None:
    histogram = Histogram.between(0.0, 1.0)
    histogram.add(np.array([np.nan, np.inf, -np.inf, 0.5], np.float32))
    assert histogram.counts.sum() == 1


def test_constants_have_a_range() -> None:
    histogram = Histogram.between(3.0, 3.0)
    histogram.add(np.full(5, 3.0, np.float32))
    for name, method in METHODS.items():
        affine = Affine.of(*method(histogram, 99.9))
        np.testing.assert_allclose(affine.rounded(np.array([0.0, 3.0])), [0.0, 3.0], atol=0.02, err_msg=name)


def test_percentile_is_that_of_the_sorted_numbers(normal: Array) -> None:
    low, high = by_percentile(histogram_of(normal), 99.0)
    ordered, left_out = np.sort(normal), int(0.005 * normal.size)
    step = (normal.max() - normal.min()) / BINS
    assert abs(low - ordered[left_out]) <= 2 * step
    assert abs(high - ordered[-1 - left_out]) <= 2 * step


def error_of(numbers: Array, low: float, high: float) -> float:
    """The squared error of each number by itself."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (LEVELS - 1)
    zero_point = round(-low / scale)
    total = 0.0
    for x in map(float, numbers):
        q = min(max(round(x / scale) + zero_point, 0), LEVELS - 1)
        total += ((q - zero_point) * scale - x) ** 2
    return total


def test_squared_error_is_what_rounding_each_number_makes(normal: Array) -> None:
    part = normal[-2003:]
    histogram = histogram_of(part)
    for candidate in ((-9.0, 30.0), (-4.0, 4.0), (-9.0, 5.0)):
        assert squared_error(histogram, candidate) == pytest.approx(error_of(part, *candidate), rel=0.1)


def test_the_least_squared_error_is_found(normal: Array) -> None:
    part = normal[-2003:]
    found = error_of(part, *by_squared_error(histogram_of(part)))
    tried = [error_of(part, -9.0 * a, 30.0 * b) for a in (1.0, 0.8, 0.6, 0.4, 0.3) for b in (1.0, 0.9, 0.6, 0.3, 0.15)]
    assert found <= 1.1 * min(tried)
    assert found < 0.9 * error_of(part, -9.0, 30.0) or min(tried) > 0.9 * error_of(part, -9.0, 30.0)


def divergence_by_definition(counts: Array, first: int, last: int) -> float:
    wanted = [float(c) for c in counts[first:last]]
    wanted[0] += float(counts[:first].sum())
    wanted[-1] += float(counts[last:].sum())
    groups: list[list[int]] = [[] for _ in range(LEVELS)]
    for i in range(last - first):
        groups[i * LEVELS // (last - first)].append(i)
    given = [0.0] * (last - first)
    for group in groups:
        occupied = [i for i in group if wanted[i]]
        for i in occupied:
            given[i] = sum(float(counts[first + j]) for j in group) / len(occupied)
    p, q = sum(wanted), sum(given)
    total = 0.0
    for a, b in zip(wanted, given, strict=True):
        if a:
            total += a / p * math.log((a / p) / max(b / q, NEVER))
    return total


def test_divergence_is_its_definition(normal: Array) -> None:
    counts = histogram_of(normal).counts
    for first, last in ((0, BINS), (200, 900), (300, 300 + LEVELS)):
        assert divergence(counts, first, last) == pytest.approx(divergence_by_definition(counts, first, last), rel=1e-9)


def test_entropy_of_a_relu_is_that_of_what_is_not_0(normal: Array) -> None:
    positive = np.maximum(normal, 0)
    assert by_entropy(histogram_of(positive))[1] > 2.5


def test_entropy_leaves_out_what_hardly_occurs(normal: Array) -> None:
    histogram = histogram_of(normal)
    low, high = by_entropy(histogram)
    assert -9.0 < low < -2.0
    assert 2.0 < high < 20.0


@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 3.0), (0.0, 6.0), (-5.0, 0.0), (2.0, 6.0), (-1e-30, 1e-30), (0.0, 0.0)]
)
def test_zero_is_always_exact(low: float, high: float) -> None:
    affine = Affine.of(low, high)
    assert affine.rounded(np.zeros(1))[0] == 0.0
    assert 0 <= affine.zero_point <= 255
    numbers = np.linspace(low, high, 50)
    assert np.abs(affine.rounded(numbers) - numbers).max() <= affine.scale


def test_weights_of_each_channel_have_their_own_scale() -> None:
    weights = np.array([[1.0, -100.0, 0.0], [0.5, 50.0, 0.0], [np.nan, 1.0, 0.0]], np.float32)
    eight, scales = quantized_weights(weights)
    np.testing.assert_array_equal(eight, [[127, -127, 0], [64, 64, 0], [0, 1, 0]])
    np.testing.assert_allclose(scales[:2], [1 / 127, 100 / 127], rtol=1e-6)


def test_methods_and_percentiles_that_there_are_not() -> None:
    with pytest.raises(UsageError, match="mse, minmax, percentile, entropy"):
        check_method("median", 99.0)
    with pytest.raises(UsageError, match="percentile"):
        check_method("percentile", 0.5)
