"""What is computed for pairs of rows: distances become the op that computes them, products of most pairs one matrix product."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from mlec.ir import AnyOf, Const, Graph, GraphBuilder, Match, Miss, Node, P, Rule, Value
from mlec.ir.dim import static_dims


class _Pairs(Rule):
    """A reduction over the features of all differences of rows; ``metric`` says which distance it is."""

    metric: ClassVar[str]

    def check(self, m: Match, graph: Graph) -> Miss | None:
        return None if _rows(m, graph) else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        found = _rows(m, graph)
        assert found is not None
        return _shaped(b, b("pairwise_distance", *found, metric=self.metric), m)


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

    _squared = P("pairwise_distance", "x", "y", bind="squared")
    pattern = P("sqrt", AnyOf(_squared, P("reshape", _squared, bind="view")))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        squared = m.nodes["squared"]
        alone = all(graph.use_count(node.output) == 1 for node in (squared, m.nodes.get("view", squared)))
        return None if alone and squared.attrs["metric"] == "sqeuclidean" else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return _shaped(b, b("pairwise_distance", m["x"], m["y"], metric="euclidean"), m)


class PairProducts(Rule):
    """sum(gather(x, i) * gather(y, j), last axis) -> gather(matmul(x, transpose(y)), pairs i, j), where these are most pairs"""

    pattern = P(
        "sum", P("mul", P("gather", "x", Const(bind="i"), bind="left"), P("gather", "y", Const(bind="j"), bind="right"))
    )

    def check(self, m: Match, graph: Graph) -> Miss | None:
        x, y, product = m["x"].type, m["y"].type, m.nodes["left"].output.type
        last = product.rank - 1
        alike = x.shape[:-2] == y.shape[:-2] and m.nodes["right"].output.type == product and product.dtype.is_float
        along = all(m.nodes[n].attrs["axis"] % product.rank == last - 1 for n in ("left", "right"))
        axes = [axis % product.rank for axis in m.node.attrs["axes"]]
        if not alike or not along or axes != [last] or m.constants["i"].ndim != 1:
            return Miss()
        rows, columns = x.shape[-2], y.shape[-2]
        if not (isinstance(rows, int) and isinstance(columns, int)):
            return Miss()
        return None if rows * columns <= 4 * m.constants["i"].size else Miss("most pairs of rows are not asked for")

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        x, y = m["x"], m["y"]
        rank = x.type.rank
        rows, columns = static_dims((x.type.shape[-2], y.type.shape[-2]))
        turned = b("transpose", y, perm=(*range(rank - 2), rank - 1, rank - 2))
        flat = b("reshape", b("matmul", x, turned), shape=(*x.type.shape[:-2], rows * columns))
        pairs = np.clip(m.constants["i"], 0, rows - 1) * columns + np.clip(m.constants["j"], 0, columns - 1)
        return _shaped(b, b("gather", flat, b.constant(pairs, "pairs"), axis=rank - 2), m)


PAIRS: tuple[Rule, ...] = (
    SquaredDistances(), ManhattanDistances(), ChebyshevDistances(), EuclideanDistances(), PairProducts(),
)  # fmt: skip


def _shaped(b: GraphBuilder, result: Value, m: Match) -> Value:
    """What takes the place of a node, in the node's shape: a reduction may keep its axis."""
    shape = m.node.output.type.shape
    return result if result.type.shape == shape else b("reshape", result, shape=shape)


def _rows(m: Match, graph: Graph) -> tuple[Value, Value] | None:
    """The two matrices of rows, that whose rows are axis 0 of the result first."""
    reduction: Node = m.node
    difference = m.nodes["difference"].output
    if difference.type.rank != 3 or not difference.type.dtype.is_float:
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
