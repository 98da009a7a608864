"""A small network with a module in its middle, and its step beside the double backward's."""

from __future__ import annotations

import contextlib

import pytest
import torch
from agreement import assert_agrees
from torch import Tensor, nn

from fastjac import FastjacError, LabelLogit

SIDE = 8
LABELS = torch.tensor([0, 3, 1])
STATISTICS = pytest.mark.parametrize("batch_stats", ["frozen", "batch"])


class Apply(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, z: Tensor) -> Tensor:
        return self.function(z)


def network(middle: nn.Module | None = None) -> nn.Sequential:
    stem = (nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    head = (nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 5))
    return nn.Sequential(*stem, nn.Tanh() if middle is None else middle, *head).double()


def images() -> Tensor:
    return torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3)).double()


def agrees(make, batch_stats: str = "batch", target=None, **options) -> None:
    assert_agrees(
        make,
        images(),
        LabelLogit() if target is None else target,
        LABELS,
        batch_stats=batch_stats,
        **options,
    )


def exact_or_refused(make, batch_stats: str = "batch", **options) -> None:
    with contextlib.suppress(FastjacError):
        agrees(make, batch_stats, **options)
