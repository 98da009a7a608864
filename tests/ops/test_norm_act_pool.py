"""norm_act_pool and its derivatives against their equations, and against PyTorch's own chain."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from norm_act_pool_case import (
    ACTIVATE,
    ACTIVATION,
    DTYPE,
    EPS,
    EXACT,
    LAYOUT,
    LINEAR,
    POOL,
    POOLS,
    RESIDUAL,
    SLOPE,
    Case,
    chain,
    compare,
    leaves,
)
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
    norm_act_pool_ref,
)

OPS = torch.ops.fastjac


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
