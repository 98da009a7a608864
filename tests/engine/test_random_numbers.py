"""What an opaque call draws is the same in its sweeps, and no generator's state is read for it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastjac
from fastjac.engine.rules.random_numbers import Draw, RecordDraws, ReplayDraws

UNTAGGED = torch.library.Library("fastjac_tests", "DEF")
UNTAGGED.define("drop(Tensor x) -> Tensor")
UNTAGGED.define("double_and_noise(Tensor(a!) x) -> (Tensor(a!), Tensor)")
MAKE = torch.Generator().manual_seed(0)


@torch.library.impl(UNTAGGED, "drop", "CompositeExplicitAutograd")
def _drop(x: Tensor) -> Tensor:
    return x * torch.rand(x.shape).to(x)


@torch.library.impl(UNTAGGED, "double_and_noise", "CPU")
def _double_and_noise(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mul_(2), torch.rand(2)


class Drop(torch.autograd.Function):
    """y = x * noise, with noise from an operator that no tag marks."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.ops.fastjac_tests.drop(torch.ones_like(x))
        return x * noise, noise

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, gradient: Tensor, _: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0]


class Overridable(nn.Module):
    """Calls ``function`` as one opaque call, whose square root follows, so that y is not linear."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.layer = function, nn.Linear(6, 4).double()
        self.out = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(opaque(self.layer(x), self.function))


def opaque(z: Tensor, function) -> Tensor:
    """A torch function without a rule."""
    if torch.overrides.has_torch_function((z,)) or torch.overrides._get_current_function_mode():
        return torch.overrides.handle_torch_function(opaque, (z,), z, function)
    return function(z)


def random_noise(z: Tensor) -> Tensor:
    return z.square() * torch.empty_like(z).uniform_()


def own_generator(z: Tensor) -> Tensor:
    return z.square() * torch.rand(z.shape, dtype=z.dtype, generator=MAKE)


CALLS = {
    "in place": random_noise,
    "a generator of its own": own_generator,
    "an operator without a tag": lambda z: Drop.apply(z)[0].square(),
    "gumbel": lambda z: F.gumbel_softmax(z, 0.5),
    "attention": lambda z: F.scaled_dot_product_attention(z[None], z[None], z[None], None, 0.3)[0],
}


@pytest.mark.parametrize("name", CALLS)
def test_sweeps_take_the_forward_s_numbers(name):
    torch.manual_seed(0)
    model, x, y = Overridable(CALLS[name]), torch.rand(5, 6).double(), torch.tensor([0, 2, 1, 1, 0])
    found = []
    for strategy in ("auto", "autograd"):
        torch.manual_seed(7)
        MAKE.manual_seed(7)
        model.zero_grad()
        out = fastjac.with_jacobian(model, x, fastjac.LabelLogit(), y, strategy=strategy)
        (out.jacobian.square().sum() + out.output.sum()).backward()
        found.append([out.output, out.jacobian, *(p.grad.clone() for p in model.parameters())])
        assert out.jacobian.abs().sum() > 0
    torch.testing.assert_close(*found)


class Attention(nn.Module):
    def __init__(self, dropout: float, by_name: bool) -> None:
        super().__init__()
        self.layer, self.dropout, self.by_name = nn.Linear(16, 16), dropout, by_name

    def forward(self, x: Tensor) -> Tensor:
        q = self.layer(x).unflatten(1, (1, 4, 4))
        if self.by_name:
            y = F.scaled_dot_product_attention(q, q, q, None, dropout_p=self.dropout)
        else:
            y = F.scaled_dot_product_attention(q, q, q, None, self.dropout)
        return y.flatten(1)


class Operators(TorchDispatchMode):
    """Notes which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._overloadpacket.__name__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_only_attention_that_drops_out_gives_up_the_fused_kernel(dropout, by_name):
    torch.manual_seed(0)
    model, x = Attention(dropout, by_name), torch.rand(3, 16)
    with Operators() as ran:
        fastjac.with_jacobian(model, x, fastjac.Logits([0]))
    assert any("flash" in name for name in ran.names) == (dropout == 0)
    model, x, found = model.double(), x.double(), []
    for strategy in ("auto", "autograd"):
        torch.manual_seed(7)
        out = fastjac.with_jacobian(model, x, fastjac.Logits([0]), strategy=strategy)
        gradients = torch.autograd.grad(out.jacobian.square().sum(), model.parameters())
        found.append([out.output, out.jacobian, *gradients])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_reads_no_generator(monkeypatch):
    def refuse(*args):
        raise AssertionError("a generator's state is read")

    for module in (torch, torch.random, torch.cuda):
        for name in ("get_rng_state", "set_rng_state"):
            monkeypatch.setattr(module, name, refuse)
    x, y = torch.rand(5, 6).double(), torch.tensor([0, 2, 1, 1, 0])
    out = fastjac.with_jacobian(Overridable(random_noise), x, fastjac.LabelLogit(), y)
    out.jacobian.square().sum().backward()


def test_replays_writes_and_results():
    x = torch.ones(3)
    with RecordDraws() as recorder:
        _, noise = torch.ops.fastjac_tests.double_and_noise(x)
        x.add_(noise[0])
    assert [type(d) for d in recorder.draws] == [Draw]
    again = torch.ones(3)
    with ReplayDraws(recorder.draws):
        written, replayed = torch.ops.fastjac_tests.double_and_noise(again)
    assert written is again
    assert again.tolist() == [2, 2, 2]  # what the operator wrote, without the addition
    assert torch.equal(replayed, noise)


def test_replays_what_an_operator_writes_to_its_out():
    given, again = torch.zeros(3), torch.zeros(3)
    with RecordDraws() as recorder:
        torch.randn(3, out=given)
    with ReplayDraws(recorder.draws):
        torch.randn(3, out=again)
    assert given.any()
    assert torch.equal(given, again)


def test_another_sequence_is_an_error():
    with RecordDraws() as recorder:
        torch.rand(3)
    with (
        pytest.raises(fastjac.FastjacError, match=r"aten\.randn\.default draws .* aten\.rand\."),
        ReplayDraws(recorder.draws),
    ):
        torch.randn(3)
    with (
        pytest.raises(fastjac.FastjacError, match="the forward ran nothing"),
        ReplayDraws([]),
    ):
        torch.randn(3)
