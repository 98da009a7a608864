"""BatchNorm, activation and max-pool as one node that keeps its input alone, and its derivatives.

With u ``[B, C, H, W]`` BatchNorm's input, per channel c

.. math::
    \\hat x = (u - μ_c)\\,r_c, \\qquad z = γ_c r_c\\,u + (β_c - μ_c γ_c r_c) + \\text{residual},
    \\qquad a = \\mathrm{act}(z), \\qquad y = \\mathrm{pool}(a)

What follows is recomputed from u wherever it is needed: z, the activation's slope, the pool's
choice. Each derivative is affine in a few sums per channel, so it reads its inputs twice at most.

* activation: ``"none"``, ``"relu"``, ``"relu6"``, ``"leaky_relu"`` (with ``slope``), ``"silu"``;
  at a kink its derivative is PyTorch's (0 for ReLU and ReLU6, ``slope`` for LeakyReLU).
* pool: ``"none"``, ``"2x2"`` (stride 2), ``"3x3"`` (stride 2, padding 1), ``"3x3-unpadded"`` (stride
  2, for a crop that brings its own border); sizes are rounded down. Of equal values the first in
  row order is chosen, and a NaN before any number, as PyTorch does.

Common to all: u is float64, float32, bfloat16 or float16, and every other map has its dtype.
Statistics, ``weight``, ``bias`` and sums per channel are kept in the *accumulator* dtype, float64 for
float64 and float32 else; all arithmetic is done in it, and rounded once. Maps are contiguous or
channels-last; a u of other strides is copied into one of these first, and the other maps into
u's layout if they have another. Results have u's layout. Every result is the same from run to run,
and on a CPU for any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastjac.errors import FastjacError
from fastjac.ops._library import call, define, refuse_derivative, refuse_forward_mode
from fastjac.ops._maps import (
    channel_zeros,
    check_channels,
    check_like,
    check_map,
    dense,
    empty_map,
    laid_out,
    vectors,
)

aten = torch.ops.aten


class _Activation(NamedTuple):
    value: Callable[[Tensor, float], Tensor]  # (z, slope)
    backward: Callable[[Tensor, Tensor, float], Tensor]  # (cotangent or tangent, z, slope)


_ACTIVATIONS = {
    "none": _Activation(lambda z, slope: z, lambda g, z, slope: g),
    "relu": _Activation(
        lambda z, slope: z.relu(), lambda g, z, slope: aten.threshold_backward(g, z, 0)
    ),
    "relu6": _Activation(
        lambda z, slope: aten.hardtanh(z, 0, 6),
        lambda g, z, slope: aten.hardtanh_backward(g, z, 0, 6),
    ),
    "leaky_relu": _Activation(
        lambda z, slope: aten.leaky_relu(z, slope),
        lambda g, z, slope: aten.leaky_relu_backward(g, z, slope, False),
    ),
    "silu": _Activation(
        lambda z, slope: aten.silu(z), lambda g, z, slope: aten.silu_backward(g, z)
    ),
}
_POOLS = {"none": None, "2x2": (2, 2, 0), "3x3": (3, 2, 1), "3x3-unpadded": (3, 2, 0)}  # k, s, p
_STATISTICS = ("fixed", "batch")


def norm_act_pool(
    u: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    activation: str = "relu",
    slope: float = 0.01,
    pool: str = "none",
) -> Tensor:
    """``pool(act(weight * (u - mean) * invstd + bias + residual))``: one read of u, one write of y.

    Args:
        u: ``[B, C, H, W]``, BatchNorm's input.
        residual: added before the activation; of u's shape, dtype and device.
        weight, bias: γ and β, ``[C]``, of any floating dtype; None is 1 and 0.
        mean, invstd: μ and r = 1 / sqrt(var + eps), ``[C]``.
        activation, slope, pool: see this module's text.

    Returns:
        y ``[B, C, h, w]``, of u's dtype and layout.

    Raises:
        FastjacError: an argument is of the wrong kind; or a derivative is asked for
            (:class:`fastjac.ops.NormActPool` is differentiable).
    """
    op = "norm_act_pool"
    _check(op, u, {"residual": residual}, activation, slope, pool)
    check_channels(op, u, weight=weight, bias=bias, mean=mean, invstd=invstd)
    return forward(u, residual, weight, bias, mean, invstd, activation, slope, pool)


def forward(
    u: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    activation: str,
    slope: float,
    pool: str,
) -> Tensor:
    """:func:`norm_act_pool` of arguments that are known to be of the right kind."""
    op = "norm_act_pool"
    refuse_forward_mode(op, u, residual, weight, bias, mean, invstd)
    u = dense(u)
    (residual,) = laid_out(u, residual)
    channels = vectors(u, weight, bias, mean, invstd)
    return call(op, u, residual, *channels, activation, float(slope), pool)


def norm_act_pool_ref(
    u: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    activation: str,
    slope: float,
    pool: str,
) -> Tensor:
    """:func:`norm_act_pool` in plain PyTorch."""
    _, z = _normalise(u, residual, weight, bias, mean, invstd)
    a = _ACTIVATIONS[activation].value(z, slope)
    return _like(u, _choose(a, pool)[0])


def norm_act_pool_backward(
    gy: Tensor,
    u: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    activation: str = "relu",
    slope: float = 0.01,
    pool: str = "none",
    training: bool = True,
    coefficient: Tensor | None = None,
    curvature: Tensor | None = None,
    mask: Sequence[bool] = (True, True, True, True),
    overwrite: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    r"""The cotangents of :func:`norm_act_pool`'s inputs, from u alone.

    With g = act'(z) · unpool(gy), m the mean over batch and map, N the number of values per channel:

    .. math::
        \bar u &= γ r\,(g - m(g) - \hat x\,m(g\hat x))\ \text{(training), else}\ γ r g,
            \quad + \text{coefficient}_c\,\hat x + \text{curvature} \\
        \overline{\text{residual}} &= g, \qquad \bar γ = Σ g\hat x, \qquad \bar β = Σ g

    Args:
        gy: y's cotangent.
        u, residual, weight, bias, mean, invstd, activation, slope, pool: as in the forward.
        training: whether mean and invstd are u's own statistics, and vary with it.
        coefficient: ``[C]``; curvature: of u's shape. Both are added to u's cotangent as above.
        mask: which of u, residual, weight and bias want theirs. Residual's needs a residual.
        overwrite: whether u is no longer needed; on a CPU its cotangent is written over it then.

    Returns:
        Four, None where not wanted. Those of weight and bias are in the accumulator dtype.

    Raises:
        FastjacError: an argument is of the wrong kind; a derivative is asked for; or, with
            ``overwrite``, could be: an input requires grad, and gradients are enabled.

    Two passes over memory; one, where not training and neither sum is wanted.
    """
    op = "norm_act_pool_backward"
    maps = {"residual": residual, "curvature": curvature}
    _check(op, u, maps, activation, slope, pool)
    check_like(op, "gy", gy, pooled_shape(op, u, pool), "y", u)
    check_channels(op, u, weight=weight, bias=bias, mean=mean, invstd=invstd)
    check_channels(op, u, coefficient=coefficient)
    mask = [bool(wanted) for wanted in mask]
    if len(mask) != 4:
        raise FastjacError(f"{op}: mask must have 4 entries, got {len(mask)}")
    if mask[1] and residual is None:
        raise FastjacError(f"{op}: mask[1] asks for residual's cotangent, but residual is None")
    if overwrite and u.device.type == "cpu" and torch.is_grad_enabled():
        # PyTorch takes no derivative of an operator that writes in place, not even one that raises.
        given = (gy, u, residual, weight, bias, mean, invstd, coefficient, curvature)
        if any(x is not None and x.requires_grad for x in given):
            raise FastjacError(f"{op}: expected no input that requires grad with overwrite=True")
    return backward(
        *(gy, u, residual, weight, bias, mean, invstd, activation, slope, pool),
        *(training, coefficient, curvature, mask, overwrite),
    )


def backward(
    gy: Tensor,
    u: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    activation: str,
    slope: float,
    pool: str,
    training: bool,
    coefficient: Tensor | None,
    curvature: Tensor | None,
    mask: Sequence[bool],
    overwrite: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """:func:`norm_act_pool_backward` of arguments that are known to be of the right kind."""
    given = (gy, u, residual, weight, bias, mean, invstd, coefficient, curvature)
    refuse_forward_mode("norm_act_pool_backward", *given)
    u = dense(u)
    gy, residual, curvature = laid_out(u, gy, residual, curvature)
    *channels, coefficient = vectors(u, weight, bias, mean, invstd, coefficient)
    arguments = (
        *(gy, u, residual, *channels, activation, float(slope), pool),
        *(training, coefficient, curvature, mask),
    )
    if overwrite and u.device.type == "cpu":
        gu, (gresidual, gweight, gbias) = u, call("norm_act_pool_backward_", *arguments)
    else:
        gu, gresidual, gweight, gbias = call("norm_act_pool_backward", *arguments)
    return (
        gu if mask[0] else None,
        gresidual if mask[1] else None,
        gweight if mask[2] else None,
        gbias if mask[3] else None,
    )


def norm_act_pool_backward_ref(
    gy: Tensor,
    u: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    activation: str,
    slope: float,
    pool: str,
    training: bool,
    coefficient: Tensor | None,
    curvature: Tensor | None,
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`norm_act_pool_backward` in plain PyTorch; empty where not wanted."""
    xhat, z = _normalise(u, residual, weight, bias, mean, invstd)
    g = _unpool(gy, z, activation, slope, pool)
    gu = _column(_scale(weight, invstd)) * (_project(g, xhat) if training else g)
    if coefficient is not None:
        gu = gu + _column(coefficient) * xhat
    if curvature is not None:
        gu = gu + curvature
    results = (_like(u, gu), _like(u, g), _sum(g * xhat), _sum(g))
    return tuple(x if wanted else u.new_empty(0) for x, wanted in zip(results, mask, strict=True))


