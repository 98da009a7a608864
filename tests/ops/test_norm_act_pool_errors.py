"""What norm_act_pool and its derivatives refuse, and how they say so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastjac import FastjacError
from fastjac.ops import (
    NormActPool,
    channel_statistics,
    norm_act_pool,
    norm_act_pool_backward,
    norm_act_pool_pushforward,
)

NAMES = ("u", "residual", "weight", "bias", "mean", "invstd")


def arguments(device: str = "cpu") -> dict[str, Tensor | None]:
    """Of norm_act_pool, without its options."""
    make = torch.Generator().manual_seed(0)
    u = torch.randn(2, 3, 4, 5, generator=make, dtype=torch.float64).to(device)
    one = torch.ones(3, dtype=torch.float64, device=device)
    return dict(zip(NAMES, (u, None, one, one, one, one), strict=True))


BAD = {
    "u must be a tensor, got list": {"u": [1.0]},
    r"u must be one of torch\.float64, .*, got torch\.int64": {"u": lambda u: u.long()},
    r"u must be \[B, C, H, W\], got \[3, 4\]": {"u": lambda u: u[0, :, :, 0]},
    "residual must be a tensor, got int": {"residual": 3},
    r"residual must have u's shape, \[2, 3, 4, 5\], got \[2, 3, 4, 4\]": {
        "residual": lambda u: u[..., :4]
    },
    r"residual must have u's dtype, torch\.float64, got torch\.float32": {
        "residual": lambda u: u.float()
    },
    r"residual must have u's device, cpu, got meta": {"residual": lambda u: u.to("meta")},
    r"u must be a strided tensor, got torch\.sparse_coo": {"u": lambda u: u.to_sparse()},
    r"residual must be a strided tensor, got torch\.sparse_coo": {
        "residual": lambda u: u.to_sparse()
    },
    r"mean must be a strided tensor, got torch\.sparse_coo": {
        "mean": lambda u: u[0, :, 0, 0].to_sparse()
    },
    r"weight must be of a floating dtype, got torch\.int64": {
        "weight": lambda u: u[0, :, 0, 0].long()
    },
    r"invstd must be of a floating dtype, got torch\.complex128": {
        "invstd": lambda u: u[0, :, 0, 0] + 0j
    },
    r"weight must be \[3\], got \[2\]": {"weight": lambda u: u[0, :2, 0, 0]},
    "bias must have u's device, cpu, got meta": {"bias": lambda u: u[0, :, 0, 0].to("meta")},
    "mean must be a tensor, got NoneType": {"mean": None},
    "activation must be one of 'none', 'relu', .*, got 'gelu'": {"activation": "gelu"},
    "slope must be a number, got str": {"slope": "a"},
    "pool must be one of 'none', '2x2', .*, got '5x5'": {"pool": "5x5"},
    "pool '2x2' needs a map of at least 2x2, got 1x5": {"u": lambda u: u[:, :, :1], "pool": "2x2"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    args = arguments()
    changes = {k: x(args["u"]) if callable(x) else x for k, x in BAD[message].items()}
    with pytest.raises(FastjacError, match="^norm_act_pool: " + message):
        norm_act_pool(**{**args, **changes})


def test_bad_input_of_the_backward_is_named():
    args = arguments()
    for changes, message in (
        ({"pool": "2x2"}, r"gy must have y's shape, \[2, 3, 2, 2\], got \[2, 3, 4, 5\]"),
        ({"mask": (True, True)}, "mask must have 4 entries, got 2"),
        ({}, r"mask\[1\] asks for residual's cotangent, but residual is None"),
        ({"coefficient": torch.ones(2)}, r"coefficient must be \[3\], got \[2\]"),
        ({"curvature": args["u"][:1]}, "curvature must have u's shape"),
        ({"gy": [1.0]}, "gy must be a tensor, got list"),
        ({"gy": args["u"].float()}, r"gy must have u's dtype, torch\.float64, got torch\.float32"),
        ({"gy": args["u"][0]}, r"gy must have y's shape, \[2, 3, 4, 5\], got \[3, 4, 5\]"),
        ({"gy": args["u"].to_sparse()}, r"gy must be a strided tensor, got torch\.sparse_coo"),
        ({"u": args["u"].long()}, r"u must be one of .*, got torch\.int64"),
        ({"u": args["u"][0]}, r"u must be \[B, C, H, W\], got \[3, 4, 5\]"),
        ({"curvature": args["u"].float()}, "curvature must have u's dtype"),
        ({"coefficient": torch.ones(3).long()}, "coefficient must be of a floating dtype, got"),
        ({"invstd": None}, "invstd must be a tensor, got NoneType"),
    ):
        for overwrite in (False, True):
            given = {"gy": args["u"], **args, "overwrite": overwrite, **changes}
            with pytest.raises(FastjacError, match="^norm_act_pool_backward: " + message):
                norm_act_pool_backward(**given)


def test_bad_input_of_the_pushforward_is_named():
    args = arguments()
    u = args["u"]
    for changes, message in (
        ({"activation": "silu"}, "activation must be piecewise linear, got 'silu'"),
        ({"statistics": "running"}, r"statistics must be one of .*, got 'running'"),
        ({"curvature": True}, "curvature=True needs statistics='batch', got 'fixed'"),
        ({"pool": "3x3"}, "gy must have y's shape"),
        ({"tu": None}, "tu must be a tensor, got NoneType"),
        ({"tu": u[0]}, r"tu must have u's shape, \[2, 3, 4, 5\], got \[3, 4, 5\]"),
        ({"tu": u.float()}, r"tu must have u's dtype, torch\.float64, got torch\.float32"),
        ({"tu": u.to_sparse()}, r"tu must be a strided tensor, got torch\.sparse_coo"),
        ({"tresidual": u[:1]}, "tresidual must have u's shape"),
        ({"tresidual": u.half()}, "tresidual must have u's dtype"),
        ({"gy": u.long()}, "gy must have u's dtype"),
        ({"u": u.long()}, r"u must be one of .*, got torch\.int64"),
        ({"u": u[0]}, r"u must be \[B, C, H, W\], got \[3, 4, 5\]"),
        ({"bias": torch.ones(2)}, r"bias must be \[3\], got \[2\]"),
    ):
        with pytest.raises(FastjacError, match="^norm_act_pool_pushforward: " + message):
            norm_act_pool_pushforward(**{"tu": u, "tresidual": None, "gy": u, **args, **changes})


def test_bad_input_of_the_function_is_named():
    u, options = arguments()["u"], (0.1, 1e-5, "relu", 0.0, "none")
    with pytest.raises(FastjacError, match="training=False needs running_mean and running_var"):
        NormActPool.apply(u, *[None] * 5, False, *options)
    one = u[:1, :, :1, :1]
    with pytest.raises(FastjacError, match=r"more than 1 value per channel, got u \[1, 3, 1, 1\]"):
        NormActPool.apply(one, *[None] * 5, True, *options)


NATIVE_BAD = {
    "u must be Double, Float, BFloat16 or Half, got Long": {"u": lambda u: u.long()},
    "u must be contiguous or channels-last": {"u": lambda u: u.transpose(2, 3)},
    "residual must have u's layout": {
        "residual": lambda u: u.contiguous(memory_format=torch.channels_last)
    },
    "residual must have u's shape": {"residual": lambda u: u[:1]},
    "mean must be Double, got Float": {"mean": lambda u: u[0, :, 0, 0].float()},
    r"weight must be a contiguous \[3\], got \[2\]": {"weight": lambda u: u[0, :2, 0, 0].clone()},
    "activation must be 'none', .*, got 'gelu'": {"activation": "gelu"},
    "pool must be 'none', .*, got '5x5'": {"pool": "5x5"},
    "the pool needs a map of at least 2x2, got 1x5": {
        "u": lambda u: u[:, :, :1].clone(),
        "pool": "2x2",
    },
}


@pytest.mark.parametrize("message", NATIVE_BAD)
def test_the_operator_itself_names_bad_input(device, message):
    args = {**arguments(device), "activation": "relu", "slope": 0.0, "pool": "none"}
    changes = {k: x(args["u"]) if callable(x) else x for k, x in NATIVE_BAD[message].items()}
    with pytest.raises(RuntimeError, match="norm_act_pool: " + message):
        torch.ops.fastjac.norm_act_pool(**{**args, **changes})


MAPS = {
    "norm_act_pool_backward": ("gy", "residual", "curvature"),
    "norm_act_pool_backward_": ("gy", "residual", "curvature"),
    "norm_act_pool_pushforward": ("tu", "tresidual", "gy", "residual"),
}


@pytest.mark.parametrize("name", MAPS)
def test_the_derivatives_operators_name_bad_input(device, name):
    if name == "norm_act_pool_backward_" and device == "cuda":
        pytest.skip("u is overwritten on a CPU alone")
    args, op = arguments(device), getattr(torch.ops.fastjac, name)
    u, mean = args["u"], args["mean"]
    options = {"activation": "relu", "slope": 0.0, "pool": "none"}
    if name == "norm_act_pool_pushforward":
        options |= {"statistics": "batch", "curvature": True, "tu": u, "tresidual": None}
    else:
        options |= {"training": True, "coefficient": None, "curvature": None, "mask": [True] * 4}
    args = {**args, "residual": u, "gy": u, **options}

    def refuses(message: str, **changes) -> None:
        with pytest.raises(RuntimeError, match=f"{name}: {message}"):
            op(**{**args, **changes})

    refuses("u must be Double, Float, BFloat16 or Half, got Long", u=u.long())
    refuses(r"u must be \[B, C, H, W\], got \[3, 4, 5\]", u=u[0])
    refuses("u must be contiguous or channels-last", u=u.transpose(2, 3))
    for which in MAPS[name]:
        owner = "y" if which == "gy" else "u"
        last = u.contiguous(memory_format=torch.channels_last)
        refuses(f"{which} must have u's dtype, Double, got Float", **{which: u.float()})
        refuses(f"{which} must have {owner}'s shape, .*, got", **{which: u[0]})
        refuses(f"{which} must have u's layout", **{which: last})
    vectors = ["weight", "bias", "mean", "invstd"]
    for which in [*vectors, *(["coefficient"] if "coefficient" in options else [])]:
        refuses(f"{which} must be Double, got Float", **{which: mean.float()})
        refuses(rf"{which} must be a contiguous \[3\], got \[2\]", **{which: mean[:2]})
    refuses("activation must be 'none', .*, got 'gelu'", activation="gelu")
    refuses("pool must be 'none', .*, got '5x5'", pool="5x5")
    if "mask" in options:
        refuses("mask must have 4 entries, got 2", mask=[True, True])
    else:
        refuses("statistics must be .*, got 'running'", statistics="running")
        refuses("activation must be piecewise linear, got 'silu'", activation="silu")
        refuses("curvature=True needs statistics='batch', got 'fixed'", statistics="fixed")


def test_second_derivatives_are_errors(device):
    u = arguments(device)["u"].requires_grad_()
    y = NormActPool.apply(u, *[None] * 5, True, 0.1, 1e-5, "relu", 0.0, "none")[0]
    with pytest.raises(FastjacError, match="NormActPool differentiates once"):
        torch.autograd.grad(y.sum(), u, create_graph=True)


OPERATORS = {
    "channel_statistics": (channel_statistics, ("u",)),
    "norm_act_pool": (norm_act_pool, NAMES),
    "norm_act_pool_backward": (
        norm_act_pool_backward,
        (*NAMES, "gy", "coefficient", "curvature"),
    ),
    "norm_act_pool_pushforward": (norm_act_pool_pushforward, (*NAMES, "gy", "tu", "tresidual")),
}
FLOATING = [(name, which) for name, (_, floating) in OPERATORS.items() for which in floating]


def filled(name: str, device: str) -> dict[str, Tensor]:
    """Every floating argument of an operator."""
    args = arguments(device)
    maps = dict.fromkeys(("residual", "gy", "curvature", "tu", "tresidual"), args["u"])
    args |= {**maps, "coefficient": args["mean"]}
    return {which: args[which].clone() for which in OPERATORS[name][1]}


@pytest.mark.parametrize(("name", "which"), FLOATING)
def test_no_argument_drops_its_tangent(device, name, which):
    op, args = OPERATORS[name][0], filled(name, device)
    with forward_ad.dual_level():
        args[which] = forward_ad.make_dual(args[which], torch.ones_like(args[which]))
        with pytest.raises(FastjacError, match=f"^{name}: forward-mode derivatives"):
            op(**args)
        if name == "norm_act_pool_backward":
            with pytest.raises(FastjacError, match=f"^{name}: forward-mode derivatives"):
                op(**args, overwrite=True)


@pytest.mark.parametrize(("name", "which"), FLOATING)
def test_the_operators_have_no_silent_derivative(device, name, which):
    op, args = OPERATORS[name][0], filled(name, device)
    args[which].requires_grad_()
    result = op(**args)
    result = result if isinstance(result, Tensor) else result[0]
    with pytest.raises(FastjacError, match=f"^{name}: its derivative is not supported"):
        result.sum().backward()
