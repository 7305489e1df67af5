"""Prints graphs; `mlec.ir.parser` is the inverse."""

from __future__ import annotations

import re
from collections.abc import Iterable

from mlec.ir.dtype import DType
from mlec.ir.graph import Graph, Node, Value
from mlec.ir.op import REQUIRED, AttrValue, ConstantRef
from mlec.ir.types import Location

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*\Z")


def print_graph(graph: Graph, *, locations: bool = True) -> str:
    """The text form. Constants appear as ``@name``; their elements are not in the text."""
    return "\n".join(_Printer(locations).graph(graph, ""))


def print_node(node: Node, names: dict[Value, str] | None = None) -> str:
    """One node as it appears in the text; values without a given name appear under their hints."""
    printer = _Printer(locations=False)
    printer.names = names if names is not None else {v: v.hint or "?" for v in (*node.inputs, *node.outputs)}
    return "\n".join(printer.node(node, ""))


class _Printer:
    def __init__(self, locations: bool) -> None:
        self.locations = locations
        self.names: dict[Value, str] = {}

    def graph(self, graph: Graph, indent: str) -> list[str]:
        self.names = value_names(graph)
        inputs = ", ".join(f"%{self.names[v]}: {v.type}" for v in graph.inputs)
        results = ", ".join(str(v.type) for v in graph.outputs)
        name = graph.name if _IDENTIFIER.match(graph.name) else quote(graph.name)
        lines = [f"graph @{name}({inputs}) -> ({results}) {{"]
        for node in graph.nodes:
            lines += self.node(node, f"{indent}  ")
        returned = "".join(f" %{self.names[v]}," for v in graph.outputs).rstrip(",")
        lines += [f"{indent}  return{returned}", f"{indent}}}"]
        return lines

    def node(self, node: Node, indent: str) -> list[str]:
        results = ", ".join(f"%{self.names[v]}" for v in node.outputs)
        operands = ", ".join(f"%{self.names[v]}" for v in node.inputs)
        call = f"({operands})" if node.inputs else ""
        attrs: list[str] = []
        for attr in node.op.attrs:
            value = node.attrs[attr.name]
            if attr.default is REQUIRED or not _same(value, attr.default):
                attrs.append(f"{attr.name} = {self.attr(value, indent)}")
        braces = f" {{{', '.join(attrs)}}}" if attrs else ""
        types = ", ".join(str(v.type) for v in node.outputs)
        place = f"  {_location(node.loc)}" if self.locations and node.loc.leaves else ""
        return f"{indent}{results} = {node.name}{call}{braces} : {types}{place}".split("\n")

    def attr(self, value: AttrValue, indent: str) -> str:
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, (int, float, DType, ConstantRef)):
            return str(value) if not isinstance(value, float) else repr(value)
        if isinstance(value, str):
            return quote(value)
        if isinstance(value, tuple):
            return f"[{', '.join(self.attr(v, indent) for v in value)}]"
        if isinstance(value, Graph):
            return "\n".join(_Printer(self.locations).graph(value, indent))
        return str(value)


def _same(a: AttrValue, b: AttrValue) -> bool:
    return type(a) is type(b) and bool(a == b) and repr(a) == repr(b)


def quote(text: str) -> str:
    """A string literal of the text form: JSON's, on one line."""
    import json

    return json.dumps(text)


def _location(loc: Location) -> str:
    leaves = loc.leaves
    places = ", ".join(_place(leaf) for leaf in leaves)
    rule = f" rule {quote(loc.rule)}" if loc.rule else ""
    return f"loc({places}{rule})"


def _place(leaf: Location) -> str:
    place = f"{quote(leaf.file)}:{leaf.line}" if leaf.file else ""
    scope = f"in {quote(leaf.scope)}" if leaf.scope else ""
    return " ".join(filter(None, (place, scope)))


def value_names(graph: Graph) -> dict[Value, str]:
    """A unique, legal name for each value: its hint where possible."""
    names: dict[Value, str] = {}
    taken: set[str] = set()
    counters: dict[str, int] = {}
    for value in _bound(graph):
        base = re.sub(r"[^A-Za-z0-9_.]", "_", value.hint)
        if not base or not (base[0].isalpha() or base[0] == "_"):
            base = f"v{base}" if base else "v"
        name = base if value.hint else f"{base}0"
        while name in taken:
            counters[base] = counters.get(base, 0) + 1
            name = f"{base}{counters[base]}" if not value.hint else f"{base}_{counters[base]}"
        taken.add(name)
        names[value] = name
    return names


def _bound(graph: Graph) -> Iterable[Value]:
    yield from graph.inputs
    for node in graph.nodes:
        yield from node.outputs
