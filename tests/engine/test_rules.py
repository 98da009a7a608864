"""Rules: those of users, and the gradient of each of ours for every way to call its function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_agrees
from torch import Tensor, nn

from fastjac import FastjacError, LabelLogit, register_rule, with_jacobian
from fastjac.engine.rules import Rule
from fastjac.engine.rules.base import _RULES

SIDE = 6
LABELS = torch.tensor([0, 3, 1])
GENERATOR = torch.Generator().manual_seed(1)
COLUMN = torch.rand(4, 1, 1, generator=GENERATOR).double()
MAP = torch.rand(1, 4, SIDE, SIDE, generator=GENERATOR).double() + 0.5
KERNEL = torch.rand(4, 4, 3, 3, generator=GENERATOR).double() - 0.5


class Apply(nn.Module):
    """``function(z, p)``, with p a parameter of a map's shape that broadcasts."""

    def __init__(
        self, function: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.function, self.p = function, nn.Parameter(torch.rand(shape) + 0.5)

    def forward(self, z: Tensor) -> Tensor:
        y = self.function(z, self.p)
        return y if y.shape == z.shape else z * (1 + y.reshape(len(y), -1).mean())


def network(function: Callable, shape: tuple[int, ...] = (4, 1, 1)) -> nn.Sequential:
    stem = (nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh())
    head = (nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5))
    return nn.Sequential(*stem, Apply(function, shape), *head).double()


def images(memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    x = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3)).double()
    return x.contiguous(memory_format=memory_format)


def agrees(function: Callable, shape: tuple[int, ...] = (4, 1, 1), **options: Any) -> None:
    x = images(options.pop("memory_format", torch.contiguous_format))
    assert_agrees(
        lambda: network(function, shape), x, LabelLogit(), LABELS, batch_stats="batch", **options
    )


# The arithmetic rules: operands of every kind

