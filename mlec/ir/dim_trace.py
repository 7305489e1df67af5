"""Where extents come from: for errors about two that do not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlec.errors import TypeRuleError
from mlec.ir.dim import Dim, Proof, Ranges, proves_equal, symbols_of
from mlec.ir.graph import Node, Value

MAX_STEPS = 4
"""Nodes that are shown on the way from an operand to where its extent comes from; the last is always shown."""


def origins(
    error: TypeRuleError,
    inputs: Sequence[Value],
    producer: Mapping[Value, Node],
    names: Mapping[Value, str] | None = None,
    ranges: Ranges | None = None,
) -> tuple[str, ...]:
    """Notes for an error of a type rule: what each of the two dims is, node by node back to where it first is one; and whether the two
    can be equal at all.

    Args:
        inputs: the operands that the rule refused.
        producer: the nodes before them.
        names: of values in the text form, else their hints.
    """
    if error.dims is None:
        return ()
    notes: list[str] = []
    started: list[tuple[Value, int]] = []
    for dim in error.dims:
        elsewhere = sorted(inputs, key=[v for v, _ in started].count)  # mostly they are of two operands
        start = next(((v, axis) for v in elsewhere for axis in _axes(v, dim) if (v, axis) not in started), None)
        if start is not None:
            started.append(start)
            notes.append(_way(dim, *start, producer, names or {}))
    return (*notes, _verdict(*error.dims, ranges or {}))


def _axes(value: Value, dim: Dim, near: int = -1) -> list[int]:
    """The axes of an extent, counted from the end; the one at ``near`` first."""
    found = [axis for axis in range(-1, -value.type.rank - 1, -1) if value.type.shape[axis] == dim]
    return sorted(found, key=lambda axis: axis != near)


def _way(dim: Dim, value: Value, axis: int, producer: Mapping[Value, Node], names: Mapping[Value, str]) -> str:
    """``"6, axis 1 of %h: by relu at a.py:3 < matmul at a.py:2 < the constant %w: f32[8, 6]"``"""
    steps: list[str] = []
    start = f"{dim}, axis {axis + value.type.rank} of {_shown(value, names)}"
    while True:
        node = producer.get(value)
        if node is None or node.is_constant:
            kind = "the input" if node is None else "the constant"
            steps.append(f"{kind} {_shown(value, names)}")
            break
        place = f" at {node.loc}" if str(node.loc) else ""
        steps.append(f"{node.name}{place}")
        further = next(((v, a) for v in node.inputs for a in _axes(v, dim, axis)), None)
        if further is None:
            made_of = ", ".join(_shown(v, names) for v in node.inputs)
            steps[-1] += f", which makes it of {made_of}" if made_of else ", which makes it"
            break
        value, axis = further
    if len(steps) > MAX_STEPS:
        steps[MAX_STEPS - 1 : -1] = [f"{len(steps) - MAX_STEPS} more"]
    return f"{start}: from {' < '.join(steps)}"


def _shown(value: Value, names: Mapping[Value, str]) -> str:
    name = names.get(value) or value.hint
    return f"%{name}: {value.type}" if name else str(value.type)


def _verdict(a: Dim, b: Dim, ranges: Ranges) -> str:
    """Whether two dims that should be equal can be."""
    known = {s: ranges[s] for s in sorted(symbols_of(a) | symbols_of(b)) if ranges.get(s, (0, None)) != (0, None)}
    given = "".join(
        f", {s} being {f'at least {low}' if high is None else f'{low} to {high}'}" for s, (low, high) in known.items()
    )
    if proves_equal(a, b, ranges) is Proof.NO:
        return f"{a} is never {b}{given}"
    return f"{a} and {b} may be equal or not{given}: where they always are, give them one name"
