"""What this machine can do at most: fused multiply-adds in registers, and bytes from and to memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from mlec.backends.tvm.compat import T, prim_func, tvm
from mlec.backends.tvm.kernels.epilogue import Buffer, BufferSpec, Expr
from mlec.backends.tvm.kernels.gemm_int8 import fits
from mlec.backends.tvm.kernels.int8 import (
    BLOCK,
    QUAD,
    STRIP,
    Dots,
    Multiplier,
    Packed,
    Rows,
    Tiles,
    has_amx,
    quad_at,
    tdpbusd,
)
from mlec.backends.tvm.kernels.tile import UNROLL, RegisterTile, flat_view, parameter, tile_rows, tile_vectors, unrolled
from mlec.backends.tvm.kernels.vector import Cell, load, store
from mlec.backends.tvm.peak import REPETITIONS, Measured, add_up, built, multiply_adds, rate
from mlec.backends.tvm.target import TargetInfo

STEPS = 1 << 17
LOADED_STEPS = 64
"""Steps of a tile whose operands are in L1: 16 KB of vectors, and as many values a row."""
COPIED_BYTES = 1 << 26
TURNS = 2000
"""Of a tile of bytes."""


@dataclass(frozen=True)
class Peak:
    """Limits of a number of threads.

    Attributes:
        flops: operations a second by width of the numbers in bits (8: of integers, by AMX where there is any); a multiply-add counts
            as two.
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
    flops[8], loaded[8] = (byte_products(threads, has_amx(TargetInfo.host()), from_l1) for from_l1 in (False, True))
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


BYTE_TERMS = 512
"""Products of a sum of `byte_products`: a tile and its operands take half of an L1 of 48 KB."""


def byte_products(threads: int, amx: bool, loaded: bool) -> float:
    """Operations a second of u8 by i8 with sums in i32, on tiles of AMX or on vectors: in registers, or with operands from L1."""
    target, packed = TargetInfo.host(), Packed(1, 64, 1, BYTE_TERMS)
    dots, k = Dots.of(target), BYTE_TERMS
    height = 2 * STRIP if amx else next(r for r in range(14, 0, -1) if fits(r, 2, dots, target))
    width = 2 * BLOCK if amx else 2 * dots.lanes
    specs = (
        ((threads, height * k), "uint8"),
        ((packed.blocks * packed.quads * BLOCK * QUAD,), "int8"),
        ((64,), "int32"),
    )
    with prim_func("byte_products") as kernel:
        x, w, offsets = (parameter(f"p{i}", BufferSpec(*spec)) for i, spec in enumerate(specs))
        y = parameter("y", BufferSpec((threads, height, width), "int32"))
        x, out = flat_view(x, (threads * height * k,), "uint8"), flat_view(y, (threads * height * width,), "int32")
        multiplier = Multiplier(w, offsets, packed, dots)
        with T.parallel(threads) as thread:
            rows, begin = Rows(x, k, lambda segment: 0), thread * (height * k)
            if amx:
                tiles = Tiles.begin(multiplier, STRIP)
                tiles.sums(rows, [begin, begin + STRIP * k], 0, 2)
                with T.serial(TURNS):
                    if loaded:
                        tiles.sums(rows, [begin, begin + STRIP * k], 0, 2)
                    else:
                        with T.serial(k // packed.step // QUAD):
                            for tile in range(4):
                                tdpbusd(tile, 4 + tile // 2, 6 + tile % 2)
                for i in range(height):
                    for v, value in enumerate(tiles.row(i, 2)):
                        store(out, value, [(thread * height + i) * width + v * dots.lanes])
                tiles.end()
            else:
                with T.serial(TURNS):
                    sums = (
                        multiplier.sums(rows, begin, height, 0, 2)
                        if loaded
                        else _in_registers(dots, x, w, height, k // QUAD)
                    )
                    for i, line in enumerate(sums):
                        for v, value in enumerate(line):
                            place = (thread * height + i) * width + v * dots.lanes
                            store(out, value + load(out, [place], dots.lanes), [place])
    run = built(kernel.func, target)
    arrays = [tvm.runtime.tensor(np.ones(shape, dtype)) for shape, dtype in specs]
    arrays.append(tvm.runtime.tensor(np.zeros((threads, height, width), np.int32)))
    return 2.0 * TURNS * threads * height * width * k / _shortest(lambda: run(*arrays))


def _in_registers(dots: Dots, x: Buffer, w: Buffer, rows: int, steps: int) -> list[list[Expr]]:
    """So many steps of a tile of two vectors, whose operands are loaded once."""
    cells = [[Cell("int32", dots.lanes, 0) for _ in range(2)] for _ in range(rows)]
    row = dots.row(quad_at(x, 0))
    weights = [dots.weights(load(w, [v * dots.lanes * QUAD], dots.lanes * QUAD)) for v in range(2)]
    with T.serial(steps):
        for line in cells:
            for cell, vector in zip(line, weights, strict=True):
                dots.add(cell, row, vector)
    return [[cell.value for cell in line] for line in cells]
