"""The thin runtime: runs compiled models with neither the compiler nor the training framework."""

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from mlec.runtime.executable import Executable
from mlec.runtime.measure import BenchmarkResult, Profile
from mlec.runtime.model import CompiledModel
from mlec.runtime.program import Buffer, Call, CallSequence, KernelInfo, Program
from mlec.runtime.vm import VirtualMachine


def open_program(
    program: Program, objects: Sequence[bytes], tensors: Mapping[str, NDArray[Any]], num_threads: int | None = None
) -> Executable | VirtualMachine:
    """What runs a program: its kernels called in a row, or the virtual machine; arguments and errors as those have them."""
    kind = VirtualMachine if program.sequence is None else Executable
    return kind(program, objects, tensors, num_threads)


__all__ = [
    "BenchmarkResult",
    "Buffer",
    "Call",
    "CallSequence",
    "CompiledModel",
    "Executable",
    "KernelInfo",
    "Profile",
    "Program",
    "VirtualMachine",
    "open_program",
]
