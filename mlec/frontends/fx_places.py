"""Which line of the user's code an op or an error comes from."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import torch

from mlec.ir import UNKNOWN, Location

_TORCH_DIRECTORY = str(Path(torch.__file__).parent)
_OWN_DIRECTORY = str(Path(__file__).parent)
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def place_of(node: torch.fx.Node, model: str) -> Location:
    """The innermost line of the user's own code that made a node, and the path of its submodule; unknown if torch does not tell."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [(file, int(line)) for file, line in frames if not _is_library(file)]
    paths = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values() if not path.startswith("_empty_")]
    scope = re.sub(r"L\['self'\]\.?|L__self___?", "", paths[-1]) if paths else ""
    if not own and not scope:
        return UNKNOWN
    file, line = own[-1] if own else ("", 0)
    return Location(file, line, scope or model)


def place_of_error(error: Exception, scope: str) -> Location:
    """The innermost line of the user's own code in the traceback of an error."""
    return _innermost(traceback.extract_tb(error.__traceback__), scope)


def place_of_call() -> Location:
    """The innermost line of the user's own code that is running."""
    return _innermost(traceback.extract_stack(), "")


def _innermost(frames: traceback.StackSummary, scope: str) -> Location:
    own = [(frame.filename, frame.lineno or 0) for frame in frames if not _is_library(frame.filename)]
    file, line = own[-1] if own else ("", 0)
    return Location(file, line, scope)


def _is_library(file: str) -> bool:
    """Frames that are not the user's: torch's own, ours and generated code."""
    return file.startswith((_TORCH_DIRECTORY, _OWN_DIRECTORY, "<", "torch/")) or "/site-packages/torch/" in file
