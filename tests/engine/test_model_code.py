"""What a model's own Python does, beyond test_what_ran.py: exact, or one clear error; never silent."""

from __future__ import annotations

import functools
import random
import types
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from agreement import TOLERANCE, assert_agrees, result_of, seed_all, worst
from small_network import LABELS, STATISTICS, Apply, agrees, assert_fused_alike, images, network
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from fastjac import AttentionWindow, LabelLogit, Logits, fuse, with_jacobian
from fastjac.errors import FastjacError

# Values that Python decides


def routed(z: Tensor) -> Tensor:
    """A mixture of experts with a hard choice per sample."""
    return torch.stack([s.sin() if s.mean().item() > z.mean().item() else s * s for s in z])


def until_small(z: Tensor) -> Tensor:
    while z.detach().norm() > 3:
        z = z * 0.7
    return z * z


def dropped_path(z: Tensor) -> Tensor:
    keep = torch.empty(len(z), 1, 1, 1, dtype=z.dtype).bernoulli_(0.6).div_(0.6)
    return z + z.sin() * keep


def noisy(z: Tensor) -> Tensor:
    return z * torch.randn_like(z) + z * torch.randn(z.shape, dtype=z.dtype).sigmoid()


def shuffled(z: Tensor) -> Tensor:
    return z[:, torch.randperm(4)] * z[:, random.sample(range(4), 4)]


def numpy_mask(z: Tensor) -> Tensor:
    return z * torch.from_numpy(np.random.rand(4, 1, 1)) * z  # noqa: NPY002


def mixed_up(z: Tensor) -> Tensor:
    lam = float(np.random.beta(1, 1))  # noqa: NPY002
    return (lam * z + (1 - lam) * z.flip(0)).sin()


CHOICES = [routed, until_small, dropped_path, noisy, shuffled, numpy_mask, mixed_up]


@STATISTICS
@pytest.mark.parametrize("function", CHOICES)
def test_choices(function, batch_stats):
    agrees(lambda: network(Apply(function)), batch_stats)


