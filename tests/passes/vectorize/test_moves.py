"""Where elements are: picks of picks, pieces of pieces, and steps of which some differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from mlec.ir import Graph, GraphBuilder, Value, tensor, verify
from mlec.passes.canonicalize import Canonicalize
from mlec.passes.vectorize import Vectorize
from mlec.pipeline import EXACT, PassContext, PassPipeline
from mlec.tolerance import check_equal

STEPS, FEATURES = 12, 5
ORDER = np.random.default_rng(0).permutation(STEPS)
Built = Callable[[GraphBuilder, Value], Value]


def ops_left(make: Built) -> dict[str, int]:
    """How many of each op are left after the pass, whose results are compared with the graph before."""
    b = GraphBuilder("moves")
    x = b.input("x", tensor("f32", ("n", STEPS, FEATURES)))
    graph = b.finish([make(b, x)])
    after = PassPipeline([Vectorize(), Canonicalize()]).run(graph)[0]
    verify(after)
    check_equal(graph, after, EXACT, "moves", seeds=(0,))
    assert Vectorize().run(after, PassContext()).graph is after
    return dict(Counter(node.name for node in after.compute_nodes))


def pick(b: GraphBuilder, x: Value, places: object) -> Value:
    return b("gather", x, b.constant(np.asarray(places, np.int64)), axis=1)


def row(b: GraphBuilder, x: Value, i: int) -> Value:
    return b("reshape", b("slice", x, axis=1, start=i, stop=i + 1), shape=("n", FEATURES))


def stacked(b: GraphBuilder, rows: list[Value]) -> Value:
    return b("concat", *[b("reshape", r, shape=("n", 1, FEATURES)) for r in rows], axis=1)


def along(b: GraphBuilder, x: Value, places: object) -> Value:
    """As ``torch.gather(x, 1, places.view(1, -1, 1).expand(n, -1, features))``."""
    line = b.constant(np.asarray(places, np.int64).reshape(1, -1, 1))
    return b("take_along_axis", x, b("broadcast_to", line, shape=("n", line.type.shape[1], FEATURES)), axis=1)


PICKS: dict[str, tuple[Built, dict[str, int]]] = {
    "inverse": (lambda b, x: b("exp", pick(b, pick(b, x, ORDER), np.argsort(ORDER))), {"exp": 1}),
    "twice": (lambda b, x: pick(b, pick(b, x, ORDER), ORDER[::-1].copy()), {"gather": 1}),
    "of a slice": (lambda b, x: pick(b, b("slice", x, axis=1, start=1, stop=STEPS, step=2), [0, 2, 4]), {"slice": 1}),
    "beyond the ends": (lambda b, x: pick(b, pick(b, x, [-3, 4, 99]), [0, 2, 9]), {"gather": 1}),
    "in a square": (lambda b, x: pick(b, x, np.arange(STEPS).reshape(3, 4)), {"reshape": 1}),
    "backwards": (lambda b, x: pick(b, x, [3, 2, 1, 0]), {"gather": 1}),
    "spread": (lambda b, x: along(b, x, [4, 5, 6, 7]), {"slice": 1}),
    "spread, in any order": (lambda b, x: along(b, along(b, x, ORDER), [1, 0, 5]), {"gather": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", PICKS)
def test_picks(name: str) -> None:
    make, left = PICKS[name]
    assert ops_left(make) == left


def test_places_that_differ_between_rows_stay() -> None:
    def differ(b: GraphBuilder, x: Value) -> Value:
        places = b.constant(np.arange(2 * FEATURES).reshape(1, 2, FEATURES))
        return b("take_along_axis", x, b("broadcast_to", places, shape=("n", 2, FEATURES)), axis=1)

    assert ops_left(differ)["take_along_axis"] == 1


def test_steps_of_which_some_differ_are_as_many_as_there_are_kinds() -> None:
    def kinds(b: GraphBuilder, x: Value) -> Value:
        return stacked(b, [b("tanh" if i % 2 else "exp", row(b, x, i)) for i in range(STEPS)])

    def one(b: GraphBuilder, x: Value) -> Value:
        return stacked(b, [b("tanh" if i == 4 else "exp", row(b, x, i)) for i in range(STEPS)])

    alternating, single = ops_left(kinds), ops_left(one)
    assert (alternating["tanh"], alternating["exp"], alternating["gather"]) == (1, 1, 1)
    assert (single["tanh"], single["exp"]) == (1, 1)
    assert sum(alternating.values()) <= 8
    assert sum(single.values()) <= 10


def test_rows_that_are_assigned_among_others_are_picked_with_them() -> None:
    def assigned(b: GraphBuilder, x: Value) -> Value:
        out = x
        for i in range(0, STEPS, 3):
            ends = [b("slice", out, axis=1, start=s, stop=e) for s, e in ((0, i), (i + 1, STEPS)) if s < e]
            new = b("reshape", b("exp", row(b, x, i)), shape=("n", 1, FEATURES))
            out = b("concat", *([new, *ends] if i == 0 else [ends[0], new, *ends[1:]]), axis=1)
        return out

    left = ops_left(assigned)
    assert left["exp"] == 1
    assert sum(left.values()) <= 6


def test_tables_of_equal_size_become_one() -> None:
    rng = np.random.default_rng(1)
    b = GraphBuilder("tables")
    ids = b.input("ids", tensor("i32", ("n", 6)))
    tables = [b.constant(rng.normal(size=(7, 3)).astype(np.float32)) for _ in range(6)]
    columns = [b("reshape", b("slice", ids, axis=1, start=i, stop=i + 1), shape=("n",)) for i in range(6)]
    found = [b("gather", table, column, axis=0) for table, column in zip(tables, columns, strict=True)]
    graph: Graph = b.finish([b("concat", *found, axis=1)])
    after = PassPipeline([Vectorize(), Canonicalize()]).run(graph)[0]
    assert [node.name for node in after.nodes].count("gather") == 1
    check_equal(graph, after, EXACT, "tables", seeds=(0, 1))  # with indices beyond both ends of the tables
