"""Builds graphs: the one place where nodes are made, typed and located."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager

import msgspec
import numpy as np

from mlec.errors import TypeRuleError, VerifyError
from mlec.ir.dim_trace import origins
from mlec.ir.dtype import DType
from mlec.ir.graph import Graph, Node, Value
from mlec.ir.op import Array, AttrValue, ConstantRef, OpDef, lookup
from mlec.ir.types import UNKNOWN, Location, TensorType
from mlec.signature import Signature

Number = bool | int | float


class GraphBuilder:
    """Collects nodes and freezes them into a `Graph`.

    ```python
    b = GraphBuilder("mlp")
    x = b.input("x", tensor("f32", ("n", 8)))
    h = b("relu", b("matmul", x, b.constant(w)))
    graph = b.finish([h])
    ```
    A Python number as operand becomes a scalar constant of the dtype of the first operand that is a `Value`.
    Values that were replaced (see `replace`) are looked up when they are used.

    Args:
        name: of the graph.
        taken: names that new constants must not get.
    """

    def __init__(self, name: str = "main", taken: Container[str] = ()) -> None:
        self.name = name
        self._taken = taken
        self._inputs: list[Value] = []
        self._nodes: list[Node] = []
        self._constants: dict[str, Array] = {}
        self._names_by_id: dict[int, str] = {}
        self._name_counts: Counter[str] = Counter()
        self._scalars: dict[tuple[DType, str], Value] = {}
        self._replaced: dict[Value, Value] = {}
        self._location: Location = UNKNOWN

    # -- interface -----------------------------------------------------------------------------------------------

    def input(self, name: str, type: TensorType) -> Value:
        """Adds a graph input."""
        value = Value(type, name)
        self._inputs.append(value)
        return value

    @contextmanager
    def at(self, location: Location) -> Iterator[None]:
        """Nodes made inside the block carry this location."""
        previous, self._location = self._location, location
        try:
            yield
        finally:
            self._location = previous

    def constant(self, array: Array | Number, hint: str = "", dtype: DType | None = None) -> Value:
        """A constant tensor; a scalar (rank 0) is written into the text, an array is kept by name.

        An array object that was passed before yields a constant that shares its storage.
        """
        data = np.asarray(array) if dtype is None else np.asarray(array, dtype=dtype.numpy)
        kind = DType.of(data.dtype)
        result_type = TensorType(data.shape, kind)
        if data.ndim == 0:
            key = (kind, repr(data.item()))
            if key not in self._scalars:
                self._scalars[key] = self._add(lookup("constant"), (), {"value": data.item()}, (result_type,), (hint,))[
                    0
                ]
            return self._scalars[key]
        name = self._names_by_id.get(id(array))
        if name is None:
            name = self._free_name(hint or "c")
            self._constants[name] = data
            if data is array:
                self._names_by_id[id(array)] = name
        attrs = {"value": ConstantRef(name)}
        return self._add(lookup("constant"), (), attrs, (result_type,), (hint or name,))[0]

    def __call__(self, op: str | OpDef, *operands: Value | Number, hint: str = "", **attrs: AttrValue) -> Value:
        """Adds a node of an op with one result and returns it.

        Raises:
            TypeRuleError: when the type rule refuses the operands or the attributes.
        """
        results = self.multi(op, *operands, hints=(hint,), **attrs)
        if len(results) != 1:
            raise TypeRuleError(
                f"{op} has {len(results)} results; use multi()", code="E_ARITY", hint="multi() gives all of them"
            )
        return results[0]

    def multi(
        self, op: str | OpDef, *operands: Value | Number, hints: Sequence[str] = (), **attrs: AttrValue
    ) -> tuple[Value, ...]:
        """Adds a node and returns all its results."""
        definition = lookup(op) if isinstance(op, str) else op
        values = self._values(operands)
        try:
            complete = definition.complete_attrs(attrs)
            types = definition.result_types([v.type for v in values], complete)
        except TypeRuleError as error:
            if error.loc is None and self._location:
                error.loc = self._location
            error.notes += origins(error, values, {v: node for node in self._nodes for v in node.outputs})
            raise
        return self._add(definition, values, complete, types, hints)

    def copy_node(self, node: Node, inputs: Sequence[Value] | None = None) -> tuple[Value, ...]:
        """Adds the same op again on other (or replaced) inputs, with its location; result types are inferred anew."""
        values = self._values(node.inputs if inputs is None else inputs)
        stated = tuple(v.type for v in node.outputs)
        types = stated if node.is_constant else node.op.result_types([v.type for v in values], node.attrs)
        return self._add(node.op, values, node.attrs, types, [v.hint for v in node.outputs], node.loc)

    def adopt_constants(self, constants: Mapping[str, Array]) -> None:
        """Takes over the constants of a graph whose nodes are copied into this one."""
        for name, array in constants.items():
            if name in self._constants and self._constants[name] is not array:
                raise VerifyError(
                    f"two constants are named {name!r}", code="E_CONSTANT", hint="give each constant a name of its own"
                )
            self._constants[name] = array
            self._names_by_id[id(array)] = name

    def adopt_interface(self, graph: Graph) -> None:
        """Starts a changed copy of a graph: the same inputs (the very same values) and constants."""
        self._inputs = list(graph.inputs)
        self.adopt_constants(graph.constants)

    def keep(self, node: Node) -> None:
        """Takes a node over: the very same node if its operands are unchanged, else a copy on the new operands."""
        if all(self.resolve(v) is v for v in node.inputs):
            self._nodes.append(node)
        else:
            for old, new in zip(node.outputs, self.copy_node(node), strict=True):
                self.replace(old, new)

    def replace(self, old: Value, new: Value) -> None:
        """From now on, ``old`` as an operand means ``new``."""
        new = self.resolve(new)
        if old is not new:
            self._replaced[old] = new

    def resolve(self, value: Value) -> Value:
        """What a value means here, after all replacements."""
        while value in self._replaced:
            value = self._replaced[value]
        return value

    def finish(self, outputs: Sequence[Value], *, signature: Signature | None = None) -> Graph:
        """Freezes: drops the nodes and constants that no output needs."""
        results = tuple(self.resolve(v) for v in outputs)
        needed = set(results)
        kept: list[Node] = []
        for node in reversed(self._nodes):
            if any(v in needed for v in node.outputs):
                kept.append(node)
                needed.update(node.inputs)
        kept.reverse()
        used = {n.attrs["value"].name for n in kept if n.is_constant and isinstance(n.attrs["value"], ConstantRef)}
        constants = {name: array for name, array in self._constants.items() if name in used}
        return Graph(self.name, tuple(self._inputs), tuple(kept), results, constants, signature)

    # -- helpers -------------------------------------------------------------------------------------------------

    def _values(self, operands: Sequence[Value | Number]) -> tuple[Value, ...]:
        dtype = next((o.type.dtype for o in operands if isinstance(o, Value)), None)
        return tuple(self.resolve(o) if isinstance(o, Value) else self.constant(o, dtype=dtype) for o in operands)

    def _add(
        self,
        op: OpDef,
        inputs: tuple[Value, ...],
        attrs: Mapping[str, AttrValue],
        types: Sequence[TensorType],
        hints: Sequence[str],
        location: Location | None = None,
    ) -> tuple[Value, ...]:
        names = [*hints, *[""] * (len(types) - len(hints))]
        outputs = tuple(Value(t, h) for t, h in zip(types, names, strict=False))
        self._nodes.append(Node(op, inputs, outputs, attrs, self._location if location is None else location))
        return outputs

    def _free_name(self, wanted: str) -> str:
        base = re.sub(r"\W", "_", wanted)
        if base[:1].isdigit():
            base = f"_{base}"
        name = base
        while (
            name in self._constants or name in self._taken
        ):  # goes on where it was for this base: those before are taken
            name = f"{base}_{self._name_counts[base]}"
            self._name_counts[base] += 1
        return name


def extract(graph: Graph, inputs: Sequence[Value], outputs: Sequence[Value], name: str) -> Graph:
    """What computes some values of a graph from some others, as a graph of its own, within the same limits of its symbols.

    Args:
        graph: where it is taken from.
        inputs: any values of that; each is one input of the result, in this order, and what computes it is left away.
        outputs: of the result. They depend on nothing but ``inputs`` and constants.
        name: of the result.
    """
    b = GraphBuilder(name)
    b.adopt_constants(graph.constants)
    taken: set[str] = set()
    for value in inputs:
        hint = value.hint or "x"
        while hint in taken:
            hint += "_"
        taken.add(hint)
        b.replace(value, b.input(hint, value.type))
    given = set(inputs)
    needed, kept = set(outputs) - given, []
    for node in reversed(graph.nodes):
        if not needed.isdisjoint(node.outputs):
            kept.append(node)
            needed.update(value for value in node.inputs if value not in given)
    for node in reversed(kept):
        for old, new in zip(node.outputs, b.copy_node(node), strict=True):
            if old not in given:
                b.replace(old, new)
    part = b.finish(outputs)
    limits = {name: of for name, of in graph.signature.symbols.items() if name in part.symbols}
    return part.with_signature(msgspec.structs.replace(part.signature, symbols=limits)) if limits else part
