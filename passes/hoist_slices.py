"""hoist-slices: what is cut away of a result is not computed.

Where everything that reads a value reads the same part of it, only that part is made, of parts of the operands: through elementwise
ops, norms, reductions, products along rows and columns, attention along its queries, joins, pads, transposes and reshapes. A classifier
that looks at the first of many positions then computes the end of its last layer for that one. A convolution whose last positions are
cut away, as those that look at the past only are written, has less padding instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from mlec.ir import Dim, Graph, GraphBuilder, Location, Node, Trait, Value
from mlec.ir.dim import product
from mlec.ir.types import Shape
from mlec.ops.windows import Geometry
from mlec.pipeline import Pass, PassContext, PassResult, Remark, Tolerance, ulp

RULE = "hoist-slices"


@dataclass(frozen=True)
class HoistSlices(Pass):
    """Computes no more of a value than the one part that is read."""

    name: ClassVar[str] = RULE
    before: ClassVar[str] = "layout"
    preserves: ClassVar[Tolerance] = ulp(16)  # a library may sum in another order for another number of rows

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        wanted = _wanted(graph)
        smaller = [n for n in graph.nodes if len(n.outputs) == 1 and _ways(n, wanted.get(n.output)) is not None]
        remarks = tuple(
            Remark("applied", f"{n.name} computes {wanted[n.output]} of {n.output.type} only", n.loc, RULE)
            for n in smaller
            if n.op.has(Trait.CONTRACTION | Trait.NORMALISATION | Trait.REDUCTION | Trait.ELEMENTWISE)
        )
        remarks += tuple(_missed(graph, wanted))
        return PassResult(_Rewrite(graph, wanted).run() if smaller else graph, remarks)


@dataclass(frozen=True)
class _Part:
    """The elements ``start, start + step ..`` below ``stop`` along an axis (counted from the front)."""

    axis: int
    start: Dim
    stop: Dim
    step: int

    @staticmethod
    def of(node: Node) -> _Part:
        attrs = node.attrs
        return _Part(attrs["axis"] % node.output.type.rank, attrs["start"], attrs["stop"], attrs["step"])

    def along(self, axis: int) -> _Part:
        return _Part(axis, self.start, self.stop, self.step)

    def __str__(self) -> str:
        step = "" if self.step == 1 else f":{self.step}"
        return f"[{self.start}:{self.stop}{step}] on axis {self.axis}"


def _wanted(graph: Graph) -> dict[Value, _Part | None]:
    """What is read of each value: the one part, or None for all of it or different parts."""
    wanted: dict[Value, _Part | None] = dict.fromkeys(graph.outputs)

    def want(value: Value, part: _Part | None) -> None:
        if wanted.setdefault(value, part) != part:
            wanted[value] = None

    for node in reversed(graph.nodes):
        if node.name == "slice" and node.inputs[0].type != node.output.type:
            want(node.inputs[0], _Part.of(node))
            continue
        ways = _ways(node, wanted.get(node.output)) if len(node.outputs) == 1 else None
        for place, value in enumerate(node.inputs):
            axis = ways.get(place) if ways is not None else None
            part = wanted[node.output] if axis is not None else None
            want(value, None if part is None or axis is None else part.along(axis))
    return wanted


Ways = Mapping[int, int]
"""Which operands are cut, by position, and along which of their axes."""


def _ways(node: Node, part: _Part | None) -> Ways | None:
    """How a part of a node's result is made of parts of its operands; None where it is not."""
    if part is None or node.output.type.shape[part.axis] == 1:
        return None
    rank, axis = node.output.type.rank, part.axis
    if node.op.has(Trait.ELEMENTWISE):
        return _broadcasting(node, axis, range(len(node.inputs)))
    if node.name in ("layer_norm", "rms_norm"):
        return {0: axis} if axis < node.attrs["axis"] % rank else None
    if node.name in ("softmax", "log_softmax"):
        return {0: axis} if axis != node.attrs["axis"] % rank else None
    if node.name == "group_norm":
        return {0: 0} if axis == 0 else None
    if node.name == "transpose":
        return {0: node.attrs["perm"][axis]}
    if node.name == "reshape":
        own = _same_axis(node.inputs[0].type.shape, node.output.type.shape, axis)
        return None if own is None else {0: own}
    if node.name == "matmul" and min(v.type.rank for v in node.inputs) >= 2:
        # Rows are those of the first operand, columns those of the second, and matrices those of both.
        return _broadcasting(node, axis, {rank - 2: (0,), rank - 1: (1,)}.get(axis, (0, 1)))
    if node.name == "attention" and axis < rank - 1 and not node.attrs["causal"]:
        masks = range(3, len(node.inputs))
        return _broadcasting(node, axis, (0, *masks) if axis == rank - 2 else (0, 1, 2, *masks))
    if node.name == "concat":
        return dict.fromkeys(range(len(node.inputs)), axis) if axis != node.attrs["axis"] % rank else None
    if node.name == "pad":
        return {0: axis} if not node.attrs["before"][axis] and not node.attrs["after"][axis] else None
    if node.op.has(Trait.REDUCTION) and "axes" in node.attrs:
        gone = {a % node.inputs[0].type.rank for a in node.attrs["axes"]}
        left = [a for a in range(node.inputs[0].type.rank) if node.attrs["keepdims"] or a not in gone]
        return {0: left[axis]} if left[axis] not in gone else None
    if node.name == "conv" and _less_padding(node, part) is not None:
        return {}
    return None


