"""One sweep of the pass: chooses trees of equal steps in a graph, and writes the graph in which each is one."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlec.ir import Graph, GraphBuilder, Location, Node, OpDef, Trait, Value, lookup
from mlec.ir.printer import print_node, value_names
from mlec.passes.vectorize.emit import RULE, Emission
from mlec.passes.vectorize.moves import Piece, join
from mlec.passes.vectorize.plan import Cut, Joined, Pack, Search, Shared, Step, Tree, Values, operands_of
from mlec.passes.vectorize.roots import Root, find_equal, find_roots
from mlec.pipeline import Remark

ROUNDED = Trait.CONTRACTION | Trait.NORMALISATION
EXACT_REDUCTIONS = frozenset({"max", "min", "any", "all", "argmax", "argmin"})


@dataclass(frozen=True, eq=False)
class _Joint:
    """A root and the trees of its parts, each with the indices of the parts whose place it takes."""

    root: Root
    trees: tuple[tuple[tuple[int, ...], Tree], ...]


@dataclass(frozen=True, eq=False)
class _Lane:
    """What one of the nodes of a step gave, where it is read outside the trees."""

    step: Step
    output: int
    index: int


_Unit = Node | Values | _Joint | _Lane
"""What is written at once: a node that stays, a pack, what joins packs, one value of a pack."""


class Sweep:
    """Trees in one graph, and the graph with them.

    Attributes:
        trees: those that were chosen, and where.
        missed: what looked like one and was not.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.trees: dict[Tree, Node] = {}
        self.missed: list[Remark] = []
        self._search = Search(graph)
        self._names = value_names(graph)
        self._units: dict[Value, _Unit] = {}  # of values that their nodes do not give any more
        self._reductions: dict[Tree, str] = {}

    # -- choosing ------------------------------------------------------------------------------------------------

    def take_joined(self, least: int) -> None:
        """Steps whose results are put together."""
        for root in find_roots(self.graph, least):
            if not self._search.taken.isdisjoint(root.nodes):
                continue
            found = []
            for group in root.groups:
                tree = self._take(tuple(root.parts[i] for i in group), root.node, root.nodes)
                if tree is not None:
                    self._reductions[tree] = root.reduction
                    found.append((group, tree))
            if found:
                self._search.taken.update(root.nodes)
                self._units[root.node.output] = _Joint(root, tuple(found))

    def take_equal(self, least: int) -> None:
        """Steps that do the same with other parts of the same tensors, whoever reads them."""
        for values in find_equal(self.graph, self._search, least):
            free = tuple(v for v in values if self.graph.producer[v] not in self._search.taken)
            if len(free) >= least:
                self._take(free, self.graph.producer[free[0]])

    def _take(self, lanes: Values, at: Node, readers: Sequence[Node] = ()) -> Tree | None:
        tree = self._search.grow(lanes, readers)
        if tree is None:
            return None
        refused = self._search.pays(tree, readers)
        if refused is not None:
            if refused and at.loc.rule != RULE:
                text = f"{len(lanes)} steps that look alike stay apart, as {refused}: {self._text(at)}"
                self.missed.append(Remark("missed", text, at.loc, RULE))
            return None
        self._search.take(tree)
        self.trees[tree] = at
        for step in tree.steps:
            if tree.nodes.issuperset(step.nodes):
                for index, node in enumerate(step.nodes):
                    self._units.update({v: _Lane(step, i, index) for i, v in enumerate(node.outputs)})
        return tree

    # -- writing -------------------------------------------------------------------------------------------------

    def rewritten(self) -> tuple[Graph, list[Remark]]:
        """The graph with the trees, and what was done."""
        b = GraphBuilder(self.graph.name)
        b.adopt_interface(self.graph)
        emission = Emission(b, self.graph, self._search.packs)
        written: set[_Unit] = set()
        kept = (node for node in self.graph.nodes if node not in self._search.taken)
        for start in (*kept, *self._units_of(self.graph.outputs)):
            waiting: list[_Unit] = [start]
            while waiting:
                unit = waiting[-1]
                missing = [] if unit in written else [u for u in self._needs(unit) if u not in written]
                waiting += reversed(missing)
                if not missing:
                    waiting.pop()
                    if unit not in written:
                        written.add(unit)
                        self._write(emission, unit)
        graph = b.finish(self.graph.outputs, signature=self.graph.given_signature)
        return graph, [self._applied(tree, at, emission) for tree, at in self.trees.items()]

    def _units_of(self, values: Iterable[Value]) -> list[_Unit]:
        found = (self._units.get(v) or self.graph.producer.get(v) for v in values)
        return [unit for unit in found if unit is not None]

    def _needs(self, unit: _Unit) -> list[_Unit]:
        match unit:
            case Node():
                return self._units_of(unit.inputs)
            case _Lane():
                return [tuple(n.outputs[unit.step.output] for n in unit.step.nodes)]
            case _Joint():
                inside = {i for group, _ in unit.trees for i in group}
                rest = (v for i, v in enumerate(unit.root.parts) if i not in inside)
                return [*(tree.lanes for _, tree in unit.trees), *self._units_of(rest)]
            case _:
                pack = self._search.packs[unit]
                return [*operands_of(pack), *self._units_of(_read_by(pack))]

    def _write(self, emission: Emission, unit: _Unit) -> None:
        b = emission.b
        match unit:
            case Node():
                b.keep(unit)
            case _Lane():
                node = unit.step.nodes[unit.index]
                with b.at(Location.merged([node.loc], RULE)):
                    b.replace(node.outputs[unit.output], emission.lane(unit.step.nodes, unit.output, unit.index))
            case _Joint():
                with b.at(Location.merged([n.loc for n in unit.root.nodes], RULE)):
                    b.replace(unit.root.node.output, _joint(emission, unit))
            case _:
                emission.emit(unit)

    # -- telling -------------------------------------------------------------------------------------------------

    def _text(self, node: Node) -> str:
        text = print_node(node, self._names).splitlines()[0]
        return text if len(text) <= 100 else f"{text[:97]}..."

    def _applied(self, tree: Tree, at: Node, emission: Emission) -> Remark:
        computing = [step for step in tree.steps if tree.nodes.issuperset(step.nodes)]
        ops = dict.fromkeys(step.nodes[0].name for step in computing) or {"slice": None}
        names = [*ops, self._reductions.get(tree, "")]
        rounded = any(lookup(name).has(ROUNDED) or _sums(lookup(name)) for name in names if name)
        before = sum(len(step.nodes) for step in tree.steps) + len(tree.lanes)
        text = (
            f"{len(tree.lanes)} equal steps ({', '.join(ops)}) became one: {before} nodes to "
            f"{sum(emission.made.get(lanes, 0) for lanes in tree.packs)}, "
            f"{'sums may round otherwise' if rounded else 'bit for bit'}: {self._text(at)}"
        )
        return Remark("applied", text, at.loc, RULE)


