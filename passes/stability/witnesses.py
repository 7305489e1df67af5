"""Inputs that show a finding: found by trying probes, executed as the graph states it and in a wider precision.

What is right is what the graph with every stable rewrite gives in the wider precision. A result counts as wrong if it is not finite, or if
it has lost digits although the model does not ask for that: either a stable rewrite mends it, or half of the digits are lost while moving
the inputs by a few units in the last place moves the right result far less. So a badly conditioned model, whose results no program could
get right, is not blamed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from mlec.ir import Graph, Node, Value, apply_rules, extract, run_graph, trace_graph
from mlec.ir.op import Array
from mlec.passes.stability.consequences import Consequences, positions
from mlec.passes.stability.hazards import Hazard, exact_integers
from mlec.passes.stability.probes import Probe
from mlec.passes.stability.wide import WideGraph

Kind = Literal["not finite", "out of range", "undefined", "inaccurate", "different", "wraps", "by zero"]
_ORDER: tuple[Kind, ...] = ("inaccurate", "different", "undefined", "out of range", "not finite")

INTEGERS = ("wraps", "by zero")
"""Hazards that are what an integer comes out as, whatever follows from it."""

BLAME = 64.0
"""By how many times the error must exceed what `MOVED` units in the last place of the inputs do to the result."""
MOVED = 4.0


@dataclass(frozen=True)
class Effect:
    """What is wrong with a result.

    Attributes:
        kind: "not finite" where the right result is; "out of range" where that exceeds the element type; "undefined" where there is none;
            "inaccurate" digits; "different" integers; "wraps" and "by zero" of an integer itself.
        output: position of the result.
        difference: largest absolute one of finite numbers.
        got, right: at the worst element.
    """

    kind: Kind
    output: int
    difference: float
    got: float
    right: float


@dataclass(frozen=True)
class Witness:
    """A probe on which a hazard shows in an output (of an integer: in the value itself).

    Attributes:
        probe: the inputs.
        effect: what they do to the outputs.
        error: relative to the output's scale, as the graph is; infinite where a result is not finite.
        error_after: the same with the stable rewrites; None where there are none.
        is_slight: at most half of the digits are lost, or the error is no more than the rounding of numbers like the inputs, or like 1.
    """

    probe: Probe
    effect: Effect
    error: float
    error_after: float | None = None
    is_slight: bool = False


class _Trial:
    """One probe, executed: each run of the whole graph is made at most once, however many hazards look at it.

    Attributes:
        values: every value, as the graph states it.
        right: the right outputs.
    """

    def __init__(self, search: Search, probe: Probe) -> None:
        self.search, self.probe = search, probe
        self.values = trace_graph(search.graph, probe.arrays)
        self.right = search.right.run(probe.arrays)
        self._moved: dict[int, float] = {}

    @cached_property
    def mended(self) -> list[Array] | None:
        """The outputs with every stable rewrite, as its graph states them; None without one."""
        search = self.search
        return run_graph(search.stable, self.probe.arrays) if search.stable is not search.graph else None

    @cached_property
    def exact(self) -> Mapping[Value, Array]:
        """Every value in the wide precision."""
        return self.search.wide.trace(self.probe.arrays)

    @cached_property
    def consequences(self) -> Consequences:
        return Consequences(self.search.wide, self.search.order, self.probe.arrays, self.exact)

    @cached_property
    def nudged(self) -> list[list[Array]]:
        """The right outputs for inputs that are moved a little, in a few directions."""
        rng = np.random.default_rng(0)
        return [
            self.search.right.run([self.search.nudged(array, signs, rng) for array in self.probe.arrays])
            for signs in ("up", "down", "random", "random")
        ]

    def moved(self, output: int) -> float:
        """How far moving the inputs a little moves the right result of an output."""
        if output not in self._moved:
            right = self.right[output]
            with np.errstate(invalid="ignore", over="ignore"):
                changes = [np.abs(results[output] - right) for results in self.nudged]
            self._moved[output] = max(
                float(np.max(np.where(np.isnan(change), np.inf, change), initial=0)) for change in changes
            )
        return self._moved[output]


class Search:
    """Looks for witnesses in one graph.

    Args:
        graph: as it will be compiled.
        stable: the same with every stable rewrite.
        dtype: the wide one.
        seconds: how long what hazards do to the outputs may be followed, by an estimate.
        costs: how many seconds each node takes by that, in both precisions together.

    Attributes:
        followed: nodes that were evaluated to see what hazards do to the outputs.
        unjudged: hazards that show somewhere, and of which that could not be followed any more.
    """

    def __init__(
        self,
        graph: Graph,
        stable: Graph,
        dtype: np.dtype[Any],
        seconds: float,
        costs: Mapping[Node, float],
    ) -> None:
        self.graph, self.stable = graph, stable
        self.order = positions(graph)
        self.seconds, self._costs = seconds, costs
        self.followed = 0
        self.unjudged: set[Hazard] = set()
        self._tries: Counter[Hazard] = Counter()
        self.wide = WideGraph(graph, dtype)
        self.right = WideGraph(stable, dtype) if stable is not graph else self.wide
        kinds = {v.type.dtype for n in graph.compute_nodes for v in n.outputs} | {v.type.dtype for v in graph.inputs}
        self.eps = max((kind.eps for kind in kinds if kind.is_float), default=0.0)
        self._integers: Sequence[Hazard] = ()
        self._formulas: dict[Hazard, tuple[Graph, WideGraph]] = {}
        self._reached = _outputs_of_nodes(graph)

    def find(self, hazards: Sequence[Hazard], tried: Iterable[Probe]) -> dict[Hazard, Witness]:
        """A witness of each hazard that has one: the first that is not slight, or else the first."""
        found: dict[Hazard, Witness] = {}
        self._integers = [hazard for hazard in hazards if hazard.kind in INTEGERS]
        for probe in tried:
            pending = [hazard for hazard in hazards if hazard not in found or found[hazard].is_slight]
            if not pending:
                break
            for hazard, witness in self._witnesses(pending, probe).items():
                if hazard not in found or not witness.is_slight:
                    found[hazard] = witness
        return found

    def _witnesses(self, hazards: Sequence[Hazard], probe: Probe) -> dict[Hazard, Witness]:
        """The hazards that show on one probe."""
        trial = _Trial(self, probe)
        values = trial.values
        found = {h: w for h, w in _of_integers(self.graph, self._integers, probe, values).items() if h in hazards}
        if self.compared([values[v] for v in self.graph.outputs], trial.right) is None:
            return found
        shown = [h for h in hazards if self._shows(h, trial)]
        for hazard in self._in_turn(shown):
            if self.seconds <= 0:
                self.unjudged.add(hazard)
                continue
            self._tries[hazard] += 1
            witness = self._witness(hazard, trial)
            if witness is not None:
                found[hazard] = witness
        return found

    def _in_turn(self, hazards: Sequence[Hazard]) -> list[Hazard]:
        """What was in vain before comes last, and what is rarely real; each rule has its turn before the second place of another."""
        places: Counter[str] = Counter()
        turns = {}
        for hazard in hazards:
            turns[hazard] = self._tries[hazard], hazard.kind == "cancellation", places[hazard.rule]
            places[hazard.rule] += 1
        return sorted(hazards, key=turns.__getitem__)

    def _witness(self, hazard: Hazard, trial: _Trial) -> Witness | None:
        """What becomes of the outputs if this hazard alone goes wrong, and all else is exact."""
        probe, values, right, mended = trial.probe, trial.values, trial.right, trial.mended
        wrong = self._outputs_with(hazard, trial)
        effects = []
        for i, value in enumerate(self.graph.outputs):
            if i in self._reached[hazard.node]:
                with np.errstate(over="ignore", invalid="ignore"):
                    effects.append(self._effect(i, wrong[value].astype(value.type.dtype.numpy), right[i]))
        effect = _worst(effects)
        if effect is None:
            return None
        at = effect.output
        result = values[self.graph.outputs[at]]
        together = self._effect(at, result, right[at])
        if together is None:
            return None
        if together.kind == effect.kind:
            effect = together  # as it comes out when the graph is run
        error, after = relative_error(result, right[at]), math.inf
        if effect.kind == "undefined":
            error = math.inf
        elif mended is not None:
            after = relative_error(mended[at], right[at])
        is_mended = math.isfinite(after) and after * 16 <= error
        if is_mended != (
            hazard.stable is not None
        ):  # it is what the rewrite of another one mends, or nothing to do with it
            return None
        few = error <= math.sqrt(self.eps)
        if (
            effect.kind == "inaccurate"
            and not is_mended
            and (few or effect.difference <= BLAME * trial.moved(effect.output))
        ):
            return None
        slight = effect.kind == "inaccurate" and (few if is_mended else self._is_slight(effect, probe))
        return Witness(probe, effect, error, after if is_mended else None, slight)

    def _outputs_with(self, hazard: Hazard, trial: _Trial) -> Mapping[Value, Array]:
        """The exact outputs, but for what follows from the value of the hazard."""
        before = len(trial.consequences.evaluated)
        changed = trial.consequences.of({value: trial.values[value] for value in hazard.node.outputs})
        evaluated = trial.consequences.evaluated[before:]
        self.followed += len(evaluated)
        self.seconds -= sum(self._costs[node] for node in evaluated) / 2
        return {value: changed.get(value, trial.exact[value]) for value in self.graph.outputs}

    def _is_slight(self, effect: Effect, probe: Probe) -> bool:
        size = max((float(np.max(np.abs(a), initial=1.0)) for a in probe.arrays if a.dtype.kind in "fV"), default=1.0)
        return effect.difference <= MOVED * self.eps * size

    def compared(self, results: Sequence[Array], right: Sequence[Array]) -> Effect | None:
        """The worst that is wrong with the outputs, or None."""
        return _worst([self._effect(i, a, b) for i, (a, b) in enumerate(zip(results, right, strict=True))])

    def _effect(self, output: int, got: Array, right: Array) -> Effect | None:
        if got.dtype.kind not in "fV":
            wrong = np.flatnonzero(got != right)
            return _effect_at("different", output, got, right, wrong[0]) if wrong.size else None
        limits = _finfo(got.dtype)
        with np.errstate(invalid="ignore", over="ignore"):
            numbers, finite = got.astype(right.dtype), np.isfinite(right)
            lost = ~np.isfinite(numbers)
            kinds: tuple[tuple[Kind, Array], ...] = (
                ("not finite", lost & finite & (np.abs(right) <= limits.max)),
                ("out of range", lost & finite),
                ("undefined", lost),
            )
            for kind, places in kinds:
                if places.any():
                    return _effect_at(kind, output, got, right, int(np.flatnonzero(places)[0]))
            difference = np.where(finite, np.abs(numbers - right), 0)
            scale = np.max(np.abs(right), initial=0, where=finite)
        if not got.size or scale <= 8 * limits.tiny or difference.max() <= BLAME * self.eps * scale:
            return None
        return _effect_at("inaccurate", output, got, right, int(difference.argmax()))

    # -- whose fault it is ---------------------------------------------------------------------------------------------

    def _shows(self, hazard: Hazard, trial: _Trial) -> bool:
        """Whether the hazard itself loses the result here, and not already what it is computed from."""
        values = trial.values
        if hazard.kind in INTEGERS:
            return False
        if hazard.kind == "formula":
            by_hand, stable = self._formula(hazard)
            leaves = [values[v] for v in hazard.leaves]
            return self.compared(run_graph(by_hand, leaves), stable.run(leaves)) is not None
        node, result = hazard.node, values[hazard.node.outputs[0]]
        operands = [values[v] for v in node.inputs]
        if hazard.kind == "cancellation":
            exact = trial.exact
            before = max((self._distance(values[v], exact[v]) for v in hazard.leaves), default=0.0)
            after = self._distance(result, exact[node.outputs[0]])
            return before <= BLAME * self.eps < after
        if not all(_is_finite(operand) for operand in operands):
            return False
        if hazard.kind == "underflow":
            exactly = self.wide.evaluated(node, [self.wide.widened(x) for x in operands], {})[0]
            return bool(np.any((result == 0) & (exactly != 0)))
        return not _is_finite(result)

    def _formula(self, hazard: Hazard) -> tuple[Graph, WideGraph]:
        """The formula alone: by hand, and its stable spelling in the wide precision."""
        if hazard not in self._formulas:
            assert hazard.stable is not None
            by_hand = extract(self.graph, hazard.leaves, hazard.node.outputs, "formula")
            stable, _ = apply_rules(by_hand, [hazard.stable])
            self._formulas[hazard] = by_hand, WideGraph(stable, self.wide.dtype)
        return self._formulas[hazard]

    def _distance(self, got: Array, right: Array) -> float:
        """Largest difference relative to the largest magnitude; infinite if one is not finite."""
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            difference = np.max(np.abs(got.astype(right.dtype) - right), initial=0)
            scale = np.max(np.abs(right), initial=0)
        if not difference:
            return 0.0
        return float(difference / scale) if scale and np.isfinite(difference) else math.inf

    def nudged(self, array: Array, signs: str, rng: np.random.Generator) -> Array:
        """An input, moved by a few units in the last place."""
        if array.dtype.kind not in "fV":
            return array
        by = {"up": 1.0, "down": -1.0}.get(signs)
        direction = rng.choice([-1.0, 1.0], array.shape) if by is None else by
        wide = self.wide.widened(array)
        return np.asarray(wide + wide * np.asarray(MOVED * self.eps * direction, wide.dtype))


def relative_error(result: Array, right: Array) -> float:
    """The largest, relative to the largest right magnitude; infinite where a number is lost, 0 of what are no floats."""
    if result.dtype.kind not in "fV" or not result.size:
        return 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        finite = np.isfinite(right)
        if not np.array_equal(np.isfinite(result), finite):
            return math.inf
        difference = np.max(np.abs(result.astype(right.dtype) - right), initial=0, where=finite)
        scale = np.max(np.abs(right), initial=0, where=finite)
    if not difference:
        return 0.0
    return float(difference / scale) if scale else math.inf


def _of_integers(
    graph: Graph, hazards: Sequence[Hazard], probe: Probe, values: Mapping[Value, Array]
) -> dict[Hazard, Witness]:
    """Those of integers that show: whatever is computed from a number that wrapped around, in however many steps, is left out."""
    if not hazards:
        return {}
    found: dict[Hazard, Witness] = {}
    of_nodes = {hazard.node: hazard for hazard in hazards}
    wrong: set[Value] = set()
    for node in graph.nodes:
        if wrong.intersection(node.inputs):
            wrong.update(node.outputs)
        elif (hazard := of_nodes.get(node)) is not None:
            effect = _wrapped(node, values) if hazard.kind == "wraps" else _divided(node, values)
            if effect is not None:
                wrong.update(node.outputs)
                found[hazard] = Witness(probe, effect, effect.difference / max(abs(effect.right), 1.0))
    return found


def _wrapped(node: Node, values: Mapping[Value, Array]) -> Effect | None:
    got = values[node.outputs[0]]
    exact = exact_integers(node, [values[v] for v in node.inputs])
    wrong = np.flatnonzero(got.astype(np.longdouble) != exact)
    return _effect_at("wraps", 0, got, exact, int(wrong[0])) if wrong.size else None


def _divided(node: Node, values: Mapping[Value, Array]) -> Effect | None:
    number, divisor = np.broadcast_arrays(*(values[v] for v in node.inputs))
    wrong = np.flatnonzero(divisor == 0)
    return Effect("by zero", 0, math.inf, 0.0, float(number.flat[wrong[0]])) if wrong.size else None


def _worst(effects: Iterable[Effect | None]) -> Effect | None:
    return max(filter(None, effects), key=lambda e: (_ORDER.index(e.kind), e.difference), default=None)


def _effect_at(kind: Kind, output: int, got: Array, right: Array, place: int) -> Effect:
    a, b = float(got.flat[place]), float(right.flat[place])
    return Effect(kind, output, abs(a - b) if math.isfinite(a) and math.isfinite(b) else math.inf, a, b)


def _outputs_of_nodes(graph: Graph) -> dict[Node, frozenset[int]]:
    """The positions of the outputs that each node has a part in."""
    of_values: dict[Value, frozenset[int]] = {}
    for i, value in enumerate(graph.outputs):
        of_values[value] = of_values.get(value, frozenset()) | {i}
    found = {}
    for node in reversed(graph.nodes):
        found[node] = frozenset().union(*(of_values.get(v, frozenset()) for v in node.outputs))
        for value in node.inputs:
            of_values[value] = of_values.get(value, frozenset()) | found[node]
    return found


def _is_finite(array: Array) -> bool:
    return array.dtype.kind not in "fV" or bool(np.isfinite(array).all())


def _finfo(dtype: np.dtype[Any]) -> Any:
    """Limits of a float type, bfloat16 included."""
    if dtype.kind == "V" or dtype.name == "bfloat16":
        import ml_dtypes

        return ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    return np.finfo(dtype)
