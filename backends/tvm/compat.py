"""Names of TVM whose place changes from release to release, gathered in one file.

Templates build programs inside `prim_func` with `T`, the builder behind TVMScript: ``with T.serial(n) as i`` adds a
loop to the program, a Python ``for`` unrolls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from mlec.runtime.ffi import Hidden
from mlec.runtime.library import load_library

load_library()  # sets the thread pool up before TVM does
with Hidden("torch"):  # TVM imports it to pass its tensors faster, which costs a second and serves nobody here
    import tvm
from tvm import relax, s_tir, te, tirx
from tvm.ir import IRModule
from tvm.s_tir import dlight
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target
from tvm.target import codegen as llvm
from tvm.tirx.script.builder import ir
from tvm_ffi import structural_equal

__all__ = [
    "IRModule",
    "KernelBuilder",
    "T",
    "Target",
    "dlight",
    "llvm",
    "prim_func",
    "reach",
    "relax",
    "s_tir",
    "structural_equal",
    "te",
    "tirx",
    "tvm",
]


MOST_NARROW = (1 << 31) - 1
"""Elements of a tensor up to which indices of 32 bits reach each of them."""

_WIDE: ContextVar[bool] = ContextVar("_WIDE", default=False)


class _Builder:
    """TVM's builder, but that the loops of a kernel on tensors too large for indices of 32 bits count in 64: TVM gives an extent that is
    an ``int`` 32, and an index made of such overflows.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(ir, name)

    def serial(self, *range_: Any, **options: Any) -> Any:
        return ir.serial(*map(_counted, range_), **options)

    def parallel(self, *range_: Any, **options: Any) -> Any:
        return ir.parallel(*map(_counted, range_), **options)

    def grid(self, *extents: Any) -> Any:
        return ir.grid(*map(_counted, extents))


def _counted(extent: Any) -> Any:
    return tirx.const(extent, "int64") if _WIDE.get() and isinstance(extent, int) else extent


T = _Builder()
"""The name all TVMScript uses."""


def reach(elements: object) -> None:
    """The loops of the kernel under construction are to reach so many elements of a parameter, where that is known."""
    if isinstance(elements, int) and elements > MOST_NARROW:
        _WIDE.set(True)


@dataclass
class KernelBuilder:
    """Handle on a program under construction; `func` is there after the ``with`` block."""

    func: Any = field(default=None)


@contextmanager
def prim_func(name: str, noalias: bool = True) -> Iterator[KernelBuilder]:
    """Collect what `T` is told inside the ``with`` block into a ``PrimFunc`` called ``name``.

    Parameter buffers do not overlap unless ``noalias`` is off: LLVM may put loads and stores of different ones in any order.
    """
    kernel = KernelBuilder()
    narrow = _WIDE.set(False)
    try:
        with IRBuilder() as builder:
            with T.prim_func(s_tir=True):
                T.func_name(name)
                T.func_attr({"global_symbol": name, "tirx.noalias": noalias})
                yield kernel
            kernel.func = builder.get()
    finally:
        _WIDE.reset(narrow)
