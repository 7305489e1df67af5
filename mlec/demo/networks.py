"""Networks of PyTorch on the 8x8 images of digits."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from mlec.demo.recipes import Trained


def _trained(make: type[nn.Module], shape: tuple[int, ...], epochs: int = 8) -> Trained:
    """Trains by AdamW, in shuffled batches of 64 images of the given shape."""
    torch.manual_seed(0)
    X, y = load_digits(return_X_y=True)
    images = torch.tensor(X, dtype=torch.float32).reshape(-1, *shape) / 16
    train, test, train_labels, test_labels = train_test_split(images, torch.tensor(y), test_size=0.3, random_state=0)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        order = torch.randperm(len(train))
        for start in range(0, len(train), 64):
            batch = order[start : start + 64]
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(model(train[batch]), train_labels[batch]))
            optimizer.step()
    return Trained(model.eval(), test.numpy(), test_labels.numpy())


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class Block(nn.Module):
    """Two convolutions and a way past them."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels))
        self.past = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(self.first(x)) + self.past(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = self.blocks(self.stem(x)).mean(dim=(2, 3))
        out: Tensor = self.head(features)
        return out


class RowLSTM(nn.Module):
    """Reads the eight rows of an image one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.LSTM(8, 64, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.rows(x)
        out: Tensor = self.head(states[:, -1])
        return out


class RowTransformer(nn.Module):
    """Every row of an image attends to the others."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 64)
        self.position = nn.Parameter(torch.zeros(8, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(self.embed(x) + self.position).mean(dim=1))
        return out


def mlp() -> Trained:
    return _trained(MLP, (64,))


def resnet() -> Trained:
    return _trained(ResNet, (1, 8, 8), epochs=4)


def lstm() -> Trained:
    return _trained(RowLSTM, (8, 8), epochs=20)


def transformer() -> Trained:
    return _trained(RowTransformer, (8, 8), epochs=15)
