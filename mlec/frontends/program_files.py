"""Files of torch that hold data: programs of torch.export.save, weights of torch.save. torch reads them in a process of its own: this one
looks at the archive, and gets a graph and arrays.

torch's reader is C++ and Python that believe what the file says, and evaluate parts of it; so a file is checked first for what
is more than data (`torch_archive`), then read with bounded time, memory and files (`source_process`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from mlec.errors import MlecError
from mlec.frontends.archives import checked_archive, written_anew
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
        file = written_anew(opened, path)  # what is checked must be what torch reads
    with file:
        check_program_archive(file, path)
        process = SourceProcess("torch", "program", file, ("run",), path.name)
    with _named(path):
        process.wait()
    return ProgramFile(path, process)


@dataclass(frozen=True)
class WeightsFile:
    """Weights in a process of its own, which begins to read them at once."""

    path: Path
    process: SourceProcess

    @staticmethod
    def open(path: Path) -> WeightsFile:
        """The file of a state dict.

        Raises:
            FrontendError: its archive is damaged, or no model's.
        """
        with path.open("rb") as opened:
            file = in_memory(opened)
        with file:
            if file.read(4) == b"PK\3\4":
                with checked_archive(file, path):
                    pass
            return WeightsFile(path, SourceProcess("torch", "weights", file, (), path.name))

    def read(self) -> dict[str, NDArray[Any]]:
        """The weights by name.

        Raises:
            UntrustedPickleError: the file holds more than tensors.
            FrontendError: it holds no state dict, is damaged, or reading it takes too much time or memory, or crashes torch.
        """
        with _named(self.path):
            return self.process.weights()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Puts the name of the file before what the process says of it."""
    try:
        yield
    except MlecError as error:
        if error.code in ("E_FILE", "E_UNTRUSTED_PICKLE"):
            error.message = f"{path.name}: {error.message}"
        raise
