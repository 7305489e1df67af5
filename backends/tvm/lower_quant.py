"""Numbers of 8 bits: quantisation as expressions, and the kernels of products, convolutions and pools on them.

What follows a product (its scales, a bias, an activation, a residual, the way back to 8 bits) is an epilogue on its sums while they are in
registers. Operands for which there is no kernel (weights that are computed, images of symbolic extents) take the decomposition.
"""

from __future__ import annotations

import numpy as np

from mlec.backends.tvm.compat import tirx
from mlec.backends.tvm.kernels.conv_int8 import (
    NarrowConvSchedule,
    conv_int8,
    conv_packing,
    conv_schedules,
    is_pointwise,
)
from mlec.backends.tvm.kernels.depthwise import DepthwiseSchedule
from mlec.backends.tvm.kernels.depthwise_int8 import (
    depthwise_int8,
    depthwise_schedules,
    is_depthwise,
    pack_depthwise,
)
from mlec.backends.tvm.kernels.epilogue import Expr
from mlec.backends.tvm.kernels.gemm_int8 import Int8Schedule, gemm_int8
from mlec.backends.tvm.kernels.int8 import Packed
from mlec.backends.tvm.kernels.pool_int8 import pool_int8
from mlec.backends.tvm.kernels.vector import bits_as, cast_to, const_like, select, share
from mlec.backends.tvm.lower_fused import Tail, lower_decomposed
from mlec.backends.tvm.lowering import Lowering, Tensor, Version
from mlec.backends.tvm.region import Dims
from mlec.backends.tvm.registry import lowers
from mlec.backends.tvm.scalar import TVM_NAMES
from mlec.ir.dim import product, static_dims
from mlec.ir.dtype import DType
from mlec.ir.graph import Node
from mlec.ir.types import TensorType
from mlec.ops.quant import LIMITS, pool_geometry
from mlec.ops.windows import Geometry

_SHIFTER = 1.5 * 2.0**23
"""Added to a float32 of some hundreds, it rounds to an integer and leaves that in the low bits."""


# -- between floats and 8 bits -------------------------------------------------------------------------------------------


@lowers("quantize", form="scalar")
def quantize(x: Expr, scale: float, zero_point: int, dtype: DType) -> Expr:
    """Bounded before it is rounded, which is the same as the bounds are integers: so the low byte of a sum is the result for any x."""
    low, high = LIMITS[dtype]
    steps = share(x * const_like(np.float32(1 / scale), x))
    least, most = const_like(low - zero_point, steps), const_like(high - zero_point, steps)
    if zero_point == low:  # the comparison is false for NaN, which becomes the bound
        raised = share(select(steps > least, steps, least))
        known = share(select(most < raised, most, raised))
    else:
        raised = share(select(steps < least, least, steps))
        inside = share(select(most < raised, most, raised))
        known = share(select(tirx.isnan(steps), const_like(0.0, steps), inside))
    shifted = bits_as("int32", share(known + const_like(_SHIFTER, known)))
    return share(cast_to(TVM_NAMES[dtype], shifted + const_like(zero_point, shifted)))


@lowers("dequantize", form="scalar")
def dequantize(x: Expr, scale: float, zero_point: int) -> Expr:
    whole = cast_to("int32", x)
    centred = cast_to("float32", whole - const_like(zero_point, whole))
    return share(centred * const_like(np.float32(scale), centred))


# -- products ------------------------------------------------------------------------------------------------------------


@lowers("matmul_int8", form="anchor")
def lower_matmul_int8(lowering: Lowering, node: Node, operands: tuple[Tensor, ...], tail: Tail) -> Tensor:
    a, w = operands
    if w.array is None:
        return tail.apply(lowering, node, lower_decomposed(lowering, node, operands)[0])
    k, n = w.array.shape
    return _product(lowering, node, a, w, Packed(1, n, 1, k), tail)


def _product(lowering: Lowering, node: Node, a: Tensor, w: Tensor, packed: Packed, tail: Tail) -> Tensor:
    """Of the last axis of ``a`` and a matrix."""
    operands = (a, *_packed(lowering, node, w, packed), *tail.operands(lowering))

    def version(schedule: Int8Schedule) -> Version:
        def build(name: str, dims: Dims) -> object:
            lead = dims.shape(a.shape[:-1])
            return gemm_int8(
                lead, packed, lowering.target, tail.epilogue(lowering, dims), name, schedule, lowering.weights_nbytes
            )  # fmt: skip

        return Version(build, operands, f"gemm of bytes{_by(schedule.amx)}{tail}")

    schedules = Int8Schedule.candidates(product(a.shape[:-1]), packed, lowering.target)
    return lowering.scheduled(schedules, version, [tail.type], node=node)[0]


