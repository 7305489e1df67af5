"""lift-sequences: convolutions over sequences become convolutions over images of one row.

A sequence ``[n, c, t]`` is the image ``[n, c, 1, t]`` in the same memory. What is there for images - channel blocks, kernels for
channels each by itself, products of bf16 - is there for sequences then. What stays in channel blocks from one convolution to
the next is lifted along: elementwise ops, pools, concatenation of channels and reductions over time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mlec.ir import Graph, GraphBuilder, Location, Node, Trait, Value
from mlec.ir.op import AttrValue
from mlec.ops.windows import lifted_windows
from mlec.pipeline import Pass, PassContext, PassResult, Remark, Tolerance, ulp

RULE = "lift-sequences"
WINDOWS = frozenset({"max_pool", "avg_pool"})
REDUCTIONS = frozenset({"mean", "sum", "max", "min"})


@dataclass(frozen=True)
class LiftSequences(Pass):
    """Convolutions over sequences of a known length, with constant weights, become those over images of one row."""

    name: ClassVar[str] = RULE
    preserves: ClassVar[Tolerance] = ulp(16)  # a sum over two axes may be taken in another order

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        return _Lift(graph).run()


@dataclass
class _Lift:
    """The new graph, built in ``b``. ``images`` holds the values of the old one, ``[n, c, t]``, that exist as ``[n, c, 1, t]``."""

    graph: Graph
    b: GraphBuilder = field(init=False)
    images: dict[Value, Value] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)
    _as_given: set[Value] = field(default_factory=set)  # values that exist as [n, c, t]

    def run(self) -> PassResult:
        self.b = GraphBuilder(self.graph.name)
        self.b.adopt_interface(self.graph)
        self._as_given.update(self.graph.inputs)
        for node in self.graph.nodes:
            with self.b.at(Location.merged((node.loc,), RULE)):
                if not self.convolution(node) and not self.follower(node):
                    for value in node.inputs:
                        self.restore(value)
                    self.b.keep(node)
                    self._as_given.update(node.outputs)
        for value in self.graph.outputs:
            self.restore(value)
        if not self.remarks:
            return PassResult(self.graph)
        return PassResult(self.b.finish(self.graph.outputs, signature=self.graph.given_signature), tuple(self.remarks))

    def convolution(self, node: Node) -> bool:
        """conv(x [n, c, t], w [k, c / groups, r]) -> conv(x [n, c, 1, t], w [k, c / groups, 1, r])"""
        if node.name != "conv" or node.output.type.rank != 3:
            return False
        x, w = node.inputs
        weights, length = self.graph.constant_value(w), x.type.shape[2]
        if weights is None or not isinstance(length, int):
            return False
        rows = self.b.constant(weights[:, :, None], w.hint)
        self.lift(node, self.lifted(x), rows, **lifted_windows(node.attrs))
        self.remarks.append(Remark("applied", f"a sequence of {length} is an image of one row", node.loc, RULE))
        return True

    def follower(self, node: Node) -> bool:
        """What works on the image of a sequence as it does on the sequence."""
        if not any(value in self.images and value.type.rank == 3 for value in node.inputs):
            return False
        if node.op.has(Trait.ELEMENTWISE):
            return self.elementwise(node)
        if node.name in WINDOWS and len(node.attrs["kernel"]) == 1:
            self.lift(node, self.lifted(node.inputs[0]), **lifted_windows(node.attrs))
            return True
        if node.name == "concat" and node.attrs["axis"] % 3 == 1:
            self.lift(node, *map(self.lifted, node.inputs), axis=1)
            return True
        if node.name in REDUCTIONS and [axis % 3 for axis in node.attrs["axes"]] == [2]:
            return self.reduction(node)
        return False

    def elementwise(self, node: Node) -> bool:
        """Where a lifted operand has the shape of the result: then the others are broadcast along its axes."""
        if not any(value in self.images and value.type.shape == node.output.type.shape for value in node.inputs):
            return False
        self.lift(node, *map(self.lifted, node.inputs), **node.attrs)
        return True

    def reduction(self, node: Node) -> bool:
        keep = node.attrs["keepdims"]
        reduced = self.b(node.op, self.lifted(node.inputs[0]), hint=node.output.hint, axes=(2, 3), keepdims=keep)
        if keep:
            self.images[node.output] = reduced
        else:
            self.b.replace(node.output, reduced)
            self._as_given.add(node.output)
        return True

    def lift(self, node: Node, *operands: Value, **attrs: AttrValue) -> None:
        self.images[node.output] = self.b(node.op, *operands, hint=node.output.hint, **attrs)

    def lifted(self, value: Value) -> Value:
        """The value with an axis of extent 1 before its last one, where it has more than that."""
        if value.type.rank < 2:
            return value
        if value not in self.images:
            *outer, last = value.type.shape
            constant = self.graph.constant_value(value)
            self.images[value] = (
                self.b("reshape", value, shape=(*outer, 1, last), hint=value.hint)
                if constant is None
                else self.b.constant(constant[..., None, :], value.hint)
            )
        return self.images[value]

    def restore(self, value: Value) -> None:
        """Makes sure that the value exists as the graph had it."""
        if value not in self._as_given:
            self._as_given.add(value)
            self.b.replace(value, self.b("reshape", self.images[value], shape=value.type.shape, hint=value.hint))
