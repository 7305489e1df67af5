"""Loops over torch's recurrent cells, and over cells that are written out, against torch: one op for each layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

import mlec
from mlec.ir import Graph, run_graph, verify
from mlec.passes.vectorize import Vectorize
from mlec.pipeline import PassContext, PassPipeline
from mlec.tolerance import check_equal

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

STEPS, FEATURES, HIDDEN = 5, 3, 7
CELLS: dict[str, Callable[..., nn.Module]] = {
    "lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell,
}  # fmt: skip


class Layers(nn.Module):
    """Layers of one kind of cell that are advanced together; gives all results and the last states.

    The first stack has one layer and starts from zeros, the second has three without biases and starts from states that are given.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stacks = nn.ModuleList(
            nn.ModuleList(CELLS[kind](HIDDEN if i else FEATURES, HIDDEN, bias=count == 1) for i in range(count))
            for count in (1, 3)
        )

    def forward(self, x: Tensor, h: Tensor) -> list[Tensor]:
        results: list[Tensor] = []
        for stack, first in zip(self.stacks, (torch.zeros_like(h), h), strict=True):
            states = [(first, first) if self.kind == "lstm" else first for _ in stack]
            found = []
            for t in range(STEPS):
                value = x[:, t]
                for i, cell in enumerate(stack):
                    states[i] = cell(value, states[i])
                    value = states[i][0] if self.kind == "lstm" else states[i]
                found.append(value)
            results += [torch.stack(found, 1), *(v for s in states for v in (s if self.kind == "lstm" else (s,)))]
        return results


class Written(nn.Module):
    """Cells with gates of their own, spelled in different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(FEATURES + HIDDEN, HIDDEN) for _ in range(4))
        self.x, self.h = nn.Linear(FEATURES, 4 * HIDDEN), nn.Linear(HIDDEN, 4 * HIDDEN, bias=False)
        self.cell = nn.GRUCell(FEATURES, HIDDEN)

    def forward(self, x: Tensor, given: Tensor) -> list[Tensor]:
        results, wide = [], self.x(x)
        for i, name in enumerate(SPELLINGS):
            start = given + i  # other gates in each
            h = c = start.sigmoid() if name == "gru_moved" else start
            found = []
            for t in range(STEPS):
                h, c = getattr(self, name)(x, wide, t, h, c)
                found.append(h)
            results.append(torch.stack(found, 1))
        return results

    def lstm_of_joined(self, x: Tensor, wide: Tensor, t: int, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        joined = torch.cat([h, x[:, t]], 1)
        forget, update, out = (torch.sigmoid(part(joined)) for part in self.parts[:3])
        c = forget * c + update * torch.tanh(self.parts[3](joined))
        return out * torch.tanh(c), c

    def lstm_hoisted_by_hand(self, x: Tensor, wide: Tensor, t: int, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        gates = wide[:, t] + self.h(h)
        o, i, f = torch.sigmoid(gates[:, : 3 * HIDDEN]).chunk(3, 1)
        c = torch.tanh(gates[:, 3 * HIDDEN :]) * i + c * f
        return torch.tanh(c) * o, c

    def _gates(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The reset and the update gate, and the new state."""
        r, z, new, _ = self.x(x).chunk(4, 1)
        hr, hz, hn, _ = self.h(h).chunk(4, 1)
        reset = torch.sigmoid(r + hr)
        return reset, torch.sigmoid(z + hz), torch.tanh(new + reset * hn)

    def gru(self, x: Tensor, wide: Tensor, t: int, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        _, z, new = self._gates(x[:, t], h)
        return (1 - z) * new + z * h, c

    def gru_turned(self, x: Tensor, wide: Tensor, t: int, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        _, z, new = self._gates(x[:, t], h)
        return z * new + (1 - z) * h, c

    def gru_moved(self, x: Tensor, wide: Tensor, t: int, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        _, z, new = self._gates(x[:, t], h)
        return h + z * (new - h), c

    def gru_along_the_first_axis(self, x: Tensor, wide: Tensor, t: int, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return self.cell(x.transpose(0, 1).exp()[t], h), c

    def rnn_backwards(self, x: Tensor, wide: Tensor, t: int, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(self.parts[0](torch.cat([x[:, STEPS - 1 - t], h], 1))), c

    def rnn_in_another_order(self, x: Tensor, wide: Tensor, t: int, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return torch.relu(self.parts[0](torch.cat([x[:, 2 * t % STEPS], h], 1))), c

    def rnn_of_the_same(self, x: Tensor, wide: Tensor, t: int, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.parts[0](torch.cat([torch.exp(x[:, 0]), h], 1))), c

    def rnn_of_what_is_computed(self, x: Tensor, wide: Tensor, t: int, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.parts[0](torch.cat([torch.exp(x[:, t]), h], 1))), c


SPELLINGS = tuple(name for name in vars(Written) if name.partition("_")[0] in CELLS)


def vectorized(model: nn.Module) -> Graph:
    """The model's graph after the pass, which is compared with the graph before it and with torch."""
    torch.manual_seed(0)
    model = model.eval()
    x, h = torch.randn(4, STEPS, FEATURES), torch.randn(4, HIDDEN)
    graph = PassPipeline.parse("canonicalize,fold-constants,cse").run(mlec.lower(model, example_inputs=(x, h)))[0]
    result = Vectorize().run(graph, PassContext())
    verify(result.graph)
    check_equal(graph, result.graph, Vectorize.preserves, type(model).__name__, seeds=(0,))
    with torch.no_grad():
        wanted = model(x, h)
    for a, b in zip(wanted, run_graph(result.graph, [x.numpy(), h.numpy()]), strict=True):
        np.testing.assert_allclose(b, a.numpy(), rtol=1e-5, atol=1e-6)
    return result.graph


def recurrent_ops(graph: Graph) -> dict[str, int]:
    """How many there are of each, and of what would be left of steps."""
    return dict(Counter(n.name for n in graph.nodes if n.name in (*CELLS, "tanh", "sigmoid", "mul")))


@pytest.mark.parametrize("kind", CELLS)
def test_cells_of_torch_become_one_op_for_each_layer(kind: str) -> None:
    assert recurrent_ops(vectorized(Layers(kind))) == {kind: 4}


def test_cells_that_are_written_out_become_ops_in_every_spelling() -> None:
    starts = {"sigmoid": 1}  # a state that is not infinite
    assert recurrent_ops(vectorized(Written())) == starts | Counter(name.partition("_")[0] for name in SPELLINGS)
