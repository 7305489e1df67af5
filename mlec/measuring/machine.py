"""What this machine can do, measured once and remembered: what the cost model's predictions stand on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Annotated, Any

import msgspec
import numpy as np

from mlec import registry
from mlec.artifact.trust import state_directory
from mlec.errors import MlecError
from mlec.measuring.state_files import StateFiles
from mlec.measuring.tuning import this_installation
from mlec.runtime.threads import effective_cpu_count
from mlec.target import Target

logger = logging.getLogger("mlec")

Rate = Annotated[float, msgspec.Meta(gt=0, lt=1e18)]
Seconds = Annotated[float, msgspec.Meta(gt=0, lt=1)]

WORKING_SETS = (1 << 15, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 27)
"""Bytes that a copy reads and writes, where its rate is measured: from within the first cache to beyond the last."""

REFERENCE_ADDITION = 2.7e-9
"""Seconds of an addition that waits for the one before, as numpy makes it, at 3 GHz."""
CALL_IN_PYTHON_CALLS = 70.0
KERNEL_IN_ADDITIONS = 60.0
DISPATCH_IN_ADDITIONS = 600.0
"""What calling a model, a kernel, and the threads of one takes, by what the machine takes for a call of a Python function and for an
addition that waits for the one before: as measured on one processor, whose speed relative to others the two follow."""


class Machine(msgspec.Struct, frozen=True):
    """What the processor and the memory do at most.

    Attributes:
        flops: float32 operations a second, in multiply-adds on registers, of all threads.
        flops64: the same of float64.
        bandwidth: bytes a second, reading and writing, of all threads, beyond the caches.
        kernel_seconds: overhead of one kernel call.
        threads: how many there are.
        core_flops, core_flops64: of one thread; 0 stands for an equal part.
        copies: of one thread, the rate of a copy by the bytes that it reads and writes; smallest first.
        dispatch_seconds: what it takes to share the work of a kernel out to threads.
        call_seconds: overhead of one call of a model.
        clock: how fast simple code runs, relative to the processor that times stated in seconds were taken on.
        byte_products, bf16_products: how many products of such numbers take the time of one of float32, see `TargetFacts`.
    """

    flops: Rate
    flops64: Rate
    bandwidth: Rate
    kernel_seconds: Seconds = 1e-7
    threads: Annotated[int, msgspec.Meta(gt=0)] = 1
    core_flops: float = 0.0
    core_flops64: float = 0.0
    copies: tuple[tuple[int, Rate], ...] = ()
    dispatch_seconds: Seconds = 5e-6
    call_seconds: Seconds = 2e-6
    clock: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    byte_products: Rate = 1.0
    bf16_products: Rate = 1.0

    def peak(self, bits: int = 32, threads: int | None = None) -> float:
        """Operations a second on numbers of ``bits`` bits (8: products of bytes, 16: of bf16), by all threads or so many."""
        whole, core = (self.flops64, self.core_flops64) if bits == 64 else (self.flops, self.core_flops)
        used = self.threads if threads is None else min(threads, self.threads)
        return min(whole, (core or whole / self.threads) * used) * {8: self.byte_products, 16: self.bf16_products}.get(
            bits, 1
        )

    def traffic(self, working_set: float, threads: int = 1) -> float:
        """Bytes a second of threads that move ``working_set`` bytes together: each has caches of its own, the memory is shared."""
        if not self.copies:
            return self.bandwidth
        sizes, rates = zip(*self.copies, strict=True)
        rate = float(np.interp(np.log(max(1.0, working_set / threads)), np.log(sizes), rates)) * threads
        beyond = max(self.bandwidth, rates[-1])
        return rate if working_set / threads <= sizes[-1] / 4 else min(rate, beyond)

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found


@cache
def this_machine() -> Machine:
    """The machine as it was measured when it was met first, which takes about two seconds; the same processor is not measured again."""
    folder = state_directory()
    files = StateFiles(None if folder is None else folder / "machine", Machine)
    threads = effective_cpu_count()
    key = f"{this_installation()}, {threads} threads"
    known = files.recall(key)
    if known is None:
        known = measure(threads)
        files.keep(key, known)
    return msgspec.structs.replace(known, **_narrow_products())


def _narrow_products() -> dict[str, float]:
    """What the processor has for products of narrow numbers; nothing without a compiler, which makes no use of them then."""
    try:
        facts = registry.backend_of("cpu").facts(Target())
    except MlecError as error:
        logger.debug("no compiler to ask for what the processor has: %s", error)
        return {}
    return {"byte_products": facts.byte_products, "bf16_products": facts.bf16_products}


def measure(threads: int) -> Machine:
    """Measures this machine, which others may be using too: everything is the best of many."""
    rates = {(bits, count): _multiply_adds(bits, count) for bits in (32, 64) for count in {1, threads}}
    copies = tuple((size, _copy_rate(size, 1)) for size in WORKING_SETS)
    addition, call = _addition_seconds(), _python_call_seconds()
    return Machine(
        flops=max(rates[32, threads], rates[32, 1]), flops64=max(rates[64, threads], rates[64, 1]),
        bandwidth=max(copies[-1][1], _copy_rate(WORKING_SETS[-1], threads)),
        kernel_seconds=KERNEL_IN_ADDITIONS * addition, threads=threads, core_flops=rates[32, 1], core_flops64=rates[64, 1],
        copies=copies, dispatch_seconds=DISPATCH_IN_ADDITIONS * addition, call_seconds=CALL_IN_PYTHON_CALLS * call,
        clock=REFERENCE_ADDITION / addition,
    )  # fmt: skip


def _multiply_adds(bits: int, threads: int) -> float:
    """Operations a second in registers, as the backend's own code does them; without a compiler, those of numpy's matrix product."""
    try:
        rate = float(registry.backend_of("cpu").multiply_adds(bits, threads))
    except MlecError as error:
        logger.debug("no compiler to measure the processor with: %s", error)
        rate = 0.0
    return rate or _product(f"f{bits // 8}")


def _product(dtype: str, n: int = 512) -> float:
    a = np.ones((n, n), dtype)
    return 2 * n**3 / _least(lambda: a @ a)


def _copy_rate(working_set: int, threads: int) -> float:
    """Bytes a second, read and written, of copies that touch ``working_set`` bytes each, by so many threads at once."""
    pairs = [(np.ones(working_set // 2, np.uint8), np.empty(working_set // 2, np.uint8)) for _ in range(threads)]
    if threads == 1:
        return working_set / _least(lambda: np.copyto(pairs[0][1], pairs[0][0]))
    with ThreadPoolExecutor(threads) as pool:
        return threads * working_set / _least(lambda: list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), pairs)))


def _addition_seconds(count: int = 4096) -> float:
    """Seconds of an addition that waits for the one before."""
    x = np.ones(count)
    total = np.empty_like(x)
    return _least(lambda: np.cumsum(x, out=total)) / count


def _python_call_seconds(count: int = 1000) -> float:
    def nothing() -> None: ...

    def calls() -> None:
        for _ in range(count):
            nothing()

    return _least(calls) / count


def _least(action: Callable[[], object], seconds: float = 0.04, enough: int = 20, patience: float = 4.0) -> float:
    """The shortest time of one call; repeats for a while, longer where that was few calls, since others may be using the machine."""
    action()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < seconds * (patience if len(times) < enough else 1):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)
