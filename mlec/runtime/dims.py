"""Values of dim expressions written as text, such as ``"2*n+1"`` or ``"max(1, 4096//n)"``.

The text may come from a file that nobody vouches for, so it is interpreted from its syntax tree and never executed.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from functools import lru_cache

from mlec.errors import UsageError

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[[int, int], int]] = {"max": max, "min": min}

_LONGEST = 1 << 14  # characters of an expression
_KEPT = 1 << 8
"""Characters of an expression that is parsed once: the tree of a long one takes megabytes, and a file can hold thousands."""


def evaluate(dim: int | str, binding: Mapping[str, int]) -> int | None:
    """Value of a dim, or None when it names a symbol that ``binding`` lacks.

    Raises:
        UsageError: the text is not an expression of integers, names, ``+ - * // %``, ``max`` and ``min`` of two, and parentheses, or too
            long.
    """
    if isinstance(dim, int):
        return dim
    try:
        return _value(_parse(dim), binding)
    except KeyError:
        return None
    except ZeroDivisionError as error:
        raise UsageError(
            f"{dim!r} divides by zero", hint="a dim is a number, a name, or an expression of them with + - * // %"
        ) from error
    except RecursionError as error:
        raise UsageError(
            f"{dim[:40]!r}... is nested too deep",
            hint="a dim is a number, a name, or an expression of them with + - * // %",
        ) from error


def symbols_of(dim: str) -> set[str]:
    """The symbols that an expression names.

    Raises:
        UsageError: as `evaluate`.
    """
    nodes = list(ast.walk(_parse(dim)))
    called = [node.func for node in nodes if isinstance(node, ast.Call)]
    names = {node.id for node in nodes if isinstance(node, ast.Name) and node not in called}
    evaluate(dim, dict.fromkeys(names, 1))
    return names


def solved(dim: str, extent: int, binding: Mapping[str, int]) -> dict[str, int]:
    """The one symbol that ``binding`` lacks, where an extent tells it: of ``2*n``, 8 is ``{"n": 4}``; empty where it does not.

    Raises:
        UsageError: as `evaluate`.
    """
    unknown = symbols_of(dim) - binding.keys()
    if len(unknown) != 1:
        return {}
    (name,) = unknown
    first, second = (evaluate(dim, {**binding, name: value}) or 0 for value in (0, 1))
    value = (extent - first) // (second - first) if second != first else -1
    return {name: value} if value >= 0 and evaluate(dim, {**binding, name: value}) == extent else {}


def _parse(text: str) -> ast.expr:
    return _parsed_once(text) if len(text) <= _KEPT else _parsed(text)


def _parsed(text: str) -> ast.expr:
    if len(text) > _LONGEST:
        raise UsageError(
            f"{text[:40]!r}... is longer than {_LONGEST} characters",
            hint="a dim is a number, a name, or an expression of them with + - * // %",
        )
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UsageError(
            f"{text!r} is not a dim expression",
            hint="a dim is a number, a name, or an expression of them with + - * // %",
        ) from error
    return tree


_parsed_once = lru_cache(maxsize=1024)(_parsed)


def _value(node: ast.expr, binding: Mapping[str, int]) -> int:
    match node:
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            return value
        case ast.Name(id=name):
            return binding[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, binding)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, binding), _value(right, binding))
        case ast.Call(func=ast.Name(id=name), args=[left, right], keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](_value(left, binding), _value(right, binding))
    raise UsageError(
        f"{ast.unparse(node)!r} is not a dim expression",
        hint="a dim is a number, a name, or an expression of them with + - * // %",
    )
