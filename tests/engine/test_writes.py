"""Writes in place, beyond test_in_place.py: through data, numpy, views and bases; exact or refused."""

from __future__ import annotations

import pytest
import torch
from small_network import (
    LABELS,
    STATISTICS,
    Apply,
    agrees,
    assert_fused_alike,
    exact_or_refused,
    images,
    network,
)
from torch import Tensor, nn

from fastjac import FastjacError, LabelLogit, with_jacobian

# In-place writes


def centred(z: Tensor) -> Tensor:
    z -= z.mean((2, 3), keepdim=True)
    return z


def written_column(z: Tensor) -> Tensor:
    z[:, 0] = z[:, 1].clone() * z[:, 0].clone()
    return z


def through_data(z: Tensor) -> Tensor:
    z.data.mul_(0.5)
    return z * z


def nan_replaced(z: Tensor) -> Tensor:
    return torch.nan_to_num_(z)


def reshaped_in_place(z: Tensor) -> Tensor:
    z.transpose_(2, 3).unsqueeze_(1).squeeze_(1)
    return z * z


def out_of_numpy(z: Tensor) -> Tensor:
    array = z.detach().numpy()
    array[:, 0] = 0.5
    return z * z


def narrowed_halves(z: Tensor) -> Tensor:
    z = z * 1
    first, second = z.narrow(1, 0, 1), z.narrow(1, 1, 2)
    first.add_(second.mean(1, keepdim=True))
    return z * z


def base_after_view(z: Tensor) -> Tensor:
    z = z * 1
    rows = z.view(len(z), -1)
    rows.mul_(rows.detach().sigmoid())
    return z.sin() + rows.view_as(z)


def view_of_view(z: Tensor) -> Tensor:
    z = z * 1
    z[:, 1:][:, :, 0].mul_(3)
    return z * z


def write_into_base_read_view(z: Tensor) -> Tensor:
    z = z * 1
    part = z[:, :2]
    z.mul_(2)
    return z * part.square().mean()


def detached_alias(z: Tensor) -> Tensor:
    z = z * 1
    z.detach()[:, 0] = 0.3
    return z.sin()


def alias_without_gradients(z: Tensor) -> Tensor:
    z = z * 1
    with torch.no_grad():
        z[:, 0] = 0.3
        z.mul_(0.5)
    return z.sin()


def buffer_twice(z: Tensor) -> Tensor:
    out = torch.zeros_like(z)
    out[:, :2] = z[:, :2].sin()
    out[:, :2] += z[:, 1:3] if z.shape[1] > 2 else z[:, :2]
    out[:, 2:].copy_(z[:, 2:].cos())
    return out * z


def view_of_constant(z: Tensor) -> Tensor:
    out = torch.zeros_like(z)
    out[:, 1].add_(z[:, 0])
    out.select(1, 0).copy_(z[:, 1].sin())
    return out


def narrowed_write(z: Tensor) -> Tensor:
    out = z.new_zeros(z.shape)
    torch.narrow(out, 2, 1, 3).copy_(z.narrow(2, 0, 3).sin())
    return out + z


def list_of_views(z: Tensor) -> Tensor:
    z = z * 1
    for i, part in enumerate(z.unbind(0)):
        z[i] = part.detach() * 0.5 + z[i].clone().sin()
    return z


def augmented(z: Tensor) -> Tensor:
    y = z.sin()
    y += z
    y *= 2
    y /= 3
    y -= z * z
    y **= 2
    return y


def swapped(z: Tensor) -> Tensor:
    y = z.clone()
    y[:, [0, 1]] = z[:, [1, 0]]
    y[y < 0.2] *= 0.5
    return y * z


def out_argument(z: Tensor) -> Tensor:
    out = torch.empty(0, dtype=z.dtype)
    torch.mul(z.detach(), 2, out=out)
    return out * z


def index_methods(z: Tensor) -> Tensor:
    y = z * 1
    y.index_add_(1, torch.tensor([0, 0]), z[:, :2].sin())
    y.scatter_(1, torch.zeros_like(z, dtype=torch.int64)[:, :1], z[:, :1] * 2)
    y.masked_fill_(z > 0.4, 0.1).index_fill_(1, torch.tensor([1]), 0.3)
    return y * z


