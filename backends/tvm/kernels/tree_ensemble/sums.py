"""Adding the values of leaves, in the order of the trees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from mlec.backends.tvm.compat import T
from mlec.backends.tvm.kernels.tree_ensemble.ensemble import TreeEnsemble
from mlec.backends.tvm.kernels.vector import Cell, load, share, store
from mlec.backends.tvm.target import TargetInfo

Expr: TypeAlias = Any
Buffer: TypeAlias = Any

MOST_VECTORS = 8
"""Vectors of a row of values that are written out; more are a loop."""


def in_groups(trees: int, size: int, group: Callable[[list[Expr]], None]) -> None:
    """Emit ``group`` for all trees, ``size`` at a time; it is given their numbers."""
    full, rest = divmod(trees, size)
    if full:
        with T.serial(full) as g:
            group([g * size + lane for lane in range(size)])
    if rest:
        group([full * size + lane for lane in range(rest)])


def add_values(sums: Buffer, at: Expr, width: int, lanes: int, values: Callable[[Expr, int], Expr]) -> None:
    """Emit ``sums[at + v] += value v`` for ``v < width``; ``values(first, count)`` loads ``count`` of them."""

    def add(first: Expr, count: int) -> None:
        store(sums, load(sums, [at + first], count) + values(first, count), [at + first])

    over_vectors(width, lanes, add)


def over_vectors(width: int, lanes: int, emit: Callable[[Expr, int], None]) -> None:
    """Emit ``emit(first, count)`` for vectors of up to ``lanes`` lanes that together are ``width`` elements."""
    full, rest = divmod(width, lanes)
    if full <= MOST_VECTORS:
        for i in range(full):
            emit(i * lanes, lanes)
    else:
        with T.serial(full) as i:
            emit(i * lanes, lanes)
    if rest:
        emit(full * lanes, rest)


class RowSums:
    """The sums of one row. They are kept in registers where each tree adds to all of them."""

    def __init__(self, ensemble: TreeEnsemble, packed: dict[str, Buffer], info: TargetInfo) -> None:
        self.ensemble, self.packed = ensemble, packed
        self.lanes = info.lanes(np.dtype(ensemble.value_dtype).itemsize * 8)
        self.cells: dict[int, Cell] = {}
        if ensemble.width == ensemble.outputs <= MOST_VECTORS * self.lanes:
            for first in range(0, ensemble.width, self.lanes):
                count = min(self.lanes, ensemble.width - first)
                self.cells[first] = Cell(ensemble.value_dtype, count, load(packed["base"], [first], count))
        else:
            self.sums = T.alloc_buffer((ensemble.outputs,), ensemble.value_dtype)
            with T.serial(ensemble.outputs) as k:
                T.buffer_store(self.sums, packed["base"][k], [k])

    def add(self, values: str, leaf: Expr, tree: Expr) -> None:
        """Emit the addition of row ``leaf`` of ``packed[values]`` [L, V], a leaf of ``tree``."""

        def value(first: Expr, count: int) -> Expr:
            return load(self.packed[values], [leaf, first], count)

        for first, cell in self.cells.items():
            cell.set(share(cell.value + value(first, cell.lanes)))
        if not self.cells:
            add_values(self.sums, T.bind(self.packed["output"][tree]), self.ensemble.width, self.lanes, value)

    def finish(self, out: Buffer, row: Expr) -> None:
        """Emit ``out[row] = sums``."""
        for first, cell in self.cells.items():
            store(out, cell.value, [row, first])
        if not self.cells:
            with T.serial(self.ensemble.outputs) as k:
                T.buffer_store(out, self.sums[k], [row, k])
