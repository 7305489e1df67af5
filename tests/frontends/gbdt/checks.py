"""Differential checks of a lowered model against the functions of its source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlec.frontends.base import LowerOptions
from mlec.ir import Graph, run_graph
from mlec.runtime.edge import Edge

Array = NDArray[Any]


def probes(graph: Graph, specials: Sequence[float], rows: int = 300, seed: int = 0) -> Array:
    """Rows of the model's numbers: normal values, split thresholds and the floats next to them, and special values."""
    rng = np.random.default_rng(seed)
    (x,) = (v for v in graph.inputs if v.hint == "x")
    z = rng.normal(size=(rows, int(x.type.shape[1]))).astype(x.type.dtype.numpy)  # type: ignore[arg-type]
    for node in graph.nodes:
        if node.name != "tree_ensemble":
            continue
        feature, threshold = graph.constant_value(node.inputs[1]), graph.constant_value(node.inputs[2])
        assert feature is not None
        assert threshold is not None
        for column in np.unique(feature):
            exact = rng.choice(threshold[feature == column], rows)
            toward = rng.choice(np.array([-np.inf, 0, np.inf], z.dtype), rows)
            near = np.where(toward == 0, exact, np.nextafter(exact, toward))
            z[:, column] = np.where(rng.random(rows) < 0.6, near, z[:, column])
    for value in specials:
        z[rng.random(z.shape) < 0.03] = value
    return z


def results(graph: Graph, table: Any) -> dict[str, Array]:
    """What each method of the compiled model would return, computed by the reference interpreter."""
    outputs = run_graph(graph, Edge(graph.signature).read(table))
    found: dict[str, Array] = {}
    for method in graph.signature.methods:
        found[method.name] = outputs[method.outputs[0]]
        for labels in method.labels:
            assert labels is not None
            found[method.name] = np.array(labels.values, labels.dtype)[found[method.name]]
    return found


def check(
    frontend: Any, model: Any, table: Any = None, *, specials: Sequence[float] = (), ulp: float = 4.0, **options: Any
) -> Graph:
    """Lowers, and compares every method on batches of all rows, 1, 2 and 5, and the empty batch's shape.

    Numbers may differ by ``ulp`` units in the last place of the largest score in the row, labels not at all.
    """
    graph: Graph = frontend.lower(model, LowerOptions(**options))
    assert all(node.loc for node in graph.nodes)
    oracle = frontend.oracle(model)
    assert set(oracle) == {m.name for m in graph.signature.methods}
    table = probes(graph, specials) if table is None else table
    for rows in (len(table), 1, 2, 5):
        got = results(graph, table[:rows])
        for name, function in oracle.items():
            compare(np.asarray(function(table[:rows])), got[name], ulp)
    for name, empty in results(graph, table[:0]).items():
        assert empty.shape == (0, *got[name].shape[1:])
    return graph


def compare(want: Array, got: Array, ulp: float) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    if want.dtype.kind != "f":
        np.testing.assert_array_equal(got, want)
        return
    scale = np.abs(want).max(axis=1, keepdims=True) if want.ndim == 2 else np.abs(want)
    unit = np.spacing(np.maximum(scale, np.finfo(want.dtype).tiny))
    difference = np.abs(got.astype(np.float64) - want.astype(np.float64)) / unit
    assert float(difference.max(initial=0)) <= ulp
