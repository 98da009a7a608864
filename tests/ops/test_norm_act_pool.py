"""norm_act_pool and its derivatives against their equations, and against PyTorch's own chain."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastjac import FastjacError
from fastjac.ops import (
    NormActPool,
    channel_statistics,
    channel_statistics_ref,
    norm_act_pool,
    norm_act_pool_backward,
    norm_act_pool_backward_ref,
    norm_act_pool_pushforward,
    norm_act_pool_pushforward_ref,
    norm_act_pool_ref,
)

OPS = torch.ops.fastjac
SLOPE, EPS = 0.2, 1e-5
ACTIVATE = {
    "none": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda z: F.leaky_relu(z, SLOPE),
    "silu": F.silu,
}
POOL = {
    "none": lambda a: a,
    "2x2": lambda a: F.max_pool2d(a, 2),
    "3x3": lambda a: F.max_pool2d(a, 3, 2, 1),
    "3x3-unpadded": lambda a: F.max_pool2d(a, 3, 2),
}
LINEAR = [a for a in ACTIVATE if a != "silu"]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

ACTIVATION = pytest.mark.parametrize("activation", ACTIVATE)
POOLS = pytest.mark.parametrize("pool", POOL)
RESIDUAL = pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
EXACT = {"rtol": 1e-10, "atol": 1e-11}


class Case:
    """Random arguments of one call: on a grid, so that windows have ties and z sits on the kinks."""

    def __init__(
        self,
        *shape: int,
        with_residual: bool = False,
        pool: str = "none",
        device: str = "cpu",
        dtype: torch.dtype = torch.float64,
        layout: torch.memory_format = torch.contiguous_format,
        grid: float | None = None,
        seed: int = 0,
    ) -> None:
        make = torch.Generator().manual_seed(seed)

        def random(*size: int) -> Tensor:
            x = torch.randn(size, generator=make, dtype=torch.float64)
            return x if grid is None else (x / grid).round() * grid

        def maps(*size: int) -> Tensor:
            x = random(*size).to(device, dtype).contiguous(memory_format=layout)
            assert x.device.type == device
            return x

        channels, acc = shape[1], torch.float64 if dtype == torch.float64 else torch.float32
        self.u = maps(*shape)
        self.residual = maps(*shape) if with_residual else None
        self.tu, self.curvature = maps(*shape), maps(*shape)
        self.tresidual = maps(*shape) if with_residual else None
        self.gy = maps(*out_shape(shape, pool))
        if grid is None:
            self.weight, self.bias = random(channels) + 0.1, random(channels)
            self.mean, var = channel_statistics_ref(self.u.double().cpu())
            self.invstd = (var + EPS).rsqrt()
        else:
            sign = torch.tensor([1.0, -1.0]).repeat(channels)[:channels].double()
            self.weight, self.bias = 2 * sign, random(channels)
            self.mean, self.invstd = random(channels), torch.full_like(sign, 0.5)
        self.coefficient = random(channels)
        for name in ("weight", "bias", "mean", "invstd", "coefficient"):
            setattr(self, name, getattr(self, name).to(device, acc))

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        return self.u, self.residual, self.weight, self.bias, self.mean, self.invstd

    def forward(self, f, activation: str, pool: str):
        return f(*self.inputs, activation, SLOPE, pool)

    def backward(self, f, activation: str, pool: str, training: bool, added: bool, mask=None):
        more = (self.coefficient, self.curvature) if added else (None, None)
        mask = [True, self.residual is not None, True, True] if mask is None else mask
        return f(self.gy, *self.inputs, activation, SLOPE, pool, training, *more, mask)

    def pushforward(self, f, activation: str, pool: str, statistics: str, curvature: bool):
        tangents = (self.tu, self.tresidual, self.gy)
        return f(*tangents, *self.inputs, activation, SLOPE, pool, statistics, curvature)

    def everything(self, native: bool, activation: str, pool: str) -> dict[str, Tensor]:
        """All results of all operators, by name."""
        ops = (norm_act_pool, norm_act_pool_backward, norm_act_pool_pushforward)
        refs = (norm_act_pool_ref, norm_act_pool_backward_ref, norm_act_pool_pushforward_ref)
        forward, backward, pushforward = ops if native else refs
        results = {"y": self.forward(forward, activation, pool)}
        names = ("gu", "gresidual", "gweight", "gbias")
        for training, added in ((True, True), (False, False)):
            got = self.backward(backward, activation, pool, training, added)
            results.update({f"{n} {training}": x for n, x in zip(names, got, strict=True)})
        if activation != "silu":
            names = ("ty", "T", "coefficient", "kappa")
            for statistics in ("fixed", "batch"):
                curve = statistics == "batch"
                got = self.pushforward(pushforward, activation, pool, statistics, curve)
                results.update({f"{n} {statistics}": x for n, x in zip(names, got, strict=True)})
        return {n: x for n, x in results.items() if x is not None and x.numel()}

    def double(self) -> Case:
        """The same numbers in float64."""
        other = Case.__new__(Case)
        for name, x in vars(self).items():
            setattr(other, name, x if x is None else x.double())
        return other


def out_shape(shape: tuple[int, ...], pool: str) -> tuple[int, ...]:
    if min(shape) == 0:
        return (*shape[:2], *POOL[pool](torch.empty(1, 1, *shape[2:])).shape[2:])
    return tuple(POOL[pool](torch.empty(shape)).shape)


def compare(got: dict[str, Tensor], expected: dict[str, Tensor], **tolerance) -> None:
    assert got.keys() == expected.keys()
    for name, x in got.items():
        y = expected[name].to(x.dtype)
        torch.testing.assert_close(x, y, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


# PyTorch's own chain.


def chain(u, residual, weight, bias, activation, pool, training=True, running=(None, None), m=0.1):
    n = F.batch_norm(u, *running, weight, bias, training, m, EPS)
    return POOL[pool](ACTIVATE[activation](n if residual is None else n + residual))


def leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.detach().clone().requires_grad_() for x in tensors]


@RESIDUAL
@POOLS
@ACTIVATION
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_the_function_is_pytorchs_chain(device, activation, pool, with_residual, training):
    case = Case(3, 5, 7, 6, with_residual=with_residual, pool=pool, device=device)
    running = [case.mean + 0.3, case.invstd * 1.5]
    ours_running = [x.clone() for x in running]
    ins = (case.u, case.residual, case.weight, case.bias)
    theirs, ours = leaves(*ins), leaves(*ins)
    expected = chain(*theirs, activation, pool, training, running, 0.3)
    y, mean, invstd, _, _ = NormActPool.apply(
        *ours, *ours_running, training, 0.3, EPS, activation, SLOPE, pool
    )
    assert not mean.requires_grad
    assert not invstd.requires_grad
    torch.testing.assert_close(y, expected, **EXACT)
    torch.testing.assert_close(ours_running, running, **EXACT)
    y.backward(case.gy)
    expected.backward(case.gy)
    for x, e in zip(ours, theirs, strict=True):
        if x is not None:
            torch.testing.assert_close(x.grad, e.grad, **EXACT)


@RESIDUAL
@POOLS
@pytest.mark.parametrize("activation", LINEAR)
@pytest.mark.parametrize("statistics", ["batch", "fixed"])
def test_pushforward_is_the_double_backward(device, activation, pool, with_residual, statistics):
    """T, coefficient and curvature: the gradient of <v, J> by autograd on PyTorch's operations."""
    case = Case(3, 5, 7, 6, with_residual=with_residual, pool=pool, device=device)
    u, residual, weight, bias = leaves(case.u, case.residual, case.weight, case.bias)
    gy = case.gy.clone().requires_grad_()
    seen = u
    if statistics == "fixed":  # the statistics come from u, and J is taken at a leaf of its own
        seen = u.detach().clone().requires_grad_()
    var, mean = torch.var_mean(u, (0, 2, 3), correction=0)
    scale = weight * (var + EPS).rsqrt()
    n = (seen - mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
    z = n if residual is None else n + residual
    y = POOL[pool](ACTIVATE[activation](z))
    at = [x for x in (seen, residual) if x is not None]
    J = torch.autograd.grad(y, at, gy, create_graph=True)
    inner = sum((j * t).sum() for j, t in zip(J, (case.tu, case.tresidual), strict=False))
    ty, curvature, T = torch.autograd.grad(inner, (gy, u, weight))

    got = case.pushforward(
        norm_act_pool_pushforward, activation, pool, statistics, statistics == "batch"
    )
    xhat = (case.u - case.mean.view(1, -1, 1, 1)) * case.invstd.view(1, -1, 1, 1)
    total = got[2].view(1, -1, 1, 1) * xhat + (0 if got[3] is None else got[3])
    torch.testing.assert_close(got[0], ty, **EXACT)
    torch.testing.assert_close(got[1], T, **EXACT)
    torch.testing.assert_close(total, curvature, **EXACT)


# The native operators and the equations.

SHAPES = {
    "odd": (2, 19, 7, 9),
    "vectors and more": (2, 33, 6, 70),
    "tall": (1, 3, 67, 5),
    "one pixel": (5, 18, 1, 1),
    "one channel": (3, 1, 8, 40),
    "one row": (2, 17, 1, 43),
    "one column": (2, 4, 43, 1),
}


def fits(shape: tuple[int, ...], pool: str) -> bool:
    return min(shape[2:]) >= {"none": 1, "2x2": 2, "3x3": 1, "3x3-unpadded": 3}[pool]


@LAYOUT
@POOLS
@pytest.mark.parametrize("name", SHAPES)
def test_matches_the_reference(device, name, pool, layout):
    """In float64, for every activation, on values with ties and kinks and on values without."""
    if not fits(SHAPES[name], pool):
        with pytest.raises(FastjacError, match=rf"pool '{pool}' needs a map of at least"):
            Case(*SHAPES[name]).forward(norm_act_pool, "relu", pool)
        return
    kinds = ((True, None), (False, 0.5))
    for activation, (with_residual, grid) in itertools.product(ACTIVATE, kinds):
        case = Case(
            *SHAPES[name],
            with_residual=with_residual,
            pool=pool,
            device=device,
            layout=layout,
            grid=grid,
        )
        got, expected = (case.everything(native, activation, pool) for native in (True, False))
        compare(got, expected, **EXACT)
        assert all(got[k].stride() == expected[k].stride() for k in got)


@DTYPE
@LAYOUT
@POOLS
@RESIDUAL
def test_matches_the_reference_in_every_dtype(device, dtype, layout, pool, with_residual):
    """On a grid of numbers that even float16 holds, so that every dtype makes the same choices."""
    for activation in ACTIVATE:
        case = Case(
            *(2, 21, 9, 38),
            with_residual=with_residual,
            pool=pool,
            device=device,
            dtype=dtype,
            layout=layout,
            grid=0.5,
        )
        got = case.everything(True, activation, pool)
        expected = case.double().everything(False, activation, pool)
        for name, x in got.items():
            spread = expected[name].abs().max()
            eps = torch.finfo(x.dtype).eps
            error = (x.double() - expected[name]).abs().max()
            assert error <= 8 * eps * spread, (activation, name, error / spread)


def relative(x: Tensor, y: Tensor) -> float:
    return ((x.double() - y).norm() / y.norm()).item()


def apart(dtype: torch.dtype, pool: str, device: str, layout: torch.memory_format) -> Case:
    """Its values are so far from each other that in every dtype each window chooses the same."""
    options = {"with_residual": True, "pool": pool, "device": device, "layout": layout}
    case = Case(4, 24, 28, 30, dtype=dtype, **options)
    if dtype in (torch.bfloat16, torch.float16):
        order = torch.argsort(torch.rand(case.u[0, 0].numel(), generator=torch.Generator()))
        ramp = (order.to(case.u.device) / len(order) * 4 - 2).view(1, 1, *case.u.shape[2:])
        case.u.copy_(ramp.expand_as(case.u))
        case.residual.copy_(case.u * (case.weight.sign() / 2).view(1, -1, 1, 1))
    return case


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@LAYOUT
@POOLS
@ACTIVATION
def test_error_at_most_twice_pytorchs(device, dtype, layout, pool, activation):
    """Forward and backward of the whole function, both against float64 with the same choices."""
    case = apart(dtype, pool, device, layout)
    ins = (case.u, case.residual, case.weight.to(dtype), case.bias.to(dtype))

    def run(double: bool, native: bool) -> list[Tensor]:
        tensors = leaves(*((x.double() for x in ins) if double else ins))
        if native:
            options = (True, 0.1, EPS, activation, SLOPE, pool)
            y = NormActPool.apply(*tensors, None, None, *options)[0]
        else:
            y = chain(*tensors, activation, pool)
        y.backward(case.gy.to(y.dtype))
        return [y.detach(), *(x.grad for x in tensors)]

    truth = run(True, False)
    names = ("y", "gu", "gresidual", "gweight", "gbias")
    results = (run(False, True), run(False, False), truth)
    for name, ours, theirs, exact in zip(names, *results, strict=True):
        allowed = 2 * relative(theirs, exact) + torch.finfo(dtype).eps / 64
        assert relative(ours, exact) <= allowed, name


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@LAYOUT
@POOLS
@pytest.mark.parametrize("activation", LINEAR)
@pytest.mark.parametrize("statistics", ["batch", "fixed"])
def test_pushforward_error_at_most_twice_pytorchs(
    device, dtype, layout, pool, activation, statistics
):
    """y's tangent, T and u's cotangent, by PyTorch's double backward of its own chain."""
    case, batch = apart(dtype, pool, device, layout), statistics == "batch"
    acc = case.weight.dtype
    case.weight, case.bias = (x.to(dtype).to(acc) for x in (case.weight, case.bias))
    case.mean, var = channel_statistics(case.u)
    case.invstd = (var + EPS).rsqrt()

    def run(kind: torch.dtype) -> list[Tensor]:
        ins = (case.u, case.residual, case.weight, case.bias, case.gy)
        u, residual, weight, bias, gy = leaves(*(x.to(kind) for x in ins))
        running = (None, None) if batch else (case.mean.to(kind), var.to(kind))
        y = chain(u, residual, weight, bias, activation, pool, batch, running)
        J = torch.autograd.grad(y, (u, residual), gy, create_graph=True)
        tangents = (case.tu.to(kind), case.tresidual.to(kind))
        inner = sum((j * t).sum() for j, t in zip(J, tangents, strict=True))
        return list(torch.autograd.grad(inner, (gy, weight, u) if batch else (gy, weight)))

    ty, T, coefficient, curvature = case.pushforward(
        norm_act_pool_pushforward, activation, pool, statistics, batch
    )
    ours = [ty, T]
    if batch:
        x = case.u.double()
        xhat = (x - x.mean((0, 2, 3), True)) * case.invstd.double().view(1, -1, 1, 1)
        ours.append(coefficient.double().view(1, -1, 1, 1) * xhat + curvature)
    results = (ours, run(dtype), run(torch.float64))
    for name, got, theirs, exact in zip(("ty", "T", "gu"), *results, strict=False):
        # T's terms cancel: in float32, channels-last, it has up to 2.7 times PyTorch's error.
        slack = torch.finfo(acc).eps if name == "T" else torch.finfo(dtype).eps / 64
        assert relative(got, exact) <= 2 * relative(theirs, exact) + slack, name


@POOLS
@LAYOUT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.04, 0.0004])
def test_relu_keeps_each_nan_where_it_is_fastest(device, dtype, pool, layout, share):
    """Whole vectors of windows and a rest; a NaN of either sign, first or last in a window; everywhere,
    or in few of the rows."""
    case = Case(2, 18, 8, 70, pool=pool, device=device, layout=layout, dtype=dtype)
    nan = torch.rand(case.u.shape, generator=torch.Generator().manual_seed(0)).to(device)
    case.u[nan < share], case.u[nan > 1 - share] = float("nan"), -float("nan")
    got, expected = (case.forward(f, "relu", pool) for f in (norm_act_pool, norm_act_pool_ref))
    assert 0 < expected.isnan().sum() < expected.numel()
    assert torch.equal(got.isnan(), expected.isnan())
    channels = expected.isnan().any(3).any(2).any(0)

    mask = [True, False, True, True]
    got = case.backward(norm_act_pool_backward, "relu", pool, False, False, mask)
    expected = case.backward(norm_act_pool_backward_ref, "relu", pool, False, False, mask)
    assert expected[0][case.u.isnan()].count_nonzero() > 0
    assert torch.equal(got[0][case.u.isnan()] != 0, expected[0][case.u.isnan()] != 0)
    assert torch.equal(got[2].isnan(), channels)  # no window may look at a NaN
    torch.testing.assert_close(got[3], expected[3], rtol=1e-4, atol=1e-4)


