"""sink-transposes: carry transposes down the graph until they meet their inverse.

A value that is a transposed one stays a *view* of it (`_View`) through every op that works as well on the other order of axes:
elementwise ops, products with a matrix on the last axis, norms of the last axes, reductions, slices, reshapes and other
transposes. Where a view becomes plain again, a transpose and its inverse are gone. Where an op needs its own order, the view is
put into memory there. Each transpose is tried by itself, and the change is kept only if it leaves fewer bytes to be moved.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from mlec.ir import Dim, Graph, GraphBuilder, Location, Node, Trait, Value
from mlec.ir.dim import divide_exact, static_dims
from mlec.ir.printer import print_node, value_names
from mlec.ir.types import Shape, TensorType
from mlec.passes.fold_batch_norm import affine
from mlec.pipeline import Pass, PassContext, PassResult, Remark, Tolerance, approx, nominal
from mlec.wording import plural

RULE = "sink-transposes"
MAX_SWEEPS = 8


@dataclass(frozen=True)
class SinkTransposes(Pass):
    """Moves transposes through ops that do not mind the order of axes, where that makes some of them cancel."""

    name: ClassVar[str] = "sink-transposes"
    preserves: ClassVar[Tolerance] = approx(
        2e-5, roundings=8
    )  # as `fold-batch-norm`; a sum over several axes is taken in their new order

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        remarks: list[Remark] = []
        for _ in range(MAX_SWEEPS):
            before, position = graph, 0
            missed: list[Remark] = []
            while position < len(graph.nodes):
                node = graph.nodes[position]
                if node.name == "transpose" and _may_sink(graph, node):
                    plan = _Walk(graph, node, GraphBuilder("plan"))
                    plan.affected()
                    if plan.gain > (0, 0):
                        remarks.append(_remark("applied", plan, node, graph))
                        graph = _Walk(graph, node, GraphBuilder(graph.name)).rewritten()
                    elif plan.stopped_at and bytes_moved(graph, node):
                        missed.append(_remark("missed", plan, node, graph))
                position += 1
            if graph is before:
                break
        return PassResult(graph, (*remarks, *missed))


def _remark(kind: str, walk: _Walk, node: Node, graph: Graph) -> Remark:
    text = print_node(node, value_names(graph)).splitlines()[0]
    if kind == "applied":
        crossed = ", ".join(dict.fromkeys(walk.crossed)) or "nothing"
        return Remark("applied", f"moved through {crossed}: {_change(walk.gain[1])}, at {text}", node.loc, RULE)
    reason = f"nothing cancels before {', '.join(dict.fromkeys(walk.stopped_at))}"
    return Remark("missed", f"the transpose stays: {reason}, at {text}", node.loc, RULE)


def _change(saved: int) -> str:
    """In words, how many transposes are gone."""
    if not saved:
        return "as many transposes, of fewer bytes"
    return f"{plural(abs(saved), 'transpose')} {'fewer' if saved > 0 else 'more, of fewer bytes in all'}"


# -- views -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """A tensor whose elements are those of ``source`` in another order: ``reshape(transpose(source), shape)``.

    Attributes:
        groups: for each axis of ``shape`` the axes of ``source`` that it is made of, the slowest first. Each axis of
            the source is in exactly one group.
    """

    source: Value
    shape: Shape
    groups: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(value: Value) -> _View:
        return _View(value, value.type.shape, tuple((i,) for i in range(value.type.rank)))

    @property
    def order(self) -> tuple[int, ...]:
        return tuple(itertools.chain.from_iterable(self.groups))

    @property
    def is_plain(self) -> bool:
        """Whether it is a mere reshape of the source."""
        return _turns_nothing(self.source.type, self.order)

    def transposed(self, perm: Sequence[int]) -> _View:
        return _View(self.source, tuple(self.shape[p] for p in perm), tuple(self.groups[p] for p in perm))

    def axis(self, axis: int) -> int | None:
        """The one axis of the source that an axis is; None if it is made of several."""
        group = [a for a in self.groups[axis] if self.source.type.shape[a] != 1] or list(self.groups[axis])
        return group[0] if len(group) == 1 else None


def _turns_nothing(type: TensorType, perm: Sequence[int]) -> bool:
    moved = [p for p in perm if type.shape[p] != 1]
    return moved == sorted(moved)


def _parts(extents: Sequence[Dim], shape: Shape) -> list[list[tuple[int, Dim]]] | None:
    """How axes of some ``extents`` are cut to make up ``shape``: for each of its axes the pieces (axis, extent), the slowest first.

    None where no cut does it, as from [4, 3] to [6, 2].
    """
    if 0 in extents or 0 in shape or not shape:
        return None
    left = list(enumerate(extents))
    found: list[list[tuple[int, Dim]]] = []
    for wanted in shape:
        pieces: list[tuple[int, Dim]] = []
        need: Dim = wanted
        while need != 1:
            if not left:
                return None
            axis, extent = left.pop(0)
            rest = divide_exact(need, extent)
            if rest is not None:
                pieces.append((axis, extent))
                need = rest
                continue
            rest = divide_exact(extent, need)
            if rest is None:
                return None
            pieces.append((axis, need))
            left.insert(0, (axis, rest))
            need = 1
        found.append(pieces)
    if any(extent != 1 for _, extent in left):
        return None
    found[-1] += left
    return found


# -- the walk --------------------------------------------------------------------------------------------------------


@dataclass
class _Walk:
    """One transpose on its way down. Everything is built into ``b``; ``views`` holds the values of the graph that are views now.

    Attributes:
        gain: bytes moved and transposes carried out, less than before.
        crossed, stopped_at: names of ops that it went through, and that needed their own order.
    """

    graph: Graph
    seed: Node
    b: GraphBuilder
    views: dict[Value, _View] = field(default_factory=dict)
    gain: tuple[int, int] = (0, 0)
    crossed: list[str] = field(default_factory=list)
    stopped_at: list[str] = field(default_factory=list)
    _made: set[Value] = field(default_factory=set)

    def affected(self) -> None:
        """Follows the views only, to learn the gain."""
        place = {node: i for i, node in enumerate(self.graph.nodes)}
        waiting = [place[self.seed]]
        seen = {self.seed}
        while waiting:
            node = self.graph.nodes[heapq.heappop(waiting)]
            if self.step(node):
                for value in node.outputs:
                    if value in self.views:
                        for user in self.graph.users.get(value, ()):
                            if user not in seen:
                                seen.add(user)
                                heapq.heappush(waiting, place[user])
        for value in dict.fromkeys(self.graph.outputs):
            if value in self.views:
                self.stopped_at.append("the output")
                self.in_memory(value, False)

    def rewritten(self) -> Graph:
        """The whole graph with the transpose moved."""
        self.b.adopt_interface(self.graph)
        for node in self.graph.nodes:
            if not self.step(node):
                self.b.keep(node)
        for value in self.graph.outputs:
            if value in self.views:
                self.in_memory(value, False)
        return self.b.finish(self.graph.outputs, signature=self.graph.given_signature)

    def step(self, node: Node) -> bool:
        """Whether the node's result was built on views; if not, those that it reads are in memory now."""
        pending = [v for v in node.inputs if v in self.views]
        if not pending and node is not self.seed:
            return False
        with self.b.at(Location.merged((node.loc,), RULE)):
            view = self.through(node)
            if view is None:
                self.stopped_at.append(node.name)
                for value in dict.fromkeys(pending):
                    self.in_memory(value, _reads_strided(node, value))
                return False
            if node.name == "transpose":
                removed = bytes_moved(self.graph, node)
                self.count(removed, 1 if removed else 0)
            if node is not self.seed and node.name not in ("reshape", "transpose"):
                self.crossed.append(node.name)
            if view.is_plain and node is not self.seed:
                self.b.replace(node.output, self.reshape(view.source, view.shape))
            else:
                self.views[node.output] = view
        return True

    def count(self, moved: int, transposes: int) -> None:
        self.gain = (self.gain[0] + moved, self.gain[1] + transposes)

    def in_memory(self, value: Value, free: bool) -> None:
        """Binds a value that is a view to a tensor that holds it. ``free``: the reader takes it by strides."""
        if value in self._made:
            return
        self._made.add(value)
        self.b.replace(value, self.carried_out(self.views[value], free))

    def carried_out(self, view: _View, free: bool = False) -> Value:
        """The tensor that a view describes, transposed now."""
        extents = view.source.type.shape
        groups = [[a for a in group if extents[a] != 1] or list(group[:1]) for group in view.groups]
        kept = sorted(itertools.chain.from_iterable(groups))
        source = self.reshape(view.source, [extents[a] for a in kept])
        order = [kept.index(a) for group in groups for a in group]
        return self.reshape(self.transpose(source, order, free), view.shape)

    def transpose(self, x: Value, order: Sequence[int], free: bool = False) -> Value:
        if _turns_nothing(x.type, order):
            return self.reshape(x, [x.type.shape[p] for p in order])
        if not (order[-1] == x.type.rank - 1 and (free or _writes_strided(self.graph, x))):
            self.count(-_size(x.type), -1)
        return self.b("transpose", x, perm=tuple(order))

    def reshape(self, x: Value, shape: Sequence[Dim]) -> Value:
        x = self.b.resolve(x)
        return x if x.type.shape == tuple(shape) else self.b("reshape", x, shape=tuple(shape))

    # -- ops -----------------------------------------------------------------------------------------------------

    def through(self, node: Node) -> _View | None:
        """The node's result as a view, or None if the node needs its operands as they are."""
        if len(node.outputs) != 1:
            return None
        if node.name == "transpose":
            return self.view(node.inputs[0]).transposed(node.attrs["perm"])
        if node.op.has(Trait.ELEMENTWISE):
            return self.elementwise(node)
        rule = _THROUGH.get(node.name)
        return rule(self, node) if rule else None

    def view(self, value: Value) -> _View:
        """What is known of a value's order: a view of this walk, or a transpose that is there."""
        if value in self.views:
            return self.views[value]
        producer = self.graph.producer.get(value)
        if producer is not None and producer.name == "transpose":
            return _View.of(producer.inputs[0]).transposed(producer.attrs["perm"])
        return _View.of(value)

    def reshaped(self, view: _View, shape: Shape) -> _View | None:
        """The same elements under another shape, in the source's order still."""
        extents = [view.source.type.shape[a] for a in view.order]
        parts = _parts(extents, shape)
        if parts is None:
            return None
        cut: dict[int, list[Dim]] = {axis: [] for axis in range(len(extents))}
        pieces: list[list[tuple[int, int]]] = []
        for group in parts:
            pieces.append([])
            for place, extent in group:
                axis = view.order[place]
                pieces[-1].append((axis, len(cut[axis])))
                cut[axis].append(extent)
        starts = list(itertools.accumulate((len(cut[a]) for a in range(len(cut))), initial=0))
        source = self.reshape(view.source, [e for a in range(len(cut)) for e in cut[a]])
        return _View(source, shape, tuple(tuple(starts[a] + i for a, i in group) for group in pieces))

    def arranged(self, value: Value, like: _View, axis: int | None = None) -> Value | None:
        """An operand that broadcasts to ``like`` in the order of the source of ``like``; ``axis`` may have another extent."""
        if value.type.rank == 0:
            return value
        shape = (*[1] * (len(like.shape) - value.type.rank), *value.type.shape)
        extents = like.source.type.shape
        flat: list[Dim] = []
        for i, (own, wanted) in enumerate(zip(shape, like.shape, strict=True)):
            if i == axis and like.axis(i) is not None:
                flat += [own if a == like.axis(i) else 1 for a in like.groups[i]]
            elif own == wanted:
                flat += [extents[a] for a in like.groups[i]]
            elif own == 1:
                flat += [1] * len(like.groups[i])
            else:
                return None
        back = [like.order.index(a) for a in range(len(extents))]
        constant = self.graph.constant_value(value)
        if constant is not None and all(isinstance(d, int) for d in flat):
            turned = np.ascontiguousarray(constant.reshape(static_dims(flat)).transpose(back))
            while turned.ndim > 1 and turned.shape[0] == 1:  # a row stays a row
                turned = turned[0]
            return self.b.constant(turned, value.hint)
        view = self.reshaped(self.view(value), tuple(flat))
        return None if view is None else self.carried_out(view.transposed(back))

    def elementwise(self, node: Node) -> _View | None:
        leader = next(
            (v for v in node.inputs if v in self.views and v.type.shape == node.output.type.shape and v.type.rank), None
        )
        if leader is None:
            return None
        like = self.views[leader]
        operands = self.all_arranged(node.inputs, leader, like)
        if operands is None:
            return None
        return _View(self.b(node.op, *operands, hint=node.output.hint, **node.attrs), like.shape, like.groups)

    def all_arranged(
        self, values: Sequence[Value], leader: Value, like: _View, axis: int | None = None
    ) -> list[Value] | None:
        found: list[Value] = []
        for value in values:
            own = like.source if value is leader else self.arranged(value, like, axis)
            if own is None:
                return None
            found.append(own)
        return found

    def with_last_axes(self, view: _View, count: int) -> _View | None:
        """The view on a source that ends with the view's last ``count`` axes; transposes the source if it does not."""
        last = tuple(itertools.chain.from_iterable(view.groups[-count:]))
        lead = [a for a in range(view.source.type.rank) if a not in last]
        source = self.transpose(view.source, [*lead, *last])
        extents = [view.source.type.shape[a] for a in lead]
        source = self.reshape(source, [*extents, *view.shape[-count:]])
        groups = [tuple(lead.index(a) for a in group) for group in view.groups[:-count]]
        return _View(source, view.shape, (*groups, *((len(lead) + i,) for i in range(count)))) if lead else None

    def matmul(self, node: Node) -> _View | None:
        x, w = node.inputs
        if x not in self.views or w in self.views or w.type.rank != 2:
            return None
        view = self.with_last_axes(self.views[x], 1)
        if view is None:
            return None
        return _View(self.b("matmul", view.source, w, hint=node.output.hint), node.output.type.shape, view.groups)

    def norm(self, node: Node) -> _View | None:
        x, *parameters = node.inputs
        if x not in self.views or any(p in self.views for p in parameters):
            return None
        axis = node.attrs["axis"]
        view = self.with_last_axes(self.views[x], -axis if axis < 0 else x.type.rank - axis)
        if view is None:
            return None
        return _View(
            self.b(node.op, view.source, *parameters, hint=node.output.hint, **node.attrs), view.shape, view.groups
        )

    def batch_norm(self, node: Node) -> _View | None:
        """As a factor and an offset for each channel, which may be along any axis."""
        view = self.views.get(node.inputs[0])
        axis, numbers = view.axis(1) if view is not None else None, affine(node, self.graph)
        if view is None or axis is None or numbers is None:
            return None
        shape = (-1, *[1] * (view.source.type.rank - 1 - axis))
        dtype = node.output.type.dtype.numpy
        factor, offset = (self.b.constant(a.reshape(shape).astype(dtype), node.output.hint) for a in numbers)
        return _View(self.b("add", self.b("mul", view.source, factor), offset), view.shape, view.groups)

    def softmax(self, node: Node) -> _View | None:
        view = self.views[node.inputs[0]]
        axis = view.axis(node.attrs["axis"])
        if axis is None:
            return None
        last = node.attrs["axis"] % len(view.shape) == len(view.shape) - 1
        if last and axis != view.source.type.rank - 1:
            return None  # along another axis it would be slower
        return _View(self.b(node.op, view.source, axis=axis, hint=node.output.hint), view.shape, view.groups)

    def slice(self, node: Node) -> _View | None:
        view = self.views[node.inputs[0]]
        axis = view.axis(node.attrs["axis"])
        if axis is None:
            return None
        attrs = {**node.attrs, "axis": axis}
        return _View(self.b("slice", view.source, hint=node.output.hint, **attrs), node.output.type.shape, view.groups)

    def concat(self, node: Node) -> _View | None:
        leader = next(v for v in node.inputs if v in self.views)
        like = self.views[leader]
        axis = node.attrs["axis"] % len(like.shape)
        own = like.axis(axis)
        operands = None if own is None else self.all_arranged(node.inputs, leader, like, axis)
        if operands is None:
            return None
        return _View(self.b("concat", *operands, axis=own, hint=node.output.hint), node.output.type.shape, like.groups)

    def pad(self, node: Node) -> _View | None:
        view = self.views[node.inputs[0]]
        sides: dict[str, list[int]] = {"before": [0] * view.source.type.rank, "after": [0] * view.source.type.rank}
        for side, amounts in sides.items():
            for axis, amount in enumerate(node.attrs[side]):
                own = view.axis(axis)
                if amount and own is None:
                    return None
                if amount and own is not None:
                    amounts[own] = amount
        attrs = {**node.attrs, "before": tuple(sides["before"]), "after": tuple(sides["after"])}
        return _View(self.b("pad", view.source, hint=node.output.hint, **attrs), node.output.type.shape, view.groups)

    def reduction(self, node: Node) -> _View | None:
        view = self.views[node.inputs[0]]
        gone = {axis % len(view.shape) for axis in node.attrs["axes"]}
        over = tuple(sorted(a for axis in gone for a in view.groups[axis]))
        if not over:
            return None
        keeps = node.attrs["keepdims"]
        result = self.b(node.op, view.source, axes=over, keepdims=keeps, hint=node.output.hint)
        if keeps:
            return _View(result, node.output.type.shape, view.groups)
        left = [a for a in range(view.source.type.rank) if a not in over]
        groups = [tuple(left.index(a) for a in group) for i, group in enumerate(view.groups) if i not in gone]
        return _View(result, node.output.type.shape, tuple(groups))


