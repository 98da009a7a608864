"""Steps whose 3x3 convolutions go by winograd: where they do, and that the gradient is the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastjac
from fastjac.models import vgg
from fastjac.ops._library import CPU

pytestmark = pytest.mark.skipif(not CPU.loaded, reason=f"not loaded: {CPU.problem}")

LAST = torch.channels_last


class Calls(TorchDispatchMode):
    """Counts winograd's and PyTorch's own convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.winograd = self.plain = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.winograd += "winograd" in str(func)
        self.plain += "aten.convolution" in str(func)
        return func(*args, **kwargs or {})


def case(dtype: torch.dtype, layout=LAST):
    """Two VGGs, whose convolutions but the first winograd covers, and a batch."""
    torch.manual_seed(0)
    nets = [vgg.VGG("32 M 64 M 64", 5).to(dtype) for _ in range(2)]
    student, teacher = (net.to(memory_format=layout) for net in nets)
    x = torch.rand(3, 3, 64, 48, dtype=dtype).to(memory_format=layout)
    return student.train(), teacher, x, torch.tensor([0, 4, 2])


def gradients(student, teacher, x, y, target, **options) -> tuple[Tensor, list[Tensor]]:
    student, teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    out = fastjac.JacobianMatching(student, teacher, target, **options)(x, y)
    loss = torch.nn.functional.cross_entropy(out.student_logits, y) + out.jacobian_loss
    return loss.detach(), torch.autograd.grad(loss, list(student.parameters()))


TARGETS = {
    "window": (fastjac.AttentionWindow("pool2"), "frozen"),
    "logit": (fastjac.LabelLogit(), "batch"),
}


@pytest.mark.parametrize("strategy", ["dense", "auto"])
@pytest.mark.parametrize("name", TARGETS)
def test_gradient_is_exact(name, strategy):
    target, batch_stats = TARGETS[name]
    networks = case(torch.float64)
    with Calls() as calls:
        loss, got = gradients(*networks, target, batch_stats=batch_stats, strategy=strategy)
    assert calls.winograd >= 8
    expected_loss, expected = gradients(
        *networks, target, batch_stats=batch_stats, strategy="autograd"
    )
    torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=0)
    for x, y in zip(got, expected, strict=True):
        assert (x - y).norm() <= 1e-9 * y.norm() + 1e-15


@pytest.mark.parametrize("name", TARGETS)
def test_float32_is_as_exact_as_pytorch(name):
    target, batch_stats = TARGETS[name]
    networks = case(torch.float32)
    exact = [net.double() for net in copy.deepcopy(networks[:2])]
    _, truth = gradients(
        *exact,
        networks[2].double(),
        networks[3],
        target,
        batch_stats=batch_stats,
        strategy="autograd",
    )

    def error(strategy: str) -> float:
        _, got = gradients(*networks, target, batch_stats=batch_stats, strategy=strategy)
        parts = zip(got, truth, strict=True)
        return sum((x.double() - y).square().sum() for x, y in parts).sqrt().item()

    assert error("auto") <= 2 * error("autograd")


def test_only_where_it_pays():
    """Not in the other layout, under autocast, or of another geometry; and a hook still fires."""
    student, _, x, _ = case(torch.float32)

    def count(model: nn.Module, x: Tensor) -> tuple[int, int]:
        with Calls() as calls, torch.no_grad():
            fastjac.fuse(model)(x)
        return calls.winograd, calls.plain

    assert count(student, x) == (2, 1)
    assert count(student.to(memory_format=torch.contiguous_format), x.contiguous()) == (0, 3)
    student.to(memory_format=LAST)
    with torch.autocast("cpu", torch.bfloat16):
        assert count(student, x)[0] == 0

    convolutions = [m for m in student.modules() if isinstance(m, nn.Conv2d)]
    fired = []
    hook = convolutions[1].register_forward_hook(lambda *_: fired.append(1))
    assert count(student, x) == (2, 1)
    assert fired == [1]
    hook.remove()
    convolutions[2].dilation = (2, 2)
    assert count(student, x) == (1, 2)


def test_a_fused_network_is_the_same_network():
    student, _, x, y = case(torch.float64)
    results = []
    for model in (copy.deepcopy(student), fastjac.fuse(copy.deepcopy(student))):
        with Calls() as calls:
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert calls.winograd == 6  # y, gx and gweight of two layers
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
