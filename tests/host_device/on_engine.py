"""The engine on a device: what it gives on a CPU, no tensor left there, no wait for the device."""

from __future__ import annotations

import host_device
import networks
import pytest
import torch
from comparison import relative_error, step
from torch import Tensor, nn

import fastjac
from fastjac import AttentionWindow, LabelLogit

DEVICES = pytest.mark.parametrize("device", ["host", "host:1"])
LAST = torch.channels_last


def images() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.rand(3, 3, 24, 20, dtype=torch.float64), torch.randint(5, (3,))


def assert_equal(got: dict[str, Tensor], wanted: dict[str, Tensor], device: str) -> None:
    assert {x.device for x in got.values()} == {torch.empty(0, device=device).device}
    assert relative_error({k: x.cpu() for k, x in got.items()}, wanted) < (1e-9, "")


@pytest.mark.parametrize("batch_stats", ["frozen", "batch"])
@pytest.mark.parametrize("target", ["window", "logit"])
@pytest.mark.parametrize("network", [networks.vgg, networks.Residual])
@DEVICES
def test_jacobian_matching(device, network, target, batch_stats):
    layer = "7" if network is networks.vgg else "last"
    target = AttentionWindow(layer, window=0.4) if target == "window" else LabelLogit()
    torch.manual_seed(1)
    student, teacher = network().double(), network().double()
    x, y = images()
    wanted = step(student, teacher, x, y, target, batch_stats=batch_stats, strategy="autograd")
    there = [n.to(device, memory_format=LAST) for n in (student, teacher)]
    x, y = x.to(device, memory_format=LAST), y.to(device)
    with host_device.no_synchronisation():
        got = step(*there, x, y, target, batch_stats=batch_stats)
    assert float(wanted["loss"]) > 0
    assert_equal(got, wanted, device)


def plain_step(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    found = {"loss": loss.detach()}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return found | {f"buffer {name}": b for name, b in model.named_buffers()}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("network", [networks.vgg, networks.Residual])
@DEVICES
def test_fuse(device, network, training):
    torch.manual_seed(1)
    plain = network().double().train(training)
    there = network().double().train(training)
    there.load_state_dict(plain.state_dict())
    fused = fastjac.fuse(there.to(device, memory_format=LAST))
    x, y = images()
    here = plain_step(plain, x, y)
    x, y = x.to(device, memory_format=LAST), y.to(device)
    with host_device.no_synchronisation():
        got = plain_step(fused, x, y)
    assert_equal(got, here, device)
