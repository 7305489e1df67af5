"""What this machine can do at most: fused multiply-adds in registers, and bytes from and to memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from mlec.backends.tvm.compat import IRModule, T, prim_func, tvm
from mlec.backends.tvm.kernels.epilogue import BufferSpec
from mlec.backends.tvm.kernels.tile import RegisterTile, parameter, tile_rows
from mlec.backends.tvm.kernels.vector import load, store
from mlec.backends.tvm.target import TargetInfo

STEPS = 1 << 17
COPIED_BYTES = 1 << 26
REPETITIONS = 60


@dataclass(frozen=True)
class Peak:
    """Limits of a number of threads.

    Attributes:
        flops: operations a second by width of the floats in bits; a multiply-add counts as two.
        bandwidth: bytes a second read and written by a copy that does not fit the caches of a core.
    """

    flops: dict[int, float]
    bandwidth: float


def measure(threads: int) -> Peak:
    """Takes about a second. The thread pool of the kernels has to have that many threads."""
    flops = {}
    for bits in (32, 64):
        run, work = _multiply_adds(f"float{bits}", threads)
        source, result = (tvm.runtime.tensor(np.ones((threads, 64), f"float{bits}")) for _ in range(2))
        flops[bits] = work / _shortest(lambda run=run, s=source, r=result: run(s, r))
    blocks = [[np.ones(COPIED_BYTES // 8) for _ in range(2)] for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        copy = _shortest(lambda: list(pool.map(lambda pair: np.copyto(*pair), blocks)))
    return Peak(flops, 2 * COPIED_BYTES * threads / copy)


def _shortest(action: Callable[[], object]) -> float:
    """Seconds of the fastest of many runs."""
    seconds = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _multiply_adds(dtype: str, threads: int) -> tuple[Callable[..., object], float]:
    """A function ``(source, result)`` that does nothing but multiply and add in registers, and its operations a call."""
    target = TargetInfo.host()
    lanes, rows = target.lanes(int(dtype[5:])), tile_rows(target, 2)
    with prim_func("multiply_adds") as kernel:
        source, result = (parameter(name, BufferSpec((threads, 64), dtype)) for name in ("source", "result"))
        with T.parallel(threads) as thread:
            sums = RegisterTile(rows, 2, lanes, dtype)
            factors = [load(source, [thread, i * lanes], lanes) for i in range(2)]
            with T.serial(STEPS):
                sums.multiply_add(factors[:1] * rows, factors)
            for row in sums.cells:
                for cell in row:
                    store(result, load(result, [thread, 0], lanes) + cell.value, [thread, 0])
    with tvm.transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
        run = tvm.compile(IRModule({"multiply_adds": kernel.func}), target=target.tvm_target())["multiply_adds"]
    return run, 2.0 * STEPS * rows * 2 * lanes * threads
