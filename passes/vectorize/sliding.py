"""Sliding windows: a sum over each window is a sum of as many shifted slices as a window has elements."""

from __future__ import annotations

import functools

import numpy as np

from mlec.ir import AnyOf, Const, Graph, GraphBuilder, Match, Miss, P, Rule, Value
from mlec.ir.op import Array

MOST_ELEMENTS = 32
"""Of a window: as many slices are read by one loop."""
PAIRWISE = {"sum": "add", "mean": "add", "max": "maximum", "min": "minimum"}


class ReducedWindows(Rule):
    """sum|mean|max|min(gather(x, windows) * c, over each window) -> slice(x) * c0 + slice(x) * c1 + .., one for each element of a window"""

    _windows = P("gather", "x", Const(bind="places"), bind="windows")
    pattern = AnyOf(
        P("sum|mean|max|min", P("mul", _windows, Const(bind="weights"), bind="weighted")),
        P("sum|mean|max|min", _windows),
    )

    def check(self, m: Match, graph: Graph) -> Miss | None:
        windows, reduction = m.nodes["windows"], m.node
        kind = windows.output.type
        axis = _axis(m)
        over = [a % kind.rank for a in reduction.attrs["axes"]] == [axis + 1]
        weighted = m.nodes.get("weighted", windows).output
        slides = _gap(m.constants["places"], m["x"].type.shape[axis]) > 0
        alone = weighted is windows.output or graph.use_count(weighted) == 1
        fits = over and alone and weighted.type == kind and kind.dtype.is_float
        return None if fits and slides else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        places, axis = m.constants["places"], _axis(m)
        gap = _gap(places, m["x"].type.shape[axis])

        def element(i: int) -> Value:
            start, last = int(places[0, i]), int(places[-1, i])
            cut = b("slice", m["x"], axis=axis, start=start, stop=last + 1, step=gap)
            return b("mul", cut, b.constant(self._weights(m)[i])) if "weights" in m.constants else cut

        op = PAIRWISE[m.node.name]
        result = functools.reduce(lambda left, right: b(op, left, right), map(element, range(places.shape[1])))
        if m.node.name == "mean":
            result = b("div", result, float(places.shape[1]))
        return b("reshape", result, shape=m.node.output.type.shape) if m.node.attrs["keepdims"] else result

    def _weights(self, m: Match) -> list[Array]:
        """The factors of each element of the windows, to be broadcast to the result without the axis of the windows."""
        weights, rank, axis = m.constants["weights"], m.nodes["windows"].output.type.rank, _axis(m)
        full = weights.reshape((*(1,) * (rank - weights.ndim), *weights.shape))
        count = m.constants["places"].shape[1]
        spread = np.broadcast_to(full, (*full.shape[: axis + 1], count, *full.shape[axis + 2 :]))
        return [np.ascontiguousarray(_trimmed(spread.take(i, axis + 1))) for i in range(count)]


SLIDING: tuple[Rule, ...] = (ReducedWindows(),)


def _trimmed(array: Array) -> Array:
    """Without the axes of one element in front."""
    while array.ndim and array.shape[0] == 1:
        array = array[0]
    return array


def _axis(m: Match) -> int:
    """The axis of x along which the windows slide."""
    return int(m.nodes["windows"].attrs["axis"] % m["x"].type.rank)


def _gap(places: Array, extent: object) -> int:
    """From each window to the next; 0 where they do not slide, or are too wide."""
    if places.ndim != 2 or len(places) < 2 or not 1 <= places.shape[1] <= MOST_ELEMENTS or not isinstance(extent, int):
        return 0
    gaps = np.unique(np.diff(places, axis=0))
    inside = int(places.min()) >= 0 and int(places.max()) < extent
    return int(gaps[0]) if len(gaps) == 1 and inside and gaps[0] > 0 else 0
