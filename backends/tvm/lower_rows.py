"""Row programs: fused bodies in which every row of the result depends on the same row of the operands, as one kernel.

This is what preprocessing, a small model and its labels and probabilities are. The kernel goes once over the rows, in blocks
held by columns (`kernels/rows.py`). A body is a sequence of values; those that are products, results or used more than once
are computed column by column into scratch memory, the others where they are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.elementwise import Lanes, memory_type
from mlec.backends.tvm.kernels.epilogue import Buffer, Expr
from mlec.backends.tvm.kernels.rows import (
    COMBINE,
    FEW_ROWS,
    VERTICAL,
    RowSchedule,
    Run,
    over_blocks,
    read_columns,
    write_columns,
)
from mlec.backends.tvm.kernels.tile import bits, parameter, product, unrolled
from mlec.backends.tvm.kernels.vector import Cell, broadcast, const, int64, load, select, share, store
from mlec.backends.tvm.lowering import Lowering, Tensor, Version
from mlec.backends.tvm.region import Dims, Load, Number, Region, Source, is_elementwise
from mlec.ir.dim import Dim, static
from mlec.ir.graph import Node, Value
from mlec.ir.op import Trait
from mlec.ops.rows import MOVES, PRODUCTS, columns_of, row_operands, rows_of

ELEMENT_WORK, NORMALISED_WORK = 4, 64
"""Multiply-adds that take as long as a cheap operation or a move of one element, and as an element of a softmax."""

FEW_COLUMNS = 4
"""Columns whose steps are written out instead of looped over."""


def lower_rows(
    lowering: Lowering, node: Node, nodes: Sequence[Node], values: Mapping[Value, Tensor], outputs: Sequence[Value]
) -> tuple[Tensor, ...] | None:
    """One kernel for the whole body; None if it isn't a row program."""
    extents = {rows_of(inner, short=True) for inner in nodes}
    if len(extents) != 1 or lowering.on_gpu or not all(map(_has_lanes, nodes)):
        return None
    (n,) = extents
    if n is None:
        return None
    read_by_row = {inner.inputs[i] for inner in nodes for i in row_operands(inner)}
    fixed = {v for inner in nodes for i, v in enumerate(inner.inputs) if i not in row_operands(inner)}
    if fixed & (read_by_row | {v for inner in nodes for v in inner.outputs}):
        return None  # all rows depend on rows of it
    mixes = len(outputs) > 1 or any(inner.name in PRODUCTS | MOVES for inner in nodes)
    mixes = mixes or any(inner.name in VERTICAL and inner.output not in outputs for inner in nodes)
    if not mixes or _is_plain_product(lowering, nodes, outputs):
        return None
    return RowProgram(n, tuple(nodes), dict(values), tuple(outputs)).lower(lowering, node)


def _has_lanes(node: Node) -> bool:
    """Whether the op is computed in vectors; an elementwise one of another package may have a kernel of its own instead."""
    return not node.op.has(Trait.ELEMENTWISE) or is_elementwise(node)


def _work_of(node: Node) -> int:
    """Work for each row, in the unit of ``SERIAL_WORK``, in float32."""
    columns = columns_of(node.output.type)
    if node.name in PRODUCTS:
        return columns * columns_of(node.inputs[0].type)
    if node.name in VERTICAL:
        return columns_of(node.inputs[0].type) * (ELEMENT_WORK if node.name in COMBINE else NORMALISED_WORK)
    return columns * ELEMENT_WORK


def _is_plain_product(lowering: Lowering, nodes: Sequence[Node], outputs: Sequence[Value]) -> bool:
    """Whether `gemm` and its epilogue are as fast for many rows, and several times as fast for a few.

    It uses ``columns`` lanes of a vector where a row program uses all, and needs no turning of rows into columns.
    """
    first, *rest = nodes
    wide = 4 * columns_of(first.output.type) > lowering.target.lanes(first.output.type.dtype.bits)
    return first.name in PRODUCTS and len(outputs) == 1 and all(map(is_elementwise, rest)) and wide


