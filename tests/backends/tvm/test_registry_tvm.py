"""Every op of the table, compiled and run against its reference, with static and with symbolic extents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from mlec.backends.tvm.backend import TVMBackend
from mlec.ir import OPS, run_graph
from mlec.runtime.executable import Executable
from mlec.target import Target
from tests.backends.tvm.op_cases import check, families, graph_of


def run_both(names: Sequence[str], rng: np.random.Generator, dynamic: bool) -> None:
    graph, arrays, ops = graph_of(names, rng, dynamic)
    module = TVMBackend().compile(graph, Target())
    executable = Executable(module.program, module.objects, module.constants, num_threads=1)
    for name, got, wanted in zip(ops, executable.run(arrays), run_graph(graph, arrays), strict=True):
        check(name, got, wanted)


@pytest.mark.parametrize("names", families(), ids=lambda names: f"{names[0]}..{names[-1]}")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "symbolic"])
def test_ops_equal_their_reference(names: list[str], dynamic: bool) -> None:
    run_both(names, np.random.default_rng(len(names[0]) + dynamic), dynamic)


def test_every_op_is_lowered_or_listed() -> None:
    backend = TVMBackend()
    assert [name for name in OPS if not backend.supports(name) and name not in backend.unsupported] == []
