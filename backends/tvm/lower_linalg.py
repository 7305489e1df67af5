"""Matrix products and distances."""

from __future__ import annotations

from mlec.backends.tvm.kernels.gemm import GemmSchedule, column_block, gemm, pack_gemm, unit_pairs, vector_dots
from mlec.backends.tvm.kernels.gemm_bf16 import least_rows
from mlec.backends.tvm.kernels.matmul import MatmulSchedule, matmul
from mlec.backends.tvm.lower_fused import Tail, lower_decomposed
from mlec.backends.tvm.lowering import Lowering, Tensor, Version
from mlec.backends.tvm.region import Dims
from mlec.backends.tvm.registry import lowers
from mlec.ir.dim import product, static
from mlec.ir.graph import Node
from mlec.ops.linalg import pack_narrow


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

    strategy = f"matmul{', right operand transposed' if flipped else ''}{tail}"
    operands = (a, b, *tail.operands(lowering))

    def version(schedule: MatmulSchedule) -> Version:
        def build(name: str, dims: Dims) -> object:
            *a_lead, m, k = dims.shape(a.shape)
            *b_lead, rows, columns = dims.shape(b.shape)
            n, epilogue = rows if flipped else columns, tail.epilogue(lowering, dims)
            return matmul(a_lead, b_lead, m, n, k, a.dtype, lowering.target, flipped, epilogue, name, schedule)

        return Version(build, operands, strategy)

    columns = b.shape[-2 if flipped else -1]
    schedules = MatmulSchedule.candidates(a.shape[-2], columns, a.dtype, lowering.target)
    return lowering.scheduled(schedules, version, [tail.type], node=node)[0]


@lowers("matmul_packed", form="anchor")
def lower_matmul_packed(lowering: Lowering, node: Node, operands: tuple[Tensor, ...], tail: Tail) -> Tensor:
    x, w = operands
    return _packed_product(lowering, node, x, w, node.attrs["n"], tail)


@lowers("matmul_narrow", form="anchor")
def lower_matmul_narrow(lowering: Lowering, node: Node, operands: tuple[Tensor, ...], tail: Tail) -> Tensor:
    """Constant weights are packed now."""
    a, w = operands
    if w.array is None:
        return tail.apply(lowering, node, lower_decomposed(lowering, node, operands)[0])
    n = int(w.array.shape[1])
    block = column_block(n, a.dtype, lowering.target)
    packed = lowering.packed(w, f"packed{block}", lambda w: pack_narrow(w, block))
    return _packed_product(lowering, node, a, packed, n, tail, w.dtype)


@lowers("matmul_narrow_packed", form="anchor")
def lower_matmul_narrow_packed(lowering: Lowering, node: Node, operands: tuple[Tensor, ...], tail: Tail) -> Tensor:
    x, w = operands
    return _packed_product(lowering, node, x, w, node.attrs["n"], tail, w.dtype)


def _packed_product(
    lowering: Lowering, node: Node, a: Tensor, w: Tensor, n: int, tail: Tail, narrow: str | None = None
) -> Tensor:
    block, rows = static(w.shape[2]), product(a.shape[:-1])
    operands = (a, w, *tail.operands(lowering))
    how = f", {narrow} weights widened" if narrow else ""
    if vector_dots(a.dtype, narrow, block, lowering.target) is not None:
        how = ", bf16 by bf16 in vectors"
    if unit_pairs(a.dtype, narrow, static(a.shape[-1]), block, lowering.target):
        least = least_rows(n, static(a.shape[-1]))
        how += "" if isinstance(rows, int) and rows < least else f", of {least} rows or more by AMX"

    def version(schedule: GemmSchedule) -> Version:
        def build(name: str, dims: Dims) -> object:
            *lead, k = dims.shape(a.shape)
            return gemm(
                lead, n, k, a.dtype, block, lowering.target, tail.epilogue(lowering, dims), name, schedule, lowering.weights_nbytes,
                narrow,
            )  # fmt: skip

        return Version(build, operands, f"gemm, blocks of {block} columns{how}{tail}")

    schedules = GemmSchedule.candidates(rows, n, static(a.shape[-1]), a.dtype, block, lowering.target, narrow)
    return lowering.scheduled(schedules, version, [tail.type], node=node)[0]
