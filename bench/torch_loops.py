"""Torch models whose ``forward`` is a loop, as people write them: `bench.vectorize` times them, the tests compare them with torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


class HeadsInAList(nn.Module):
    """Attention with one module for each head."""

    def __init__(self, steps: int, width: int = 32, length: int = 12) -> None:
        super().__init__()
        self.shape: Shape = (length, width)
        size = 8
        self.heads = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(width, size) for name in ("q", "k", "v")}) for _ in range(steps)
        )
        self.out = nn.Linear(steps * size, width)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for head in self.heads:
            q, k, v = (head[name](x) for name in ("q", "k", "v"))
            weights = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, -1)
            found.append(weights @ v)
        result: Tensor = self.out(torch.cat(found, -1))
        return result


class Experts(nn.Module):
    """A mixture of experts in which every expert sees every row."""

    def __init__(self, steps: int, width: int = 16) -> None:
        super().__init__()
        self.shape: Shape = (width,)
        self.gate = nn.Linear(width, steps)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width)) for _ in range(steps)
        )

    def forward(self, x: Tensor) -> Tensor:
        gates = torch.softmax(self.gate(x), -1)
        total = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            total = total + gates[:, i : i + 1] * expert(x)
        return total


class Channels(nn.Module):
    """A model of its own for each channel."""

    def __init__(self, steps: int, length: int = 24) -> None:
        super().__init__()
        self.shape: Shape = (steps, length)
        self.models = nn.ModuleList(
            nn.Sequential(nn.Linear(length, 16), nn.ReLU(), nn.Linear(16, 4)) for _ in range(steps)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([model(x[:, i]) for i, model in enumerate(self.models)], 1)


class Ensemble(nn.Module):
    """The mean of small networks."""

    def __init__(self, steps: int, width: int = 10) -> None:
        super().__init__()
        self.shape: Shape = (width,)
        self.members = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, 3), nn.Softmax(-1)) for _ in range(steps)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.stack([member(x) for member in self.members])
        return found.mean(0), found.std(0)


class EulerSteps(nn.Module):
    """A neural differential equation, solved in equal steps, with a force that is given for each."""

    def __init__(self, steps: int, width: int = 12) -> None:
        super().__init__()
        self.shape: Shape = (steps, width)
        self.field = nn.Sequential(nn.Linear(width, 24), nn.Tanh(), nn.Linear(24, width))
        self.force = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, 0]
        for t in range(x.shape[1]):
            h = h + 0.05 * (self.field(h) + self.force(x[:, t]))
        return h


class TimeDistributed(nn.Module):
    """The same classifier at each step."""

    def __init__(self, steps: int, width: int = 20) -> None:
        super().__init__()
        self.shape: Shape = (steps, width)
        self.classifier = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.log_softmax(self.classifier(x[:, t]), -1) for t in range(x.shape[1])], 1)


class LstmCells(nn.Module):
    """Two layers of cells, advanced together; gives what comes after each step."""

    def __init__(self, steps: int, width: int = 16, hidden: int = 32) -> None:
        super().__init__()
        self.shape: Shape = (steps, width)
        self.first, self.second = nn.LSTMCell(width, hidden), nn.LSTMCell(hidden, hidden)
        self.out = nn.Linear(hidden, 4)

    def forward(self, x: Tensor) -> Tensor:
        one = two = None
        found = []
        for t in range(x.shape[1]):
            one = self.first(x[:, t], one)
            two = self.second(one[0], two)
            found.append(self.out(two[0]))
        return torch.stack(found, 1)


class GruCell(nn.Module):
    """A cell over embedded tokens; gives what comes after the last step."""

    def __init__(self, steps: int, width: int = 16, hidden: int = 48) -> None:
        super().__init__()
        self.shape: Shape = (steps, width)
        self.cell, self.hidden = nn.GRUCell(width, hidden), hidden
        self.out = nn.Linear(hidden, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], self.hidden)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        result: Tensor = self.out(h)
        return result


class WrittenLstm(nn.Module):
    """An LSTM whose gates are written out, on input and state side by side."""

    def __init__(self, steps: int, width: int = 16, hidden: int = 32) -> None:
        super().__init__()
        self.shape: Shape = (steps, width)
        self.forget, self.update, self.new, self.out = (nn.Linear(width + hidden, hidden) for _ in range(4))
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        h = c = torch.zeros(x.shape[0], self.hidden)
        found = []
        for step in x.unbind(1):
            joined = torch.cat([step, h], 1)
            kept = torch.sigmoid(self.forget(joined)) * c
            c = kept + torch.sigmoid(self.update(joined)) * torch.tanh(self.new(joined))
            h = torch.sigmoid(self.out(joined)) * torch.tanh(c)
            found.append(h)
        return torch.stack(found, 1)


class Standardized(nn.Module):
    """Each row of a matrix by its own statistics."""

    def __init__(self, steps: int, width: int = 16) -> None:
        super().__init__()
        self.shape: Shape = (steps, width)

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for i in range(x.shape[1]):
            row = x[:, i]
            rows.append((row - row.mean(-1, keepdim=True)) / (row.std(-1, keepdim=True) + 1e-6))
        return torch.stack(rows, 1)


class Spectra(nn.Module):
    """The spectrum of each window by a Fourier transform of its own."""

    def __init__(self, steps: int, length: int = 400) -> None:
        super().__init__()
        self.shape: Shape = (steps, length)
        self.register_buffer("window", torch.hann_window(length))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.fft.rfft(x[:, i] * self.window).abs() for i in range(x.shape[1])], 1)


class PairDistances(nn.Module):
    """Distances of all pairs of points, one by one."""

    def __init__(self, steps: int, width: int = 6) -> None:
        super().__init__()
        points = max(2, round(steps**0.5))
        self.shape: Shape = (points, width)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        rows = [torch.stack([((x[:, i] - x[:, j]) ** 2).sum(-1) for j in range(n)], 1) for i in range(n)]
        return torch.stack(rows, 1)


class Updates(nn.Module):
    """A copy, each of whose columns is assigned in turn, where a mask says so."""

    def __init__(self, steps: int, width: int = 16) -> None:
        super().__init__()
        self.shape: Shape = (steps, width)

    def forward(self, x: Tensor) -> Tensor:
        out = x.clone()
        for i in range(x.shape[1]):
            out[:, i] = torch.where(x[:, i] > 0, torch.sqrt(x[:, i].abs()), x[:, i] * 0.1)
        return out


TORCH_LOOPS: dict[str, Callable[[int], nn.Module]] = {
    "heads_in_a_list": HeadsInAList, "expert_modules": Experts, "channels": Channels, "ensemble": Ensemble,
    "euler_steps": EulerSteps, "time_distributed": TimeDistributed, "lstm_cells": LstmCells, "gru_cell": GruCell,
    "written_lstm": WrittenLstm, "standardized_modules": Standardized, "pair_distances": PairDistances, "updates": Updates,
    "spectra": Spectra,
}  # fmt: skip
"""By name, for a number of steps; ``shape`` of each is that of an input without its rows."""
