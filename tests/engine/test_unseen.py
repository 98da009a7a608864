"""What a model computes where no mode sees it is one clear error, and only where J passes through it."""

from __future__ import annotations

import networks
import pytest
import torch
import torch.nn.functional as F
from agreement import assert_agrees
from comparison import assert_exact
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastjac import (
    AttentionWindow,
    FastjacError,
    JacobianMatching,
    LabelLogit,
    Logits,
    input_jacobian,
    with_jacobian,
)


class SyncBatchNorm(torch.autograd.Function):
    """Of the name of PyTorch's, as one that a patched forward calls."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx, gy: Tensor) -> Tensor:
        return 2 * gy


class Doubled(torch.autograd.Function):
    forward, backward = SyncBatchNorm.forward, SyncBatchNorm.backward


class Unseen(nn.Module):
    """A custom autograd function, whose result is read as ``how`` says."""

    def __init__(self, function: type[torch.autograd.Function], how: str) -> None:
        super().__init__()
        self.function, self.how = function, how
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        made = self.function.apply(x)
        if self.how == "norm":
            return self.norm(made)
        if self.how == "sum":
            return self.norm(x) + made
        return made * x if self.how == "product" else F.relu(torch.cat([x, made], 1))[:, 4:]


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.rand(2, 3, 12, 10).double(), torch.randint(5, (2,))


def network(middle: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return networks.Blocks(middle, 4).double()


@pytest.mark.parametrize("how", ["norm", "sum", "product", "cat"])
def test_a_function_that_has_a_replacement_is_an_error_that_names_it(how):
    def pair(*middles: nn.Module) -> list[nn.Module]:
        return [network(middle, seed) for seed, middle in enumerate(middles)]

    message = (
        r"reads a tensor \[2, 4, 12, 10\] whose derivative fastjac has not seen: "
        r"SyncBatchNorm made it .*expected torch.nn.SyncBatchNorm's own forward"
    )
    with pytest.raises(FastjacError, match=message):
        JacobianMatching(*pair(Unseen(SyncBatchNorm, how), nn.Tanh()), LabelLogit())(*batch())
    # Another name, and it is exact.
    assert_exact(*pair(Unseen(Doubled, how), nn.Tanh()), *batch(), LabelLogit())
    # It may run behind the window; and in the teacher, which plain autograd takes then.
    window = AttentionWindow("stem", window=0.4)
    assert_exact(*pair(Unseen(SyncBatchNorm, how), nn.Tanh()), *batch(), window)
    assert_exact(*pair(nn.Tanh(), Unseen(SyncBatchNorm, how)), *batch(), LabelLogit())


@torch.jit.ignore
def in_python(z):
    return z.sin() * z


@torch.jit.script
def calls_python(z):
    return in_python(z.cos())


class Scripted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return calls_python(x)


def test_what_a_script_calls_raises_the_same_error():
    student = network(Scripted(), 0)
    with pytest.raises(FastjacError, match=r"^sin reads a tensor .*Cos made it .*PYTORCH_JIT=0"):
        JacobianMatching(student, network(nn.Tanh(), 7), LabelLogit())(*batch())


class Reversal(torch.autograd.Function):
    """The gradient's sign changes, as in front of a domain's classifier."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gy: Tensor) -> Tensor:
        return -0.3 * gy


def reverse_by_a_hook(z: Tensor) -> Tensor:
    z = z * 1
    z.register_hook(lambda g: -0.3 * g)
    return z


class Adversarial(nn.Module):
    """The classes, and behind a reversal of the gradient, the domains."""

    def __init__(self, reverse) -> None:
        super().__init__()
        self.reverse = reverse
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.domain = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
        self.classes = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.LazyLinear(5))
        self(batch()[0].float())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.stem(x)
        return self.classes(z), self.domain(self.reverse(z))


def reverse_in_a_checkpoint(z: Tensor) -> Tensor:
    return checkpoint(Reversal.apply, z, use_reentrant=False)


@pytest.mark.parametrize("reverse", [Reversal.apply, reverse_by_a_hook, reverse_in_a_checkpoint])
def test_beside_what_the_target_reads_it_is_as_it_is(reverse):
    def make() -> nn.Module:
        return Adversarial(reverse).double()

    x, y = batch()
    assert_agrees(make, x, LabelLogit(), y, output=0, batch_stats="batch")
    if reverse == Reversal.apply:
        assert_agrees(make, x, Logits(), None, output=1, batch_stats="batch")
        return
    with pytest.raises(FastjacError, match=r"has not seen: Reversal made it|replaces its gradient"):
        with_jacobian(make(), x, Logits(), output=1)


class WritesThroughView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).clone()
        first = x[:, 0]
        first *= 2
        return x


@pytest.mark.parametrize("trains", [True, False])
def test_a_value_that_is_overwritten_through_a_view_of_it(trains):
    student, teacher = network(WritesThroughView(), 0), network(nn.Tanh(), 7)
    student.requires_grad_(trains).head.requires_grad_()
    assert_exact(student, teacher, *batch(), LabelLogit())


class OfWeights(nn.Module):
    """A custom autograd function of a parameter, as straight-through estimators of weights are."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        deep = self.weight.sin()
        for _ in range(64):
            deep = (deep + deep) / 2  # 2^64 paths lead to the weight, by 129 nodes
        return x * self.function.apply(deep) + self.function.apply(self.weight)


@pytest.mark.parametrize("function", [Doubled, SyncBatchNorm])
def test_a_custom_function_of_a_parameter_is_exact(function):
    student, teacher = network(OfWeights(function), 0), network(nn.Tanh(), 7)
    for target in (LabelLogit(), AttentionWindow("stem", window=0.4)):
        assert_exact(student, teacher, *batch(), target)


class Adapts(nn.Module):
    """Takes a step of its own on what does not depend on x, as MAML's inner loop does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            loss = self.weight.sin().square().sum()
            (step,) = torch.autograd.grad(loss, self.weight, create_graph=True)
        return (x * (self.weight - 0.1 * step)).sin()


def test_a_student_may_adapt_and_a_frozen_teacher_may_not():
    (x, y), teacher = batch(), network(Adapts(), 7)
    assert_exact(network(Adapts(), 0), network(nn.Tanh(), 7), x, y, LabelLogit())
    jacobian = input_jacobian(teacher, x, LabelLogit(), y)  # as the error says
    assert jacobian.abs().max() > 0
    for strategy in ("auto", "autograd"):
        matcher = JacobianMatching(network(nn.Tanh(), 0), teacher, LabelLogit(), strategy=strategy)
        with pytest.raises(FastjacError, match=r"its own parameters, .* expected input_jacobian"):
            matcher(x, y)
