"""Where finite precision can go wrong: candidates for findings, from the patterns of stable rewrites and from intervals.

A candidate costs next to nothing and says little by itself; `witnesses` looks for an input on which it matters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mlec.ir import DType, Graph, Node, Value
from mlec.ir.op import Array
from mlec.ir.pattern import match
from mlec.passes.stability.intervals import Interval
from mlec.passes.stability.rewrites import RULES, StableRule

SMALL = 1 / 64
"""Of a difference beside both numbers, from which on digits that are lost matter."""

Kind = Literal["formula", "undefined", "overflow", "underflow", "cancellation", "wraps", "by zero"]


@dataclass(frozen=True, eq=False)
class Hazard:
    """A node, or a few of them, that may lose the result.

    Attributes:
        rule: name of the finding.
        kind: what may happen: a formula with a stable spelling goes wrong; the node is undefined, overflows, underflows or cancels for
            finite operands; an integer wraps around, or is divided by zero.
        node: where the result comes out.
        danger: what goes wrong, one sentence.
        leaves: the values that it is computed from.
        stable: the rewrite, if there is one.
    """

    rule: str
    kind: Kind
    node: Node
    danger: str
    leaves: tuple[Value, ...]
    stable: StableRule | None = None


def find_hazards(graph: Graph, known: Mapping[Value, Interval]) -> list[Hazard]:
    """All candidates of a graph, in its order; what belongs to a formula as a whole is not named again."""
    formulas, inner = _formulas(graph)
    found = []
    for node in graph.nodes:
        if node in formulas:
            found.append(formulas[node])
        elif node not in inner and not node.is_constant and (hazard := _hazard(node, graph, known)) is not None:
            found.append(hazard)
    return found


def _formulas(graph: Graph) -> tuple[dict[Node, Hazard], set[Node]]:
    """Matches of stable rewrites by the node of their result, and the nodes that serve nothing but these."""
    found: dict[Node, Hazard] = {}
    inner: set[Node] = set()
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in reversed(graph.nodes):  # outer formulas first: log(softmax(x)) is not also a softmax
        if node in inner or node.is_constant:
            continue
        for rule in RULES:
            m = match(rule.pattern, node, graph)
            if m is None or rule.check(m, graph) is not None:
                continue
            bound = {v for v in m.values.values() if graph.constant_value(v) is None}
            found[node] = Hazard(rule.finding, "formula", node, rule.danger, tuple(bound), rule)
            for part in sorted(set(m.matched) - {node}, key=position.__getitem__, reverse=True):
                if set(graph.users.get(part.output, ())) <= inner | {node} and part.output not in graph.outputs:
                    inner.add(part)
            break
    return found, inner


# -- hazards of single ops -----------------------------------------------------------------------------------------------


def _hazard(node: Node, graph: Graph, known: Mapping[Value, Interval]) -> Hazard | None:
    operands = [known[v] for v in node.inputs]
    dtype = node.outputs[0].type.dtype
    leaves = tuple(v for v in node.inputs if graph.constant_value(v) is None)
    if not leaves:
        return None
    if dtype.is_int:
        return _of_integers(node, dtype, known, leaves)
    if not dtype.is_float:
        return None

    def hazard(rule: str, kind: Kind, danger: str) -> Hazard:
        return Hazard(rule, kind, node, danger, leaves)

    largest = _largest(dtype)
    result = known[node.outputs[0]]
    if node.name in ("div", "floordiv", "mod", "rsqrt") and 0.0 in operands[-1]:
        producer = graph.producer.get(node.inputs[-1])
        if node.name == "rsqrt" or (producer is not None and producer.name == "sqrt"):
            return hazard("sqrt-near-zero", "undefined", "a square root that can be 0 is divided by")
        return hazard("division-by-zero", "undefined", "the divisor can be 0")
    if node.name == "sqrt" and operands[0].lo < 0:
        return hazard("sqrt-near-zero", "undefined", "what the root is taken of can come out below 0")
    if node.name == "log" and operands[0].lo <= 0:
        return hazard("log-near-zero", "undefined", "what the logarithm is taken of can be 0 or below")
    if node.name == "log1p" and operands[0].lo <= -1:
        return hazard("log-near-zero", "undefined", "what the logarithm is taken of can be 0 or below")
    if node.name in ("exp", "expm1", "pow") and result.magnitude > largest:
        return hazard("exp-overflow", "overflow", f"{node.name} can exceed the largest {dtype.numpy} ({largest:.3g})")
    if dtype is DType.F16 and result.magnitude > largest:
        return hazard("fp16-overflow", "overflow", f"{node.name} can exceed the largest float16 ({largest:.6g})")
    if dtype is DType.F16 and node.name in ("mul", "div", "exp", "pow", "mean", "softmax"):
        return hazard("fp16-underflow", "underflow", "results below 6e-8 are 0 in float16, below 6e-5 they lose digits")
    if node.name in ("sub", "add") and _cancels(node.name, operands):
        return hazard(
            "cancellation", "cancellation", "two rounded numbers cancel: of their difference few digits are right"
        )
    return None


_EXACT_INTEGERS = ("add", "sub", "mul", "sum", "cumsum", "prod", "matmul", "cast", "neg", "abs")


def _of_integers(node: Node, dtype: DType, known: Mapping[Value, Interval], leaves: tuple[Value, ...]) -> Hazard | None:
    if node.name in ("floordiv", "mod") and 0.0 in known[node.inputs[1]]:
        danger = "the divisor can be 0; the result is 0 then, where torch raises an error"
        return Hazard("division-by-zero", "by zero", node, danger, leaves)
    limits, result = np.iinfo(dtype.numpy), known[node.outputs[0]]
    if node.name not in _EXACT_INTEGERS or (limits.min <= result.lo and result.hi <= limits.max):
        return None
    danger = f"the result can leave {dtype.numpy} ({limits.min} to {limits.max}) and wraps around"
    return Hazard("integer-overflow", "wraps", node, danger, leaves)


def _largest(dtype: DType) -> float:
    if dtype is DType.BF16:
        return 3.3895e38
    return float(np.finfo(dtype.numpy).max)


def _cancels(op: str, operands: Sequence[Interval]) -> bool:
    """Whether the result can be small beside both operands."""
    a, b = operands[0], -operands[1] if op == "add" else operands[1]
    apart, least = max(a.lo, b.lo) - min(a.hi, b.hi), min(a.magnitude, b.magnitude)
    return least > 0 and apart <= SMALL * least


def exact_integers(node: Node, operands: Sequence[Array]) -> Array:
    """What an op on integers (or a cast to them) would give if they had no bounds."""
    wide = [np.asarray(x, np.longdouble) for x in operands]
    if node.name == "cast":
        return np.asarray(np.trunc(wide[0]))
    return np.asarray(node.op.reference(*wide, **node.attrs))
