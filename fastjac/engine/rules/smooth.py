"""Functions of each element: common smooth ones by their derivatives, others by autograd.

For y = f(x): the cotangent f'(x) delta, the tangent f'(x) x', and the curvature f''(x) x' delta. Of
some (tanh, exp, a root) both derivatives are functions of y, which autograd saves too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjac.engine.crops import Crops
from fastjac.engine.receptive_field import Region
from fastjac.engine.rules.base import (
    NotLocalError,
    Pointwise,
    Recorded,
    Rule,
    compute_type,
    register_alternatives,
)
from fastjac.engine.rules.generic import Generic
from fastjac.fusion.mode import in_checkpoint, tensors_in

if TYPE_CHECKING:
    from fastjac.engine.site import Site

aten = torch.ops.aten


class Derivatives(NamedTuple):
    """f' and f'' times a tensor, both of z: of y where ``of_output``, else of x.

    ``singular``: not finite at z = 0, which stands outside of a map, so that there are no crops.
    """

    first: Callable[[Tensor, Tensor], Tensor]
    second: Callable[[Tensor, Tensor], Tensor]
    of_output: bool = False
    singular: bool = False


_tanh, _sigmoid = aten.tanh_backward.default, aten.sigmoid_backward.default
_TANH = Derivatives(_tanh, lambda g, y: _tanh(g, y).mul_(y).mul_(-2), of_output=True)
_SIGMOID = Derivatives(_sigmoid, lambda g, y: _sigmoid(g, y).mul_(1 - 2 * y), of_output=True)
_EXP = Derivatives(torch.mul, torch.mul, of_output=True)
_EXPM1 = Derivatives(*[lambda g, y: torch.addcmul(g, g, y)] * 2, of_output=True)
_SIN = Derivatives(lambda g, x: x.cos().mul_(g), lambda g, x: x.sin().mul_(g).neg_())
_COS = Derivatives(lambda g, x: x.sin().mul_(g).neg_(), lambda g, x: x.cos().mul_(g).neg_())
_SQUARE = Derivatives(lambda g, x: 2 * g * x, lambda g, x: 2 * g)
_LOG = Derivatives(lambda g, x: g / x, lambda g, x: g / x / -x, singular=True)
_LOG1P = Derivatives(lambda g, x: g / (x + 1), lambda g, x: -g / (x + 1).square())
_SQRT = Derivatives(
    lambda g, y: g / (2 * y), lambda g, y: g / (-4 * y.pow(3)), of_output=True, singular=True
)
_RSQRT = Derivatives(
    *(lambda g, y: -0.5 * g * y.pow(3), lambda g, y: 0.75 * g * y.pow(5)),
    *(True, True),
)
_RECIPROCAL = Derivatives(
    lambda g, y: -g * y * y, lambda g, y: 2 * g * y.pow(3), of_output=True, singular=True
)
_LOGSIGMOID = Derivatives(
    lambda g, x: (-x).sigmoid().mul_(g), lambda g, x: _sigmoid(g, x.sigmoid()).neg_()
)


def _second_of_silu(g: Tensor, x: Tensor) -> Tensor:
    s = x.sigmoid()
    return _sigmoid(g, s).mul_((1 - 2 * s).mul_(x).add_(2))


def _second_of_gelu(g: Tensor, x: Tensor) -> Tensor:
    square = x.square()
    return (square / -2).exp_().mul_((2 - square).mul_(g)).div_(math.sqrt(2 * math.pi))


def _second_of_mish(g: Tensor, x: Tensor) -> Tensor:
    s, t = x.sigmoid(), aten.softplus.default(x).tanh()
    return _tanh(g, t).mul_(s).mul_((1 - s - 2 * t * s).mul_(x).add_(2))


_SILU = Derivatives(aten.silu_backward.default, _second_of_silu)
_GELU = Derivatives(aten.gelu_backward.default, _second_of_gelu)
_MISH = Derivatives(aten.mish_backward.default, _second_of_mish)


def _softplus(beta: float = 1, threshold: float = 20) -> Derivatives:
    beta, threshold = float(beta), float(threshold)  # PyTorch takes tensors of one element, too

    def second(g: Tensor, x: Tensor) -> Tensor:
        return _sigmoid(beta * g, (beta * x).sigmoid_()).masked_fill_(beta * x >= threshold, 0)

    return Derivatives(lambda g, x: aten.softplus_backward.default(g, x, beta, threshold), second)


def _elu(alpha: float = 1.0, inplace: bool = False) -> Derivatives | None:
    return None if inplace else _elu_like(alpha, 1, 1)


def _celu(alpha: float = 1.0, inplace: bool = False) -> Derivatives | None:
    return None if alpha != 1 else _elu(alpha, inplace)  # its backward rounds others to float32


def _selu(inplace: bool = False) -> Derivatives | None:
    return None if inplace else _elu_like(1.6732632423543772, 1.0507009873554805, 1)


def _elu_like(alpha: float, scale: float, rate: float) -> Derivatives:
    """Of y = scale x from 0 on, and scale alpha (exp(rate x) - 1) below."""
    alpha = float(alpha)

    def first(g: Tensor, x: Tensor) -> Tensor:
        return aten.elu_backward.default(g, alpha, scale, rate, False, x)

    return Derivatives(first, lambda g, x: first(g * rate, x).mul_(x < 0))


def _power(exponent: Any) -> Derivatives | None:
    if type(exponent) not in (int, float) or exponent == 0:
        return None
    if exponent == 2:
        return _SQUARE
    return Derivatives(
        lambda g, x: g * (exponent * x.pow(exponent - 1)),
        lambda g, x: g * (exponent * (exponent - 1) * x.pow(0 if exponent == 1 else exponent - 2)),
        singular=exponent < 2 and exponent != 1,
    )


# Of a call's further arguments, its derivatives; None, or a TypeError, for those not covered.
_KNOWN: dict[Any, Callable[..., Derivatives | None]] = {
    **dict.fromkeys((F.tanh, torch.tanh, Tensor.tanh), lambda: _TANH),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, Tensor.sigmoid), lambda: _SIGMOID),
    **dict.fromkeys((torch.exp, Tensor.exp), lambda: _EXP),
    **dict.fromkeys((torch.expm1, Tensor.expm1), lambda: _EXPM1),
    **dict.fromkeys((torch.sin, Tensor.sin), lambda: _SIN),
    **dict.fromkeys((torch.cos, Tensor.cos), lambda: _COS),
    **dict.fromkeys((torch.square, Tensor.square), lambda: _SQUARE),
    **dict.fromkeys((torch.log, Tensor.log), lambda: _LOG),
    **dict.fromkeys((torch.log1p, Tensor.log1p), lambda: _LOG1P),
    **dict.fromkeys((torch.sqrt, Tensor.sqrt), lambda: _SQRT),
    **dict.fromkeys((torch.rsqrt, Tensor.rsqrt), lambda: _RSQRT),
    **dict.fromkeys((torch.reciprocal, Tensor.reciprocal), lambda: _RECIPROCAL),
    **dict.fromkeys((torch.pow, Tensor.pow, Tensor.__pow__), _power),
    F.silu: lambda inplace=False: None if inplace else _SILU,
    F.gelu: lambda approximate="none": _GELU if approximate == "none" else None,
    F.mish: lambda inplace=False: None if inplace else _MISH,
    F.softplus: _softplus,
    F.logsigmoid: lambda: _LOGSIGMOID,
    F.elu: _elu,
    **dict.fromkeys((F.celu, torch.celu), _celu),
    **dict.fromkeys((F.selu, torch.selu), _selu),
}


@dataclass
class Smooth(Pointwise):
    """y = f(x) of each element, f's derivatives known."""

    recomputes_cotangent: ClassVar[bool] = True

    z: Tensor
    derivatives: Derivatives
    curved: bool

    @classmethod
    def record(cls, site: Site, *args: Any, **kwargs: Any) -> Recorded | Any:
        try:
            x, derivatives = args[0], _KNOWN[site.function](*args[1:], **kwargs)
        except (IndexError, TypeError, ValueError):  # input= or out=
            return NotImplemented
        # Under autocast some give another type; a checkpoint may overwrite x, unseen.
        if (
            derivatives is None
            or x.is_complex()
            or torch.is_autocast_enabled(x.device.type)
            or (derivatives.of_output and in_checkpoint())
        ):
            return NotImplemented
        number, receivers = site.number(x), site.receives(x, 0)
        y = site.run(*args, **kwargs)
        z = site.keep(y if derivatives.of_output else x)
        return y, cls((number,), z, derivatives, bool(receivers)), receivers

    def needs_delta(self) -> bool:
        return self.curved

    def vjp(self, delta: Tensor) -> list[Tensor]:
        return [self.derivatives.first(delta, self.z)]

    def jvp(self, tangents: Any, delta: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        (tangent,) = tangents
        gradients = []
        if self.curved:
            wide = compute_type(self.z)
            curvature = self.derivatives.second(tangent.to(wide) * delta, self.z.to(wide))
            gradients = [curvature.to(tangent.dtype)]
        return self.derivatives.first(tangent, self.z), gradients

    def input_regions(self, region: Region) -> list[Region]:
        if self.derivatives.singular:
            raise NotLocalError(
                "its derivative at 0, which stands outside of the map, is not finite"
            )
        return super().input_regions(region)

    def crop(self, crops: Crops, region: Region) -> Rule:
        return self.changed(z=crops.gather(self.z, region))


class Elementwise(Generic):
    """A function of each element alone, finite with its derivatives at 0: it has crops."""

    @classmethod
    def record(cls, site: Site, *args: Any, **kwargs: Any) -> Recorded | Any:
        given = args[0] if args else kwargs.get("input")
        others = [t for t in tensors_in(args, kwargs) if t is not given]  # of a map's shape, say
        if not site.varies(given) or others or given.is_complex():
            return NotImplemented
        return super().record(site, *args, **kwargs)

    def input_regions(self, region: Region) -> list[Region]:
        return [region]

    def crop(self, crops: Crops, region: Region) -> Rule:
        return self.changed(leaves=[crops.gather(self.leaves[0], region)])


class PReLU(Generic):
    """y = x, or w x where x is negative; with crops, where w is not of x."""

    def input_regions(self, region: Region) -> list[Region]:
        if len(self.sources) > 1 or region.axis != 2:
            raise NotLocalError("its slopes depend on x, or are along another axis")
        return [region]

    def crop(self, crops: Crops, region: Region) -> Rule:
        return self.changed(leaves=[crops.gather(self.leaves[0], region), *self.leaves[1:]])


_SINGULAR = (_LOG, _SQRT, _RSQRT, _RECIPROCAL)
for _function, _known in _KNOWN.items():
    _others = [] if _known is _power or _known() in _SINGULAR else [Elementwise]
    register_alternatives(_function, rules=[Smooth, *_others])
register_alternatives(
    *(F.hardswish, F.softsign, F.tanhshrink, F.hardshrink, F.softshrink, torch.erf, Tensor.erf),
    *(torch.abs, Tensor.abs, torch.clamp, Tensor.clamp, torch.atan, Tensor.atan),
    rules=[Elementwise],
)
register_alternatives(F.prelu, Tensor.prelu, rules=[PReLU])
