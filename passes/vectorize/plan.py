"""Finds, for values that might be the same step of many lanes, the tree of equal steps above them.

The search starts from one value for each lane and goes up, all lanes side by side, as long as the nodes that make them do the same.
What the lanes have in one place is a *pack*:

    Pack ::= Shared(value)                   the same in every lane
           | Stacked(arrays)                 constants
           | Cut(source, starts)             slices of one tensor along one axis
           | Step(nodes, operands: lanes*)   equal nodes on packs of operands
           | Pick(nodes, operand: lanes)     slices at different places of a pack
           | Reordered(lanes, order)         the lanes of another pack, each as often as wanted
           | Joined(values)                  anything else: the values one after the other

Packs are looked at once, those furthest from the inputs first.

A pack of steps replaces the nodes of all lanes wherever they are read, if all are equally far from the inputs: no lane can need another
one then, nor can two packs need each other. Where they are not, as in what an unrolled recurrence makes of each of its states,
they are taken together only if nothing but the tree itself reads them. Cuts and reshapes cost nothing: those of the lanes stay
for whoever else reads them.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mlec.ir import Dim, Graph, Node, Trait, Value
from mlec.ir.dim import evaluate, symbols_of
from mlec.ir.op import Array
from mlec.ops.rows import rows_of
from mlec.passes.vectorize.batching import batching, unbatched
from mlec.pipeline import NOMINAL_EXTENT

Values = tuple[Value, ...]
MOST_REPEATED_BYTES = 1 << 20
"""Of constants that several lanes share although not all do: stacked, they are in memory more than once."""
MOST_BYTES = 1 << 22
"""Read and written by one op for all lanes: beyond what caches hold, steps that are done one by one find their operands there."""
LARGE_STEP = 1 << 24
"""Arithmetic of one step from which on nothing is gained by joining values that are not side by side already."""


@dataclass(frozen=True)
class Shared:
    value: Value


@dataclass(frozen=True)
class Stacked:
    arrays: tuple[Array, ...]
    hint: str


@dataclass(frozen=True)
class Cut:
    """Of ``source``, each lane has the elements ``starts[lane] + step * (0 .. width - 1)`` along an axis."""

    source: Value
    axis: int
    starts: tuple[int, ...]
    width: int
    step: int

    @property
    def gap(self) -> int:
        """From each start to the next; 0 if that differs."""
        gaps = {b - a for a, b in zip(self.starts, self.starts[1:], strict=False)}
        return gaps.pop() if len(gaps) == 1 else 0

    @property
    def side_by_side(self) -> bool:
        """One lane after the other, or one element of each at equal distances."""
        return (self.step == 1 and self.gap == self.width) or (self.width == 1 and self.gap > 0)

    @property
    def interleaved(self) -> bool:
        """The first elements of all lanes, then the second ones ..., which are all that the source has."""
        count, extent = len(self.starts), self.source.type.shape[self.axis]
        return self.gap == 1 and self.starts[0] == 0 and self.step == count and self.width * count == extent


@dataclass(frozen=True)
class Step:
    nodes: tuple[Node, ...]
    operands: tuple[Values, ...]
    output: int


@dataclass(frozen=True)
class Pick:
    nodes: tuple[Node, ...]
    operand: Values


@dataclass(frozen=True)
class Reordered:
    lanes: Values
    order: tuple[int, ...]


@dataclass(frozen=True)
class Joined:
    values: Values
    reason: str = ""


Pack = Shared | Stacked | Cut | Step | Pick | Reordered | Joined


@dataclass(eq=False)
class Tree:
    """The packs above some values, those furthest from the inputs first.

    Attributes:
        lanes: what it grew from: one value for each lane.
        packs: those that no tree before it has.
        nodes: the nodes that it replaces.
    """

    lanes: Values
    packs: dict[Values, Pack] = field(default_factory=dict)
    nodes: set[Node] = field(default_factory=set)

    @property
    def steps(self) -> list[Step]:
        return [pack for pack in self.packs.values() if isinstance(pack, Step)]


class Search:
    """Grows trees in one graph. What several have in common is made once.

    Attributes:
        packs: those of the trees that were taken.
        taken: the nodes that these replace.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.heights = heights(graph)
        self.packs: dict[Values, Pack] = {}
        self.taken: set[Node] = set()
        self._place: dict[Value, tuple[Values, int]] = {}  # of values that packs of `taken` nodes give
        self._outputs = set(graph.outputs)

    def grow(self, lanes: Values, readers: Sequence[Node] = ()) -> Tree | None:
        """The tree above the values; None if another tree has taken some of its nodes, but not all lanes of a pack.

        Args:
            lanes: one value for each lane.
            readers: nodes that the result of the tree replaces besides its own.
        """
        tree = Tree(lanes)
        inside = set(readers)  # nodes that nothing reads but the tree
        order = (
            itertools.count()
        )  # of equally high ones, which never need each other unless one was found after the other
        queue: list[tuple[int, int, Values]] = [(0, next(order), lanes)]
        while queue:
            _, _, wanted = heapq.heappop(queue)
            if wanted in tree.packs or wanted in self.packs:
                continue
            pack = self._pack(wanted, inside)
            if pack is None:
                return None
            tree.packs[wanted] = pack
            if isinstance(pack, Step) and not _is_free(pack.nodes[0]):
                tree.nodes.update(pack.nodes)
                inside.update(pack.nodes)
            elif isinstance(pack, (Step, Pick)):
                inside.update(n for n in pack.nodes if self._read_only_by(n, inside))
            for operand in operands_of(pack):
                heapq.heappush(queue, (-max(map(self.height, operand)), next(order), operand))
        return tree

    def take(self, tree: Tree) -> None:
        """Remembers that the tree replaces its nodes."""
        self.packs.update(tree.packs)
        self.taken |= tree.nodes
        for lanes, pack in tree.packs.items():
            if isinstance(pack, Step) and not _is_free(pack.nodes[0]):
                self._place.update({value: (lanes, i) for i, value in enumerate(lanes)})

    def height(self, value: Value) -> int:
        return self.heights.get(value, 0)

    def level(self, values: Iterable[Value]) -> bool:
        """Whether all are equally far from the inputs."""
        return len({self.height(v) for v in values}) <= 1

    def _pack(self, values: Values, inside: set[Node]) -> Pack | None:
        """What the values are together; None where a node is taken by another tree."""
        first = values[0]
        if all(v is first for v in values):
            return Shared(first)
        found = [self.graph.producer.get(v) for v in values]
        nodes = tuple(n for n in found if n is not None)
        if not self.taken.isdisjoint(nodes):
            places = [self._place.get(v, ((), 0)) for v in values]
            whole = places[0][0]
            return (
                Reordered(whole, tuple(i for _, i in places)) if whole and all(p == whole for p, _ in places) else None
            )
        alike = all(v.type == first.type and n.name == nodes[0].name for v, n in zip(values, nodes, strict=False))
        if len(nodes) < len(values) or not alike:
            return Joined(values)
        if nodes[0].is_constant:
            return self._stacked(values)
        cut = _cut(nodes)
        if cut is not None:
            return cut
        if len(set(values)) < len(values):
            different = tuple(dict.fromkeys(values))
            place = {value: i for i, value in enumerate(different)}
            return Reordered(different, tuple(place[v] for v in values))
        return self._step(values, nodes, inside)

    def _stacked(self, values: Values) -> Pack:
        known = tuple(a for v in values if (a := self.graph.constant_value(v)) is not None)
        different = len(set(values))
        if different < len(values) and known[0].nbytes * (len(values) - different) > MOST_REPEATED_BYTES:
            return Joined(values, "constants would be repeated")
        return Stacked(known, values[0].hint)

    def _step(self, values: Values, nodes: tuple[Node, ...], inside: set[Node]) -> Pack:
        first = nodes[0]
        output = first.outputs.index(values[0])
        same = all(
            n.outputs.index(v) == output and len(n.inputs) == len(first.inputs)
            for v, n in zip(values, nodes, strict=True)
        )
        operands = tuple(zip(*(n.inputs for n in nodes), strict=False))
        if not same or any(v.type != column[0].type for column in operands for v in column):
            return Joined(values)
        picks = _are_picks(nodes)
        if not picks and any(n.attrs != first.attrs for n in nodes):
            return Joined(values)
        rule = batching(first.op)
        if rule is None:
            return Joined(values, unbatched(first.op))
        varying = [i for i, column in enumerate(operands) if any(v is not column[0] for v in column)]
        if reason := rule.refuses(first, varying):
            return Joined(values, reason)
        if not (_is_free(first) or self.level(values) or all(self._read_only_by(n, inside) for n in nodes)):
            return Joined(values, "they may depend on one another")
        return Pick(nodes, operands[0]) if picks else Step(nodes, operands, output)

    def _read_only_by(self, node: Node, readers: set[Node]) -> bool:
        return all(v not in self._outputs and readers.issuperset(self.graph.users.get(v, ())) for v in node.outputs)

    def pays(self, tree: Tree, readers: Sequence[Node] = ()) -> str | None:
        """Nothing if the tree is better than the lanes one by one; else why not, as far as that is worth telling.

        Args:
            tree: the tree.
            readers: as of `grow`.
        """
        root = tree.packs.get(tree.lanes) or self.packs[tree.lanes]
        if isinstance(root, (Joined, Shared, Stacked)):
            return root.reason if isinstance(root, Joined) else ""
        if any(_bytes(step) * len(step.nodes) > MOST_BYTES for step in tree.steps if _reads_twice(step)):
            return "they are large by themselves"
        joined = [pack for pack in tree.packs.values() if isinstance(pack, Joined)]
        if self._in_narrow_recurrence(tree, joined, readers):
            return (
                "each is done with the step of a recurrence that it belongs to, while its narrow rows are in registers"
            )
        if self._in_one_pass(tree, readers):
            return "each is one pass over narrow rows, with weights of its own that stay in registers"
        if not joined:
            computes = any(not _is_free(step.nodes[0]) for step in tree.steps)
            return None if computes or not any(map(_by_index, tree.packs.values())) else ""
        products = [step for step in tree.steps if step.nodes[0].op.has(Trait.CONTRACTION)]
        if products and all(_flops(step.nodes[0]) < LARGE_STEP for step in products):
            return None
        return "; ".join(dict.fromkeys(pack.reason for pack in joined if pack.reason))

    def _in_narrow_recurrence(self, tree: Tree, joined: Sequence[Joined], readers: Sequence[Node]) -> bool:
        """Whether lanes are read by, or made of, steps that wait for each other, and backends would put both into one pass over rows."""
        users = [u for v in tree.lanes for u in self.graph.users.get(v, ()) if u not in readers]
        waiting = [[u.outputs[0] for u in users], *(pack.values for pack in joined)]
        around = {
            n for values in waiting if not self.level(values) for v in values if (n := self.graph.producer.get(v))
        }
        return bool(around) and all(map(self._by_narrow_rows, (*around, *tree.nodes)))

    def _in_one_pass(self, tree: Tree, readers: Sequence[Node]) -> bool:
        """Whether backends would make each lane one pass over rows, where together products of each lane's own weights are apart.

        What is summed up over the lanes is another matter: it becomes one product.
        """
        products = [step for step in tree.steps if step.nodes[0].op.has(Trait.CONTRACTION)]
        apart = not readers or readers[0].name == "concat"
        chained = len(products) > 1 and any(map(_reads_twice, products))
        return apart and chained and all(rows_of(node) is not None for node in tree.nodes)

    def _by_narrow_rows(self, node: Node) -> bool:
        """Whether it can be part of a pass over rows, and is no epilogue of a product that can not."""
        while rows_of(node) is not None:
            before = [
                n for v in node.inputs if v.type == node.output.type and (n := self.graph.producer.get(v)) is not None
            ]
            if not node.op.has(Trait.ELEMENTWISE) or not before:
                return True
            node = max(before, key=lambda n: self.height(n.outputs[0]))
        return False


