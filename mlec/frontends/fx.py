"""The frontend of PyTorch: nn.Module, fx.GraphModule, ExportedProgram, and their files. Imports torch on use only.

fx_export   torch.export captures the model; sizes get names
fx_lower    walks the captured graph: weights, locations, problems
fx_ops, fx_shape, fx_nn   one function for each ATen op, in the table of fx_context
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlec.errors import UsageError
from mlec.frontends.base import LowerOptions, Oracle
from mlec.frontends.torch_archive import torch_file_kind
from mlec.ir import Graph


class TorchFrontend:
    """Lowers PyTorch models."""

    name = "torch"

    def accepts(self, model: object) -> bool:
        """Modules, graph modules and exported programs."""
        bases = {f"{base.__module__}.{base.__qualname__}" for base in type(model).__mro__}
        return bool(bases & {"torch.nn.modules.module.Module", "torch.export.exported_program.ExportedProgram"})

    def lower(self, model: Any, options: LowerOptions) -> Graph:
        """The model in evaluation mode; the model itself is left as it is.

        The first axis of the inputs becomes the symbol ``n`` where ``options`` allow it and state no shapes.

        Raises:
            UsageError: when example inputs are missing or contradict the stated shapes.
            UnsupportedModelError: for a model that torch.export cannot capture, fixes its batch size or changes its state.
            UnsupportedOpError: listing every op that cannot be lowered, with the line of the model's code that uses it.
        """
        from mlec.frontends.fx_lower import lower_model

        return lower_model(model, options)

    def oracle(self, model: Any) -> Oracle:
        """``run``: the model itself on a list of arrays; a list of arrays, in the order of the graph's outputs."""
        from mlec.frontends.fx_oracle import source_run

        return {"run": source_run(model)}

    def sniff(self, head: bytes, path: Path) -> bool:
        """Files of torch.export.save and torch.save."""
        return torch_file_kind(head, path) is not None

    def load(self, path: Path, options: LowerOptions) -> Any:
        """An exported program, a state dict put into ``options.model_class``, or (if trusted) a pickled module."""
        try:
            from mlec.frontends.torch_files import load_torch_file
        except ModuleNotFoundError as error:
            raise UsageError(
                f"{path.name} is a file of PyTorch; reading it needs the package {error.name!r}", code="E_MISSING_PACKAGE",
                hint="pip install 'mlec[torch]'",
            ) from error  # fmt: skip
        return load_torch_file(path, options)
