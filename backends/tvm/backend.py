"""The TVM backend: graph -> kernels and a Relax function -> object files."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import MappingProxyType

from mlec.backends.base import CompiledModule, CompileOptions
from mlec.backends.tvm.compat import llvm, tvm
from mlec.backends.tvm.lowering import LOWERINGS, Lowering
from mlec.backends.tvm.objects import to_objects
from mlec.backends.tvm.pipeline import compile_for_cpu
from mlec.backends.tvm.target import TargetInfo
from mlec.errors import TargetError
from mlec.ir.graph import Graph
from mlec.runtime.program import Program
from mlec.target import Target

from mlec.backends.tvm import (  # noqa: F401  isort: skip  (they register their lowerings)
    lower_elementwise, lower_fused, lower_linalg, lower_nn, lower_reduce, lower_shape, lower_tree,
)  # fmt: skip


class TVMBackend:
    """Compiles for CPUs through LLVM. The object files hold the kernels and the bytecode that calls them."""

    name = "tvm"
    unsupported: Mapping[str, str] = MappingProxyType({})

    def supports(self, op: str) -> bool:
        """Whether there is a lowering of the op."""
        return op in LOWERINGS or op == "constant"

    def compile(self, graph: Graph, target: Target, options: CompileOptions | None = None) -> CompiledModule:
        """Compiles a verified graph.

        Raises:
            UnsupportedOpError: for an op without a lowering; names the node.
            TargetError: for a target that is not a CPU, or a CPU that LLVM does not know.
        """
        options = options or CompileOptions()
        begin = time.perf_counter()
        if target.kind != "cpu":
            raise TargetError(f"this backend does not compile for {target}")
        info = cpu_info(target)
        lowered = Lowering(graph, info, options).run()
        options.report("build", 0, 1)
        executable = compile_for_cpu(lowered.module, info.tvm_target())
        objects = to_objects(executable)
        options.report("build", 1, 1)
        program = Program(
            backend="tvm",
            device="cpu",
            constants=tuple(lowered.constants),
            kernels=lowered.kernels,
            target={"triple": info.triple, "mcpu": info.mcpu, "features": sorted(info.features)},
        )
        return CompiledModule(
            program, objects, lowered.constants, graph.signature, lowered.notes, time.perf_counter() - begin
        )


def cpu_info(target: Target) -> TargetInfo:
    """The facts of a cpu target.

    Raises:
        TargetError: LLVM does not know the processor.
    """
    if not target.arch:
        return TargetInfo.host()
    known = {str(name) for name in llvm.llvm_get_cpu_archlist(tvm.target.Target("llvm"))}
    if target.arch not in known:
        raise TargetError(
            f"LLVM does not know the processor {target.arch!r}",
            hint=f"it knows e.g. {', '.join(sorted(n for n in known if n.startswith(target.arch[:3]))[:8]) or 'x86-64-v3'}",
        )
    return TargetInfo.for_cpu(target.arch, attributes=target.features)