@POOLS
@ACTIVATION
@LAYOUT
def test_nan_and_inf_as_in_pytorch(device, activation, pool, layout):
    case = Case(2, 18, 8, 36, pool=pool, device=device, layout=layout)
    flat = case.u.permute(0, 2, 3, 1).reshape(-1)  # a view or a copy
    flat[5::23], flat[7::41], flat[11::37] = float("nan"), float("inf"), -float("inf")
    case.u.copy_(flat.view(2, 8, 36, 18).permute(0, 3, 1, 2))
    got, expected = (case.forward(f, activation, pool) for f in (norm_act_pool, norm_act_pool_ref))
    assert expected.isnan().any()
    torch.testing.assert_close(got, expected, equal_nan=True, **EXACT)

    case.residual = torch.zeros_like(case.u)
    same = torch.ones_like(case.u, dtype=torch.bool)
    if activation == "relu6":  # PyTorch's own vectors and single numbers differ at a NaN
        same = ~case.u.isnan()
    elif activation == "silu":  # where no window looks, PyTorch has 0 times NaN, and we have 0
        same = case.u.isfinite()
    for sums in (False, True):  # fixed statistics: neither cotangent is of u's own value
        mask = [True, True, sums, sums]
        got = case.backward(norm_act_pool_backward, activation, pool, False, False, mask)
        expected = case.backward(norm_act_pool_backward_ref, activation, pool, False, False, mask)
        for x, y in zip(got[:2], expected[:2], strict=True):
            torch.testing.assert_close(x[same], y[same], equal_nan=True, **EXACT)
            assert x[case.u.isfinite()].isfinite().all()


