"""Which numbers a float of 16 bits holds, of constants and of what a graph computes."""

import numpy as np
import pytest

from mlec.errors import UsageError
from mlec.passes.precision.formats import FORMATS, format_of
from mlec.passes.stability.intervals import FULL, Interval

FP16, BF16 = FORMATS["fp16"], FORMATS["bf16"]
WEIGHTS = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)


@pytest.mark.parametrize("form", [FP16, BF16], ids=str)
def test_facts(form):
    kind = form.dtype.numpy
    assert np.isfinite(np.array(form.largest).astype(kind))
    with np.errstate(over="ignore"):
        assert np.isinf(np.array(form.largest * 1.01).astype(kind).astype(np.float64))
    digits = np.array(form.normal * (1 + form.dtype.eps)).astype(kind)
    assert float(digits) > form.normal
    assert float(np.array(form.normal / 2 * (1 + form.dtype.eps)).astype(kind)) == form.normal / 2


def test_a_format_that_is_none():
    with pytest.raises(UsageError, match="fp16 or bf16, got 'fp8'"):
        format_of("fp8")


@pytest.mark.parametrize(
    ("factor", "fp16", "bf16"),
    [(1.0, "", ""), (1e5, "beyond 65504", ""), (1e-7, "lose their digits in f16", ""), (1e-40, "lose", "lose their digits in bf16")],
)  # fmt: skip
def test_weights(factor, fp16, bf16):
    weights = (WEIGHTS.astype(np.float64) * factor).astype(np.float32)
    for form, wanted in ((FP16, fp16), (BF16, bf16)):
        reason = form.why_not_weights(weights)
        assert wanted in reason
        assert bool(wanted) == bool(reason)


def test_infinite_weights_stay_what_they_are():
    assert FP16.why_not_weights(np.array([[np.inf, -np.inf, np.nan, 1.0]], np.float32)) == ""


@pytest.mark.parametrize(
    ("proven", "seen", "reason"),
    [
        (Interval(-3e4, 10.0), None, ""),
        (Interval(0.0, 1e5), None, "can be up to 1e+05: beyond 65504 f16 is infinite"),
        (Interval(0.0, 1e5), Interval(0.0, 8000.0), ""),
        (Interval(0.0, 1e5), Interval(0.0, 9000.0), "on the examples, times 8, are up to 7.2e+04"),
        (FULL, None, "nothing bounds them"),
        (FULL, Interval(-1.0, 1.0), ""),
        (Interval(-1e-6, 1e-6), None, "below 6.1e-05 f16 loses digits"),
        (Interval(0.0, 0.0), None, ""),
    ],
)
def test_values(proven, seen, reason):
    found = FP16.why_not_values(proven, lambda: seen)
    assert reason in found
    assert bool(reason) == bool(found)
    assert BF16.why_not_values(proven, lambda: seen) == ""
