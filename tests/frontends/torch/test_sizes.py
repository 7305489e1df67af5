"""Sizes as numbers in a model's arithmetic, and what depends on weights alone."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

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
