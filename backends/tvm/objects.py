"""From compiled modules to relocatable object files, with no C compiler or linker.

The runtime links these objects in memory (`mlec.runtime.executable`), so neither compiling nor loading a model starts
a process or leaves a file behind.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import tvm
from tvm.target.codegen import llvm_get_system_triple

from mlec.backends.tvm.elf import compact
from mlec.errors import LoweringError

OBJECT_BYTES = 32 << 20
"""More than the object files of one model take."""


class _KeepObjects:
    """Stands in for the linker in `export_library`: returns the bytes of the object files instead of linking them."""

    object_format = "o"

    def get_target_triple(self) -> str:
        """The triple for the bytecode object of a module that has no host kernel of its own."""
        return str(llvm_get_system_triple())

    def __call__(self, file_name: str, files: list[str], **options: Any) -> tuple[bytes, ...]:
        sources = [Path(file).name for file in files if not file.endswith(".o")]
        if sources:
            raise LoweringError(
                f"the module holds source code ({', '.join(sources)}) where only object files were expected",
                hint="compile for an llvm host target",
            )
        return tuple(compact(Path(file).read_bytes()) for file in files)


def to_object(module: tvm.runtime.Module) -> bytes:
    """The object file of host code.

    Raises:
        LoweringError: there is no space for temporary files.
    """
    with tempfile.TemporaryDirectory(prefix="mlec-") as folder:
        _require_space(Path(folder))
        path = Path(folder) / "kernels.o"
        module.write_to_file(str(path))
        return compact(path.read_bytes())


def to_objects(executable: tvm.runtime.Executable, pack_imports: Any = None) -> tuple[bytes, ...]:
    """The object files of what ``tvm.compile`` returned: host kernels first, then VM bytecode and device code.

    Args:
        executable: what was compiled.
        pack_imports: writes the object file of bytecode and device code (``fpack_imports`` of ``export_library``).

    Raises:
        LoweringError: a part of the module exists only as C source, so it would need a C compiler; or there is no space for
            temporary files.
    """
    with tempfile.TemporaryDirectory(prefix="mlec-") as folder:
        _require_space(Path(folder))
        objects: tuple[bytes, ...] = executable.export_library(
            "model.o", fcompile=_KeepObjects(), workspace_dir=folder, fpack_imports=pack_imports
        )
    return objects


def _require_space(folder: Path) -> None:
    """LLVM ends the process when it cannot write an object file, so the space is asked for before."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        with (folder / "space").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, OBJECT_BYTES)
        (folder / "space").unlink()
    except OSError as error:
        raise LoweringError(
            f"cannot write temporary files to {folder.parent}: {error.strerror}",
            code="E_TEMPORARY_SPACE",
            hint=f"free {OBJECT_BYTES >> 20} MB there, or name another directory in TMPDIR",
        ) from error
