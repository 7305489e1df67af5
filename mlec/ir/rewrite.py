"""The rewrite driver: applies rules in sweeps until nothing changes, and remembers what it did and why it did not.

A sweep walks the nodes in order and copies them into a new graph. Rules match on the graph as it was when the sweep began, so a
match can never see a half-changed graph; what a rule returns takes the place of the node's results for all later nodes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mlec.errors import PassError
from mlec.ir.builder import GraphBuilder
from mlec.ir.graph import Graph, Node, Value
from mlec.ir.pattern import AnyOf, Match, P, match
from mlec.ir.printer import print_node, value_names
from mlec.ir.types import Location

MAX_SWEEPS = 50


@dataclass(frozen=True)
class Miss:
    """A rule's pattern fitted, but the rewrite does not apply: why not. Without a reason it is nothing worth telling."""

    reason: str = ""


@dataclass(frozen=True)
class Edit:
    """One application (``applied``) or near miss of a rule."""

    rule: str
    applied: bool
    message: str
    loc: Location


class Rule(ABC):
    """One rewrite. The docstring is the rule in one line: ops before ``->`` ops after.

    Subclasses set ``pattern``, may refuse a match in `check`, and build the replacement in `rewrite`.

    Attributes:
        rounds_once: one op takes the place of several. Each of those rounds its result to the element type, which in 16 bits is far more
            than any tolerance: the rule then declines results of 16 bits.
    """

    pattern: ClassVar[P | AnyOf]
    rounds_once: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return type(self).__name__

    def check(self, m: Match, graph: Graph) -> Miss | None:
        """None if the rewrite applies, else the reason why it does not."""
        return None

    @abstractmethod
    def rewrite(self, b: GraphBuilder, m: Match, graph: Graph) -> Value | Sequence[Value]:
        """Builds the replacement of the matched node's results. Returning a result of the old node means: leave it."""


def apply_rules(graph: Graph, rules: Sequence[Rule]) -> tuple[Graph, list[Edit]]:
    """Rewrites to fixpoint.

    Returns:
        The new graph (the same object if nothing applied) and the edits.

    Raises:
        PassError: naming the rule, when one changes the type of a value or they never come to an end.
    """
    edits: list[Edit] = []
    for _ in range(MAX_SWEEPS):
        graph, done, missed = _sweep(graph, rules)
        edits += done
        if not done:
            return graph, [*edits, *missed]
    names = ", ".join(sorted({edit.rule for edit in done}))
    raise PassError(
        f"rules still apply after {MAX_SWEEPS} sweeps: {names}", code="E_RULE_LOOP", hint="do they undo each other?"
    )


def _sweep(graph: Graph, rules: Sequence[Rule]) -> tuple[Graph, list[Edit], list[Edit]]:
    b = GraphBuilder(graph.name)
    b.adopt_interface(graph)
    names = value_names(graph)
    done: list[Edit] = []
    missed: list[Edit] = []
    for node in graph.nodes:
        if not _rewritten(b, node, graph, rules, names, done, missed):
            b.keep(node)
    if not done:
        return graph, done, missed
    return b.finish(graph.outputs, signature=graph.given_signature), done, missed


def _rewritten(
    b: GraphBuilder,
    node: Node,
    graph: Graph,
    rules: Sequence[Rule],
    names: dict[Value, str],
    done: list[Edit],
    missed: list[Edit],
) -> bool:
    for rule in rules:
        m = match(rule.pattern, node, graph)
        if m is None:
            continue
        miss = rule.check(m, graph) or _in_16_bits(rule, node)
        if miss is not None:
            if miss.reason:
                missed.append(Edit(rule.name, False, f"{miss.reason}: {_summary(node, names)}", node.loc))
            continue
        with b.at(Location.merged((n.loc for n in m.matched), rule.name)):
            result = rule.rewrite(b, m, graph)
        results = (result,) if isinstance(result, Value) else tuple(result)
        for old, new in zip(node.outputs, results, strict=True):
            if new.type != old.type:
                raise PassError(
                    f"rule {rule.name} turns {old.type} into {new.type}",
                    code="E_RULE_TYPE",
                    loc=node.loc,
                    hint="let the rule keep the type, e.g. by a cast or a reshape",
                )
            b.replace(old, new)
        done.append(
            Edit(rule.name, True, f"{(rule.__doc__ or rule.name).splitlines()[0]} at {_summary(node, names)}", node.loc)
        )
        return True
    return False


def _in_16_bits(rule: Rule, node: Node) -> Miss | None:
    """Why a rule that leaves out roundings does not apply."""
    kind = node.outputs[0].type.dtype
    if not (rule.rounds_once and kind.is_float and kind.bits < 32):
        return None
    return Miss(f"each of its steps is rounded to {kind}, and one op for all of them would round once")


def _summary(node: Node, names: dict[Value, str]) -> str:
    text = print_node(node, names).split("\n")[0]
    return text if len(text) <= 120 else text[:117] + "..."
