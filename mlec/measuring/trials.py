"""Graphs that passes run on the side: compiled for this machine, and timed where the model itself will run on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlec import registry
from mlec.backends.base import CompiledModule, CompileOptions
from mlec.ir import Graph
from mlec.ir.op import Array
from mlec.packaging.recompiling import executable_of
from mlec.pipeline import PassContext, PassPipeline, Trials
from mlec.target import Target

INTO_KERNELS = "layout,fold-constants,fuse"
REPEATS = 10


@dataclass(frozen=True)
class HostTrials(Trials):
    """For a model that is compiled for a target.

    Attributes:
        target: of the model; what runs on another device or processor runs here on the processor of this machine, and is not timed.
        num_threads: of the model.
    """

    target: Target
    num_threads: int | None = None
    _last: dict[str, CompiledModule] = field(default_factory=dict, init=False, repr=False, compare=False)

    def compiled(self, graph: Graph) -> Callable[[Sequence[Array]], Sequence[Array]]:
        """Something that runs the graph."""
        executable = self._executable(graph)
        return lambda inputs: executable.run(list(inputs))

    def module(self, graph: Graph, target: Target) -> CompiledModule | None:
        """What was made of the last graph that ran on the side, where that came to be this one, of the model itself."""
        return self._last.get(graph.digest) if self._last and target == Target() else None

    def times(self, graph: Graph, inputs: Sequence[Array]) -> Sequence[tuple[str, str, float]]:
        """Op, location and seconds of each kernel; nothing for a model that is for something else than this processor."""
        if self.target != Target():
            return []
        executable = self._executable(graph)
        taken = executable.time_kernels(list(inputs), REPEATS)
        return [(kernel.op, kernel.location, taken[kernel.symbol][1]) for kernel in executable.program.kernels]

    def _executable(self, graph: Graph) -> Any:
        target = Target()
        backend = registry.backend_of(target.kind)
        ready, _ = PassPipeline.parse(INTO_KERNELS, verify="off").run(graph, PassContext(backend.facts(target)))
        module = backend.compile(ready, target, CompileOptions())
        self._last.clear()
        self._last[ready.digest] = module
        return executable_of(module, ready, self.num_threads)
