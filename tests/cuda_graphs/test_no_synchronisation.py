"""No step makes the host wait for the device: what a CUDA graph needs, proved on a CPU.

Every operator of a step, in its forward and in its backward, passes a mode that refuses those whose
result the host reads. What fastjac does on a CPU alone (it checks labels there, and takes Winograd's
convolutions) is switched off.
"""

from __future__ import annotations

import contextlib
import doctest
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from every_layer import EveryLayer
from torch import Tensor

import fastjac
from benchmarks import penalty, step
from fastjac import AttentionWindow, FastjacError, LabelLogit, Logits, Projection, Scalar
from fastjac.graphs import NoSynchronisation


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(fastjac.targets, "_check_range", lambda y, classes: None)
    monkeypatch.setattr(fastjac.fusion.mode, "winograd_is_faster", lambda *args: False)


@contextlib.contextmanager
def refusing():
    """Nothing in here makes the host wait, nor is such an error swallowed."""
    mode = NoSynchronisation("cpu")
    # On a CPU these read the memory itself, by no operator.
    unseen = {name: mock.Mock(side_effect=AssertionError(name)) for name in ("tolist", "numpy")}
    with mock.patch.multiple(torch.Tensor, **unseen), mode:
        yield
    assert mode.refused is None


def run(take, *batch: Tensor) -> None:
    """Twice, since what is made once may wait; and values are read at the end, which would raise."""
    take(*batch)
    with refusing():
        loss = take(*batch)
    assert loss.isfinite()


# A contender, its layout, and whether a recorded forward fuses chains (where operators are native).
WAYS = [
    ("plain", "contiguous", False),
    ("fused", "channels_last", False),
    ("fastjac", "contiguous", True),
    ("fastjac", "channels_last", True),
    ("fastjac", "channels_last", False),
]


@pytest.mark.parametrize(("contender", "layout", "chains"), WAYS)
@pytest.mark.parametrize("name", step.CONFIGURATIONS)
def test_every_configuration_of_the_step(name, contender, layout, chains, monkeypatch):
    monkeypatch.setattr("fastjac.fusion.mode.native", lambda device: chains)
    config = step.CONFIGURATIONS[name]
    small = replace(config, size=min(config.size, 80), batch=2, width=1 / 32)
    here = step.contender(contender, small, layout, "cpu", amp=False)
    run(here.take, here.x, here.y)
    assert any(p.grad.abs().sum() > 0 for p in here.student.parameters())


@pytest.mark.parametrize(("contender", "layout", "chains"), [w for w in WAYS if w[0] != "fused"])
@pytest.mark.parametrize("norm", penalty.NORMS)
def test_every_configuration_of_the_penalty(norm, contender, layout, chains, monkeypatch):
    monkeypatch.setattr("fastjac.fusion.mode.native", lambda device: chains)
    here = penalty.Contender(contender, penalty.Configuration(norm, batch=2), layout, "cpu", False)
    run(here.take, here.x)


TARGETS = {
    "label": LabelLogit(),
    "window": AttentionWindow("features.3", window=0.3),
    "window, own anchor": AttentionWindow("features.3", window=0.3, anchor="own"),
    "window, power 3": AttentionWindow("features.3", window=0.3, power=3),
    "maps of two sizes": AttentionWindow("features.3", teacher_layer="features.2"),
    "all logits": Logits(),
    "some logits": Logits([0, 3]),
    "projection": Projection(2),
    "loss": Scalar(lambda logits, y: F.cross_entropy(logits, y, reduction="none")),
}
X, Y = torch.rand(3, 3, 12, 12), torch.tensor([0, 4, 2])