class Settings(nn.Module):
    """Plain attributes that a training script changes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(4), nn.Dropout(0.0)
        self.temperature, self.blend, self.steps = 1.0, {"a": 0.5}, 1

    def forward(self, z: Tensor) -> Tensor:
        for _ in range(self.steps):
            z = F.relu(self.norm(z) * self.temperature)
        return self.drop(z * self.blend["a"] + z.sin())


CHANGES = {
    "temperature": lambda m: setattr(m, "temperature", 0.3),
    "blend": lambda m: m.blend.update(a=-1.0),
    "steps": lambda m: setattr(m, "steps", 3),
    "drop": lambda m: setattr(m.drop, "p", 0.5),
    "eps": lambda m: setattr(m.norm, "eps", 0.1),
    "momentum": lambda m: setattr(m.norm, "momentum", None),
    "eval": lambda m: m.norm.eval(),
    "weight": lambda m: setattr(m.norm, "weight", nn.Parameter(torch.full((4,), 2.0).double())),
    "untracked": lambda m: setattr(m.norm, "track_running_stats", False),
}


@STATISTICS
@pytest.mark.parametrize("name", CHANGES)
def test_settings_that_change(name, batch_stats):
    agrees(lambda: network(Settings()), batch_stats, change=lambda model: CHANGES[name](model[4]))


@pytest.mark.parametrize("name", CHANGES)
def test_settings_that_change_in_a_fused_network(name):
    results = []
    for wrap in (fuse, lambda model: model):
        seed_all(1)
        model = network(Settings())
        inner, model = model, wrap(model)
        model(images())
        CHANGES[name](inner[4])
        seed_all(2)
        y = model(images())
        y.square().sum().backward()
        found = [p.grad for p in inner.parameters()]
        results.append([y.detach(), *found, *(b.clone() for b in inner.buffers())])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


# Forwards that were replaced


def adapt(layer: nn.Module, adapter: nn.Module) -> None:
    original, layer.adapter = layer.forward, adapter
    layer.forward = lambda z: original(z) + 0.5 * adapter(z)


def wrapped_in_autocast(model: nn.Module) -> None:
    model._original_forward = model.forward

    @functools.wraps(model.forward)
    def forward(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            return model._original_forward(*args, **kwargs).sin()

    model.forward = forward


def monkeypatched(model: nn.Module) -> None:
    model[4].forward = types.MethodType(lambda self, z: torch.tanh(z) * z, model[4])


REPLACED = {
    "linear adapter": lambda m: adapt(
        m[8], nn.Sequential(nn.Linear(16, 2), nn.Linear(2, 5)).double()
    ),
    "convolution adapter": lambda m: adapt(
        m[0], nn.Conv2d(3, 4, 3, padding=1, bias=False).double()
    ),
    "autocast wrapper": wrapped_in_autocast,
    "method": monkeypatched,
    "partial": lambda m: setattr(
        m[4], "forward", functools.partial(F.leaky_relu, negative_slope=0.3)
    ),
    "norm": lambda m: adapt(m[1], nn.Conv2d(4, 4, 1).double()),
}


@STATISTICS
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", REPLACED)
def test_replaced_forwards(name, frozen, batch_stats):
    def change(model: nn.Module) -> None:
        model.requires_grad_(not frozen)
        REPLACED[name](model)
        model[8].weight.requires_grad_()

    agrees(network, batch_stats, change=change)


# Constants


def toggled(z: Tensor) -> Tensor:
    with torch.set_grad_enabled(False):
        a = z.sin()
        with torch.enable_grad():
            b = z.cos()
    return a * b + z.detach().requires_grad_() * z


def switched(z: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    a = z.sin()
    torch.set_grad_enabled(True)
    return a * z


@torch.no_grad()
def decorated(z: Tensor) -> Tensor:
    return z.sin()


def detached_in_place(z: Tensor) -> Tensor:
    y = z.sin()
    y.detach_()
    return y * z


def momentum_target(z: Tensor) -> Tensor:
    with torch.no_grad():
        norm = F.batch_norm(z, None, None, training=True)
        key = F.relu(norm) + norm
    return z * key


def inference_inside(z: Tensor) -> Tensor:
    with torch.inference_mode():
        scale = float(z.mean())
    return z * scale


def stop_and_go(z: Tensor) -> Tensor:
    return z + (z.round() - z).detach() * z.data.mean()


@STATISTICS
@pytest.mark.parametrize(
    "function",
    [
        *(toggled, switched, detached_in_place, momentum_target, inference_inside, stop_and_go),
        lambda z: z * decorated(z),
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_constants(function, frozen, batch_stats):
    def make() -> nn.Module:
        model = network(Apply(function))
        model[:4].requires_grad_(not frozen)
        return model

    agrees(make, batch_stats)


# Structures, modules called twice, tied and normalised weights


Pair = namedtuple("Pair", "first second")


@dataclass
class Held:
    value: Tensor
    rest: dict


class Structures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = Apply(lambda z: Pair(z.sin(), [z, {"k": z * z}]))
        self.held = Apply(lambda z: Held(z.cos(), {"a": (z, None)}))
        self.nothing = Apply(lambda z: None)

    def forward(self, z: Tensor) -> Tensor:
        pair, held = self.pair(z), self.held(z)
        assert self.nothing(z) is None
        return pair.first * pair.second[1]["k"] + held.value * held.rest["a"][0]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, z: Tensor) -> Tensor:
        y = F.relu(self.norm(self.encode(z)))
        y = F.conv_transpose2d(y, self.encode.weight)
        return F.relu(self.norm(y) + z) + self.encode(self.norm(z))


class CustomStatistics(nn.Module):
    """Running statistics by hand, in a buffer that depends on x."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 4, 1, 1))

    def forward(self, z: Tensor) -> Tensor:
        mean = z.mean((0, 2, 3), keepdim=True)
        self.mean = 0.9 * self.mean + 0.1 * mean.detach()
        self.mean.lerp_(mean.detach(), 0.1)
        return z - self.mean + (z - mean).square()


