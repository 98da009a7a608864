"""Custom autograd functions between x and the target: exact, or one error that names the function."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_agrees
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from fastjac import FastjacError, LabelLogit, input_jacobian, with_jacobian


def images() -> Tensor:
    return torch.rand(3, 2, 6, 6, generator=torch.Generator().manual_seed(3)).double()


LABELS = torch.tensor([0, 2, 1])


class Swish(Function):
    """As efficientnet_pytorch has it: the input is saved."""

    @staticmethod
    def forward(ctx, i):
        ctx.save_for_backward(i)
        return i * torch.sigmoid(i)

    @staticmethod
    def backward(ctx, g):
        s = torch.sigmoid(ctx.saved_tensors[0])
        return g * (s * (1 + ctx.saved_tensors[0] * (1 - s)))


class Exponential(Function):
    """The output is saved; by setup_context."""

    @staticmethod
    def forward(i, scale):
        return (i * scale).exp()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.scale = inputs[1]
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0] * ctx.scale, None


class Product(Function):
    """Of two arguments that broadcast, with a flag between; gives the product and a square."""

    @staticmethod
    def forward(ctx, a, flag, b):
        ctx.flag, ctx.kept = flag, {"a": [a]}  # not as PyTorch recommends
        ctx.save_for_backward(b)
        ctx.set_materialize_grads(flag)
        return a * b, a.square()

    @staticmethod
    def backward(ctx, g, h):
        (a,), (b,) = ctx.kept["a"], ctx.saved_tensors
        ga, gb = (None, None) if g is None else (g * b, (g * a).sum((0, 2, 3), keepdim=True))
        if h is not None:
            ga = 2 * a * h if ga is None else ga + 2 * a * h
        return ga, None, gb


class Reversal(Function):
    """Domain-adversarial training's: no derivative of the forward."""

    @staticmethod
    def forward(ctx, i):
        return i.view_as(i)

    @staticmethod
    def backward(ctx, g):
        return -0.5 * g


class Estimator(Function):
    """A straight-through estimator, with a clipped gradient."""

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx, i):
        ctx.save_for_backward(i.abs() < 0.7)
        return i.mul(4).round() / 4

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


class Mean(Function):
    """Its gradient broadcasts."""

    @staticmethod
    def forward(ctx, i):
        return i + i.mean((2, 3), keepdim=True)

    @staticmethod
    def backward(ctx, g):
        return g + g.mean((2, 3), keepdim=True)


class Drop(Function):
    """Draws in the forward."""

    @staticmethod
    def forward(ctx, i):
        ctx.save_for_backward(torch.rand_like(i) > 0.4)
        return i * ctx.to_save[0]

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


class Complex(Function):
    @staticmethod
    def forward(ctx, i):
        ctx.save_for_backward(i)
        return torch.complex(i, i.square())

    @staticmethod
    def backward(ctx, g):
        return g.real + 2 * ctx.saved_tensors[0] * g.imag


