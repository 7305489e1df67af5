"""How much memory a program needs beside its weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import mlec
from mlec.api import passes_of
from mlec.backends.tvm.backend import cpu_info
from mlec.backends.tvm.compat import tirx
from mlec.backends.tvm.lowering import Lowering
from mlec.backends.tvm.region import Dims
from mlec.backends.tvm.sequence import call_sequence
from mlec.ir import GraphBuilder, SymDim, tensor
from mlec.pipeline import PassPipeline
from mlec.runtime.dims import evaluate
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


def test_what_kernels_make_of_extents_is_the_same_as_text() -> None:
    dims = Dims()
    n, m = dims(SymDim.named("n")), dims(SymDim.named("m"))
    least = tirx.max(tirx.const(1, "int64"), m)
    for extent, value in (
        (tirx.floordiv(n, least * 4), 100 // 12),
        (tirx.floormod(n, least * 7) * 2, 100 % 21 * 2),
        (tirx.floordiv(n - (m - 3), tirx.min(m, n)) * (n + 1), 33 * 101),
        (tirx.floordiv(n, tirx.floordiv(m, 8)), 100),  # what is divided by counts as 1 at least
    ):
        text = dims.text(extent)
        assert isinstance(text, str)
        assert evaluate(text, {"n": 100, "m": 3}) == value


def test_images_that_are_too_small_for_a_window_take_no_memory() -> None:
    b = GraphBuilder("pool")
    x = b.input("x", tensor("f32", (1, 2, "h", "w")))
    model = mlec.compile(b.finish([b("max_pool", x, kernel=(2, 2), strides=(3, 3))]), validate=False, progress=False)
    for rows, kept in ((5, 2), (2, 1), (1, 0), (0, 0)):
        (got,) = model.run([np.ones((1, 2, rows, 5), np.float32)])
        np.testing.assert_array_equal(got, np.ones((1, 2, kept, 2), np.float32))
