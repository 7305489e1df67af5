"""The thin runtime: runs compiled models with neither the compiler nor the training framework."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlec.runtime.executable import Executable
from mlec.runtime.model import CompiledModel
from mlec.runtime.program import Array, Buffer, Call, CallSequence, KernelInfo, Program

if TYPE_CHECKING:
    from mlec.runtime.measure import BenchmarkResult, Profile
    from mlec.runtime.vm import VirtualMachine


def open_program(
    program: Program,
    objects: Sequence[bytes],
    tensors: Mapping[str, Array],
    num_threads: int | None = None,
    check: Callable[[], None] | None = None,
) -> "Executable | VirtualMachine":
    """What runs a program: its kernels called in a row, or the virtual machine; arguments and errors as those have them."""
    if program.sequence is not None:
        return Executable(program, objects, tensors, num_threads, check)
    from mlec.runtime.vm import VirtualMachine

    if check is not None:
        check()  # it copies the constants
    return VirtualMachine(program, objects, tensors, num_threads)


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

_LATER = {"BenchmarkResult": "measure", "Profile": "measure", "VirtualMachine": "vm"}
"""What answering takes none of is imported when it is asked for; by the module that has it."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
