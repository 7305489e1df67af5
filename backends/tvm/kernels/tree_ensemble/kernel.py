"""The kernel of a plan: what is common to all strategies, and the choice by number of rows."""

from __future__ import annotations

from typing import Any

from mlec.backends.tvm.compat import T, prim_func, tirx
from mlec.backends.tvm.kernels.tree_ensemble.plan import Plan
from mlec.backends.tvm.kernels.tree_ensemble.walk import LANES, one_row, row_tiles
from mlec.backends.tvm.target import TargetInfo


def build(plan: Plan, n: Any, info: TargetInfo, name: str = "tree_ensemble") -> Any:
    """The ``PrimFunc`` ``(x[n, F], *plan.packed, out[n, K])``.

    Few rows go one by one, trees side by side; more go in blocks, on one thread; many in blocks on all threads. Each row is
    summed in the order of the trees whichever way it goes.

    Args:
        n: number of rows: an int, or a ``tirx.Var`` of dtype int64.
    """
    ensemble = plan.ensemble
    with prim_func(name) as kernel:
        x = T.arg("x", T.buffer((n, ensemble.features), ensemble.dtype))
        packed = {key: T.arg(key, T.buffer(a.shape, str(a.dtype))) for key, a in plan.packed.items()}
        out = T.arg("out", T.buffer((n, ensemble.outputs), ensemble.value_dtype))
        rows = tirx.const(n, "int64") if isinstance(n, int) else n

        def block(first: Any, size: Any) -> None:
            row_tiles(ensemble, packed, x, out, first, tirx.min(size, rows - first), plan.block_rows)

        with T.If(rows < LANES):
            with T.Then(), T.serial(rows) as row:
                one_row(ensemble, packed, x, out, row)
            with T.Else(), T.If(rows < plan.parallel_rows):
                size = tirx.const(plan.block_rows, "int64")
                with T.Then(), T.serial(tirx.ceildiv(rows, size)) as b:
                    block(b * size, size)
                with T.Else():
                    share = tirx.ceildiv(tirx.ceildiv(rows, info.cores), LANES) * LANES
                    size = T.bind(tirx.min(share, size))
                    with T.parallel(tirx.ceildiv(rows, size)) as b:
                        block(b * size, size)
    return kernel.func
