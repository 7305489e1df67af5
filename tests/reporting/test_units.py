from __future__ import annotations

import pytest

from mlec.reporting import units


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 FLOP"),
        (7, "7 FLOP"),
        (999, "999 FLOP"),
        (999.9, "1.00 kFLOP"),
        (3350656, "3.35 MFLOP"),
        (2e18, "2.00 EFLOP"),
    ],
)
def test_counts(value: float, text: str) -> None:
    assert units.count(value, "FLOP") == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (526888, "515 KiB"), (3 << 30, "3.00 GiB")]
)
def test_sizes(value: int, text: str) -> None:
    assert units.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0 ns"),
        (3.1e-8, "31.0 ns"),
        (3.1e-5, "31.0 µs"),
        (0.9996e-3, "1.00 ms"),
        (1.5, "1.50 s"),
        (754.0, "754 s"),
        (float("inf"), "inf"),
    ],
)
def test_seconds(value: float, text: str) -> None:
    assert units.seconds(value) == text


@pytest.mark.parametrize(
    ("gain", "text"), [(None, "–"), (1.0, "1.00x"), (13.46, "13.5x"), (1234.5, "1,234x"), (0.5, "0.500x")]
)
def test_gains(gain: float | None, text: str) -> None:
    assert units.times(gain) == text
