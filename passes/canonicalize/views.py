"""Views and moves of elements - reshape, transpose, broadcast, slice, concat - that cancel, or become one."""

from __future__ import annotations

from collections.abc import Sequence
from operator import add

from mlec.ir import Dim, Graph, GraphBuilder, Location, Match, Miss, Node, P, Rule, Trait, Value
from mlec.ir.dim import bounds, divide_exact, static_dims
from mlec.ir.types import Shape
from mlec.ops.rows import MAX_COLUMNS, most_columns
from mlec.ops.windows import Geometry


class DropIdentityView(Rule):
    """reshape / transpose / broadcast_to / slice / pad / cast / concat that changes nothing -> x"""

    pattern = P("reshape|broadcast_to|cast|transpose|slice|pad|concat")

    def check(self, m: Match, graph: Graph) -> Miss | None:
        node = m.node
        if len(node.inputs) != 1 or node.inputs[0].type != node.output.type:
            return Miss()
        if node.name == "transpose" and list(node.attrs["perm"]) != sorted(node.attrs["perm"]):
            return Miss()
        return None

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return m.node.inputs[0]


class MergeReshapes(Rule):
    """reshape(reshape(x)) -> reshape(x)"""

    pattern = P("reshape", P("reshape", "x"))

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("reshape", m["x"], shape=m.node.attrs["shape"])


class MergeTransposes(Rule):
    """transpose(transpose(x)) -> transpose(x)"""

    pattern = P("transpose", P("transpose", "x", bind="inner"))

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        inner = m.nodes["inner"].attrs["perm"]
        return b("transpose", m["x"], perm=tuple(inner[p] for p in m.node.attrs["perm"]))


class TransposeAsReshape(Rule):
    """transpose that moves only axes of extent 1 -> reshape"""

    pattern = P("transpose", "x")

    def check(self, m: Match, graph: Graph) -> Miss | None:
        shape = m["x"].type.shape
        moved = [p for p in m.node.attrs["perm"] if shape[p] != 1]
        return None if moved == sorted(moved) else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("reshape", m["x"], shape=m.node.output.type.shape)