def set_data(z: Tensor) -> Tensor:
    y = z * 1
    y.data = z.detach() * 2
    return y * z


WRITES = [
    *(centred, written_column, through_data, nan_replaced, reshaped_in_place, out_of_numpy),
    *(narrowed_halves, base_after_view, view_of_view, write_into_base_read_view, detached_alias),
    *(alias_without_gradients, buffer_twice, view_of_constant, narrowed_write, list_of_views),
    *(augmented, swapped, out_argument, index_methods, set_data),
]


@STATISTICS
@pytest.mark.parametrize("place", ["x", "frozen stem", "map", "norm"])
@pytest.mark.parametrize("function", WRITES)
def test_writes_are_exact_or_refused(function, place, batch_stats):
    def make() -> nn.Module:
        if place == "x":
            return nn.Sequential(Apply(function), network()).double()
        if place == "norm":
            layers = (nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), Apply(function), nn.ReLU())
            return nn.Sequential(*layers, nn.MaxPool2d(2), *network()[5:]).double()
        model = network(Apply(function))
        model[:4].requires_grad_(place == "map")
        return model

    exact_or_refused(make, batch_stats)


@pytest.mark.parametrize("function", WRITES)
def test_writes_in_a_fused_network(function):
    assert_fused_alike(function)


# Overwritten after a call whose derivative does not read it

INDEX, MASK = torch.tensor([0, 2]), torch.arange(4)[:, None, None] % 2 == 0


def difference_of_complex(a: Tensor, b: Tensor) -> Tensor:
    """With momentum, as a phase is reconstructed."""
    c, d = torch.complex(a, b), torch.complex(b, a.square())
    y = c - d.mul_(0.5) + 1j
    c.zero_()
    return y + c


AFFINE = {
    "where": lambda a, b: torch.where(MASK, a, b),
    "where a number": lambda a, b: a.where(MASK, 0.5) + b,
    "masked_fill": lambda a, b: a.masked_fill(MASK, -1.5) + b,
    "masked_fill_ a copy": lambda a, b: torch.masked_fill(a, MASK, b.mean()),
    "stack": lambda a, b: torch.stack([a, b]).sum(0),
    "hstack": lambda a, b: torch.hstack([a, b])[:, 1:5],
    "scatter": lambda a, b: a.scatter(0, torch.zeros(1, 4, 4, 4).long(), b[:1]),
    "scatter_add": lambda a, b: a.scatter_add(0, torch.ones(3, 4, 4, 4).long(), b),
    "index_put": lambda a, b: a.index_put((INDEX,), b[:2]),
    "masked_scatter": lambda a, b: a.masked_scatter(MASK.expand_as(a), b),
    "slice_scatter": lambda a, b: a.slice_scatter(b[:, :2], 1, 1, 3),
    "pad": lambda a, b: torch.nn.functional.pad(a, (1, 0), value=2.0)[..., :-1] + b,
    "diff": lambda a, b: torch.diff(a, dim=1, prepend=b[:, :1]),
    "complex": lambda a, b: difference_of_complex(a * 1, b * 1).abs(),
    "matmul": lambda a, b: a @ torch.ones(a.shape[-1], 1).double() + b,
    "einsum": lambda a, b: torch.einsum("bchw,cd->bdhw", a, torch.rand(4, 4).double()) + b,
    "meshgrid": lambda a, b: torch.meshgrid(a[:, 0, 0, 0], b[0, :, 0, 0], indexing="ij")[0].sum(),
}


def shape_or_type_of(z: Tensor) -> Tensor:
    """A constant that is moved to where x is, as position embeddings are, before x is overwritten."""
    table = torch.linspace(-1, 1, z[0].numel()).view(z.shape[1:])
    moved = table.to(z) + torch.ones(1).type_as(z)
    wide = torch.ones(1, dtype=z.dtype).expand_as(z)
    y = z.to(z) * 1
    z += moved * wide
    return z + y.sin()


