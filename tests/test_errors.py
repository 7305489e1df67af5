"""Every error says what to do about it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from mlec import errors

ROOT = Path(__file__).parents[1]
CLASSES = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.MlecError) and kind.hint is None
}
FILES = [path for folder in ("mlec", "passes", "backends") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_error_has_a_hint(path: Path) -> None:
    without = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CLASSES
        and not {"hint", None} & {keyword.arg for keyword in node.keywords}
    ]  # fmt: skip
    assert not without, f"{path}: the errors at lines {without} have no hint"


def test_the_hint_of_a_class_holds_where_none_is_given() -> None:
    assert errors.TypeRuleError("x").hint == errors.TypeRuleError.hint
    assert errors.TypeRuleError("x", hint="y").hint == "y"
    assert errors.MlecError("x").hint is None


def test_nothing_of_a_message_commands_a_terminal() -> None:
    """Much of it comes from files: names, places, lines of a graph."""
    error = errors.MlecError("a\x1b]0;b\x07", loc="c\x9bd", notes=("e\u202ef\ng\th",), hint="i\rj")
    assert str(error) == "a\\x1b]0;b\\x07\n  at c\\x9bd\n  e\\u202ef\n  g\\th\nhint: i\\rj"
