"""How norm_act_pool and its derivatives round: against PyTorch's own chain, and always the same."""

from __future__ import annotations

import hashlib
import itertools

import pytest
import torch
from instruction_set import evaluate_on
from norm_act_pool_case import (
    ACTIVATION,
    DTYPES,
    EPS,
    LAYOUT,
    LAYOUTS,
    LINEAR,
    POOL,
    POOLS,
    SLOPE,
    Case,
    chain,
    leaves,
)
from torch import Tensor

from fastjac.ops import (
    NormActPool,
    channel_statistics,
    norm_act_pool,
    norm_act_pool_backward,
    norm_act_pool_pushforward,
)


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
    assert evaluate_on(isa, __file__, "m.digest('cpu')") == digest("cpu")
