"""Threads that run at once, each with steps of its own: on one network, and in forward mode."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from small_network import LABELS, Apply, images, network
from torch import Tensor, nn

from fastjac import AttentionWindow, LabelLogit, with_jacobian


def in_a_thread(function, *arguments: object) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


def gradients(model: nn.Module, target) -> tuple[Tensor, ...]:
    out = with_jacobian(model, images(), target, LABELS)
    loss = out.output.sin().sum() + out.jacobian.square().sum()
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("place", [3, 5], ids=["before the layer", "behind it"])
def test_two_forwards_of_one_network_take_their_own_features(place):
    model, target, inside = network().eval(), AttentionWindow("3", window=0.3), []
    expected = gradients(model, target)

    def forward_in_between(z: Tensor) -> Tensor:
        if not inside:
            inside.append(None)
            inside[0] = in_a_thread(gradients, model, target)
        return z

    model[place] = nn.Sequential(Apply(forward_in_between), model[place])
    outside = gradients(model, target)
    for found in (outside, inside[0]):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("middle", [nn.SiLU, nn.Hardswish], ids=["forward first", "reverse first"])
def test_forward_mode_in_another_thread(middle):
    """PyTorch's level is that of all threads."""
    model = network(middle())
    expected = gradients(model, LabelLogit())
    with forward_ad.dual_level():
        found = in_a_thread(gradients, model, LabelLogit())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_threads_that_sweep_at_once_give_the_same_bits():
    model = network(nn.Sequential(nn.SiLU(), nn.GELU(), nn.Softplus())).eval()
    expected, interval = gradients(model, LabelLogit()), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as pool:
            steps = [pool.submit(gradients, model, LabelLogit()) for _ in range(12)]
            found = [step.result() for step in steps]
    finally:
        sys.setswitchinterval(interval)
    for each in found:
        assert all(map(torch.equal, each, expected))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 5).double()

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return (self.layer(x).tanh() * scale).sin()


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("length", range(6))
def test_an_argument_with_a_graph_of_another_thread(length, hooked):
    """Each thread counts its autograd nodes from 0."""
    parameter = torch.linspace(0.5, 1, 5).double().requires_grad_()
    identity = nn.Identity()
    identity.register_full_backward_hook(lambda *_: None)

    def made_of_parameter() -> Tensor:
        scale = parameter * 1
        for _ in range(length):
            scale = scale * 1
        return identity(scale) if hooked else scale

    def step(scale: Tensor, strategy: str) -> list[Tensor]:
        x, model = images().flatten(1)[:, :4], Scaled()
        out = with_jacobian(model, x, LabelLogit(), LABELS, args=(scale,), strategy=strategy)
        wanted = [parameter, model.layer.weight]
        return [out.jacobian, *torch.autograd.grad(out.jacobian.square().sum(), wanted)]

    found = in_a_thread(step, in_a_thread(made_of_parameter), "auto")
    torch.testing.assert_close(found, step(made_of_parameter(), "autograd"), rtol=1e-9, atol=0)