def heights(graph: Graph) -> Mapping[Value, int]:
    """How many nodes the longest way from an input or a constant to a value has."""
    found: dict[Value, int] = {}
    for node in graph.nodes:
        height = max((found.get(v, 0) for v in node.inputs), default=0) + (not node.is_constant)
        found.update(dict.fromkeys(node.outputs, height))
    return found


def operands_of(pack: Pack) -> tuple[Values, ...]:
    """The packs that a pack is made of."""
    match pack:
        case Step():
            return pack.operands
        case Pick():
            return (pack.operand,)
        case Reordered():
            return (pack.lanes,)
        case _:
            return ()


def _is_free(node: Node) -> bool:
    """Whether it only says where elements are."""
    return node.name in ("slice", "reshape")


def _axis(node: Node) -> int:
    """The axis of a slice."""
    return int(node.attrs["axis"] % node.output.type.rank)


def _starts(nodes: Sequence[Node]) -> tuple[int, ...] | None:
    """Where slices of equal extent along the same axis start, if that is known."""
    first = nodes[0]
    axis = _axis(first)
    same = all(_axis(n) == axis and n.attrs["step"] == first.attrs["step"] for n in nodes)
    starts = tuple(n.attrs["start"] for n in nodes)
    known = isinstance(first.output.type.shape[axis], int) and all(isinstance(s, int) for s in starts)
    return starts if known and same else None


