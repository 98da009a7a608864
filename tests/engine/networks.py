"""Small networks, one for each thing that the engine must get right."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def vgg(width: int = 4, inplace: bool = True, affine: bool = True) -> nn.Sequential:
    """Two blocks of conv, BatchNorm, ReLU, pool; then a third without a pool, and a head."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width, affine=affine),
        nn.ReLU(inplace),
        nn.MaxPool2d(2),
        nn.Conv2d(width, width + 1, 3, padding=1),
        nn.BatchNorm2d(width + 1, affine=affine),
        nn.ReLU(inplace),
        nn.MaxPool2d(2),
        nn.Conv2d(width + 1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width, affine=affine),
        nn.ReLU(inplace),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 5),
    )


class Residual(nn.Module):
    """A ResNet's stem (3x3 pool with padding), a block with a projection, one without, a head."""

    def __init__(self, width: int = 4, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 5, stride=2, padding=2, bias=False),
            nn.BatchNorm2d(width),
            activation(),
            nn.MaxPool2d(3, 2, 1),
        )
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.project = nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width))
        self.activation = activation(inplace=True)
        self.last = nn.Identity()
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = self.activation(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += self.project(x)
        out = self.activation(out)
        again = self.norm1(self.conv1(out))  # both used twice, the statistics too
        out = self.last(F.relu(again + out))
        return self.head(out.mean((2, 3)))


class Blocks(nn.Module):
    """A stem, ``middle`` and a head; ``last`` is middle's output."""

    def __init__(self, middle: nn.Module, channels: int, width: int = 4, stride: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, stride, 1), nn.BatchNorm2d(width))
        self.middle = middle
        self.last = nn.Identity()
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.middle(self.stem(x))).flatten(2).mean(2))


class Branches(nn.Module):
    """Branches of different reach, joined by cat, add and product; scaled by a parameter."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.near = nn.Conv2d(width, 2, 1)
        self.far = nn.Conv2d(width, 2, 3, padding=2, dilation=2)
        self.grouped = nn.Conv2d(width, width, 3, padding=1, groups=2)
        self.scale = nn.Parameter(torch.rand(4, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([self.near(x), F.relu(self.far(x))], 1)
        gated = joined * torch.sigmoid(self.grouped(x))
        return 0.5 * (gated - x) * self.scale / 2 + torch.cat([joined, gated], 1)[:, 2:6]


class SqueezeExcite(nn.Module):
    """A product that broadcasts over the map, with a global mean in it."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.squeeze = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.sigmoid(self.squeeze(x.mean((2, 3))))
        return x * weight[:, :, None, None]


class ChannelsLastNorm(nn.Module):
    """A ConvNeXt block: depthwise, LayerNorm over channels, two linear layers, a residual."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


class Splits(nn.Module):
    """Several outputs of one operation: a ShuffleNet unit's split and shuffle."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width // 2, width // 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        y = torch.cat([left, torch.tanh(self.conv(right))], 1)
        batch, channels, height, width = y.shape
        y = y.view(batch, 2, channels // 2, height, width).transpose(1, 2)
        return y.reshape(batch, channels, height, width)


class WeightStandardised(nn.Conv2d):
    """A convolution whose weight is a function of its parameter."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias, padding=1)


class Shift(nn.Module):
    """x + 3."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 3


class Divide(nn.Module):
    """x / 6."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 6


class Attention(nn.Module):
    """Softmax attention over positions: matrix products of two functions of x."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(width, 3 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).chunk(3, 1)
        weights = torch.softmax(q.transpose(1, 2) @ k, -1)
        return x + (v @ weights.transpose(1, 2)).view_as(x)
