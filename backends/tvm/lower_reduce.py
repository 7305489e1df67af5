"""Reductions, scans and sorting along axes."""

from __future__ import annotations

from collections.abc import Sequence

from mlec.backends.tvm.compat import T
from mlec.backends.tvm.kernels import direct
from mlec.backends.tvm.kernels.epilogue import Buffer, Expr
from mlec.backends.tvm.kernels.reduce import arg_reduce, fold_schedules, reduce
from mlec.backends.tvm.kernels.schedule import FoldSchedule
from mlec.backends.tvm.kernels.tile import bits, product, unflatten
from mlec.backends.tvm.kernels.vector import load
from mlec.backends.tvm.lower_fused import Head, Tail
from mlec.backends.tvm.lowering import Lowering, Tensor, Version
from mlec.backends.tvm.region import Dims
from mlec.backends.tvm.registry import BOTH, lowers
from mlec.backends.tvm.scalar import TVM_NAMES
from mlec.ir.graph import Node
from mlec.ir.types import TensorType

MERGE_FROM = 48
"""Length of a line from which merging beats insertion."""


@lowers("sum", "mean", "prod", "max", "min", "any", "all", form="anchor")
def lower_reduction(lowering: Lowering, node: Node, operands: tuple[Tensor, ...], tail: Tail) -> Tensor:
    (x,) = operands
    return _reduction(lowering, node, x.type, (x,), tail, None)


@lowers("sum", "mean", "prod", "max", "min", "any", "all", form="prologue")
def lower_reduction_of(lowering: Lowering, node: Node, head: Head, factors: tuple[Tensor, ...], tail: Tail) -> Tensor:
    """The operand is computed as it is read."""
    return _reduction(lowering, node, head.output.type, head.operands(lowering), tail, head)


def _reduction(
    lowering: Lowering, node: Node, x: TensorType, operands: tuple[Tensor, ...], tail: Tail, head: Head | None
) -> Tensor:
    axes, keepdims, dtype = node.attrs["axes"], node.attrs["keepdims"], TVM_NAMES[x.dtype]

    operands = (*operands, *tail.operands(lowering))

    def version(schedule: FoldSchedule) -> Version:
        def build(name: str, dims: Dims) -> object:
            epilogue = tail.epilogue(lowering, dims)
            prologue = head.prologue(lowering, dims) if head else None
            shape = dims.shape(x.shape)
            return reduce(node.name, shape, axes, keepdims, dtype, lowering.target, epilogue, prologue, name, schedule)

        return Version(build, operands, f"reduce{f' of {head}' if head else ''}{tail}")

    schedules = fold_schedules(x.shape, axes, dtype, lowering.target)
    return lowering.scheduled(schedules, version, [tail.type], node=node)[0]


@lowers("argmax", "argmin")
def lower_arg(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> Tensor:
    (x,) = operands

    def build(name: str, dims: Dims) -> object:
        axis, keepdims = node.attrs["axis"], node.attrs["keepdims"]
        return arg_reduce(node.name, dims.shape(x.shape), axis, keepdims, x.dtype, lowering.target, name)

    return lowering.kernel(build, operands, [node.output.type], node=node, strategy="one pass over the axis")[0]


@lowers("cumsum", "sort", "topk", on=BOTH)
def lower_lines(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> Sequence[Tensor]:
    """One task for each line along the axis."""
    (x,) = operands
    axis = node.attrs["axis"] % x.type.rank
    length = x.shape[axis]
    merges = node.name == "sort" and not lowering.on_gpu and (not isinstance(length, int) or length >= MERGE_FROM)
    strategy = {"cumsum": "running sum", "topk": "insertion"}.get(
        node.name, "merge sort" if merges else "insertion sort"
    )

    def build(name: str, dims: Dims) -> object:
        shape = dims.shape(x.shape)
        before, extent, after = product(shape[:axis]), shape[axis], product(shape[axis + 1 :])
        count = node.attrs["k"] if node.name == "topk" else extent
        lanes = lowering.target.lanes(bits(x.dtype))
        adjacent = isinstance(after, int) and after == 1
        vectorized = node.name == "topk" and node.attrs["k"] > 0 and adjacent and lanes > 1 and not lowering.on_gpu
        vectorized = vectorized and x.dtype in ("float32", "float64")

        def line(inputs: tuple[Buffer, ...], outputs: tuple[Buffer, ...], index: Expr) -> None:
            first, inner = unflatten(index, (before, after))

            def place(k: Expr, length: object) -> Expr:
                return (first * length + k) * after + inner

            def read(where: tuple[Expr, ...]) -> Expr:
                return inputs[0][place(where[0], extent)]

            def write(k: Expr, *values: Expr) -> None:
                for buffer, value in zip(outputs, values, strict=True):
                    T.buffer_store(buffer, value, [place(k, count)])

            if node.name == "cumsum":
                direct.scan_line(extent, x.dtype, read, write)
                return

            def read_vector(k: Expr) -> Expr:
                return load(inputs[0], [place(k, extent)], lanes)

            vector = read_vector if vectorized else None
            descending = bool(node.attrs.get("descending", node.attrs.get("largest")))
            values, positions = (lambda k, b=b: b[place(k, count)] for b in outputs)
            if merges:
                direct.merge_sort_line(extent, x.dtype, descending, read, values, positions, write)
            else:
                direct.first_elements(extent, count, x.dtype, descending, read, values, positions, write, vector)

        specs = [lowering.spec(x, dims)], [lowering.spec(v.type, dims) for v in node.outputs]
        each = {"cumsum": 2.0, "topk": 4.0}.get(node.name, 5.0)  # multiply-adds that take as long
        steps = extent if isinstance(extent, int) else 16
        passes = (steps - 1).bit_length() if merges and steps else 1
        return direct.direct(name, *specs, before * after, each * steps * passes, line, lowering.spread)

    return lowering.kernel(build, operands, [v.type for v in node.outputs], node=node, strategy=strategy)
