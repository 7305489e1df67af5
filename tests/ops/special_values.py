"""A call of an op on the values that formulas forget: NaN, infinities, signed zeros, denormals."""

from __future__ import annotations

from itertools import product

import numpy as np

from mlec.ir import DType, TensorType, Trait
from mlec.ir.op import SYMBOLIC_EXTENT, Array, Case, OpDef

SPECIAL = (np.nan, np.inf, -np.inf, 0.0, -0.0, "denormal", 1.0, -2.5)


def special_case(op: OpDef, rng: np.random.Generator) -> Case | None:
    """For ops on elements every combination of special values in the float operands, for reductions one kind in each row.

    None for other ops, for ops without float operands, and where elements become integers, which have none of these values.
    """
    for _ in range(40):
        case = op.sample(rng)
        if not any(is_float(a) for a in case.operands):
            continue
        if op.has(Trait.REDUCTION):
            return Case(tuple(in_rows(a) if is_float(a) else a for a in case.operands), case.attrs)
        if not op.has(Trait.ELEMENTWISE):
            return None
        types = [TensorType(a.shape, DType.of(a)) for a in case.operands]
        if not any(t.dtype.is_int for t in op.result_types(types, op.complete_attrs(case.attrs))):
            return combinations(case, rng)
    return None


def is_float(array: Array) -> bool:
    return DType.of(array).is_float


def special(dtype: np.dtype) -> Array:
    return np.array([np.finfo(dtype).tiny / 4 if v == "denormal" else v for v in SPECIAL], dtype)


def combinations(case: Case, rng: np.random.Generator) -> Case:
    floats = [k for k, a in enumerate(case.operands) if is_float(a)]
    count = len(SPECIAL) ** len(floats)
    picks = dict(zip(floats, np.array(list(product(range(len(SPECIAL)), repeat=len(floats)))).T, strict=True))
    rows = [
        np.stack([np.roll(special(a.dtype)[picks[k]], turn) for turn in range(SYMBOLIC_EXTENT)])
        if k in picks
        else rng.choice(np.ravel(a), (SYMBOLIC_EXTENT, count))
        for k, a in enumerate(case.operands)
    ]
    return Case(tuple(rows), case.attrs)


def in_rows(array: Array) -> Array:
    """One row with NaN, one with each infinity, with both, of zeros, of denormals; the others as they are."""
    result = array.copy()
    rows = [np.reshape(row, -1) for row in result]
    rows[0][1], rows[1][2], rows[2][3] = np.nan, np.inf, -np.inf
    rows[3][:2] = np.inf, -np.inf
    rows[4][...] = -0.0
    rows[5][...] = np.finfo(array.dtype).tiny / 4
    return result
