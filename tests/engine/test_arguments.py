"""What a model gives its calls: lists that it changes, functions, state that a call updates."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_network import LABELS, STATISTICS, Apply, agrees, exact_or_refused, images, network
from torch import Tensor, nn
from torch.ao.quantization import FusedMovingAvgObsFakeQuantize, MovingAverageMinMaxObserver
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function_unary
from torch.utils.flop_counter import FlopCounterMode

from fastjac import AttentionWindow, FastjacError, LabelLogit, Logits, fuse, with_jacobian

# Lists, which the model changes once the call has run


def index(z: Tensor) -> Tensor:
    which = [0, 1]
    y = z[:, which].sin()
    which[0] = 2
    return y.sum(1, keepdim=True) * z


def written_index(z: Tensor) -> Tensor:
    z, which = z * 1, [0]
    for k in range(3):
        which[0] = k
        z[:, which] = z[:, which].sin() * (k + 1)
    return z * z


def padded(z: Tensor) -> Tensor:
    sides = [1, 0, 0, 0]
    y = F.pad(z, sides)
    sides[:] = [0, 1, 0, 0]
    return (y + F.pad(z, sides))[..., 1:] * z


def rolled(z: Tensor) -> Tensor:
    shifts = [1]
    y = z.roll(shifts, (2,))
    shifts[0] = 2
    return y * z


def viewed(z: Tensor) -> Tensor:
    shape = [len(z), 16, 2, 2]
    y = z.reshape(len(z), 64)[:, :64].view(shape)
    shape[1] = 1
    return y.sin().view(z.shape) * z


def split(z: Tensor) -> Tensor:
    sizes = [1, 3]
    parts = z.split(sizes, 1)
    sizes[:] = [2, 2]
    return torch.cat([parts[0].sin(), parts[1].cos()], 1) * z


def averaged(z: Tensor) -> Tensor:
    axes = [2]
    y = z.mean(axes, keepdim=True)
    axes.append(1)
    return y * z


def pooled(z: Tensor) -> Tensor:
    kernel = [3, 3]
    y = F.max_pool2d(z.sin(), kernel, 1, 1) + F.avg_pool2d(z, kernel, 1, 1)
    kernel[0] = 1
    return y * z


@STATISTICS
@pytest.mark.parametrize(
    "function", [index, written_index, padded, rolled, viewed, split, averaged, pooled]
)
def test_a_list_that_changes_later_is_read_as_it_was(function, batch_stats):
    agrees(lambda: network(Apply(function)), batch_stats)


# Constants that take a product with x


def constant_times_x(z: Tensor) -> Tensor:
    gate = torch.full_like(z, 2.0)
    gate *= z.sigmoid()
    return gate * z


def constant_times_x_twice(z: Tensor) -> Tensor:
    product = torch.ones(4, 4, 4, 2, dtype=z.dtype)[: len(z), ..., 0, None].expand_as(z).clone()
    for power in (1, 2):
        product.mul_(z.sin() * power)
    return product + z


def view_times_x(z: Tensor) -> Tensor:
    both = torch.full((2, *z.shape), 3.0, dtype=z.dtype)
    first = both[0]
    first *= z.cos()
    return both.sum(0) * z


@STATISTICS
@pytest.mark.parametrize("function", [constant_times_x, constant_times_x_twice, view_times_x])
def test_a_constant_that_is_multiplied_in_place(function, batch_stats):
    agrees(lambda: network(Apply(function)), batch_stats)


@pytest.mark.parametrize("function", [torch.lerp, torch.addcmul])
def test_a_constant_that_changes_before_the_backward_is_an_error(function):
    constant = torch.rand(4, 4).double()
    model = network(Apply(lambda z: function(z, constant, z)))
    out = with_jacobian(model, images(), LabelLogit(), LABELS)
    constant.add_(1)
    with pytest.raises(FastjacError, match="was overwritten in place by a later operation"):
        out.jacobian.square().sum().backward()


class Differences(nn.Module):
    """Of neighbours, with a border that does not depend on x."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.border = function, nn.Parameter(torch.rand(4, 1))

    def forward(self, z: Tensor) -> Tensor:
        return self.function(z.sin(), self.border.expand(len(z), 4, 4, 1)) * z


