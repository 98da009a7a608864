"""Smooth functions whose derivatives are known: against autograd's, on crops, and overwritten."""

from __future__ import annotations

import pytest
import torch
from agreement import assert_agrees
from small_network import Apply
from torch import Tensor, nn

from fastjac import AttentionWindow, LabelLogit
from fastjac.engine.rules.smooth import _DERIVATIVES

LABELS = torch.tensor([0, 2, 1])
FUNCTIONS = pytest.mark.parametrize(
    "function", _DERIVATIVES, ids=[f"{f.__name__} {i}" for i, f in enumerate(_DERIVATIVES)]
)


def images() -> Tensor:
    return 4 * torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(3)).double() - 2


def network(function) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), Apply(function)),
        *(nn.Conv2d(4, 4, 3), Apply(function), nn.Flatten(), nn.Linear(144, 5)),
    ).double()


@FUNCTIONS
def test_the_derivatives_are_autograds(function):
    known = _DERIVATIVES[function]
    x = torch.linspace(-4, 4, 81).double().requires_grad_()
    y = function(x)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    z = (y if known.of_output else x).detach()
    exact = {"rtol": 1e-11, "atol": 1e-13}
    torch.testing.assert_close(known.first(torch.full_like(z, 3), z), 3 * first.detach(), **exact)
    torch.testing.assert_close(known.second(z), second, **exact)


@FUNCTIONS
@pytest.mark.parametrize("target", [LabelLogit(), AttentionWindow("4", window=0.3)])
def test_it_is_exact(function, target):
    assert_agrees(lambda: network(function), images(), target, LABELS)


@pytest.mark.parametrize(
    "function",
    [
        lambda z: torch.tanh(input=z),
        lambda z: nn.functional.gelu(z, approximate="tanh"),
        lambda z: nn.functional.silu(z * 1, inplace=True),
        lambda z: torch.tanh(torch.complex(z, z.sin())).real,
    ],
    ids=["by name", "another form", "in place", "complex"],
)
def test_calls_that_the_rule_does_not_cover(function):
    assert_agrees(lambda: network(function), images(), LabelLogit(), LABELS)


def test_a_view_whose_base_was_overwritten():
    """Autograd saves the sigmoid's output; but the view's place in its graph is another one now."""

    def write(z: Tensor) -> Tensor:
        z = z * 1
        y = z[:, :2].sigmoid()
        z.mul_(2)
        return torch.cat([y, z], 1)[:, :4]

    assert_agrees(lambda: network(write), images(), LabelLogit(), LABELS)