def strided_views(device: str) -> dict[str, Tensor]:
    u = Case(4, 6, 12, 10, device=device).u
    last = u.contiguous(memory_format=torch.channels_last)
    return {
        "crop": u[:, :, 2:9, 1:8],
        "channels-last crop": last[:, :, 2:9, 1:8],
        "transposed": u.transpose(2, 3),
        "every other channel": u[:, ::2],
        "expanded": u[:1].expand(4, -1, -1, -1),
        "batch innermost": u.permute(1, 2, 3, 0),
        "flipped roles": u.permute(3, 1, 0, 2),
    }


@pytest.mark.parametrize("view", strided_views("cpu"))
def test_any_strides(device, view):
    u = strided_views(device)[view]
    case = Case(*u.shape, with_residual=True, pool="2x2", device=device)
    case.u = u
    case.gy = case.gy.contiguous(memory_format=torch.channels_last)
    case.tu = case.tu.transpose(2, 3).contiguous().transpose(2, 3)
    compare(case.everything(True, "relu", "2x2"), case.everything(False, "relu", "2x2"), **EXACT)
    torch.testing.assert_close(channel_statistics(u), channel_statistics_ref(u), **EXACT)


@LAYOUT
@POOLS
@pytest.mark.parametrize("shape", [(0, 3, 4, 6), (2, 0, 4, 6)], ids=str)
def test_empty(device, shape, pool, layout):
    case = Case(*shape, with_residual=True, pool=pool, device=device, layout=layout)
    y = case.forward(norm_act_pool, "relu", pool)
    assert y.shape == case.gy.shape
    gu, gresidual, gweight, gbias = case.backward(norm_act_pool_backward, "relu", pool, True, True)
    assert gu.shape == gresidual.shape == shape
    assert gweight.shape == gbias.shape == shape[1:2]
    assert gweight.count_nonzero() == gbias.count_nonzero() == 0
    ty, T, _, _ = case.pushforward(norm_act_pool_pushforward, "relu", pool, "batch", True)
    assert ty.shape == y.shape
    assert T.count_nonzero() == 0
    assert all(x.shape == shape[1:2] for x in channel_statistics(case.u))


