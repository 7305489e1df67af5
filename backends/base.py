"""What a backend is, and what it hands over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from mlec.ir.graph import Graph
from mlec.ir.op import Array
from mlec.runtime.program import Program
from mlec.signature import Signature
from mlec.target import Target


@dataclass(frozen=True)
class KernelNote:
    """How one kernel came about, for the report.

    Attributes:
        symbol: as in `Program.kernels`.
        op: the IR op.
        strategy: which template, and what was decided for it, e.g. ``"gemm, packed by 32 columns, epilogue: add relu"``.
    """

    symbol: str
    op: str
    strategy: str


@dataclass(frozen=True, eq=False)
class CompiledModule:
    """A graph turned into code.

    Attributes:
        program: what to call, with which constants, made of which kernels.
        objects: the object files (see the backend).
        constants: every tensor that the program takes after its inputs, in the order of ``program.constants``.
        signature: of the graph.
        notes: one for each kernel.
        seconds: what compiling took.
    """

    program: Program
    objects: tuple[bytes, ...]
    constants: Mapping[str, Array]
    signature: Signature
    notes: tuple[KernelNote, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class CompileOptions:
    """How to compile.

    Attributes:
        progress: called with a stage ("lower", "build"), what is done and how much there is to do.
    """

    progress: Callable[[str, int, int], None] | None = field(default=None, repr=False)

    def report(self, stage: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)


class Backend(Protocol):
    """Turns graphs into code for one kind of target.

    Attributes:
        name: as in ``Program.backend``.
        unsupported: the ops that it cannot lower, with the reason.
    """

    name: str
    unsupported: Mapping[str, str]

    def supports(self, op: str) -> bool:
        """Whether the backend lowers an op of that name."""
        ...

    def compile(self, graph: Graph, target: Target, options: CompileOptions = ...) -> CompiledModule:
        """Compiles a verified graph.

        Raises:
            UnsupportedOpError: for an op that the backend does not lower; names the node.
            TargetError: for a target that it does not serve.
        """
        ...
