"""The engine on a device: what it gives on a CPU, no tensor left there, no wait for the device."""

from __future__ import annotations

from collections.abc import Callable

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
    before = host_device.launches()
    with host_device.no_synchronisation():
        got = step(*there, x, y, target, batch_stats=batch_stats)
    assert (host_device.launches() > before) == host_device.NATIVE
    assert float(wanted["loss"]) > 0
    assert_equal(got, wanted, device)


@pytest.mark.parametrize("batch_stats", ["frozen", "batch"])
@pytest.mark.parametrize("strategy", ["auto", "autograd"])
def test_with_jacobian_draws_the_devices_random_numbers(strategy, batch_stats):
    """The same numbers in each of its runs and sweeps: both strategies give the same."""
    found = []
    for how in ("dense", strategy):
        torch.manual_seed(1)
        stem = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(),
            nn.GELU(),
        )
        head = (nn.RReLU(), nn.Tanh(), nn.Softmax(1), nn.Flatten(), nn.LazyLinear(5))
        model = nn.Sequential(*stem, *head).double()
        x, y = images()
        model.eval()(x)
        model, x, y = model.train().to("host"), x.to("host"), y.to("host")
        out = fastjac.with_jacobian(
            model, x, LabelLogit(), y, strategy=how, batch_stats=batch_stats
        )
        (out.jacobian.square().sum() + out.output.square().sum()).backward()
        found.append((out.jacobian, model[0].weight.grad))
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def test_group_norm_in_channels_last():
    """PyTorch's kernels for other devices than the CPU take it contiguous."""
    torch.manual_seed(1)
    conv, norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
    model = nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)).double()
    x, y = images()
    model(x)
    found = []
    for device in ("cpu", "host"):
        model.zero_grad()
        there = model.to(device, memory_format=LAST), x.to(device, memory_format=LAST)
        out = fastjac.with_jacobian(*there, LabelLogit(), y.to(device))
        (out.jacobian.square().sum() + out.output.square().sum()).backward()
        found.append([x.cpu() for x in (out.jacobian, conv.weight.grad, norm.weight.grad)])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def test_autocast():
    """As near to float64's as on a CPU."""
    torch.manual_seed(1)
    student, teacher = networks.Residual(), networks.Residual()
    x, y = images()
    exact = step(student.double(), teacher.double(), x, y, LabelLogit())
    errors = {}
    for device in ("cpu", "host"):
        there = [n.float().to(device, memory_format=LAST) for n in (student, teacher)]
        given = x.float().to(device, memory_format=LAST), y.to(device)
        with torch.autocast(device, torch.bfloat16):
            got = step(*there, *given, LabelLogit())
        errors[device] = relative_error({k: g.cpu() for k, g in got.items()}, exact)[0]
    assert 0 < errors["host"] <= 2 * errors["cpu"]


def planted(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Tensor], object]) -> None:
    """A step where the target also runs ``fault`` on the features."""
    position = AttentionWindow.position
    monkeypatch.setattr(
        AttentionWindow, "position", lambda self, z: (fault(z), position(self, z))[1]
    )
    student, teacher = (networks.vgg().double().to("host") for _ in range(2))
    x, y = (t.to("host") for t in images())
    with host_device.no_synchronisation():
        step(student, teacher, x, y, AttentionWindow("7", window=0.4))


def test_a_planted_synchronisation_is_seen(monkeypatch):
    with pytest.raises(RuntimeError, match="the host would wait for the device"):
        planted(monkeypatch, lambda z: float(z.detach().max()))


def test_a_planted_tensor_on_the_cpu_is_seen(monkeypatch):
    with pytest.raises(RuntimeError, match="on the same device"):
        planted(monkeypatch, lambda z: z * torch.ones(z.shape[1:], dtype=z.dtype))


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
    before = host_device.launches()
    with host_device.no_synchronisation():
        got = plain_step(fused, x, y)
    assert (host_device.launches() > before) == host_device.NATIVE
    assert_equal(got, here, device)