@LAYOUT
@POOLS
@pytest.mark.parametrize("shape", [(2, 3, 0, 4), (2, 3, 4, 0)], ids=str)
def test_a_map_without_pixels(device, shape, pool, layout):
    """Is as empty as a batch without samples; no pool accepts it."""
    if pool == "none":
        test_empty(device, shape, pool, layout)
        return
    case = Case(*shape, with_residual=True, device=device, layout=layout)
    for f in (
        lambda: case.forward(norm_act_pool, "relu", pool),
        lambda: case.backward(norm_act_pool_backward, "relu", pool, True, True),
        lambda: case.pushforward(norm_act_pool_pushforward, "relu", pool, "batch", True),
    ):
        with pytest.raises(FastjacError, match=f"pool '{pool}' needs a map of at least"):
            f()


@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=4)), ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_what_is_not_wanted_is_none(device, mask, training):
    case = Case(2, 5, 6, 6, with_residual=True, pool="2x2", device=device)
    got = case.backward(norm_act_pool_backward, "relu", "2x2", training, True, mask)
    everything = case.backward(norm_act_pool_backward_ref, "relu", "2x2", training, True)
    for wanted, x, expected in zip(mask, got, everything, strict=True):
        if wanted:
            torch.testing.assert_close(x, expected, **EXACT)
        else:
            assert x is None


