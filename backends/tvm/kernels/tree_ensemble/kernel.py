"""The kernel of a plan: what is common to all strategies, and the choice by number of rows."""

from __future__ import annotations

from typing import Any

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.epilogue import BufferSpec
from mlec.backends.tvm.kernels.tile import parameter
from mlec.backends.tvm.kernels.tree_ensemble.plan import Plan
from mlec.backends.tvm.kernels.tree_ensemble.sliced import VECTORS
from mlec.backends.tvm.kernels.tree_ensemble.walk import LANES, one_row, row_tiles
from mlec.backends.tvm.target import TargetInfo


def build(plan: Plan, n: Any, info: TargetInfo, name: str = "tree_ensemble") -> Any:
    """The ``PrimFunc`` ``(x[n, F], *plan.packed, out[n, K])``.

    Few rows go one by one, trees side by side; more go in blocks, on one thread; many in blocks on all threads. Each row is
    summed in the order of the trees whichever way it goes.

    Args:
        n: number of rows: an int, or a ``tirx.Var`` of dtype int64.
        info: the processor the plan was made for.
    """
    ensemble, sliced = plan.ensemble, plan.sliced
    with prim_func(name) as kernel:
        x = parameter("x", BufferSpec((n, ensemble.features), ensemble.dtype))
        packed = {key: T.arg(key, T.buffer(a.shape, str(a.dtype))) for key, a in plan.packed.items()}
        out = parameter("out", BufferSpec((n, ensemble.outputs), ensemble.value_dtype))
        rows = tirx.const(n, "int64") if isinstance(n, int) else n

        def blocks(loop: Any, size: Any, vectors: int) -> None:
            with loop(tirx.ceildiv(rows, size)) as b:
                first, count = b * size, tirx.min(size, rows - b * size)
                if sliced is None:
                    row_tiles(ensemble, packed, x, out, first, count, plan.block, info)
                else:
                    sliced.emit(packed, x, out, first, count, vectors, info)

        with T.If(rows < plan.block_rows):
            with T.Then(), T.serial(rows) as row:
                if plan.ranked is None:
                    one_row(ensemble, packed, x, out, row, info)
                else:
                    plan.ranked.emit(packed, x, out, row, info)
            with T.Else(), T.If(rows < plan.parallel_rows):
                with T.Then():  # one vector at a time: less is wasted on the last rows
                    blocks(T.serial, tirx.const(plan.block if sliced is None else sliced.lanes, "int64"), 1)
                with T.Else():
                    tile = LANES if sliced is None else sliced.lanes * VECTORS
                    share = tirx.ceildiv(tirx.ceildiv(rows, info.cores), tile) * tile
                    blocks(T.parallel, T.bind(tirx.min(share, tirx.const(plan.block, "int64"))), VECTORS)
    return kernel.func