class Lazy(Function):
    """Computes the gradients that its arguments need, as it asks of them; of a sign none."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a * b, a.sign()

    @staticmethod
    def backward(ctx, g, h):
        a, b = ctx.saved_tensors
        gb = (g * a).sum((0, 2, 3), keepdim=True) if b.requires_grad else None
        return g * b if a.requires_grad else None, gb


class Largest(Function):
    """With indices, which have no derivative, before the values."""

    @staticmethod
    def forward(ctx, i):
        values, indices = i.topk(2, dim=1)
        ctx.save_for_backward(indices)
        ctx.shape = i.shape
        ctx.mark_non_differentiable(indices)
        return indices, values

    @staticmethod
    def backward(ctx, _, g):
        (indices,) = ctx.saved_tensors
        return g.new_zeros(ctx.shape).scatter(1, indices, g)


class WritesGradient(Function):
    """A ReLU whose backward writes to the gradient that it is given."""

    @staticmethod
    def forward(ctx, i):
        ctx.save_for_backward(i)
        return i.clamp(min=0)

    @staticmethod
    def backward(ctx, g):
        g[ctx.saved_tensors[0] < 0] = 0
        return g


class Clips(Function):
    """Its backward is not linear in the gradient."""

    @staticmethod
    def forward(ctx, i):
        return i.view_as(i)

    @staticmethod
    def backward(ctx, g):
        return g.tanh() + g.clamp(-0.01, 0.01)


class Flat(Function):
    """Has no gradient."""

    @staticmethod
    def forward(ctx, i):
        return i.round()

    @staticmethod
    def backward(ctx, g):
        return None


class Network(nn.Module):
    """A custom function before any parameter, behind a convolution and behind a norm."""

    def __init__(self, function, place) -> None:
        super().__init__()
        self.function, self.place = function, place
        self.weight = nn.Parameter(torch.rand(4, 1, 1))
        self.conv, self.norm, self.head = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.place == "x":
            x = self.function(x, weight[:2])
        x = self.conv(x).sin()
        if self.place == "conv":
            x = F.relu(self.function(x, weight)) + x
        x = self.norm(x)
        if self.place == "norm":
            x = self.function(x, weight)
        return self.head(x.square().mean((2, 3)))


FUNCTIONS = {
    "saves its input": lambda x, w: Swish.apply(x),
    "saves its output": lambda x, w: Exponential.apply(x, 0.5),
    "of a parameter": lambda x, w: Product.apply(x, True, w)[0],
    "both outputs": lambda x, w: sum(Product.apply(x, False, w.sin())),
    "the second output": lambda x, w: Product.apply(x, False, w)[1],
    "of x twice": lambda x, w: Product.apply(x, True, x.mean((0, 2, 3), keepdim=True))[0],
    "of a constant": lambda x, w: Product.apply(w.detach(), True, x.sum((0, 2, 3), True))[0] + x,
    "of another": lambda x, w: Swish.apply(Exponential.apply(Reversal.apply(x), 0.5)),
    "reverses": lambda x, w: Reversal.apply(x) * w,
    "estimates": lambda x, w: Estimator.apply(x),
    "broadcasts": lambda x, w: Mean.apply(x * w),
    "draws": lambda x, w: Drop.apply(x),
    "asks its arguments": lambda x, w: torch.add(*Lazy.apply(x, w)),
    "with indices": lambda x, w: (of := Largest.apply(x))[1].mean(1, True) * (of[0][:, :1] + w),
    "writes to a gradient": lambda x, w: 2 * WritesGradient.apply(x - 0.5) + x,
    "clips": lambda x, w: Clips.apply(x.sin()).square(),
    "is flat": lambda x, w: Flat.apply(x.unbind(1)[1])[:, None] + x,
    "complex": lambda x, w: Complex.apply(x).abs(),
    "read twice": lambda x, w: (y := Swish.apply(x)) * y + y.detach(),
    "overwritten later": lambda x, w: Swish.apply(x).mul_(2),
}


@pytest.mark.parametrize("place", ["x", "conv", "norm"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_is_exact(name, place):
    # The reference of frozen statistics runs the model twice, and so clips two gradients, not their sum.
    for batch_stats in ("batch",) if name == "clips" else ("frozen", "batch"):
        assert_agrees(
            lambda: Network(FUNCTIONS[name], place).double(),
            *(images(), LabelLogit(), LABELS),
            batch_stats=batch_stats,
        )


class Hooked(nn.Module):
    """Runs a module whose hook has autograd put an identity behind what a custom function made."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(72, 6), nn.Identity(), nn.Linear(6, 4)
        self.inner.register_full_backward_hook(lambda module, given, made: None)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(Swish.apply(self.first(x.flatten(1)))).sin())


def test_it_is_exact_behind_a_module_with_a_backward_hook():
    assert_agrees(Hooked, images(), LabelLogit(), LABELS)


class HoldsParameter(Function):
    """Reads a parameter past autograd, whose gradient a double backward would miss too."""

    @staticmethod
    def forward(ctx, i, module):
        ctx.module = module
        return i * module.weight.detach()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.module.weight, None


class KeepsParameter(Function):
    @staticmethod
    def forward(ctx, i, module):
        ctx.weight = module.weight
        return i * module.weight.detach()

    backward = staticmethod(lambda ctx, g: (g * ctx.weight, None))


class DrawsInBackward(Function):
    """ShakeShake's: another number in the backward."""

    @staticmethod
    def forward(ctx, i, module):
        return i * torch.rand(())

    @staticmethod
    def backward(ctx, g):
        return g * torch.rand(()), None


class Shift(nn.Module):
    def __init__(self, function: type[Function]) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.rand(4))
        self.first, self.last = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function.apply(self.first(x).sin(), self).sin())


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (HoldsParameter, r"reads a tensor \[4\] that is not its argument"),
        (KeepsParameter, r"reads a tensor \[4\] that is not its argument"),
        (DrawsInBackward, "draws random numbers"),
    ],
)
def test_what_fastjac_cannot_differentiate_is_an_error(function, what):
    model, x = Shift(function), torch.rand(3, 2)
    with pytest.raises(FastjacError, match=rf"{function.__name__} {what}, .*strategy='autograd'"):
        with_jacobian(model, x, LabelLogit(), LABELS)
    out = with_jacobian(model, x, LabelLogit(), LABELS, strategy="autograd")  # as the error says
    out.jacobian.square().sum().backward()


