"""Filling the columns of `Columns` from a row of the input: the part all strategies share."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from mlec.backends.tvm.compat import T, tirx
from mlec.backends.tvm.kernels.tree_ensemble import ensemble as e
from mlec.backends.tvm.kernels.tree_ensemble.ensemble import Array, TreeEnsemble
from mlec.backends.tvm.kernels.tree_ensemble.sums import over_vectors
from mlec.backends.tvm.kernels.vector import const, is_nan, load, share, store
from mlec.ops.tree import ZERO_LIMIT

Expr: TypeAlias = Any
Buffer: TypeAlias = Any


def pack_columns(ensemble: TreeEnsemble) -> dict[str, Array]:
    """``column_feature`` i32[M]; with categorical splits also ``column_set`` i32[members] and ``sets`` i32[C, W]."""
    columns = ensemble.columns
    packed: dict[str, Array] = {}
    if columns.count:
        packed["column_feature"] = columns.feature.astype(np.int32)
    member = columns.kind >= e.MEMBER
    if member.any():
        packed["column_set"] = columns.category[member].astype(np.int32)
        packed["sets"] = np.ascontiguousarray(ensemble.categories, np.int32)
    return packed


def fill_columns(
    ensemble: TreeEnsemble, packed: dict[str, Buffer], x: Buffer, row: Expr, scratch: Buffer, at: Expr, lanes: int
) -> None:
    """Emit ``scratch[at + m] = column m of x[row]`` for every column m, in vectors of ``lanes`` where features lie side by side."""
    columns = ensemble.columns
    for kind, begin, end in columns.ranges():
        if columns.consecutive(begin, end):
            feature = int(columns.feature[begin])

            def copy(first: Expr, count: int, kind: int = kind, begin: int = begin, feature: int = feature) -> None:
                value = share(load(x, [row, feature + first], count))
                store(scratch, _number(value, ensemble.dtype, kind, count), [at + begin + first])

            over_vectors(end - begin, lanes, copy)
            continue
        with T.serial(end - begin) as i:
            m = i + begin
            T.buffer_store(scratch, column_value(ensemble, packed, x, row, m, kind), [at + m])


def column_value(
    ensemble: TreeEnsemble, packed: dict[str, Buffer], x: Buffer, row: Expr, column: Expr, kind: int
) -> Expr:
    """What ``column``, which is of ``kind``, holds for ``x[row]``, in the dtype of x."""
    value = share(x[row, packed["column_feature"][column]])
    if kind < e.MEMBER:
        return _number(value, ensemble.dtype, kind)
    first = int(np.searchsorted(ensemble.columns.kind, e.MEMBER))
    return _not_member(
        value, ensemble.dtype, packed["sets"], packed["column_set"][column - first], kind == e.MEMBER_LOW
    )


def _number(x: Expr, dtype: str, kind: int, lanes: int = 1) -> Expr:
    def constant(value: float) -> Expr:
        return const(value, dtype, lanes)

    # Not `is_nan` of a single number: with it, 64 rows of 28 columns took four times as long (measured: 530 and 128 ns a row).
    nan = T.isnan(x) if lanes == 1 else is_nan(x)
    zero, low = tirx.abs(x) <= constant(ZERO_LIMIT), constant(-np.inf)
    match kind:
        case e.PLAIN:
            return x
        case e.NAN_LOW:
            # A maximum, not Select(nan, low, x): LLVM makes of that a load of the constant under a mask which is rarely set,
            # and where the page's entry has lost its accessed bit such a load costs hundreds of cycles, and never sets it.
            return tirx.Select(x > low, x, low)
        case e.NAN_ZERO:
            return tirx.Select(nan, constant(0.0), x)
        case e.ZERO_NAN:
            return tirx.Select(zero, constant(np.nan), x)
        case e.ZERO_LOW:
            return tirx.Select(tirx.any(zero, nan), low, x)
        case e.PRESENT:
            return tirx.Select(nan, constant(0.0), constant(1.0))
        case _:
            return tirx.Select(tirx.any(zero, nan), constant(0.0), constant(1.0))


def _not_member(x: Expr, dtype: str, sets: Buffer, row: Expr, missing_left: bool) -> Expr:
    """0 where category ``trunc(x)`` is in the set, else 1. A category outside the bit set is in no set."""

    def constant(value: float) -> Expr:
        return tirx.const(value, dtype)

    limit = int(sets.shape[1]) * 32
    inside = tirx.all(x > constant(-1.0), x < constant(limit))  # false for NaN
    category = share(tirx.Cast("int32", tirx.Select(inside, x, constant(0.0))))  # conversion truncates
    bit = (sets[row, category >> 5] >> (category & 31)) & 1
    left = tirx.all(inside, bit == 1)
    if missing_left:
        left = tirx.any(T.isnan(x), left)
    return tirx.Select(left, constant(0.0), constant(1.0))
