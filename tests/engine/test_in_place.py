"""Writes in place: to x, to a part of a tensor, through a view. The caller's batch stays as it was."""

from __future__ import annotations

import networks
import pytest
import torch
import torch.nn.functional as F
from comparison import assert_exact
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastjac import (
    AttentionWindow,
    FastjacError,
    JacobianMatching,
    LabelLogit,
    Logits,
    with_jacobian,
)


def centre_one_channel(z: Tensor) -> Tensor:
    z[:, 0] -= 0.3 * z[:, 1]
    return z


def scale_through_a_view(z: Tensor) -> Tensor:
    z[:, :2].mul_(2.0)
    return z


def gate_through_a_view(z: Tensor) -> Tensor:
    row = z[:, 1]
    row.sigmoid_()
    return z * z


def view_before_its_base_is_written(z: Tensor) -> Tensor:
    part, row = z[:, :2], z[:, 1:2].expand(-1, 2, -1, -1)
    z.mul_(2)
    part.mul_(3)
    return torch.cat([part, row], 1)[:, : z.shape[1]] + z


def augmented_views(z: Tensor) -> Tensor:
    z = z.unflatten(2, (2, -1)).transpose(1, 2)
    z[:, 0] += 1
    z[..., 1:] *= 2
    return z.transpose(1, 2).flatten(2, 3)


def write_through_another_shape(z: Tensor) -> Tensor:
    z = z.clone()
    z.view(len(z), -1)[:, :5].pow_(2)
    return z.view(len(z), -1).view_as(z)


def fill_a_buffer(z: Tensor) -> Tensor:
    buffer = torch.zeros_like(z)
    buffer[:, :2] = z[:, 1:3]
    buffer[:, 2] = z[:, 0].tanh()
    return buffer


def broadcast_into_a_part(z: Tensor) -> Tensor:
    z = z * 1
    z[:, :, 0] = z.mean((2, 3))[:, :, None]
    return z


def clamp_and_centre(z: Tensor) -> Tensor:
    z.clamp_(0.2, 0.8)
    z -= z.mean()
    return z


def mask_by_comparison(z: Tensor) -> Tensor:
    z[z > 0.5] = 0
    return z


WRITES = [
    *(centre_one_channel, scale_through_a_view, gate_through_a_view, write_through_another_shape),
    *(fill_a_buffer, broadcast_into_a_part, clamp_and_centre, mask_by_comparison),
    *(view_before_its_base_is_written, augmented_views),
]


class Apply(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def network(function, first: bool) -> nn.Sequential:
    write, stem = Apply(function), nn.Conv2d(3, 4, 3)
    layers = (write, stem) if first else (stem, write)
    return nn.Sequential(*layers, nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 5))


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.rand(3, 3, 6, 6, dtype=torch.float64), torch.tensor([0, 3, 1])


@pytest.mark.parametrize("first", [True, False], ids=["x", "a map"])
@pytest.mark.parametrize("function", WRITES)
def test_the_gradient_is_the_double_backwards(function, first):
    torch.manual_seed(1)
    x, y = batch()
    before = x.clone()
    assert_exact(network(function, first), network(function, True), x, y, LabelLogit())
    assert torch.equal(x, before)


def test_the_student_sees_what_the_teacher_was_given():
    torch.manual_seed(1)
    student, teacher = networks.vgg().double(), network(clamp_and_centre, True).double()
    x, y = torch.rand(2, 3, 6, 6, dtype=torch.float64), torch.tensor([0, 1])
    student[3], student[7] = nn.Identity(), nn.Identity()
    expected = student.eval()(x)
    logits = JacobianMatching(student, teacher)(x, y).student_logits
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-14)


def then(function, write):
    """Overwrites what the function has read."""

    def run(z: Tensor) -> Tensor:
        y = function(z)
        write(z)
        return y + z

    return run


def swish(z: Tensor) -> Tensor:
    return z.mul_(z.sigmoid())


# Autograd saves the outputs of these, or masks and shapes alone.
READ_BEFORE = {
    "sigmoid": then(torch.sigmoid, lambda z: z.mul_(2)),
    "softmax": then(lambda z: z.softmax(1), lambda z: z.sub_(1)),
    "exp": then(torch.exp, Tensor.sin_),
    "where": then(lambda z: torch.where(z > 0, z, -2 * z), lambda z: z.add_(1)),
    "largest": then(lambda z: z.max(1, keepdim=True)[0], lambda z: z.mul_(2)),
    "a part": then(torch.tanh, lambda z: z[:, :1].mul_(3)),
    "detached": then(torch.sigmoid, Tensor.detach_),
    "a part, of which": then(lambda z: z.view_as(z).softmax(1), lambda z: z[:, :1].mul_(3)),
    "a part, into another": then(lambda z: z.new_zeros(z.shape).copy_(z[:]), lambda z: z.mul_(2)),
    "two readers": then(lambda z: z.sigmoid() * z.exp(), lambda z: z.mul_(2)),
    "swish": swish,
    "swish of swish": lambda z: swish(swish(z)),
    "hard swish": lambda z: z.mul_(F.relu6(z + 3.0).div_(6.0)),
}


