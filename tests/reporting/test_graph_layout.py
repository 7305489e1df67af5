from __future__ import annotations

import random
import time
from collections.abc import Mapping
from itertools import pairwise

import pytest

from mlec.reporting.graph_layout import Layout, lay_out

BOX = (80.0, 40.0)


def boxes(count: int) -> dict[str, tuple[float, float]]:
    return {str(i): BOX for i in range(count)}


def assert_sound(layout: Layout, sizes: Mapping[str, tuple[float, float]]) -> None:
    """Boxes lie inside and apart, edges go down from border to border."""
    assert set(layout.centres) == set(sizes)
    rows: dict[float, list[float]] = {}
    for name, (x, y) in layout.centres.items():
        width, height = sizes[name]
        assert x - width / 2 >= -0.01
        assert x + width / 2 <= layout.width + 0.01
        assert y - height / 2 >= -0.01
        assert y + height / 2 <= layout.height + 0.01
        rows.setdefault(y, []).append(x)
    for xs in rows.values():
        assert all(right - left > BOX[0] for left, right in pairwise(sorted(xs)))
    for (a, b), points in layout.routes.items():
        assert points[0] == pytest.approx((layout.centres[a][0], layout.centres[a][1] + BOX[1] / 2))
        assert points[-1] == pytest.approx((layout.centres[b][0], layout.centres[b][1] - BOX[1] / 2))
        assert all(low[1] <= high[1] for low, high in pairwise(points))


def test_a_chain_is_a_straight_line() -> None:
    sizes = boxes(6)
    layout = lay_out(sizes, [(str(i), str(i + 1)) for i in range(5)])
    assert_sound(layout, sizes)
    assert {round(x, 3) for x, _ in layout.centres.values()} == {40.0}
    ys = [layout.centres[str(i)][1] for i in range(6)]
    assert ys == sorted(ys)


def test_a_skip_connection_goes_around_what_it_skips() -> None:
    sizes = boxes(4)
    layout = lay_out(sizes, [("0", "1"), ("1", "2"), ("2", "3"), ("0", "3")])
    assert_sound(layout, sizes)
    passed = layout.routes["0", "3"][1:-1]
    assert len(passed) == 4
    assert all(abs(x - layout.centres["1"][0]) > BOX[0] / 2 for x, _ in passed)


def test_an_input_used_late_is_placed_late() -> None:
    layout = lay_out(boxes(5), [("0", "1"), ("1", "2"), ("2", "3"), ("4", "3")])
    assert layout.centres["4"][1] == layout.centres["2"][1]


def test_crossed_pairs_are_uncrossed() -> None:
    layout = lay_out(boxes(4), [("0", "3"), ("1", "2")])
    sign = layout.centres["0"][0] - layout.centres["1"][0]
    assert (layout.centres["3"][0] - layout.centres["2"][0]) * sign > 0


@pytest.mark.parametrize("seed", range(8))
def test_random_graphs_with_cycles(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randint(1, 60)
    edges = [(str(rng.randrange(count)), str(rng.randrange(count))) for _ in range(rng.randint(0, 3 * count))]
    assert_sound(lay_out(boxes(count), edges), boxes(count))


def test_no_nodes() -> None:
    assert lay_out({}, []) == Layout({}, {}, 0.0, 0.0)


def test_a_dense_graph_does_not_explode() -> None:
    count = 400
    edges = [(str(i), str(j)) for i in range(count) for j in range(i + 1, min(i + 30, count))]
    start = time.process_time()
    layout = lay_out(boxes(count), edges)
    assert time.process_time() - start < 3
    assert_sound(layout, boxes(count))
    assert len(layout.routes) == len(edges)
