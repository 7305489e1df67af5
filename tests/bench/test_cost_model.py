from __future__ import annotations

from bench.cost_model import FITTED, LARGE, Prediction, line, summary
from bench.models import CASES


def test_errors_are_relative_to_what_was_measured_and_told_apart() -> None:
    found = [
        Prediction("a", True, 1, 1, predicted=1.1e-6, measured=1e-6),
        Prediction("b", False, 1, 1, predicted=1e-6, measured=2e-6),
        Prediction("b", False, 64, 2, predicted=1.7e-6, measured=1e-6),
        Prediction("c", False, 64, 2, predicted=3.3e-6, measured=3e-6),
        Prediction("d", False, 64, 2, predicted=3e-6, measured=3e-6),
    ]
    assert line(found[0]) == "| a (fitted) | 1 | 1 | 1.1 us | 1.0 us | +10% |"
    assert line(found[1]) == "| b | 1 | 1 | 1.0 us | 2.0 us | -50% |"
    assert summary(found) == [
        "Median error with 1 thread, models held out: 50% of 1 prediction, 1 of them off by more than 25%, 0 by more than 50%.",
        "Median error with 1 thread, models that the rates were fitted on: 10% of 1 prediction, "
        "0 of them off by more than 25%, 0 by more than 50%.",
        "Median error with 2 threads, models held out: 10% of 3 predictions, 1 of them off by more than 25%, 1 by more than 50%.",
    ]


def test_what_was_fitted_on_is_in_the_bench_and_not_all_of_it() -> None:
    assert set(CASES) > FITTED
    assert set(CASES) > LARGE