@pytest.mark.parametrize("first", [True, False], ids=["x", "a map"])
@pytest.mark.parametrize("name", READ_BEFORE)
def test_what_autograd_does_not_save_may_be_overwritten(name, first):
    x, y = batch()
    student, teacher = network(READ_BEFORE[name], first), network(torch.tanh, first)
    assert_exact(student, teacher, x, y, LabelLogit())
    if name in ("sigmoid", "two readers"):
        assert_exact(student, teacher, x, y, AttentionWindow("1", window=0.3), strategy="local")


@pytest.mark.parametrize("name", [name for name in READ_BEFORE if "swish" not in name])
def test_nor_is_it_an_error_in_a_checkpoint(name):
    def checkpointed(z: Tensor) -> Tensor:
        return checkpoint(lambda z: READ_BEFORE[name](z * 1), z, use_reentrant=False)

    x, y = batch()
    student, teacher = network(checkpointed, False), network(torch.tanh, False)
    assert_exact(student, teacher, x, y, LabelLogit())


@pytest.mark.parametrize("target", [LabelLogit(), AttentionWindow("1", window=0.3)])
def test_below_the_parameters_anything_may_be_overwritten(target):
    """Where the double backward fails: autograd saves silu's input."""

    def step(function) -> list[Tensor]:
        torch.manual_seed(0)
        student = network(function, True).double()
        out = with_jacobian(student, x, target, y)
        (out.jacobian.square().sum() + out.output.sin().sum()).backward()
        return [out.jacobian.detach(), *(p.grad for p in student.parameters())]

    x, y = batch()
    written, apart = then(F.silu, lambda z: z.sub_(1)), lambda z: F.silu(z) + (z - 1)
    torch.testing.assert_close(step(written), step(apart), rtol=1e-9, atol=1e-12)


def test_above_them_it_is_autograds_error():
    x, y = batch()
    student = network(then(F.silu, lambda z: z.sub_(1)), False).double()
    out = with_jacobian(student, x, LabelLogit(), y)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        out.jacobian.square().sum().backward()


@pytest.mark.parametrize("gate", [F.leaky_relu, F.relu6, F.hardtanh])
@pytest.mark.parametrize(
    ("write", "strategy"),
    [
        (lambda y: y.sub_(1), "dense"),
        (lambda y: y.sub_(1), "local"),
        (lambda y: y[:, :2].mul_(-2), "dense"),
    ],
    ids=["dense", "local", "a view"],
)
def test_a_gate_s_output_may_be_overwritten(gate, write, strategy):
    """Autograd saves the input of these; fastjac reads the gate off the output."""

    def overwrite(z: Tensor) -> Tensor:
        y = gate(z)
        result = y * 2
        write(y)
        return result + y

    torch.manual_seed(1)
    x, y = batch()
    student, target = network(overwrite, False).double(), AttentionWindow("1", window=0.3)
    teacher = network(torch.tanh, False).double()
    assert_exact(student, teacher, x, y, target, strategy=strategy)


def test_a_write_to_a_view_in_a_checkpoint_is_an_error():
    def square_a_part(z: Tensor) -> Tensor:
        z = z * 1
        z[:, :2].pow_(2)
        return z

    x, y = batch()
    student = network(lambda z: checkpoint(square_a_part, z, use_reentrant=False), False).double()
    with pytest.raises(FastjacError, match=r"pow_ writes in place under .*checkpoint to a view \["):
        with_jacobian(student, x, LabelLogit(), y)


def test_one_of_several_views_made_before_their_base_was_overwritten_is_an_error():
    def stale(z: Tensor) -> Tensor:
        part, _ = z.chunk(2, 1)
        z.mul_(2)
        return torch.cat([part.detach()] * 2, 1) * z  # PyTorch itself takes it detached alone

    x, y = batch()
    with pytest.raises(FastjacError, match=r"detach reads a tensor .* overwritten in place where"):
        JacobianMatching(network(stale, False).double(), network(torch.tanh, False).double())(x, y)


def test_a_write_to_several_tensors_is_an_error():
    def scale_all(z: Tensor) -> Tensor:
        parts = [z[:, :2] * 1, z[:, 2:] * 1]
        torch._foreach_mul_(parts, 2.0)
        return torch.cat(parts, 1)

    x, y = batch()
    with pytest.raises(FastjacError, match="_foreach_mul_ writes in place to several tensors; use"):
        JacobianMatching(network(scale_all, False).double(), network(torch.tanh, False).double())(
            x, y
        )