@dataclass(frozen=True)
class RowProgram:
    """A body, its rows, and what the values that it reads are."""

    n: Dim
    nodes: tuple[Node, ...]
    values: dict[Value, Tensor]
    outputs: tuple[Value, ...]

    def lower(self, lowering: Lowering, node: Node) -> tuple[Tensor, ...]:
        """Adds the kernel."""
        read = {v: self.values[v] for inner in self.nodes for v in inner.inputs if v in self.values}
        arrays = {inner.inputs[1] for inner in self.nodes if inner.name in PRODUCTS}
        read |= {v: lowering.in_memory(read[v]) for v in arrays}  # also of one number everywhere
        operands = tuple(dict.fromkeys(lowering.in_memory(t) for t in read.values() if t.number is None))
        used = (*(t.type for t in operands), *(v.type for inner in self.nodes for v in inner.outputs))
        widest = max((t.dtype.bits for t in used if t.dtype.is_float), default=32)
        lanes = lowering.target.lanes(widest)
        producers = {v: inner for inner in self.nodes for v in inner.outputs}
        held = self._held()
        rowwise = {inner.inputs[i] for inner in self.nodes for i in row_operands(inner)}
        turned = sum(columns_of(t.type) for v, t in read.items() if v in rowwise)
        work = (sum(map(_work_of, self.nodes)) + ELEMENT_WORK * turned) * widest // 32

        def build(name: str, dims: Dims, schedule: RowSchedule) -> object:
            rows, block = int64(dims(self.n)), schedule.vectors * lanes
            with prim_func(name) as kernel:
                sources = [parameter(f"x{i}", lowering.spec(t, dims)) for i, t in enumerate(operands)]
                results = [parameter(f"y{i}", lowering.spec(v.type, dims)) for i, v in enumerate(self.outputs)]
                flat = {
                    t: T.decl_buffer((product(dims.shape(t.shape)),), memory_type(t.dtype), data=b.data)
                    for t, b in zip(operands, sources, strict=True)
                }
                written = [
                    T.decl_buffer((product(dims.shape(v.type.shape)),), memory_type(Tensor(v.type).dtype), data=b.data)
                    for v, b in zip(self.outputs, results, strict=True)
                ]
                fixed: dict[Value, Source] = {}
                by_rows: dict[Value, Buffer] = {}
                for value, tensor in read.items():
                    if tensor.number is not None:
                        fixed[value] = Number(tensor.number, tensor.type.dtype)
                    elif value in rowwise:
                        by_rows[value] = flat[lowering.in_memory(tensor)]
                    else:
                        memory = flat[lowering.in_memory(tensor)]
                        fixed[value] = Load.of(memory, dims.shape(value.type.shape), tensor.type.dtype)

                def prepare() -> Run:
                    scratch = {
                        v: T.alloc_buffer((columns_of(v.type) * block,), memory_type(Tensor(v.type).dtype))
                        for v in (*by_rows, *held)
                    }

                    def run(first: Expr, size: int, whole: bool) -> None:
                        Block(
                            self, lowering, dims, rows, size, -(-size // lanes), producers, held, fixed, by_rows, scratch, written
                        )(first, whole)  # fmt: skip

                    return run

                over_blocks(rows, block, lanes, schedule.chunk * lanes, work, prepare)
            return kernel.func

        def version(schedule: RowSchedule) -> Version:
            rows, ops = schedule.vectors * lanes, " ".join(n.name for n in self.nodes)
            strategy = f"row program, blocks of {rows} rows by columns: {ops}"
            return Version(lambda name, dims: build(name, dims, schedule), operands, strategy)

        types = [v.type for v in self.outputs]
        return lowering.scheduled(RowSchedule.candidates(lanes, work), version, types, node=node)

    def _held(self) -> tuple[Value, ...]:
        """The values that are computed into scratch memory, in order."""
        uses: dict[Value, int] = {}
        for inner in self.nodes:
            for v in inner.inputs:
                uses[v] = uses.get(v, 0) + (2 if inner.name in VERTICAL else 1)
        return tuple(
            v
            for inner in self.nodes
            for v in inner.outputs
            if v in self.outputs
            or inner.name in PRODUCTS
            or inner.name in VERTICAL
            or (uses.get(v, 0) > 1 and inner.name not in MOVES)
        )


@dataclass(frozen=True)
class Block:
    """Writes the program for one block of ``size`` rows, ``vectors`` of the widest elements."""

    program: RowProgram
    lowering: Lowering
    dims: Dims
    rows: Expr
    size: int
    vectors: int
    producers: Mapping[Value, Node]
    held: tuple[Value, ...]
    fixed: Mapping[Value, Source]
    by_rows: Mapping[Value, Buffer]
    scratch: Mapping[Value, Buffer]
    written: Sequence[Buffer]

    def __call__(self, first: Expr, whole: bool) -> None:
        for value, buffer in self.by_rows.items():
            columns = columns_of(value.type)
            read_columns(buffer, columns, first, self.rows, whole, self.scratch[value], self.size, self._lanes(value))
        for value in self.held:
            node = self.producers[value]
            if node.name in PRODUCTS:
                self._product(node)
            elif node.name in VERTICAL:
                self._vertical(node)
            else:
                for column in self._each(columns_of(value.type)):
                    self._put(value, column, self._at(value, column, itself=True))
        for value, buffer in zip(self.program.outputs, self.written, strict=True):
            columns = columns_of(value.type)
            write_columns(buffer, columns, first, self.rows, whole, self.scratch[value], self.size, self._lanes(value))

    def _lanes(self, value: Value) -> int:
        return self.lowering.target.lanes(bits(memory_type(Tensor(value.type).dtype)))

    def _each(self, columns: int) -> Iterator[Expr]:
        """Each column: written out, or a loop."""
        if columns <= FEW_COLUMNS:
            yield from range(columns)
        else:
            with T.serial(columns) as column:
                yield column

    def _at(self, value: Value, column: Expr, itself: bool = False) -> Expr:
        """One column of a value, in all lanes; ``itself``: though it is to be held."""
        sources = dict(self.fixed)
        for held, buffer in self.scratch.items():
            if not (itself and held is value):
                strides = (1, self.size) if held.type.rank == 2 else (1,)
                sources[held] = Load(buffer, strides, held.type.dtype.is_bool)
        base = T.bind(const(0, "int64"))
        region = Region(self.producers, sources, self.dims, Lanes(self.size, base))
        element = region.at(value, (base, column) if value.type.rank == 2 else (base,))
        return broadcast(element, self.size)

    def _put(self, value: Value, column: Expr, element: Expr) -> None:
        if value.type.dtype.is_bool:
            element = select(element, const(1, "int8"), const(0, "int8"))
        store(self.scratch[value], element, [column * self.size])

    def _vertical(self, node: Node) -> None:
        (x,) = node.inputs
        VERTICAL[node.name](
            node.name,
            columns_of(x.type),
            lambda column: self._at(x, column),
            lambda column, element: self._put(node.output, column, element),
            lambda column: load(self.scratch[node.output], [column * self.size], self.size),
            Tensor(x.type).dtype,
            self.size,
        )

    def _product(self, node: Node) -> None:
        """A chain of FMAs over k for each column of the result, several columns at once, the pieces of a concatenation in turn.

        A sum is one column of all rows of the block; in the narrowest block, it is one row of as many columns as the weights have side by
        side and a vector holds.
        """
        x, w = node.inputs
        weights = self.fixed[w]
        assert isinstance(weights, Load)
        n, dtype = columns_of(node.output.type), Tensor(node.output.type).dtype
        pieces = [x]
        if x in self.producers and x not in self.scratch and self.producers[x].name == "concat":
            pieces = list(self.producers[x].inputs)
        k, width = columns_of(x.type), static(w.type.shape[-1])
        lanes, registers = self.lowering.target.lanes(bits(dtype)), self.lowering.target.vector_registers - 4
        across = FEW_ROWS == self.size < lanes
        together, held = (min(lanes, width), FEW_ROWS) if across else (1, self.vectors)
        groups = [
            range(column, min(column + together, block + width, n))
            for block in range(0, n, width)
            for column in range(block, min(block + width, n), together)
        ]
        passes = -(-len(groups) * held // registers)
        for part in range(passes):
            some = groups[len(groups) * part // passes : len(groups) * (part + 1) // passes]
            rows = range(FEW_ROWS) if across else (None,)
            sums = [[Cell(dtype, len(group) if across else self.size, 0) for _ in rows] for group in some]
            offset = 0
            for piece in pieces:
                starts = [(group.start // width * k + offset) * width + group.start % width for group in some]
                self._add_products(piece, weights.buffer, starts, width, sums)
                offset += columns_of(piece.type)
            for group, cells in zip(some, sums, strict=True):
                order = [len(group) * row + i for i in range(len(group)) for row in range(len(cells))]
                values = [cell.value for cell in cells]
                self._put(node.output, group.start, tirx.Shuffle(values, order) if across else values[0])

    def _add_products(
        self, x: Value, weights: Buffer, starts: Sequence[int], stride: int, sums: Sequence[Sequence[Cell]]
    ) -> None:
        """Adds column k of x times ``weights[start + k * stride]`` to each sum, for all k: in all lanes, or in those of each row."""

        def step(k: Expr) -> None:
            factor = share(self._at(x, k))
            for start, cells in zip(starts, sums, strict=True):
                if len(cells) == 1:
                    (cell,) = cells
                    cell.set(cell.value + factor * broadcast(weights[start + k * stride], self.size))
                    continue
                weight = share(load(weights, [start + k * stride], cells[0].lanes))
                for row, cell in enumerate(cells):
                    cell.set(cell.value + broadcast(tirx.Shuffle([factor], [row]), cell.lanes) * weight)

        unrolled(columns_of(x.type), 2, step)
