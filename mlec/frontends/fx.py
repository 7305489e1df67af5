"""The frontend of PyTorch: nn.Module, fx.GraphModule, ExportedProgram, and their files. Imports torch on use only.

fx_export   torch.export captures the model; sizes get names
fx_lower    walks the captured graph: weights, locations, problems
fx_ops, fx_shape, fx_nn   one function for each ATen op, in the table of fx_context
fx_complex  those on complex tensors, which are pairs of real ones
fx_fourier  Fourier transforms, which `fourier` makes products of
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from numpy.typing import NDArray

from mlec.errors import UsageError
from mlec.frontends.base import LowerOptions, Oracle, SourceMethods
from mlec.frontends.program_files import ProgramFile, load_program_file
from mlec.frontends.torch_archive import torch_file_kind
from mlec.ir import Graph


class TorchFrontend:
    """Lowers PyTorch models."""

    name = "torch"

    def accepts(self, model: object) -> bool:
        """Modules, graph modules, exported programs and files of these."""
        if isinstance(model, ProgramFile):
            return True
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
        if isinstance(model, ProgramFile):
            return model.process.lower(LowerOptions(input_shapes=options.input_shapes))
        from mlec.frontends.fx_lower import lower_model

        return lower_model(model, options)

    def oracle(self, model: Any) -> Oracle:
        """``run``: the model itself on a list of arrays; a list of arrays, in the order of the graph's outputs."""
        if isinstance(model, ProgramFile):
            return model.process
        if isinstance(model, Mapping):  # weights alone
            return {}
        from mlec.frontends.fx_oracle import exact_run, source_run

        return SourceMethods({"run": source_run(model)}, exact=lambda arrays: exact_run(model)(arrays))

    def sniff(self, head: bytes, path: Path) -> bool:
        """Files of torch.export.save and torch.save."""
        return torch_file_kind(head, path) is not None

    def load(self, path: Path, options: LowerOptions) -> Any:
        """A `ProgramFile`, a state dict put into ``options.model_class``, or (if trusted) a pickled module."""
        if importlib.util.find_spec("torch") is None:
            raise UsageError(
                f"{path.name} is a file of PyTorch; reading it needs the package 'torch'", code="E_MISSING_PACKAGE",
                hint="pip install 'mlec[torch]'",
            )  # fmt: skip
        with path.open("rb") as file:
            head = file.read(64)
        if torch_file_kind(head, path) == "program":
            return load_program_file(path)
        from mlec.frontends.torch_files import load_torch_file

        return load_torch_file(path, options)

    def open_file(self, file: IO[bytes], kind: str) -> Any:
        """The exported program, or the weights by name, in torch itself; for the process of `SourceProcess` only.

        Args:
            file: that `load` has checked.
            kind: ``"program"`` or ``"weights"``.
        """
        from mlec.frontends.torch_files import open_program, open_weights

        return open_program(file) if kind == "program" else open_weights(file)

    def weights(self, model: Any) -> Mapping[str, NDArray[Any]]:
        """The arrays of weights that `open_file` opened."""
        from mlec.frontends.fx_context import to_numpy

        return {name: to_numpy(tensor) for name, tensor in model.items()}
