"""norm_act_pool and its derivatives, by themselves and as a step, against PyTorch's chain.

Bytes that must move, u being S and y being Y bytes: every map is read once by each pass that needs it,
and written once. Forward: S + Y, and S for a residual. Backward: u and gy for the sums,
u, gy and gu for the write. Pushforward, fixed statistics: u, tu, gy and ty in one pass. Pushforward,
batch statistics: u, tu and gy for the sums, u, tu and ty, and u, tu, gy and the curvature.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastjac.ops import (
    NormActPool,
    channel_statistics,
    norm_act_pool,
    norm_act_pool_backward,
    norm_act_pool_backward_ref,
    norm_act_pool_pushforward,
    norm_act_pool_pushforward_ref,
    norm_act_pool_ref,
)

LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
# activation, pool, residual
KINDS = {
    "relu-2x2": ("relu", "2x2", False),
    "relu": ("relu", "none", False),
    "add-relu": ("relu", "none", True),
    "relu-3x3": ("relu", "3x3", False),
}
POOL = {
    "none": lambda a: a,
    "2x2": lambda a: F.max_pool2d(a, 2),
    "3x3": lambda a: F.max_pool2d(a, 3, 2, 1),
}
REFERENCE = "its reference"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

LAYOUT = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
DTYPE = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def parameters(u):
    mean, var = channel_statistics(u)
    ramp = torch.linspace(0.5, 1.5, u.shape[1], device=u.device)
    return ramp, 1 - ramp, mean, (var + 1e-5).rsqrt()


def close(got, expected, dtype) -> None:
    """In norm: of two near values in a window, another may have been chosen in float64."""
    for x, y in zip(got, expected, strict=True):
        if x is not None and x.numel():
            assert (x.double() - y.double()).norm() <= TOLERANCE[dtype] * y.double().norm() + 1e-6


@LAYOUT
@DTYPE
@KIND
def test_norm_act_pool(measure, device, maps, layout, dtype, kind):
    activation, pool, with_residual = kind
    u = maps(layout, dtype)
    residual = maps(layout, dtype) if with_residual else None
    args = (u, residual, *parameters(u), activation, 0.01, pool)
    y = norm_act_pool(*args)
    close([y], [norm_act_pool_ref(*args)], dtype)
    measure(device, (1 + with_residual) * u.nbytes + y.nbytes, lambda: norm_act_pool(*args))


@LAYOUT
@DTYPE
@KIND
def test_norm_act_pool_backward(measure, device, maps, layout, dtype, kind):
    activation, pool, with_residual = kind
    u = maps(layout, dtype)
    residual = maps(layout, dtype) if with_residual else None
    options = (u, residual, *parameters(u), activation, 0.01, pool)
    gy = maps(layout, dtype, norm_act_pool(*options).shape)
    args = (gy, *options, True, None, None, [True, with_residual, True, True])
    close(norm_act_pool_backward(*args), norm_act_pool_backward_ref(*args), dtype)
    inputs = (1 + with_residual) * u.nbytes
    measure(device, 3 * inputs + 2 * gy.nbytes, lambda: norm_act_pool_backward(*args))


@LAYOUT
@DTYPE
@KIND
@pytest.mark.parametrize("statistics", ["fixed", "batch"])
def test_norm_act_pool_pushforward(measure, device, maps, layout, dtype, kind, statistics):
    activation, pool, with_residual = kind
    u, tu = maps(layout, dtype), maps(layout, dtype)
    residual, tresidual = (maps(layout, dtype) if with_residual else None for _ in range(2))
    options = (u, residual, *parameters(u), activation, 0.01, pool)
    gy = maps(layout, dtype, norm_act_pool(*options).shape)
    batch = statistics == "batch"
    args = (tu, tresidual, gy, *options, statistics, batch)
    close(norm_act_pool_pushforward(*args), norm_act_pool_pushforward_ref(*args), dtype)
    # z's inputs are read by every pass; the tangents by all but, for tresidual, those that write ty
    n = 2 + with_residual
    fixed = (n + with_residual) * u.nbytes + 2 * gy.nbytes
    more = (n * u.nbytes + gy.nbytes) + (n + 1) * u.nbytes + gy.nbytes
    moved = fixed - gy.nbytes + more if batch else fixed
    reference = {REFERENCE: lambda: norm_act_pool_pushforward_ref(*args)}
    measure(device, moved, lambda: norm_act_pool_pushforward(*args), reference)


def pytorch(u, residual, weight, bias, activation, pool):
    n = F.batch_norm(u, None, None, weight, bias, True)
    z = n if residual is None else n + residual
    return POOL[pool](getattr(F, activation)(z, inplace=True))


def fused(u, residual, weight, bias, activation, pool):
    options = (True, 0.1, 1e-5, activation, 0.01, pool)
    return NormActPool.apply(u, residual, weight, bias, None, None, *options)[0]


def in_layout(tensors, layout):
    """Leaves like them, the maps in the layout."""
    return [
        x if x is None else x.detach().contiguous(memory_format=layout).requires_grad_()
        for x in tensors
    ]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "step"])
@LAYOUT
@DTYPE
@KIND
def test_block(measure, device, maps, layout, dtype, kind, backward):
    """The block in training, forward and as a whole, against PyTorch's chain in either layout."""
    activation, pool, with_residual = kind
    u, residual = maps(layout, dtype), maps(layout, dtype) if with_residual else None
    parameter = [x.to(dtype).requires_grad_() for x in parameters(u)[:2]]

    def run(f, ins, gy):
        """The block's result, and its gradients by what it was given."""
        y = f(*ins, *parameter, activation, pool)
        leaves = [x for x in (*ins, *parameter) if x is not None]
        return y, torch.autograd.grad(y, leaves, gy) if backward else ()

    ins = in_layout((u, residual), layout)
    with torch.no_grad():
        gy = maps(layout, dtype, fused(*ins, *parameter, activation, pool).shape)
    y, gradients = run(fused, ins, gy)
    # Against float64: PyTorch's own channels-last sums over this many float32 are off by 1e-4. Where two
    # values of a window are that near, its gradient goes to the other.
    exact = [None if x is None else x.detach().double().requires_grad_() for x in ins]
    expected = pytorch(*exact, *(x.double() for x in parameter), activation, pool)
    assert (y.double() - expected).norm() <= 100 * TOLERANCE[dtype] * expected.norm()
    if backward and dtype == torch.float32:
        truth = torch.autograd.grad(expected, exact[0], gy.double())[0]
        assert (gradients[0].double() - truth).norm() <= 3e-2 * truth.norm()
        del truth
    del y, gradients, expected, exact

    def chain(name):
        other = in_layout((u, residual), LAYOUTS[name])
        gradient = gy.contiguous(memory_format=LAYOUTS[name])
        return lambda: run(pytorch, other, gradient)

    read = (1 + with_residual) * u.nbytes
    moved = u.nbytes + read + gy.nbytes + (3 * read + 2 * gy.nbytes if backward else 0)
    chains = {f"PyTorch's {name}": chain(name) for name in LAYOUTS}
    measure(device, moved, lambda: run(fused, ins, gy), chains)
