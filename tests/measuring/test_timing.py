"""What is said of times that were taken on a busy machine."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from mlec.measuring.timing import TURN_CALLS, OtherWork, disturbance, interleaved, spread


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
    assert len(slow["a"]) >= 8
    assert len(slow["b"]) == (TURN_CALLS - 1) * len(slow["a"])  # short calls have company, and the first does not count
    assert len(interleaved({"a": lambda: time.sleep(0.02)}, seconds=0.01, enough=1000, patience=1)["a"]) == 3


def test_processors_that_work_for_others() -> None:
    assert disturbance({}, (1.0, 4), threads=3) == ""
    assert disturbance({}, (1.5, 4), threads=3).endswith("others kept 1.5 of its 4 processors at work")
    own = OtherWork()
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    own_work, usable = own.processors()
    assert 0 <= own_work <= usable
    # A process that this one did not start: its parent has ended.
    spin = "import time; end = time.process_time() + 0.4\nwhile time.process_time() < end: pass"
    start = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {spin!r}])"
    subprocess.run([sys.executable, "-c", start], check=True, timeout=60)
    begin, others = time.perf_counter(), OtherWork()
    time.sleep(0.3)
    assert others.processors()[0] * (time.perf_counter() - begin) > 0.1
