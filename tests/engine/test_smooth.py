"""Smooth functions whose derivatives are known: against autograd's, on crops, and overwritten."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from agreement import assert_agrees
from small_network import Apply
from torch import Tensor, nn

from fastjac import AttentionWindow, FastjacError, LabelLogit, with_jacobian
from fastjac.engine.rules.smooth import _KNOWN, _power

LABELS = torch.tensor([0, 2, 1])
FUNCTIONS = pytest.mark.parametrize(
    ("function", "options"),
    [
        *((function, ()) for function in _KNOWN if _KNOWN[function] is not _power),
        *((F.softplus, options) for options in ((3,), (2, 1))),
        (F.elu, (0.7,)),
        *((torch.pow, (exponent,)) for exponent in (-2, -0.5, 1, 1.0, 1.5, 2, 3, 2.5)),
        *((function, (3,)) for function in (Tensor.pow, Tensor.__pow__)),
    ],
    ids=lambda part: getattr(part, "__name__", None),
)


def needs_positive(function, options) -> bool:
    """Whether a function has no derivative, or no value, at numbers below 0."""
    singular = _KNOWN[function](*options).singular
    return singular or function in (torch.log1p, Tensor.log1p) or options == (2.5,)


def images() -> Tensor:
    return 4 * torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(3)).double() - 2


def network(function) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), Apply(function)),
        *(nn.Conv2d(4, 4, 3), Apply(function), nn.Flatten(), nn.Linear(144, 5)),
    ).double()


@FUNCTIONS
def test_the_derivatives_are_autograds(function, options):
    known = _KNOWN[function](*options)
    x = (
        torch.linspace(0.1 if needs_positive(function, options) else -4, 4, 81)
        .double()
        .requires_grad_()
    )
    y = function(x, *options)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, materialize_grads=True)
    z = (y if known.of_output else x).detach()
    exact, three = {"rtol": 1e-11, "atol": 1e-13}, torch.full_like(z, 3)
    torch.testing.assert_close(known.first(three, z), 3 * first.detach(), **exact)
    torch.testing.assert_close(known.second(three, z), 3 * second, **exact)


@FUNCTIONS
@pytest.mark.parametrize("target", [LabelLogit(), AttentionWindow("4", window=0.3)])
def test_it_is_exact(function, options, target):
    def apply(z: Tensor) -> Tensor:
        return function(z.square() + 0.5 if needs_positive(function, options) else z, *options)

    assert_agrees(lambda: network(apply), images(), target, LABELS)


@pytest.mark.parametrize("function", [Tensor.log, Tensor.sqrt, lambda z: z**-1, lambda z: z**0.5])
def test_a_derivative_that_is_not_finite_outside_of_a_map_has_no_crops(function):
    model = network(lambda z: function(z.square() + 0.5))
    target = AttentionWindow("4", window=0.3)
    with pytest.raises(FastjacError, match="its derivative at 0, which stands outside of the map"):
        with_jacobian(model, images(), target, strategy="local")


@pytest.mark.parametrize(
    "function",
    [
        lambda z: torch.tanh(input=z),
        lambda z: F.gelu(z, approximate="tanh"),
        lambda z: F.silu(z * 1, inplace=True),
        lambda z: torch.tanh(torch.complex(z, z.sin())).real,
        lambda z: F.elu(z * 1, 0.5, True) + F.celu(z, 0.7),
        lambda z: z.exp() ** 0 * z + z.exp() ** True + (z.square() + 1) ** z.tanh(),
        lambda z: torch.pow(z.square() + 1, torch.tensor(1.5)) + 2**z,
        lambda z: F.softplus(z, threshold=1, beta=2) + z.pow(exponent=3),
    ],
    ids=["name", "form", "in place", "complex", "elu", "powers", "pow of tensors", "names"],
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


@pytest.mark.parametrize(
    "function",
    [
        lambda z: F.softplus(z, torch.tensor(2.0), torch.tensor(1.0)),
        lambda z: F.elu(z, torch.tensor(0.5).double()),
        lambda z: F.leaky_relu(z, torch.tensor(0.3)),
        lambda z: F.hardtanh(z, np.float32(-0.5), torch.tensor(0.4)),
    ],
    ids=["softplus", "elu", "leaky relu", "hardtanh"],
)
def test_numbers_that_are_tensors_or_numpys(function):
    assert_agrees(lambda: network(function), images(), LabelLogit(), LABELS)


@pytest.mark.parametrize(
    ("function", "options", "x"),
    [
        (F.softplus, (2, 1), 0.5),  # the threshold itself is the linear part's
        (F.elu, (), float("nan")),
        (torch.log, (), 1e-25),  # in float32, its square is none
    ],
    ids=["softplus", "elu", "log"],
)
def test_the_second_derivative_at_the_edges(function, options, x):
    z = torch.tensor([x], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(1e-20 * function(z, *options), z, create_graph=True)
    (second,) = torch.autograd.grad(first, z)
    narrow = z.detach().float()
    got = _KNOWN[function](*options).second(torch.full_like(narrow, 1e-20), narrow)
    torch.testing.assert_close(got, second.float(), rtol=1e-5, atol=0)
