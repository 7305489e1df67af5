"""Sizes as numbers in a model's arithmetic, and what depends on weights alone."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.export import Dim

from mlec.frontends.base import LowerOptions
from tests.frontends.torch.common import FRONTEND, compare, lower


class Scaled(nn.Module):
    """Divides by sizes, by their roots and by numbers computed from them."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        length = x.shape[1]
        return x.sum(1) / length, x / length**0.5, x + 1 / length, x.clamp(max=length / 7), torch.full((2,), length / 2)


def test_fractions_of_symbolic_sizes() -> None:
    graph = lower(Scaled(), torch.randn(3, 5), input_shapes={"x": ("n", "t")})
    for rows, length in ((1, 1), (2, 9)):
        compare(graph, FRONTEND.oracle(Scaled())["run"], [torch.randn(rows, length)])


class Resized(nn.Module):
    """A picture of any size, halved and brought back."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        small = F.max_pool2d(x, 2)
        back = tuple(
            F.interpolate(small, size=x.shape[2:], mode=mode) for mode in ("nearest", "nearest-exact", "bilinear")
        )
        twice = F.interpolate(x, scale_factor=2, mode="bilinear"), F.interpolate(x, scale_factor=2)
        return *back, *twice, F.interpolate(small, size=x.shape[2:], mode="bilinear", align_corners=True)


def test_resizing_to_symbolic_sizes() -> None:
    graph = lower(Resized(), torch.randn(2, 3, 12, 10), input_shapes={"x": ("n", 3, "h", "w")})
    for height, width in ((4, 7), (9, 13), (30, 23)):
        compare(graph, FRONTEND.oracle(Resized())["run"], [torch.randn(1, 3, height, width)], rtol=1e-5)


class Positions(nn.Module):
    """The sines and cosines of positions, written into every other column."""

    def forward(self, x: Tensor) -> Tensor:
        length, depth = x.shape[1], x.shape[2]
        place = torch.arange(length).float().unsqueeze(1)
        pace = torch.exp(torch.arange(0, depth, 2).float() * (-math.log(10000.0) / depth))
        table = torch.zeros(length, depth)
        table[:, 0::2] = torch.sin(place * pace)
        table[:, 1::2] = torch.cos(place * pace)
        table[1::3] = -1
        return x + table


def test_assigning_to_every_other_column() -> None:
    graph = lower(Positions(), torch.randn(3, 5, 6), input_shapes={"x": ("n", "t", 6)})
    for rows, length in ((1, 1), (2, 9)):
        compare(graph, FRONTEND.oracle(Positions())["run"], [torch.randn(rows, length, 6)])


def test_messages_over_edges() -> None:
    """Sums into as many places as there are rows, which only the call tells; a NaN stays where it is written."""

    def passed(x: Tensor, edges: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])

    class Graph(nn.Module):
        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            return passed(x, edges)

    def sample(nodes: int, edges: int) -> list[Tensor]:
        x = torch.randn(nodes, 3)
        x[0, 0] = math.nan
        return [x, torch.randint(0, nodes, (2, edges))]

    torch.manual_seed(0)
    graph = lower(Graph(), *sample(4, 6), input_shapes=[("n", 3), (2, "e")])
    for nodes, edges in ((1, 3), (7, 20)):
        compare(graph, FRONTEND.oracle(Graph())["run"], sample(nodes, edges))


def test_ops_on_weights_alone_are_computed_by_torch() -> None:
    torch.manual_seed(0)
    module = nn.utils.parametrizations.orthogonal(nn.Linear(6, 6)).eval()  # by the exponential of a matrix
    x = torch.randn(3, 6)
    graph = lower(module, x)
    compare(graph, FRONTEND.oracle(module)["run"], [x])


class Shifted(nn.Module):
    """Rows, and the rows after them."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y[1:]


class Placed(nn.Module):
    """At most 9 columns."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.zeros(9))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.places[: x.shape[1]]


def reloaded(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@pytest.mark.parametrize(
    ("dim", "limits"),
    [
        (Dim("b", min=2, max=512), (2, 512)),
        (Dim("b", min=1, max=512), (1, 512)),
        (Dim("b", min=3), (3, None)),
        (Dim("b", max=512), (0, 512)),
        (Dim("b"), (0, None)),
        (Dim.AUTO, (0, None)),
        (Dim.DYNAMIC, (0, None)),
    ],
)
def test_ranges_are_those_that_were_stated(dim: Any, limits: tuple[int, int | None]) -> None:
    program = torch.export.export(nn.ReLU(), (torch.ones(4, 3),), dynamic_shapes=({0: dim},))
    for given in (program, reloaded(program)):
        assert FRONTEND.lower(given, LowerOptions()).signature.symbols == {"n": limits}


def test_what_torch_assumes_beside_a_bound_of_the_code_is_no_range() -> None:
    program = torch.export.export(Placed(), (torch.ones(2, 5),), dynamic_shapes=({1: Dim.AUTO},))
    for given in (program, reloaded(program)):
        graph = FRONTEND.lower(given, LowerOptions())
        assert graph.signature.symbols == {"d1": (0, 9)}
        compare(graph, FRONTEND.oracle(program)["run"], [torch.randn(2, 1)])


def test_sizes_that_follow_from_others() -> None:
    size = Dim("b", min=1, max=16)
    inputs = torch.randn(4, 3), torch.randn(5, 3)
    program = torch.export.export(Shifted(), inputs, dynamic_shapes=({0: size}, {0: size + 1}))
    for given in (program, reloaded(program)):
        graph = FRONTEND.lower(given, LowerOptions())
        assert [spec.shape for spec in graph.signature.inputs] == [("n", 3), ("n+1", 3)]
        assert graph.signature.symbols == {"n": (1, 16)}
        compare(graph, FRONTEND.oracle(program)["run"], [torch.randn(7, 3), torch.randn(8, 3)])