_THROUGH: dict[str, Callable[[_Walk, Node], _View | None]] = {
    "reshape": lambda walk, node: walk.reshaped(walk.views[node.inputs[0]], node.output.type.shape),
    "matmul": _Walk.matmul,
    "slice": _Walk.slice,
    "concat": _Walk.concat,
    "pad": _Walk.pad,
    "batch_norm": _Walk.batch_norm,
    **dict.fromkeys(("layer_norm", "rms_norm"), _Walk.norm),
    **dict.fromkeys(("softmax", "log_softmax"), _Walk.softmax),
    **dict.fromkeys(("sum", "mean", "max", "min", "prod", "any", "all"), _Walk.reduction),
}
"""What a view passes besides elementwise ops and transposes: ``(walk, node) -> the result as a view``, None where it cannot."""


# -- cost ------------------------------------------------------------------------------------------------------------


def _size(type: TensorType) -> int:
    """Bytes of a tensor, symbolic extents at their nominal value."""
    return nominal(type.nbytes)


def bytes_moved(graph: Graph, node: Node) -> int:
    """What a transpose of the graph costs: nothing if it moves nothing, or if its neighbours read or write with strides."""
    (x,), perm = node.inputs, node.attrs["perm"]
    if _turns_nothing(x.type, perm) or graph.constant_value(x) is not None:
        return 0
    users = graph.users.get(node.output, ())
    if perm[-1] == len(perm) - 1 and node.output not in graph.outputs:
        if users and all(_reads_strided(user, node.output) for user in users):
            return 0
        if _writes_strided(graph, x):
            return 0
    return _size(x.type)


def _reads_strided(node: Node, value: Value) -> bool:
    """Whether the node takes a transposed operand as it lies, if its last axis is contiguous."""
    return node.name == "attention" and value in node.inputs[:3]


def _writes_strided(graph: Graph, value: Value) -> bool:
    """Whether the node that makes a value can write it transposed, if its last axis stays contiguous."""
    producer = graph.producer.get(value)
    return producer is not None and producer.name == "attention" and graph.use_count(value) == 1


def _may_sink(graph: Graph, node: Node) -> bool:
    (x,) = node.inputs
    return not _turns_nothing(x.type, node.attrs["perm"]) and graph.constant_value(x) is None
