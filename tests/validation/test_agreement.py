"""Lower precisions against the source."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

import mlec
from mlec import api
from mlec.errors import ToleranceError, UsageError
from mlec.processor import needed_cpu_flags, what_is_missing
from mlec.runtime import CompiledModel
from mlec.validation.agreement import LOWERED, measured

WANTED = np.array([[1.0, -4.0, 2.0], [0.5, 3.0, -1.0]], np.float32)


def compared(got: np.ndarray, wanted: np.ndarray = WANTED, precision: str | None = "fp16") -> dict[str, Any]:
    report = SimpleNamespace(model={"precision": precision})
    compiled = cast(CompiledModel, SimpleNamespace(run=lambda inputs: [got], report=report))
    bound = None if precision is None else LOWERED[precision]
    found: dict[str, Any] = measured(compiled, {"run": lambda inputs: [wanted]}, [[wanted]], bound)["methods"]["run"]
    return found


@pytest.mark.parametrize("precision", LOWERED)
def test_results_within_the_bound_are_described(precision: str) -> None:
    got = WANTED.copy()
    got[0, 0] += 0.5 * LOWERED[precision].rtol * 4
    found = compared(got, precision=precision)
    assert found["rows"] == 2
    assert found["max_rel_error"] == pytest.approx(0.5 * LOWERED[precision].rtol, rel=1e-3)
    assert 0 < found["excess"] < 1
    assert found["label_mismatches"] == 0


@pytest.mark.parametrize("precision", LOWERED)
@pytest.mark.parametrize("lost", [np.nan, np.inf, -np.inf, 9.0])
def test_results_beyond_the_bound_are_refused(precision: str, lost: float) -> None:
    """A result that overflowed in fewer bits is no result, although its error has no size."""
    got = WANTED.copy()
    got[1, 0] = lost
    with pytest.raises(ToleranceError, match="differs from its source") as caught:
        compared(got, precision=precision)
    pass_of_it = "quantize-int8" if precision == "int8" else f"mixed-precision{{dtype = {precision}"
    assert pass_of_it in str(caught.value.hint)


def test_what_the_source_lost_itself_is_not_compared() -> None:
    wanted = WANTED.copy()
    wanted[0] = np.nan, np.inf, -np.inf
    got = wanted.copy()
    got[0] = 7.0
    assert compared(got, wanted)["excess"] == 0


def test_the_largest_of_a_row_is_its_label() -> None:
    got = WANTED.copy()
    got[0, 0] = 2.5
    assert compared(got, precision=None)["label_mismatches"] == 1


def test_of_several_targets_the_worst_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    if what_is_missing(needed_cpu_flags("cpu", {"triple": "x86_64-linux-gnu", "features": ["avx2"]})):
        pytest.skip("needs a processor that runs x86-64-v3")
    found = []

    def worse_first(*arguments: Any) -> dict[str, Any]:
        report = measured(*arguments)
        for comparison in report["methods"].values():
            comparison["excess"] = 0.5 / (1 + len(found))
        found.append(report)
        return report

    monkeypatch.setattr(api, "measured", worse_first)
    x = torch.ones(4, 96)
    compiled = mlec.compile(
        torch.nn.Linear(96, 64), x, precision="bf16", target="cpu:x86-64-v2,x86-64-v3", progress=False
    )
    assert [report["methods"]["run"]["excess"] for report in found] == [0.5, 0.25]
    assert compiled.report.parity["methods"]["run"]["excess"] == 0.5


class Rows(torch.nn.Module):
    """Remembers how many rows it was asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(96, 64)
        self.asked: set[int] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is torch.Tensor:  # not while it is exported
            self.asked.add(len(x))
        return self.linear(x)


def test_the_source_is_asked_about_what_is_compared_alone() -> None:
    module = Rows()
    report = mlec.compile(module, torch.randn(7, 96), precision="bf16", progress=False).report
    assert module.asked == {7}
    assert report.parity["methods"]["run"]["rows"] == 7
    assert report.timing["measured"]["rows"] == 7


def test_a_source_that_fails_is_named() -> None:
    def run(inputs: list[Any]) -> Any:
        raise IndexError("no such row")

    with pytest.raises(UsageError, match="IndexError: no such row"):
        measured(cast("CompiledModel", None), {"run": run}, [[WANTED]], None)
