"""Whole networks against torch: any batch size, exported or not, in float64, with their weights and source lines."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mlec.frontends.base import LowerOptions
from mlec.ir import Graph, parse_graph, print_graph
from tests.frontends.torch.common import FRONTEND, compare, lower
from tests.frontends.torch.networks import MLP, NETWORKS, TransformerEncoder, TwoInputs


@cache
def lowered(name: str) -> tuple[nn.Module, Graph]:
    network = NETWORKS[name]
    module = network.build()
    return module, lower(module, *network.inputs(1), input_shapes=network.shapes)


@pytest.mark.parametrize("batch", [0, 1, 2, 5])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_at_any_batch_size(name: str, batch: int) -> None:
    module, graph = lowered(name)
    run = FRONTEND.oracle(module)["run"]
    inputs = NETWORKS[name].inputs(batch)
    if batch == 0:
        try:
            run([t.numpy() for t in inputs])
        except (RuntimeError, IndexError):
            pytest.skip("torch itself does not run this network on no rows")
    compare(graph, run, inputs)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_batch_is_the_symbol_n(name: str) -> None:
    _, graph = lowered(name)
    axis = 0 if NETWORKS[name].shapes is None else 1
    assert all(spec.shape[axis] == "n" for spec in graph.signature.inputs)
    assert graph.signature.symbols == {"n": (0, None)}
    assert graph.symbols == ("n",)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_node_has_a_location(name: str) -> None:
    module, graph = lowered(name)
    paths = {path for path, _ in module.named_modules()} | {type(module).__name__}
    for node in graph.compute_nodes:
        assert node.loc.scope in paths
        assert Path(node.loc.file).name == "networks.py"
        assert node.loc.line > 0


@pytest.mark.parametrize("name", ["mlp", "resnet", "lstm_deep", "gru", "transformer", "autoencoder"])
def test_networks_in_float64(name: str) -> None:
    network = NETWORKS[name]
    module = network.build().double()
    inputs = [t.double() for t in network.inputs(3)]
    compare(lower(module, *inputs), FRONTEND.oracle(module)["run"], inputs, rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_in_low_precision(dtype: torch.dtype) -> None:
    module = NETWORKS["mlp"].build().to(dtype)
    inputs = [t.to(dtype) for t in NETWORKS["mlp"].inputs(3)]
    compare(lower(module, *inputs), FRONTEND.oracle(module)["run"], inputs, rtol=2e-2)


def test_text_form_reads_back() -> None:
    _, graph = lowered("transformer")
    text = print_graph(graph)
    assert print_graph(parse_graph(text, graph.constants)) == text


def test_static_batch() -> None:
    module = NETWORKS["mlp"].build()
    inputs = NETWORKS["mlp"].inputs(3)
    graph = lower(module, *inputs, dynamic_batch=False)
    assert graph.inputs[0].type.shape == (3, 16)
    compare(graph, FRONTEND.oracle(module)["run"], inputs)


@pytest.mark.parametrize("dynamic", [True, False])
def test_exported_programs(dynamic: bool) -> None:
    module, inputs = TwoInputs().eval(), NETWORKS["two_inputs"].inputs(4)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(module, inputs, dynamic_shapes=(batch, batch) if dynamic else None)
    graph = FRONTEND.lower(program, LowerOptions())
    assert graph.inputs[0].type.shape[0] == (4 if not dynamic else graph.inputs[1].type.shape[0])
    assert [spec.name for spec in graph.signature.inputs] == ["table", "image"]
    assert [spec.name for spec in graph.signature.outputs] == ["logits", "label"]
    run = FRONTEND.oracle(program)["run"]
    for rows in (1, 4, 9) if dynamic else (4,):
        compare(graph, run, NETWORKS["two_inputs"].inputs(rows))


def test_exported_program_takes_names_for_its_sizes() -> None:
    program = torch.export.export(MLP().eval(), (torch.randn(4, 16),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    graph = FRONTEND.lower(program, LowerOptions(input_shapes={"x": ("rows", 16)}))
    assert graph.signature.inputs[0].shape == ("rows", 16)
    assert FRONTEND.lower(program, LowerOptions(input_shapes=[(7, 16)])).inputs[0].type.shape == (7, 16)


def test_graph_modules() -> None:
    module = NETWORKS["mobilenet"].build()
    traced = torch.fx.symbolic_trace(module)
    inputs = NETWORKS["mobilenet"].inputs(2)
    compare(lower(traced, *inputs), FRONTEND.oracle(module)["run"], inputs)


def test_nested_inputs_and_outputs() -> None:
    class Nested(nn.Module):
        def forward(self, pair: tuple[torch.Tensor, torch.Tensor], extra: dict[str, torch.Tensor]) -> dict[str, object]:
            return {"sums": [pair[0] + pair[1], pair[0] * 2], "scaled": extra["scale"] * pair[1]}

    inputs = ((torch.randn(2, 3), torch.randn(2, 3)), {"scale": torch.randn(2, 1)})
    graph = FRONTEND.lower(Nested(), LowerOptions(example_inputs=inputs))
    assert [spec.name for spec in graph.signature.inputs] == ["pair.0", "pair.1", "extra.scale"]
    assert [spec.name for spec in graph.signature.outputs] == ["sums.0", "sums.1", "scaled"]


def test_several_symbolic_axes() -> None:
    module = TransformerEncoder().eval()
    graph = lower(module, torch.randn(2, 5, 16), input_shapes={"x": ("n", "t", 16)})
    assert graph.signature.inputs[0].shape == ("n", "t", 16)
    for shape in ((1, 3, 16), (4, 9, 16)):
        compare(graph, FRONTEND.oracle(module)["run"], [torch.randn(shape)])


def test_symbolic_image_size() -> None:
    module = NETWORKS["resnet"].build()
    graph = FRONTEND.lower(module, LowerOptions(input_shapes=[("n", 3, "h", "w")]))
    for shape in ((1, 3, 32, 40), (2, 3, 47, 33)):
        compare(graph, FRONTEND.oracle(module)["run"], [torch.randn(shape)])


def test_numpy_examples_take_the_parameters_dtype() -> None:
    graph = FRONTEND.lower(MLP(), LowerOptions(example_inputs=(np.zeros((4, 16)),)))
    assert str(graph.inputs[0].type) == "f32[n, 16]"


def test_weights_keep_their_names_and_share_storage() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(20, 8)
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.tokens.weight
            self.register_buffer("scale", torch.full((8,), 2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.tokens(x) * self.scale)

    module = Tied().eval()
    x = torch.randint(0, 20, (3, 4))
    graph = lower(module, x)
    assert set(graph.constants) in ({"scale", "tokens_weight"}, {"scale", "head_weight"})
    compare(graph, FRONTEND.oracle(module)["run"], [x])


def test_the_model_is_left_as_it_is() -> None:
    module = MLP()
    module.train()
    module.layers[3].eval()
    before = {name: (part.training, set(vars(part))) for name, part in module.named_modules()}
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    graph = lower(module, torch.randn(3, 16))
    FRONTEND.oracle(module)["run"]([np.zeros((2, 16), np.float32)])
    assert {name: (part.training, set(vars(part))) for name, part in module.named_modules()} == before
    assert all(torch.equal(weights[name], tensor) for name, tensor in module.state_dict().items())
    with torch.no_grad():
        module.layers[0].weight.zero_()
    assert graph.constants["layers_0_weight"].any(), "training on must not change the graph"


def test_the_caller_s_arrays_are_not_written_to() -> None:
    module = nn.Sequential(nn.ReLU(inplace=True))
    x = np.array([[-1.0, 2.0]], np.float32)
    FRONTEND.oracle(module)["run"]([x])
    assert x[0, 0] == -1


def test_frozen_transformers_do_not_take_the_fused_path() -> None:
    module = TransformerEncoder().eval().requires_grad_(False)
    x = torch.randn(2, 5, 16)
    compare(lower(module, x), FRONTEND.oracle(module)["run"], [x])
    assert torch.backends.mha.get_fastpath_enabled()


def test_padded_transformer() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="relu")
            self.encoder = nn.TransformerEncoder(layer, 1)

        def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
            return self.encoder(x, src_key_padding_mask=padding)

    module = Padded().eval()
    x, padding = (
        torch.randn(3, 4, 8),
        torch.tensor([[False] * 4, [False, False, True, True], [False, True, True, True]]),
    )
    compare(lower(module, x, padding), FRONTEND.oracle(module)["run"], [x, padding])


def test_attention_weights_are_returned() -> None:
    class Weights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True, kdim=6, vdim=6)

        def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.attention(q, k, k, need_weights=True)

    module = Weights().eval()
    inputs = [torch.randn(3, 4, 8), torch.randn(3, 5, 6)]
    compare(lower(module, *inputs), FRONTEND.oracle(module)["run"], inputs)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_cells(cell: type[nn.RNNCellBase]) -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state = None
            for t in range(3):
                state = self.cell(x[:, t], state)
            return state[0] if isinstance(state, tuple) else state

    module = Steps().eval()
    x = torch.randn(3, 3, 4)
    compare(lower(module, x), FRONTEND.oracle(module)["run"], [x])


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_with_states_and_without_biases(cell: type[nn.RNNBase]) -> None:
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell(4, 5, num_layers=2, bias=False, batch_first=True)

        def forward(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y, state = self.cell(x, (h, h * 2) if isinstance(self.cell, nn.LSTM) else h)
            return y, state[1] if isinstance(state, tuple) else state

    module = Stateful().eval()
    inputs = [torch.randn(3, 4, 4), torch.randn(2, 3, 5)]
    graph = lower(module, *inputs, input_shapes={"h": (2, "n", 5)})
    assert graph.signature.inputs[1].shape == (2, "n", 5)
    compare(graph, FRONTEND.oracle(module)["run"], inputs)


def test_a_program_of_ops_that_are_lowered_is_not_traced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 5)
    )
    x = torch.randn(2, 3, 8, 8)
    program = torch.export.export(module.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=1)},))
    with monkeypatch.context() as patch:
        patch.setattr(torch.export.ExportedProgram, "run_decompositions", None)
        graph = lower(program)
    run = FRONTEND.oracle(module)["run"]
    for rows in (1, 3):
        compare(graph, run, [torch.randn(rows, 3, 8, 8)], rtol=1e-5)
    for line in (nn.Conv1d(3, 4, 3, stride=2), nn.Conv3d(2, 4, (1, 3, 2), dilation=(1, 2, 1), groups=2)):
        lone = torch.randn(line.in_channels, 9) if isinstance(line, nn.Conv1d) else torch.randn(2, 4, 9, 5)
        compare(lower(torch.export.export(line.eval(), (lone,))), FRONTEND.oracle(line)["run"], [lone], rtol=1e-5)


def test_what_is_lowered_as_it_stands_is_not_traced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results that are picked, and numbers computed from sizes, need nothing of torch."""

    def refuse(program: torch.export.ExportedProgram, *settings: object) -> None:
        raise AssertionError("traced again")

    class Parts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left, right = x.chunk(2, 1)
            return nn.functional.cosine_similarity(left, right * x.shape[0]).reshape(x.shape[0], -1)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", refuse)
    module, x = Parts(), torch.randn(3, 8)
    compare(lower(module, x), FRONTEND.oracle(module)["run"], [x])
    encoder = NETWORKS["transformer"]
    lower(encoder.build(), *encoder.inputs(2))
