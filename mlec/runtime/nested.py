"""Inputs that a model takes inside dicts, lists, tuples and records, by the dotted names of its signature.

``x.mask`` is the entry ``mask`` of the argument ``x``, ``states.0`` the first of the list ``states``. The names are all that is
known of the structure: any mapping, sequence or object with such entries fits.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mlec.errors import InputError
from mlec.wording import plural

Tree = dict[str, Any]
"""Entries by name; an entry without entries of its own is a tensor."""


class Nesting:
    """The structure that the names of a model's inputs tell."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._tree: Tree = {}
        for name in names:
            at = self._tree
            for part in name.split("."):
                at = at.setdefault(part, {})
        self.arguments = tuple(self._tree)
        self.is_flat = all(not entries for entries in self._tree.values())

    def flatten(self, inputs: object) -> list[object]:
        """The tensors in the order of the names.

        Args:
            inputs: the arguments as the source model takes them (in order, or by name), the tensors in order, or a mapping
                from the dotted names. A model with a single argument takes that without a list around it, too.

        Raises:
            InputError: an entry is missing or unexpected.
        """
        arguments = self._arguments(inputs)
        if arguments is None:
            return list(inputs)  # type: ignore[call-overload, no-any-return]
        found: dict[str, object] = {}
        _collect(self._tree, arguments, "", found)
        return [found[name] for name in self._names]

    def like(self, arguments: Sequence[object], tensors: Sequence[object]) -> list[object]:
        """Arguments of the same structure as the given ones, with other tensors; None stays None."""
        by_name = dict(zip(self._names, tensors, strict=True))
        roots = iter(self._tree.items())
        made: list[object] = []
        for argument in arguments:
            if argument is None:
                made.append(None)
            else:
                name, entries = next(roots)
                made.append(_rebuilt(entries, argument, name, by_name))
        return made

    def _arguments(self, inputs: object) -> Mapping[str, object] | None:
        """The arguments by name; None for a list of all tensors."""
        if isinstance(inputs, Mapping):
            keys = {str(key) for key in inputs}
            if keys == set(self._names):
                return self._by_root({str(key): value for key, value in inputs.items()})
            if len(self._tree) > 1 or keys & set(self._tree):
                return {str(key): value for key, value in inputs.items()}
        elif isinstance(inputs, list | tuple) and not hasattr(inputs, "_fields"):
            given = [value for value in inputs if value is not None]
            if len(inputs) == len(self._names) and not any(isinstance(v, Mapping | list | tuple) for v in inputs):
                return None
            if len(given) == len(self._tree):
                return dict(zip(self._tree, given, strict=True))
        if len(self._tree) == 1:
            return {next(iter(self._tree)): inputs}
        raise InputError(
            f"expected {len(self._tree)} arguments ({', '.join(self._tree)}) or {len(self._names)} tensors "
            f"({', '.join(self._names)}), got {_described(inputs)}",
            code="E_INPUT_COUNT",
            hint="pass what the source model takes, or a mapping from the names of its inputs",
        )

    def _by_root(self, tensors: Mapping[str, object]) -> dict[str, object]:
        tree: dict[str, Any] = {}
        for name, tensor in tensors.items():
            *parents, last = name.split(".")
            at = tree
            for part in parents:
                at = at.setdefault(part, {})
            at[last] = tensor
        return tree


def _collect(tree: Tree, value: object, path: str, found: dict[str, object]) -> None:
    if not tree:
        found[path] = value
        return
    entries = _entries(value, tree)
    where = f"input {path!r}" if path else "the inputs"
    for problem, names in (("missing", tree.keys() - entries.keys()), ("unexpected", entries.keys() - tree.keys())):
        if names:
            raise InputError(
                f"{where}: {problem} {', '.join(sorted(names))}; expected {', '.join(tree)}, got {_described(value)}",
                code="E_INPUT_NAME",
                hint="pass what the source model takes, or a mapping from the dotted names of its inputs",
            )
    for name, inner in tree.items():
        _collect(inner, entries[name], f"{path}.{name}" if path else name, found)


def _entries(value: object, tree: Tree) -> dict[str, object]:
    """What a container holds, by name; entries that are None are not there."""
    if _is_record(value) or hasattr(value, "_fields"):
        pairs = [(name, getattr(value, name)) for name in _fields(value)]
    elif isinstance(value, Mapping):
        pairs = [(str(key), entry) for key, entry in value.items()]
    elif isinstance(value, list | tuple):
        pairs = [(str(i), entry) for i, entry in enumerate(value)]
    else:
        pairs = [(name, getattr(value, name)) for name in tree if hasattr(value, name)]
    return {name: entry for name, entry in pairs if entry is not None}


def _is_record(value: object) -> bool:
    """Whether it is an instance of a dataclass, or one itself: where nobody has imported their module, which takes 1 ms, nothing is."""
    dataclasses = sys.modules.get("dataclasses")
    return dataclasses is not None and bool(dataclasses.is_dataclass(value))


def _fields(value: Any) -> tuple[str, ...]:
    if not _is_record(value):
        return tuple(value._fields)
    return tuple(field.name for field in sys.modules["dataclasses"].fields(value))


def _rebuilt(tree: Tree, value: Any, path: str, tensors: Mapping[str, object]) -> object:
    if not tree:
        return tensors[path]
    made = {
        name: _rebuilt(tree[name], entry, f"{path}.{name}", tensors) for name, entry in _entries(value, tree).items()
    }
    if _is_record(value) and not isinstance(value, type):
        return sys.modules["dataclasses"].replace(value, **made)
    if hasattr(value, "_fields"):
        return value._replace(**made)
    if isinstance(value, Mapping):
        return {key: made.get(str(key)) for key in value}
    items = [made.get(str(i)) for i in range(len(value))]
    return items if isinstance(value, list) else tuple(items)


def _described(value: object) -> str:
    if isinstance(value, Mapping):
        return f"a mapping with {', '.join(map(str, value)) or 'nothing'}"
    if isinstance(value, list | tuple):
        return plural(len(value), "item")
    return f"a {type(value).__name__}"
