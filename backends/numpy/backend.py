"""The numpy backend: nothing is compiled; the interpreter runs the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mlec.backends.base import Backend, CompiledModule, CompileOptions
from mlec.capabilities import TARGETS
from mlec.errors import TargetError
from mlec.ir.graph import Graph
from mlec.ir.interp import run_graph
from mlec.ir.op import OPS, Array
from mlec.runtime.program import Program
from mlec.target import Target


class NumpyBackend(Backend):
    """The reference: slow, and what every other backend is measured against."""

    name = "numpy"
    targets: Mapping[str, str] = TARGETS["numpy"]

    def how(self, op: str, kind: str = "numpy") -> str:
        """Every op has a reference."""
        return "reference" if op in OPS else ""

    def compile(self, graph: Graph, target: Target, options: CompileOptions | None = None) -> CompiledModule:
        """Keeps the graph as it is; the module holds its constants and no code.

        Raises:
            TargetError: for any target but ``"numpy"``.
        """
        if target != Target("numpy"):
            raise TargetError(f"the numpy backend does not serve the target {target}", hint='its target is "numpy"')
        program = Program(backend="numpy", device="cpu", constants=tuple(graph.constants), target={"kind": target.kind})
        return CompiledModule(program, (), graph.constants, graph.signature)

    def executable(self, graph: Graph, num_threads: int | None = None) -> Interpreted:
        """Something that runs the graph."""
        return Interpreted(graph)


@dataclass(frozen=True, eq=False)
class Interpreted:
    """A graph with the interface of `mlec.runtime.Executable`."""

    graph: Graph
    num_threads: int = 1

    @property
    def weights_nbytes(self) -> int:
        return sum(array.nbytes for array in self.graph.constants.values())

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Evaluates the graph; the caller owns the results."""
        return [np.array(a) for a in run_graph(self.graph, inputs)]

    def close(self) -> None:
        """There is nothing to free."""