@STATISTICS
@pytest.mark.parametrize("name", AFFINE)
def test_what_its_derivative_does_not_read_may_be_overwritten(name, batch_stats):
    def function(z: Tensor) -> Tensor:
        torch.manual_seed(1)
        a, b = z.sin() * 1, z.cos() * 1
        y = AFFINE[name](a, b) * 1
        a[:], b[:] = 0.5, 0.25
        return z + y.sin() + a * b

    agrees(lambda: network(Apply(function)), batch_stats)


def test_so_may_a_constant_that_is_a_term():
    def function(z: Tensor) -> Tensor:
        memory = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view(z.shape)
        y = torch.stack([z, memory]).sum(0) + torch.where(z > 0, z, memory)
        memory.mul_(0.9).add_(z.detach())
        return y.sin() * memory

    agrees(lambda: network(Apply(function)))


@STATISTICS
def test_whose_shape_or_type_was_read_may_be_overwritten(batch_stats):
    agrees(lambda: network(Apply(shape_or_type_of)), batch_stats)


# Written to the same place twice, and what PyTorch's versions do not count

TWICE, ZEROS = torch.tensor([0, 0]), torch.zeros(3, 4, 4, 4, dtype=torch.int64)


def with_written(index: object, value) -> object:
    def function(z: Tensor) -> Tensor:
        out = z * 1
        out[index] = value(z)
        return out.sin()

    return function


SAME_PLACES = {
    "list": with_written((slice(None), [0, 0]), lambda z: 3 * z[:, 1:3]),
    "pillars": with_written((TWICE, ..., TWICE), lambda z: z[:2, :, :, 2].cos()),
    "broadcast": with_written((slice(None), TWICE, [[1], [2]]), lambda z: z[:1, :1, 0, :].cos()),
    "index_put_": lambda z: (z * 1).index_put_((TWICE,), z[:2].cos()).sin(),
    "scatter_": lambda z: (z * 1).scatter_(1, ZEROS, z.cos()).sin(),
    "index_copy_": lambda z: (z * 1).index_copy_(1, TWICE, z[:, :2].cos()).sin(),
    "put": lambda z: z.put(TWICE, z[0, 0, 0, :2].cos()).sin(),
    "operator": lambda z: torch.ops.aten.index_put(z, [TWICE], z[:2].cos()).sin(),
}


@STATISTICS
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", SAME_PLACES)
def test_where_indices_repeat_all_that_is_written_counts(name, frozen, batch_stats):
    def make() -> nn.Module:
        model = network(nn.Sequential(nn.Tanh(), Apply(SAME_PLACES[name])))
        model[:4].requires_grad_(not frozen)
        return model

    agrees(make, batch_stats)


UNCOUNTED = [
    lambda z: z.data.zero_(),
    lambda z: z.data[:, 0].copy_(z[:, 1]),
    lambda z: torch.empty(0).double().set_(z.untyped_storage()).zero_(),
]


@pytest.mark.parametrize("write", UNCOUNTED)
@pytest.mark.parametrize("function", [torch.sigmoid, nn.LeakyReLU(0.2), nn.Softmax(1)])
def test_a_write_through_data_to_what_a_rule_reads_is_an_error(function, write):
    def then_overwritten(z: Tensor) -> Tensor:
        z = z * 1
        y = function(z)
        write(z)
        write(y)
        return y * z

    model = network(Apply(then_overwritten))
    with_jacobian(model, images(), LabelLogit(), LABELS, strategy="autograd")  # as the error says
    with pytest.raises(FastjacError, match=r"needs for its derivative, through \.data"):
        with_jacobian(model, images(), LabelLogit(), LABELS)
    agrees(lambda: network(Apply(lambda z: (z.sigmoid(), z.clone().data.zero_())[0] * z)))


# Views of what a call has made inside, and views that are read again


def part_written(y: Tensor) -> Tensor:
    y[:, :1].mul_(2)
    y[:, 1:].tanh_()
    return y


