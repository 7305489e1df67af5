"""A classifier of the first position, compiled: its last layer is computed for that position only."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import mlec


def test_classifier_of_the_first_position() -> None:
    torch.manual_seed(0)
    layers = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=True), 2, enable_nested_tensor=False
    )
    head = nn.Linear(16, 3)

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = layers, head

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.layers(x)[:, 0])  # type: ignore[no-any-return]

    model, x = Classifier().eval(), torch.randn(3, 7, 16)
    compiled = mlec.compile(model, (x,), progress=False)
    graph = mlec.optimize(mlec.lower(model, (x,)), passes=mlec.PassPipeline.parse("default").without("fuse", "layout"))[
        0
    ]
    rows = [node.output.type.shape[1] for node in graph.nodes if node.name == "matmul" and node.output.type.rank == 3]
    assert rows.count(1) == 4  # of the second layer: queries, what follows attention, and both of the network
    assert rows.count(7) == 8
    with torch.no_grad():
        np.testing.assert_allclose(compiled.run([x.numpy()])[0], model(x).numpy(), rtol=1e-4, atol=1e-5)
