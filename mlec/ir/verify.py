"""Checks a graph against the rules of the IR; collects every violation before it raises."""

from __future__ import annotations

from mlec.errors import IRError, VerifyError
from mlec.ir.dtype import DType
from mlec.ir.graph import Graph, Node, Value
from mlec.ir.op import ConstantRef
from mlec.ir.printer import print_node, value_names

MAX_SHOWN = 7


def verify(graph: Graph, *, after: str = "") -> None:
    """Raises `VerifyError` listing everything that is wrong.

    Rules: each value is bound once and before its use; node types are what the type rules give; attributes fit the schema;
    constants exist, with the type that is stated; bodies in attributes are themselves valid and hold scalar constants only.

    Args:
        graph: what to check.
        after: name of the pass that made it, for the message.
    """
    problems = violations(graph)
    if problems:
        shown = [f"{i + 1}. {text}" for i, text in enumerate(problems[:MAX_SHOWN])]
        if len(problems) > MAX_SHOWN:
            shown.append(f"... and {len(problems) - MAX_SHOWN} more")
        origin = f" after {after}" if after else ""
        raise VerifyError(f"graph @{graph.name} is not valid{origin}: {len(problems)} problem(s)", notes=tuple(shown))


def violations(graph: Graph) -> list[str]:
    """Every violation as one line (with the node that it is about)."""
    names = value_names(graph)
    bound: set[Value] = set()
    problems: list[str] = []

    def bind(value: Value, where: str) -> None:
        if value in bound:
            problems.append(f"%{names[value]} is bound twice, again {where}")
        bound.add(value)

    for value in graph.inputs:
        bind(value, "as an input")
    for node in graph.nodes:
        text = f"in `{print_node(node, {**names, **{v: '<unbound>' for v in node.inputs if v not in names}})}`"
        problems += [f"an operand is used before it is bound {text}" for v in node.inputs if v not in bound]
        for value in node.outputs:
            bind(value, text)
        problems += [
            f"{problem} {text}{f' at {node.loc}' if str(node.loc) else ''}" for problem in _node_problems(node, graph)
        ]
    problems += [f"output {i} is not bound in the graph" for i, value in enumerate(graph.outputs) if value not in bound]
    return problems


def _node_problems(node: Node, graph: Graph) -> list[str]:
    try:
        complete = node.op.complete_attrs(node.attrs)
        if node.is_constant:
            return _constant_problems(node, graph)
        inferred = node.op.result_types([v.type for v in node.inputs], complete)
    except IRError as error:
        return [error.message]
    problems: list[str] = []
    stated = tuple(v.type for v in node.outputs)
    if inferred != stated:
        problems.append(f"the type rule gives {_listed(inferred)}, the node says {_listed(stated)}")
    for value in node.attrs.values():
        if isinstance(value, Graph):
            problems += [f"in the body @{value.name}: {p}" for p in violations(value)]
            if value.constants:
                problems.append(f"the body @{value.name} holds constant arrays; pass them in as operands")
    return problems


def _constant_problems(node: Node, graph: Graph) -> list[str]:
    value, stated = node.attrs["value"], node.output.type
    if not stated.is_static:
        return [f"a constant must have a static type, not {stated}"]
    if not isinstance(value, ConstantRef):
        return []
    if value.name not in graph.constants:
        return [f"there is no constant {value}"]
    array = graph.constants[value.name]
    if array.shape != stated.shape or DType.of(array.dtype) is not stated.dtype:
        return [f"{value} is {DType.of(array.dtype)}{list(array.shape)}, the node says {stated}"]
    return []


def _listed(types: tuple[object, ...]) -> str:
    return f"({', '.join(map(str, types))})"
