"""Distance kernels against scipy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from mlec.backends.tvm.compat import IRModule, tirx, tvm
from mlec.backends.tvm.kernels.epilogue import Epilogue
from mlec.backends.tvm.kernels.mathlib import exp
from mlec.backends.tvm.kernels.pairwise import Metric, nearest, pack_points, pairwise
from mlec.backends.tvm.kernels.vector import const_like, share
from mlec.backends.tvm.target import TargetInfo
from mlec.errors import LoweringError

INFO = TargetInfo.host()
PLAIN_STORAGE = {"tirx.disable_storage_rewrite": True}
"""What the backend compiles with: TVM otherwise merges buffers of different vector lengths and then refuses the result."""
METRICS = [
    Metric("sqeuclidean"),
    Metric("euclidean"),
    Metric("manhattan"),
    Metric("chebyshev"),
    Metric("minkowski", 1.0),
    Metric("minkowski", 2.0),
    Metric("minkowski", np.inf),
    Metric("minkowski", 3.0),
    Metric("minkowski", 2.5),
    Metric("sqeuclidean", expanded=True),
    Metric("euclidean", expanded=True),
]


def compiled(y: np.ndarray, metric: Metric, n: Any = None, **options: Any) -> Any:
    m, d = y.shape
    rows = tirx.Var("n", "int64") if n is None else n
    func = pairwise(rows, m, d, str(y.dtype), metric, INFO, **options)
    with tvm.transform.PassContext(config=PLAIN_STORAGE):
        run = tvm.compile(IRModule({"pairwise": func}), target=INFO.tvm_target())["pairwise"]
    points = tvm.runtime.tensor(pack_points(y, INFO))

    def call(x: np.ndarray) -> np.ndarray:
        out = tvm.runtime.tensor(np.full((len(x), m), -1, y.dtype))
        run(tvm.runtime.tensor(x), points, out)
        return np.asarray(out.numpy())

    return call


def expected(x: np.ndarray, y: np.ndarray, metric: Metric) -> np.ndarray:
    x, y = x.astype(np.float64), y.astype(np.float64)
    if metric.kind == "minkowski":
        return np.asarray(cdist(x, y, "chebyshev") if metric.p == np.inf else cdist(x, y, "minkowski", p=metric.p))
    return np.asarray(cdist(x, y, {"manhattan": "cityblock"}.get(metric.kind, metric.kind)))


def points(n: int, d: int, dtype: str, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("metric", METRICS, ids=str)
def test_distances(metric: Metric, dtype: str) -> None:
    y = points(37, 5, dtype)
    x = np.concatenate([points(200, 5, dtype, 1), y[:3]])  # some at distance zero
    call = compiled(y, metric)
    # The expanded form cancels for near points: its error is one of the norms, of the distance only after the root.
    error = 2e-6 if dtype == "float32" else 4e-15
    slack = (
        0.0 if not metric.expanded else 20 * error if metric.kind == "sqeuclidean" else 2e-3 if error > 1e-10 else 2e-7
    )
    for n in (0, 1, 2, 5, 8, 63, 64, 65, 203):
        np.testing.assert_allclose(call(x[-n or 203 :][:n]), expected(x[-n or 203 :][:n], y, metric), error, slack)


@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (3, 16, 1), (9, 33, 7), (40, 200, 64), (70, 5, 3)])
def test_shapes(n: int, m: int, d: int) -> None:
    for dtype, rtol in (("float32", 1e-5), ("float64", 1e-14)):
        x, y = points(n, d, dtype, 1), points(m, d, dtype)
        metric = Metric("euclidean")
        np.testing.assert_allclose(compiled(y, metric, n)(x), expected(x, y, metric), rtol)


def test_near_points_keep_their_distance() -> None:
    y = np.full((1, 2), 1e4, np.float32)
    x = np.nextafter(y, np.float32(np.inf))
    np.testing.assert_array_equal(compiled(y, Metric("manhattan"))(x), np.abs(x - y).sum(1, keepdims=True))


@pytest.mark.parametrize("metric", METRICS, ids=str)
def test_not_a_number_and_infinity(metric: Metric) -> None:
    y = points(3, 4, "float64")
    x = points(3, 4, "float64", 1)
    x[0, 1] = np.nan
    x[1, 2] = np.inf
    distances = compiled(y, metric)(x)
    assert np.isnan(distances[0]).all()
    assert (~np.isfinite(distances[1]) if metric.expanded else np.isposinf(distances[1])).all()
    assert np.isfinite(distances[2]).all()


def test_epilogue() -> None:
    x, y = points(20, 3, "float64", 1), points(10, 3, "float64")
    rbf = Epilogue((), lambda distance, _, __: exp(share(distance * const_like(-0.5, distance))))
    kernel = compiled(y, Metric("sqeuclidean"), epilogue=rbf)(x)
    np.testing.assert_allclose(kernel, np.exp(-0.5 * cdist(x, y, "sqeuclidean")), 1e-13)


def test_rows_do_not_depend_on_their_batch() -> None:
    x, y = points(5000, 30, "float32", 1), points(64, 30, "float32")
    call = compiled(y, Metric("euclidean"))
    whole = call(x)
    np.testing.assert_array_equal(whole[:1], call(x[:1]))
    np.testing.assert_array_equal(whole[1000:1013], call(np.ascontiguousarray(x[1000:1013])))


def test_distances_of_wider_numbers_are_worth_threads_sooner() -> None:
    target = TargetInfo.for_cpu("skylake-avx512", "x86_64-unknown-linux-gnu")
    for dtype, shared in (("float32", False), ("float64", True)):
        func = pairwise(64, 256, 40, dtype, Metric("euclidean"), target)
        assert ("T.parallel" in func.script()) is shared


def test_neighbours_are_worth_threads_by_what_is_kept_of_them() -> None:
    target = TargetInfo.for_cpu("skylake-avx512", "x86_64-unknown-linux-gnu")
    for k, shared in ((1, False), (10, True)):
        func = nearest(40, 256, 40, k, "float32", Metric("euclidean"), target)
        assert ("T.parallel" in func.script()) is shared


@pytest.mark.parametrize(
    "arguments", [("cosine",), ("minkowski", 0.5), ("minkowski", float("nan")), ("manhattan", 2.0, True)]
)
def test_refuses_what_it_does_not_know(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(LoweringError):
        Metric(*arguments)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("m", "d", "k"), [(1, 1, 1), (7, 3, 7), (37, 5, 4), (300, 8, 1), (1000, 16, 10)])
def test_nearest_are_the_first_of_the_sorted_distances(m: int, d: int, k: int, dtype: str) -> None:
    """To the last bit, with many ties, NaN and infinities, at every number of rows that ends a tile."""
    y = np.round(points(m, d, dtype), 1)
    y[m // 2 :: 11] = y[0]
    x = np.round(points(70, d, dtype, 1), 1)
    x[3, 0], x[4, 0], x[5] = np.nan, np.inf, y[0]
    func = nearest(tirx.Var("n", "int64"), m, d, k, dtype, Metric("sqeuclidean"), INFO)
    with tvm.transform.PassContext(config=PLAIN_STORAGE):
        run = tvm.compile(IRModule({"nearest": func}), target=INFO.tvm_target())["nearest"]
    packed, distances = tvm.runtime.tensor(pack_points(y, INFO)), compiled(y, Metric("sqeuclidean"))(x)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    for n in (*range(18), 70):
        values, positions = np.full((n, k), -1, dtype), np.full((n, k), -1, np.int64)
        results = tvm.runtime.tensor(values), tvm.runtime.tensor(positions)
        run(tvm.runtime.tensor(x[:n]), packed, *results)
        np.testing.assert_array_equal(results[1].numpy(), order[:n])
        np.testing.assert_array_equal(results[0].numpy(), np.take_along_axis(distances, order, 1)[:n])
