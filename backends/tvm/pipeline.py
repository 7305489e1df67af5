"""The TVM passes that our programs need.

Kernels come as finished loops: no blocks to lower, no buffers to place, nothing to partition. TVM's default pipeline spends four
fifths of its time on passes that look for such work (`CompactBufferAllocation` alone takes most of it), and its storage rewriting
refuses functions that hold vectors of two lengths.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mlec.backends.tvm.compat import IRModule, Target, relax, tirx, tvm
from mlec.backends.tvm.objects import to_object
from mlec.runtime.threads import effective_cpu_count

NAME = "mlec.cpu"

MOST_PARTS = 8
KERNELS_OF_A_PART = 3
"""From so many on, a part is worth a module of LLVM's."""


def compile_for_cpu(kernels: IRModule, target: Target) -> tvm.runtime.Module:
    """Machine code of kernels for the CPU; functions are called by ``module[name]``."""
    return tirx.build(kernels, target, pipeline=NAME)


def objects_for_cpu(kernels: Mapping[str, Any], target: Target) -> tuple[bytes, ...]:
    """Object files with the machine code of kernels, made side by side where there are several kernels.

    How they are shared out depends on their number alone, so that every machine makes the same files.

    Args:
        kernels: functions by symbol.
        target: of the machine that they run on.
    """
    listed = list(kernels.items())
    count = min(MOST_PARTS, -(-len(listed) // KERNELS_OF_A_PART))
    modules = [IRModule(dict(listed[first::count])) for first in range(count)]
    # TVM holds no lock of Python's while it compiles.
    with ThreadPoolExecutor(min(max(count, 1), effective_cpu_count())) as pool:
        return tuple(pool.map(lambda module: to_object(compile_for_cpu(module, target)), modules))


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
