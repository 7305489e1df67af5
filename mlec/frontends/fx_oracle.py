"""Runs the source model itself, for validation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from mlec.frontends.fx_context import to_numpy, to_torch
from mlec.frontends.fx_export import evaluating, example_tensor, is_array, user_tensors
from mlec.ir.op import Array

Run = Callable[[Sequence[Any]], list[Array]]


def source_run(model: torch.nn.Module | ExportedProgram) -> Run:
    """The model as a function to a list of arrays, in evaluation mode, without gradients.

    It takes a list of its arguments; arrays stand for the tensors in them.
    """
    return _program_run(model) if isinstance(model, ExportedProgram) else _module_run(model, model)


def exact_run(model: torch.nn.Module | ExportedProgram) -> Run:
    """The same in float64: weights and inputs are those numbers, and what is computed of them is rounded less.

    A model that names another type somewhere may fail when it runs, or give results of that type.
    """
    if isinstance(model, ExportedProgram):
        return _program_run(model, wide=True)
    return _module_run(copy.deepcopy(model).double(), model, wide=True)


def _wide(x: Any) -> Any:
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def _module_run(module: torch.nn.Module, like: torch.nn.Module, wide: bool = False) -> Run:
    """Inputs are rounded as ``like`` takes them."""

    def given(leaf: Any) -> Any:
        if leaf is None:
            return None
        tensor = to_torch(example_tensor(leaf, like))
        return _wide(tensor) if wide else tensor

    def run(arrays: Sequence[Any]) -> list[Array]:
        with torch.no_grad(), evaluating(module):
            return _arrays(module(*pytree.tree_map(given, list(arrays), is_leaf=is_array)))

    return run


def _program_run(program: ExportedProgram, wide: bool = False) -> Run:
    # Without its guards: they refuse the batch sizes 0 and 1, which torch.export did not look at.
    module, structure = program.module(check_guards=False), program.call_spec.in_spec
    if wide:
        module = copy.deepcopy(module).double()
    dtypes = [tensor.dtype for tensor in user_tensors(program)]

    def run(arrays: Sequence[Any]) -> list[Array]:
        given = [leaf for leaf in pytree.tree_leaves(list(arrays), is_leaf=is_array) if leaf is not None]
        tensors = [to_torch(a).to(dtype) for a, dtype in zip(given, dtypes, strict=True)]
        args, kwargs = pytree.tree_unflatten([_wide(t) for t in tensors] if wide else tensors, structure)
        with torch.no_grad():
            return _arrays(module(*args, **kwargs))

    return run


def _arrays(outputs: Any) -> list[Array]:
    return [to_numpy(leaf) for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
