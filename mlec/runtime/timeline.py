"""What a run needs memory for, call by call."""

from __future__ import annotations

from itertools import accumulate

from mlec.runtime.plan import Plan
from mlec.runtime.program import Program


def live_by_call(program: Program, plan: Plan) -> list[tuple[str, int]]:
    """Of each call of a kernel, in order: its symbol, and the bytes of the intermediate values that are alive while it runs."""
    change = [0] * (len(program.kernels) + 1)
    for nbytes, first, last in plan.lives.values():
        change[first] += nbytes
        change[last + 1] -= nbytes
    return [(kernel.symbol, live) for kernel, live in zip(program.kernels, accumulate(change), strict=False)]
