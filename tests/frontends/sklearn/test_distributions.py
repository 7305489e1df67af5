"""Power and quantile transformers: on constant and repeated values, at the quantiles themselves and beyond them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PowerTransformer, QuantileTransformer, StandardScaler

from mlec.frontends.sklearn.context import Context
from mlec.frontends.sklearn.distributions import interpolate
from mlec.ir import run_graph, tensor

RNG = np.random.default_rng(0)
SIGNED = RNG.normal(0, 3, (120, 4))
GAPPY = np.where(RNG.random(SIGNED.shape) < 0.2, np.nan, SIGNED)
REPEATED = np.round(SIGNED)
REPEATED[:, 3] = 2.5


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("table", [SIGNED, GAPPY, REPEATED], ids=["signed", "gappy", "repeated"])
def test_yeo_johnson(lab: Any, table: np.ndarray, standardize: bool) -> None:
    lab.check(PowerTransformer(standardize=standardize).fit(table), table, SIGNED * 10)


@pytest.mark.parametrize("exponent", [0.0, 2.0])
def test_yeo_johnson_of_logarithms(lab: Any, exponent: float) -> None:
    model = PowerTransformer().fit(SIGNED)
    model.lambdas_ = np.full(4, exponent)
    lab.check(model, SIGNED)


def test_box_cox_of_float32_answers_in_float32(lab: Any) -> None:
    positive = np.abs(SIGNED) + 0.1
    compiled = lab.check(PowerTransformer("box-cox").fit(positive), positive)
    assert compiled.transform(positive.astype(np.float32)).dtype == np.float32


def around(model: QuantileTransformer) -> np.ndarray:
    """Every quantile, and one float to each side of it."""
    quantiles = model.quantiles_
    return np.concatenate([quantiles, np.nextafter(quantiles, np.inf), np.nextafter(quantiles, -np.inf)])


@pytest.mark.parametrize("distribution", ["uniform", "normal"])
@pytest.mark.parametrize("table", [SIGNED, GAPPY, REPEATED], ids=["signed", "gappy", "repeated"])
@pytest.mark.parametrize("count", [1, 7, 120])
def test_quantiles(lab: Any, distribution: str, table: np.ndarray, count: int) -> None:
    model = QuantileTransformer(n_quantiles=count, output_distribution=distribution).fit(table)
    lab.check(model, table, SIGNED * 3, around(model))


def test_quantiles_behind_another_step(lab: Any) -> None:
    lab.check(make_pipeline(StandardScaler(), QuantileTransformer(n_quantiles=20)).fit(GAPPY), GAPPY)


def test_interpolation_is_numpy_s() -> None:
    points = np.sort(np.round(RNG.normal(size=(9, 2)), 1), axis=0)
    heights = RNG.normal(size=9)
    ctx = Context("interpolation", 2)
    x = ctx.b.input("x", tensor("f64", ("n", 2)))
    graph = ctx.b.finish([interpolate(ctx, x, points, heights)])
    table = np.concatenate([points, np.nextafter(points, 9), np.nextafter(points, -9), RNG.normal(0, 2, (50, 2))])
    (got,) = run_graph(graph, [table])
    wanted = [np.interp(table[:, i], points[:, i], heights) for i in range(2)]
    np.testing.assert_array_equal(got, np.column_stack(wanted))
