"""A policy and its value, compiled: two narrow heads are one product."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import mlec


class ActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.policy, self.value = nn.Linear(5, 200), nn.Linear(200, 6), nn.Linear(200, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = torch.relu(self.body(x))
        return torch.softmax(self.policy(h), -1), self.value(h)


def test_heads_of_a_policy() -> None:
    torch.manual_seed(0)
    model, x = ActorCritic().eval(), torch.randn(9, 5)
    compiled = mlec.compile(model, (x,), progress=False)
    merged = [p for p in compiled.report.to_dict()["passes"] if p["name"] == "merge-products"]
    assert [len(p["applied"]) for p in merged] == [1]
    with torch.no_grad():
        for got, wanted in zip(compiled.run([x.numpy()]), model(x), strict=True):
            np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-5, atol=1e-6)
