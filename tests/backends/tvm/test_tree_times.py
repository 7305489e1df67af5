"""What ensembles are expected to take, beside the steps that the kernel goes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlec.backends.tvm.kernels.tree_ensemble import prepare
from mlec.backends.tvm.kernels.tree_ensemble.times import TreeTimes
from mlec.backends.tvm.target import TargetInfo
from mlec.measuring.machine import Machine
from tests.backends.tvm.test_tree_ensemble import random_ensemble

MACHINE = Machine(flops=1e11, flops64=5e10, bandwidth=1e11, threads=2, dispatch_seconds=1e-6, clock=1.0)
TIMES = TreeTimes(
    alone_ns=1000, filled_ns=100, row_ns=10, block_rows=8, parallel_rows=64, block=512, tile=128, single_block=64, single_tile=64,
    single_factor=1.1, tree_bytes=0, cores=2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "threads", "ns"),
    [
        (1, 1, 1000),
        (7, 2, 7000),
        (8, 1, 64 * 110 + 8 * 10),  # a vector is filled up
        (40, 2, 64 * 110 + 40 * 10),
        (64, 1, 128 * 100 + 64 * 10),  # and so are two, where threads could share
        (64, 2, 128 * 100 + 64 * 10),  # one block: no other thread has anything to do
        (256, 1, 256 * 110),
        (256, 2, 128 * 110 + 1000),
        (1100, 1, 1152 * 100 + 1100 * 10),
        (1536, 2, 2 * 512 * 110 + 1000),
    ],
)
def test_rows_are_filled_up_as_in_the_kernel(rows: int, threads: int, ns: float) -> None:
    assert TIMES.seconds(rows, threads, MACHINE) == pytest.approx(1e-9 * ns)


def test_trees_are_read_for_each_block() -> None:
    large = replace(TIMES, tree_bytes=10**6)
    for rows, blocks in ((1, 0), (40, 1), (256, 2)):
        more = large.seconds(rows, 1, MACHINE) - TIMES.seconds(rows, 1, MACHINE)
        assert more == pytest.approx(blocks * 10**6 / MACHINE.traffic(10**6))


def test_rows_alone_take_longer_beyond_each_cache() -> None:
    ensemble = random_ensemble(0, trees=50)
    held = replace(TargetInfo.host(), l1_bytes=1 << 30, l2_bytes=1 << 30)
    near, far = replace(held, l1_bytes=1 << 10), replace(held, l1_bytes=1 << 10, l2_bytes=1 << 10)
    in_first, in_second, beyond = (prepare(ensemble, info).row_times.alone_ns for info in (held, near, far))
    assert in_first < in_second < beyond


@pytest.mark.parametrize("strategy", ["walk", "sliced"])
def test_the_times_are_those_of_the_plan(strategy: str) -> None:
    plan = prepare(random_ensemble(1, trees=20), replace(TargetInfo.host(), cores=2), strategy)
    times = plan.row_times
    expected = plan.walk_ns if strategy == "walk" else plan.sliced_ns
    rows = 2 * plan.block * -(-plan.parallel_rows // plan.block)
    assert 1e9 * times.seconds(rows, 1, MACHINE) == pytest.approx(rows * expected, rel=0.05)
    assert times.seconds(rows, 2, MACHINE) < 0.6 * times.seconds(rows, 1, MACHINE)
