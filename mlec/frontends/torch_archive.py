"""What a file of torch holds, found out with `zipfile` alone: torch itself executes parts of some files when it reads them."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from mlec.errors import FrontendError, UnsupportedModelError

_ZIP = b"PK\x03\x04"
_OLD_PICKLE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before version 1.6
_MAX_RATIO = 200
_MAX_BYTES = 1 << 40
_CALLABLE = re.compile(
    r"torch\.ops\.(aten|prims|higher_order)\.\w+(\.\w+)?|(torch\.)?_?operator\.\w+|math\.\w+|torch\.sym_\w+|torch\._sym_\w+"
    r"|torch\.fx\.experimental\.sym_node\.\w+"
)

FileKind = Literal["program", "torchscript", "pickle"]


def torch_file_kind(head: bytes, path: Path) -> FileKind | None:
    """What a file with these first bytes is; None if torch did not write it."""
    if head.startswith(_OLD_PICKLE):
        return "pickle"
    if not head.startswith(_ZIP):
        return None
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


def check_program_archive(path: Path) -> None:
    """Looks for what torch.export.load would execute.

    Raises:
        UnsupportedModelError: naming the part that would be executed.
        FrontendError: for paths that leave the archive, parts that unpack to far too much, and broken JSON.
    """
    with zipfile.ZipFile(path) as archive:
        if len(set(archive.namelist())) != len(archive.namelist()):
            raise FrontendError(
                f"{path.name} holds an entry twice; readers may disagree which one counts", code="E_FILE"
            )
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
