"""Tree ensembles that decide on numbers of too few digits: a cast before the splits, and thresholds between which it leaves no number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlec.ir import Graph, Node, Value, run_graph
from mlec.ir.op import Array
from mlec.passes.stability.findings import Finding, Severity, listed
from mlec.passes.stability.wide import WideGraph
from mlec.passes.trees.arrays import Trees
from mlec.passes.trees.prune import decided
from mlec.wording import plural

STEPS = 4
"""Where most neighbouring thresholds are no more floats apart than this, the splits are finer than the numbers."""
MAX_NODES = 200_000
TRIED = 16
"""Splits that rows are made for, one after the other until one shows."""


@dataclass(frozen=True)
class _Rows:
    """What an ensemble compares.

    Attributes:
        table: where its numbers come from, but for casts.
        cast: on the way, to the type of the fewest digits; None where the table itself has no more.
        dtype: that type.
    """

    table: Value
    cast: Node | None
    dtype: np.dtype[Any]

    @staticmethod
    def of(node: Node, graph: Graph) -> _Rows:
        table, cast, least = node.inputs[0], None, node.inputs[0].type.dtype
        while (step := graph.producer.get(table)) is not None and step.name == "cast":
            kind = step.inputs[0].type.dtype
            if not kind.is_float:
                break
            if kind.itemsize < least.itemsize:
                least, cast = kind, None
            elif kind.itemsize > least.itemsize and cast is None:
                cast = step
            table = step.inputs[0]
        return _Rows(table, cast, least.numpy)


@dataclass(frozen=True)
class _Row:
    """A row that an ensemble should take elsewhere.

    Attributes:
        numbers: by feature; the others are 0.
        text: what of it matters, in words.
    """

    numbers: dict[int, float]
    text: str


def tree_findings(graph: Graph) -> list[Finding]:
    """Of each ensemble that takes numbers cast to fewer digits, what that changes.

    A source that casts by itself, as scikit-learn and XGBoost do, was fitted to that: it is a finding only if the splits are finer than the
    numbers that are left.
    """
    found: list[Finding] = []
    for node in graph.nodes:
        trees = Trees.of(node, graph) if node.name == "tree_ensemble" else None
        if trees is None or not 0 < trees.nodes <= MAX_NODES:
            continue
        rows = _Rows.of(node, graph)
        if rows.dtype.kind != "f":
            continue  # bfloat16, of which numpy knows no neighbours
        found += _merged(graph, node, trees, rows)
        finer = _is_finer(trees, rows.dtype)
        from_table = graph.signature.table is not None
        if rows.cast is None and rows.dtype == trees.threshold.dtype and finer and from_table:
            danger = f"the source casts the table to {rows.dtype}"
            danger += f", of which most thresholds are at most {STEPS} steps apart: regions are lost"
            found.append(_cast_finding(graph, node, node, rows, trees, danger, "note"))
        if rows.cast is None or (from_table and not finer):
            continue
        danger = f"numbers are cast to {rows.dtype} before the splits, and those near a threshold go to its other side"
        if finer:
            danger += f"; most thresholds are at most {STEPS} of its steps apart, so that whole regions are lost"
        found.append(_cast_finding(graph, node, rows.cast, rows, trees, danger, "warning"))
    return found


def _is_finer(trees: Trees, dtype: np.dtype[Any]) -> bool:
    """Whether of most neighbouring thresholds of a feature there are hardly floats in between."""
    feature, threshold = trees.feature[trees.numeric], trees.threshold[trees.numeric]
    order = np.lexsort((threshold, feature))
    feature, threshold = feature[order], threshold[order]
    with np.errstate(all="ignore"):  # thresholds may be infinite, and far apart
        apart = np.diff(threshold)
        neighbours = (np.diff(feature) == 0) & (apart > 0)
        if not neighbours.any():
            return False
        steps = apart[neighbours] / np.spacing(np.abs(threshold[1:][neighbours]).astype(dtype))
        return bool(np.median(steps) <= STEPS)


def _cast_finding(
    graph: Graph, node: Node, at: Node, rows: _Rows, trees: Trees, danger: str, severity: Severity
) -> Finding:
    """With a row of float64 on which another leaf is reached, if there is one; ``at``: whose line it is."""
    shown = _shown(graph, rows, _beside_roots(trees, rows.dtype))
    if shown is None:
        return Finding("cast-before-split", "note", node.name, at.loc, danger)
    return Finding("cast-before-split", severity, node.name, at.loc, danger, *shown)


def _merged(graph: Graph, node: Node, trees: Trees, rows: _Rows) -> list[Finding]:
    """Splits that would decide something, but not of the numbers that are left, if a row shows one."""
    if rows.dtype.itemsize >= trees.threshold.dtype.itemsize:
        return []
    narrow = replace(trees, threshold=_rounded(trees.threshold, rows.dtype, trees.compare))
    side = np.where((decided(trees) == 0) & trees.numeric, decided(narrow), 0)
    merged = np.flatnonzero(side)
    shown = _shown(graph, rows, _between(trees, merged, side)) if merged.size else None
    if shown is None:
        return []
    danger = f"{plural(len(merged), 'split')} can decide nothing, as no {rows.dtype} lies between a threshold and that of a split above"
    at = rows.cast or node
    return [Finding("merged-thresholds", "warning", node.name, at.loc, danger, *shown)]


def _rounded(threshold: Array, dtype: np.dtype[Any], compare: str) -> Array:
    """Thresholds that decide in the same way of numbers of a type: down to one of its numbers for ``<=``, up for ``<``."""
    with np.errstate(all="ignore"):
        near = threshold.astype(dtype)
        beyond = near > threshold if compare == "le" else near < threshold
        end = dtype.type(-np.inf if compare == "le" else np.inf)
        return np.where(beyond, np.nextafter(near, end), near).astype(threshold.dtype)


# -- rows that show it -----------------------------------------------------------------------------------------------


def _shown(graph: Graph, rows: _Rows, candidates: Iterator[_Row]) -> tuple[str, dict[str, Any], str, float] | None:
    """The input in words and as numbers, what comes out, and the error, of the first row that float64 takes to another leaf."""
    features = rows.table.type.shape[1]
    if len(graph.inputs) != 1 or rows.table is not graph.inputs[0] or not isinstance(features, int):
        return None
    wide, name = WideGraph(graph, np.dtype(np.float64)), graph.signature.inputs[0].name
    for candidate in candidates:
        row = np.zeros((1, features))
        for feature, number in candidate.numbers.items():
            row[0, feature] = number
        got, right = run_graph(graph, [row.astype(rows.table.type.dtype.numpy)]), wide.run([row])
        for a, b, spec in zip(got, right, graph.signature.outputs, strict=True):
            different = np.flatnonzero(np.abs(a.astype(np.float64) - b) > 1e-5 * np.abs(b))
            if different.size:
                place = different[0]
                shows = f"{spec.name} is {a.flat[place]:.6g} instead of {b.flat[place]:.6g}"
                error = float(np.abs(a.flat[place] - b.flat[place]) / max(float(np.abs(b).max()), 1e-30))
                return f"{name}: {candidate.text}", {name: listed(row)}, shows, error
    return None


def _beside_roots(trees: Trees, dtype: np.dtype[Any]) -> Iterator[_Row]:
    """Numbers beside the thresholds of some first splits, which the cast takes to the other side."""
    roots = trees.roots[trees.roots >= 0]
    roots = roots[trees.numeric[roots] & np.isfinite(trees.threshold[roots])][:TRIED]
    with np.errstate(all="ignore"):
        here = _rounded(trees.threshold[roots], dtype, trees.compare).astype(dtype)
        other = np.nextafter(here, dtype.type(np.inf if trees.compare == "le" else -np.inf))
        middle = here.astype(np.float64) + (other.astype(np.float64) - here.astype(np.float64)) / 2
    for root, turn in zip(roots, middle, strict=True):
        feature, threshold = int(trees.feature[root]), float(trees.threshold[root])
        number = threshold + (float(turn) - threshold) / 2
        text = f"column {feature} is {number!r}, beside the threshold {threshold!r}, the others are 0"
        yield _Row({feature: number}, text)


def _between(trees: Trees, nodes: Array, side: Array) -> Iterator[_Row]:
    """Rows that come to a split with a number between its threshold and that of a split above it."""
    above, is_left = np.full(trees.nodes, -1), np.zeros(trees.nodes, bool)
    for children, left in ((trees.left, True), (trees.right, False)):
        inner = np.flatnonzero(children >= 0)
        above[children[inner]], is_left[children[inner]] = inner, left
    for node in nodes[:TRIED]:
        own, threshold = int(trees.feature[node]), trees.threshold[node]
        ranges: dict[int, tuple[float, float]] = {}
        child, possible = node, True
        while (parent := above[child]) >= 0 and possible:
            possible = bool(trees.numeric[parent])
            _narrow(ranges, trees, int(parent), bool(is_left[child]))
            child = parent
        low, high = ranges.pop(own, (-np.inf, np.inf))
        # What is left goes to one side; the number goes to the other, between the threshold and where the range ends.
        largest_left, smallest_right = _beside(threshold, trees.compare)
        number = smallest_right if side[node] < 0 else largest_left
        if not (possible and np.isfinite(number) and low <= number <= high):
            continue
        numbers = {feature: _inside(*bounds) for feature, bounds in ranges.items()}
        text = f"column {own} is {float(number)!r}, between the threshold {float(threshold)!r} and that of a split above it"
        yield _Row({**numbers, own: float(number)}, f"{text}; the others lead there")


def _narrow(ranges: dict[int, tuple[float, float]], trees: Trees, node: int, left: bool) -> None:
    """Takes what goes to the other side of a split out of the range of its feature."""
    feature = int(trees.feature[node])
    low, high = ranges.get(feature, (-np.inf, np.inf))
    largest_left, smallest_right = _beside(trees.threshold[node], trees.compare)
    ranges[feature] = (low, min(high, largest_left)) if left else (max(low, smallest_right), high)


def _beside(threshold: Any, compare: str) -> tuple[Any, Any]:
    """The largest number that goes left, and the smallest that goes right."""
    infinity = threshold.dtype.type(np.inf)
    if compare == "le":
        return threshold, np.nextafter(threshold, infinity)
    return np.nextafter(threshold, -infinity), threshold


def _inside(low: float, high: float) -> float:
    """A number of a range that few digits hold, if there is one: 0, or far from its ends."""
    if low <= 0 <= high:
        return 0.0
    if np.isinf(high):
        return float(low) + max(1.0, abs(float(low)))
    if np.isinf(low):
        return float(high) - max(1.0, abs(float(high)))
    return float(low) + (float(high) - float(low)) / 2
