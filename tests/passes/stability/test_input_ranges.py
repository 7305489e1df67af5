"""What is taken for the range of an input."""

from __future__ import annotations

import numpy as np
import pytest

from mlec.ir import GraphBuilder, tensor
from mlec.passes.stability.input_ranges import InputRange, input_ranges
from mlec.passes.stability.intervals import Interval
from mlec.passes.stability.probes import probes

SEEN = {
    "nothing": (None, (-1000.0, 1000.0)),
    "both signs": ((-2.0, 3.0), (-1000.0, 1000.0)),
    "large numbers": ((-2.0, 1e6), (-1000.0, 1e6)),
    "positive": ((0.5, 3.0), (0.0005, 1000.0)),
    "not negative": ((0.0, 3.0), (0.0, 1000.0)),
    "negative": ((-3.0, -0.5), (-1000.0, -0.0005)),
    "not positive": ((-3.0, 0.0), (-1000.0, 0.0)),
}


@pytest.mark.parametrize(("seen", "expected"), SEEN.values(), ids=SEEN)
def test_examples_tell_the_sign_of_floats(seen: tuple[float, float] | None, expected: tuple[float, float]) -> None:
    b = GraphBuilder("g")
    x = b.input("x", tensor("f32", ("n", 3)))
    found = input_ranges(b.finish([x]), {}, {} if seen is None else {"x": seen})
    assert found == {x: InputRange(Interval(*expected), "assumed")}
    given = input_ranges(b.finish([x]), {"x": (7.0, 8.0)}, {"x": (0.0, 1.0)})
    assert given == {x: InputRange(Interval(7.0, 8.0), "given")}


@pytest.mark.parametrize(
    ("dtype", "limits"), [("i8", (-128, 127)), ("u8", (0, 255)), ("i64", (-(10**6), 10**6)), ("bool", (0, 1))]
)
def test_integers_stay_within_their_type(dtype: str, limits: tuple[int, int]) -> None:
    b = GraphBuilder("g")
    x = b.input("x", tensor(dtype, ("n", 3)))
    assert input_ranges(b.finish([x]), {}, {})[x].interval == Interval(*map(float, limits))


@pytest.mark.parametrize("dtype", ["f64", "f32", "f16", "i8", "u8", "i64", "bool"])
def test_probes_lie_within_the_range_and_are_the_same_each_time(dtype: str) -> None:
    b = GraphBuilder("g")
    x = b.input("x", tensor(dtype, ("n", 5)))
    graph = b.finish([x])
    interval = Interval(-3.5, 1e5) if dtype[0] == "f" else input_ranges(graph, {}, {})[x].interval
    first, second = ([p.arrays[0] for p in probes(graph, {x: interval}, 96)] for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    for array in first:
        assert array.dtype == x.type.dtype.numpy
        assert np.isfinite(array).all()
        assert (array >= interval.lo - 1e-3).all()
        assert (array.astype(np.float64) <= interval.hi * 1.001).all()
