"""What this machine can do, measured: the roofline that predictions stand on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np

from mlec.ir import Graph, Node
from mlec.ir.dim import evaluate, symbols_of
from mlec.pipeline import NOMINAL_EXTENT

KERNEL_SECONDS = 1e-7
"""Cost of calling one kernel, besides its work: mostly the checks that it makes of its arguments."""


@dataclass(frozen=True)
class Machine:
    """Peaks that a well-written kernel can approach.

    Attributes:
        flops: float32 operations a second (a matrix product by the BLAS that numpy has, all its threads).
        flops64: the same of float64.
        bandwidth: bytes a second, reading and writing (a copy that does not fit the caches).
        kernel_seconds: overhead of one kernel call.
    """

    flops: float
    flops64: float
    bandwidth: float
    kernel_seconds: float = KERNEL_SECONDS

    def seconds(self, node: Node, extent: int = NOMINAL_EXTENT) -> float:
        """Roofline prediction for one node, symbolic dims at ``extent``."""
        if node.is_constant:
            return 0.0
        cost = node.cost
        binding = {name: extent for dim in (cost.flops, cost.bytes) for name in symbols_of(dim)}
        flops, moved = evaluate(cost.flops, binding), evaluate(cost.bytes, binding)
        return self.roofline(flops, moved, node.outputs[0].type.dtype.bits)

    def roofline(self, flops: int, moved: int, bits: int = 32) -> float:
        """Seconds of a kernel of ``flops`` operations on floats of ``bits`` bits that moves ``moved`` bytes."""
        return max(flops / self.peak(bits), moved / self.bandwidth) + self.kernel_seconds

    def peak(self, bits: int) -> float:
        """Operations a second on floats of ``bits`` bits."""
        return self.flops64 if bits == 64 else self.flops

    def graph_seconds(self, graph: Graph, extent: int = NOMINAL_EXTENT) -> float:
        return sum(self.seconds(node, extent) for node in graph.nodes)

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@cache
def this_machine() -> Machine:
    """Measures once in a process; takes about a fifth of a second."""
    buffer = np.ones(1 << 23, np.float32)
    target = np.empty_like(buffer)
    flops, flops64 = _product(np.float32), _product(np.float64)
    return Machine(flops, flops64, 2 * buffer.nbytes / _best(lambda: np.copyto(target, buffer)))


def _product(dtype: type[np.floating[Any]], n: int = 512) -> float:
    """Operations a second of a matrix product."""
    a = np.ones((n, n), dtype)
    return float(2 * n**3 / _best(lambda: a @ a))


def _best(action: Callable[[], object], seconds: float = 0.06, enough: int = 20, patience: float = 6.0) -> float:
    """The shortest time of one call; repeats for a while, longer where that was few calls, since others may be using the machine."""
    action()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < seconds * (patience if len(times) < enough else 1):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)
