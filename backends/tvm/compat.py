"""Names of TVM whose place changes from release to release, gathered in one file.

Templates build programs inside `prim_func` with `T`, the builder behind TVMScript: ``with T.serial(n) as i`` adds a
loop to the program, a Python ``for`` unrolls.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from mlec.hidden import Hidden
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
    "SCRATCH",
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

STACK_BYTES = 1024
"""Of a buffer inside a kernel up to which TVM puts it on the stack; larger ones come from a pool of memory that each thread has."""

SCRATCH = "mlec.scratch"
"""The attribute of a program that says how many bytes of that pool it takes at most: a number, or an expression in its extents."""

_WIDE: ContextVar[bool] = ContextVar("_WIDE", default=False)
_SCRATCH: ContextVar[Any] = ContextVar("_SCRATCH", default=0)


class _Builder:
    """TVM's builder, but for two things. The loops of a kernel on tensors too large for indices of 32 bits count in 64: TVM gives an extent
    that is an ``int`` 32, and an index made of such overflows. And buffers inside a kernel are added up.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(ir, name)

    def serial(self, *range_: Any, **options: Any) -> Any:
        return ir.serial(*map(_counted, range_), **options)

    def parallel(self, *range_: Any, **options: Any) -> Any:
        return ir.parallel(*map(_counted, range_), **options)

    def grid(self, *extents: Any) -> Any:
        return ir.grid(*map(_counted, extents))

    def alloc_buffer(self, shape: Sequence[Any], dtype: str, **options: Any) -> Any:
        element = tvm.DataType(dtype)
        extents = [int(extent) if isinstance(extent, tirx.IntImm) else extent for extent in shape]
        nbytes = math.prod(extents) * -(-element.bits * element.lanes // 8)
        if not isinstance(nbytes, int) or nbytes > STACK_BYTES:
            _SCRATCH.set(_SCRATCH.get() + nbytes)
        return ir.alloc_buffer(shape, dtype, **options)


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
    narrow, none = _WIDE.set(False), _SCRATCH.set(0)
    try:
        with IRBuilder() as builder:
            with T.prim_func(s_tir=True):
                T.func_name(name)
                T.func_attr({"global_symbol": name, "tirx.noalias": noalias})
                yield kernel
            scratch = _SCRATCH.get()
            # A copy of an image too small for a window would have less than no rows.
            nbytes = scratch if isinstance(scratch, int) else tvm.sym.Analyzer().simplify(tirx.max(scratch, 0))
            kernel.func = builder.get().with_attr(SCRATCH, nbytes)
    finally:
        _WIDE.reset(narrow)
        _SCRATCH.reset(none)
