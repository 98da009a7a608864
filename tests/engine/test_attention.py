"""Attention, softmax, layer and instance norms: their rules, and the calls left to autograd."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from small_network import LABELS, Apply, agrees, images, network
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastjac import LabelLogit, Scalar, with_jacobian
from fastjac.engine import Tape

TOKENS, WIDTH = 16, 4  # of the map [3, 4, 4, 4] in the network's middle


def tokens(z: Tensor) -> Tensor:
    """A map as ``[B, 1, T, C]``."""
    return z.flatten(2).mT.unsqueeze(1)


class Attention(nn.Module):
    """Attention whose ``varying`` inputs depend on x, and whose others are parameters."""

    def __init__(self, varying: str, keys: int = TOKENS, width: int = WIDTH, **options) -> None:
        super().__init__()
        self.varying, self.options = varying, options
        self.q = nn.Parameter(torch.rand(3, 1, TOKENS, WIDTH))
        self.k = nn.Parameter(torch.rand(3, 1, keys, WIDTH))
        self.v = nn.Parameter(torch.rand(3, 1, keys, width))
        self.bias = nn.Parameter(torch.rand(1, keys))

    def forward(self, z: Tensor) -> Tensor:
        t, given = tokens(z), []
        for name, function in (("q", torch.sin), ("k", torch.cos), ("v", torch.tanh)):
            own = getattr(self, name)
            made = function(t)[..., : own.shape[2], :].repeat(1, 1, 1, 2)[..., : own.shape[3]]
            given.append(made * own if name in self.varying else own)
        options = dict(self.options)
        if options.get("attn_mask") == "trained":
            options["attn_mask"] = self.bias
        o = F.scaled_dot_product_attention(*given, **options)
        return z + o.mean(-1).view(3, 1, 4, 4)


def check(
    module, batch_stats: str = "batch", covered: bool = True, name: str = "Attention"
) -> None:
    """It agrees with the double backward; and the rule of that name is the one that is taken."""
    found = set()
    leave = Tape.__exit__

    def watch(self, *error):
        found.update(type(call.rule).__name__ for call in self.calls)
        return leave(self, *error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tape, "__exit__", watch)
        agrees(lambda: network(module()), batch_stats)
    assert (name in found) == covered


@pytest.mark.parametrize("varying", ["q", "k", "v", "qk", "qv", "kv", "qkv"])
@pytest.mark.parametrize("mask", [None, "trained"])
def test_attention_of_what_depends_on_x_and_of_parameters(varying, mask):
    check(lambda: Attention(varying, attn_mask=mask))


@pytest.mark.parametrize(("varying", "frozen"), [("k", "q"), ("q", "k"), ("v", "qk"), ("k", "qv")])
def test_attention_of_frozen_queries_keys_and_values(varying, frozen):
    """Each of them may be the only one that takes a gradient."""

    def module():
        attention = Attention(varying)
        for name in frozen:
            getattr(attention, name).requires_grad_(False)
        return attention

    check(module)


LOWER = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(-1)  # its first row sees nothing


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": LOWER},
        {"attn_mask": LOWER[None, None].expand(3, 1, -1, -1)},
        {"attn_mask": torch.linspace(-1, 1, TOKENS).double()[None]},
        {"attn_mask": torch.zeros(TOKENS, TOKENS).masked_fill(~LOWER, -math.inf).double()},
        {"keys": 5},
        {"keys": 5, "is_causal": True},
        {"width": 7},
    ],
    ids=["causal", "scale", "mask", "masks", "bias", "infinite bias", "keys", "few", "width"],
)
def test_forms_of_attention(options):
    check(lambda: Attention("qkv", **options))


def of_one_tensor(z: Tensor) -> Tensor:
    t = tokens(z)
    return z + F.scaled_dot_product_attention(t, t, t).mT.reshape(z.shape)


def of_three_axes(z: Tensor) -> Tensor:
    t = z.flatten(2)
    return z * F.scaled_dot_product_attention(t, t.sin(), t.cos()).view(z.shape)


@pytest.mark.parametrize("function", [of_one_tensor, of_three_axes])
def test_attention_of_one_tensor(function):
    check(lambda: Apply(function))


@pytest.mark.parametrize(
    "function",
    [
        lambda q: F.scaled_dot_product_attention(q, q[:1], q[:1]),
        lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=q.sin() @ q.mT),
        lambda q: F.scaled_dot_product_attention(q.repeat(1, 2, 1, 1), q, q, enable_gqa=True).mean(
            1, keepdim=True
        ),
    ],
    ids=["broadcast", "a mask of x", "grouped"],
)
def test_attention_that_is_left_to_autograd(function):
    check(lambda: Apply(lambda z: z + function(tokens(z)).mT.reshape(z.shape)), covered=False)


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 4, "vdim": 4}],
    ids=str,
)
def test_multi_head_attention_is_recorded_by_its_parts(options, weights):
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(4, 2, batch_first=True, **options)

        def forward(self, z: Tensor) -> Tensor:
            t = z.flatten(2).mT
            mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
            y, p = self.inner(t, t.sin(), t, need_weights=weights, attn_mask=mask)
            return z + y.mT.reshape(z.shape) * (1 if p is None else p[:, :1, :4, None])

    check(Heads, name="Linear")
    check(Heads, "frozen", name="Softmax" if weights else "Attention")


@pytest.mark.parametrize(
    ("function", "covered"),
    [
        (lambda z: F.softmax(z, 1), True),
        (lambda z: F.softmax(z, dim=-1), True),
        (lambda z: torch.softmax(z, 1), True),
        (lambda z: z.softmax(dim=2), True),
        (lambda z: z.softmax(1, None), True),
        (lambda z: torch.softmax(z, 1, torch.float64), False),
        (lambda z: F.softmax(z, 1, dtype=torch.float64), False),
        (lambda z: F.softmax(input=z, dim=1), True),
        (lambda z: nn.Softmax2d()(z), True),
    ],
)
def test_softmax(function, covered):
    check(lambda: Apply(lambda z: function(z) * z), covered=covered, name="Softmax")


@pytest.mark.parametrize(
    "function",
    [lambda z: F.log_softmax(z, 1), lambda z: torch.log_softmax(z, -1), lambda z: z.log_softmax(2)],
)
def test_log_softmax(function):
    check(lambda: Apply(lambda z: function(z) * z), name="LogSoftmax")


@pytest.mark.parametrize(
    "function",
    [
        lambda z: F.softmax(z, 1),
        lambda z: F.log_softmax(z, 1),
        lambda z: F.layer_norm(z, (4,)),
        lambda z: F.scaled_dot_product_attention(z, z, z),
    ],
)
@pytest.mark.parametrize("written", ["input", "output"])
def test_what_is_overwritten_in_a_frozen_network(function, written):
    """PyTorch would refuse a backward; no such backward is taken."""

    def in_place(z: Tensor) -> Tensor:
        z = z * 1
        y = function(z)
        if written == "input":
            z.mul_(3)
            return y + z
        y.mul_(3)
        return y + z

    def apart(z: Tensor) -> Tensor:
        return function(z) + 3 * z if written == "input" else 3 * function(z) + z

    def jacobian(middle) -> Tensor:
        torch.manual_seed(0)
        model = network(Apply(middle)).requires_grad_(False)
        return with_jacobian(model, images(), LabelLogit(), LABELS).jacobian

    torch.testing.assert_close(jacobian(in_place), jacobian(apart), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("frozen", [(), ("weight",), ("weight", "bias")])
@pytest.mark.parametrize(
    ("shape", "affine"), [((4,), True), ((4, 4), True), ((4, 4, 4), True), ((4,), False)]
)
def test_layer_norm(shape, affine, frozen):
    def make() -> nn.Module:
        norm = nn.LayerNorm(shape, 0.01, affine)
        for name, parameter in norm.named_parameters():
            nn.init.uniform_(parameter, 0.5, 1.5)
            parameter.requires_grad_(name not in frozen)
        return norm

    check(make, name="LayerNorm")


@pytest.mark.parametrize(
    ("function", "covered"),
    [
        (lambda z: F.layer_norm(z.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2), True),
        (lambda z: F.layer_norm(z[:, :1].expand_as(z), (4, 4)), True),
        (lambda z: F.layer_norm(z, torch.Size([4]), eps=0.1), True),
        (lambda z: F.layer_norm(z, (4,), z.mean((0, 1, 2))), False),
    ],
    ids=["over channels", "expanded", "eps", "a weight of x"],
)
def test_forms_of_layer_norm(function, covered):
    check(lambda: Apply(lambda z: function(z) * z), covered=covered, name="LayerNorm")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "function",
    [
        lambda z: F.layer_norm(z, (8,), torch.linspace(0.5, 1, 8, dtype=z.dtype)),
        lambda z: F.softmax(z, 1),
        lambda z: F.log_softmax(z, 1),
        lambda z: F.scaled_dot_product_attention(z, z, z),
    ],
    ids=["layer norm", "softmax", "log softmax", "attention"],
)
def test_narrow_types_are_as_exact_as_the_double_backward(function, dtype):
    """The truth is the gradient in float64, of the same weights and images."""

    def gradient(strategy: str, wide: bool = False) -> Tensor:
        torch.manual_seed(0)
        layers = (nn.Conv2d(3, 4, 3, padding=1), Apply(function), nn.Conv2d(4, 4, 3))
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(144, 5)).to(dtype)
        x = torch.rand(3, 3, 8, 8).to(torch.bfloat16).to(dtype)
        if wide:
            model, x = model.double(), x.double()
        out = with_jacobian(model, x, LabelLogit(), torch.tensor([0, 3, 1]), strategy=strategy)
        out.jacobian.square().sum().backward()
        gradients = (p.grad for p in model.parameters() if p.grad is not None)
        return torch.cat([g.flatten().double() for g in gradients])

    truth = gradient("autograd", wide=True)
    ours, theirs = ((gradient(each) - truth).norm() / truth.norm() for each in ("auto", "autograd"))
    assert ours <= 2 * theirs + torch.finfo(dtype).eps / 2


@pytest.mark.parametrize(
    ("make", "covered"),
    [
        (lambda: nn.InstanceNorm2d(4), True),
        (lambda: nn.InstanceNorm2d(4, 0.01, affine=True), True),
        (lambda: nn.InstanceNorm2d(4, affine=True).eval(), True),
        (lambda: nn.InstanceNorm2d(4, track_running_stats=True), False),
        (lambda: nn.InstanceNorm2d(4, track_running_stats=True).eval(), False),
        (lambda: Apply(lambda z: F.instance_norm(z.flatten(2)).view_as(z)), True),
        (lambda: Apply(lambda z: F.instance_norm(z[:, :, None])[:, :, 0]), True),
        (lambda: Apply(lambda z: F.instance_norm(z, weight=z.mean((0, 2, 3)))), False),
    ],
    ids=["plain", "affine", "eval", "running", "of running", "series", "volumes", "a weight of x"],
)
def test_instance_norm(make, covered):
    check(make, covered=covered, name="InstanceNorm")


def test_instance_norm_of_a_channels_last_map_is_contiguous():
    x = images().to(memory_format=torch.channels_last)
    out = with_jacobian(Apply(F.instance_norm), x, Scalar(lambda z, y: z.sum((1, 2, 3))))
    assert out.output.is_contiguous()


def test_instance_norm_of_means_far_from_zero_is_as_exact_as_the_double_backward():
    def gradient(strategy: str, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
        torch.manual_seed(seed)
        x, model = torch.randn(4, 3, 8, 8) + 100, nn.Conv2d(3, 3, 1)
        nn.init.dirac_(model.weight)
        weight = torch.randn(4, 3, 8, 8).to(dtype)
        energy = Scalar(lambda z, y: (F.instance_norm(z).square() * weight).sum((1, 2, 3)))
        out = with_jacobian(model.to(dtype), x.to(dtype), energy, strategy=strategy)
        (out.jacobian * weight.flip(0)).sum().backward()
        return model.weight.grad.flatten().double()

    def error(strategy: str) -> Tensor:
        truth = [gradient("autograd", seed, torch.float64) for seed in range(5)]
        found = [gradient(strategy, seed) for seed in range(5)]
        return (torch.stack(found) - torch.stack(truth)).norm() / torch.stack(truth).norm()

    assert error("auto") < 2 * error("autograd")


def test_instance_norm_of_one_sample_whose_cotangent_is_channels_last():
    """PyTorch's own backward is wrong there; a group norm's is not."""
    weight = torch.rand(1, 4, 4, 4).double().to(memory_format=torch.channels_last)
    running = (torch.zeros(4).double(), torch.ones(4).double())

    def jacobian(norm) -> Tensor:
        energy = Scalar(lambda z, y: (norm(z) * weight).sum((1, 2, 3)))
        return with_jacobian(nn.Conv2d(3, 4, 5).double(), images()[:1], energy).jacobian

    torch.manual_seed(0)
    ours = jacobian(lambda z: F.instance_norm(z, *running))
    torch.manual_seed(0)
    torch.testing.assert_close(ours, jacobian(lambda z: F.group_norm(z, 4)))


@pytest.mark.parametrize(
    "make", [lambda: nn.LayerNorm(4), lambda: nn.GroupNorm(2, 4), lambda: nn.InstanceNorm2d(4)]
)
def test_norms_in_a_checkpoint(make):
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = make()

        def forward(self, z: Tensor) -> Tensor:
            return checkpoint(self.norm, z, use_reentrant=False) * z

    agrees(lambda: network(Checkpointed()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_norm_of_a_narrow_map_by_a_wide_weight(dtype):
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(8, 8).to(dtype), nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.first(x).tanh()).square()

    def gradient(strategy: str) -> Tensor:
        torch.manual_seed(0)
        model, x = Mixed(), torch.randn(3, 8).to(dtype)
        out = with_jacobian(model, x, LabelLogit(), LABELS, strategy=strategy)
        out.jacobian.square().sum().backward()
        return torch.cat(
            [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
        )

    error = gradient("auto") - gradient("autograd")
    assert error.norm() < 4 * torch.finfo(dtype).eps * gradient("autograd").norm()
