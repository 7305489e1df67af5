"""Reads files of torch.export.save and torch.save with torch. Nothing in a file is executed unless the user trusts it."""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from mlec.errors import FrontendError, UnsupportedModelError, UntrustedPickleError, UsageError
from mlec.frontends.base import LowerOptions
from mlec.frontends.fx_context import to_torch
from mlec.frontends.pickles import digest, is_trusted
from mlec.frontends.program_files import WeightsFile
from mlec.frontends.torch_archive import torch_file_kind

_MODULE_HINT = (
    "run where the module can be imported: in its folder, or with that in PYTHONPATH; names are package.module:Class"
)
_MAIN_HINT = (
    "its class was defined in the script that saved it: define it in a module of its own, in this folder or on PYTHONPATH, and save the "
    "model again; or save its state_dict() and name the class, model_class='package.module:Class'; or use torch.export.save"
)
_NESTED_KEYS = ("state_dict", "model_state_dict", "model")


def load_torch_file(path: Path, options: LowerOptions) -> torch.nn.Module:
    """The module in a file of torch.save; `mlec.frontends.program_files` is for programs.

    Raises:
        UntrustedPickleError: for a pickled module, without permission.
        UnsupportedModelError: for TorchScript.
        FrontendError: for a file that is damaged or does not fit ``options.model_class``.
    """
    with path.open("rb") as file:
        kind = torch_file_kind(file.read(64), path)
    if kind == "torchscript":
        raise UnsupportedModelError(
            f"{path.name} holds TorchScript, which is a program to execute", code="E_TORCHSCRIPT",
            hint="load the nn.Module that it was made from, and torch.export.save(torch.export.export(module, inputs), ...)",
        )  # fmt: skip
    if kind == "pickle":
        return _load_pickle(path, options)
    raise FrontendError(
        f"{path.name} is no file of torch.save or torch.export.save",
        hint="save the model with torch.export.save, or its state_dict with torch.save",
    )


# -- exported programs -----------------------------------------------------------------------------------------------


def open_program(file: IO[bytes]) -> torch.export.ExportedProgram:
    """The program in a checked file; for the process of `SourceProcess` only.

    Raises:
        FrontendError: torch cannot read it.
    """
    try:
        with _data_only():
            return torch.export.load(file)  # an open file, because of a path torch wants the ending .pt2
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        raise FrontendError(
            f"torch.export.load could not read it: {type(error).__name__}: {reason}", code="E_FILE",
            hint=f"save it again with the installed torch {torch.__version__}",
        ) from error  # fmt: skip


@contextmanager
def _data_only() -> Iterator[None]:
    """torch.load inside refuses pickles that are not plain data, whatever its caller asks for."""
    name, opposite = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {key: os.environ.pop(key, None) for key in (name, opposite)}
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        os.environ.update({key: value for key, value in before.items() if value is not None})


# -- pickles ---------------------------------------------------------------------------------------------------------


def _load_pickle(path: Path, options: LowerOptions) -> torch.nn.Module:
    if options.model_class is not None:
        weights = WeightsFile.open(path)  # reads while the class is imported
        return _filled(_made(options.model_class), options.model_class, weights)
    data = path.read_bytes()
    if not is_trusted(path, data, options.trust_pickle):
        raise UntrustedPickleError(
            f"{path.name} is a pickle: reading a whole module from it executes whatever the file says",
            hint="if it holds a state dict, name its class: model_class='package.module:Class' (nothing is executed then); "
            f"if you made the file yourself, trust_pickle=True (or trust_pickle={digest(data)!r} for this file alone); "
            "safest is torch.export.save",
        )
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
    except Exception as error:
        raise FrontendError(
            f"{path.name} could not be unpickled: {type(error).__name__}: {error}",
            code="E_FILE",
            hint=_MAIN_HINT
            if "__main__' " in str(error)
            else "make the modules of its classes importable, with the versions that it was saved with",
        ) from error
    if not isinstance(content, torch.nn.Module):
        raise FrontendError(
            f"{path.name} holds a {type(content).__name__}, not a module", code="E_FILE",
            hint="a state dict needs model_class='package.module:Class'",
        )  # fmt: skip
    return content


def open_weights(file: IO[bytes]) -> Mapping[str, torch.Tensor]:
    """The weights in a file of torch.save; for the process of `SourceProcess` only.

    Raises:
        UntrustedPickleError: it holds more than tensors.
        FrontendError: it holds other data than a state dict.
    """
    try:
        with _data_only():
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:400]
        raise UntrustedPickleError(
            f"it holds more than tensors, or is damaged, and was not read further: {reason}",
            hint="save model.state_dict() alone, or torch.export.save the model",
        ) from None
    for key in _NESTED_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items()
    ):
        raise FrontendError(
            f"it holds no state dict, but a {type(content).__name__}",
            code="E_FILE",
            hint="save model.state_dict(), or leave model_class out",
        )
    return content


def _made(model_class: str) -> torch.nn.Module:
    """A new module of the named class."""
    module_name, colon, attribute = model_class.partition(":")
    if not colon:
        raise UsageError(
            f"model_class is 'package.module:Class', got {model_class!r}", hint="for example 'mypackage.nets:Net'"
        )
    try:
        factory: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            factory = getattr(factory, part)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"model_class {model_class!r} cannot be imported: {error}", hint=_MODULE_HINT) from error
    try:
        module = factory()
    except TypeError as error:
        raise UsageError(
            f"{model_class} cannot be made without arguments: {error}",
            hint="name a function without parameters that makes the model",
        ) from error
    if not isinstance(module, torch.nn.Module):
        raise UsageError(
            f"{model_class} makes a {type(module).__name__}, not an nn.Module",
            hint="name the class of the module whose state dict the file holds, or a function that makes it",
        )
    return module


def _filled(module: torch.nn.Module, model_class: str, weights: WeightsFile) -> torch.nn.Module:
    """The module with the weights of a state dict."""
    state = {name: to_torch(array) for name, array in weights.read().items()}
    weights.process.close()
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise FrontendError(
            f"the weights of {weights.path.name} do not fit {model_class}: {error}", code="E_FILE",
            hint="name the class, with the settings, that these weights were trained in; a function without parameters may make it",
        ) from None  # fmt: skip
    return module.eval()
