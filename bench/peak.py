"""What this machine can do at most: fused multiply-adds in registers, and bytes from and to memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from mlec.backends.tvm.compat import T, prim_func
from mlec.backends.tvm.kernels.epilogue import BufferSpec, Expr
from mlec.backends.tvm.kernels.tile import UNROLL, RegisterTile, parameter, tile_rows, tile_vectors, unrolled
from mlec.backends.tvm.kernels.vector import load
from mlec.backends.tvm.peak import REPETITIONS, Measured, add_up, built, multiply_adds, rate
from mlec.backends.tvm.target import TargetInfo

STEPS = 1 << 17
LOADED_STEPS = 64
"""Steps of a tile whose operands are in L1: 16 KB of vectors, and as many values a row."""
COPIED_BYTES = 1 << 26


@dataclass(frozen=True)
class Peak:
    """Limits of a number of threads.

    Attributes:
        flops: operations a second by width of the floats in bits; a multiply-add counts as two.
        loaded: the same where each step of a product's register tile loads its vectors and values from L1, as every product must. Less
            on some processors, whatever the tile.
        bandwidth: bytes a second read and written by a copy that does not fit the caches of a core.
    """

    flops: dict[int, float]
    loaded: dict[int, float]
    bandwidth: float


def measure(threads: int) -> Peak:
    """Takes some seconds. The thread pool of the kernels has to have that many threads."""
    flops, loaded = {}, {}
    for bits in (32, 64):
        for rates, kernel, steps in ((flops, multiply_adds, STEPS), (loaded, _loaded_multiply_adds, STEPS)):
            rates[bits] = rate(kernel(f"float{bits}", threads, steps), f"float{bits}")
    blocks = [[np.ones(COPIED_BYTES // 8) for _ in range(2)] for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        copy = _shortest(lambda: list(pool.map(lambda pair: np.copyto(*pair), blocks)))
    return Peak(flops, loaded, 2 * COPIED_BYTES * threads / copy)


def _shortest(action: Callable[[], object]) -> float:
    """Seconds of the fastest of many runs."""
    seconds = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _loaded_multiply_adds(dtype: str, threads: int, steps: int) -> Measured:
    """A register tile of a product, whose operands are loaded from L1."""
    target = TargetInfo.host()
    lanes, vectors = target.lanes(int(dtype[5:])), tile_vectors(target)
    rows = tile_rows(target, vectors)
    shapes = [(threads, rows, LOADED_STEPS), (threads, LOADED_STEPS, vectors * lanes), (threads, lanes)]
    with prim_func("loaded_multiply_adds") as kernel:
        values, lines, result = (
            parameter(name, BufferSpec(shape, dtype))
            for name, shape in zip(("values", "lines", "result"), shapes, strict=True)
        )
        with T.parallel(threads) as thread:
            sums = RegisterTile(rows, vectors, lanes, dtype)

            def step(k: Expr) -> None:
                sums.multiply_add(
                    [values[thread, i, k] for i in range(rows)],
                    [load(lines, [thread, k, v * lanes], lanes) for v in range(vectors)],
                )

            with T.serial(steps // LOADED_STEPS):
                unrolled(LOADED_STEPS, UNROLL, step)
            add_up(sums, result, thread)
    return built(kernel.func, target), shapes, 2.0 * steps * rows * vectors * lanes * threads
