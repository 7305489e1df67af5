"""Inputs made for a model: such that differences from its source show, and batches to time."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlec.errors import UsageError
from mlec.ir import Graph, Value
from mlec.ir.dim import evaluate, parse_dim, symbols_of
from mlec.ir.dtype import DType
from mlec.ir.op import Array
from mlec.ops.tree import OPERANDS
from mlec.runtime.dims import solved
from mlec.signature import Signature

PROBE_ROWS = 256
MAX_PROBE_ROWS = 4096
MAX_PROBE_NUMBERS = 1 << 26
"""In all columns together: a file can say that its model has millions of them."""


def _batch(signature: Signature) -> int | str:
    """The number of rows that the model takes, or its expression; 1 of scalars."""
    return next((spec.shape[0] for spec in signature.inputs if spec.shape), 1)


def fixed_rows(signature: Signature) -> int | None:
    """Of a model that takes one number of rows only: which."""
    batch = _batch(signature)
    return batch if isinstance(batch, int) else None


def probe_inputs(graph: Graph, rows: int = PROBE_ROWS, seed: int = 0) -> list[Any] | None:
    """Rows made to find differences.

    For a table: normal values, values at the split thresholds of the trees and one float to each side, the codes of category sets, NaN
    and infinity where the source takes them, known categories. For tensors: normal values and small integers, 3 rows.
    """
    rng = np.random.default_rng(seed)
    if graph.signature.table is None:
        return tensor_probes(graph.signature, rng)
    fixed = fixed_rows(graph.signature)
    return table_probe(graph, rows if fixed is None else fixed, rng)


def probe_rows(graph: Graph) -> int:
    """Rows enough for each threshold and its neighbours, within reason."""
    splits = max((len(values) for values in _split_values(graph).values()), default=0)
    width = 1 if graph.signature.table is None else max(graph.signature.table.n_features, 1)
    return min(max(PROBE_ROWS, 2 * splits), MAX_PROBE_ROWS, max(MAX_PROBE_NUMBERS // width, 8))


def batch_inputs(graph: Graph, rows: int, seed: int = 0) -> list[Any]:
    """Inputs of a given number of rows, for timing.

    Raises:
        UsageError: the model takes another number of rows, or an element type that none are made for; or so many are too much for
            the memory of this machine.
    """
    rng = np.random.default_rng(seed)
    if graph.signature.table is not None and fixed_rows(graph.signature) in (None, rows):
        return table_probe(graph, rows, rng)
    batch = _batch(graph.signature)
    arrays = tensor_probes(graph.signature, rng, 16, solved(batch, rows, {}) if isinstance(batch, str) else {})
    if arrays is None or len(arrays[0]) != rows:
        least, most = graph.signature.symbols.get(str(batch), (0, None))
        wanted = batch if (least, most) == (0, None) else f"at least {least}" if most is None else f"{least} to {most}"
        raise UsageError(
            f"this model takes batches of {wanted} rows, not of {rows}", code="E_BATCH", hint="time a batch that it was compiled for",
        )  # fmt: skip
    return arrays


def _check_room(numbers: int) -> None:
    """Refuses random inputs that cannot be made here, before the system ends the process for trying.

    Raises:
        UsageError: they take more than a quarter of the memory, and making, converting and running them takes several times theirs.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 8 * numbers > memory // 4:
        raise UsageError(
            f"random inputs of {numbers} numbers take {8 * numbers / 1e9:.3g} GB, and several times that to run; "
            f"this machine has {memory / 1e9:.3g} GB", code="E_NO_MEMORY", hint="take fewer rows",
        )  # fmt: skip


def tensor_probes(
    signature: Signature, rng: np.random.Generator, extent: int = 3, known: Mapping[str, int] | None = None
) -> list[Any] | None:
    """Random arrays for the inputs, symbolic dims as ``known`` or near ``extent``; None for element types that numpy lacks."""
    arrays: list[Any] = []
    for spec in signature.inputs:
        dims = [parse_dim(d) for d in spec.shape]
        binding: dict[str, int] = {}
        for name in frozenset().union(*(symbols_of(d) for d in dims)):
            low, high = signature.symbols.get(name, (0, None))
            wanted = (known or {}).get(name, extent)
            binding[name] = max(low, wanted if high is None else min(wanted, high))
        shape = tuple(evaluate(d, binding) for d in dims)
        _check_room(math.prod(shape))
        dtype = DType(spec.dtype)
        if dtype is DType.BF16:
            return None
        if dtype.is_float:
            arrays.append(rng.normal(size=shape).astype(dtype.numpy))
        elif dtype.is_bool:
            arrays.append(rng.random(shape) < 0.5)
        else:
            arrays.append(rng.integers(0, 2, shape).astype(dtype.numpy))
    return arrays