def read_before(y: Tensor) -> Tensor:
    t = y.tanh()
    y[:, :1].mul_(t[:, 1:2].detach())
    return y * t


def part_gated(y: Tensor) -> Tensor:
    y[:, 1:] *= y[:, 1:].sigmoid()
    y[:, :2].mul_(y[:, 1:3].tanh())
    return y


def rows_written(y: Tensor) -> Tensor:
    rows = y.view(len(y), -1)
    rows[:, :5].sigmoid_()
    return y + rows.view_as(y)


def only_views(y: Tensor) -> Tensor:
    a, b = y[:, :3], y[:, 1:]
    del y
    a.mul_(2)
    return torch.cat([a[:, :1], b], 1)


PROJECTIONS = {
    "linear": lambda y, weight: torch.nn.functional.linear(y, weight, weight[0]),
    "einsum": lambda y, weight: torch.einsum("bij,kj->bik", y, weight),
    "tensordot": lambda y, weight: torch.tensordot(y, weight, ([2], [1])),
}


class Projected(nn.Module):
    def __init__(self, project, write, trains: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16), requires_grad=trains)
        self.project, self.write = project, write

    def forward(self, z: Tensor) -> Tensor:
        return self.write(self.project(z.flatten(2), self.weight)).view_as(z)


@STATISTICS
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("write", [part_written, read_before, part_gated, rows_written])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_part_of_what_a_call_returns_as_a_view_is_written(name, write, trains, batch_stats):
    agrees(lambda: network(Projected(PROJECTIONS[name], write, trains)), batch_stats)


@STATISTICS
def test_views_of_what_nobody_holds_any_more_are_exact_or_refused(batch_stats):
    make = lambda: network(Projected(PROJECTIONS["linear"], only_views, True))  # noqa: E731
    exact_or_refused(make, batch_stats)


def base_written(z: Tensor, function) -> Tensor:
    part = z[:, :2]
    t = function(part)
    z.mul_(2)
    return z * (part * t).sum((1, 2, 3), keepdim=True)


def gated(z: Tensor, function) -> Tensor:
    z[:, 1:].mul_(function(z[:, 1:]))
    return z


def overlapping(z: Tensor, function) -> Tensor:
    first, second = z[:, :3], z[:, 1:]
    t = function(first) + function(second[:, :3])
    first.mul_(2)
    return z * (second[:, :3] * t).sum((1, 2, 3), keepdim=True)


@STATISTICS
@pytest.mark.parametrize("write", [base_written, gated, overlapping])
@pytest.mark.parametrize("function", [torch.tanh, torch.exp, torch.sigmoid, torch.relu])
def test_a_view_that_is_read_before_and_after_its_base_is_written(function, write, batch_stats):
    agrees(lambda: network(Apply(lambda z: write(z * 1, function))), batch_stats)


@pytest.mark.parametrize(
    "x", [images()[:1].expand(3, -1, -1, -1), images().unfold(3, 5, 1)[..., 0, :]]
)
@pytest.mark.parametrize("input_gradient", [False, True])
def test_a_write_to_an_x_whose_elements_share_memory(x, input_gradient):
    def written(z: Tensor) -> Tensor:
        z += 1
        return z[..., 0].mul_(2)[..., None] * z

    def make() -> nn.Module:
        torch.manual_seed(0)
        layers = (Apply(written), nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1))
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 5)).double()

    given = x.detach().requires_grad_(input_gradient)
    results = []
    for strategy in ("auto", "autograd"):
        model = make()
        out = with_jacobian(model, given, LabelLogit(), LABELS, strategy=strategy)
        leaves = [*model.parameters(), *[given] * input_gradient]
        results.append(torch.autograd.grad(out.jacobian.square().sum(), leaves, allow_unused=True))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", [torch.relu_, torch.sigmoid_, torch.exp_])
def test_a_write_to_an_argument_by_name(kind):
    def function(z: Tensor) -> Tensor:
        return kind(input=z) * 2 + z

    agrees(lambda: network(nn.Sequential(Apply(torch.sin), Apply(function))))
    assert_fused_alike(function)
