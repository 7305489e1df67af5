"""Distances of all pairs of rows, written out as differences, become the op that computes them."""

from __future__ import annotations

from typing import ClassVar

from mlec.ir import Graph, GraphBuilder, Match, Miss, Node, P, Rule, Value


class _Pairs(Rule):
    """A reduction over the features of all differences of rows; ``metric`` says which distance it is."""

    metric: ClassVar[str]

    def check(self, m: Match, graph: Graph) -> Miss | None:
        return None if _rows(m, graph) else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        found = _rows(m, graph)
        assert found is not None
        return b("pairwise_distance", *found, metric=self.metric)


class SquaredDistances(_Pairs):
    """sum((x - y) * (x - y), of every row of x and every row of y) -> pairwise_distance(x, y)"""

    pattern = P("sum", P("mul", P("sub", "x", "y", bind="difference"), P("sub", "x", "y")))
    metric = "sqeuclidean"


class ManhattanDistances(_Pairs):
    """sum(abs(x - y), of every row of x and every row of y) -> pairwise_distance(x, y)"""

    pattern = P("sum", P("abs", P("sub", "x", "y", bind="difference")))
    metric = "manhattan"


class ChebyshevDistances(_Pairs):
    """max(abs(x - y), of every row of x and every row of y) -> pairwise_distance(x, y)"""

    pattern = P("max", P("abs", P("sub", "x", "y", bind="difference")))
    metric = "chebyshev"


class EuclideanDistances(Rule):
    """sqrt(squared pairwise_distance(x, y)) -> pairwise_distance(x, y)"""

    pattern = P("sqrt", P("pairwise_distance", "x", "y", bind="squared"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        squared = m.nodes["squared"]
        alone = graph.use_count(squared.output) == 1
        return None if alone and squared.attrs["metric"] == "sqeuclidean" else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("pairwise_distance", m["x"], m["y"], metric="euclidean")


DISTANCES: tuple[Rule, ...] = (SquaredDistances(), ManhattanDistances(), ChebyshevDistances(), EuclideanDistances())


def _rows(m: Match, graph: Graph) -> tuple[Value, Value] | None:
    """The two matrices of rows, that whose rows are axis 0 of the result first."""
    reduction: Node = m.node
    difference = m.nodes["difference"].output
    if difference.type.rank != 3 or reduction.attrs["keepdims"] or not difference.type.dtype.is_float:
        return None
    if [axis % 3 for axis in reduction.attrs["axes"]] != [2]:
        return None
    sides = [_matrix(graph, m[name]) for name in ("x", "y")]
    by_axis = {side[0]: side[1] for side in sides if side is not None}
    if set(by_axis) != {0, 1}:
        return None
    x, y = by_axis[0], by_axis[1]
    return (x, y) if difference.type.shape == (x.type.shape[0], y.type.shape[0], x.type.shape[1]) else None


def _matrix(graph: Graph, value: Value) -> tuple[int, Value] | None:
    """A matrix whose rows go along axis 0 or 1 of an operand of rank 3, and which of the two."""
    node = graph.producer.get(value)
    if value.type.rank == 2:
        return 1, value
    if node is None or node.name != "reshape" or node.inputs[0].type.rank != 2:
        return None
    matrix = node.inputs[0]
    rows, features = matrix.type.shape
    if value.type.shape == (rows, 1, features):
        return 0, matrix
    return (1, matrix) if value.type.shape == (1, rows, features) else None
