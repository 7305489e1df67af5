"""Reads files of torch.export.save and torch.save. Nothing in a file is executed unless the user trusts it."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mlec.errors import FrontendError, UnsupportedModelError, UntrustedPickleError, UsageError
from mlec.frontends.base import LowerOptions

_ZIP = b"PK\x03\x04"
_OLD_PICKLE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before version 1.6
_MAX_RATIO = 200
_MAX_BYTES = 1 << 40
_CALLABLE = re.compile(
    r"torch\.ops\.(aten|prims|higher_order)\.\w+(\.\w+)?|(torch\.)?_?operator\.\w+|math\.\w+|torch\.sym_\w+|torch\._sym_\w+"
    r"|torch\.fx\.experimental\.sym_node\.\w+"
)
_NESTED_KEYS = ("state_dict", "model_state_dict", "model")


def sniff_torch_file(head: bytes, path: Path) -> bool:
    """Whether a file is one that `load_torch_file` reads, or refuses with the reason."""
    if head.startswith(_OLD_PICKLE):
        return True
    return head.startswith(_ZIP) and _kind(path) is not None


def load_torch_file(path: Path, options: LowerOptions) -> Any:
    """An ExportedProgram or an nn.Module.

    Raises:
        UntrustedPickleError: for a pickled module, without permission.
        UnsupportedModelError: for a file with parts that only execute: TorchScript, custom objects, compiled libraries.
        FrontendError: for a file that is damaged or does not fit ``options.model_class``.
    """
    with path.open("rb") as file:
        old = file.read(len(_OLD_PICKLE)) == _OLD_PICKLE
    kind = "pickle" if old else _kind(path)
    if kind == "torchscript":
        raise UnsupportedModelError(
            f"{path.name} holds TorchScript, which is a program to execute", code="E_TORCHSCRIPT",
            hint="load the nn.Module that it was made from, and torch.export.save(torch.export.export(module, inputs), ...)",
        )  # fmt: skip
    if kind == "program":
        return _load_program(path)
    if kind == "pickle":
        return _load_pickle(path, options)
    raise FrontendError(f"{path.name} is no file of torch.save or torch.export.save")


def _kind(path: Path) -> str | None:
    """What a zip file holds, by the names in it: program, torchscript, pickle, or None."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] if "/" in name else name for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile):
        return None
    if "archive_format" in names or "serialized_exported_program.json" in names:
        return "program"
    if "constants.pkl" in names:
        return "torchscript"
    return "pickle" if "data.pkl" in names else None


# -- exported programs -----------------------------------------------------------------------------------------------


def _load_program(path: Path) -> torch.export.ExportedProgram:
    _check_archive(path)
    try:
        with _data_only():
            return torch.export.load(path)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        raise FrontendError(
            f"{path.name} could not be read by torch.export.load: {type(error).__name__}: {reason}", code="E_FILE",
            hint=f"save it again with the installed torch {torch.__version__}",
        ) from error  # fmt: skip


def _check_archive(path: Path) -> None:
    """Looks for what torch.export.load would execute, without torch."""
    with zipfile.ZipFile(path) as archive:
        total = 0
        for entry in archive.infolist():
            name = entry.filename
            if (
                name.startswith(("/", "\\"))
                or ".." in re.split(r"[/\\]", name)
                or "\\" in name
                or ":" in name
                or "\0" in name
            ):
                raise FrontendError(f"{path.name} holds the path {name!r}, which leaves the archive", code="E_FILE")
            total += entry.file_size
            if entry.file_size > _MAX_RATIO * max(entry.compress_size, 1) or total > _MAX_BYTES:
                raise FrontendError(
                    f"{path.name}: {name!r} unpacks to {entry.file_size} bytes; that is no model", code="E_FILE"
                )
            if reason := _executes(name):
                raise UnsupportedModelError(
                    f"{path.name} holds {name!r}: {reason}", code="E_FILE_EXECUTES",
                    hint="export a module without custom objects, and save it with torch.export.save of a current torch",
                )  # fmt: skip
            if name.endswith(".json") and entry.file_size:
                _check_json(path, name, archive.read(entry))


