"""``fused`` nodes: one kernel for a whole body where there is a template for its form, else the body node by node.

Forms with one kernel:

* only elementwise ops and moves of data: one loop nest (`lower_region`);
* an anchor (matrix product, convolution, reduction, normalisation ...) followed by elementwise ops on its result: the
  anchor's template, which applies a `Tail` to each accumulator;
* elementwise ops and moves followed by a reduction or the norm of a line, which evaluates them as it reads;
* rows computed from rows, by elementwise ops, moves of columns and products with few columns (`lower_rows`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.decompose import decompose
from mlec.backends.tvm.kernels.elementwise import Lanes, NotContiguousError, memory_type
from mlec.backends.tvm.kernels.epilogue import IDENTITY, Buffer, Epilogue, Expr, Prologue
from mlec.backends.tvm.kernels.tile import flat_view, parameter, product
from mlec.backends.tvm.kernels.vector import cast_to, lanes_of, share
from mlec.backends.tvm.lower_elementwise import lower_node, lower_region
from mlec.backends.tvm.lower_rows import lower_rows
from mlec.backends.tvm.lowering import Lowering, Tensor, constant, needed_extents
from mlec.backends.tvm.region import Dims, Known, Load, Number, Region, Source, is_elementwise, is_injective
from mlec.backends.tvm.registry import BOTH, find, lowering_of, lowers
from mlec.backends.tvm.scalar import TVM_NAMES
from mlec.errors import UnsupportedOpError
from mlec.ir.builder import GraphBuilder
from mlec.ir.dim import Dim, symbols_of
from mlec.ir.graph import Graph, Node, Value
from mlec.ir.op import Trait, attr_symbols, substitute_attrs
from mlec.ir.types import TensorType


@dataclass(frozen=True)
class Tail:
    """Elementwise nodes that follow an anchor and work on each element of its result.

    Attributes:
        anchor: the anchor's result.
        output: the last node's result; the anchor's own if there are no nodes.
        nodes: in order.
        inputs: what other values the nodes read are.
    """

    anchor: Value
    output: Value
    nodes: tuple[Node, ...] = ()
    inputs: Mapping[Value, Tensor] = field(default_factory=dict)

    @property
    def type(self) -> TensorType:
        """Type of the kernel's result."""
        return self.output.type

    def operands(self, lowering: Lowering) -> tuple[Tensor, ...]:
        """The tensors that the epilogue reads, in the order of its inputs."""
        return _read_tensors(lowering, self.inputs)

    def epilogue(self, lowering: Lowering, dims: Dims) -> Epilogue:
        """The same as the templates take it."""
        if not self.nodes:
            return IDENTITY
        operands = self.operands(lowering)
        producers = {v: n for n in self.nodes for v in n.outputs}

        def apply(accumulator: Expr, indices: tuple[Expr, ...], extra: tuple[Buffer, ...]) -> Expr:
            position, lanes = (
                _scalar_position(indices, lanes_of(accumulator)) if operands else ((), Lanes(lanes_of(accumulator)))
            )
            known = Known(share(cast_to(TVM_NAMES[self.anchor.type.dtype], accumulator)))
            sources = {self.anchor: known, **_sources(lowering, dims, self.inputs, operands, extra)}
            if not operands:  # some templates do not compute indices that nobody needs
                return Region(producers, sources, dims, lanes, aligned=True).at(self.output, ())
            return Region(producers, sources, dims, lanes).operand(self.output, position)

        specs = tuple(lowering.spec(t, dims) for t in operands)
        return Epilogue(specs, apply, TVM_NAMES[self.type.dtype])

    def is_flat(self, axes: int) -> bool:
        """Whether the last so many axes can be taken as one whose indices are those of the last, in row 0 of the others: each value that
        is read has all of them, or none. (What has an extent of 1 last is read at index 0 there.)
        """
        whole = self.anchor.type.shape[-axes:]
        if whole[-1] == 1 and set(whole) != {1}:
            return not self.nodes
        values = {self.output, *(v for n in self.nodes for v in n.inputs)}
        return all(v.type.shape[-axes:] == whole or set(v.type.shape[-axes:]) <= {1} for v in values)

    def apply(self, lowering: Lowering, node: Node, anchor: Tensor) -> Tensor:
        """The tail as a kernel of its own, after one that takes no epilogue."""
        if not self.nodes:
            return anchor
        return lower_region(lowering, node, self.nodes, {self.anchor: anchor, **self.inputs}, self.output)

    def __str__(self) -> str:
        return f", then {' '.join(n.name for n in self.nodes)}" if self.nodes else ""


def _scalar_position(indices: tuple[Expr, ...], count: int) -> tuple[tuple[Expr, ...], Lanes]:
    """Index of the first lane, and the lanes."""
    if count == 1:
        return indices, Lanes()
    *rest, last = indices
    base = T.bind(tirx.Cast("int64", last.base if isinstance(last, tirx.Ramp) else last))
    return (*rest, base), Lanes(count, base)


