"""The TVM passes that our programs need.

Kernels come as finished loops: no blocks to lower, no buffers to place, nothing to partition. TVM's default pipeline spends four
fifths of its time on passes that look for such work (`CompactBufferAllocation` alone takes most of it), and its storage rewriting
refuses functions that hold vectors of two lengths.
"""

from __future__ import annotations

from typing import Any

from mlec.backends.tvm.compat import IRModule, Target, relax, tirx, tvm

NAME = "mlec.cpu"


def compile_for_cpu(kernels: IRModule, target: Target) -> tvm.runtime.Module:
    """Machine code of kernels for the CPU; functions are called by ``module[name]``."""
    tirx.compilation_pipeline.register_tir_pipeline(NAME, _kernel_pipeline)
    return tirx.build(kernels, target, pipeline=NAME)


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
