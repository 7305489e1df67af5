"""What the processor can compute at most: fused multiply-adds in registers, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from mlec.backends.tvm.compat import IRModule, T, prim_func, tirx, tvm
from mlec.backends.tvm.kernels.epilogue import Buffer, BufferSpec, Expr
from mlec.backends.tvm.kernels.tile import RegisterTile, parameter, tile_rows
from mlec.backends.tvm.kernels.vector import load, store
from mlec.backends.tvm.target import TargetInfo

STEPS = 1 << 15
REPETITIONS = 60
SECONDS = 0.2
"""How long to repeat at least: all threads at once need processors that nobody else uses in that moment."""

Measured = tuple[Callable[..., object], Sequence[tuple[int, ...]], float]
"""A function, the shapes of its arguments, the operations of a call."""


def rate(measured: Measured, dtype: str) -> float:
    """Operations a second: of the fastest of many calls."""
    run, shapes, work = measured
    arrays = [tvm.runtime.tensor(np.ones(shape, dtype)) for shape in shapes]
    seconds: list[float] = []
    begin = time.perf_counter()
    while len(seconds) < REPETITIONS or time.perf_counter() - begin < SECONDS:
        start = time.perf_counter()
        run(*arrays)
        seconds.append(time.perf_counter() - start)
    return work / min(seconds)


def multiply_adds(dtype: str, threads: int, steps: int = STEPS) -> Measured:
    """Multiplies and adds in registers; a multiply-add counts as two operations."""
    target = TargetInfo.host()
    lanes, rows = target.lanes(int(dtype[5:])), tile_rows(target, 2)
    shapes = [(threads, 64)] * 2
    with prim_func("multiply_adds") as kernel:
        source, result = (parameter(name, BufferSpec(shapes[0], dtype)) for name in ("source", "result"))
        with T.parallel(threads) as thread:
            sums = RegisterTile(rows, 2, lanes, dtype)
            factors = [load(source, [thread, i * lanes], lanes) for i in range(2)]
            with T.serial(steps):
                sums.multiply_add(factors[:1] * rows, factors)
            add_up(sums, result, thread)
    return built(kernel.func, target), shapes, 2.0 * steps * rows * 2 * lanes * threads


def add_up(sums: RegisterTile, result: Buffer, thread: Expr) -> None:
    """Adds all sums into the thread's vector of the result, so that none of them is left out as unused."""
    for row in sums.cells:
        for cell in row:
            store(result, load(result, [thread, 0], sums.lanes) + cell.value, [thread, 0])


def built(func: tirx.PrimFunc, target: TargetInfo) -> Callable[..., object]:
    """The function compiled as the backend compiles kernels."""
    name = str(func.attrs["global_symbol"])
    with tvm.transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
        run: Callable[..., object] = tvm.compile(IRModule({name: func}), target=target.tvm_target())[name]
    return run