@dataclass(frozen=True)
class Head:
    """Elementwise nodes before an anchor, evaluated as it reads its operand.

    Attributes:
        output: the anchor's operand.
        nodes: in order.
        inputs: what the values that no node makes are.
    """

    output: Value
    nodes: tuple[Node, ...]
    inputs: Mapping[Value, Tensor]

    def operands(self, lowering: Lowering) -> tuple[Tensor, ...]:
        """The tensors that the prologue reads, in the order of its inputs."""
        return _read_tensors(lowering, self.inputs)

    def prologue(self, lowering: Lowering, dims: Dims) -> Prologue:
        """The same as the templates take it."""
        operands = self.operands(lowering)
        producers = {v: n for n in self.nodes for v in n.outputs}

        def value(indices: tuple[Expr, ...], width: int, inputs: tuple[Buffer, ...]) -> Expr:
            position, lanes = _scalar_position(indices, width)
            sources = _sources(lowering, dims, self.inputs, operands, inputs)
            return Region(producers, sources, dims, lanes).at(self.output, position)

        return Prologue(tuple(lowering.spec(t, dims) for t in operands), value)

    def has_vectors(self, lowering: Lowering) -> bool:
        """Whether neighbours of the operand can be computed together, by nothing but their indices and the extents of what is read."""
        if all(map(_vectorises, self.nodes)):
            return True
        used = frozenset().union(*(v.type.symbols | attr_symbols(n.attrs) for n in self.nodes for v in n.outputs))
        if needed_extents([t.type for t in self.operands(lowering)], used):
            return False
        prologue = self.prologue(lowering, Dims())
        with prim_func("probe"):
            buffers = tuple(parameter(f"x{i}", spec) for i, spec in enumerate(prologue.inputs))
            indices = tuple(tirx.Var(f"i{axis}", "int64") for axis in range(self.output.type.rank))
            try:
                prologue.value(indices, 2, buffers)
            except NotContiguousError:
                return False
        return True

    def __str__(self) -> str:
        return " ".join(n.name for n in self.nodes)


def _read_tensors(lowering: Lowering, inputs: Mapping[Value, Tensor]) -> tuple[Tensor, ...]:
    return tuple(dict.fromkeys(lowering.in_memory(t) for t in inputs.values() if t.number is None))


def _sources(
    lowering: Lowering,
    dims: Dims,
    inputs: Mapping[Value, Tensor],
    operands: tuple[Tensor, ...],
    buffers: tuple[Buffer, ...],
) -> dict[Value, Source]:
    """The inputs of a region inside a kernel whose parameters ``buffers`` hold the ``operands``."""
    sources: dict[Value, Source] = {}
    for value, tensor in inputs.items():
        if tensor.number is not None:
            sources[value] = Number(tensor.number, tensor.type.dtype)
            continue
        shape = dims.shape(value.type.shape)
        buffer = buffers[operands.index(lowering.in_memory(tensor))]
        sources[value] = Load.of(
            flat_view(buffer, (product(shape),), memory_type(tensor.dtype)), shape, tensor.type.dtype
        )
    return sources


