"""The graph: immutable, typed, in static single assignment form.

    Graph ::= name, inputs: Value*, nodes: Node* (topological), outputs: Value*, constants: name -> array, signature
    Node  ::= op, inputs: Value*, outputs: Value* (bound here and nowhere else), attrs, loc
    Value ::= type, hint

Values and nodes compare by identity. A rewrite builds new nodes and a new graph; the old graph stays what it was, so that
before and after can be printed, compared and run against each other.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

import numpy as np

from mlec.ir.dim import Dim, symbols_of
from mlec.ir.op import Array, Attrs, ConstantRef, Cost, OpDef, attr_symbols
from mlec.ir.types import UNKNOWN, Location, TensorType
from mlec.signature import Signature, TensorSpec


@dataclass(frozen=True, eq=False, slots=True)
class Value:
    """The result of a node, or an input of the graph. ``hint`` is the name that the printer tries first."""

    type: TensorType
    hint: str = ""

    def __repr__(self) -> str:
        return f"<%{self.hint or '?'}: {self.type}>"


@dataclass(frozen=True, eq=False, slots=True)
class Node:
    """One application of an op."""

    op: OpDef
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    attrs: Attrs = field(default_factory=dict)
    loc: Location = UNKNOWN

    def __post_init__(self) -> None:
        object.__setattr__(self, "attrs", MappingProxyType(dict(self.attrs)))

    @property
    def output(self) -> Value:
        """The only output; an assertion error for an op with several."""
        (value,) = self.outputs
        return value

    @property
    def name(self) -> str:
        """Name of the op."""
        return self.op.name

    @property
    def cost(self) -> Cost:
        return self.op.cost([v.type for v in self.inputs], [v.type for v in self.outputs], self.attrs)

    @property
    def is_constant(self) -> bool:
        return self.op.name == "constant"

    def __repr__(self) -> str:
        return f"<{self.op.name} {list(self.outputs)}>"


def _frozen_array(array: Array) -> Array:
    """The same elements, C-ordered and read-only; the same object when it is so already."""
    if array.flags.c_contiguous and not array.flags.writeable:
        return array
    frozen = np.array(array, order="C", copy=None).view()
    frozen.flags.writeable = False
    return frozen


@dataclass(frozen=True, eq=False)
class Graph:
    """A whole model, or the body of a fused op.

    Attributes:
        name: an identifier for the printer.
        inputs, outputs: the interface; an output may be an input, and may occur twice.
        nodes: in topological order.
        constants: the arrays that ``constant`` nodes refer to; read-only.
        signature: how the model looks from outside; derived from inputs and outputs when not given.
    """

    name: str
    inputs: tuple[Value, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Value, ...]
    constants: Mapping[str, Array] = field(default_factory=dict)
    given_signature: Signature | None = None

    def __post_init__(self) -> None:
        frozen = {name: _frozen_array(array) for name, array in self.constants.items()}
        object.__setattr__(self, "constants", MappingProxyType(frozen))

    # -- derived facts -------------------------------------------------------------------------------------------

    @cached_property
    def producer(self) -> Mapping[Value, Node]:
        """The node that binds a value; graph inputs are not in it."""
        return {value: node for node in self.nodes for value in node.outputs}

    @cached_property
    def users(self) -> Mapping[Value, tuple[Node, ...]]:
        """The nodes that read a value, each once; graph outputs are counted by `use_count` only."""
        found: dict[Value, dict[Node, None]] = {}
        for node in self.nodes:
            for value in node.inputs:
                found.setdefault(value, {})[node] = None
        return {value: tuple(nodes) for value, nodes in found.items()}

    @cached_property
    def _uses(self) -> Counter[Value]:
        uses: Counter[Value] = Counter(self.outputs)
        for node in self.nodes:
            uses.update(node.inputs)
        return uses

    def use_count(self, value: Value) -> int:
        """Uses as an operand, plus uses as an output of the graph."""
        return self._uses[value]

    def constant_value(self, value: Value) -> Array | None:
        """The array of a value bound by a ``constant`` node, else None."""
        node = self.producer.get(value)
        return None if node is None or not node.is_constant else constant_array(node, self.constants)

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        """Names of the symbolic dims, in order of appearance."""
        names: dict[str, None] = {}
        for value in (*self.inputs, *(v for node in self.nodes for v in node.outputs)):
            for d in value.type.shape:
                names.update(dict.fromkeys(sorted(symbols_of(d))))
        for node in self.nodes:
            names.update(dict.fromkeys(sorted(attr_symbols(node.attrs))))
        return tuple(names)

    @cached_property
    def cost(self) -> Cost:
        """Sum over the nodes; constants cost nothing by themselves."""
        flops: Dim = 0
        moved: Dim = 0
        for node in self.nodes:
            if not node.is_constant:
                cost = node.cost
                flops, moved = flops + cost.flops, moved + cost.bytes
        return Cost(flops, moved)

    @property
    def compute_nodes(self) -> tuple[Node, ...]:
        """The nodes that are not constants."""
        return tuple(node for node in self.nodes if not node.is_constant)

    @cached_property
    def signature(self) -> Signature:
        if self.given_signature is not None:
            return self.given_signature
        return Signature(inputs=_specs(self.inputs, "x"), outputs=_specs(self.outputs, "y"))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the text and the constants: equal for structurally equal graphs."""
        from mlec.ir.printer import print_graph

        state = hashlib.sha256(print_graph(self, locations=False).encode())
        for name in sorted(self.constants):
            array = self.constants[name]
            state.update(f"{name}:{array.dtype}:{array.shape}".encode())
            state.update(array.tobytes())
        return state.hexdigest()

    # -- changed copies ------------------------------------------------------------------------------------------

    def with_signature(self, signature: Signature) -> Graph:
        return replace(self, given_signature=signature)

    def __str__(self) -> str:
        from mlec.ir.printer import print_graph

        return print_graph(self)

    __repr__ = __str__


def _specs(values: Iterable[Value], prefix: str) -> tuple[TensorSpec, ...]:
    specs: list[TensorSpec] = []
    taken: set[str] = set()
    for i, value in enumerate(values):
        name = value.hint or f"{prefix}{i}"
        if name in taken:
            name = f"{name}_{i}"
        taken.add(name)
        shape = tuple(d if isinstance(d, int) else str(d) for d in value.type.shape)
        specs.append(TensorSpec(name=name, dtype=value.type.dtype.value, shape=shape))
    return tuple(specs)


def constant_array(node: Node, constants: Mapping[str, Array]) -> Array:
    """The array of a ``constant`` node: the named one, or the number spread over the node's type."""
    value = node.attrs["value"]
    if isinstance(value, ConstantRef):
        return constants[value.name]
    result_type = node.output.type
    shape = tuple(d for d in result_type.shape if isinstance(d, int))
    return _frozen_array(np.full(shape, value, dtype=result_type.dtype.numpy))


__all__ = ["Graph", "Node", "Value", "constant_array"]
