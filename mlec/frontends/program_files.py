"""Files of torch.export.save. torch reads them in a process of its own: this one looks at the archive, and gets a graph and arrays.

torch's reader is C++ and Python that believe what the file says, and evaluate parts of it; so a file is checked first for what
is more than data (`torch_archive`), then read with bounded time, memory and files (`source_process`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlec.errors import MlecError
from mlec.frontends.source_process import SourceProcess, in_memory
from mlec.frontends.torch_archive import check_program_archive


@dataclass(frozen=True)
class ProgramFile:
    """An exported program in a process of its own.

    Attributes:
        process: has read the file; lowers the program, and runs it as ``run``.
    """

    path: Path
    process: SourceProcess


def load_program_file(path: Path) -> ProgramFile:
    """The program in a file.

    Raises:
        UnsupportedModelError: it has parts that only execute: custom objects, custom operators, compiled libraries.
        FrontendError: it is damaged, or reading it takes too much time or memory, or crashes torch.
    """
    with path.open("rb") as opened:
        file = in_memory(opened)  # what is checked must be what torch reads
    with file:
        check_program_archive(file, path)
        process = SourceProcess("torch", "program", file, ("run",), path.name)
    try:
        process.wait()
    except MlecError as error:
        if error.code == "E_FILE":
            error.message = f"{path.name}: {error.message}"
        raise
    return ProgramFile(path, process)