@pytest.mark.parametrize("write", [Tensor.mul_, Tensor.div_])
def test_a_factor_that_the_product_overwrites_is_an_error(write):
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x + 1
            return write(x, x.detach()).flatten(1)

    with pytest.raises(FastjacError, match="needs for its derivative was overwritten in place"):
        with_jacobian(Writes(), torch.rand(2, 3, 4), Logits([0]))


class WritesToConstant(nn.Module):
    """A view of a constant, read before and after x was written to the constant."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        constant = 2 * self.weight
        view = constant[:2]
        before = (3 * view).sum()
        constant[0] = x.sum(0)
        return x * view.sum(0) + before


def test_a_view_of_a_constant_that_x_is_written_to():
    found = []
    for strategy in ("auto", "autograd"):
        torch.manual_seed(0)
        model, x = WritesToConstant(), torch.rand(3, 4)
        out = with_jacobian(model, x, Logits([0, 1]), strategy=strategy)
        (out.jacobian.square().sum() + out.output.square().sum()).backward()
        found.append([out.jacobian.detach(), model.weight.grad])
    torch.testing.assert_close(*found)


def scaled_part(z: Tensor) -> Tensor:
    y = z * 2
    part = y[:, :2]
    with torch.no_grad():
        part.mul_(2)
    part.mul_(z[:, 1:3].sin())
    return y * z


def gated_twice(z: Tensor) -> Tensor:
    y = F.relu6(z * 3)
    with torch.no_grad():
        y.mul_(-0.5)
    return F.leaky_relu(y, 0.1, inplace=True)


def scaled_as_a_whole(z: Tensor) -> Tensor:
    y = z * 2
    part, another = y[:, :2], y[:, 1:]
    with torch.no_grad():
        y.mul_(3)
        part.sub_(1)
        y[0].add_(0.5)
    return y.sin() + part.cos().mean() + another.exp().mean()


def one_of_several(z: Tensor) -> Tensor:
    y = z * 2
    part, *_ = y.unbind(1)
    read_before = part.exp()
    with torch.no_grad():
        part.mul_(0.5)
        y.sub_(0.1)
    return y.sin() + read_before[:, None]


def part_of_a_product(z: Tensor) -> Tensor:
    """What einsum gives is a view of a tensor that nobody has."""
    y = torch.einsum("bct,st->bcs", z.flatten(2), torch.eye(z[0, 0].numel()).roll(1, 0).to(z))
    part = y[:, :2]
    with torch.no_grad():
        part.mul_(0.5)
    return y.view_as(z).sin() * z


@pytest.mark.parametrize("first", [True, False], ids=["x", "a map"])
@pytest.mark.parametrize(
    "write", [scaled_part, gated_twice, scaled_as_a_whole, one_of_several, part_of_a_product]
)
def test_what_is_written_to_without_a_gradient(write, first):
    x, y = batch()
    assert_exact(network(write, first), network(torch.tanh, first), x, y, LabelLogit())


class SetsData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x).tanh()
        z.data = z.data.round()
        return z * z


def test_values_that_are_set_keep_the_derivative():
    found = []
    for strategy in ("auto", "autograd"):
        model = SetsData()
        x = torch.linspace(-1, 1, 12).view(3, 4)
        out = with_jacobian(model, x, Logits([0, 2]), strategy=strategy)
        (out.jacobian.square().sum() + out.output.sum()).backward()
        found.append([out.output.detach(), out.jacobian.detach(), model.layer.weight.grad])
    torch.testing.assert_close(*found)


def write_by_an_index(y: Tensor, p: Tensor) -> Tensor:
    y[:, 0] = p[0]
    return y


def read_through_a_view(y: Tensor, p: Tensor) -> Tensor:
    view = y[:, 1]
    y += p
    return y * view[:, None]


@pytest.mark.parametrize(
    "write",
    [
        lambda y, p: y.add_(p),
        lambda y, p: y.mul_(2).add_(p),
        write_by_an_index,
        read_through_a_view,
    ],
)
def test_a_parameter_that_is_written_to_what_depends_on_x_alone(write):
    """Where x needs no gradient PyTorch allows it; the copy is what a double backward needs."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.tensor([0.3, 0.8, 1.2, 0.5]).double())

        def forward(self, x: Tensor, copies: bool) -> Tensor:
            y = x.exp().clone() if copies else x.exp()
            return write(y, self.p).square()

    def gradients(strategy: str, copies: bool) -> list[Tensor]:
        model, x = Model(), torch.linspace(-1, 1, 12).double().view(3, 4)
        out = with_jacobian(model, x, Logits(), strategy=strategy, args=(copies,))
        (out.jacobian.square().sum() + out.output.sin().sum()).backward()
        return [out.jacobian.detach(), model.p.grad]

    torch.testing.assert_close(
        gradients("auto", False), gradients("autograd", True), rtol=1e-9, atol=1e-12
    )