def _packed(lowering: Lowering, node: Node, w: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    """The weights in blocks, and what the sums begin with."""
    return lowering.packed(w, f"quads{packed.segments}", packed.pack), _offsets(node, w, packed)


def _offsets(node: Node, w: Tensor, packed: Packed) -> Tensor:
    zero_point = node.attrs["zero_point"]
    assert w.array is not None
    offsets = packed.offsets(w.array, zero_point)
    return Tensor(TensorType(offsets.shape, DType.I32), offsets, name=f"{w.name}.offsets{zero_point}")


def _by(amx: bool) -> str:
    return " by AMX" if amx else ""


@lowers("conv_int8", form="anchor")
def lower_conv_int8(lowering: Lowering, node: Node, operands: tuple[Tensor, ...], tail: Tail) -> Tensor:
    x, w = operands
    if w.array is None or not all(isinstance(extent, int) for extent in x.shape[1:]):
        return tail.apply(lowering, node, lower_decomposed(lowering, node, operands)[0])
    geometry, groups, target = Geometry.of(node.attrs, 2), node.attrs["groups"], lowering.target
    w_shape = static_dims(w.shape)
    packed = conv_packing(w_shape, geometry, groups)
    if is_pointwise(w_shape, geometry, groups):
        return _product(lowering, node, x, w, packed, tail)
    if is_depthwise(w_shape, groups):
        return _depthwise(lowering, node, x, w, tail)
    operands = (x, *_packed(lowering, node, w, packed), *tail.operands(lowering))

    def version(schedule: NarrowConvSchedule) -> Version:
        def build(name: str, dims: Dims) -> object:
            return conv_int8(
                dims.shape(x.shape), w_shape, geometry, groups, node.attrs["zero_point"], target,
                tail.epilogue(lowering, dims), name, schedule, lowering.weights_nbytes,
            )  # fmt: skip

        return Version(build, operands, f"convolution of bytes, channels last{_by(schedule.amx)}{tail}")

    schedules = conv_schedules(x.shape, w_shape, geometry, packed, target)
    return lowering.scheduled(schedules, version, [tail.type], node=node)[0]


def _depthwise(lowering: Lowering, node: Node, x: Tensor, w: Tensor, tail: Tail) -> Tensor:
    """A convolution of each channel by itself."""
    geometry, target, w_shape = Geometry.of(node.attrs, 2), lowering.target, static_dims(w.shape)
    channels = Packed(1, w_shape[3], w_shape[0] * w_shape[1], 1)
    weights = lowering.packed(w, "taps", pack_depthwise)
    operands = (x, weights, _offsets(node, w, channels), *tail.operands(lowering))

    def version(schedule: DepthwiseSchedule) -> Version:
        def build(name: str, dims: Dims) -> object:
            shape, epilogue = dims.shape(x.shape), tail.epilogue(lowering, dims)
            return depthwise_int8(
                shape, w_shape, geometry, node.attrs["zero_point"], target, epilogue, name, schedule
            )  # fmt: skip

        return Version(build, operands, f"depthwise convolution of bytes{tail}")

    return lowering.scheduled(depthwise_schedules(x.shape, w_shape, geometry, target), version, [tail.type], node=node)[
        0
    ]


# -- pools ---------------------------------------------------------------------------------------------------------------


@lowers("max_pool_int8", "sum_pool_int8", form="anchor")
def lower_pool_int8(lowering: Lowering, node: Node, operands: tuple[Tensor, ...], tail: Tail) -> Tensor:
    (x,) = operands

    def build(name: str, dims: Dims) -> object:
        out = dims.shape(node.output.type.shape[1:3])
        geometry, epilogue = pool_geometry(node.attrs), tail.epilogue(lowering, dims)
        return pool_int8(
            dims.shape(x.shape), node.attrs["kernel"], geometry, out, lowering.target, node.attrs.get("zero_point"), epilogue, name
        )  # fmt: skip

    operands = (x, *tail.operands(lowering))
    return lowering.kernel(build, operands, [tail.type], node=node, strategy=f"windows of bytes, channels last{tail}")[
        0
    ]
