"""How much memory a program needs beside its weights."""

from __future__ import annotations

from typing import Any

import pytest

import mlec
from mlec.api import passes_of
from mlec.backends.tvm.backend import cpu_info
from mlec.backends.tvm.lowering import Lowering
from mlec.backends.tvm.sequence import call_sequence
from mlec.pipeline import PassPipeline
from mlec.runtime.plan import Layout
from mlec.target import Target

torch = pytest.importorskip("torch")

from bench import networks  # noqa: E402


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (networks.ResNet18, (3, 224, 224)),
        (networks.DepthwiseCnn, (1, 49, 10)),
    ],
    ids=["ResNet-18", "DS-CNN"],
)
def test_a_network_needs_little_more_than_what_lives_at_one_time(make: Any, shape: tuple[int, ...]) -> None:
    graph = mlec.lower(make().eval(), (torch.zeros(2, *shape),))
    backend, context = passes_of("cpu")
    graph, _ = PassPipeline.parse(backend.pipeline).run(graph, context)
    sequence = call_sequence(Lowering(graph, cpu_info(Target())).run())
    for rows in (1, 7):
        plan = Layout(sequence).plan(((rows, *shape),))
        assert 0 < plan.live_nbytes <= plan.arena_nbytes <= 1.3 * plan.live_nbytes
