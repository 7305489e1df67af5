"""How long each stage of long work took."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mlec import progress


def test_a_stage_lasts_until_another_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    shown: list[tuple[str, int, int]] = []
    advance = progress.Progress(lambda *call: shown.append(call))
    for stage in ("lower", "tune product", "tune conv", "lower", "done"):
        advance(stage, 1, 2)
    assert advance.seconds == {"lower": 2.0 + 5.0, "tune": 3.0 + 4.0}
    assert shown[1] == ("tune product", 1, 2)