# Autograd.


@POOLS
@ACTIVATION
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(device, activation, pool, training):
    case = Case(2, 2, 4, 5, with_residual=True, pool=pool, device=device)
    running = (case.mean, case.invstd)

    def f(u, residual, weight, bias):
        stats = (None, None) if training else running
        options = (training, 0.1, EPS, activation, SLOPE, pool)
        return NormActPool.apply(u, residual, weight, bias, *stats, *options)[0]

    ins = leaves(case.u, case.residual, case.weight, case.bias)
    assert torch.autograd.gradcheck(f, ins, fast_mode=True)


@LAYOUT
def test_slots_add_to_the_inputs_cotangent(device, layout):
    case = Case(2, 5, 6, 6, pool="2x2", device=device, layout=layout)
    u, weight, bias = leaves(case.u, case.weight, case.bias)
    options = (True, 0.1, EPS, "relu", SLOPE, "2x2")
    outs = NormActPool.apply(u, None, weight, bias, None, None, *options)
    assert outs[4].untyped_storage().nbytes() <= 8
    into = (case.gy, case.coefficient, case.curvature)
    got = torch.autograd.grad((outs[0], *outs[3:]), (u, weight, bias), into, retain_graph=True)
    gu, _, gweight, gbias = case.backward(norm_act_pool_backward_ref, "relu", "2x2", True, True)
    torch.testing.assert_close(got, (gu, gweight, gbias), **EXACT)

    (slots,) = torch.autograd.grad(outs[3:], u, into[1:])  # y has no gradient
    case.gy.zero_()
    expected = case.backward(norm_act_pool_backward_ref, "relu", "2x2", True, True)[0]
    torch.testing.assert_close(slots, expected, **EXACT)


