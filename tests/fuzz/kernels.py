"""Quick compiling: machine code without LLVM's optimisations, and of each kernel once, in whatever graphs it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self
from unittest.mock import patch

from tvm_ffi import structural_hash

from mlec.backends.tvm import backend
from mlec.backends.tvm.compat import IRModule
from mlec.backends.tvm.compat import Target as TVMTarget
from mlec.backends.tvm.driver import driver
from mlec.backends.tvm.objects import to_object
from mlec.backends.tvm.pipeline import compile_for_cpu
from mlec.backends.tvm.target import TargetInfo
from mlec.runtime import elf

MOST = 20_000
"""Kernels that are kept, of some 20 KB each."""


class Kernels:
    """Object files with one kernel each, under symbols that tell what the kernel is. Two thirds of those in a random graph were in
    some thousand graphs before it.
    """

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}
        self._symbols: dict[str, str] = {}

    def objects(self, kernels: dict[str, Any], target: TVMTarget) -> tuple[bytes, ...]:
        """Of kernels by their names."""
        named = {
            name: f"kernel_{structural_hash([kernel.without_attr('global_symbol'), target]) & (1 << 64) - 1:016x}"
            for name, kernel in kernels.items()
        }
        self._symbols = named
        made = {symbol: self._object(kernels[name], symbol, target) for name, symbol in named.items()}
        return tuple(made.values())

    def driver(self, kernels: Sequence[str], triple: str) -> bytes:
        """In place of `mlec.backends.tvm.driver.driver`, for the kernels that were asked for last."""
        return driver([self._symbols[name] for name in kernels], triple)

    def _object(self, kernel: Any, symbol: str, target: TVMTarget) -> bytes:
        made = self._objects.pop(symbol, None)
        if made is None:
            module = compile_for_cpu(IRModule({symbol: kernel.with_attr("global_symbol", symbol)}), target)
            made = _with_no_start(to_object(module))
        self._objects[symbol] = made  # now the last that goes
        if len(self._objects) > MOST:
            del self._objects[next(iter(self._objects))]
        return made


def _with_no_start(data: bytes) -> bytes:
    """An object file of which nothing is to run when it is linked, and that asks for no module. Unless LLVM optimises these away, there are
    an empty function and a word that no kernel reads; with such, objects are left to LLVM's linker, which takes one of them.
    """
    made = bytearray(
        data.replace(b".init_array", b".none_array").replace(b"__tvm_ffi__library_ctx", b"__tvm_ffi__nothing_ctx")
    )
    header = elf.packed(elf.HEADER).unpack_from(made)
    table, count = (header[[name for name, _ in elf.HEADER].index(field)] for field in ("sections", "section_count"))
    for at in range(table, table + count * _SECTION.size, _SECTION.size):
        name, kind, *rest = _SECTION.unpack_from(made, at)
        _SECTION.pack_into(made, at, name, elf.SHT_PROGBITS if kind == elf.SHT_INIT_ARRAY else kind, *rest)
    return bytes(made)


_SECTION = elf.packed(elf.SECTION)
KERNELS = Kernels()


class Objects:
    """In place of `mlec.backends.tvm.pipeline.ObjectsForCPU`."""

    def __init__(self, target: TVMTarget, at_once: bool) -> None:
        self._target = target
        self._functions: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is under way."""

    def add(self, symbol: str, function: Any) -> None:
        self._functions[symbol] = function

    def finish(self) -> tuple[bytes, ...]:
        return KERNELS.objects(self._functions, self._target)


@contextmanager
def quick() -> Iterator[None]:
    """Compiles so within."""
    slow = TargetInfo.tvm_target

    def unoptimised(self: TargetInfo) -> TVMTarget:
        return TVMTarget({**dict(slow(self).export()), "opt-level": 0})

    with (
        patch.object(TargetInfo, "tvm_target", unoptimised),
        patch.object(backend, "ObjectsForCPU", Objects),
        patch.object(backend, "driver", KERNELS.driver),
    ):
        yield
