"""Parses the text form that `mlec.ir.printer` writes.

    graph    ::= "graph" "@" name "(" [input ("," input)*] ")" "->" "(" [type ("," type)*] ")" "{" node* "return" [values] "}"
    input    ::= "%" name ":" type
    node     ::= values "=" name ["(" [values] ")"] ["{" attr ("," attr)* "}"] ":" type ("," type)* [loc]
    attr     ::= name "=" literal
    literal  ::= number | string | "true" | "false" | "@" name | dtype | dim | "[" [literal ("," literal)*] "]" | graph
    type     ::= dtype "[" [dim ("," dim)*] "]"
    loc      ::= "loc" "(" place ("," place)* ["rule" string] ")"
    place    ::= [string ":" int] ["in" string]

Text comes from files that nobody vouches for: depth and sizes are bounded, and every fault is a `ParseError` with line and column.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import TypeVar

from mlec.errors import IRError, ParseError, TypeRuleError
from mlec.ir.dim import Dim, parse_dim, static_dims
from mlec.ir.dim_trace import origins
from mlec.ir.dtype import DType
from mlec.ir.graph import Graph, Node, Value
from mlec.ir.op import Array, AttrKind, AttrValue, ConstantRef, OpDef, lookup
from mlec.ir.types import UNKNOWN, Location, TensorType
from mlec.signature import Signature

MAX_NODES = 1_000_000
MAX_DEPTH = 8
MAX_RANK = 32
MAX_EXTENT = 2**48
MAX_SPREAD = 2**27
"""Elements of all constants that are one number: a line of text can ask for as many as it likes."""

_T = TypeVar("_T")
_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+|//[^\n]*)
      |(?P<string>"(?:[^"\\\n]|\\.)*")
      |(?P<number>-?(?:inf\b|nan\b|\d+(?:\.\d*)?(?:[eE][-+]?\d+)?))
      |(?P<name>[A-Za-z_][A-Za-z0-9_.]*)
      |(?P<punct>->|//|[%@(){}\[\],:=*+\-])""",
    re.X,
)
_DTYPES = {d.value for d in DType}


def parse_graph(text: str, constants: Mapping[str, Array] | None = None, signature: Signature | None = None) -> Graph:
    """Reads one graph.

    Args:
        text: the text form.
        constants: the arrays that ``@name`` refers to.
        signature: kept with the graph.

    Raises:
        ParseError: with line, column and what was expected.
        TypeRuleError: when the types written differ from those that the ops' rules give.
    """
    parser = _Parser(text, dict(constants or {}))
    graph = parser.graph(0)
    parser.end()
    return Graph(graph.name, graph.inputs, graph.nodes, graph.outputs, graph.constants, signature)


