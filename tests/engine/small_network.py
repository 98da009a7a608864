"""A small network with a module in its middle, and its step beside the double backward's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from agreement import assert_agrees, seed_all
from torch import Tensor, nn

from fastjac import FastjacError, LabelLogit, fuse

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


def assert_fused_alike(function: Callable[[Tensor], Tensor]) -> None:
    """``function`` after a norm whose chain goes on: fused, the same results; PyTorch may refuse it."""
    results: list[list[Tensor] | None] = []
    for wrap in (lambda model: model, fuse):
        seed_all(1)
        inner = network(Apply(function))
        inner[2], inner[3] = nn.Identity(), nn.Identity()
        inner = nn.Sequential(*inner[:2], inner[4], nn.ReLU(), nn.MaxPool2d(2), *inner[5:])
        try:
            y = wrap(inner)(images())
            y.square().sum().backward()
        except RuntimeError:
            results.append(None)
            continue
        results.append([y.detach(), *(p.grad for p in inner.parameters())])
    plain, fused = results
    if plain is None:
        pytest.skip("PyTorch itself refuses it")
    assert fused is not None
    torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-11)