def test_keeps_its_input_alone(device):
    case = Case(2, 4, 8, 8, pool="2x2", device=device)
    u, weight, bias = leaves(case.u, case.weight, case.bias)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        NormActPool.apply(u, None, weight, bias, None, None, True, 0.1, EPS, "relu", SLOPE, "2x2")
    assert [x.data_ptr() for x in kept if x.dim() > 1] == [u.data_ptr()]


@DTYPE
@LAYOUT
def test_opcheck(device, dtype, layout):
    case = Case(
        2, 3, 5, 7, with_residual=True, pool="3x3", device=device, dtype=dtype, layout=layout
    )
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    check = torch.library.opcheck
    check(OPS.channel_statistics.default, (case.u,), test_utils=utils)
    check(OPS.norm_act_pool.default, (*case.inputs, "relu", SLOPE, "3x3"), test_utils=utils)
    for mask in ([True] * 4, [True, False, False, True]):
        args = (*case.inputs, "relu", SLOPE, "3x3", True, case.coefficient, case.curvature, mask)
        check(OPS.norm_act_pool_backward.default, (case.gy, *args), test_utils=utils)
    for statistics, curvature in (("fixed", False), ("batch", True)):
        tangents = (case.tu, case.tresidual, case.gy)
        args = (*tangents, *case.inputs, "relu", SLOPE, "3x3", statistics, curvature)
        check(OPS.norm_act_pool_pushforward.default, args, test_utils=utils)


# Over u.


@DTYPE
@LAYOUT
@POOLS
@ACTIVATION
def test_overwriting_u_gives_the_same_bits(device, dtype, layout, pool, activation):
    sizes = ((2, 19, 7, 9), (2, 33, 6, 70), (1, 4, 5, 5))
    for shape, training in itertools.product(sizes, (True, False)):
        case = Case(
            *shape,
            with_residual=shape[1] == 19,
            pool=pool,
            device=device,
            dtype=dtype,
            layout=layout,
        )
        expected = case.backward(norm_act_pool_backward, activation, pool, training, True)
        place = case.u.data_ptr()
        overwriting = functools.partial(norm_act_pool_backward, overwrite=True)
        got = case.backward(overwriting, activation, pool, training, True)
        assert (got[0].data_ptr() == place) == (device == "cpu")
        for x, y in zip(got, expected, strict=True):
            assert (x is None and y is None) or torch.equal(x, y)


