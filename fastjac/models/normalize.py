"""Input normalisation as a part of the network.

Jacobians of two networks are compared with respect to the input that both see. That is the raw
image: were each network fed its own normalised copy, the two factors 1/std would enter the match.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastjac.errors import FastjacError


class Normalize(nn.Module):
    """``(x - mean) / std`` per channel, of ``x`` ``[B, C, H, W]`` with pixels in [0, 1].

    ``mean`` and ``std`` have one number per channel. They are buffers ``[C, 1, 1]`` of the state
    dict, so that a weights file says what input it was trained on.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std, default=0.0) <= 0:
            raise FastjacError(
                "mean and std: expected one number per channel each, std above 0; "
                f"got {list(mean)} and {list(std)}"
            )
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


class _NormalizesInput:
    """Mixed into a network's class: its forward sees the normalised input."""

    normalize: Normalize

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.normalize(x))

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (type(self).__mro__[2],), self.__dict__.copy()


@functools.cache
def _normalizing(network: type[nn.Module]) -> type[nn.Module]:
    return type(f"Normalized{network.__name__}", (_NormalizesInput, network), {})


def _blank(network: type[nn.Module]) -> nn.Module:
    cls = _normalizing(network)
    return cls.__new__(cls)


def normalized(net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """``net``, changed to take raw pixels: ``net(x)`` becomes what ``net((x - mean) / std)`` was.

    It stays the same object with the same modules, under the same names (``layer1`` stays
    ``layer1``), and gains one, ``normalize``. So its layers and the keys of its weights are named
    as in the library that it came from.
    """
    if hasattr(net, "normalize"):
        raise FastjacError(f"{type(net).__name__} has a module or attribute 'normalize' already")
    net.normalize = Normalize(mean, std)
    net.__class__ = _normalizing(type(net))
    return net