class Once(Function):
    @staticmethod
    def forward(ctx, i, module):
        ctx.save_for_backward(i)
        return i.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0], None


def test_one_without_a_second_derivative():
    model, x = Shift(Once), torch.rand(3, 2)
    j = input_jacobian(model, x, LabelLogit(), LABELS)
    wanted = input_jacobian(model, x, LabelLogit(), LABELS, strategy="autograd")
    torch.testing.assert_close(j, wanted)
    out = with_jacobian(model, x, LabelLogit(), LABELS)
    with pytest.raises(FastjacError, match="Once has no second derivative"):
        out.jacobian.square().sum().backward()


class Cube(Function):
    """Its derivative is right; its backward's is lost, which autograd would not tell."""

    @staticmethod
    def forward(ctx, i, module):
        ctx.save_for_backward(i)
        return i**3

    @staticmethod
    def backward(ctx, g):
        (i,) = ctx.saved_tensors
        return g * 3 * i.detach() ** 2, None


class WithoutGradient(Cube):
    @staticmethod
    def backward(ctx, g):
        with torch.no_grad():
            return g * 3 * ctx.saved_tensors[0] ** 2, None


class SavesAnIntermediate(Cube):
    @staticmethod
    def forward(ctx, i, module):
        square = i * i
        ctx.save_for_backward(square + 0)
        return square * i

    @staticmethod
    def backward(ctx, g):
        return g * 3 * ctx.saved_tensors[0], None


class HoldsAnIntermediate(Cube):
    @staticmethod
    def forward(ctx, i, module):
        ctx.slope = 3 * i * i
        return i**3

    @staticmethod
    def backward(ctx, g):
        return g * ctx.slope, None


class Rounded(Cube):
    """What it saves has a derivative of zero, or is no function of x."""

    @staticmethod
    def forward(ctx, i, module):
        ctx.levels, ctx.table = (4 * i).round(), torch.linspace(1, 2, i.shape[1])
        return i * ctx.levels * ctx.table

    @staticmethod
    def backward(ctx, g):
        return g * ctx.levels * ctx.table, None


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (Cube, "what detach gives"),
        (WithoutGradient, r"what \w+ gives"),
        (SavesAnIntermediate, r"a tensor \[3, 4\] that its forward computes"),
        (HoldsAnIntermediate, r"a tensor \[3, 4\] that its forward computes"),
        (Rounded, None),
    ],
)
def test_a_derivative_that_a_double_backward_loses_is_an_error(function, what):
    model, x = Shift(function).double(), torch.rand(3, 2).double()
    out = with_jacobian(model, x, LabelLogit(), LABELS)
    reference = with_jacobian(model, x, LabelLogit(), LABELS, strategy="autograd")
    torch.testing.assert_close(out.jacobian, reference.jacobian)
    if what is None:
        wanted = torch.autograd.grad(reference.jacobian.square().sum(), model.last.weight)
        found = torch.autograd.grad(out.jacobian.square().sum(), model.last.weight)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
        return
    with pytest.raises(FastjacError, match=f"{function.__name__} takes for a constant ({what})"):
        out.jacobian.square().sum().backward()


def test_what_it_saved_and_was_overwritten_is_an_error():
    def function(x: Tensor, weight: Tensor) -> Tensor:
        y = Swish.apply(x.mul_(1.5))
        x.zero_()
        return y + x

    with pytest.raises(FastjacError, match=r"Swish.*modified by an inplace operation"):
        with_jacobian(Network(function, "conv").double(), images(), LabelLogit(), LABELS)


@pytest.mark.parametrize("inside", [lambda x: Swish.apply(x).sin(), Swish.apply])
def test_in_a_checkpoint_it_is_an_error(inside):
    def function(x: Tensor, weight: Tensor) -> Tensor:
        return checkpoint(inside, x * weight, use_reentrant=False) * 2

    model = Network(function, "conv").double()
    with pytest.raises(FastjacError, match=r"Swish made it.*outside of torch.utils.checkpoint$"):
        with_jacobian(model, images(), LabelLogit(), LABELS)
