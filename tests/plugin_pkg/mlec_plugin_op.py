"""An op of a third party: what it means. Every backend that runs references has it with this."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlec.ir import Case, OpDef, Operand, TensorType, Trait
from mlec.ir.op import Array, Attrs


def _type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    return types[0]


def _reference(x: Array) -> Array:
    return np.asarray(x * np.minimum(np.maximum(x + 3, 0), 6) / 6, x.dtype)


def _sample(rng: np.random.Generator) -> Case:
    return Case((rng.normal(scale=4, size=(7, 5)).astype(np.float32),), {})


HARD_SWISH = OpDef(
    "hard_swish",
    (Operand("x"),),
    (),
    _type,
    _reference,
    _sample,
    traits=Trait.ELEMENTWISE,
    doc="x * clip(x + 3, 0, 6) / 6",
)
