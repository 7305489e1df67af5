"""What op declarations share: schema shorthands, shape rules, samplers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlec.errors import TypeRuleError
from mlec.ir.dim import Dim, Proof, proves_equal
from mlec.ir.dtype import DType
from mlec.ir.op import REQUIRED, SYMBOLIC_EXTENT, Array, Attr, AttrKind, Attrs, Cost, CostRule, Operand, moved_bytes
from mlec.ir.types import Shape, TensorType

N = SYMBOLIC_EXTENT
"""Extent used by samplers for an axis that may be symbolic."""


def operands(names: str) -> tuple[Operand, ...]:
    """``"x w? xs*"``: a required, an optional and a variadic operand."""
    return tuple(Operand(n.rstrip("?*"), optional=n.endswith("?"), variadic=n.endswith("*")) for n in names.split())


def int_attr(name: str, default: object = REQUIRED) -> Attr:
    return Attr(name, AttrKind.INT, default)


def ints_attr(name: str, default: object = REQUIRED) -> Attr:
    return Attr(name, AttrKind.INTS, default)


def float_attr(name: str, default: object = REQUIRED) -> Attr:
    return Attr(name, AttrKind.FLOAT, default)


def bool_attr(name: str, default: bool = False) -> Attr:
    return Attr(name, AttrKind.BOOL, default)


def choice_attr(name: str, *choices: str) -> Attr:
    """A string attribute; the first choice is the default."""
    return Attr(name, AttrKind.STR, choices[0], choices)


def require(condition: bool, message: str, code: str = "E_TYPE") -> None:
    if not condition:
        raise TypeRuleError(message, code=code)


def same_dtype(types: Sequence[TensorType]) -> DType:
    """The dtype that all operands share."""
    found = {t.dtype for t in types}
    require(len(found) == 1, f"operands must have one dtype, got {', '.join(sorted(map(str, found)))}", "E_DTYPE")
    return types[0].dtype


def float_dtype(t: TensorType) -> DType:
    require(t.dtype.is_float, f"needs a float operand, got {t}", "E_DTYPE")
    return t.dtype


def same_dim(a: Dim, b: Dim, what: str) -> Dim:
    """The common extent; an error unless the two are provably equal."""
    if proves_equal(a, b) is not Proof.YES:
        raise _different(f"{what}: {a} is not {b}", a, b)
    return a


def _different(message: str, a: Dim, b: Dim) -> TypeRuleError:
    error = TypeRuleError(message, code="E_SHAPE")
    error.dims = (a, b)
    return error


def normal_axis(axis: int, rank: int) -> int:
    """The axis counted from the front."""
    require(-rank <= axis < rank, f"axis {axis} is out of range for rank {rank}", "E_AXIS")
    return axis % rank


def normal_axes(axes: Sequence[int], rank: int) -> tuple[int, ...]:
    found = tuple(sorted(normal_axis(a, rank) for a in axes))
    require(len(set(found)) == len(found), f"an axis is repeated in {list(axes)}", "E_AXIS")
    return found


def broadcast_shapes(*shapes: Shape) -> Shape:
    """Numpy's broadcasting over symbolic extents: equal, or one of them is the int 1."""
    rank = max((len(s) for s in shapes), default=0)
    result: list[Dim] = []
    for axis in range(-rank, 0):
        extent: Dim = 1
        for shape in shapes:
            if -axis > len(shape) or shape[axis] == 1:
                continue
            if extent != 1 and proves_equal(extent, shape[axis]) is not Proof.YES:
                shown = " and ".join(f"[{', '.join(map(str, s))}]" for s in shapes)
                message = f"shapes {shown} do not broadcast: {extent} against {shape[axis]} on axis {axis}"
                raise _different(message, extent, shape[axis])
            extent = shape[axis]
        result.append(extent)
    return tuple(result)


def require_elements(t: TensorType, axes: Sequence[int]) -> None:
    """Refuse axes of extent 0, for an op that chooses an element of each. What a symbolic extent turns out to be, it does not know.

    Raises:
        TypeRuleError: one of the axes has extent 0.
    """
    for axis in normal_axes(axes, t.rank):
        require(t.shape[axis] != 0, f"axis {axis} of {t} has no element to choose from", "E_SHAPE")


def reduced_shape(t: TensorType, axes: Sequence[int], keepdims: bool) -> Shape:
    found = normal_axes(axes, t.rank)
    if keepdims:
        return tuple(1 if i in found else d for i, d in enumerate(t.shape))
    return tuple(d for i, d in enumerate(t.shape) if i not in found)


def per_element(flops: int) -> CostRule:
    """So many operations for each element of the first result."""

    def cost(inputs: Sequence[TensorType], results: Sequence[TensorType], attrs: Attrs) -> Cost:
        return Cost(results[0].size * flops, moved_bytes(inputs, results))

    return cost


def wide_float(x: Array) -> Array:
    """Floats as references compute them: in float32 at least."""
    return x.astype(np.float32 if x.dtype.name == "bfloat16" else np.promote_types(x.dtype, np.float32))


def floats(
    rng: np.random.Generator, *shape: int, dtype: str = "float32", low: float = -3.0, high: float = 3.0
) -> Array:
    """Uniform samples with a few exact zeros and repeated values, as real data has."""
    values = rng.uniform(low, high, shape)
    return np.asarray(np.round(values, int(rng.integers(1, 6))), dtype=dtype)


def pick_dtype(rng: np.random.Generator) -> str:
    return str(rng.choice(["float32", "float64"]))