def _read_by(pack: Pack) -> tuple[Value, ...]:
    """The values that a pack reads by itself."""
    match pack:
        case Shared(value):
            return (value,)
        case Cut():
            return (pack.source,)
        case Joined(values):
            return values
        case _:
            return ()


def _joint(emission: Emission, joint: _Joint) -> Value:
    """The result of a root, of which some parts are made together."""
    b, node, parts = emission.b, joint.root.node, joint.root.parts
    if joint.root.reduction:
        terms = dict(enumerate(parts))
        for group, tree in joint.trees:
            for i in group[1:]:
                del terms[i]
            batch, lanes = emission.batch(tree.lanes), emission.lanes(tree.lanes)
            axis = lanes.axis or 0
            terms[group[0]] = batch(joint.root.reduction, batch.at(lanes, axis), axes=(axis,))
        return functools.reduce(lambda total, term: b(node.name, total, term), terms.values())
    axis = node.attrs["axis"] % node.output.type.rank
    pieces = [Piece(part, 0, part.type.shape[axis]) for part in parts]
    for group, tree in joint.trees:
        folded, extent = emission.batch(tree.lanes).folded(emission.lanes(tree.lanes), axis), pieces[group[0]].stop
        for lane, i in enumerate(group):
            pieces[i] = Piece(folded, lane * extent, (lane + 1) * extent)
    return join(b, pieces, axis)


def _sums(op: OpDef) -> bool:
    return op.name == "cumsum" or (op.has(Trait.REDUCTION) and op.name not in EXACT_REDUCTIONS)
