"""Smooth functions of each element: common ones by their derivatives, others by autograd.

For y = f(x): the cotangent f'(x) delta, the tangent f'(x) x', and the curvature f''(x) x' delta. Of
tanh, sigmoid and exp both derivatives are functions of y, which autograd saves too.
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
    Pointwise,
    Recorded,
    Rule,
    compute_type,
    register_alternatives,
)
from fastjac.engine.rules.generic import Generic
from fastjac.fusion.mode import in_checkpoint

if TYPE_CHECKING:
    from fastjac.engine.site import Site

aten = torch.ops.aten


class Derivatives(NamedTuple):
    """f' times a tensor, and f'', of z: of y where ``of_output``, else of x.

    ``options``: the further arguments of a call that these hold for.
    """

    first: Callable[[Tensor, Tensor], Tensor]
    second: Callable[[Tensor], Tensor]
    of_output: bool = False
    options: tuple[Any, ...] = ()


def _second_of_silu(x: Tensor) -> Tensor:
    s = x.sigmoid()
    return s * (1 - s) * (2 + x * (1 - 2 * s))


def _second_of_gelu(x: Tensor) -> Tensor:
    return (x.square() / -2).exp() * ((2 - x.square()) / math.sqrt(2 * math.pi))


_TANH = Derivatives(aten.tanh_backward.default, lambda y: -2 * y * (1 - y * y), of_output=True)
_SIGMOID = Derivatives(
    aten.sigmoid_backward.default, lambda y: y * (1 - y) * (1 - 2 * y), of_output=True
)
_EXP = Derivatives(torch.mul, lambda y: y, of_output=True)
_SIN = Derivatives(lambda g, x: g * x.cos(), lambda x: -x.sin())
_COS = Derivatives(lambda g, x: -g * x.sin(), lambda x: -x.cos())
_SQUARE = Derivatives(lambda g, x: 2 * g * x, lambda x: torch.full_like(x, 2))
_DERIVATIVES = {
    **dict.fromkeys((F.tanh, torch.tanh, Tensor.tanh), _TANH),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, Tensor.sigmoid), _SIGMOID),
    **dict.fromkeys((torch.exp, Tensor.exp), _EXP),
    **dict.fromkeys((torch.sin, Tensor.sin), _SIN),
    **dict.fromkeys((torch.cos, Tensor.cos), _COS),
    **dict.fromkeys((torch.square, Tensor.square), _SQUARE),
    F.silu: Derivatives(aten.silu_backward.default, _second_of_silu, options=(False,)),
    F.gelu: Derivatives(aten.gelu_backward.default, _second_of_gelu, options=("none",)),
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
        derivatives = _DERIVATIVES[site.function]
        x, *options = (*args, *kwargs.values())
        if "input" in kwargs or tuple(options) not in ((), derivatives.options):
            return NotImplemented
        # Under autocast some give another type; a checkpoint may overwrite x, unseen.
        if (
            x.is_complex()
            or torch.is_autocast_enabled(x.device.type)
            or (derivatives.of_output and in_checkpoint())
        ):
            return NotImplemented
        number, receivers = site.number(x), site.receives(x, 0)
        y = site.run(*args, **kwargs)
        z = site.keep(y if derivatives.of_output else x)
        return y, cls((number,), z, derivatives, bool(receivers)), receivers

    def with_output_copied(self) -> Rule:
        return self.changed(z=self.z.clone()) if self.derivatives.of_output else self

    def with_source_copied(self, source: int) -> Rule:
        return self if self.derivatives.of_output else self.changed(z=self.z.clone())

    def needs_delta(self) -> bool:
        return self.curved

    def vjp(self, delta: Tensor) -> list[Tensor]:
        return [self.derivatives.first(delta, self.z)]

    def jvp(self, tangents: Any, delta: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        (tangent,) = tangents
        gradients = []
        if self.curved:
            wide = compute_type(self.z)
            curvature = self.derivatives.second(self.z.to(wide)) * tangent * delta
            gradients = [curvature.to(tangent.dtype)]
        return self.derivatives.first(tangent, self.z), gradients

    def crop(self, crops: Crops, region: Region) -> Rule:
        return self.changed(z=crops.gather(self.z, region))


class SmoothPointwise(Generic):
    """A smooth function of each element, finite with its derivatives at 0: it has crops."""

    @classmethod
    def record(cls, site: Site, *args: Any, **kwargs: Any) -> Recorded | Any:
        given = args[0] if args else kwargs.get("input")
        if not site.varies(given) or site.varies(*args[1:], *kwargs.values()) or given.is_complex():
            return NotImplemented
        return super().record(site, *args, **kwargs)

    def input_regions(self, region: Region) -> list[Region]:
        return [region]

    def crop(self, crops: Crops, region: Region) -> Rule:
        return self.changed(leaves=[crops.gather(self.leaves[0], region)])


register_alternatives(*_DERIVATIVES, rules=[Smooth, SmoothPointwise])
register_alternatives(
    *(F.softplus, F.elu, F.celu, F.selu, F.mish, F.hardswish, F.logsigmoid, F.softsign),
    *(F.tanhshrink, torch.selu, torch.celu, torch.erf, Tensor.erf, torch.expm1, Tensor.expm1),
    rules=[SmoothPointwise],
)
