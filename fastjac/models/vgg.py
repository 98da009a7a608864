"""The VGG networks of Srinivas & Fleuret (ICML 2018), with BatchNorm."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from fastjac.errors import FastjacError
from fastjac.models.normalize import Normalize

PLANS = {
    "vgg4": "64 M 128 M 512 M",
    "vgg9": "64 M 128 M 256 256 M 512 512 M 512 512 M",
}


def parse_plan(plan: str) -> list[int | None]:
    """``"64 M 128"`` as ``[64, None, 128]``: widths of convolutions, None for a max-pool."""
    steps: list[int | None] = []
    for word in plan.split():
        if word != "M" and not (word.isascii() and word.isdigit() and 0 < int(word) < 10**6):
            raise FastjacError(
                f"plan {plan!r}: expected widths below 1000000 and M, as in {PLANS['vgg4']!r}; "
                f"got {word!r}"
            )
        steps.append(None if word == "M" else int(word))
    if not any(steps):
        raise FastjacError(f"plan {plan!r} has no convolution")
    return steps


class VGG(nn.Sequential):
    """Convolutions by a plan, global average pooling, one fully connected layer.

    A number in the plan is a 3x3 convolution of that many channels (stride 1, padding 1), BatchNorm
    and ReLU; M is a 2x2 max-pool of stride 2. Takes raw pixels in [0, 1],
    ``[B, in_channels, H, W]``; gives logits ``[B, num_classes]``.

    Modules, in the order they run: ``normalize``, then ``conv1``, ``norm1``, ``relu1``, ``conv2``
    and so on, with ``pool1``, ``pool2`` and so on among them, ``avgpool``, ``flatten``, ``fc``.

    Args:
        plan: such as ``"64 M 128 M 512 M"``.
        num_classes: logits.
        in_channels: channels of the image.
        width: factor on the plan's widths, rounded, at least one channel each.
        mean, std: of the pixels, one number per channel; None: 0 and 1.
    """

    def __init__(
        self,
        plan: str,
        num_classes: int,
        in_channels: int = 3,
        width: float = 1.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        for name, value in (("num_classes", num_classes), ("in_channels", in_channels)):
            if value < 1:
                raise FastjacError(f"{name}: expected at least 1, got {value}")
        if not 0 < width < math.inf:
            raise FastjacError(f"width: expected a factor above 0, got {width}")
        mean = [0.0] * in_channels if mean is None else mean
        std = [1.0] * in_channels if std is None else std
        if len(mean) != in_channels:
            raise FastjacError(f"mean: expected {in_channels} numbers, got {len(mean)}")
        layers: OrderedDict[str, nn.Module] = OrderedDict(normalize=Normalize(mean, std))
        channels, convs, pools = in_channels, 0, 0
        for step in parse_plan(plan):
            if step is None:
                pools += 1
                layers[f"pool{pools}"] = nn.MaxPool2d(2)
            else:
                convs += 1
                out = max(1, round(step * width))
                layers[f"conv{convs}"] = nn.Conv2d(channels, out, 3, padding=1, bias=False)
                layers[f"norm{convs}"] = nn.BatchNorm2d(out)
                layers[f"relu{convs}"] = nn.ReLU(inplace=True)
                channels = out
        layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["fc"] = nn.Linear(channels, num_classes)
        super().__init__(layers)
        self.smallest_image = 2**pools


def vgg4(num_classes: int, in_channels: int = 3, width: float = 1.0, **normalization) -> VGG:
    """The plan 64 M 128 M 512 M. Arguments as :class:`VGG`."""
    return VGG(PLANS["vgg4"], num_classes, in_channels, width, **normalization)


def vgg9(num_classes: int, in_channels: int = 3, width: float = 1.0, **normalization) -> VGG:
    """The plan 64 M 128 M 256 256 M 512 512 M 512 512 M. Arguments as :class:`VGG`."""
    return VGG(PLANS["vgg9"], num_classes, in_channels, width, **normalization)
