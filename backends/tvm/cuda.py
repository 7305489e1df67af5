"""Lowering for a GPU: correct kernels by simple schedules.

Matrix products are scheduled by TVM's DLight rules. Everything else is one thread for each element or line of the result
(`lower_direct`, and loops over elements); ops without such a kernel are taken apart (`decompose`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlec.backends.tvm.compat import IRModule, Target, dlight, te
from mlec.backends.tvm.kernels.vector import int64
from mlec.backends.tvm.lower_direct import direct_convolution, flipped_weights, transposed_geometry
from mlec.backends.tvm.lower_fused import lower_decomposed
from mlec.backends.tvm.lowering import Lowering, Tensor
from mlec.backends.tvm.region import Dims
from mlec.backends.tvm.registry import CUDA, lowers
from mlec.ir.dim import Dim
from mlec.ir.graph import Node
from mlec.ops.windows import Geometry


class CudaLowering(Lowering):
    """Lowers a graph for a GPU."""

    device = "cuda"
    cell_scope = "local"


# -- ops with a GPU lowering of their own ----------------------------------------------------------------------------


@lowers("matmul", on=CUDA)
def _matmul(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> Tensor:
    a, b = operands

    def build(name: str, dims: Dims) -> Any:
        x, y = (te.placeholder(_wide(dims, t.shape), t.dtype, label) for t, label in ((a, "a"), (b, "b")))
        shape = _wide(dims, node.output.type.shape)
        acc = "float32" if a.dtype in ("float16", "bfloat16") else a.dtype
        k = te.reduce_axis((int64(0), _wide(dims, a.shape)[-1]), "k")

        def own(t: Tensor, lead: Sequence[Any]) -> list[Any]:
            batch = lead[len(lead) - (len(t.shape) - 2) :] if len(t.shape) > 2 else ()
            return [int64(0) if d == 1 else i for d, i in zip(t.shape[:-2], batch, strict=True)]

        def element(*indices: Any) -> Any:
            *lead, i, j = indices
            left, right = x[(*own(a, lead), i, k)], y[(*own(b, lead), k, j)]
            return te.sum(left.astype(acc) * right.astype(acc), axis=k)

        product = te.compute(shape, element, "product")
        result = product if acc == a.dtype else te.compute(shape, lambda *i: product[i].astype(a.dtype), "result")
        return _scheduled(te.create_prim_func([x, y, result]).with_attr("global_symbol", name), name)

    return lowering.kernel(build, operands, [node.output.type], node=node, strategy="DLight's schedule of a matmul")[0]


def _wide(dims: Dims, shape: Sequence[Dim]) -> list[Any]:
    """The extents of a kernel of TE, which takes the type of its indices from them."""
    return list(map(int64, dims.shape(shape)))


def _scheduled(function: Any, name: str) -> Any:
    """The function by the first of DLight's rules that applies."""
    rules = (dlight.gpu.Matmul(), dlight.gpu.GEMV(), dlight.gpu.GeneralReduction(), dlight.gpu.Fallback())
    # 48 KiB of shared memory are what every device gives a block without being asked for more.
    with Target({"kind": "cuda", "arch": "sm_80", "max_shared_memory_per_block": 49152}):
        return dlight.ApplyDefaultSchedule(*rules)(IRModule({name: function}))[name]


@lowers("matmul_packed", on=CUDA)
def _matmul_packed(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> Tensor | Sequence[Tensor]:
    x, w = operands
    if w.array is None:
        return lower_decomposed(lowering, node, operands)
    n = node.attrs["n"]
    plain = lowering.packed(w, "unpacked", lambda a: a.transpose(1, 0, 2).reshape(a.shape[1], -1)[:, :n])
    return _matmul(lowering, node, (x, plain))


@lowers("conv", on=CUDA)
def _convolution(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> Tensor:
    x, w = operands
    return direct_convolution(lowering, node, x, w, Geometry.of(node.attrs, x.type.rank - 2))


@lowers("conv_transpose", on=CUDA)
def _transposed_convolution(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> Tensor:
    x, w = operands
    geometry = transposed_geometry(node.attrs, w.shape)
    return direct_convolution(lowering, node, x, flipped_weights(lowering, node, w), geometry)
