"""Tree ensembles that decide on numbers of too few digits: a cast before the splits, and thresholds that the cast made equal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mlec.ir import Graph, Node, Value, run_graph
from mlec.ir.op import Array
from mlec.ops.tree import OPERANDS
from mlec.passes.stability.findings import Finding, Severity, listed
from mlec.passes.stability.wide import WideGraph

STEPS = 4
"""Where most neighbouring thresholds are no more floats apart than this, the splits are finer than the numbers."""
MAX_NODES = 200_000
TRIED_ROOTS = 4


@dataclass(frozen=True)
class _Splits:
    """The numeric splits of an ensemble."""

    feature: Array
    threshold: Array
    parent: Array  # position of the parent split, -1 for roots

    @staticmethod
    def of(node: Node, graph: Graph) -> _Splits | None:
        operands = dict(zip(OPERANDS.split(), node.inputs, strict=True))
        names = ("feature", "threshold", "left", "right", "category")
        arrays = [graph.constant_value(operands[name]) for name in names]
        feature, threshold, left, right, category = arrays
        if feature is None or threshold is None or left is None or right is None or category is None:
            return None
        if not 0 < feature.size <= MAX_NODES:
            return None
        parent = np.full(feature.shape, -1, np.int64)
        for children in (left, right):
            inner = children >= 0
            parent[children[inner]] = np.flatnonzero(inner)
        if category.size:
            threshold = np.where(category >= 0, np.nan, threshold)  # NaN equals nothing, and is near nothing
        return _Splits(feature, threshold, parent)

    def repeated(self) -> int:
        """Splits at the threshold of a split above them on the same feature: they can decide nothing."""
        above, found = self.parent, np.zeros(self.feature.shape, bool)
        while (above >= 0).any():
            at = np.maximum(above, 0)
            found |= (above >= 0) & (self.feature[at] == self.feature) & (self.threshold[at] == self.threshold)
            above = np.where(above >= 0, self.parent[at], -1)
        return int(found.sum())

    def is_finer_than_floats(self) -> bool:
        """Whether of most neighbouring thresholds of a feature there are hardly floats in between."""
        order = np.lexsort((self.threshold, self.feature))
        feature, threshold = self.feature[order], self.threshold[order]
        with np.errstate(all="ignore"):  # thresholds may be infinite, and far apart
            apart = np.diff(threshold)
            neighbours = (np.diff(feature) == 0) & (apart > 0)
            if not neighbours.any():
                return False
            steps = apart[neighbours] / np.spacing(np.abs(threshold[1:][neighbours]))
            return bool(np.median(steps) <= STEPS)


def tree_findings(graph: Graph) -> list[Finding]:
    """Of each ensemble that takes numbers cast to fewer digits, what that changes.

    A source that casts by itself, as scikit-learn and XGBoost do, was fitted to that: it is a finding only if the splits are finer than the
    numbers that are left.
    """
    found = []
    for node in graph.nodes:
        if node.name != "tree_ensemble" or (splits := _Splits.of(node, graph)) is None:
            continue
        cast = graph.producer.get(node.inputs[0])
        narrows = (
            cast is not None and cast.name == "cast" and cast.inputs[0].type.dtype.is_float
            and cast.inputs[0].type.dtype.itemsize > node.inputs[0].type.dtype.itemsize
        )  # fmt: skip
        dtype = node.inputs[0].type.dtype.numpy
        if repeated := splits.repeated():
            danger = f"{repeated} splits can decide nothing: as {dtype} their threshold is that of a split above them"
            found.append(Finding("merged-thresholds", "note", node.name, node.loc, danger))
        finer = splits.is_finer_than_floats()
        if cast is None and finer and graph.signature.table is not None:
            danger = f"the source casts the table to {dtype}, of which most thresholds are at most {STEPS} steps apart: regions are lost"
            found.append(_shown_by_execution(graph, node, node, node.inputs[0], splits, danger, "note"))
        if cast is None or not narrows:
            continue
        if graph.signature.table is not None and not finer:
            continue
        danger = f"numbers are cast to {dtype} before the splits, and those near a threshold go to its other side"
        if finer:
            danger += f"; most thresholds are at most {STEPS} steps of {dtype} apart, so that whole regions are lost"
        found.append(_shown_by_execution(graph, node, cast, cast.inputs[0], splits, danger, "warning"))
    return found


def _shown_by_execution(
    graph: Graph, node: Node, at: Node, table: Value, splits: _Splits, danger: str, severity: Severity
) -> Finding:
    """With a row of float64 on which another leaf is reached, if the numbers come from an input as they are.

    Args:
        node: the ensemble; at: whose line it is.
        table: the numbers before they are cast, in the graph or where the source takes them.
    """
    nothing = Finding("cast-before-split", "note", node.name, at.loc, danger)
    features = table.type.shape[1]
    if len(graph.inputs) != 1 or table is not graph.inputs[0] or not isinstance(features, int):
        return nothing
    wide = WideGraph(graph, np.dtype(np.float64))
    for feature, number, threshold in _beside_roots(splits, node.attrs["compare"]):
        row = np.zeros((1, features))
        row[0, feature] = number
        got, right = run_graph(graph, [row.astype(table.type.dtype.numpy)]), wide.run([row])
        for a, b, spec in zip(got, right, graph.signature.outputs, strict=True):
            different = np.flatnonzero(np.abs(a.astype(np.float64) - b) > 1e-5 * np.abs(b))
            if different.size:
                place = different[0]
                name = graph.signature.inputs[0].name
                return Finding(
                    "cast-before-split", severity, node.name, at.loc, danger,
                    f"{name}: column {feature} is {number!r}, beside the threshold {threshold!r}, the others are 0", {name: listed(row)},
                    f"{spec.name} is {a.flat[place]:.6g} instead of {b.flat[place]:.6g}",
                    float(np.abs(a.flat[place] - b.flat[place]) / max(float(np.abs(b).max()), 1e-30)),
                )  # fmt: skip
    return nothing


def _beside_roots(splits: _Splits, compare: str) -> Iterator[tuple[int, float, float]]:
    """Feature, number and threshold of some first splits: the number rounds to the threshold, but lies on its other side."""
    roots = np.flatnonzero((splits.parent < 0) & np.isfinite(splits.threshold))
    for root in roots[:TRIED_ROOTS]:
        threshold = splits.threshold[root]
        beside = np.nextafter(threshold, threshold.dtype.type(np.inf if compare == "le" else -np.inf))
        number = float(threshold) + 0.25 * (float(beside) - float(threshold))
        yield int(splits.feature[root]), number, float(threshold)