@pytest.mark.parametrize(
    "function",
    [
        lambda z, border: torch.diff(z, prepend=border),
        lambda z, border: z.diff(1, -1, None, border.detach()),
        lambda z, border: z.diff(2, 2, z[:, :, :2]),
    ],
)
def test_differences_with_a_border(function):
    agrees(lambda: network(Differences(function)))


@pytest.mark.parametrize("function", [Tensor.view_as, Tensor.expand_as, Tensor.type_as])
def test_what_gives_a_shape_or_a_dtype_may_be_overwritten(function):
    def add(z: Tensor) -> Tensor:
        z = z * 1
        z += function(2 * z, z)
        return z * z

    agrees(lambda: network(Apply(add)))


def turned(z: Tensor) -> Tensor:
    z = z * 1
    z[0].transpose_(1, 2)
    return z.sin()


def squeezed(z: Tensor) -> Tensor:
    z = z * 1
    first = z[:1]
    first.squeeze_(0)
    return z * first


def turned_by_an_operator(z: Tensor) -> Tensor:
    z = z * 1
    torch.ops.aten.transpose_.default(z[0], 1, 2)
    return z.sin()


@pytest.mark.parametrize("function", [turned, squeezed, turned_by_an_operator])
def test_a_view_that_changes_its_shape_in_place(function):
    exact_or_refused(lambda: network(Apply(function)))
    with pytest.raises(FastjacError, match=r"changes the shape of a view \[.*\] in place"):
        with_jacobian(network(Apply(function)), images(), LabelLogit(), LABELS)


# Functions


class LearnedDistance(nn.Module):
    """A triplet loss whose distance is a module of the network's."""

    def __init__(self) -> None:
        super().__init__()
        self.metric = nn.Linear(16, 16)
        self.loss = nn.TripletMarginWithDistanceLoss(distance_function=self.distance)

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.metric(a.flatten(1)) - self.metric(b.flatten(1))).norm(dim=1)

    def forward(self, z: Tensor) -> Tensor:
        return z * self.loss(z[:, 0], z[:, 1], z[:, 2])


def own_function(body):
    """A function of the user's own that dispatches as PyTorch's do."""

    def overridable(z: Tensor) -> Tensor:
        if has_torch_function_unary(z):
            return handle_torch_function(overridable, (z,), z)
        return body(z)

    return overridable


class Closes(nn.Module):
    """Its function reads what it is not given."""

    def __init__(self, of_x: bool) -> None:
        super().__init__()
        self.scale, self.of_x = nn.Parameter(torch.rand(4, 4)), of_x

    def forward(self, z: Tensor) -> Tensor:
        other = z.sin() if self.of_x else self.scale * 2
        return own_function(lambda z: z * other[..., :4])(z.cos())


OUT_OF_SIGHT = {
    "learned distance": (LearnedDistance, "triplet_margin_with_distance_loss .* reads a tensor"),
    "parameter": (
        lambda: Closes(False),
        r"overridable .* reads a tensor \[4, 4\] that it is not given",
    ),
    "x": (
        lambda: Closes(True),
        r"overridable .* reads a tensor \[3, 4, 4, 4\] that it is not given",
    ),
    "Python's dice": (
        lambda: Apply(own_function(lambda z: z.sin() * random.random())),
        "overridable .* draws random numbers that are not PyTorch's",
    ),
    "numpy's dice": (
        lambda: Apply(own_function(lambda z: z.sin() * np.random.rand())),  # noqa: NPY002
        "overridable .* draws random numbers that are not PyTorch's",
    ),
}


@pytest.mark.parametrize("name", OUT_OF_SIGHT)
def test_what_a_function_reads_out_of_sight_is_an_error(name):
    make, message = OUT_OF_SIGHT[name]
    model = network(make())
    with_jacobian(model, images(), LabelLogit(), LABELS, strategy="autograd")  # as the error says
    with pytest.raises(FastjacError, match=message):
        with_jacobian(model, images(), LabelLogit(), LABELS)


class Once(torch.autograd.Function):
    """Without a second derivative, in reverse or forward."""

    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.square()

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0]