SHAPES = [(), (1,), (6,), (4, 1, 1), (1, 4, 6, 6), (3, 4, 6, 6), (3, 1, 1, 1), (2, 1, 1, 1, 1)]
BINARY = {
    "add": lambda z, p: torch.add(z, p),
    "add alpha": lambda z, p: torch.add(z, p, alpha=-2),
    "add by name": lambda z, p: torch.add(input=z, other=p, alpha=3),
    "method by name": lambda z, p: z.add(other=p, alpha=0.5),
    "radd": lambda z, p: p + z,
    "sub": lambda z, p: z - p,
    "sub alpha": lambda z, p: z.sub(p, alpha=3),
    "sub reversed": lambda z, p: torch.sub(p, z, alpha=2),
    "rsub": lambda z, p: torch.rsub(z, p),
    "rsub alpha": lambda z, p: torch.rsub(z, p, alpha=2),
    "subtract": lambda z, p: torch.subtract(z, p),
    "mul": lambda z, p: z * p,
    "mul by name": lambda z, p: torch.mul(input=p, other=z),
    "multiply": lambda z, p: torch.multiply(z, p),
    "square of sum": lambda z, p: (z + p) * (z - p),
    "div": lambda z, p: z / p,
    "div by name": lambda z, p: torch.div(input=z, other=p),
    "rdiv": lambda z, p: p / (z + 3),
    "divide": lambda z, p: torch.divide(z, p),
    "product": lambda z, p: (z * p) * (z.sin() + p),
    "maximum": lambda z, p: torch.maximum(z, p - 0.7),
    "pow": lambda z, p: (z + 2) ** p,
    "where": lambda z, p: torch.where(z > 0, z * z, p),
    "addcmul": lambda z, p: torch.addcmul(z, z, p, value=2),
    "lerp": lambda z, p: torch.lerp(z, z.sin(), p),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", BINARY)
def test_broadcasting(name, shape):
    agrees(BINARY[name], shape)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", BINARY)
def test_broadcasting_of_two_functions_of_x(name, frozen):
    """The smaller operand depends on x too; in a frozen part, the curvature alone passes."""

    def both(z: Tensor, p: Tensor) -> Tensor:
        return BINARY[name](z, z.mean((0, 2, 3), keepdim=True).square() + 0.5 + 0 * p)

    agrees(both, change=lambda model: model[:4].requires_grad_(not frozen))


NUMBERS = {
    "int": 3,
    "float": 0.7,
    "bool": True,
    "integer tensor": torch.tensor(2),
    "integer map": torch.arange(6),
    "0-d tensor": torch.tensor(1.5).double(),
    "float32 0-d tensor": torch.tensor(1.5),
    "float32 map": torch.full((6,), 1.5),
    "bool map": torch.arange(6) % 2 == 0,
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("operation", ["add", "sub", "mul", "div", "radd", "rsub", "rdiv", "pow"])
def test_numbers(operation, name):
    number = NUMBERS[name]
    if operation == "sub" and name in ("bool", "bool map"):
        pytest.skip("PyTorch has no subtraction of a bool")
    apply = {
        "add": lambda z: z + number,
        "sub": lambda z: z - number,
        "mul": lambda z: z * number,
        "div": lambda z: z / (number + 1 if name == "integer map" else number),
        "radd": lambda z: number + z,
        "rsub": lambda z: number - z,
        "rdiv": lambda z: number / (z + 3),
        "pow": lambda z: (z + 2) ** number,
    }[operation]
    if operation == "rsub" and name in ("bool", "bool map"):
        pytest.skip("PyTorch has no subtraction of a bool")
    if (operation, name) in (("div", "bool map"), ("pow", "bool map")):
        pytest.skip("division by zero, and a power that PyTorch cannot differentiate twice")
    agrees(lambda z, p: apply(z) * p)


IN_PLACE = {
    "add_": lambda z, p: z.add_(p, alpha=2),
    "iadd": lambda z, p: z.__iadd__(p),
    "sub_": lambda z, p: z.sub_(p, alpha=-1),
    "isub": lambda z, p: z.__isub__(p),
    "mul_": lambda z, p: z.mul_(p),
    "mul_ number": lambda z, p: z.mul_(3).mul_(torch.tensor(2.0)),
    "imul": lambda z, p: z.__imul__(p),
    "div_": lambda z, p: z.div_(p),
    "idiv": lambda z, p: z.__itruediv__(2),
    "pow_": lambda z, p: z.abs_().add_(1).pow_(p),
    "neg_": lambda z, p: z.neg_(),
    "exp_": lambda z, p: z.exp_(),
    "tanh_": lambda z, p: z.tanh_(),
    "relu_": lambda z, p: F.relu_(z),
    "relu inplace": lambda z, p: F.relu(z, inplace=True),
    "relu6 inplace": lambda z, p: F.relu6(input=z, inplace=True),
    "leaky_relu_": lambda z, p: F.leaky_relu_(z, 0.2),
    "leaky inplace": lambda z, p: F.leaky_relu(z, 0.3, True),
    "negative slope": lambda z, p: F.leaky_relu(z, negative_slope=-0.3),
    "hardtanh_": lambda z, p: F.hardtanh_(z, -0.2, 0.3),
    "hardtanh inplace": lambda z, p: F.hardtanh(z, min_val=-0.2, max_val=0.3, inplace=True),
    "silu inplace": lambda z, p: F.silu(z, inplace=True),
    "elu inplace": lambda z, p: F.elu(z, 0.7, inplace=True),
    "dropout inplace": lambda z, p: F.dropout(z, 0.3, True, True),
    "addcmul_": lambda z, p: z.addcmul_(p.sin(), p, value=0.3),
    "copy_": lambda z, p: z.copy_(p),
    "fill_": lambda z, p: z.fill_(2.0),
    "zero_": lambda z, p: z.zero_().add_(p),
    "clamp_, square_": lambda z, p: z.clamp_(-0.5, 0.5).square_(),
    "out": lambda z, p: torch.add(z, p) + torch.zeros_like(z),
}


@pytest.mark.parametrize("part", ["map", "view", "slice of batch"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place(name, part):
    def write(z: Tensor, p: Tensor) -> Tensor:
        y = z * 2 - 1
        if part == "map":
            return IN_PLACE[name](y, p)
        target, q = (y[:, 1:3], p[1:3]) if part == "view" else (y[:2], p)
        IN_PLACE[name](target, q)
        return y + z

    agrees(write)


# Layers: keywords, geometries, layouts

CALLS = {
    "conv2d by name": lambda z, p: F.conv2d(input=z, weight=KERNEL, bias=p.flatten(), padding=1),
    "conv2d weight of a parameter": lambda z, p: F.conv2d(
        z, KERNEL * p.unsqueeze(0), stride=2, padding=(1, 0)
    ),
    "conv2d groups": lambda z, p: F.conv2d(
        z, KERNEL[:, :2] * p.unsqueeze(0)[:, :2], groups=2, dilation=(2, 1)
    ),
    "conv2d depthwise": lambda z, p: F.conv2d(
        z, KERNEL[:, :1] * p.unsqueeze(1), None, 1, "valid", 1, 4
    ),
    "conv2d same": lambda z, p: F.conv2d(z, KERNEL, padding="same") * p,
    "conv2d unbatched": lambda z, p: torch.stack([F.conv2d(s, KERNEL, padding=1) for s in z]) * p,
    "linear": lambda z, p: F.linear(z, p.flatten().outer(torch.arange(6.0).double()), p.flatten()),
    "linear by name": lambda z, p: F.linear(input=z, weight=MAP[0, 0], bias=None) * p,
    "linear vector": lambda z, p: (
        torch.stack([F.linear(s, MAP[0, 0]) for s in z.flatten(0, 2)]).view_as(z) * p
    ),
    "matmul parameter": lambda z, p: z @ (p.flatten()[:, None] * MAP[0, 0][:4]).t().contiguous(),
    "layer norm by name": lambda z, p: F.layer_norm(input=z, normalized_shape=(6,), eps=0.1) * p,
    "layer norm affine": lambda z, p: F.layer_norm(
        z, [4, 6, 6], p.expand(4, 6, 6), p.expand(4, 6, 6).sin(), 1e-3
    ),
    "group norm": lambda z, p: F.group_norm(
        z, num_groups=2, weight=p.flatten(), bias=p.flatten().sin(), eps=0.1
    ),
    "group norm one": lambda z, p: (
        F.group_norm(z, 4) + F.group_norm(z, 1, p.flatten(), p.flatten())
    ),
    "group norm 3-d": lambda z, p: F.group_norm(z.flatten(2), 2, p.flatten()).view_as(z),
    "batch norm by name": lambda z, p: F.batch_norm(
        input=z, running_mean=None, running_var=None, weight=p.flatten(), training=True, eps=0.1
    ),
    "batch norm eval": lambda z, p: F.batch_norm(
        z, torch.zeros(4).double(), torch.ones(4).double() * 2, None, p.flatten()
    ),
    "torch.batch_norm": lambda z, p: torch.batch_norm(
        z, p.flatten(), p.flatten(), None, None, True, 0.1, 1e-5, False
    ),
    "batch norm 3-d": lambda z, p: F.relu(
        F.batch_norm(z.flatten(2), None, None, p.flatten(), training=True)
    ).view_as(z),
    "batch norm 2-d": lambda z, p: (
        F.relu(
            F.batch_norm(
                z.permute(0, 2, 3, 1).reshape(-1, 4), None, None, p.flatten(), training=True
            )
        )
        .view(3, 6, 6, 4)
        .permute(0, 3, 1, 2)
    ),
    "max pool by name": lambda z, p: F.max_pool2d(input=z, kernel_size=3, stride=1, padding=1) * p,
    "max pool dilated": lambda z, p: F.max_pool2d(z, (2, 3), (1, 2), (1, 1), (2, 1), True) * 2,
    "max pool tensor": lambda z, p: torch.max_pool2d(z, 2, 2) * 2,
    "avg pool": lambda z, p: F.avg_pool2d(z, 3, 1, 1, count_include_pad=False) * p,
    "avg pool ceil": lambda z, p: (
        F.avg_pool2d(input=z, kernel_size=(4, 3), stride=3, ceil_mode=True, divisor_override=5) * 2
    ),
    "adaptive": lambda z, p: F.adaptive_avg_pool2d(z, (None, 4)) * 2,
    "mean": lambda z, p: (
        z * z.mean() + z.mean((1, -1), keepdim=True) + torch.mean(z, dim=2, keepdim=True)
    ),
    "sum": lambda z, p: z * z.sum() + torch.sum(z, (1,), True) + z.sum(dim=-1, keepdim=True),
    "cat": lambda z, p: (
        torch.cat(tensors=[z[:, :2], p.expand(3, 4, 6, 6)[:, 2:]], dim=-3)
        + torch.cat((z[:, :1], z[:, 1:]), axis=1)
    ),
    "cat of parts": lambda z, p: torch.cat(
        [z, torch.empty(3, 0, 6, 6).double(), p.expand_as(z)], 1
    )[:, 2:6],
    "stack": lambda z, p: torch.stack([z, p.expand_as(z), z.sin()], dim=-1).prod(-1),
    "views": lambda z, p: (
        z.reshape(-1)
        .view(3, 4, -1)
        .transpose(1, 2)
        .contiguous()
        .permute(0, 2, 1)
        .view_as(z)
        .clone()
        * p
    ),
    "permute by negative dimensions": lambda z, p: (
        z.permute(0, -1, -3, -2).sin().permute(dims=(0, -2, -1, -3))
        * torch.permute(z, (0, -3, 2, -1))
        * p
    ),
    "flatten": lambda z, p: (
        torch.flatten(z, start_dim=1).unflatten(1, (4, 6, 6)) * p + z.flatten(-2).view(z.size())
    ),
    "split": lambda z, p: (
        torch.cat(torch.split(z, [1, 3], dim=1)[::-1], 1) * p + torch.cat(z.chunk(3, dim=-1), -1)
    ),
    "index": lambda z, p: z[..., 1:5, None, ::2].squeeze(3).mean() * z + z[0] + z[:, -1:],
    "dropout by name": lambda z, p: F.dropout(input=z, p=0.4, training=True) * p,
    "dropout eval": lambda z, p: F.dropout(z, 0.4, training=False) * p + F.dropout2d(z, 0.0),
    "activations by name": lambda z, p: (
        F.gelu(input=z) + F.silu(input=z) + torch.sigmoid(input=z) + F.softplus(input=z, beta=3.0)
    ),
    "hardsigmoid": lambda z, p: F.hardswish(z * 5) * p,
    "to": lambda z, p: z.to(torch.float64).to("cpu") * p + z.type(torch.float64),
}
LAYOUTS = {
    "contiguous": lambda z: z,
    "channels last": lambda z: z.contiguous(memory_format=torch.channels_last),
    "transposed": lambda z: z.transpose(2, 3).contiguous().transpose(2, 3),
    "strided": lambda z: torch.stack([z, z], -1)[..., 0],
    "expanded": lambda z: z[:, :1].expand(-1, 4, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CALLS)
def test_calls(name, layout):
    agrees(lambda z, p: CALLS[name](LAYOUTS[layout](z), p))


@pytest.mark.parametrize("name", CALLS)
def test_calls_in_a_frozen_part(name):
    agrees(CALLS[name], change=lambda model: model[:4].requires_grad_(False))


# Rules of users


class Cube(torch.nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return cube(z)


def cube(z: Tensor, power: int = 3) -> Tensor:
    if torch.overrides.has_torch_function_unary(z) or torch._C._len_torch_function_stack():
        return torch.overrides.handle_torch_function(cube, (z,), z, power=power)
    return z**power


def test_a_rule_of_a_function_of_the_users_own(registry):
    seen = []

    @register_rule(cube)
    @dataclass
    class CubeRule(Rule):
        x: Tensor
        receives: bool

        @classmethod
        def record(cls, site, z, power=3):
            seen.append(power)
            if power != 3:
                return NotImplemented
            received = site.receives(z, 0)
            return site.run(z), cls((site.number(z),), site.keep(z), bool(received)), received

        def needs_delta(self):
            return self.receives

        def vjp(self, delta):
            return [3 * self.x**2 * delta]

        def jvp(self, tangents, delta):
            bent = [6 * self.x * tangents[0] * delta] if self.receives else []
            return 3 * self.x**2 * tangents[0], bent

    agrees(lambda z, p: cube(z) * p)
    agrees(lambda z, p: cube(z, power=2) * p)  # falls back on autograd of the call
    assert set(seen) == {3, 2}
    with pytest.raises(FastjacError, match="cube has the rule CubeRule already"):
        register_rule(cube)(CubeRule)


def test_a_function_without_a_rule_is_differentiated_alone():
    agrees(lambda z, p: cube(z) * p)


def test_a_call_that_pytorch_cannot_differentiate_twice_is_refused():
    model = network(lambda z, p: torch._C._nn.hardsigmoid(z) * p)
    out = with_jacobian(model, images(), LabelLogit(), LABELS)
    with pytest.raises(
        FastjacError, match=r"hardsigmoid has no second derivative .*not implemented"
    ):
        out.jacobian.square().sum().backward()


def rounded(z: Tensor) -> Tensor:
    """A function of the user's own that gives a constant."""
    if torch.overrides.has_torch_function_unary(z) or torch._C._len_torch_function_stack():
        return torch.overrides.handle_torch_function(rounded, (z,), z)
    return z.detach().mul(4).round()


def test_a_function_without_a_derivative_is_a_constant():
    agrees(lambda z, p: rounded(z) * p + z.sin())


@pytest.mark.parametrize(
    ("functions", "rule", "message"),
    [
        ((torch.conv2d,), Rule, "has the rule .* already"),
        ((torch.fliplr,), int, "expected a subclass of Rule, got <class 'int'>"),
        ((torch.fliplr,), Rule((0,)), "expected a subclass of Rule"),
        ((), Rule, "got none"),
        (("fliplr",), Rule, "expected functions, got 'fliplr'"),
        ((torch.fliplr, torch.add), Rule, "add has the rule .* already"),
    ],
)
def test_bad_registrations(functions, rule, message, registry):
    with pytest.raises(FastjacError, match=message):
        register_rule(*functions)(rule)
    assert torch.fliplr not in _RULES


def test_a_partial_of_a_function_is_recorded():
    agrees(lambda z, p: functools.partial(torch.add, alpha=2)(z, p))