def _backward_in_place(gy: Tensor, u: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    gu, *rest = norm_act_pool_backward_ref(gy, u, *arguments)
    if arguments[-1][0]:
        u.copy_(gu)
    return tuple(rest)


def norm_act_pool_pushforward(
    tu: Tensor,
    tresidual: Tensor | None,
    gy: Tensor,
    u: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    activation: str = "relu",
    slope: float = 0.01,
    pool: str = "none",
    statistics: str = "fixed",
    curvature: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    r"""y's tangent for a tangent of u, and what ⟨gy, y's tangent⟩ gives to γ and to u.

    With g = act'(z) · unpool(gy) and P(g) = g − m(g) − x̂ m(g x̂); for fixed statistics P is the
    identity:

    .. math::
        \dot n &= γ r\,P(\dot u), \qquad \dot z = \dot n + \dot{\text{residual}}, \qquad
            \dot y = \mathrm{act}'(z)\,\dot z\ \text{where the pool chose} \\
        T &= r\,Σ P(g)\,\dot u, \qquad \bar γ = T, \qquad \text{coefficient} = -γ r\,T/N \\
        \text{curvature} &= -r\,[γ r\,P(g)\,m(\hat x\dot u) + \dot n\,m(g\hat x)]

    so that the cotangent of u is coefficient · x̂ + curvature: what
    :func:`norm_act_pool_backward` adds (DESIGN: the table of nodes). Running statistics do not vary
    with u: take T, and leave out the coefficient.

    Args:
        tu: u's tangent; tresidual: residual's, None for zero.
        gy: y's cotangent in the pullback.
        u, residual, weight, bias, mean, invstd, activation, slope, pool: as in the forward. The
            activation must be piecewise linear.
        statistics: ``"fixed"`` (constants in ∂/∂x: frozen or running), or ``"batch"``.
        curvature: whether the curvature is wanted; there is one for batch statistics alone.

    Returns:
        y's tangent, like y; γ's gradient T and the coefficient, ``[C]``, in the accumulator dtype;
        the curvature, like u, or None.

    Raises:
        FastjacError: an argument is of the wrong kind; the activation is SiLU, whose curvature this
            leaves out; or a derivative is asked for.

    Two passes over memory; one for fixed statistics. On a crop, N is the number of values in the crop:
    take the coefficient from T.
    """
    op = "norm_act_pool_pushforward"
    maps = {"tu": tu, "tresidual": tresidual, "residual": residual}
    _check(op, u, maps, activation, slope, pool)
    if tu is None:
        raise FastjacError(f"{op}: tu must be a tensor, got NoneType")
    if activation == "silu":
        raise FastjacError(f"{op}: activation must be piecewise linear, got 'silu'")
    _check_known(op, "statistics", statistics, _STATISTICS)
    if curvature and statistics == "fixed":
        raise FastjacError(f"{op}: curvature=True needs statistics='batch', got 'fixed'")
    check_like(op, "gy", gy, pooled_shape(op, u, pool), "y", u)
    check_channels(op, u, weight=weight, bias=bias, mean=mean, invstd=invstd)
    return pushforward(
        *(tu, tresidual, gy, u, residual, weight, bias, mean, invstd, activation, slope, pool),
        *(statistics, curvature),
    )


def pushforward(
    tu: Tensor,
    tresidual: Tensor | None,
    gy: Tensor,
    u: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    activation: str,
    slope: float,
    pool: str,
    statistics: str,
    curvature: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """:func:`norm_act_pool_pushforward` of arguments that are known to be of the right kind."""
    op = "norm_act_pool_pushforward"
    refuse_forward_mode(op, tu, tresidual, gy, u, residual, weight, bias, mean, invstd)
    u = dense(u)
    tu, tresidual, gy, residual = laid_out(u, tu, tresidual, gy, residual)
    channels = vectors(u, weight, bias, mean, invstd)
    ty, gweight, coefficient, kappa = call(
        *(op, tu, tresidual, gy, u, residual, *channels, activation, float(slope), pool),
        *(statistics, curvature),
    )
    return ty, gweight, coefficient, kappa if curvature else None


def norm_act_pool_pushforward_ref(
    tu: Tensor,
    tresidual: Tensor | None,
    gy: Tensor,
    u: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    activation: str,
    slope: float,
    pool: str,
    statistics: str,
    curvature: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`norm_act_pool_pushforward` in plain PyTorch; curvature is empty where not wanted."""
    xhat, z = _normalise(u, residual, weight, bias, mean, invstd)
    tu, scale, r = tu.to(z.dtype), _column(_scale(weight, invstd)), _column(invstd)
    g = _unpool(gy, z, activation, slope, pool)
    unit, tn = r * g, scale * tu
    if statistics == "batch":
        unit, tn = r * _project(g, xhat), scale * _project(tu, xhat)
    tz = tn if tresidual is None else tn + tresidual
    ta = _ACTIVATIONS[activation].backward(tz, z, slope)
    _, index = _choose(_ACTIVATIONS[activation].value(z, slope), pool)
    ty = ta if index is None else ta.flatten(2).gather(2, index.flatten(2)).view_as(index)
    total = _sum(unit * tu)
    coefficient = -_scale(weight, invstd) * total / max(u.numel() // max(u.shape[1], 1), 1)
    kappa = u.new_empty(0)
    if curvature:
        gamma = 1 if weight is None else _column(weight)
        kappa = -r * (gamma * unit * _mean(xhat * tu) + tn * _mean(g * xhat))
        kappa = _like(u, kappa)
    return _like(u, ty), total, coefficient, kappa


# The pieces of the equations.


def _column(x: Tensor) -> Tensor:
    return x.view(1, -1, 1, 1)


def _sum(x: Tensor) -> Tensor:
    return x.sum((0, 2, 3))


def _mean(x: Tensor) -> Tensor:
    return x.mean((0, 2, 3), keepdim=True)


def _project(x: Tensor, xhat: Tensor) -> Tensor:
    """P(x) = x − m(x) − x̂ m(x x̂)."""
    return x - _mean(x) - xhat * _mean(x * xhat)


def _scale(weight: Tensor | None, invstd: Tensor) -> Tensor:
    return invstd if weight is None else weight * invstd


def _normalise(
    u: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
) -> tuple[Tensor, Tensor]:
    """x̂ and z."""
    x, scale = u.to(mean.dtype), _scale(weight, invstd)
    shift = -mean * scale if bias is None else bias - mean * scale
    z = x * _column(scale) + _column(shift)
    xhat = (x - _column(mean)) * _column(invstd)
    return xhat, z if residual is None else z + residual


def _choose(a: Tensor, pool: str) -> tuple[Tensor, Tensor | None]:
    """pool(a), and where in each flattened map it came from."""
    if _POOLS[pool] is None:
        return a, None
    if a.numel() == 0:
        shape = pooled_shape("norm_act_pool", a, pool)
        return a.new_empty(shape), torch.empty(shape, dtype=torch.int64, device=a.device)
    return aten.max_pool2d_with_indices(a, *_POOLS[pool])


def _unpool(gy: Tensor, z: Tensor, activation: str, slope: float, pool: str) -> Tensor:
    """g = act'(z) · unpool(gy)."""
    act = _ACTIVATIONS[activation]
    _, index = _choose(act.value(z, slope), pool)
    gy = gy.to(z.dtype)
    if index is not None:
        flat = torch.zeros_like(z).contiguous().flatten(2)
        gy = flat.scatter_add_(2, index.flatten(2), gy.flatten(2)).view(z.shape)
    return act.backward(gy, z, slope)


def _like(u: Tensor, x: Tensor) -> Tensor:
    """x in u's dtype and layout, never an alias of an input."""
    return empty_map(u, x.shape).copy_(x)


# What the wrappers check.


def pooled_shape(op: str, u: Tensor, pool: str) -> tuple[int, ...]:
    geometry = _POOLS[pool]
    if geometry is None:
        return u.shape
    (k, s, p), (batch, channels, height, width) = geometry, u.shape
    if min(height, width) + 2 * p < k:
        raise FastjacError(
            f"{op}: pool {pool!r} needs a map of at least {k - 2 * p}x{k - 2 * p}, got "
            f"{height}x{width}"
        )
    return batch, channels, (height + 2 * p - k) // s + 1, (width + 2 * p - k) // s + 1


def _check_known(op: str, name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        expected = ", ".join(map(repr, known))
        raise FastjacError(f"{op}: {name} must be one of {expected}, got {value!r}")


def _check(
    op: str, u: Tensor, maps: dict[str, Tensor | None], activation: str, slope: float, pool: str
) -> None:
    """Raise for a map or an option of the wrong kind."""
    check_map(op, "u", u)
    _check_known(op, "activation", activation, _ACTIVATIONS)
    _check_known(op, "pool", pool, _POOLS)
    if not isinstance(slope, int | float):
        raise FastjacError(f"{op}: slope must be a number, got {type(slope).__name__}")
    pooled_shape(op, u, pool)
    for name, x in maps.items():
        if x is not None:
            check_like(op, name, x, u.shape, "u", u)


# Registration.

_PARAMETERS = "Tensor? weight, Tensor? bias, Tensor mean, Tensor invstd"
_OPTIONS = "str activation, float slope, str pool"
_ADDED = "bool training, Tensor? coefficient, Tensor? curvature, bool[] mask"

define(
    f"norm_act_pool(Tensor u, Tensor? residual, {_PARAMETERS}, {_OPTIONS}) -> Tensor y",
    norm_act_pool_ref,
)
define(
    f"norm_act_pool_backward(Tensor gy, Tensor u, Tensor? residual, {_PARAMETERS}, {_OPTIONS}, "
    f"{_ADDED}) -> (Tensor gu, Tensor gresidual, Tensor gweight, Tensor gbias)",
    norm_act_pool_backward_ref,
)
define(
    f"norm_act_pool_backward_(Tensor gy, Tensor(a!) u, Tensor? residual, {_PARAMETERS}, {_OPTIONS}, "
    f"{_ADDED}) -> (Tensor gresidual, Tensor gweight, Tensor gbias)",
    _backward_in_place,
)
define(
    "norm_act_pool_pushforward(Tensor tu, Tensor? tresidual, Tensor gy, Tensor u, "
    f"Tensor? residual, {_PARAMETERS}, {_OPTIONS}, str statistics, bool curvature) "
    "-> (Tensor ty, Tensor gweight, Tensor coefficient, Tensor kappa)",
    norm_act_pool_pushforward_ref,
)


@torch.library.register_fake("fastjac::norm_act_pool")
def _forward_fake(u, residual, weight, bias, mean, invstd, activation, slope, pool):
    return empty_map(u, pooled_shape("norm_act_pool", u, pool))


@torch.library.register_fake("fastjac::norm_act_pool_backward")
def _backward_fake(gy, u, *args):
    results = (empty_map(u, u.shape), empty_map(u, u.shape), channel_zeros(u), channel_zeros(u))
    return tuple(
        x if wanted else u.new_empty(0) for x, wanted in zip(results, args[-1], strict=True)
    )


@torch.library.register_fake("fastjac::norm_act_pool_backward_")
def _backward_in_place_fake(gy, u, *args):
    return _backward_fake(gy, u, *args)[1:]


@torch.library.register_fake("fastjac::norm_act_pool_pushforward")
def _pushforward_fake(tu, tresidual, gy, u, *args):
    kappa = empty_map(u, u.shape) if args[-1] else u.new_empty(0)
    return empty_map(u, gy.shape), channel_zeros(u), channel_zeros(u), kappa


refuse_derivative("norm_act_pool", "NormActPool is differentiable")
refuse_derivative("norm_act_pool_backward", "norm_act_pool_ref can be differentiated further")
refuse_derivative("norm_act_pool_pushforward", "norm_act_pool_ref can be differentiated further")
