"""Elementwise ops, and every other op whose result is an expression of single input elements: one loop nest each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from mlec.backends.tvm.kernels.elementwise import Element, Lanes, Piece, elementwise
from mlec.backends.tvm.kernels.epilogue import Buffer, Expr
from mlec.backends.tvm.lowering import Lowering, Tensor, needed_extents
from mlec.backends.tvm.region import Dims, Load, Number, Region, Source, is_elementwise
from mlec.ir.dim import Dim, SymDim, evaluate, product, symbols_of
from mlec.ir.graph import Node, Value
from mlec.ir.op import Trait, attr_symbols
from mlec.ir.types import Shape, TensorType


def lower_node(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> Tensor:
    """One node by itself."""
    inputs = dict(zip(node.inputs, operands, strict=True))
    return lower_region(lowering, node, (node,), inputs, node.output)


def lower_region(
    lowering: Lowering, node: Node, nodes: Sequence[Node], inputs: Mapping[Value, Tensor], output: Value
) -> Tensor:
    """One kernel for a region with one result.

    Args:
        node: that the region stands for, in the profile.
        nodes: of the region.
        inputs: what the values that no node of the region makes are.
    """
    region = RegionKernel(*_needed(nodes, inputs, output))
    flat = region.flattened(output)
    pieces = [(flat, output, ())] if flat else region.pieces(output)
    return region.lower(lowering, node, output.type, pieces, flat)


def _needed(
    nodes: Sequence[Node], inputs: Mapping[Value, Tensor], output: Value
) -> tuple[tuple[Node, ...], dict[Value, Tensor]]:
    """The nodes and inputs that the output depends on."""
    wanted = {output}
    kept: list[Node] = []
    for node in reversed(nodes):
        if node.output in wanted:
            kept.append(node)
            wanted.update(node.inputs)
    return tuple(reversed(kept)), {v: t for v, t in inputs.items() if v in wanted}


@dataclass(frozen=True)
class RegionKernel:
    """A region on its way to a kernel."""

    nodes: tuple[Node, ...]
    inputs: dict[Value, Tensor]

    def lower(
        self,
        lowering: Lowering,
        node: Node,
        result: TensorType,
        pieces: Sequence[tuple[Shape, Value, Shape]],
        flat: Shape | None = None,
        into: Tensor | None = None,
        lines: Dim | None = None,
    ) -> Tensor:
        """Adds the kernel.

        Args:
            pieces: shape of a box of the result, the value that fills it, and where the box begins (none: the whole). A value of
                another shape than the box has that of the result, and is read where the box lies.
            flat: shape by which the region is computed when it is not the result's (see `flattened`).
            into, lines: see `Lowering.kernel`.
        """
        read = {v: t for v, t in self.inputs.items() if t.number is None}
        producers = {v: n for n in self.nodes for v in n.outputs}
        operands = list(dict.fromkeys(lowering.in_memory(t) for t in read.values()))
        types = [t.type for t in (*operands, Tensor(result))]
        used = frozenset().union(
            *(attr_symbols(n.attrs) for n in self.nodes), *(v.type.symbols for n in self.nodes for v in n.outputs)
        )
        extents = needed_extents(types, used)
        over = (
            [] if flat is None or lowering.on_gpu else [i for i, t in enumerate(operands) if lies_like(t.type, result)]
        )

        def build(name: str, dims: Dims) -> object:
            def element(value: Value, begin: tuple[Expr, ...]) -> Element:
                def at(buffers: tuple[Buffer, ...], indices: tuple[Expr, ...], lanes: Lanes) -> Expr:
                    by_tensor = dict(zip(operands, buffers, strict=True))
                    sources: dict[Value, Source] = {}
                    for v, t in self.inputs.items():
                        if t.number is not None:
                            sources[v] = Number(t.number, t.type.dtype)
                        else:
                            shape = aligned(v.type.shape, result.shape, flat) if flat else v.type.shape
                            sources[v] = Load.of(by_tensor[lowering.in_memory(t)], dims.shape(shape), t.type.dtype)
                    region = Region(producers, sources, dims, lanes, aligned=flat is not None)
                    inside = (i + b for i, b in zip(indices, begin, strict=True)) if begin else indices
                    return region.at(value, tuple(inside))

                return at

            boxes = []
            for shape, value, offset in pieces:
                begin = () if value.type.shape == shape else dims.shape(offset)
                boxes.append(Piece(0, dims.shape(shape), element(value, begin), dims.shape(offset)))
            specs = [lowering.spec(t, dims) for t in operands]
            symbols = [dims(SymDim.named(s)) for s in extents]
            return elementwise(
                name,
                specs,
                [lowering.spec(result, dims)],
                boxes,
                lowering.target,
                work_per_element(self.nodes, result),
                symbols,
                lowering.spread if lowering.on_gpu else None,
                noalias=not over,
            )

        strategy = "loop over elements" if lines is None else f"copies, which are not needed where {lines} is 1"
        return lowering.kernel(
            build, operands, [result], node=node, strategy=strategy, extents=extents, into=into, lines=lines, over=over
        )[0]

    def pieces(self, output: Value) -> list[tuple[Shape, Value, Shape]]:
        """The result cut along its last axis, where values are joined along theirs: between two cuts neighbours come from neighbours."""
        *outer, last = output.type.shape or (1,)
        producers = {v: n for n in self.nodes for v in n.outputs}
        cuts: set[int] = set()
        ahead, seen = [output], {output}
        while ahead:
            node = producers.get(ahead.pop())
            if node is None or node.output.type.shape[-1:] != (last,):
                continue
            if node.name == "concat" and node.attrs["axis"] % node.output.type.rank == node.output.type.rank - 1:
                widths = [v.type.shape[-1] for v in node.inputs]
                cuts.update(
                    accumulate(w for w in widths if isinstance(w, int))
                    if all(isinstance(w, int) for w in widths)
                    else ()
                )
            elif is_elementwise(node):
                ahead += [v for v in node.inputs if v not in seen]
                seen.update(node.inputs)
        ends = sorted(cuts - {0, last})
        if not ends or not isinstance(last, int):
            return [(output.type.shape, output, ())]
        begins = (0, *ends)
        return [
            ((*outer, end - begin), output, (*(0 for _ in outer), begin))
            for begin, end in zip(begins, (*ends, last), strict=True)
        ]

    def flattened(self, output: Value) -> Shape | None:
        """The result's shape with axes merged that every operand of a purely elementwise region has or lacks together.

        None if the region moves data.
        """
        if not all(map(is_elementwise, self.nodes)):
            return None
        return merged([v.type.shape for v, t in self.inputs.items() if t.number is None], output.type.shape)


def lies_like(operand: TensorType, result: TensorType) -> bool:
    """Whether each element of an operand that broadcasts to the result lies where that of the result does."""
    return operand.dtype == result.dtype and product(operand.shape) == product(result.shape)


def merged(shapes: Sequence[Shape], result: Shape) -> Shape:
    """``result`` with neighbouring axes merged where each of the shapes, which broadcast to it, has both or neither."""
    groups: list[tuple[Dim, tuple[bool, ...]]] = []
    for axis, extent in enumerate(result):
        if extent == 1:
            continue
        has = tuple(_has_axis(shape, len(result) - axis) for shape in shapes)
        if groups and groups[-1][1] == has:
            groups[-1] = (groups[-1][0] * extent, has)
        else:
            groups.append((extent, has))
    return tuple(extent for extent, _ in groups) or (1,)


def aligned(shape: Shape, result: Shape, flat: Shape) -> Shape:
    """The shape in which an operand that broadcasts to ``result`` is read in the loops over ``flat``."""
    answer: list[Dim] = []
    axis = 0
    for extent in flat:
        covered: Dim = 1
        has = False
        while axis < len(result) and (covered != extent or result[axis] == 1):
            covered = covered * result[axis]
            has = has or _has_axis(shape, len(result) - axis)
            axis += 1
        answer.append(extent if has else 1)
    return tuple(answer)


def _has_axis(shape: Shape, from_the_right: int) -> bool:
    return from_the_right <= len(shape) and shape[-from_the_right] != 1


LIBRARY_CALL = 64
"""Operations that take as long as a call into the C library, besides those that it does: 2 ns."""


def work_per_element(nodes: Sequence[Node], result: TensorType) -> int:
    """Arithmetic operations for each element of the result, roughly."""
    flops: Dim = 0
    for n in nodes:
        flops = flops + n.cost.flops
        if n.op.has(Trait.LIBRARY_CALL) and n.output.type.dtype.is_float:
            flops = flops + LIBRARY_CALL * product(n.output.type.shape)
    names = result.symbols | (symbols_of(flops) if not isinstance(flops, int) else frozenset())
    binding = dict.fromkeys(names, 64)
    return max(1, evaluate(flops, binding) // max(1, evaluate(product(result.shape), binding)))