@pytest.mark.parametrize("function", [Once.apply, lambda z: Once.apply(z) + z**3])
def test_a_backward_that_is_differentiated_once_alone_is_an_error(function):
    model = network(Apply(own_function(function)))
    out = with_jacobian(model, images(), LabelLogit(), LABELS)
    with pytest.raises(FastjacError, match=r"no second derivative .*once_differentiable"):
        out.jacobian.square().sum().backward()


def euclidean(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).flatten(1).norm(dim=1)


@STATISTICS
@pytest.mark.parametrize(
    "function",
    [
        own_function(lambda z: z.view(-1, 2).sin().view_as(z) * z[:1] + torch.ones(1)),
        lambda z: (
            z
            * F.triplet_margin_with_distance_loss(z, z.sin(), z.cos(), distance_function=euclidean)
        ),
    ],
)
def test_a_function_of_its_arguments_alone_is_exact(function, batch_stats):
    agrees(lambda: network(Apply(function)), batch_stats)


def test_an_operator_that_writes_in_place_as_an_exported_network_has_it():
    agrees(lambda: network(Apply(lambda z: torch.ops.aten.relu_.default(z.sin()) * z)))
    agrees(lambda: network(Apply(lambda z: torch.ops.aten.add_.Tensor(z.sin(), z) * z)))


# State


@STATISTICS
def test_an_observer_sees_each_batch_once(batch_stats):
    def run(strategy: str) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        x, options = images().float(), {"averaging_constant": 0.5}
        observer = FusedMovingAvgObsFakeQuantize(MovingAverageMinMaxObserver, 0, 255, **options)
        model = network(observer).float()
        for scale in (0.3, 1.0):  # the second batch is wider than the average: it clips
            nn.init.constant_(model[1].weight, scale)
            out = with_jacobian(
                model, x, LabelLogit(), LABELS, strategy=strategy, batch_stats=batch_stats
            )
            model.zero_grad()
            (out.jacobian.square().sum() + out.output.square().mean()).backward()
        return out.jacobian.detach(), model[0].weight.grad, observer.scale.clone()

    torch.testing.assert_close(run("auto"), run("autograd"), rtol=1e-4, atol=1e-6)


def test_flop_are_counted():
    counts = []
    for strategy in ("auto", "autograd"):
        with FlopCounterMode(display=False) as counter:
            out = with_jacobian(network(), images(), LabelLogit(), LABELS, strategy=strategy)
            out.jacobian.square().sum().backward()
        counts.append(counter.get_total_flops())
    assert 0 < counts[0] <= counts[1]


@pytest.mark.parametrize("target", [AttentionWindow("3", window=0.3), Logits([0, 2])], ids=str)
@pytest.mark.parametrize("norm", [True, False])
def test_an_empty_batch_of_images(norm, target):
    model = network().eval()
    if not norm:
        model[1] = nn.Identity()
    out = with_jacobian(model, images()[:0], target)
    (out.jacobian.sum() + out.output.sum()).backward()
    assert out.jacobian.shape[0] == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_an_empty_batch_of_vectors(dtype):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)).to(dtype)
    out = with_jacobian(model, torch.rand(0, 4, dtype=dtype), LabelLogit(), LABELS[:0])
    (out.jacobian.square().sum() + out.output.sum()).backward()
    assert out.jacobian.shape == (0, 4)
    assert not model[0].weight.grad.any()


# What a fused model is


class Counts(nn.Module):
    """With attributes and a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale, self.calls = network(), 1.0, 0

    def features(self, x: Tensor) -> Tensor:
        return self.inner[:4](x)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x) * self.scale


def test_a_fused_model_has_the_attributes_and_methods_of_the_model():
    model = Counts()
    fused = fuse(model)
    fused.scale = 0.0
    assert not fused(images()).any()
    assert (fused.calls, model.calls, model.scale) == (1, 1, 0.0)
    model.eval()
    assert not fused.training
    fused.train()
    assert model.training
    assert fused.features(images()).shape == (3, 4, 4, 4)
    fused.extra = nn.Linear(2, 2)
    assert model.extra is fused.extra
    del fused.extra
    assert not hasattr(model, "extra")