def _less_padding(node: Node, part: _Part) -> tuple[int, ...] | None:
    """The padding with which a convolution has the positions of a part only; None where that takes more than less of it."""
    rank, axis = node.output.type.rank - 2, part.axis - 2
    if axis < 0 or part.step != 1:
        return None
    geometry, end = Geometry.of(node.attrs, rank), node.output.type.shape[part.axis] - part.stop
    if not isinstance(part.start, int) or not isinstance(end, int):
        return None
    pads = list(geometry.pads)
    pads[axis] -= part.start * geometry.strides[axis]
    pads[rank + axis] -= end * geometry.strides[axis]
    return tuple(pads) if min(pads) >= 0 else None


def _broadcasting(node: Node, axis: int, places: range | tuple[int, ...]) -> Ways:
    """Those of the operands that have an axis of the result, counted from the end, rather than repeat themselves along it."""
    back, extent = axis - node.output.type.rank, node.output.type.shape[axis]
    shapes = {place: node.inputs[place].type.shape for place in places if place < len(node.inputs)}
    return {p: len(s) + back for p, s in shapes.items() if len(s) + back >= 0 and s[back] == extent != 1}


def _same_axis(before: Shape, after: Shape, axis: int) -> int | None:
    """The axis that a reshape leaves as it is; None if it splits or merges it."""
    for own, extent in enumerate(before):
        if extent == after[axis] and product(before[:own]) == product(after[:axis]):
            return own
    return None


def _missed(graph: Graph, wanted: Mapping[Value, _Part | None]) -> list[Remark]:
    """Products that are cut, but also read whole or in other parts."""
    found: list[Remark] = []
    for node in graph.nodes:
        if not node.op.has(Trait.CONTRACTION) or len(node.outputs) != 1 or wanted.get(node.output) is not None:
            continue
        cuts = [user for user in graph.users.get(node.output, ()) if user.name == "slice"]
        if len(cuts) == 1 and graph.use_count(node.output) > 1:
            message = f"{node.name} is computed whole: more of it is read than {_Part.of(cuts[0])}"
            found.append(Remark("missed", message, node.loc, RULE))
    return found


@dataclass
class _Rewrite:
    """The graph with parts in the place of the values of which only they are wanted."""

    graph: Graph
    wanted: Mapping[Value, _Part | None]
    b: GraphBuilder = field(init=False)
    parts: dict[tuple[Value, _Part], Value] = field(default_factory=dict)

    def run(self) -> Graph:
        self.b = GraphBuilder(self.graph.name)
        self.b.adopt_interface(self.graph)
        for node in self.graph.nodes:
            part = self.wanted.get(node.output) if len(node.outputs) == 1 else None
            ways = _ways(node, part)
            with self.b.at(Location.merged((node.loc,), RULE)):
                if ways is not None and part is not None:
                    self.parts[node.output, part] = self.made(node, ways, part)
                elif node.name == "slice" and (node.inputs[0], _Part.of(node)) in self.parts:
                    self.b.replace(node.output, self.parts[node.inputs[0], _Part.of(node)])
                else:
                    self.b.keep(node)
        return self.b.finish(self.graph.outputs, signature=self.graph.given_signature)

    def made(self, node: Node, ways: Ways, part: _Part) -> Value:
        """The part of a node's result."""
        operands = [self.cut(v, part.along(ways[p])) if p in ways else v for p, v in enumerate(node.inputs)]
        attrs = dict(node.attrs)
        if node.name == "reshape":
            shape = list(node.output.type.shape)
            shape[part.axis] = operands[0].type.shape[ways[0]]
            attrs["shape"] = tuple(shape)
        if node.name == "conv":
            attrs["pads"] = _less_padding(node, part)
        return self.b(node.op, *operands, hint=node.output.hint, **attrs)

    def cut(self, value: Value, part: _Part) -> Value:
        """The part of a value, which may be made as such."""
        if (value, part) not in self.parts:
            array = self.graph.constant_value(value)
            if array is not None and isinstance(part.start, int) and isinstance(part.stop, int):
                picked = array.take(range(array.shape[part.axis])[part.start : part.stop : part.step], part.axis)
                self.parts[value, part] = self.b.constant(np.ascontiguousarray(picked), value.hint)
            else:
                attrs = {"axis": part.axis, "start": part.start, "stop": part.stop, "step": part.step}
                self.parts[value, part] = self.b("slice", value, hint=value.hint, **attrs)
        return self.parts[value, part]


__all__ = ["HoistSlices"]
