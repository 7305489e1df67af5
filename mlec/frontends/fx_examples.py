"""When a model cannot be captured: is it the example inputs that do not fit it? Then the model itself fails on them, and says where."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree

from mlec.errors import UsageError
from mlec.frontends.base import LowerOptions
from mlec.frontends.fx_export import dotted, evaluating, example_tensor, is_array, named_arguments
from mlec.frontends.fx_places import place_of_error
from mlec.ir import Location

_MOST_INPUTS = 8  # beyond, no element types are tried


def example_problem(module: torch.nn.Module, options: LowerOptions) -> UsageError | None:
    """Why the model itself does not run on the examples: with the module and the line where it fails, and which element
    type an input should have, if that is why. None if it runs."""
    assert options.example_inputs is not None
    arguments = pytree.tree_map(
        lambda leaf: example_tensor(leaf, module), tuple(options.example_inputs), is_leaf=is_array
    )
    failure = _failure(module, arguments)
    if failure is None:
        return None
    error, place = failure
    name = type(module).__name__
    reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    wanted = _fitting_types(module, arguments)
    if not wanted:
        return UsageError(
            f"{name} itself fails on the example inputs: {reason}", code="E_EXAMPLE_FAILS", loc=place,
            hint="pass examples that the model runs on",
        )  # fmt: skip
    inputs = "; ".join(f"input {path!r} must be {_name(new)}, got {_name(old)}" for path, old, new in wanted)
    return UsageError(
        f"example inputs of another type than {name} takes: {inputs} ({reason})", code="E_EXAMPLE_DTYPE", loc=place,
        hint="; ".join(f"pass {path!r} as {_name(new)}" for path, _, new in wanted),
    )  # fmt: skip


def _failure(module: torch.nn.Module, arguments: Sequence[Any]) -> tuple[Exception, Location] | None:
    """What the model raises, in which of its modules, and on which line of code that is not torch's."""
    inside: list[str] = []
    with evaluating(module), torch.no_grad(), _following(module, inside):
        try:
            module(*pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, arguments))
        except Exception as error:
            return error, place_of_error(error, inside[-1] if inside else type(module).__name__)
    return None


@contextmanager
def _following(module: torch.nn.Module, inside: list[str]) -> Iterator[None]:
    """Keeps the names of the modules that are being called."""
    hooks: list[Any] = []

    def entering(name: str) -> Callable[..., None]:
        return lambda part, arguments: inside.append(name)

    for name, part in module.named_modules():
        if name:
            hooks.append(part.register_forward_pre_hook(entering(name)))
            hooks.append(part.register_forward_hook(lambda *call: inside.pop() and None))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _fitting_types(module: torch.nn.Module, arguments: Sequence[Any]) -> list[tuple[str, torch.dtype, torch.dtype]]:
    """The inputs (path, type given, type needed) that must be of another type for the model to run; none if that is not why."""
    paths, structure = pytree.tree_flatten_with_path(named_arguments(module, arguments))
    leaves = [leaf for _, leaf in paths]
    number = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())
    choices: list[tuple[int, torch.dtype]] = []
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            if leaf.dtype != number:
                choices.append((i, number))
            if leaf.is_floating_point():
                choices.append((i, torch.int64))
    if len(leaves) > _MOST_INPUTS:
        return []
    to_numbers = [choice for choice in choices if choice[1] == number]
    for attempt in (*([choice] for choice in choices), to_numbers):
        changed = list(leaves)
        for i, dtype in attempt:
            changed[i] = torch.zeros_like(leaves[i], dtype=dtype) if dtype == torch.int64 else leaves[i].to(dtype)
        if attempt and _failure(module, tuple(pytree.tree_unflatten(changed, structure).values())) is None:
            return [(dotted(paths[i][0]), leaves[i].dtype, dtype) for i, dtype in attempt]
    return []


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
