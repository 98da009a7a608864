"""Mixed precision with scaled losses: finite where the double backward is, at most twice its error."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from agreement import seed_all
from torch import Tensor, nn

from fastjac import (
    AttentionWindow,
    JacobianMatching,
    LabelLogit,
    jacobian_norm_penalty,
    with_jacobian,
)

LABELS = torch.tensor([0, 3, 1, 2])
ACTIVATIONS = {"ReLU": nn.ReLU, "SiLU": nn.SiLU, "Tanh": nn.Tanh, "GELU": nn.GELU}
NORMS = {
    "batch": nn.BatchNorm2d,
    "group": lambda n: nn.GroupNorm(2, n),
    "none": lambda n: nn.Identity(),
}


def network(activation: str, norm: str, seed: int) -> nn.Sequential:
    seed_all(seed)
    act, norm = ACTIVATIONS[activation], NORMS[norm]
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), norm(8), act(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3, padding=1), norm(8), act()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)),
    )


def images() -> Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def matching(student, x, target, strategy, teacher):
    out = JacobianMatching(student, teacher, target, strategy=strategy)(x, LABELS)
    return F.cross_entropy(out.student_logits, LABELS) + out.jacobian_loss


def penalty(student, x, target, strategy, teacher):
    out = with_jacobian(student, x, target, LABELS, strategy=strategy, batch_stats="batch")
    return F.cross_entropy(out.output, LABELS) + jacobian_norm_penalty(out.jacobian)


def gradient(loss, target, activation, norm, strategy, dtype=None, scale=1.0) -> Tensor:
    student, teacher = network(activation, norm, 0), network(activation, norm, 7)
    x = images()
    if dtype is None:
        student, teacher, x = student.double(), teacher.double(), x.double()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        value = loss(student, x, target, strategy, teacher)
    (value * scale).backward()
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in student.parameters()]
    return torch.cat([p.double().flatten() for p in parts]) / scale


@pytest.mark.parametrize("scale", [65536.0, 2.0**20])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "target", [LabelLogit(), AttentionWindow("3", window=0.3)], ids=["logit", "window"]
)
@pytest.mark.parametrize("loss", [matching, penalty])
def test_scaled_loss(loss, target, activation, norm, dtype, scale):
    # The window of a network in low precision may stand elsewhere: fix it where float64 has it.
    if isinstance(target, AttentionWindow):
        target = target.at(torch.tensor([[1, 2], [3, 3], [0, 0], [5, 4]]))
    exact = gradient(loss, target, activation, norm, "autograd")
    naive = gradient(loss, target, activation, norm, "autograd", dtype, scale)
    ours = gradient(loss, target, activation, norm, "auto", dtype, scale)
    finite = naive.isfinite()
    assert ours[finite].isfinite().all()
    if finite.all():
        assert (ours - exact).norm() <= 2 * (naive - exact).norm()


class Scaled(nn.Module):
    """bfloat16 times a float32 parameter is float32; the cotangent that goes back is bfloat16 again."""

    def __init__(self) -> None:
        super().__init__()
        seed_all(0)
        self.first, self.scale = nn.Linear(6, 6), nn.Parameter(torch.rand(6))
        self.last = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.sin(self.first(x) * self.scale))


def test_values_of_several_types_under_autocast():
    def gradients(strategy: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        model = Scaled().to(dtype)
        x = images().flatten(1)[:, :6].to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            j = with_jacobian(model, x, LabelLogit(), LABELS, strategy=strategy).jacobian
        j.square().sum().backward()
        return [model.first.weight.grad.double(), model.scale.grad.double()]

    exact = gradients("autograd", torch.float64)
    ours, theirs = gradients("auto"), gradients("autograd")
    for got, other, expected in zip(ours, theirs, exact, strict=True):
        assert (got - expected).norm() <= 2 * (other - expected).norm()


@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_a_float16_gradient_of_j_that_is_zero(factor):
    model = Scaled().half()
    out = with_jacobian(model, images().flatten(1)[:, :6].half(), LabelLogit(), LABELS)
    (factor * out.jacobian.float().square().sum()).backward()
    assert model.scale.grad.isfinite().all()
    assert model.scale.grad.any() == bool(factor)


class Recurrent(nn.Module):
    """Its products are made inside of one call."""

    def __init__(self) -> None:
        super().__init__()
        seed_all(0)
        self.recurrent, self.last = nn.LSTM(12, 6, batch_first=True), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.recurrent(x.flatten(1)[:, :48].view(4, 4, 12))[0][:, -1])


def test_without_autocast_a_whole_layer_is_differentiated_in_float32():
    def gradients(strategy: str, dtype: torch.dtype) -> list[Tensor]:
        model = Recurrent().to(dtype)
        out = with_jacobian(model, images().to(dtype), LabelLogit(), LABELS, strategy=strategy)
        out.jacobian.square().sum().backward()
        return [out.jacobian.detach().double(), model.recurrent.weight_ih_l0.grad.double()]

    pairs = zip(gradients("auto", torch.float32), gradients("autograd", torch.float64), strict=True)
    for got, exact in pairs:
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


class Precise(nn.Module):
    """Takes itself out of autocast."""

    def __init__(self) -> None:
        super().__init__()
        seed_all(0)
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.last(self.first(x).tanh())


def test_what_ran_in_float32_under_autocast_is_differentiated_in_float32():
    def gradients(strategy: str, dtype: torch.dtype) -> list[Tensor]:
        model, x = Precise().to(dtype), images().flatten(1)[:, :6].to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            out = with_jacobian(model, x, LabelLogit(), LABELS, strategy=strategy)
        out.jacobian.square().sum().backward()
        return [out.jacobian.detach().double(), model.first.weight.grad.double()]

    pairs = zip(gradients("auto", torch.float32), gradients("autograd", torch.float64), strict=True)
    for got, exact in pairs:
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


class Spectrum(nn.Module):
    """Autocast gives the transform float32, which takes no bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        seed_all(0)
        self.first, self.last = nn.Linear(6, 6), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.fft.rfft(self.first(x)).abs())


def test_a_linear_map_of_another_type_under_autocast():
    found = []
    for strategy in ("auto", "autograd"):
        model, x = Spectrum(), images().flatten(1)[:, :6]
        with torch.autocast("cpu", torch.bfloat16):
            out = with_jacobian(model, x, LabelLogit(), LABELS, strategy=strategy)
        out.jacobian.square().sum().backward()
        found.append([out.jacobian.detach(), model.first.weight.grad])
    torch.testing.assert_close(*found, rtol=0.03, atol=0.01)


def test_a_narrow_model_whose_first_parameter_is_wide():
    """Scale is registered before the layers that it follows, and read in float32."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            seed_all(0)
            self.scale = nn.Parameter(torch.rand(5))
            self.layer = nn.Linear(6, 5).bfloat16()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).float().sin() * self.scale

    def gradients(strategy: str) -> list[Tensor]:
        model, x = Model(), torch.linspace(-1, 1, 24).view(4, 6).bfloat16()
        out = with_jacobian(model, x, LabelLogit(), LABELS, strategy=strategy)
        out.jacobian.float().square().sum().backward()
        return [model.scale.grad, model.layer.weight.grad.float()]

    torch.testing.assert_close(gradients("auto"), gradients("autograd"), rtol=0.02, atol=1e-3)
