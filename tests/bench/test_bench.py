"""The tables of the bench, with times that are made up, and a case that runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest

from bench.ensembles import appended
from bench.harness import Case, Competitor, OtherKindError, Predict, Timing, UnavailableError, run_case
from bench.models import CASES, DEFAULT_GROUPS, chosen
from bench.peak import byte_products
from bench.table import markdown, ratios, summary
from mlec.backends.tvm.kernels.int8 import has_amx
from mlec.backends.tvm.target import TargetInfo


class Fake(Competitor):
    def __init__(self, name: str, prepare: Callable[[], Predict]) -> None:
        self.name = name  # type: ignore[misc]
        self._prepare = prepare

    name: ClassVar[str] = ""

    def prepare(self, case: Case, threads: int) -> Predict:
        return self._prepare()


def refuses(error: Exception) -> Callable[[], Predict]:
    def prepare() -> Predict:
        raise error

    return prepare


def falls_over(inputs: list[Any]) -> Any:
    if len(inputs[0]) > 1:
        raise RuntimeError("one row\nat a time")
    return inputs[0]


CASE = Case("doubling", "sklearn", "sklearn", None, lambda n: [np.ones((n, 2))], batches=(1, 3))


@pytest.fixture(scope="module")
def timings() -> list[Timing]:
    peers = [
        Fake("mlec", lambda: lambda inputs: inputs[0] * 2),
        Fake("source", lambda: lambda inputs: inputs[0] + inputs[0]),
        Fake("absent", refuses(UnavailableError("absent is not installed"))),
        Fake("broken", refuses(ValueError("no such node"))),
        Fake("fragile", lambda: falls_over),
        Fake("foreign", refuses(OtherKindError("not a network"))),
    ]
    return run_case(CASE, peers, threads=1)


def cells(table: str, row: str) -> dict[str, str]:
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    (found,) = [line for line in lines if "|".join(line).startswith(row)]
    return dict(zip(lines[0], found, strict=True))


def test_who_fails_is_named_with_the_reason(timings: list[Timing]) -> None:
    table = markdown(timings, "title")
    single, several = cells(table, "doubling|1|1"), cells(table, "doubling|3|1")
    assert single["source"].endswith("x")
    assert (single["absent"], single["broken"]) == ("(1)", "(2)")
    assert single["fragile"].endswith("x")
    assert several["fragile"] == "(3)"
    assert "foreign" not in single
    assert "(1) absent: absent is not installed" in table
    assert "(2) broken: ValueError: no such node" in table
    assert "(3) fragile: RuntimeError: one row at a time" in table


def test_means_of_those_who_failed_have_a_note(timings: list[Timing]) -> None:
    row = cells(summary(timings, "title", skipped=["svc_rbf"]), "sklearn, threads: 1")
    assert row["cases"] == "2"
    assert row["absent"].startswith("(")
    assert "x" in row["fragile"]
    assert row["fragile"].endswith(")")
    assert "Not run, the time was spent: svc_rbf" in summary(timings, "title", skipped=["svc_rbf"])


def test_ratios_are_those_of_the_medians() -> None:
    made_up = [Timing("a", "g", 1, 2, name, p50) for name, p50 in (("mlec", 2.0), ("source", 5.0))]
    assert ratios(made_up) == {("g", "a", 1, 2): {"mlec": 1.0, "source": 2.5}}
    assert "| **g, geometric mean** | | 2 | | **2.50x** |" in markdown(made_up, "title")


def test_groups_choose_cases() -> None:
    assert {CASES[name][0] for name in chosen((), ())} == set(DEFAULT_GROUPS)
    assert {CASES[name][0] for name in chosen(("trees-full",), ())} == {"trees-full"}
    assert list(chosen((), ("xgboost_classes",))) == ["xgboost_classes"]
    with pytest.raises(ValueError, match="no group or case nothing"):
        chosen(("nothing",), ())


def test_appended_trees_differ_and_predict_about_the_same() -> None:
    from xgboost import XGBRegressor

    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 4)).astype(np.float32)
    model = XGBRegressor(n_estimators=20, max_depth=3, learning_rate=0.1).fit(x, x[:, 0] + x[:, 1])
    larger = appended(model, 5)
    trees = larger.get_booster().get_dump()
    assert len(set(trees)) == len(trees) == 100
    assert np.corrcoef(model.predict(x), larger.predict(x))[0, 1] > 0.98
    assert np.abs(model.predict(x) - larger.predict(x)).max() > 0


@pytest.mark.parametrize("loaded", [False, True])
def test_the_peak_of_products_of_bytes_is_measured_on_any_processor(loaded: bool) -> None:
    assert byte_products(1, has_amx(TargetInfo.host()), loaded) > byte_products(1, False, loaded) / 4 > 0