class Cached(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        self.last = z.sin()
        return self.last * z + self.last


class ConditionalNorm(nn.Module):
    """A BatchNorm whose scale and shift depend on the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.embed = nn.BatchNorm2d(4, affine=False), nn.Linear(4, 8)

    def forward(self, z: Tensor) -> Tensor:
        scale, shift = self.embed(z.mean((2, 3)))[:, :, None, None].chunk(2, 1)
        return F.relu(self.norm(z) * (1 + scale) + shift)


class NormOfX(nn.Module):
    """A BatchNorm whose weight and bias are functions of the batch."""

    def forward(self, z: Tensor) -> Tensor:
        scale = z.mean((0, 2, 3)).tanh() + 1
        return F.relu(F.batch_norm(z, None, None, scale, scale * 2, training=True))


class NormByFunction(nn.BatchNorm2d):
    """A BatchNorm that calls PyTorch's function, as a decomposed or exported network does."""

    def __init__(self, function) -> None:
        super().__init__(4)
        self.function = function

    def forward(self, z: Tensor) -> Tensor:
        tensors = (z, self.weight, self.bias, self.running_mean, self.running_var)
        return F.relu(self.function(*tensors, self.training, self.momentum, self.eps, False))


def native_norm(*args) -> Tensor:
    return torch.native_batch_norm(*args[:-1])[0]


class Fused(nn.Module):
    """Conv and norm fused by PyTorch's own function, at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4).eval()

    def forward(self, z: Tensor) -> Tensor:
        weight, bias = torch.nn.utils.fusion.fuse_conv_bn_weights(
            self.conv.weight,
            self.conv.bias,
            self.norm.running_mean,
            self.norm.running_var,
            self.norm.eps,
            self.norm.weight,
            self.norm.bias,
        )
        return F.conv2d(z, weight, bias)


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return (w + w.transpose(0, 1)) / 2


def parametrised() -> nn.Module:
    layer = nn.Conv2d(4, 4, 1)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


MIDDLES = {
    "structures": Structures,
    "tied": Tied,
    "custom statistics": CustomStatistics,
    "cached": Cached,
    "conditional norm": ConditionalNorm,
    "norm of x": NormOfX,
    "torch.batch_norm": lambda: NormByFunction(torch.batch_norm),
    "aten.batch_norm": lambda: NormByFunction(torch.ops.aten.batch_norm.default),
    "fused by PyTorch": Fused,
    "parametrised": parametrised,
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 1)),
    "old weight norm": lambda: torch.nn.utils.weight_norm(nn.Conv2d(4, 4, 1)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)),
    "old spectral norm": lambda: torch.nn.utils.spectral_norm(nn.Conv2d(4, 4, 1)),
    "orthogonal": lambda: nn.Sequential(
        Apply(lambda z: z.transpose(1, 3)),
        parametrizations.orthogonal(nn.Linear(4, 4)),
        Apply(lambda z: z.transpose(1, 3)),
    ),
    "no affine": lambda: nn.BatchNorm2d(4, affine=False),
    "no momentum": lambda: nn.BatchNorm2d(4, momentum=None),
    "no statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "norm, norm": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU()),
    "group norm": lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU(), nn.GroupNorm(4, 4)),
    "layer norm": lambda: nn.LayerNorm((4, 4, 4)),
    "instance norm": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "RMS norm": lambda: nn.RMSNorm(4),
    "RReLU": lambda: nn.RReLU(),
    "SELU, alpha dropout": lambda: nn.Sequential(nn.SELU(), nn.AlphaDropout(0.3)),
    "fractional pool": lambda: nn.Sequential(
        nn.Upsample(scale_factor=2), nn.FractionalMaxPool2d(2, output_size=4), nn.ReLU()
    ),
    "checkpoint": lambda: Checkpointed(
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Dropout(0.4))
    ),
    "checkpoint, in place": lambda: Checkpointed(
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.SiLU(inplace=True), nn.ELU(inplace=True))
    ),
    "checkpoint sequential": lambda: Apply(
        lambda z: checkpoint_sequential(
            [torch.sin, torch.tanh, torch.cos], 2, z, use_reentrant=False
        )
    ),
    "state in a hook": lambda: with_hook(nn.Conv2d(4, 4, 1)),
    "coins": lambda: Apply(lambda z: torch.bernoulli(z.sigmoid()) * z.tanh()),
    "written without a gradient": lambda: Apply(clipped_without_gradient),
}


def clipped_without_gradient(z: Tensor) -> Tensor:
    y = z.sin()
    clipped = y * 2
    with torch.no_grad():
        clipped.clamp_(-1, 1)
    return clipped.square() * y


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, z: Tensor) -> Tensor:
        return checkpoint(self.inner, z, use_reentrant=False) * z


def with_hook(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda m, args, out: out * args[0].sin())
    layer.register_forward_pre_hook(lambda m, args: (args[0].tanh(),))
    return layer


@STATISTICS
@pytest.mark.parametrize("name", MIDDLES)
def test_middles(name, batch_stats):
    agrees(lambda: network(MIDDLES[name]()), batch_stats)


def test_a_native_norm_updates_its_statistics_once():
    agrees(lambda: network(NormByFunction(native_norm)), "batch")


@pytest.mark.parametrize("strategy", ["auto", "autograd"])
@pytest.mark.parametrize("function", [torch.native_batch_norm, torch.ops.aten.native_batch_norm])
def test_native_norms_have_no_frozen_statistics(function, strategy):
    model = network(NormByFunction(lambda *args: function(*args[:-1])[0]))
    with pytest.raises(FastjacError, match="native_batch_norm"):
        with_jacobian(model, images(), Logits(), strategy=strategy)
    with_jacobian(model.eval(), images(), Logits(), strategy=strategy)


@pytest.mark.parametrize("name", MIDDLES)
def test_middles_before_a_window(name):
    agrees(lambda: network(MIDDLES[name]()), "frozen", AttentionWindow("5", window=0.5))


@pytest.mark.parametrize("name", MIDDLES)
def test_middles_where_x_requires_grad(name):
    agrees(lambda: network(MIDDLES[name]()), "frozen", input_gradient=True)


@pytest.mark.parametrize("name", MIDDLES)
def test_middles_of_a_frozen_part(name):
    def make() -> nn.Module:
        model = network(MIDDLES[name]())
        model[:5].requires_grad_(False)
        return model

    agrees(make, "frozen")


@pytest.mark.parametrize("name", MIDDLES)
def test_middles_of_a_fused_network(name):
    results = []
    for wrap in (fuse, lambda model: model):
        seed_all(1)
        inner = network(MIDDLES[name]())
        model = wrap(inner)
        for n in range(2):
            seed_all(n)
            y = model(images())
        y.square().sum().backward()
        grads = [p.grad for p in inner.parameters()]
        results.append([y.detach(), *grads, *(b.detach().clone() for b in inner.buffers())])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


class Branches(nn.Module):
    """A branch by ``torch.cond``, of what no call has read before it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, z: Tensor) -> Tensor:
        u = self.norm(self.conv(z))
        y = torch.cond(z.sum() > 0, lambda u, z: u.sin() * z, lambda u, z: u.cos() * z, (u, z))
        return y + F.relu(u)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_fused_network_with_a_branch_by_an_operator(sign):
    # PyTorch's compiler traces the first; from then on it is imported, and told to stay out.
    for _ in range(2):
        results = []
        for wrap in (fuse, lambda model: model):
            seed_all(1)
            inner = Branches().double()
            y = wrap(inner)(sign * torch.rand(2, 4, 6, 6, dtype=torch.double))
            y.square().sum().backward()
            results.append([y.detach(), *(p.grad for p in inner.parameters())])
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