class ReshapeTransposed(Rule):
    """reshape(transpose(x)) -> transpose(reshape(x)), where the reshape only adds or drops axes of extent 1"""

    pattern = P("reshape", P("transpose", "x", bind="inner"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        turned, shape = m.nodes["inner"].output.type.shape, m.node.output.type.shape
        return None if [d for d in turned if d != 1] == [d for d in shape if d != 1] else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        perm, before, after = m.nodes["inner"].attrs["perm"], m["x"].type.shape, m.node.output.type.shape
        # Extents of 1 go in front, so that the last axis stays the last one where the transpose leaves it there.
        units = [axis for axis, extent in enumerate(after) if extent == 1]
        own = [axis for axis, extent in enumerate(before) if extent != 1]
        place = {axis: len(units) + i for i, axis in enumerate(own)}
        moved = iter([place[axis] for axis in perm if before[axis] != 1])
        reshaped = b("reshape", m["x"], shape=(*[1] * len(units), *(before[axis] for axis in own)))
        order = [units.index(axis) if axis in units else next(moved) for axis in range(len(after))]
        return b("transpose", reshaped, perm=tuple(order))


class KeepReducedAxes(Rule):
    """reshape(reduction(x)) -> reduction(x) with keepdims = true, where the reshape puts back the axes that are gone"""

    pattern = P("reshape", P(Trait.REDUCTION, "x", bind="reduction"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        node, x = m.nodes["reduction"], m["x"].type
        if graph.use_count(node.output) > 1 or node.attrs.get("keepdims", True) or "axes" not in node.attrs:
            return Miss()
        axes = {axis % x.rank for axis in node.attrs["axes"]}
        kept = tuple(1 if axis in axes else extent for axis, extent in enumerate(x.shape))
        return None if m.node.output.type.shape == kept else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        node = m.nodes["reduction"]
        return b(node.op, m["x"], **{**node.attrs, "keepdims": True})


class DropBroadcast(Rule):
    """f(broadcast_to(x), y) -> f(x, y), where f broadcasts by itself"""

    pattern = P(Trait.ELEMENTWISE | Trait.CONTRACTION)

    def check(self, m: Match, graph: Graph) -> Miss | None:
        return None if self.narrowed(m.node, graph) is not None else Miss()

    def narrowed(self, node: Node, graph: Graph) -> list[Value] | None:
        """The operands with one broadcast less."""
        if not node.op.has(Trait.ELEMENTWISE) and node.name not in ("matmul", "attention"):
            return None
        fixed = 0 if node.op.has(Trait.ELEMENTWISE) else 2
        for place, value in enumerate(node.inputs):
            producer = graph.producer.get(value)
            if producer is None or producer.name != "broadcast_to":
                continue
            (x,) = producer.inputs
            if (
                x.type.shape[x.type.rank - fixed :] != value.type.shape[value.type.rank - fixed :]
                or x.type.rank < fixed
            ):
                continue
            operands = [*node.inputs[:place], x, *node.inputs[place + 1 :]]
            stated = tuple(v.type for v in node.outputs)
            if node.op.result_types([v.type for v in operands], node.attrs) == stated:
                return operands
        return None

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        operands = self.narrowed(m.node, graph)
        assert operands is not None
        return b(m.node.op, *operands, **m.node.attrs)


class ReshapeProduct(Rule):
    """reshape(matmul(a, b)) -> matmul(reshape(a), reshape(b)), where only leading axes change and operands were reshaped to them"""

    pattern = P("reshape", P("matmul", "a", "b", bind="product"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        product, (a, w) = m.nodes["product"].output, (m["a"], m["b"])
        lead = _new_lead(m.node.output.type.shape, m.nodes["product"])
        was_reshaped = any(v in graph.producer and graph.producer[v].name == "reshape" for v in (a, w))
        if lead is None or not was_reshaped or graph.use_count(product) > 1 or lead == product.type.shape[:-2]:
            return Miss()
        return None if a.type.shape[:-2] == w.type.shape[:-2] else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        lead = _new_lead(m.node.output.type.shape, m.nodes["product"])
        assert lead is not None
        operands = [b("reshape", v, shape=(*lead, *v.type.shape[-2:])) for v in (m["a"], m["b"])]
        return b("reshape", b("matmul", *operands), shape=m.node.output.type.shape)


def _new_lead(shape: Shape, node: Node) -> Shape | None:
    """The leading axes of a product's result in another shape; None where the matrices change too. Further axes of extent 1 among them
    do no harm.
    """
    left, matrix = list(shape), node.output.type.shape[-2:]
    for extent in matrix[::-1]:
        while left and left[-1] == 1 != extent:
            left.pop()
        if not left or left.pop() != extent:
            return None
    return tuple(left) if left else None


class MergeBroadcasts(Rule):
    """broadcast_to(broadcast_to(x)) -> broadcast_to(x)"""

    pattern = P("broadcast_to", P("broadcast_to", "x"))

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("broadcast_to", m["x"], shape=m.node.attrs["shape"])


class MergeExtremes(Rule):
    """max(max(x)) -> max(x), over the axes of both; as well min, any, all"""

    pattern = P("max|min|any|all", P("max|min|any|all", "x", bind="inner"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        inner = m.nodes["inner"]
        alike = inner.name == m.node.name and inner.attrs["keepdims"] == m.node.attrs["keepdims"]
        return None if alike and graph.use_count(inner.output) == 1 else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b(m.node.op, m["x"], axes=merged_axes(m.nodes["inner"], m.node), keepdims=m.node.attrs["keepdims"])


def merged_axes(inner: Node, outer: Node) -> tuple[int, ...]:
    """The axes of the operand of a reduction that it, or the reduction after it, goes over."""
    rank = inner.inputs[0].type.rank
    first = {axis % rank for axis in inner.attrs["axes"]}
    left = list(range(rank)) if inner.attrs["keepdims"] else [axis for axis in range(rank) if axis not in first]
    return tuple(sorted(first | {left[axis % len(left)] for axis in outer.attrs["axes"]}))


class ReduceNothing(Rule):
    """sum(x) -> reshape(x), over axes of extent 1; as well mean, prod, max, min"""

    pattern = P("sum|mean|prod|max|min", "x")

    def check(self, m: Match, graph: Graph) -> Miss | None:
        x = m["x"].type
        alone = all(x.shape[axis] == 1 for axis in m.node.attrs["axes"])
        return None if alone and m.node.output.type.dtype is x.dtype else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        return b("reshape", m["x"], shape=m.node.output.type.shape)


# -- cuts and joins --------------------------------------------------------------------------------------------------


def _axis(node: Node) -> int:
    return int(node.attrs["axis"] % node.output.type.rank)


class MergeSlices(Rule):
    """slice(slice(x)) -> slice(x), along one axis"""

    pattern = P("slice", P("slice", "x", bind="inner"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        inner, extent = m.nodes["inner"], m.node.output.type.shape[_axis(m.node)]
        known = (isinstance(extent, int) and extent > 0) or inner.attrs["step"] == m.node.attrs["step"] == 1
        return None if _axis(inner) == _axis(m.node) and known else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        first, second = m.nodes["inner"].attrs, m.node.attrs
        start, step = first["start"] + first["step"] * second["start"], first["step"] * second["step"]
        extent = m.node.output.type.shape[_axis(m.node)]
        stop = start + (extent if step == 1 else step * (extent - 1) + 1)
        return b("slice", m["x"], axis=_axis(m.node), start=start, stop=stop, step=step)


class SliceOfJoined(Rule):
    """slice(concat(.., x, ..)) -> slice(x), where it is a part of x"""

    pattern = P("slice", P("concat", bind="joined"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        return None if self._found(m) is not None else Miss()

    def _found(self, m: Match) -> tuple[Value, Dim] | None:
        """The operand that the slice is a part of, and where it begins."""
        node, joined = m.node, m.nodes["joined"]
        axis, offset = _axis(node), 0
        if _axis(joined) != axis:
            return None
        begin: Dim = offset
        for value in joined.inputs:
            end = begin + value.type.shape[axis]
            if _never_below(node.attrs["start"], begin) and _never_below(end, node.attrs["stop"]):
                return value, begin
            begin = end
        return None

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        found, attrs = self._found(m), m.node.attrs
        assert found is not None
        value, begin = found
        start, stop = attrs["start"] - begin, attrs["stop"] - begin
        return b("slice", value, axis=_axis(m.node), start=start, stop=stop, step=attrs["step"])


def _never_below(a: Dim, b: Dim) -> bool:
    """Whether one extent is at least another one, whatever the symbols are."""
    least, _ = bounds(a - b, {})
    return least is not None and least >= 0


class JoinNeighbours(Rule):
    """concat(x[a:b], x[b:c]) -> x[a:c], also among others; what is empty is left out"""

    pattern = P("concat")

    def check(self, m: Match, graph: Graph) -> Miss | None:
        return None if len(self._parts(m.node, graph)) < len(m.node.inputs) else Miss()

    def _parts(self, node: Node, graph: Graph) -> list[tuple[Value, Dim, Dim]]:
        """What is joined: of which values which elements. None of it twice in a row of the same value."""
        axis = _axis(node)
        parts: list[tuple[Value, Dim, Dim]] = []
        for value in node.inputs:
            x, start, stop = self._cut(value, axis, graph)
            if start == stop:
                continue
            if parts and parts[-1][0] is x and parts[-1][2] == start:
                start = parts.pop()[1]
            parts.append((x, start, stop))
        return parts or [(node.inputs[0], 0, node.inputs[0].type.shape[axis])]

    def _cut(self, value: Value, axis: int, graph: Graph) -> tuple[Value, Dim, Dim]:
        node = graph.producer.get(value)
        if node is not None and node.name == "slice" and _axis(node) == axis and node.attrs["step"] == 1:
            return node.inputs[0], node.attrs["start"], node.attrs["stop"]
        return value, 0, value.type.shape[axis]

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        axis = _axis(m.node)
        there = {self._cut(value, axis, graph): value for value in m.node.inputs}
        values = [
            there.get((x, start, stop))
            or (x if stop - start == x.type.shape[axis] else b("slice", x, axis=axis, start=start, stop=stop))
            for x, start, stop in self._parts(m.node, graph)
        ]
        return values[0] if len(values) == 1 else b("concat", *values, axis=axis)


class PadIntoConvolution(Rule):
    """conv(pad(x)) -> conv(x) with more padding, where the pad adds zeros around space"""

    pattern = P("conv", P("pad", "x", bind="pad"), "w")

    def check(self, m: Match, graph: Graph) -> Miss | None:
        pad = m.nodes["pad"].attrs
        zeros = pad["mode"] == "constant" and pad["value"] == 0
        return None if zeros and not any((*pad["before"][:2], *pad["after"][:2])) else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        pad, conv = m.nodes["pad"].attrs, m.node
        own = Geometry.of(conv.attrs, conv.output.type.rank - 2).pads
        pads = tuple(map(add, own, (*pad["before"][2:], *pad["after"][2:])))
        return b(conv.op, m["x"], m["w"], **{**conv.attrs, "pads": pads})


# -- reshapes that meet each other -----------------------------------------------------------------------------------


class RaiseReshape(Rule):
    """reshape(f(x)) -> f(reshape(x)), where f works on elements or on the last axes, and the reshape then meets another one"""

    pattern = P("reshape", P(Trait.ELEMENTWISE | Trait.NORMALISATION, bind="inner"))

    def check(self, m: Match, graph: Graph) -> Miss | None:
        return None if _reshaped_operands(m.nodes["inner"], m.node.output.type.shape, graph) else Miss()

    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value:
        raised = _reshaped_operands(m.nodes["inner"], m.node.output.type.shape, graph)
        made: dict[Value, Value] = {}
        for node, shapes in reversed(raised.items()):
            operands = [
                made.get(v) or _seen_as(b, v, shape, graph) for v, shape in zip(node.inputs, shapes, strict=True)
            ]
            attrs = dict(node.attrs)
            if node.op.has(Trait.NORMALISATION):
                attrs["axis"] = attrs["axis"] % node.output.type.rank - node.output.type.rank
            with b.at(Location.merged((node.loc, m.node.loc), self.name)):
                made[node.output] = b(node.op, *operands, **attrs)
        return made[m.nodes["inner"].output]


def _seen_as(b: GraphBuilder, value: Value, shape: Shape, graph: Graph) -> Value:
    if value.type.shape == shape:
        return value
    array = graph.constant_value(value)
    return (
        b("reshape", value, shape=shape) if array is None else b.constant(array.reshape(static_dims(shape)), value.hint)
    )


def _reshaped_operands(node: Node, shape: Shape, graph: Graph) -> dict[Node, list[Shape]]:
    """The shapes of what nodes read where the result of the last one has another shape, with a reshape less: of each node after those
    that read it. Nothing where that cannot be had.
    """
    found: dict[Node, list[Shape]] = {}
    waiting = [(node, shape)]
    while waiting:
        node, shape = waiting.pop()
        wanted = _operand_shapes(node, shape)
        if wanted is None or graph.use_count(node.output) > 1:
            return {}
        found[node] = wanted
        moved = [(v, s) for v, s in zip(node.inputs, wanted, strict=True) if v.type.shape != s]
        if all(graph.constant_value(v) is not None for v, _ in moved):
            return {}
        for value, own in moved:
            if not _is_had(value, own, graph):
                maker = graph.producer.get(value)
                if maker is None or len(maker.outputs) != 1:
                    return {}
                waiting.append((maker, own))
    return found


def _is_had(value: Value, shape: Shape, graph: Graph) -> bool:
    """Whether a value is a constant, or made by a node that a reshape goes together with."""
    node = graph.producer.get(value)
    if node is None:
        return False
    if node.name == "reshape":
        return node.inputs[0].type.shape == shape or graph.use_count(value) == 1
    if node.name == "matmul" and is_of_rows(node, shape, graph):
        return graph.use_count(value) == 1
    if node.name == "matmul":  # where `ReshapeProduct` goes on
        lead, reshaped = _new_lead(shape, node), [graph.producer.get(v) for v in node.inputs]
        alike = node.inputs[0].type.shape[:-2] == node.inputs[1].type.shape[:-2] and graph.use_count(value) == 1
        return alike and lead is not None and any(p is not None and p.name == "reshape" for p in reshaped)
    return node.is_constant


def is_of_rows(node: Node, shape: Shape, graph: Graph) -> bool:
    """Whether a product with a constant matrix is one of rows that lay in several axes, and whose results do so in this shape.

    Narrow ones are none: they are for kernels that go over rows with all that is around.
    """
    x, w = node.inputs
    made = graph.producer.get(x)
    if made is None or made.name != "reshape" or node.output.type.rank != 2 or graph.constant_value(w) is None:
        return False
    most, (depth, columns) = most_columns(node.output.type.shape[0]), static_dims(w.type.shape)
    if columns <= most and depth <= MAX_COLUMNS:
        return False
    return made.inputs[0].type.shape == (*shape[:-1], w.type.shape[0]) and shape[-1] == w.type.shape[1]


def _operand_shapes(node: Node, shape: Shape) -> list[Shape] | None:
    """Shapes of the operands with which a node's result has another shape; None where there are none."""
    before = node.output.type.shape
    groups = _groups(before, shape)
    if groups is None:
        return None
    if node.op.has(Trait.ELEMENTWISE):
        found = [_regrouped(v.type.shape, before, shape, groups) for v in node.inputs]
        return None if any(s is None for s in found) else [s for s in found if s is not None]
    if node.name in ("softmax", "log_softmax", "layer_norm", "rms_norm"):
        last = len(before) - node.attrs["axis"] % len(before)
        if before[-last:] != shape[-last:]:
            return None
        return [shape, *(v.type.shape for v in node.inputs[1:])]
    return None


Groups = Sequence[tuple[range, range]]


def _groups(before: Shape, after: Shape) -> Groups | None:
    """Which axes of one shape become which of another, as few at a time as can be; None where that cannot be told."""
    if 0 in before or 0 in after:
        return None
    i = j = 0
    found: list[tuple[range, range]] = []
    while i < len(before) or j < len(after):
        first, second = i, j
        left: Dim = 1
        right: Dim = 1
        if i < len(before):
            left, i = before[i], i + 1
        if j < len(after):
            right, j = after[j], j + 1
        while left != right:
            if i < len(before) and divide_exact(right, left) is not None:
                left, i = left * before[i], i + 1
            elif j < len(after) and divide_exact(left, right) is not None:
                right, j = right * after[j], j + 1
            else:
                return None
        found.append((range(first, i), range(second, j)))
    return found


def _regrouped(own: Shape, before: Shape, after: Shape, groups: Groups) -> Shape | None:
    """The shape of an operand that broadcasts to ``before``, where that becomes ``after``; None if it has a part of merged axes."""
    full = (*[1] * (len(before) - len(own)), *own)
    found: list[Dim] = []
    for old, new in groups:
        if all(full[axis] == 1 for axis in old):
            found += [1] * len(new)
        elif all(full[axis] == before[axis] for axis in old):
            found += [after[axis] for axis in new]
        else:
            return None
    least = len(own) if len(own) < len(before) else len(after)  # one operand at least gives the result its rank
    while len(found) > least and found[0] == 1:
        del found[0]
    return tuple(found)


RULES: tuple[Rule, ...] = (
    DropIdentityView(), MergeReshapes(), MergeTransposes(), TransposeAsReshape(), MergeBroadcasts(), MergeSlices(), SliceOfJoined(),
    JoinNeighbours(), PadIntoConvolution(), ReshapeTransposed(), KeepReducedAxes(), MergeExtremes(), ReduceNothing(), DropBroadcast(),
    ReshapeProduct(), RaiseReshape(),
)  # fmt: skip
