"""Ops that move, pick or repeat elements: where each element of the result comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlec.backends.tvm.compat import tirx
from mlec.backends.tvm.kernels.epilogue import Expr
from mlec.backends.tvm.kernels.interleave import interleave
from mlec.backends.tvm.kernels.transpose import TransposeSchedule, transpose
from mlec.backends.tvm.kernels.vector import broadcast, const_like, int64, lanes_of, select, share
from mlec.backends.tvm.lower_elementwise import RegionKernel, lower_node
from mlec.backends.tvm.lowering import Joined, Lowering, Part, Tensor, Version, is_aligned
from mlec.backends.tvm.region import Dims, Index, Region
from mlec.backends.tvm.registry import BOTH, lowers
from mlec.backends.tvm.scalar import TVM_NAMES
from mlec.ir.dim import Dim, product
from mlec.ir.graph import Node, Value
from mlec.ir.op import lookup
from mlec.ir.types import TensorType

# -- views -----------------------------------------------------------------------------------------------------------


@lowers("reshape", on=BOTH)
def lower_reshape(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> Tensor:
    return lowering.reshape(operands[0], node.output.type.shape)


@lowers("transpose", on=BOTH)
def lower_transpose(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> Tensor:
    """A promise: a matrix product reads its operand transposed, other kernels make `transposed` carry it out."""
    (x,), perm = operands, tuple(node.attrs["perm"])
    if x.number is not None:
        return Tensor(node.output.type, number=x.number)
    if x.array is not None:
        return lowering.packed(x, f"t{''.join(map(str, perm))}", lambda a: a.transpose(perm))
    if x.transposed is not None:
        x, first = x.transposed
        perm = tuple(first[p] for p in perm)
    kept = [p for p in perm if x.shape[p] != 1]
    if kept == sorted(kept):
        return lowering.reshape(x, node.output.type.shape)
    return Tensor(node.output.type, transposed=(x, perm))


def transposed(lowering: Lowering, x: Tensor) -> Tensor:
    """Carries a transposition out."""
    assert x.transposed is not None
    source, perm = x.transposed
    value = Value(source.type)
    node = Node(lookup("transpose"), (value,), (Value(x.type),), {"perm": perm})
    if lowering.on_gpu or [p for p in perm if source.shape[p] != 1][-1:] == [_last(source)]:
        return lower_node(lowering, node, (source,))

    def version(schedule: TransposeSchedule) -> Version:
        def build(name: str, dims: Dims) -> object:
            return transpose(dims.shape(source.shape), perm, source.dtype, lowering.target, name, schedule)

        return Version(build, (source,), "squares turned in registers")

    schedules = TransposeSchedule.candidates(source.dtype, lowering.target)
    return lowering.scheduled(schedules, version, [x.type], node=node)[0]


def _last(x: Tensor) -> int:
    """The last axis of more than one element."""
    return max(axis for axis, extent in enumerate(x.shape) if extent != 1)


@lowers("reshape", form="element")
def reshape_element(region: Region, node: Node, indices: tuple[Index, ...]) -> Expr:
    (x,) = node.inputs
    return region.at(x, reshaped_index(region, indices, node.output.type.shape, x.type.shape))


def reshaped_index(
    region: Region, indices: Sequence[Index], shape: Sequence[Dim], source: Sequence[Dim]
) -> tuple[Index, ...]:
    """The index in ``source`` of the element that stands at ``indices`` in ``shape``.

    Axes are matched in the smallest groups of equal size, so that an axis that the reshape leaves alone keeps its index.
    """
    answer: list[Index] = []
    i = j = 0
    while i < len(shape) or j < len(source):
        a, b = _group(shape, i, source, j)
        if shape[i:a] == source[j:b]:
            answer += indices[i:a]
        else:
            number: Any = 0
            for index, extent in zip(indices[i:a], shape[i:a], strict=True):
                number = number * region.dims(extent) + index
            split: list[Index] = []
            for extent in reversed(source[j + 1 : b]):
                size = region.dims(extent)
                split.append(0 if extent == 1 else region.simplify(number % size))
                number = region.simplify(number // size)
            answer += [number, *reversed(split)] if b > j else []
        i, j = a, b
    return tuple(answer)


def _group(shape: Sequence[Dim], i: int, source: Sequence[Dim], j: int) -> tuple[int, int]:
    """The smallest ends ``a, b`` with as many elements in ``shape[i:a]`` as in ``source[j:b]``; the ends if there are none."""
    for total in range(1, len(shape) - i + len(source) - j + 1):
        for a in range(max(i, i + total - (len(source) - j)), min(len(shape), i + total) + 1):
            b = j + total - (a - i)
            if product(tuple(shape[i:a])) == product(tuple(source[j:b])) != 0:
                return a, b
    return len(shape), len(source)


@lowers("transpose", form="element")
def transpose_element(region: Region, node: Node, indices: tuple[Index, ...]) -> Expr:
    source: list[Index] = [0] * len(indices)
    for index, axis in zip(indices, node.attrs["perm"], strict=True):
        source[axis] = index
    return region.at(node.inputs[0], tuple(source))


@lowers("broadcast_to", form="element")
def broadcast_element(region: Region, node: Node, indices: tuple[Index, ...]) -> Expr:
    return region.operand(node.inputs[0], indices)


@lowers("flip", form="element")
def flip_element(region: Region, node: Node, indices: tuple[Index, ...]) -> Expr:
    (x,) = node.inputs
    axes = {a % x.type.rank for a in node.attrs["axes"]}
    extents = [region.dims(d) for d in x.type.shape]
    return region.at(
        x, tuple(e - 1 - i if k in axes else i for k, (i, e) in enumerate(zip(indices, extents, strict=True)))
    )


# -- joining and cutting ---------------------------------------------------------------------------------------------


@lowers("concat", on=BOTH)
def lower_concat(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> Tensor:
    """One loop nest for each operand, into its part of the result.

    Where nothing but one line comes before the axis, a part is compact in memory: kernels that make operands then write there at once,
    and only what no kernel makes is copied.
    """
    result, axis = node.output.type, node.attrs["axis"] % node.output.type.rank
    if not lowering.on_gpu and axis == result.rank - 1 and [x.shape[axis] for x in operands] == [1, 1]:

        def build(name: str, dims: Dims) -> object:
            return interleave(dims.shape(operands[0].shape), operands[0].dtype, lowering.target, name)

        return lowering.kernel(build, operands, [result], node=node, strategy="elements in turn, by shuffles")[0]
    lines, inner = product(result.shape[:axis]), product(result.shape[axis + 1 :])

    def copy(pieces: Sequence[tuple[Tensor, Dim]], into: Tensor | None = None, lines: Dim | None = None) -> Tensor:
        inputs = [(Value(x.type), x, begin) for x, begin in pieces]
        boxes = [(v.type.shape, v, _along(axis, begin, result.rank)) for v, _, begin in inputs]
        region = RegionKernel((node,), {v: x for v, x, _ in inputs})
        return region.lower(lowering, node, result, boxes, into=into, lines=lines)

    if lowering.on_gpu or (isinstance(lines, int) and lines != 1):
        return copy(_one_after_another(operands, axis))
    own = {
        lowering.in_memory(x).root for v, x in zip(node.inputs, operands, strict=True) if v in lowering.graph.outputs
    }
    joined = _continued(lowering, [lowering.in_memory(x) for x in operands], axis)
    whole = Tensor(result)
    placed: list[tuple[Tensor, Dim]] = []
    others: list[tuple[Tensor, Dim]] = []
    for x, begin in _one_after_another(joined, axis):
        if x.root not in own and lowering.can_lie_in(x, begin * inner):
            lowering.put_in(x, Part(whole, begin * inner, lines))
            placed.append((x, begin))
        else:
            others.append((x, begin))
    with lowering.variant(tuple((str(x.type), pieces is placed) for pieces in (placed, others) for x, _ in pieces)):
        if not placed:
            return copy(others)
        if others:
            copy(others, into=whole)
        if lines != 1:
            copy(placed, into=whole, lines=lines)
    lowering.join(Joined(whole, axis, tuple(joined)))
    return whole


def _along(axis: int, begin: Dim, rank: int) -> tuple[Dim, ...]:
    """Where a box begins that is moved along one axis only."""
    return tuple(begin if a == axis else 0 for a in range(rank))


def _one_after_another(operands: Sequence[Tensor], axis: int) -> list[tuple[Tensor, Dim]]:
    """The operands of a concatenation and where they begin."""
    begins: list[Dim] = [0]
    for x in operands:
        begins.append(begins[-1] + x.shape[axis])
    return list(zip(operands, begins, strict=False))


def _continued(lowering: Lowering, operands: list[Tensor], axis: int) -> list[Tensor]:
    """The operands, those that an earlier concatenation has joined already as one."""
    for earlier in reversed(lowering.joined):
        count = len(earlier.operands)
        for first in range(len(operands) - count + 1):
            if earlier.axis == axis and operands[first : first + count] == list(earlier.operands):
                return _continued(lowering, [*operands[:first], earlier.whole, *operands[first + count :]], axis)
    return operands


@lowers("slice", on=BOTH)
def lower_slice(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> Tensor:
    """Read where it lies, where it is compact there, see `lower_concat`."""
    (x,) = operands
    axis = node.attrs["axis"] % len(x.shape)
    lines, begin = product(x.shape[:axis]), node.attrs["start"] * product(x.shape[axis + 1 :])
    compact = node.attrs["step"] == 1 and not (isinstance(lines, int) and lines != 1) and is_aligned(x, begin)
    if lowering.on_gpu or x.array is not None or x.number is not None or not compact:
        return lower_node(lowering, node, operands)
    x = lowering.in_memory(x)
    result = Tensor(node.output.type, part=Part(x, begin, lines))
    if lines != 1:
        boxes = [(node.output.type.shape, node.output, ())]
        region = RegionKernel((node,), {node.inputs[0]: x})
        region.lower(lowering, node, node.output.type, boxes, into=result, lines=lines)
    return result


def copied(lowering: Lowering, x: Tensor) -> Tensor:
    """The same elements once more."""
    node = Node(lookup("reshape"), (Value(x.type),), (Value(x.type),), {"shape": x.shape})
    return lower_node(lowering, node, (x,))


@lowers("concat", form="element")
def concat_element(region: Region, node: Node, indices: tuple[Index, ...]) -> Expr:
    axis = node.attrs["axis"] % len(indices)

    def from_operand(k: int, index: Index) -> Expr:
        x = node.inputs[k]
        extent = region.dims(x.type.shape[axis])
        here = (*indices[:axis], index, *indices[axis + 1 :])
        if k == len(node.inputs) - 1:
            return region.at(x, here)
        return region.choose(
            index < extent, lambda: region.at(x, here), lambda: from_operand(k + 1, index - extent), x.type.dtype
        )

    return from_operand(0, indices[axis])


@lowers("slice", form="element")
def slice_element(region: Region, node: Node, indices: tuple[Index, ...]) -> Expr:
    axis = node.attrs["axis"] % len(indices)
    index = region.dims(node.attrs["start"]) + indices[axis] * node.attrs["step"]
    return region.at(node.inputs[0], (*indices[:axis], index, *indices[axis + 1 :]))


@lowers("pad", form="element")
def pad_element(region: Region, node: Node, indices: tuple[Index, ...]) -> Expr:
    (x,) = node.inputs
    source: list[Index] = []
    outside: list[Expr] = []
    for index, before, after, dim in zip(indices, node.attrs["before"], node.attrs["after"], x.type.shape, strict=True):
        extent = region.dims(dim)
        at = index - before if before else index
        if (before or after) and node.attrs["mode"] == "constant":
            outside += [at < 0] * bool(before) + [at >= extent] * bool(after)
        elif before or after:
            at = _inside(at, extent, node.attrs["mode"])
        source.append(at)
    if not outside:
        return region.at(x, tuple(source))
    fill = tirx.const(_python_number(node.attrs["value"], x.type), TVM_NAMES[x.type.dtype])
    anywhere = outside[0]
    for condition in outside[1:]:
        anywhere = tirx.Or(anywhere, condition)
    return region.choose(anywhere, lambda: fill, lambda: region.at(x, tuple(source)), x.type.dtype)


def _inside(at: Expr, extent: Any, mode: str) -> Expr:
    """The index of the element that stands for one outside."""
    if mode == "reflect":
        at = tirx.Select(at < 0, -at, at)
        at = tirx.Select(at >= extent, 2 * extent - 2 - at, at)
    return tirx.max(tirx.min(at, extent - 1), int64(0))


def _python_number(value: float, kind: TensorType) -> bool | int | float:
    if kind.dtype.is_bool:
        return bool(value)
    return value if kind.dtype.is_float else int(value)


# -- indexing --------------------------------------------------------------------------------------------------------


@lowers("gather", form="element")
def gather_element(region: Region, node: Node, indices: tuple[Index, ...]) -> Expr:
    x, picks = node.inputs
    axis = node.attrs["axis"] % x.type.rank
    pick = _clamped(region, region.at(picks, indices[axis : axis + picks.type.rank]), x.type.shape[axis])
    return region.at(x, (*indices[:axis], pick, *indices[axis + picks.type.rank :]))


@lowers("take_along_axis", form="element")
def take_element(region: Region, node: Node, indices: tuple[Index, ...]) -> Expr:
    x, picks = node.inputs
    axis = node.attrs["axis"] % x.type.rank
    pick = _clamped(region, region.at(picks, indices), x.type.shape[axis])
    return region.at(x, (*indices[:axis], pick, *indices[axis + 1 :]))


def _clamped(region: Region, pick: Expr, extent: Dim) -> Expr:
    wide = region.scalar(pick).astype("int64")
    return share(tirx.max(tirx.min(wide, region.dims(extent + -1)), int64(0)))


@lowers("one_hot", form="element")
def one_hot_element(region: Region, node: Node, indices: tuple[Index, ...]) -> Expr:
    (picks,) = node.inputs
    picked = region.at(picks, indices[:-1])
    here = region.index_value(indices[-1], picks.type.dtype)
    lanes = max(lanes_of(picked), lanes_of(here))
    kind = TVM_NAMES[node.attrs["dtype"]]
    equal = tirx.EQ(broadcast(picked, lanes), broadcast(here, lanes))
    one = broadcast(tirx.const(1, kind), lanes)
    return share(select(equal, one, const_like(0, one)))


@lowers("iota", form="element")
def iota_element(region: Region, node: Node, indices: tuple[Index, ...]) -> Expr:
    return region.index_value(indices[node.attrs["axis"] % len(indices)], node.attrs["dtype"])


@lowers("constant", form="element")
def constant_element(region: Region, node: Node, indices: tuple[Index, ...]) -> Expr:
    """A number spread over a shape; arrays are operands of a region."""
    return tirx.const(_python_number(node.attrs["value"], node.output.type), TVM_NAMES[node.output.type.dtype])
