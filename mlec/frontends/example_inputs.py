"""Example inputs given by name: put in the order, and into the structure, that the source model takes them in."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from mlec.errors import UsageError
from mlec.signature import Signature


def nested(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as mappings: ``{"x.mask": a, "x.w": b}`` is ``{"x": {"mask": a, "w": b}}``.

    Raises:
        UsageError: a name stands for an array and for what others are part of.
    """
    made: dict[str, Any] = {}
    for name, value in inputs.items():
        *parents, last = name.split(".")
        at: Any = made
        for part in parents:
            at = at.setdefault(part, {}) if isinstance(at, dict) else None
        if not isinstance(at, dict) or last in at:
            raise UsageError(
                f"the example inputs name {name!r}, and also what it is a part or the whole of: {', '.join(inputs)}",
                code="E_EXAMPLE_NAME", hint="give each input once",
            )  # fmt: skip
        at[last] = value
    return made


def for_model(inputs: Mapping[str, Any], model: object) -> tuple[Any, ...]:
    """The inputs in the order of the parameters of the model's ``forward``; in their own order where none is a parameter, or where the
    model has no such method.

    Raises:
        UsageError: some are parameters, but others are not, or are missing.
    """
    forward = getattr(model, "forward", None)
    if forward is None:
        return tuple(inputs.values())
    parameters = inspect.signature(forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return in_order(inputs, [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)], defaults)


def for_signature(inputs: Mapping[str, Any], signature: Signature) -> tuple[Any, ...]:
    """The inputs in the order of a compiled model's; those of a table in their own order.

    Raises:
        UsageError: as for `for_model`.
    """
    if signature.table is not None:
        return tuple(inputs.values())
    return in_order(inputs, list(dict.fromkeys(spec.name.partition(".")[0] for spec in signature.inputs)))


def in_order(
    inputs: Mapping[str, Any], names: Sequence[str], defaults: Mapping[str, Any] | None = None
) -> tuple[Any, ...]:
    """The inputs in the order of the names; in their own order where they have none of these names.

    Raises:
        UsageError: a name is missing that has no default, or one is unknown.
    """
    if not set(names) & set(inputs):
        return tuple(inputs.values())
    known = {**(defaults or {}), **inputs}
    missing = [name for name in names if name not in known]
    unknown = [name for name in inputs if name not in names]
    if missing or unknown:
        problems = [
            f"{what} {', '.join(found)}" for what, found in (("missing", missing), ("unexpected", unknown)) if found
        ]
        raise UsageError(
            f"the example inputs do not fit: {'; '.join(problems)}; expected {', '.join(names)}, got {', '.join(inputs)}",
            code="E_EXAMPLE_NAME", hint="name the inputs as the parameters of the model's forward, nested ones x.part",
        )  # fmt: skip
    last = max(i for i, name in enumerate(names) if name in inputs)
    return tuple(known[name] for name in names[: last + 1])
