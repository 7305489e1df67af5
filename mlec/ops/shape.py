"""Ops that move, pick or repeat elements."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlec.ir.dim import Dim, Proof, product, proves_equal
from mlec.ir.dtype import DType
from mlec.ir.op import REQUIRED, Array, Attr, AttrKind, Attrs, Case, Cost, OpDef, Trait, moved_bytes, register
from mlec.ir.types import TensorType
from mlec.ops.common import (
    N,
    broadcast_shapes,
    choice_attr,
    float_attr,
    floats,
    int_attr,
    ints_attr,
    normal_axes,
    normal_axis,
    operands,
    pick_dtype,
    require,
    require_elements,
    same_dim,
    same_dtype,
)


def _no_flops(inputs: Sequence[TensorType], results: Sequence[TensorType], attrs: Attrs) -> Cost:
    return Cost(0, moved_bytes(inputs, results))


def _picked(inputs: Sequence[TensorType], results: Sequence[TensorType], attrs: Attrs) -> Cost:
    """Reads only as many elements as it writes, besides the indices."""
    return Cost(0, moved_bytes(inputs[1:], results) + results[0].nbytes)


def _dims(name: str) -> Attr:
    return Attr(name, AttrKind.DIMS, REQUIRED)


# -- constant, iota --------------------------------------------------------------------------------------------------


def _constant_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    raise AssertionError("the type of a constant is stated, not inferred")


register(
    OpDef(
        "constant", (), (Attr("value", AttrKind.TENSOR, REQUIRED),), _constant_type, lambda value: np.asarray(value),
        lambda rng: Case((), {"value": float(rng.integers(5))}), lambda i, r, a: Cost(0, 0),
        doc="a stored tensor (@name), or a number spread over the stated type",
    )
)  # fmt: skip


def _iota_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    normal_axis(attrs["axis"], len(attrs["shape"]))
    return TensorType(attrs["shape"], attrs["dtype"])


def _iota(shape: tuple[int, ...], axis: int, dtype: DType) -> Array:
    line = np.arange(shape[axis]).astype(dtype.numpy)
    return np.broadcast_to(line.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))]), shape).copy()


def _pick(rng: np.random.Generator, *names: str) -> DType:
    return DType(str(rng.choice(names)))


register(
    OpDef(
        "iota", (), (_dims("shape"), int_attr("axis", default=0), Attr("dtype", AttrKind.DTYPE, DType.I64)), _iota_type, _iota,
        lambda rng: Case((), {"shape": (N, 4), "axis": int(rng.integers(2)), "dtype": _pick(rng, "i64", "i32", "f32")}),
        _no_flops, doc="0, 1, 2 ... along an axis",
    )
)  # fmt: skip

# -- views -----------------------------------------------------------------------------------------------------------


def _reshape_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    (x,) = types
    shape = attrs["shape"]
    require(
        proves_equal(x.size, product(shape)) is Proof.YES,
        f"{x} has {x.size} elements, [{', '.join(map(str, shape))}] has {product(shape)}",
        "E_SHAPE",
    )
    return TensorType(shape, x.dtype)


register(
    OpDef(
        "reshape", operands("x"), (_dims("shape"),), _reshape_type, lambda x, shape: np.reshape(x, shape),
        lambda rng: Case((floats(rng, N, 3, 4, dtype=pick_dtype(rng)),), {"shape": ((N, 12), (N * 3, 4), (N, 2, 6))[int(rng.integers(3))]}),
        _no_flops, Trait.VIEW, doc="another shape, elements in the same order",
    )
)  # fmt: skip


def _transpose_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    (x,) = types
    perm = attrs["perm"]
    require(sorted(perm) == list(range(x.rank)), f"{list(perm)} is not a permutation of the {x.rank} axes", "E_AXIS")
    return TensorType(tuple(x.shape[p] for p in perm), x.dtype)


register(
    OpDef(
        "transpose", operands("x"), (ints_attr("perm"),), _transpose_type, lambda x, perm: np.transpose(x, perm),
        lambda rng: Case((floats(rng, N, 3, 4, dtype=pick_dtype(rng)),), {"perm": tuple(int(p) for p in rng.permutation(3))}),
        _no_flops, Trait.VIEW, doc="axes in another order",
    )
)  # fmt: skip


def _broadcast_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    (x,) = types
    shape = attrs["shape"]
    require(
        broadcast_shapes(x.shape, shape) == shape,
        f"{x} does not broadcast to [{', '.join(map(str, shape))}]",
        "E_SHAPE",
    )
    return TensorType(shape, x.dtype)


register(
    OpDef(
        "broadcast_to", operands("x"), (_dims("shape"),), _broadcast_type, lambda x, shape: np.broadcast_to(x, shape).copy(),
        lambda rng: Case((floats(rng, 3, 1, dtype=pick_dtype(rng)),), {"shape": (N, 3, 4)}), _no_flops,
        doc="repeats along axes of extent 1 and new leading axes",
    )
)  # fmt: skip


def _flip_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    normal_axes(attrs["axes"], types[0].rank)
    return types[0]


register(
    OpDef(
        "flip", operands("x"), (ints_attr("axes"),), _flip_type, lambda x, axes: np.flip(x, axes),
        lambda rng: Case((floats(rng, N, 3, 4),), {"axes": (1, 2)}), _no_flops, Trait.INVOLUTION, doc="reverses axes",
    )
)  # fmt: skip

# -- joining and cutting ---------------------------------------------------------------------------------------------


def _concat_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    require(bool(types), "needs at least one operand", "E_ARITY")
    dtype, rank = same_dtype(types), types[0].rank
    axis = normal_axis(attrs["axis"], rank)
    extent: Dim = 0
    shape = list(types[0].shape)
    for t in types:
        require(t.rank == rank, f"operands have ranks {rank} and {t.rank}", "E_SHAPE")
        extent = extent + t.shape[axis]
        for i in range(rank):
            if i != axis:
                shape[i] = same_dim(shape[i], t.shape[i], f"axis {i}")
    shape[axis] = extent
    return TensorType(tuple(shape), dtype)


register(
    OpDef(
        "concat", operands("xs*"), (int_attr("axis"),), _concat_type, lambda *xs, axis: np.concatenate(xs, axis),
        lambda rng: Case((floats(rng, N, 3), floats(rng, N, 2), floats(rng, N, 1)), {"axis": -1}), _no_flops,
        doc="joins tensors along an axis",
    )
)  # fmt: skip


def _slice_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    (x,) = types
    axis, start, stop, step = normal_axis(attrs["axis"], x.rank), attrs["start"], attrs["stop"], attrs["step"]
    require(step >= 1, f"the step must be positive, got {step}", "E_SHAPE")
    for low, high, what in ((0, start, "start"), (start, stop, "stop"), (stop, x.shape[axis], "stop")):
        gap = high - low
        require(
            not isinstance(gap, int) or gap >= 0,
            f"{what} of [{start}, {stop}) is out of range for extent {x.shape[axis]}",
            "E_SHAPE",
        )
    return TensorType((*x.shape[:axis], (stop - start + step - 1) // step, *x.shape[axis + 1 :]), x.dtype)


def _slice(x: Array, axis: int, start: int, stop: int, step: int) -> Array:
    return x[(slice(None),) * (axis % x.ndim) + (slice(start, stop, step),)]


register(
    OpDef(
        "slice", operands("x"),
        (int_attr("axis"), Attr("start", AttrKind.DIM, 0), Attr("stop", AttrKind.DIM, REQUIRED), int_attr("step", default=1)),
        _slice_type, _slice, lambda rng: Case((floats(rng, N, 6),), {"axis": 1, "start": 1, "stop": 5, "step": int(rng.integers(1, 3))}),
        _picked, Trait.INDEXING, doc="elements start, start + step ... below stop, along an axis",
    )
)  # fmt: skip


def _pad_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    (x,) = types
    before, after = attrs["before"], attrs["after"]
    require(len(before) == len(after) == x.rank, f"before and after must have {x.rank} entries each", "E_SHAPE")
    require(all(p >= 0 for p in (*before, *after)), "padding must not be negative; use slice to crop", "E_SHAPE")
    for axis, (extent, *widths) in enumerate(zip(x.shape, before, after, strict=True)):
        # A symbolic extent is taken to be large enough: nobody reflects rows.
        if attrs["mode"] != "constant" and isinstance(extent, int) and max(widths):
            least = max(widths) + 1 if attrs["mode"] == "reflect" else 1
            require(extent >= least, f"axis {axis} of extent {extent} is too short to pad by {max(widths)}", "E_SHAPE")
    return TensorType(tuple(d + p + q for d, p, q in zip(x.shape, before, after, strict=True)), x.dtype)


def _pad(x: Array, before: tuple[int, ...], after: tuple[int, ...], value: float, mode: str) -> Array:
    widths = list(zip(before, after, strict=True))
    if mode == "constant":
        return np.pad(x, widths, constant_values=np.asarray(value).astype(x.dtype))
    return np.pad(x, widths, mode="edge" if mode == "edge" else "reflect")


register(
    OpDef(
        "pad", operands("x"),
        (ints_attr("before"), ints_attr("after"), float_attr("value", default=0.0), choice_attr("mode", "constant", "reflect", "edge")),
        _pad_type, _pad,
        lambda rng: Case(
            (floats(rng, N, 4, 5),),
            {"before": (0, 1, 2), "after": (0, 2, 0), "mode": str(rng.choice(["constant", "reflect", "edge"]))},
        ),
        _no_flops, doc="adds elements around: a number, a reflection without the edge, or the edge repeated",
    )
)  # fmt: skip

# -- indexing --------------------------------------------------------------------------------------------------------


def _gather_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    x, indices = types
    axis = normal_axis(attrs["axis"], x.rank)
    require(indices.dtype.is_int, f"indices must be integers, got {indices}", "E_DTYPE")
    if 0 not in indices.shape:
        require_elements(x, (axis,))
    return TensorType((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]), x.dtype)


def _gather(x: Array, indices: Array, axis: int) -> Array:
    """An index out of range takes the nearest element, so that no input can read outside the tensor."""
    return np.take(x, np.clip(indices, 0, max(x.shape[axis] - 1, 0)), axis)


register(
    OpDef(
        "gather", operands("x indices"), (int_attr("axis", default=0),), _gather_type, _gather,
        lambda rng: Case((floats(rng, 6, 4), rng.integers(0, 6, (N, 3))), {"axis": 0}), _picked, Trait.INDEXING,
        doc="entries of x along an axis, by index; an index out of range takes the nearest entry",
    )
)  # fmt: skip


def _along_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    x, indices = types
    axis = normal_axis(attrs["axis"], x.rank)
    require(
        indices.dtype.is_int and indices.rank == x.rank,
        f"indices must be integers of rank {x.rank}, got {indices}",
        "E_DTYPE",
    )
    for i in range(x.rank):
        if i != axis:
            same_dim(x.shape[i], indices.shape[i], f"axis {i}")
    if 0 not in indices.shape:
        require_elements(x, (axis,))
    return TensorType(indices.shape, x.dtype)


register(
    OpDef(
        "take_along_axis", operands("x indices"), (int_attr("axis"),), _along_type,
        lambda x, indices, axis: np.take_along_axis(x, np.clip(indices, 0, max(x.shape[axis] - 1, 0)), axis),
        lambda rng: Case((floats(rng, N, 6), rng.integers(0, 6, (N, 3))), {"axis": 1}), _picked, Trait.INDEXING,
        doc="for each position, the entry along an axis that its own index names",
    )
)  # fmt: skip


def _one_hot_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    require(types[0].dtype.is_int, f"needs integers, got {types[0]}", "E_DTYPE")
    return TensorType((*types[0].shape, attrs["depth"]), attrs["dtype"])


def _one_hot(indices: Array, depth: int, dtype: DType) -> Array:
    return np.asarray(np.asarray(indices)[..., None] == np.arange(depth), dtype.numpy)


register(
    OpDef(
        "one_hot", operands("indices"), (int_attr("depth"), Attr("dtype", AttrKind.DTYPE, DType.F32)), _one_hot_type, _one_hot,
        lambda rng: Case((rng.integers(-1, 6, (N, 2)),), {"depth": 5, "dtype": _pick(rng, "f32", "f64", "i64", "bool")}), _no_flops,
        doc="1 at the index, 0 elsewhere; an index out of range gives zeros only",
    )
)  # fmt: skip