def _executes(name: str) -> str:
    """Why an entry of an archive would be executed; empty if it is data."""
    base = name.rpartition("/")[2]
    if base.startswith("custom_obj_") or base.startswith("opaque"):
        return "a pickled object"
    if "data/aotinductor/" in name or "executorch/" in name:
        return "compiled code"
    if base.endswith(".pt") and ("/weights/" in name or "/constants/" in name):
        return "pickled weights of an old format"
    return ""


def _check_json(path: Path, name: str, text: bytes) -> None:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise FrontendError(f"{path.name}: {name!r} is not JSON: {error}", code="E_FILE") from None
    for record in _records(content):
        if record.get("use_pickle") is True:
            raise UnsupportedModelError(f"{path.name}: {name!r} stores a pickled tensor", code="E_FILE_EXECUTES")
        target = record.get("target")
        if isinstance(target, str) and "inputs" in record and not _CALLABLE.fullmatch(target):
            raise UnsupportedModelError(
                f"{path.name} calls {target!r}, which is none of PyTorch's own operators", code="E_FILE_EXECUTES",
                hint="models with custom operators cannot be compiled; replace them by PyTorch's own",
            )  # fmt: skip


def _records(content: Any) -> Iterator[Mapping[str, Any]]:
    """Every object in a JSON document."""
    pending = [content]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            yield item
            pending += item.values()
        elif isinstance(item, list):
            pending += item


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
        return _filled(options.model_class, _state(path), path)
    if not _trusted(path, options.trust_pickle):
        raise UntrustedPickleError(
            f"{path.name} is a pickle: reading a whole module from it executes whatever the file says",
            hint="if it holds a state dict, name its class: model_class='package.module:Class' (nothing is executed then); "
            "if you made the file yourself, trust_pickle=True; safest is torch.export.save",
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise FrontendError(
            f"{path.name} could not be unpickled: {type(error).__name__}: {error}", code="E_FILE"
        ) from error
    if not isinstance(content, torch.nn.Module):
        raise FrontendError(
            f"{path.name} holds a {type(content).__name__}, not a module", code="E_FILE",
            hint="a state dict needs model_class='package.module:Class'",
        )  # fmt: skip
    return content


def _trusted(path: Path, trust: bool | str) -> bool:
    if not isinstance(trust, str):
        return trust
    algorithm, _, wanted = trust.partition(":")
    if algorithm != "sha256" or not re.fullmatch(r"[0-9a-fA-F]{64}", wanted):
        raise UsageError(f"trust_pickle takes True or 'sha256:<64 digits>', got {trust!r}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wanted.lower():
        raise UntrustedPickleError(
            f"{path.name} is not the file that you trust: its SHA-256 is {found}, not {wanted.lower()}"
        )
    return True


def _state(path: Path) -> Mapping[str, torch.Tensor]:
    try:
        with _data_only():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UntrustedPickleError(
            f"{path.name} holds more than tensors, and was not read further: {reason}",
            hint="save model.state_dict() alone, or torch.export.save the model",
        ) from None
    for key in _NESTED_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise FrontendError(f"{path.name} holds no state dict, but a {type(content).__name__}", code="E_FILE")
    return content


def _filled(model_class: str, state: Mapping[str, torch.Tensor], path: Path) -> torch.nn.Module:
    """A new module of the named class with the weights of a state dict."""
    module_name, colon, attribute = model_class.partition(":")
    if not colon:
        raise UsageError(f"model_class is 'package.module:Class', got {model_class!r}")
    try:
        factory: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            factory = getattr(factory, part)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"model_class {model_class!r} cannot be imported: {error}") from error
    try:
        module = factory()
    except TypeError as error:
        raise UsageError(
            f"{model_class} cannot be made without arguments: {error}",
            hint="name a function without parameters that makes the model",
        ) from error
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"{model_class} makes a {type(module).__name__}, not an nn.Module")
    try:
        module.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        raise FrontendError(f"the weights of {path.name} do not fit {model_class}: {error}", code="E_FILE") from None
    return module.eval()
