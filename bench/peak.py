"""What this machine can do at most: fused multiply-adds in registers, and bytes from and to memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from mlec.backends.tvm.compat import IRModule, T, prim_func, tirx, tvm
from mlec.backends.tvm.kernels.epilogue import Buffer, BufferSpec, Expr
from mlec.backends.tvm.kernels.tile import UNROLL, RegisterTile, parameter, tile_rows, tile_vectors, unrolled
from mlec.backends.tvm.kernels.vector import load, store
from mlec.backends.tvm.target import TargetInfo

STEPS = 1 << 17
LOADED_STEPS = 64
"""Steps of a tile whose operands are in L1: 16 KB of vectors, and as many values a row."""
COPIED_BYTES = 1 << 26
REPETITIONS = 60


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
        for rates, kernel, steps in ((flops, _multiply_adds, STEPS), (loaded, _loaded_multiply_adds, STEPS)):
            run, shapes, work = kernel(f"float{bits}", threads, steps)
            arrays = [tvm.runtime.tensor(np.ones(shape, f"float{bits}")) for shape in shapes]
            rates[bits] = work / _shortest(lambda run=run, arrays=arrays: run(*arrays))
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


Measured = tuple[Callable[..., object], Sequence[tuple[int, ...]], float]
"""A function, the shapes of its arguments, the operations of a call."""


def _multiply_adds(dtype: str, threads: int, steps: int) -> Measured:
    """Multiplies and adds in registers, and nothing else."""
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
            _add_up(sums, result, thread)
    return _built(kernel.func, target), shapes, 2.0 * steps * rows * 2 * lanes * threads


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
            _add_up(sums, result, thread)
    return _built(kernel.func, target), shapes, 2.0 * steps * rows * vectors * lanes * threads


def _add_up(sums: RegisterTile, result: Buffer, thread: Expr) -> None:
    for row in sums.cells:
        for cell in row:
            store(result, load(result, [thread, 0], sums.lanes) + cell.value, [thread, 0])


def _built(func: tirx.PrimFunc, target: TargetInfo) -> Callable[..., object]:
    name = str(func.attrs["global_symbol"])
    with tvm.transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
        run: Callable[..., object] = tvm.compile(IRModule({name: func}), target=target.tvm_target())[name]
    return run
