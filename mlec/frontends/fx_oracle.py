"""Runs the source model itself, for validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from mlec.frontends.fx_context import to_numpy, to_torch
from mlec.frontends.fx_export import evaluating, example_tensor, user_tensors
from mlec.ir.op import Array

Run = Callable[[Sequence[Array]], list[Array]]


def source_run(model: torch.nn.Module | ExportedProgram) -> Run:
    """The model as a function from a list of arrays to a list of arrays, in evaluation mode, without gradients."""
    return _program_run(model) if isinstance(model, ExportedProgram) else _module_run(model)


def _module_run(module: torch.nn.Module) -> Run:
    def run(arrays: Sequence[Array]) -> list[Array]:
        with torch.no_grad(), evaluating(module):
            return _arrays(module(*(to_torch(example_tensor(a, module)) for a in arrays)))

    return run


def _program_run(program: ExportedProgram) -> Run:
    # Without its guards: they refuse the batch sizes 0 and 1, which torch.export did not look at.
    module, structure = program.module(check_guards=False), program.call_spec.in_spec
    dtypes = [tensor.dtype for tensor in user_tensors(program)]

    def run(arrays: Sequence[Array]) -> list[Array]:
        tensors = [to_torch(a).to(dtype) for a, dtype in zip(arrays, dtypes, strict=True)]
        args, kwargs = pytree.tree_unflatten(tensors, structure)
        with torch.no_grad():
            return _arrays(module(*args, **kwargs))

    return run


def _arrays(outputs: Any) -> list[Array]:
    return [to_numpy(leaf) for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
