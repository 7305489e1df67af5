"""The TVM passes that our programs need.

Kernels come as finished loops: no blocks to lower, no buffers to place, nothing to partition. TVM's default pipeline spends four
fifths of its time on passes that look for such work (`CompactBufferAllocation` alone takes most of it), and its storage rewriting
refuses functions that hold vectors of two lengths.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

from mlec.backends.tvm.compat import IRModule, Target, relax, tirx, tvm
from mlec.backends.tvm.objects import to_object
from mlec.runtime.threads import effective_cpu_count

NAME = "mlec.cpu"

KERNELS_OF_A_PART = 3
"""So many are worth a module of LLVM's."""
PARTS_BEFORE = 8
"""After so many times that, a part has one in so many of the kernels up to its end: there are few parts, and the last one is not long."""


def compile_for_cpu(kernels: IRModule, target: Target) -> tvm.runtime.Module:
    """Machine code of kernels for the CPU; functions are called by ``module[name]``."""
    return tirx.build(kernels, target, pipeline=NAME)


class ObjectsForCPU:
    """Object files with the machine code of kernels: several at a time, and while the next kernels are still made.

    How kernels are shared out depends on their order alone, so that every machine makes the same files.

    Args:
        target: of the machine that they run on.
        at_once: whether to begin before the last kernel is there; else the machine stays quiet until `finish`.
    """

    def __init__(self, target: Target, at_once: bool = True) -> None:
        self._target = target
        self._at_once = at_once
        self._pool = ThreadPoolExecutor(effective_cpu_count())
        self._kernels = 0
        self._part: dict[str, Any] = {}
        self._parts: list[dict[str, Any]] = []
        self._objects: list[Future[bytes]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, symbol: str, function: Any) -> None:
        """Takes a kernel."""
        self._part[symbol] = function
        self._kernels += 1
        if len(self._part) >= max(KERNELS_OF_A_PART, self._kernels // PARTS_BEFORE):
            self._end_part()
            if self._at_once:
                self._begin()

    def finish(self) -> tuple[bytes, ...]:
        """The object files of all kernels."""
        if self._part:
            self._end_part()
        self._begin()
        return tuple(made.result() for made in self._objects)

    def _end_part(self) -> None:
        self._parts.append(self._part)
        self._part = {}

    def _begin(self) -> None:
        for part in self._parts[len(self._objects) :]:
            self._objects.append(self._pool.submit(self._object, part))

    def _object(self, kernels: dict[str, Any]) -> bytes:  # TVM holds no lock of Python's meanwhile
        return to_object(compile_for_cpu(IRModule(kernels), self._target))


def _kernel_pipeline() -> tuple[Any, Any, Any]:
    """Passes on kernels, and the final ones for host and device code, as ``tirx.build`` asks for them."""
    return (
        tvm.transform.Sequential(_KERNEL_PASSES),
        tirx.compilation_pipeline.finalize_host_passes,
        tirx.compilation_pipeline.finalize_device_passes,
    )


_KERNEL_PASSES = [
    tirx.transform.StmtSimplify(),
    tirx.transform.FlattenBuffer(),
    tirx.transform.BF16ComputeLegalize(),
    tirx.transform.NarrowDataType(32),
    tirx.transform.VectorizeLoop(),
    tirx.transform.UnrollLoop(),
    tirx.transform.StmtSimplify(),
    tirx.transform.RemoveNoOp(),
    tirx.transform.VerifyMemory(),
    tirx.transform.AnnotateEntryFunc(),
    tirx.transform.SplitHostDevice(),
    tirx.transform.MakePackedAPI(),
    tirx.transform.SkipAssert(),  # that arrays are as the kernel has them: the runtime lays them out
    tirx.transform.BF16StorageLegalize(),
]

tirx.compilation_pipeline.register_tir_pipeline(NAME, _kernel_pipeline)

RELAX_PASSES = [
    relax.transform.ToNonDataflow(),
    relax.transform.RemovePurityChecking(),
    relax.transform.CallTIRRewrite(),
    relax.transform.StaticPlanBlockMemory(),
    relax.transform.LowerAllocTensor(),
    relax.transform.KillAfterLastUse(),
    relax.transform.LowerRuntimeBuiltin(),
    relax.transform.ComputePrimValue(),
    relax.transform.VMShapeLower(),
    relax.transform.AttachGlobalSymbol(),
]
"""For CUDA: the default pipeline less what turns Relax ops into kernels: there are only calls of ours and reshapes, which stay views."""
