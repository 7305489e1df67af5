"""What the tests of the torch frontend share: lowering a function, comparing a graph with torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from mlec.frontends.base import LowerOptions
from mlec.frontends.fx import TorchFrontend
from mlec.frontends.fx_context import to_numpy
from mlec.ir import Graph, run_graph

FRONTEND = TorchFrontend()


class Function(nn.Module):
    """A function of up to three tensors as a module."""

    def __init__(self, function: Callable[..., Any], count: int) -> None:
        super().__init__()
        self.function = function
        self.count = count

    def forward(self, x: Any, y: Any = None, z: Any = None) -> Any:
        return self.function(*(x, y, z)[: self.count])


def lower(model: Any, *inputs: torch.Tensor, **options: Any) -> Graph:
    """The graph of a model, or of a function."""
    module = model if isinstance(model, nn.Module | torch.export.ExportedProgram) else Function(model, len(inputs))
    return FRONTEND.lower(module, LowerOptions(example_inputs=inputs or None, **options))


def compare(
    graph: Graph, oracle: Callable[[Sequence[Any]], list[Any]], inputs: Sequence[Any], rtol: float = 2e-6
) -> None:
    """Asserts that the graph gives what the model gives."""
    arrays = [to_numpy(t) if isinstance(t, torch.Tensor) else t for t in inputs]
    assert_same(run_graph(graph, arrays), oracle(arrays), rtol)


def assert_same(got: Sequence[Any], want: Sequence[Any], rtol: float) -> None:
    """Asserts shapes, dtypes and values (relative to the output's scale; NaN and infinities in the same places)."""
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        if ours.dtype.kind in "iub":
            np.testing.assert_array_equal(ours, theirs)
            continue
        ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
        finite = np.isfinite(theirs)
        np.testing.assert_array_equal(ours[~finite], theirs[~finite])
        scale = np.max(np.abs(theirs[finite]), initial=1.0)
        np.testing.assert_allclose(ours[finite], theirs[finite], rtol=rtol, atol=rtol * scale)
