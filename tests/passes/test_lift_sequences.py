"""Convolutions over sequences, compiled as those over images of one row, against torch."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import mlec
from mlec.ir import Graph


def optimized(model: nn.Module, x: torch.Tensor, passes: str) -> Graph:
    return mlec.optimize(mlec.lower(model.eval(), (x,)), passes)[0]


def assert_like_torch(model: nn.Module, *batches: torch.Tensor) -> None:
    """On all batches, by a model compiled for the first."""
    compiled = mlec.compile(model.eval(), (batches[0],), progress=False, validate=False)
    with torch.no_grad():
        for x in batches:
            for got, wanted in zip(compiled.run([x.numpy()]), model(x), strict=True):
                np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-4, atol=2e-6)


class Windows(nn.Module):
    """Convolutions of every kind, and what stays in channel blocks between them."""

    def __init__(self) -> None:
        super().__init__()
        windows = [
            {"kernel_size": 1},
            {"kernel_size": 5, "padding": 2},
            {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 3},
            {"kernel_size": 4, "stride": 3, "groups": 2},
            {"kernel_size": 9, "padding": 4, "groups": 16},
            {"kernel_size": 3, "padding": 8, "dilation": 8, "groups": 16, "stride": 2},
        ]
        self.stem = nn.Sequential(nn.Conv1d(3, 16, 7, 2, 3), nn.BatchNorm1d(16), nn.SiLU())
        self.branches = nn.ModuleList(nn.Conv1d(16, 16, **window) for window in windows)
        self.gate = nn.Conv1d(16, 16, 1)
        self.last = nn.Conv1d(32, 13, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.stem(x)
        gated = x * torch.sigmoid(self.gate(x.mean(2, keepdim=True)))
        pooled = torch.cat([nn.functional.avg_pool1d(gated + x, 3, 2, 1), nn.functional.max_pool1d(gated, 2)], 1)
        last = self.last(pooled)
        return *(branch(x) for branch in self.branches), last.amax(2), last.transpose(1, 2), last.sum(2)


def test_windows_and_what_is_between() -> None:
    """Also with NaN and infinities, which stay where they are."""
    torch.manual_seed(0)
    model, x = Windows(), torch.randn(3, 3, 128)
    special = x.clone()
    special[0, 1, 11], special[2, 0, 40], special[2, 2, 90] = torch.nan, torch.inf, -torch.inf
    assert_like_torch(model, x, x[:1], special)
    convolutions = [n for n in optimized(model, x, "canonicalize,lift-sequences").nodes if n.name == "conv"]
    assert [n.output.type.rank for n in convolutions] == [4] * 9


class Causal(nn.Module):
    """Convolutions that look at the past only: more is computed, and cut away."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(16, 16, 3, padding=2 * d, dilation=d) for d in (1, 2, 4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        for layer in self.layers:
            x = torch.relu(x + layer(x)[..., : x.shape[2]])
        return (x,)


def test_causal_convolutions() -> None:
    """What is cut away is never computed."""
    torch.manual_seed(0)
    model, x = Causal(), torch.randn(2, 16, 50)
    assert_like_torch(model, x)
    assert not [n for n in optimized(model, x, "canonicalize,hoist-slices").nodes if n.name == "slice"]


def test_lengths_that_are_not_known() -> None:
    """They stay as they are, and are right at any length."""
    torch.manual_seed(0)
    model, length = nn.Conv1d(16, 16, 5, padding=2).eval(), torch.export.Dim("length", min=2, max=1000)
    program = torch.export.export(model, (torch.randn(2, 16, 20),), dynamic_shapes=({2: length},))
    compiled = mlec.compile(program, progress=False)
    for extent in (9, 33):
        x = torch.randn(2, 16, extent)
        with torch.no_grad():
            np.testing.assert_allclose(compiled.run([x.numpy()])[0], model(x).numpy(), rtol=1e-4, atol=2e-6)
