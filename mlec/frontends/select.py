"""Finds the frontend of a model object or of a file."""

from __future__ import annotations

import logging
import os
import zipfile
from pathlib import Path
from typing import Any

from mlec import registry
from mlec.errors import FrontendError, MlecError, UnsupportedModelError
from mlec.frontends.base import Frontend, LowerOptions
from mlec.frontends.graph_files import decoded, is_graph, parse_file
from mlec.frontends.other_files import described

HEAD_BYTES = 1 << 16

logger = logging.getLogger("mlec")


def frontend_for(model: object) -> Frontend:
    """The frontend that lowers this object.

    Raises:
        UnsupportedModelError: naming the type and the frontends there are.
    """
    for frontend in _frontends():
        if frontend.accepts(model):
            return frontend
    if isinstance(model, type):
        raise UnsupportedModelError(
            f"expected a model, got the class {model.__module__}.{model.__qualname__}", hint="pass an instance, fitted"
        )
    kind = type(model)
    raise UnsupportedModelError(
        f"no frontend lowers {kind.__module__}.{kind.__qualname__}",
        hint="pass a fitted estimator, a booster, a torch module with example_inputs, or a file of one; "
        f"frontends: {', '.join(registry.names('frontends'))}",
    )


def load_model_file(path: Path, options: LowerOptions) -> tuple[Frontend | None, Any]:
    """Reads a model file; its content decides what it is.

    Returns:
        The model and its frontend; of a graph in text form the `Graph`, which needs none.

    Raises:
        FrontendError: for a file that is missing, unreadable, or of no known kind.
        IRError: for a graph that is not valid, or whose text names arrays.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for somebody to write to it
        raise FrontendError(
            f"{path} is a directory, device or pipe", code="E_MODEL_FILE", hint="give the path of a model file"
        )
    try:
        return _read(path, options)
    except OSError as error:
        raise FrontendError(
            f"cannot read {path}: {error.strerror or error}", code="E_MODEL_FILE", hint="check the path"
        ) from error
    except MemoryError as error:
        raise FrontendError(
            f"there is not enough memory to read {path}", code="E_NO_MEMORY",
            hint="end other programs, or compile on a machine with more memory; a damaged file may only seem large",
        ) from error  # fmt: skip


def _read(path: Path, options: LowerOptions) -> tuple[Frontend | None, Any]:
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        size = os.fstat(file.fileno()).st_size
    if size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise MemoryError
    if head[:4] == b"MLE\0":
        hint = "load it with mlec.load, or run it with `mlec run`"
        raise FrontendError(f"{path} is a compiled model already", code="E_MODEL_FILE", hint=hint)
    if is_graph(head):
        return None, parse_file(decoded(path.read_bytes(), path), path)
    for frontend in _frontends():
        if frontend.sniff(head, path):
            try:
                return frontend, frontend.load(path, options)
            except ModuleNotFoundError as error:
                raise FrontendError(
                    f"reading {path} needs the package {error.name!r}",
                    code="E_MISSING_PACKAGE",
                    hint=f"pip install 'mlec[{frontend.name}]'",
                ) from error
    if head[:4] == b"PK\3\4" and not zipfile.is_zipfile(path):
        raise FrontendError(
            f"{path} is a damaged zip archive: its end, with the list of its files, is missing",
            code="E_MODEL_FILE",
            hint="the file was cut off: copy it or save it again",
        )
    kind, hint = described(head)
    raise FrontendError(f"{path} is {kind or 'not a model file of a known kind'}", code="E_MODEL_FILE", hint=hint)


def _frontends() -> list[Frontend]:
    """All frontends whose packages are installed; one that cannot be used is left out with a warning, and stops no other."""
    found: list[Frontend] = []
    for name in registry.names("frontends"):
        try:
            found.append(registry.load("frontends", name)())
        except MlecError as error:
            if error.code != "E_MISSING_PACKAGE":
                logger.warning("the frontend %s is left out: %s", name, error.message)
        except Exception as error:  # another package's class can fail with anything
            if name in registry.FRONTENDS:
                raise
            logger.warning("the frontend %s is left out: %s: %s", name, type(error).__name__, error)
    return found
