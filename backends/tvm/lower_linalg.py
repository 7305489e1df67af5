"""Matrix products and distances."""

from __future__ import annotations

from mlec.backends.tvm.kernels.gemm import column_block, gemm, matmul, pack_gemm
from mlec.backends.tvm.lower_fused import Tail
from mlec.backends.tvm.lowering import Lowering, Tensor
from mlec.backends.tvm.region import Dims
from mlec.backends.tvm.registry import lowers
from mlec.ir.graph import Node


@lowers("matmul", form="anchor")
def lower_matmul(lowering: Lowering, node: Node, operands: tuple[Tensor, ...], tail: Tail) -> Tensor:
    """Constant weights are packed now; a transposed right operand is read as it lies."""
    a, b = operands
    if b.array is not None and len(b.shape) == 2:
        n = int(b.array.shape[1])
        block = column_block(n, a.dtype, lowering.target)
        packed = lowering.packed(b, f"packed{block}", lambda w: pack_gemm(w, block))
        return _packed_product(lowering, node, a, packed, n, tail)
    flipped = False
    if b.transposed is not None:
        source, perm = b.transposed
        rank = len(perm)
        if perm == (*range(rank - 2), rank - 1, rank - 2):
            b, flipped = source, True

    def build(name: str, dims: Dims) -> object:
        *a_lead, m, k = dims.shape(a.shape)
        *b_lead, rows, columns = dims.shape(b.shape)
        n = rows if flipped else columns
        return matmul(a_lead, b_lead, m, n, k, a.dtype, lowering.target, flipped, tail.epilogue(lowering, dims), name)

    operands = (a, b, *tail.operands(lowering))
    strategy = f"matmul{', right operand transposed' if flipped else ''}{tail}"
    return lowering.kernel(build, operands, [tail.type], node=node, strategy=strategy)[0]


@lowers("matmul_packed", form="anchor")
def lower_matmul_packed(lowering: Lowering, node: Node, operands: tuple[Tensor, ...], tail: Tail) -> Tensor:
    x, w = operands
    return _packed_product(lowering, node, x, w, node.attrs["n"], tail)


def _packed_product(lowering: Lowering, node: Node, a: Tensor, w: Tensor, n: int, tail: Tail) -> Tensor:
    block = int(str(w.shape[2]))

    def build(name: str, dims: Dims) -> object:
        *lead, k = dims.shape(a.shape)
        return gemm(lead, n, k, a.dtype, block, lowering.target, tail.epilogue(lowering, dims), name)

    operands = (a, w, *tail.operands(lowering))
    return lowering.kernel(build, operands, [tail.type], node=node, strategy=f"gemm, blocks of {block} columns{tail}")[
        0
    ]
