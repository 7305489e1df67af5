"""The networks of the bench: small members of the families that people ship."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn


class Mlp(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class Residual(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        same = stride == 1 and channels_in == channels
        self.skip = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
        )

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm1(self.first(x)))
        return torch.relu(self.norm2(self.second(h)) + self.skip(x))


class ResNet8(nn.Module):
    """The image classifier of the tiny benchmark suites: three residual stages on 32 x 32 pixels."""

    def __init__(self, channels: int = 3, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.stages = nn.Sequential(
            Residual(width, width, 1), Residual(width, 2 * width, 2), Residual(2 * width, 4 * width, 2)
        )
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.stages(self.stem(x)).mean((2, 3)))
        return out


class ResNet18(nn.Module):
    """The image classifier for 224 x 224 pixels: four stages of two residual blocks."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        blocks, before = [], 64
        for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            blocks += [Residual(before, width, stride), Residual(width, width, 1)]
            before = width
        self.stages = nn.Sequential(*blocks)
        self.head = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.stages(self.stem(x)).mean((2, 3)))
        return out


class DepthwiseCnn(nn.Module):
    """Depthwise-separable convolutions, as in MobileNet and keyword spotting."""

    def __init__(self, width: int = 64, classes: int = 12) -> None:
        super().__init__()
        blocks: list[nn.Module] = [
            nn.Conv2d(1, width, (10, 4), 2, (5, 1), bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        for _ in range(4):
            blocks += [nn.Conv2d(width, width, 3, 1, 1, groups=width, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            blocks += [nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(x).mean((2, 3)))
        return out


def _conv(channels_in: int, channels: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution with "same" padding, and its norm."""
    return [
        nn.Conv2d(channels_in, channels, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels),
    ]


class MobileNetV1(nn.Module):
    """Depthwise-separable convolutions all the way; ``width`` scales the channels."""

    def __init__(self, width: float = 1.0, classes: int = 1000) -> None:
        super().__init__()
        before = int(32 * width)
        blocks = [*_conv(3, before, 3, 2), nn.ReLU()]
        plan = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
        for full, stride in plan:
            channels = int(full * width)
            blocks += [*_conv(before, before, 3, stride, before), nn.ReLU(), *_conv(before, channels, 1), nn.ReLU()]
            before = channels
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(x).mean((2, 3)))
        return out


class InvertedResidual(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels_in * expansion
        expand = [*_conv(channels_in, wide, 1), nn.ReLU6()] if expansion > 1 else []
        self.body = nn.Sequential(*expand, *_conv(wide, wide, 3, stride, wide), nn.ReLU6(), *_conv(wide, channels, 1))
        self.same = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return x + out if self.same else out


class MobileNetV2(nn.Module):
    """Inverted residual blocks on 224 x 224 pixels."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        blocks, before = [*_conv(3, 32, 3, 2), nn.ReLU6()], 32
        plan = (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        )
        for expansion, channels, repeats, stride in plan:
            for i in range(repeats):
                blocks.append(InvertedResidual(before, channels, stride if i == 0 else 1, expansion))
                before = channels
        self.blocks = nn.Sequential(*blocks, *_conv(before, 1280, 1), nn.ReLU6())
        self.head = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(x).mean((2, 3)))
        return out


class Squeezed(nn.Module):
    """A block of MobileNetV3: wider, depthwise, each channel scaled by what all of the image says, and narrow again."""

    def __init__(self, channels_in: int, wide: int, channels: int, size: int, stride: int) -> None:
        super().__init__()
        self.skips = stride == 1 and channels_in == channels
        self.before = nn.Sequential(*_hard(channels_in, wide, 1), *_hard(wide, wide, size, stride, wide))
        self.scales = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, wide // 4, 1), nn.ReLU(), nn.Conv2d(wide // 4, wide, 1), nn.Hardsigmoid()
        )  # fmt: skip
        self.after = nn.Sequential(nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = self.before(x)
        narrow: torch.Tensor = self.after(wide * self.scales(wide))
        return x + narrow if self.skips else narrow


def _hard(channels_in: int, channels: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(channels_in, channels, size, stride, size // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(channels), nn.Hardswish()]


class MobileNetV3(nn.Module):
    """The shape of its small form, 10 classes."""

    BLOCKS = (
        (16, 16, 16, 3, 2), (16, 72, 24, 3, 2), (24, 88, 24, 3, 1), (24, 96, 40, 5, 2), (40, 240, 40, 5, 1), (40, 120, 48, 5, 1),
        (48, 288, 96, 5, 2), (96, 576, 96, 5, 1),
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*_hard(3, 16, 3, 2), *(Squeezed(*block) for block in self.BLOCKS), *_hard(96, 576, 1))
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(576, 1024), nn.Hardswish(), nn.Linear(1024, 10)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.body(x))
        return result


class Keywords(nn.Module):
    """Words in a second of sound: depthwise-separable convolutions over time, ``[n, 40, 100]``."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv1d(40, 128, 9, 2, 4), nn.BatchNorm1d(128), nn.ReLU()]
        for _ in range(4):
            layers += [nn.Conv1d(128, 128, 9, 1, 4, groups=128), nn.BatchNorm1d(128), nn.ReLU()]
            layers += [nn.Conv1d(128, 128, 1), nn.BatchNorm1d(128), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.AvgPool1d(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(128, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.body(x)
        return result


class Recurrent(nn.Module):
    def __init__(self, features: int = 32, hidden: int = 128, classes: int = 10) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(x)[0][:, -1])
        return out


class Encoder(nn.Module):
    """A transformer encoder over token ids."""

    def __init__(
        self, vocabulary: int = 1000, width: int = 128, heads: int = 4, layers: int = 2, length: int = 64
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, activation="gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 2)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.layers(self.tokens(ids) + self.positions).mean(1))
        return out