def _cut(nodes: Sequence[Node]) -> Cut | None:
    first = nodes[0]
    if first.name != "slice" or any(n.inputs[0] is not first.inputs[0] for n in nodes):
        return None
    starts, width = _starts(nodes), first.output.type.shape[_axis(first)]
    if starts is None or not isinstance(width, int):
        return None
    return Cut(first.inputs[0], _axis(first), starts, width, first.attrs["step"])


def _are_picks(nodes: Sequence[Node]) -> bool:
    """Whether slices are at different places, all of them known, of tensors whose elements can be numbered."""
    first = nodes[0]
    starts = _starts(nodes) if first.name == "slice" else None
    numbered = starts is not None and isinstance(first.inputs[0].type.shape[_axis(first)], int)
    return numbered and len(set(starts or ())) > 1


def _by_index(pack: Pack) -> bool:
    """Whether elements are picked one by one."""
    return isinstance(pack, (Pick, Reordered)) or (
        isinstance(pack, Cut) and not (pack.side_by_side or pack.interleaved)
    )


def _reads_twice(step: Step) -> bool:
    """Whether an op could find what it reads in a cache, but not in registers: it is in no loop with what makes it."""
    op = step.nodes[0].op
    if op.has(Trait.CONTRACTION):
        return sum(any(v is not column[0] for v in column) for column in step.operands) > 1
    return op.has(Trait.NORMALISATION | Trait.REDUCTION)


def _bytes(step: Step) -> int:
    """Read and written in one lane."""
    return _nominal(step.nodes[0].cost.bytes)


def _flops(node: Node) -> int:
    return _nominal(node.cost.flops)


def _nominal(dim: Dim) -> int:
    return dim if isinstance(dim, int) else evaluate(dim, dict.fromkeys(symbols_of(dim), NOMINAL_EXTENT))