def lower_alone(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One node by the rule that comes first.

    Raises:
        UnsupportedOpError: there is none.
    """
    entry = lowering_of(node.name, lowering.device)
    if entry is None:
        raise UnsupportedOpError(
            f"the tvm backend has no lowering of {node.name} for {lowering.device}",
            loc=node.loc,
            hint="`mlec ops` lists what each backend has",
        )
    if entry.form == "template":
        results = entry.rule(lowering, node, operands)
    elif entry.form == "anchor":
        results = entry.rule(lowering, node, operands, Tail(node.output, node.output))
    elif entry.form == "graph":
        results = lower_decomposed(lowering, node, operands)
    else:
        results = lower_node(lowering, node, operands)
    return (results,) if isinstance(results, Tensor) else tuple(results)


@lowers("fused", on=BOTH)
def lower_fused(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return lower_body(lowering, node, _body(node), operands)


def lower_decomposed(lowering: Lowering, node: Node, operands: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The node as the ops that it consists of."""
    return lower_body(lowering, node, decompose(node), operands)


def lower_body(lowering: Lowering, node: Node, body: Graph, operands: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One kernel for a body if it has one of the forms above, else one for each of its nodes."""
    values: dict[Value, Tensor] = dict(zip(body.inputs, operands, strict=True))
    nodes = []
    for inner in body.nodes:
        if inner.is_constant:
            values[inner.output] = constant(inner, body)
        else:
            nodes.append(inner)
    by_rows = lower_rows(lowering, node, nodes, values, body.outputs) if node.name == "fused" else None
    if by_rows is not None:
        return by_rows
    if len(body.outputs) == 1:
        (output,) = body.outputs
        if all(map(is_injective, nodes)):
            return (lower_region(lowering, node, nodes, _read(nodes, values), output),)
        if sum(not is_injective(inner) for inner in nodes) == 1:
            result = _with_anchor(lowering, node, nodes, values, output)
            if result is not None:
                return (result,)
    with lowering.noting("one of several for a fused body" if node.name == "fused" else ""):
        for inner in nodes:
            results = lowering.lower(inner, tuple(values[v] for v in inner.inputs))
            values.update(zip(inner.outputs, results, strict=True))
    return tuple(values[v] for v in body.outputs)


def _with_anchor(
    lowering: Lowering, node: Node, nodes: list[Node], values: Mapping[Value, Tensor], output: Value
) -> Tensor | None:
    """A kernel for the anchor, which takes the elementwise nodes after it if it can; None if the body has another form.

    Nodes before the anchor that it cannot evaluate itself become kernels of their own, one for each of its operands; nodes
    after it that it cannot take become one together.
    """
    (anchor,) = (inner for inner in nodes if not is_injective(inner))
    if len(anchor.outputs) != 1:
        return None
    known = dict(values)
    before, after = _split(nodes, anchor)
    head = None
    with_head, with_tail = (find(anchor.name, form, lowering.device) for form in ("prologue", "anchor"))
    first, *factors = anchor.inputs
    if with_head is not None and first not in known:
        members = _needed(before, {first}, known)
        head = Head(first, tuple(members), _read(members, known))
        head = head if head.has_vectors(lowering) else None
    for value in factors if head is not None else anchor.inputs:
        if value not in known:
            known[value] = _before_anchor(lowering, node, before, known, value)
    side = _needed(before, {v for inner in after for v in inner.inputs}, known)
    tail_nodes = (*side, *after)
    tail = Tail(anchor.output, output, tail_nodes, _read(tail_nodes, known))
    fits = all(
        _vectorises(inner) and (inner in side or inner.output.type.shape == anchor.output.type.shape)
        for inner in tail_nodes
    )
    result: Tensor | None
    if with_head is not None and head is not None:
        followed = tail if fits else Tail(anchor.output, anchor.output)
        result = with_head(lowering, anchor, head, tuple(known[v] for v in factors), followed)
        if result is not None:
            return result if fits else tail.apply(lowering, node, result)
        known[first] = _before_anchor(lowering, node, before, known, first)
    operands = tuple(known[v] for v in anchor.inputs)
    if with_tail is not None and fits:
        with lowering.followed_by(tail_nodes):
            result = with_tail(lowering, anchor, operands, tail)
        return result
    return tail.apply(lowering, node, lowering.lower(anchor, operands)[0])


def _vectorises(node: Node) -> bool:
    return is_elementwise(node) and not node.op.has(Trait.LIBRARY_CALL)


def _before_anchor(
    lowering: Lowering, node: Node, nodes: list[Node], known: Mapping[Value, Tensor], value: Value
) -> Tensor:
    """An operand of the anchor; a lone transposition stays a promise."""
    (producer,) = (inner for inner in nodes if inner.output is value)
    if all(v in known for v in producer.inputs):
        return lowering.lower(producer, tuple(known[v] for v in producer.inputs))[0]
    return lower_region(lowering, node, nodes, _read(nodes, known), value)


def _split(nodes: list[Node], anchor: Node) -> tuple[list[Node], list[Node]]:
    """The nodes that do not depend on the anchor, and those that do."""
    dependent = {anchor.output}
    before, after = [], []
    for inner in nodes:
        if inner is anchor:
            continue
        if any(v in dependent for v in inner.inputs):
            dependent.update(inner.outputs)
            after.append(inner)
        else:
            before.append(inner)
    return before, after


def _needed(before: list[Node], values: Set[Value], known: Mapping[Value, Tensor]) -> list[Node]:
    """The nodes before the anchor that these values come from, as far as they are not known otherwise."""
    wanted = set(values)
    side: list[Node] = []
    for inner in reversed(before):
        if any(v in wanted and v not in known for v in inner.outputs):
            wanted.update(inner.inputs)
            side.insert(0, inner)
    return side


def _read(nodes: Sequence[Node], values: Mapping[Value, Tensor]) -> dict[Value, Tensor]:
    return {v: values[v] for inner in nodes for v in inner.inputs if v in values}


def _body(node: Node) -> Graph:
    """The body, in the symbols of the graph around it."""
    body: Graph = node.attrs["body"]
    if all(a.type == b.type for a, b in zip(body.inputs, node.inputs, strict=True)):
        return body
    binding: dict[str, Dim] = {}
    for inner, outer in zip(body.inputs, node.inputs, strict=True):
        for declared, given in zip(inner.type.shape, outer.type.shape, strict=True):
            if not isinstance(declared, int) and str(declared) in symbols_of(declared):
                binding.setdefault(str(declared), given)
    b = GraphBuilder(body.name)
    values = {inner: b.input(inner.hint, outer.type) for inner, outer in zip(body.inputs, node.inputs, strict=True)}
    for member in body.nodes:
        if member.is_constant:
            results = b.copy_node(member)
        else:
            results = b.multi(member.op, *(values[v] for v in member.inputs), **substitute_attrs(member.attrs, binding))
        values.update(zip(member.outputs, results, strict=True))
    return b.finish([values[v] for v in body.outputs])
