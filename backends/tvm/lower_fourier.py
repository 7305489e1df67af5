"""Fourier transforms: kernels for lengths of small prime factors, matrix products (`fourier_products`) for the others."""

from __future__ import annotations

from collections.abc import Sequence

from mlec.backends.tvm.kernels.fourier import Fourier, fourier
from mlec.backends.tvm.lower_fused import lower_decomposed
from mlec.backends.tvm.lowering import Lowering, Tensor
from mlec.backends.tvm.region import Dims
from mlec.backends.tvm.registry import lowers
from mlec.ir.dim import product, static
from mlec.ir.dtype import DType
from mlec.ir.graph import Node
from mlec.ir.op import Array
from mlec.ir.types import TensorType


@lowers("fft", "rfft", "irfft")
def lower_fourier(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> Sequence[Tensor]:
    """Along an axis before the last, lines are neighbours in memory, if those behind it fill whole vectors; if not, it is made the last."""
    x, target = operands[0], lowering.target
    axis, rank = node.attrs["axis"] % x.type.rank, x.type.rank
    n = static(node.attrs["n"] if node.name == "irfft" else x.shape[axis])
    inverse, scale = bool(node.attrs.get("inverse")), node.attrs["scale"]
    transform = Fourier(node.name, n, len(operands), inverse, scale, x.dtype, target, bool(node.attrs.get("pairs")))
    if transform.radices is None:
        return lower_decomposed(lowering, node, operands)
    columns = product(x.shape[axis + 1 :])
    if not isinstance(columns, int) or (columns != 1 and columns % transform.lanes):
        order = (*range(axis), *range(axis + 1, rank), axis)
        back = (*range(axis), rank - 1, *range(axis, rank - 1), *([rank] if transform.pairs else []))
        turned = tuple(Tensor(_permuted(part.type, order), transposed=(part, order)) for part in operands)
        results = _transformed(lowering, node, turned, transform, rank - 1)
        return [Tensor(v.type, transposed=(y, back)) for v, y in zip(node.outputs, results, strict=True)]
    return _transformed(lowering, node, operands, transform, axis)


def _transformed(
    lowering: Lowering, node: Node, operands: tuple[Tensor, ...], transform: Fourier, axis: int
) -> tuple[Tensor, ...]:
    shape = operands[0].shape
    kept = (*shape[:axis], transform.kept, *shape[axis + 1 :])
    result = TensorType((*kept, 2) if transform.pairs else kept, operands[0].type.dtype)

    def build(name: str, dims: Dims) -> object:
        return fourier(transform, dims.shape(shape), axis, name)

    passes = " ".join(map(str, transform.radices or ()))
    return lowering.kernel(
        build,
        (*operands, *_tables(transform)),
        [result] * transform.results,
        node=node,
        strategy=f"passes of {passes or 'nothing'}",
    )


def _tables(transform: Fourier) -> tuple[Tensor, Tensor]:
    """What the kernel reads beside its operands."""
    passes = "x".join(map(str, transform.radices or ()))

    def table(what: str, array: Array) -> Tensor:
        return Tensor(
            TensorType(array.shape, DType.of(array.dtype)), array, name=f"{transform.op}{transform.n}.{passes}.{what}"
        )

    return table("places", transform.places), table("factors", transform.factors.astype(transform.dtype))


def _permuted(t: TensorType, order: Sequence[int]) -> TensorType:
    return TensorType(tuple(t.shape[i] for i in order), t.dtype)
