"""What is said of times that were taken on a busy machine."""

from __future__ import annotations

import time

import pytest

from mlec.measuring.timing import disturbance, interleaved, spread


def test_the_spread_of_runs_in_milliseconds() -> None:
    assert spread([n / 1e3 for n in range(1, 22)]) == pytest.approx({"min": 1.0, "p50": 11.0, "p95": 20.0})
    assert spread([0.002]) == {"min": 2.0, "p50": 2.0, "p95": 2.0}


def test_a_busy_machine_is_named_with_all_that_was_disturbed() -> None:
    quiet, stalled = spread([0.001] * 20), spread([0.001] * 10 + [0.020] * 10)
    assert disturbance({"compiled": quiet, "source": quiet}) == ""
    assert disturbance({"compiled": quiet, "source": stalled}).endswith("minimum, 20x for the source model")
    both = disturbance({"compiled": stalled, "source": stalled})
    assert both.endswith("20x for the compiled model, 20x for the source model")
    assert "not reliable" in both


def test_slow_runs_get_more_time_until_their_least_can_be_trusted() -> None:
    slow = interleaved({"a": lambda: time.sleep(0.002), "b": lambda: None}, seconds=0.02, enough=8, patience=50)
    assert len(slow["a"]) == len(slow["b"]) >= 8
    assert len(interleaved({"a": lambda: time.sleep(0.02)}, seconds=0.01, enough=1000, patience=1)["a"]) == 3
