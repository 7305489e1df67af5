"""Ops that collapse axes, and scans along one. NaN spreads, as in numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlec.ir.dtype import DType
from mlec.ir.op import Array, Attrs, Case, Cost, OpDef, Trait, moved_bytes, register
from mlec.ir.types import TensorType
from mlec.ops.common import (
    N,
    bool_attr,
    floats,
    int_attr,
    ints_attr,
    normal_axis,
    operands,
    pick_dtype,
    reduced_shape,
    require,
    require_elements,
)


def _reads_all(inputs: Sequence[TensorType], results: Sequence[TensorType], attrs: Attrs) -> Cost:
    return Cost(inputs[0].size, moved_bytes(inputs, results))


def _type(
    kinds: str, result: DType | None = None, of_none: bool = True
) -> Callable[[Sequence[TensorType], Attrs], TensorType]:
    """``of_none``: whether no elements have a result, as those of a sum have 0."""

    def infer(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
        (x,) = types
        kind = "f" if x.dtype.is_float else "i" if x.dtype.is_int else "b"
        require(kind in kinds, f"does not take {x.dtype}", "E_DTYPE")
        if not of_none:
            require_elements(x, attrs["axes"])
        return TensorType(reduced_shape(x, attrs["axes"], attrs["keepdims"]), result or x.dtype)

    return infer


def _over_axes(function: Callable[..., Any]) -> Callable[..., Array]:
    def reference(x: Array, axes: tuple[int, ...], keepdims: bool) -> Array:
        wide = x.astype(np.float32) if x.dtype.itemsize == 2 and x.dtype.kind != "i" else x
        return np.asarray(function(wide, axis=axes, keepdims=keepdims)).astype(x.dtype)

    return reference


def _sample(rng: np.random.Generator) -> Case:
    axes = [(1,), (-1,), (1, 2), (0,)][int(rng.integers(4))]
    return Case((floats(rng, N, 5, 6, dtype=pick_dtype(rng)),), {"axes": axes, "keepdims": bool(rng.integers(2))})


def _logsumexp(x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
    top = np.max(x, axis=axis, keepdims=True, initial=-np.inf)
    finite = np.where(np.isfinite(top), top, 0)
    result = np.log(np.sum(np.exp(x - finite), axis=axis, keepdims=True)) + finite
    return np.asarray(result if keepdims else np.squeeze(result, axis=axis))


_ATTRS = (ints_attr("axes"), bool_attr("keepdims"))
for _name, _function, _rule, _doc in (
    ("sum", np.sum, _type("fi"), "sum over axes"),
    ("mean", np.mean, _type("f"), "mean over axes"),
    ("prod", np.prod, _type("fi"), "product over axes"),
    ("max", np.max, _type("fi", of_none=False), "largest over axes; NaN if there is one"),
    ("min", np.min, _type("fi", of_none=False), "smallest over axes; NaN if there is one"),
    ("logsumexp", _logsumexp, _type("f"), "log of the sum of exp over axes, without overflow"),
):
    register(
        OpDef(
            _name, operands("x"), _ATTRS, _rule, _over_axes(_function), _sample, _reads_all, Trait.REDUCTION, 64.0, _doc
        )
    )  # fmt: skip


def _bool_sample(rng: np.random.Generator) -> Case:
    return Case((np.asarray(rng.random((N, 5)) < 0.7),), {"axes": (1,), "keepdims": bool(rng.integers(2))})


for _name, _test, _doc in (("any", np.any, "or over axes"), ("all", np.all, "and over axes")):
    register(
        OpDef(
            _name, operands("x"), _ATTRS, _type("b", DType.BOOL), _over_axes(_test), _bool_sample, _reads_all,
            Trait.REDUCTION, doc=_doc,
        )
    )  # fmt: skip


def _arg_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    require(not types[0].dtype.is_bool, f"needs numbers, got {types[0]}", "E_DTYPE")
    require_elements(types[0], (attrs["axis"],))
    return TensorType(reduced_shape(types[0], (attrs["axis"],), attrs["keepdims"]), DType.I64)


def _arg(function: Callable[..., Any]) -> Callable[..., Array]:
    def reference(x: Array, axis: int, keepdims: bool) -> Array:
        return np.asarray(function(x, axis=axis, keepdims=keepdims), np.int64)

    return reference


def _arg_sample(rng: np.random.Generator) -> Case:
    x = np.asarray(rng.integers(0, 4, (N, 6)), pick_dtype(rng))  # ties on purpose
    if rng.random() < 0.3:
        x[0, 2] = np.nan
    return Case((x,), {"axis": -1, "keepdims": bool(rng.integers(2))})


for _name, _search in (("argmax", np.argmax), ("argmin", np.argmin)):
    register(
        OpDef(
            _name, operands("x"), (int_attr("axis"), bool_attr("keepdims")), _arg_type, _arg(_search), _arg_sample, _reads_all,
            Trait.REDUCTION, doc=f"index of the first {_name[3:]}imum along an axis; the first NaN wins",
        )
    )  # fmt: skip


def _scan_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    normal_axis(attrs["axis"], types[0].rank)
    require(not types[0].dtype.is_bool, f"needs numbers, got {types[0]}", "E_DTYPE")
    return types[0]


def _cumsum(x: Array, axis: int) -> Array:
    return np.asarray(np.cumsum(x, axis=axis, dtype=x.dtype))


register(
    OpDef(
        "cumsum", operands("x"), (int_attr("axis"),), _scan_type, _cumsum,
        lambda rng: Case((floats(rng, N, 5, dtype=pick_dtype(rng)),), {"axis": 1}), tolerance=64.0, doc="running sum along an axis",
    )
)  # fmt: skip


def _sort_type(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, TensorType]:
    (x,) = types
    normal_axis(attrs["axis"], x.rank)
    return x, TensorType(x.shape, DType.I64)


def _order(x: Array, axis: int, descending: bool) -> Array:
    """Stable order; NaN counts as the largest, as in torch and numpy."""
    if not descending:
        return np.argsort(x, axis=axis, kind="stable")
    flipped = np.flip(x, axis)
    order = np.flip(np.argsort(flipped, axis=axis, kind="stable"), axis)
    return np.asarray(x.shape[axis] - 1 - order)


def _sort(x: Array, axis: int, descending: bool) -> tuple[Array, Array]:
    order = _order(x, axis, descending)
    return np.take_along_axis(x, order, axis), order.astype(np.int64)


register(
    OpDef(
        "sort", operands("x"), (int_attr("axis"), bool_attr("descending")), _sort_type, _sort,
        lambda rng: Case((floats(rng, N, 6, dtype=pick_dtype(rng)),), {"axis": -1, "descending": bool(rng.integers(2))}),
        doc="sorted values and their positions, stable, NaN last when ascending",
    )
)  # fmt: skip


def _topk_type(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, TensorType]:
    (x,) = types
    axis, k = normal_axis(attrs["axis"], x.rank), attrs["k"]
    extent = x.shape[axis]
    require(not isinstance(extent, int) or 0 <= k <= extent, f"k = {k} of {extent}", "E_SHAPE")
    shape = (*x.shape[:axis], k, *x.shape[axis + 1 :])
    return TensorType(shape, x.dtype), TensorType(shape, DType.I64)


def _topk(x: Array, k: int, axis: int, largest: bool) -> tuple[Array, Array]:
    order = np.take(_order(x, axis, largest), np.arange(k), axis)
    return np.take_along_axis(x, order, axis), order.astype(np.int64)


register(
    OpDef(
        "topk", operands("x"), (int_attr("k"), int_attr("axis", default=-1), bool_attr("largest", True)), _topk_type, _topk,
        lambda rng: Case((floats(rng, N, 6, dtype=pick_dtype(rng)),), {"k": 3, "largest": bool(rng.integers(2))}),
        doc="the k largest (or smallest) values in order and their positions; the first of equals comes first",
    )
)  # fmt: skip