@pytest.mark.parametrize(("batch_stats", "amp"), [("frozen", False), ("batch", True)])
@pytest.mark.parametrize("target", TARGETS)
def test_every_target(target, batch_stats, amp):
    student, teacher = EveryLayer(), EveryLayer()
    matcher = fastjac.JacobianMatching(student, teacher, TARGETS[target], batch_stats=batch_stats)
    averages = [p.detach().clone() for p in student.parameters()]
    # PyTorch's Adam has another path on a CPU; it runs captured where there is a GPU.
    optimizer = torch.optim.SGD(student.parameters(), torch.tensor(1e-3), 0.9, fused=True)

    def take(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            out = matcher(x, y)
        loss = F.cross_entropy(out.student_logits.float(), y) + out.jacobian_loss
        loss = loss + fastjac.activation_match_loss(out.student_logits, out.teacher_logits)
        if out.student_features is not None and target != "maps of two sizes":
            features = out.student_features, out.teacher_features
            loss = loss + fastjac.attention_match_loss(*features)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(averages, [p.detach() for p in student.parameters()], 0.1)
        return loss.detach()

    run(take, X, Y)
    assert not matcher._teacher_by_autograd


PENALTIES = {
    "norm": fastjac.jacobian_norm_penalty,
    "gradient": fastjac.gradient_penalty,
    "masked": lambda j: fastjac.masked_jacobian_penalty(j, torch.ones_like(X) > 0),
    "cosine": lambda j: fastjac.jacobian_cosine_loss(j, X),
}


@pytest.mark.parametrize("strategy", ["auto", "dense"])
@pytest.mark.parametrize("name", PENALTIES)
def test_every_penalty(name, strategy):
    model = EveryLayer()

    def take(x: Tensor, y: Tensor) -> Tensor:
        out = fastjac.with_jacobian(model, x, LabelLogit(), y, strategy=strategy)
        loss = PENALTIES[name](out.jacobian)
        loss.backward()
        return loss.detach()

    run(take, X, Y)


@pytest.mark.parametrize("target", TARGETS)
def test_evaluation(target):
    matcher = fastjac.JacobianMatching(EveryLayer(), EveryLayer(), TARGETS[target]).eval()

    @torch.no_grad()
    def take(x: Tensor, y: Tensor) -> Tensor:
        return matcher(x, y).jacobian_loss

    run(take, X, Y)


WAITS = {
    "item": lambda x: x.sum().item(),
    "a branch": lambda x: bool(x.sum() > 0),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "a mask": lambda x: x[x > 0],
    "written by a mask": lambda x: x.clone().index_put_((x > 0,), x),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": torch.unique,
    "unique_consecutive": torch.unique_consecutive,
    "bincount": lambda x: x.long().bincount(),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "one_hot": lambda x: F.one_hot(x.long()),
    "solve": lambda x: torch.linalg.inv(torch.eye(2) * x[0]),
    "another device": lambda x: x.to("meta"),
    "copy_ from another": lambda x: torch.empty(3, device="meta").copy_(x),
    "a Python list": lambda x: torch.tensor([1.0, 2.0]),
    "a Python number": lambda x: x.new_tensor(1.0),
    "as_tensor": lambda x: torch.as_tensor(2.0),
}
FREE = {
    "index": lambda x: x[torch.zeros_like(x).long()],
    "number by a mask": lambda x: x.clone().index_put_((x > 0,), torch.zeros(())),
    "masked_fill": lambda x: x.masked_fill(x > 0, 2.0),
    "repeat_interleave": lambda x: x.repeat_interleave(
        torch.ones_like(x).long(), output_size=len(x)
    ),
    "full": lambda x: x.new_full((2,), 3.0) + torch.full((), 1.0),
    "to": lambda x: x.double().to(x),
    "sort": lambda x: x.sort().values.cumsum(0).argmax(),
}


@pytest.mark.parametrize("name", WAITS)
def test_refuses(name):
    x = torch.tensor([1.0, 2.0, 3.0])
    with NoSynchronisation("cpu") as mode, pytest.raises(FastjacError, match=r"^aten\.\w+ .*waits"):
        WAITS[name](x)
    assert mode.refused is not None
    with NoSynchronisation("cuda"):  # what runs on the CPU alone is free
        WAITS[name](x)


@pytest.mark.parametrize("name", FREE)
def test_passes(name):
    x = torch.tensor([1.0, 2.0, 3.0])
    with refusing():
        FREE[name](x)


class Reads(torch.autograd.Function):
    """Waits in its backward alone."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * float(gradient.sum())


def test_refuses_in_a_backward():
    x = torch.ones(3, requires_grad=True)
    with NoSynchronisation("cpu"), pytest.raises(FastjacError, match="_local_scalar_dense reads"):
        Reads.apply(x).sum().backward()


def test_notes_and_goes_on():
    x = torch.ones(3)
    with NoSynchronisation("cpu", raises=False) as mode:
        assert x.sum().item() == 3
        torch.equal(x, x)
    with pytest.raises(FastjacError, match=rf"_local_scalar_dense .* at {__file__}:\d+: a CUDA"):
        raise mode.refused


def test_a_swallowed_error_is_found():
    with (
        pytest.raises(AssertionError),
        refusing(),
        contextlib.suppress(FastjacError),
    ):
        torch.ones(3).sum().item()


def test_docstring_examples():
    result = doctest.testmod(fastjac.graphs, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
    assert result.attempted >= 2
