"""What a backend is, and what it hands over.

A package adds one by an entry point in the group ``mlec.backends``, named as the backend names itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from mlec.errors import TargetError, UnsupportedOpError
from mlec.ir.graph import Graph, Node
from mlec.ir.op import Array
from mlec.measuring.tuning import TunedKernel, Tuning
from mlec.pipeline import TargetFacts
from mlec.runtime.program import Program
from mlec.signature import Signature
from mlec.target import Target


class Speeds(Protocol):
    """What the time of such a kernel depends on, see `mlec.measuring.machine.Machine`."""

    @property
    def clock(self) -> float: ...

    @property
    def dispatch_seconds(self) -> float: ...

    def traffic(self, working_set: float, threads: int = 1) -> float: ...


class RowTimes(Protocol):
    """What a backend expects of a kernel whose time is a matter of data that the ops' costs do not tell, such as the shape of trees."""

    def seconds(self, rows: int, threads: int, machine: Speeds) -> float:
        """Of one call, without the overhead of that."""


@dataclass(frozen=True)
class KernelNote:
    """How one kernel came about, for the report.

    Attributes:
        symbol: as in `Program.kernels`.
        op: the IR op.
        strategy: which template, and what was decided for it, e.g. ``"gemm, packed by 32 columns, epilogue: add relu"``.
        bits: width of the widest floats that it reads or writes, or 8 of a product of bytes: for the peak that it can reach.
        node: whose arithmetic it does.
        weights: bytes of the constants that it reads.
        rows: its expected time, where the backend knows better than the cost model.
        tail: what it computes of each result of the node besides.
    """

    symbol: str
    op: str
    strategy: str
    bits: int = 32
    node: Node | None = field(default=None, repr=False)
    weights: int = 0
    rows: RowTimes | None = None
    tail: tuple[Node, ...] = field(default=(), repr=False)


@dataclass(frozen=True, eq=False)
class CompiledModule:
    """A graph turned into code.

    Attributes:
        program: what to call, with which constants, made of which kernels.
        objects: the object files, which `mlec.runtime` links and calls. Without any, the backend is an `Interpreter`.
        constants: every tensor that the program takes after its inputs, in the order of ``program.constants``.
        signature: of the graph.
        notes: one for each kernel.
        seconds: what compiling took.
        tuned: the kernels that were tuned.
    """

    program: Program
    objects: tuple[bytes, ...]
    constants: Mapping[str, Array]
    signature: Signature
    notes: tuple[KernelNote, ...] = ()
    seconds: float = 0.0
    tuned: tuple[TunedKernel, ...] = ()


@dataclass(frozen=True)
class CompileOptions:
    """How to compile.

    Attributes:
        progress: called with a stage ("lower", "tune", "build"), what is done and how much there is to do.
        tuning: how to choose the schedules of kernels by measuring; None takes those of the cost models.
    """

    progress: Callable[[str, int, int], None] | None = field(default=None, repr=False)
    tuning: Tuning | None = None

    def report(self, stage: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)


class Backend(Protocol):
    """Turns graphs into code for some kinds of targets.

    Attributes:
        name: as in ``Program.backend``.
        targets: the forms of the targets that it serves and what they mean, e.g. ``{"npu": "...", "npu:v2": "..."}``. A target
            whose kind is the word before the colon is compiled by this backend.
        pipeline: the passes that run before it unless the user names others, e.g. ``"O1"`` for graphs without fused nodes.
    """

    name: str
    targets: Mapping[str, str]
    pipeline: str = "default"

    def how(self, op: str, kind: str) -> str:
        """How the backend lowers an op for a kind of target, in a few words; empty where it does not."""
        ...

    def supports(self, op: str, kind: str) -> bool:
        """Whether the backend lowers an op for a kind of target."""
        return bool(self.how(op, kind))

    def facts(self, target: Target) -> TargetFacts:
        """What the passes may know of a target; nothing special unless the backend says so.

        Raises:
            TargetError: for a target that it does not serve.
        """
        return TargetFacts(row_programs=False)

    def check_tunable(self, target: Target) -> None:
        """Whether kernels for a target can be tuned here.

        Raises:
            TargetError: they can't, as those of most backends.
        """
        raise TargetError(f"kernels for {target} can't be tuned", hint="leave tune at 0")

    def multiply_adds(self, bits: int, threads: int) -> float:
        """Operations a second on floats of ``bits`` bits, at most, by threads of this machine; 0 where the backend cannot tell."""
        return 0.0

    def compile(self, graph: Graph, target: Target, options: CompileOptions | None = None) -> CompiledModule:
        """Compiles a verified graph.

        Raises:
            UnsupportedOpError: for an op that the backend does not lower; names the node.
            TargetError: for a target that it does not serve.
        """
        ...


def refuse_unsupported(graph: Graph, backend: Backend, kind: str) -> None:
    """Refuses a graph with an op that the backend does not lower, also within the bodies of fused nodes.

    Raises:
        UnsupportedOpError: names the first such node.
    """
    for node in graph.compute_nodes:
        if not backend.supports(node.name, kind):
            raise UnsupportedOpError(
                f"the {backend.name} backend has no lowering of {node.name} for {kind}", loc=node.loc,
                hint='compile for another target, such as "numpy"',
            )  # fmt: skip
        if isinstance(body := node.attrs.get("body"), Graph):
            refuse_unsupported(body, backend, kind)


@runtime_checkable
class Interpreter(Protocol):
    """A backend that hands over no object files: it runs graphs itself, and is needed wherever its files are run."""

    def executable(self, graph: Graph, num_threads: int | None = None) -> Any:
        """Something that runs the graph, with the interface of `mlec.runtime.model.Runnable`."""
        ...