def table_probe(graph: Graph, rows: int, rng: np.random.Generator) -> list[Any]:
    """One table that the source takes: an array, or a DataFrame when the source knows column names or categories are coded."""
    table = graph.signature.table
    assert table is not None
    _check_room(rows * table.n_features)
    columns: list[Array] = [rng.normal(scale=3.0, size=rows) for _ in range(table.n_features)]
    splits = _split_values(graph)
    for feed_index, feed in enumerate(table.feeds):
        for position, column in enumerate(feed.columns):
            if feed.codings:
                coding = feed.codings[position]
                values: list[Any] = list(coding.categories)
                picked = np.empty(rows, object)
                picked[:] = (
                    [values[int(i)] for i in rng.integers(0, max(len(values), 1), rows)] if values else [None] * rows
                )
                columns[column] = picked
                continue
            numbers = columns[column]
            known = splits.get((feed_index, position))
            if known is not None and known.size:
                half = rows // 2
                numbers[:half] = rng.permutation(known)[:half] if len(known) >= half else rng.choice(known, half)
            accepted = feed.numbers or table.numbers
            if accepted != "finite":
                numbers[rng.random(rows) < 0.05] = np.nan
            if accepted == "any":
                odd = rng.random(rows) < 0.02
                numbers[odd] = rng.choice([np.inf, -np.inf, 0.0, -0.0], int(odd.sum()))
    order = rng.permutation(rows)
    if table.feature_names is None and not any(c.dtype == object for c in columns):
        return [np.column_stack([c[order] for c in columns]) if columns else np.zeros((rows, 0))]
    if table.feature_names is None:
        mixed = np.empty((rows, table.n_features), object)
        for i, c in enumerate(columns):
            mixed[:, i] = c[order]
        return [mixed]
    import pandas as pd

    return [pd.DataFrame({name: c[order] for name, c in zip(table.feature_names, columns, strict=True)})]


def _split_values(graph: Graph) -> Mapping[tuple[int, int], Array]:
    """By (graph input, column) the numbers that the ensembles' splits on it turn on: each threshold and the floats next to it; of a
    category set its codes and those next to them.
    """
    found: dict[tuple[int, int], list[Array]] = {}
    positions = {value: i for i, value in enumerate(graph.inputs)}
    for node in graph.nodes:
        if node.name != "tree_ensemble":
            continue
        operands = dict(zip(OPERANDS.split(), node.inputs, strict=True))
        feature, threshold, category, sets = (
            graph.constant_value(operands[name]) for name in ("feature", "threshold", "category", "categories")
        )
        if feature is None or threshold is None or category is None or sets is None:
            continue
        order = np.argsort(feature, kind="stable")
        tested, starts = np.unique(feature[order], return_index=True)
        for column, nodes in zip(tested, np.split(order, starts)[1:], strict=True):
            value, place = _origin(graph, operands["x"], int(column))
            if value not in positions:
                continue
            kinds = category[nodes] if category.size else np.full(nodes.shape, -1)
            exact = np.unique(threshold[nodes[kinds < 0]])
            exact = exact[np.isfinite(exact)]
            sides = [np.nextafter(exact, exact.dtype.type(side)) for side in (-np.inf, np.inf)]
            words = sets[np.unique(kinds[kinds >= 0])].view(np.uint8)
            codes = np.flatnonzero(np.unpackbits(words, axis=1, bitorder="little").any(axis=0))
            near = np.concatenate([codes - 1, codes, codes + 0.5, codes + 1])
            found.setdefault((positions[value], place), []).extend([exact, *sides, near])
    return {key: np.unique(np.concatenate(parts)) for key, parts in found.items()}


def _origin(graph: Graph, value: Value, column: int) -> tuple[Value, int]:
    """The earliest value, and its column, that a column goes back to through steps that leave most numbers as they are."""
    while (node := graph.producer.get(value)) is not None:
        if node.name in ("cast", "floor"):
            value = node.inputs[0]
        elif node.name == "where":
            value = node.inputs[2]
        elif node.name == "slice" and node.attrs["axis"] == 1:
            value, column = node.inputs[0], int(node.attrs["start"]) + column * int(node.attrs["step"])
        elif node.name == "concat" and node.attrs["axis"] == 1:
            for part in node.inputs:
                width = part.type.shape[1]
                if not isinstance(width, int) or column < width:
                    value = part
                    break
                column -= width
        else:
            break
    return value, column