@POOLS
@ACTIVATION
@pytest.mark.parametrize("wants_residual", [False, True])
def test_u_stays_where_its_cotangent_is_not_wanted(device, activation, pool, wants_residual):
    case = Case(2, 5, 6, 6, with_residual=True, pool=pool, device=device)
    u, mask = case.u.clone(), [False, wants_residual, False, False]
    expected = case.backward(norm_act_pool_backward, activation, pool, True, False, mask)
    overwriting = functools.partial(norm_act_pool_backward, overwrite=True)
    got = case.backward(overwriting, activation, pool, True, False, mask)
    assert got[0] is None
    assert torch.equal(case.u, u)
    if wants_residual:
        assert torch.equal(got[1], expected[1])


def test_overwriting_what_requires_grad_is_an_error():
    case = Case(2, 5, 6, 6)
    case.bias.requires_grad_()
    overwriting = functools.partial(norm_act_pool_backward, overwrite=True)
    with pytest.raises(FastjacError, match="no input that requires grad with overwrite=True"):
        case.backward(overwriting, "relu", "none", True, False)


def test_opcheck_over_u():
    case = Case(2, 3, 5, 7, with_residual=True, pool="3x3")
    args = (*case.inputs, "relu", SLOPE, "3x3", True, case.coefficient, case.curvature, [True] * 4)
    utils = ("test_schema", "test_faketensor")
    op = OPS.norm_act_pool_backward_.default
    torch.library.opcheck(op, (case.gy, *args), test_utils=utils)


# The same bits.


def digest(device: str) -> str:
    """Of the bits of results over layouts, pools, dtypes and activations, of several chunks each."""
    bits = hashlib.sha256()
    kinds = zip(DTYPES, ("relu", "leaky_relu", "silu", "relu6"), strict=True)
    for layout, (dtype, activation) in itertools.product(LAYOUTS.values(), kinds):
        for pool in POOL:
            options = {"pool": pool, "device": device, "dtype": dtype, "layout": layout}
            case = Case(3, 37, 41, 44, with_residual=True, **options)
            results = [
                *channel_statistics(case.u),
                *case.everything(True, activation, pool).values(),
            ]
            for x in results:
                bits.update(x.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return bits.hexdigest()


def test_bits_are_the_same_from_run_to_run_and_for_any_thread_count(device):
    first, threads = digest(device), torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            assert digest(device) == first
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_read_and_rounded_as_in_pytorch(device, dtype, layout):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=device).to(torch.int16)
    u = bits.view(dtype).reshape(1, 64, 32, 32).contiguous(memory_format=layout)
    mean, scale = torch.zeros(64, device=device), torch.linspace(-3, 3, 64, device=device)
    y = norm_act_pool(u, None, None, None, mean, scale, "none", 0.0, "none")
    expected = (u.float() * scale[:, None, None]).to(dtype)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", ["weight", "bias", "mean", "invstd", "coefficient"])
@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001])
def test_whatever_nan_a_parameter_is_nans_come_out(device, dtype, which, bits):
    """Rounded by its bits alone, one with all of them set would become a zero."""
    u = torch.randn(2, 3, 4, 35, device=device).to(dtype)
    p = {name: torch.ones(3, device=device) for name in ("weight", "bias", "mean", "invstd")}
    coefficient = torch.ones(3, device=device)
    changed = coefficient if which == "coefficient" else p[which]
    changed.view(torch.int32)[1] = bits
    rest = (*p.values(), "none", 0.0, "none")
    y = norm_act_pool(u, None, *rest)
    gu = norm_act_pool_backward(
        u, u, None, *rest, False, coefficient, None, [True, False, False, False]
    )[0]
    got = {"bias": [y], "coefficient": [gu]}.get(which, [y, gu])
    for x in got:
        assert x[:, 1].isnan().all()
        assert not x[:, [0, 2]].isnan().any()


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_bits_are_the_same_for_any_instruction_set(isa):
    env = {**os.environ, "FASTJAC_CPU_ISA": isa}
    code = (
        f"import importlib.util as u; s = u.spec_from_file_location('t', {__file__!r}); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); "
        "from fastjac.info import report; print(report()); print(m.digest('cpu'))"
    )
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    if f"yes, {isa}" not in out.stdout:
        pytest.skip(f"the CPU operators do not run on {isa} here:\n{out.stdout}")
    assert out.stdout.split()[-1] == digest("cpu")
