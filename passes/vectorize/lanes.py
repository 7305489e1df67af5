"""Values of many equal steps as one tensor.

A *lane* is one of the steps, such as one turn of a loop that the source unrolled. The values that the lanes have in the same place are
stacked along one axis of one tensor, the lane axis, wherever it lies (`Lanes`). What all lanes share is kept once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mlec.ir import Dim, GraphBuilder, Value
from mlec.ir.op import Array, AttrValue
from mlec.ir.types import Shape, TensorType


@dataclass(frozen=True)
class Lanes:
    """One value of every lane.

    Attributes:
        value: all of them in one tensor, or the one that they share.
        axis: the lane axis of ``value``; None where all lanes share it.
    """

    value: Value
    axis: int | None = None

    @property
    def type(self) -> TensorType:
        """Of one lane."""
        shape = self.value.type.shape
        return self.value.type if self.axis is None else TensorType(without(shape, self.axis), self.value.type.dtype)

    @property
    def lane_axis(self) -> int:
        """The lane axis of a value that is not shared."""
        assert self.axis is not None
        return self.axis


def without(shape: Shape, axis: int) -> Shape:
    return (*shape[:axis], *shape[axis + 1 :])


def inserted(shape: Sequence[Dim], axis: int, extent: Dim) -> Shape:
    return (*shape[:axis], extent, *shape[axis:])


class Batch:
    """Builds nodes that compute all lanes at once; the rules of `batching` are written with it.

    What is done to constants alone is done here and now, so that stacked weights are plain constants.

    Attributes:
        b: where the nodes go.
        count: number of lanes.
        made: number of nodes built, constants not counted.
    """

    def __init__(self, b: GraphBuilder, count: int, arrays: dict[Value, Array] | None = None) -> None:
        self.b = b
        self.count = count
        self.made = 0
        self._arrays = {} if arrays is None else arrays  # of the constants made so far

    def __call__(self, op: str, *operands: Value, **attrs: AttrValue) -> Value:
        (result,) = self.multi(op, *operands, **attrs)
        return result

    def multi(self, op: str, *operands: Value, **attrs: AttrValue) -> tuple[Value, ...]:
        self.made += 1
        return self.b.multi(op, *operands, **attrs)

    # -- constants -----------------------------------------------------------------------------------------------

    def constant(self, array: Array, hint: str = "") -> Value:
        value = self.b.constant(np.ascontiguousarray(array), hint)
        self._arrays[value] = array
        return value

    def is_constant(self, value: Value) -> bool:
        return value in self._arrays

    def _moved(self, value: Value, op: str, fold: Callable[[Array], Array], **attrs: AttrValue) -> Value:
        array = self._arrays.get(value)
        return self(op, value, **attrs) if array is None else self.constant(fold(array), value.hint)

    # -- where the lane axis lies --------------------------------------------------------------------------------

    def reshape(self, value: Value, shape: Sequence[Dim]) -> Value:
        if value.type.shape == tuple(shape):
            return value
        return self._moved(value, "reshape", lambda a: a.reshape([int(str(d)) for d in shape]), shape=tuple(shape))

    def at(self, lanes: Lanes, axis: int) -> Value:
        """The stacked values with the lane axis at ``axis``; shared ones are repeated."""
        if lanes.axis is None:
            shape = lanes.value.type.shape
            single = self.reshape(lanes.value, inserted(shape, axis, 1))
            return self("broadcast_to", single, shape=inserted(shape, axis, self.count))
        if lanes.axis == axis:
            return lanes.value
        perm = [a for a in range(lanes.value.type.rank) if a != lanes.axis]
        perm.insert(axis, lanes.axis)
        return self._moved(lanes.value, "transpose", lambda a: a.transpose(perm), perm=tuple(perm))

    def beside(self, lanes: Lanes, rank: int, axis: int) -> Value:
        """An operand that broadcasts, from the last axis on, against lanes of ``rank`` whose lane axis is at ``axis``."""
        own = lanes.type.rank
        place = axis - (rank - own)
        if lanes.axis is None:
            shape = lanes.value.type.shape
            return lanes.value if place <= 0 else self.reshape(lanes.value, inserted(shape, place, 1))
        if place >= 0:
            return self.at(lanes, place)
        return self.reshape(self.at(lanes, 0), (self.count, *(1,) * -place, *lanes.type.shape))

    def folded(self, lanes: Lanes, axis: int) -> Value:
        """The lanes one after the other along an axis of their own, as ``concat`` puts them."""
        value = self.at(lanes, axis)
        shape = value.type.shape
        return self.reshape(value, (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :]))

    def lane(self, lanes: Lanes, index: int) -> Value:
        """The value of one lane."""
        if lanes.axis is None:
            return lanes.value
        picked = self("slice", lanes.value, axis=lanes.axis, start=index, stop=index + 1)
        return self.reshape(picked, lanes.type.shape)

    def split(self, value: Value, axis: int) -> Lanes:
        """The inverse of `folded`."""
        shape = value.type.shape
        extent = shape[axis] // self.count
        return Lanes(self.reshape(value, (*shape[:axis], self.count, extent, *shape[axis + 1 :])), axis)