class _Parser:
    def __init__(self, text: str, constants: dict[str, Array]) -> None:
        self.text = text
        self.constants = constants
        self.at = 0
        self.kind = ""
        self.token = ""
        self.start = 0
        self.nodes_seen = 0
        self.spread = 0
        self.producer: dict[Value, Node] = {}
        self.advance()

    # -- tokens --------------------------------------------------------------------------------------------------

    def advance(self) -> str:
        previous = self.token
        while True:
            if self.at >= len(self.text):
                self.kind, self.token, self.start = "end", "", self.at
                return previous
            match = _TOKEN.match(self.text, self.at)
            if match is None:
                self.start = self.at
                raise self.error(f"unexpected character {self.text[self.at]!r}")
            self.start, self.at = match.start(), match.end()
            if match.lastgroup != "space":
                self.kind, self.token = match.lastgroup or "", match.group()
                return previous

    def error(self, message: str, code: str = "E_PARSE") -> ParseError:
        line = self.text.count("\n", 0, self.start) + 1
        column = self.start - self.text.rfind("\n", 0, self.start)
        excerpt = self.text[self.text.rfind("\n", 0, self.start) + 1 :].split("\n", 1)[0][:160]
        return ParseError(f"line {line}, column {column}: {message}", code=code, notes=(excerpt,))

    def expect(self, token: str) -> None:
        if self.token != token or self.kind == "string":
            raise self.error(f"expected {token!r}, got {self.token or 'the end of the text'!r}")
        self.advance()

    def accept(self, token: str) -> bool:
        if self.token == token and self.kind != "string":
            self.advance()
            return True
        return False

    def take(self, kind: str, what: str) -> str:
        if self.kind != kind:
            raise self.error(f"expected {what}, got {self.token or 'the end of the text'!r}")
        return self.advance()

    def integer(self) -> int:
        text = self.take("number", "an integer")
        if not re.fullmatch(r"-?\d{1,20}", text):
            raise self.error(f"expected an integer, got {text!r}")
        return int(text)

    def string(self) -> str:
        text = self.take("string", "a string")
        try:
            return str(json.loads(text))
        except ValueError:
            raise self.error(f"{text[:40]} is not a string literal") from None

    def end(self) -> None:
        if self.kind != "end":
            raise self.error(f"text after the end of the graph: {self.token!r}")

    def listed(self, item: Callable[[], _T], close: str) -> list[_T]:
        items: list[_T] = []
        if not self.accept(close):
            items.append(item())
            while self.accept(","):
                items.append(item())
            self.expect(close)
        return items

    # -- grammar -------------------------------------------------------------------------------------------------

    def graph(self, depth: int) -> Graph:
        if depth > MAX_DEPTH:
            raise self.error(f"graphs nested deeper than {MAX_DEPTH}")
        self.expect("graph")
        self.expect("@")
        name = self.string() if self.kind == "string" else self.take("name", "a graph name")
        scope: dict[str, Value] = {}
        self.expect("(")
        inputs = self.listed(lambda: self.input(scope), ")")
        self.expect("->")
        self.expect("(")
        declared = self.listed(self.type, ")")
        self.expect("{")
        nodes: list[Node] = []
        while not self.accept("return"):
            self.nodes_seen += 1
            if self.nodes_seen > MAX_NODES:
                raise self.error(f"more than {MAX_NODES} nodes")
            nodes.append(self.node(scope, depth))
        outputs: list[Value] = []
        if not self.accept("}"):
            outputs = self.listed(lambda: self.use(scope), "}")
        if [v.type for v in outputs] != declared:
            raise self.error(
                f"the graph declares results ({_types(declared)}) and returns ({_types([v.type for v in outputs])})"
            )
        used = {n.attrs["value"].name for n in nodes if n.is_constant and isinstance(n.attrs["value"], ConstantRef)}
        constants = {k: v for k, v in self.constants.items() if k in used}
        return Graph(name, tuple(inputs), tuple(nodes), tuple(outputs), constants)

    def input(self, scope: dict[str, Value]) -> Value:
        name = self.binding(scope)
        self.expect(":")
        scope[name] = Value(self.type(), name)
        return scope[name]

    def binding(self, scope: dict[str, Value]) -> str:
        self.expect("%")
        name = self.take("name", "a value name")
        if name in scope:
            raise self.error(f"%{name} is bound twice")
        return name

    def use(self, scope: dict[str, Value]) -> Value:
        self.expect("%")
        name = self.take("name", "a value name")
        if name not in scope:
            raise self.error(f"%{name} is used before it is bound")
        return scope[name]

    def node(self, scope: dict[str, Value], depth: int) -> Node:
        start = self.start
        names = [self.binding(scope)]
        while self.accept(","):
            names.append(self.binding(scope))
        self.expect("=")
        op_name = self.take("name", "an op name")
        try:
            op = lookup(op_name)
        except IRError as error:
            located = self.error(error.message, code=error.code)
            located.hint = error.hint
            raise located from None
        inputs = self.listed(lambda: self.use(scope), ")") if self.accept("(") else []
        attrs: dict[str, AttrValue] = {}
        if self.accept("{"):
            for key, value in self.listed(lambda: self.attr(op, depth), "}"):
                if key in attrs:
                    raise self.error(f"the attribute {key!r} is given twice")
                attrs[key] = value
        self.expect(":")
        types = [self.type()]
        while self.accept(","):
            types.append(self.type())
        location = self.location()
        if len(types) != len(names):
            raise self.error(f"{len(names)} results are bound, {len(types)} types are given")
        complete = self.checked(op, inputs, attrs, types, start)
        outputs = tuple(Value(t, n) for t, n in zip(types, names, strict=True))
        scope.update(zip(names, outputs, strict=True))
        node = Node(op, tuple(inputs), outputs, complete, location)
        self.producer.update(dict.fromkeys(outputs, node))
        return node

    def checked(
        self, op: OpDef, inputs: list[Value], attrs: dict[str, AttrValue], types: list[TensorType], start: int
    ) -> dict[str, AttrValue]:
        """The complete attributes of a node that keeps to the rules; errors point to where the node starts."""
        here, self.start = self.start, start
        try:
            complete = op.complete_attrs(attrs)
            if op.name == "constant":
                self.check_constant(complete["value"], types)
            else:
                inferred = list(op.result_types([v.type for v in inputs], complete))
                if inferred != types:
                    raise self.error(
                        f"{op.name} gives ({_types(inferred)}), the text says ({_types(types)})", code="E_TYPE"
                    )
        except ParseError:
            raise
        except IRError as error:
            located = self.error(error.message, code=error.code)
            if isinstance(error, TypeRuleError):
                located.notes += origins(error, inputs, self.producer)
            raise located from None
        self.start = here
        return complete

    def check_constant(self, value: AttrValue, types: list[TensorType]) -> None:
        if len(types) != 1 or not types[0].is_static:
            raise self.error("a constant has one result of a static type", code="E_TYPE")
        if not isinstance(value, ConstantRef):
            self.spread += math.prod(static_dims(types[0].shape))
            if self.spread > MAX_SPREAD:
                raise self.error(f"constants of one number with more than {MAX_SPREAD} elements in all")
            return
        if value.name not in self.constants:
            raise self.error(f"there is no constant {value}", code="E_CONSTANT")
        array = self.constants[value.name]
        if array.shape != types[0].shape or DType.of(array.dtype) is not types[0].dtype:
            raise self.error(
                f"{value} is {DType.of(array.dtype)}{list(array.shape)}, the text says {types[0]}", code="E_CONSTANT"
            )

    def type(self) -> TensorType:
        name = self.take("name", "an element type")
        if name not in _DTYPES:
            raise self.error(f"{name!r} is not an element type; there are: {', '.join(sorted(_DTYPES))}")
        self.expect("[")
        shape = self.listed(self.dim, "]")
        if len(shape) > MAX_RANK:
            raise self.error(f"a rank of more than {MAX_RANK}")
        # What no memory holds overflows the 64 bits that compilers and kernels count in.
        if math.prod(extent for extent in shape if isinstance(extent, int) and extent) > MAX_EXTENT:
            raise self.error(f"a tensor of more than {MAX_EXTENT} elements")
        return TensorType(tuple(shape), DType(name))

    def dim(self) -> Dim:
        value = self.dim_expression()
        if isinstance(value, int) and not 0 <= value <= MAX_EXTENT:
            raise self.error(f"an extent must lie between 0 and {MAX_EXTENT}, got {value}")
        return value

    def dim_expression(self) -> Dim:
        """Everything up to the next ',' or ']' outside parentheses (or '}', in attributes) is the text of the dim."""
        start, depth = self.start, 0
        while self.kind != "end" and (depth or self.token not in (",", "]", "}")):
            depth += {"(": 1, ")": -1}.get(self.token, 0)
            self.advance()
        try:
            return parse_dim(self.text[start : self.start].strip())
        except (ValueError, TypeRuleError) as error:
            raise self.error(error.message if isinstance(error, TypeRuleError) else str(error)) from None

    def attr(self, op: OpDef, depth: int) -> tuple[str, AttrValue]:
        key = self.take("name", "an attribute name")
        self.expect("=")
        kind = next((a.kind for a in op.attrs if a.name == key), None)
        return key, self.literal(depth, kind)

    def literal(self, depth: int, kind: AttrKind | None) -> AttrValue:
        if kind is AttrKind.DIM:
            return self.dim_expression()
        if self.kind == "string":
            return self.string()
        if self.accept("["):
            if depth > MAX_DEPTH:
                raise self.error(f"lists nested deeper than {MAX_DEPTH}")
            return tuple(self.listed(lambda: self.element(depth + 1, kind), "]"))
        if self.accept("@"):
            return ConstantRef(self.take("name", "the name of a constant"))
        if self.token == "graph":
            return self.graph(depth + 1)
        if self.kind == "number":
            return self.number()
        word = self.take("name", "an attribute value")
        if word in ("true", "false"):
            return word == "true"
        if word in ("inf", "nan"):
            return float(word)
        if word in _DTYPES:
            return DType(word)
        raise self.error(f"{word!r} is not an attribute value")

    def element(self, depth: int, kind: AttrKind | None) -> AttrValue:
        return self.dim_expression() if kind is AttrKind.DIMS else self.literal(depth, kind)

    def number(self) -> int | float:
        text = self.take("number", "a number")
        if re.fullmatch(r"-?\d+", text):
            if len(text) > 20:
                raise self.error("an integer of more than 20 digits")
            return int(text)
        return float(text)

    def location(self) -> Location:
        if not self.accept("loc"):
            return UNKNOWN
        self.expect("(")
        places: list[Location] = []
        while True:
            file, line, scope = "", 0, ""
            if self.kind == "string":
                file = self.string()
                self.expect(":")
                line = self.integer()
            if self.accept("in"):
                scope = self.string()
            places.append(Location(file, line, scope))
            if not self.accept(","):
                break
        rule = self.string() if self.accept("rule") else ""
        self.expect(")")
        return Location.merged(places, rule) if len(places) > 1 or rule else places[0]


def _types(types: list[TensorType]) -> str:
    return ", ".join(map(str, types))