class ScalesInput(nn.Sequential):
    """A network whose ``__call__`` is its own."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(2 * x).sin()


def test_a_fused_network_with_a_call_of_its_own():
    seen, results = [], []
    for wrap in (fuse, lambda model: model):
        seed_all(1)
        inner = ScalesInput(*network())
        inner.register_forward_hook(lambda module, args, y: seen.append(args[0].detach()))
        y = wrap(inner)(images())
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in inner.parameters())])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)
    assert len(seen) == 2
    assert torch.equal(*seen)


@pytest.mark.parametrize("function", [*CHOICES, toggled, switched, momentum_target])
def test_functions_of_a_fused_network(function):
    assert_fused_alike(function)


class Direct(Checkpointed):
    def forward(self, z: Tensor) -> Tensor:
        return self.inner(z) * z


@STATISTICS
def test_a_checkpoint_with_a_norm_inside(batch_stats):
    """Against the same network without the checkpoint; as in PyTorch, the norm runs twice."""

    def make(kind: type[nn.Module]):
        def inner() -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.4))

        return lambda: network(kind(inner()))

    options = {"batch_stats": batch_stats}
    arguments = (images(), LabelLogit(), LABELS)
    wanted = result_of(make(Direct), *arguments, "autograd", **options)
    got = result_of(make(Checkpointed), *arguments, "auto", **options)
    updates = got.pop("buffer 4.inner.1.num_batches_tracked")
    assert updates == 2
    for results in (got, wanted):
        for name in [name for name in results if name.startswith("buffer 4.inner.1")]:
            del results[name]
    assert worst(got, wanted) < (TOLERANCE, "")


def test_a_checkpoint_that_reads_a_fused_norm():
    """A checkpoint counts what is saved: hooks of ours inside of it would shift the count."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
            conv = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
            self.block = nn.Sequential(conv, nn.GELU())

        def forward(self, z: Tensor) -> Tensor:
            return checkpoint(self.block, self.norm(z), use_reentrant=False)

    options = {"batch_stats": "batch"}
    assert_agrees(lambda: network(Reads()), images(), LabelLogit(), LABELS, **options)
