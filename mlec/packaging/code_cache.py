"""Graphs of files whose own machine code does not run here, as this machine compiled them the first time.

An entry is a .mle file in ``$XDG_CACHE_HOME/mlec/compiled`` (default ``~/.cache``): the program, its object files, and the tensors that
the model's own file does not hold. Its code runs for the same reason as that of any file: the ledger proves that this user built it
(`mlec.artifact.trust`). What somebody else put there is ignored, as is what is damaged. Nothing of an encrypted model is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import ChainMap
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from mlec.artifact import RELOCATABLE, Artifact, KernelBlob, decide, record_built
from mlec.artifact.user_folders import user_folder
from mlec.errors import MlecError
from mlec.ir.op import Array
from mlec.measuring.tuning import this_installation
from mlec.processor import host_flags
from mlec.runtime import Program
from mlec.target import Target

if TYPE_CHECKING:
    from mlec.backends.base import CompiledModule
    from mlec.ir import Graph

SOURCES: Final = Path(__file__).parents[1]
MOST_BYTES: Final = 4 << 30
"""Of all entries together; those that were not used for longest go first."""

Compiled = tuple[Program, tuple[bytes, ...], Mapping[str, Array]]
"""A program, its object files, and its constants among other tensors."""


def entry_for(artifact: Artifact, target: Target) -> Path | None:
    """Where the code for a file's graph is kept, or would be; None where nothing may be: the file is encrypted, there is no home.

    The name covers whatever decides what comes out of compiling: the file's code identity, the target, this processor, the compiler.
    """
    folder = directory()
    if folder is None or artifact.header.aead_alg:
        return None
    facts = (artifact.code_id, repr(target), sorted(host_flags()), this_installation(), *_compiler())
    return folder / f"{hashlib.sha256(repr(facts).encode()).hexdigest()}.mle"


def find(entry: Path, artifact: Artifact) -> Compiled | None:
    """What was kept; None if there is nothing, or nothing that may run."""
    try:
        with Artifact.open(entry) as kept:
            # The name in the metadata: a good entry under the name of another one is none.
            if kept.metadata.get("name") != entry.name or not decide(kept).native:
                return None
            program = msgspec.convert(kept.metadata.get("program"), Program)
            objects, own = tuple(blob.data for blob in kept.kernels), kept.tensors
    except (MlecError, msgspec.ValidationError):
        return None
    with contextlib.suppress(OSError):
        os.utime(entry)  # it was used
    return program, objects, ChainMap(dict(own), artifact.tensors)  # type: ignore[arg-type]


def keep(entry: Path, artifact: Artifact, graph: Graph, module: CompiledModule) -> None:
    """Keep what compiling the graph of a file gave. Where that cannot be, it is compiled again the next time."""
    from mlec.artifact import write

    in_file = artifact.tensors
    own = {
        name: array
        for name, array in module.constants.items()
        if name not in in_file or graph.constants.get(name) is not array
    }
    metadata = {"name": entry.name, "program": msgspec.to_builtins(module.program), "targets": [module.program.target]}
    kernels = [KernelBlob(RELOCATABLE, 0, data) for data in module.objects]
    with contextlib.suppress(MlecError, OSError):
        entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        saved = write(entry, metadata=metadata, graph="", tensors=own, kernels=kernels)
        if not record_built(saved.code_id):
            entry.unlink()
        _make_room(entry.parent)


def directory() -> Path | None:
    """Where this user's entries lie; None where there is no home."""
    folder = user_folder("XDG_CACHE_HOME", ".cache")
    return None if folder is None else Path(folder) / "compiled"


def _make_room(folder: Path) -> None:
    entries = sorted(((path.stat(), path) for path in folder.glob("*.mle")), key=lambda entry: -entry[0].st_mtime_ns)
    total = 0
    for info, path in entries:
        total += info.st_size
        if total > MOST_BYTES:
            path.unlink()


@cache
def _compiler() -> tuple[str, ...]:
    """What compiles: versions of the libraries, and the state of our own sources, which change while one works on them."""
    found = []
    for name in ("apache-tvm", "apache-tvm-ffi"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(name)
    state = hashlib.sha256()
    for folder, _, names in sorted(os.walk(SOURCES, followlinks=True)):
        for name in sorted(names):
            if name.endswith(".py"):
                info = os.lstat(os.path.join(folder, name))  # an editor's lock is a link that leads nowhere
                state.update(f"{folder}/{name} {info.st_size} {info.st_mtime_ns}\n".encode())
    return (*found, state.hexdigest())
