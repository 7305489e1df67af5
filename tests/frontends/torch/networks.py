"""Small networks of the usual kinds, each with example inputs for any batch size. Weights are the same in every run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    def __init__(self, features: int = 16, hidden: int = 32, classes: int = 5) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(features, hidden),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.layers(x), dim=-1)


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return self.relu(y)


class ResNet(nn.Module):
    """ResNet's stem, stages and head, narrow."""

    def __init__(self, width: int = 8, classes: int = 10, blocks: tuple[int, ...] = (1, 1)) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
        )  # fmt: skip
        stages: list[nn.Module] = []
        inputs = width
        for stage, count in enumerate(blocks):
            outputs = width << stage
            for i in range(count):
                stages.append(ResidualBlock(inputs, outputs, 2 if i == 0 and stage else 1))
                inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.pool(self.stages(self.stem(x))), 1))


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.body = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False), nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True), nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class MobileNet(nn.Module):
    """Depthwise-separable convolutions with inverted residuals, narrow."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.Hardswish(),
            InvertedResidual(8, 8, 1, 2), InvertedResidual(8, 16, 2, 3), InvertedResidual(16, 16, 1, 3),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class Recurrent(nn.Module):
    """A recurrent network over a sequence, classified from its last hidden state."""

    def __init__(
        self,
        cell: type[nn.RNNBase],
        layers: int = 1,
        bidirectional: bool = False,
        batch_first: bool = True,
        features: int = 6,
        hidden: int = 8,
    ) -> None:
        super().__init__()
        self.cell = cell(features, hidden, num_layers=layers, bidirectional=bidirectional, batch_first=batch_first)
        self.head = nn.Linear(hidden * (2 if bidirectional else 1), 4)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.cell(x)
        hidden = state[0] if isinstance(state, tuple) else state
        return self.head(y[:, -1] if self.batch_first else y[-1]), hidden


class TransformerEncoder(nn.Module):
    def __init__(self, depth: int = 16, heads: int = 4, layers: int = 2, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(depth, heads, 32, batch_first=True, norm_first=norm_first, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(depth, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(dim=1))


class TextClassifier(nn.Module):
    """Token and position embeddings, attention with padding masked out, a causal option."""

    def __init__(self, vocabulary: int = 50, depth: int = 16, length: int = 12, causal: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, depth, padding_idx=0)
        self.positions = nn.Parameter(torch.zeros(1, length, depth))
        self.attention = nn.MultiheadAttention(depth, 4, batch_first=True)
        self.norm = nn.LayerNorm(depth)
        self.head = nn.Linear(depth, 3)
        self.causal = causal

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tokens(tokens) + self.positions[:, : tokens.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1]) if self.causal else None
        padding = tokens == 0
        if self.causal:
            padding = torch.zeros_like(h[..., 0]).masked_fill(padding, float("-inf"))
        attended, _ = self.attention(h, h, h, key_padding_mask=padding, attn_mask=mask, need_weights=False)
        return self.head(self.norm(h + attended)[:, 0])


class TwoInputs(nn.Module):
    """A table and an image, joined; returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Sequential(nn.Linear(5, 8), nn.LeakyReLU(0.1))
        self.image = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ELU(), nn.AvgPool2d(2), nn.Flatten())
        self.head = nn.Linear(8 + 4 * 9, 2)

    def forward(self, table: Tensor, image: Tensor) -> dict[str, Tensor]:
        logits = self.head(torch.cat([self.table(table), self.image(image)], dim=1))
        return {"logits": logits, "label": logits.argmax(1)}


class AutoEncoder(nn.Module):
    """Strided and transposed convolutions, upsampling, group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.GroupNorm(2, 8),
            nn.SiLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.Conv2d(8, 3, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.decoder(self.encoder(x)))


class WaveNet(nn.Module):
    """Dilated one-dimensional convolutions with gates."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(4, 8, 2, dilation=2**i) for i in range(3))
        self.norm = nn.InstanceNorm1d(4, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        for i, layer in enumerate(self.layers):
            gated, gate = layer(nn.functional.pad(x, (2**i, 0))).chunk(2, dim=1)
            x = x + torch.tanh(gated) * torch.sigmoid(gate)
        return x.amax(dim=2)


@dataclass(frozen=True)
class Network:
    """One demo network.

    Attributes:
        make: builds the module.
        inputs: example inputs for a batch size.
        shapes: input shapes to state when the batch is not the first axis.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    shapes: tuple[tuple[int | str, ...], ...] | None = None

    def build(self, seed: int = 0) -> nn.Module:
        """The module with reproducible weights (and, for batch norm, statistics that are not the initial ones), in eval mode."""
        torch.manual_seed(seed)
        module = self.make()
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                assert part.running_mean is not None
                assert part.running_var is not None
                nn.init.uniform_(part.running_mean, -0.5, 0.5)
                nn.init.uniform_(part.running_var, 0.5, 2.0)
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.uniform_(part.bias, -0.2, 0.2)
        return module.eval()


def _floats(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    def make(batch: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch)),)

    return make


def _sequence(length: int, features: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (torch.randn(length, batch, features, generator=torch.Generator().manual_seed(batch)),)


def _tokens(batch: int) -> tuple[Tensor, ...]:
    tokens = torch.randint(1, 50, (batch, 12), generator=torch.Generator().manual_seed(batch))
    tokens[:, 9:] = 0
    return (tokens,)


def _table_and_image(batch: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 5, generator=generator), torch.randn(batch, 1, 8, 8, generator=generator)


NETWORKS: dict[str, Network] = {
    "mlp": Network(MLP, _floats(16)),
    "resnet": Network(ResNet, _floats(3, 32, 32)),
    "mobilenet": Network(MobileNet, _floats(3, 32, 32)),
    "lstm": Network(lambda: Recurrent(nn.LSTM), _floats(7, 6)),
    "lstm_deep": Network(lambda: Recurrent(nn.LSTM, layers=2, bidirectional=True), _floats(7, 6)),
    "lstm_time_first": Network(
        lambda: Recurrent(nn.LSTM, layers=2, batch_first=False), _sequence(7, 6), ((7, "n", 6),)
    ),
    "gru": Network(lambda: Recurrent(nn.GRU), _floats(7, 6)),
    "gru_deep": Network(lambda: Recurrent(nn.GRU, layers=2, bidirectional=True), _floats(7, 6)),
    "gru_time_first": Network(
        lambda: Recurrent(nn.GRU, bidirectional=True, batch_first=False), _sequence(7, 6), ((7, "n", 6),)
    ),
    "rnn": Network(lambda: Recurrent(nn.RNN, layers=2), _floats(7, 6)),
    "transformer": Network(TransformerEncoder, _floats(5, 16)),
    "transformer_norm_first": Network(lambda: TransformerEncoder(norm_first=True), _floats(5, 16)),
    "text": Network(TextClassifier, _tokens),
    "text_causal": Network(lambda: TextClassifier(causal=True), _tokens),
    "two_inputs": Network(TwoInputs, _table_and_image),
    "autoencoder": Network(AutoEncoder, _floats(3, 16, 16)),
    "wavenet": Network(WaveNet, _floats(4, 20)),
}
