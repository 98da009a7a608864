"""The rule of layer normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjac.engine.crops import Crops
from fastjac.engine.receptive_field import Region
from fastjac.engine.rules.base import (
    NotLocalError,
    Recorded,
    Rule,
    compute_type,
    register_alternatives,
)
from fastjac.engine.rules.generic import Generic

if TYPE_CHECKING:
    from fastjac.engine.site import Site

aten = torch.ops.aten


@dataclass
class LayerNorm(Rule):
    """y = gamma x^ + beta, x^ = (x - mean) r over the last axes, the normalised ones.

    With P(c) = r (c - m(c) - x^ m(c x^)), m the mean over those axes, and d = gamma delta: the cotangent
    of x is P(d), the tangent of y is gamma P(x'), the gradient of gamma is sum(delta P(x')), and the
    curvature is -r (m(d P(x')) x^ + m(x^ x') P(d) + m(d x^) P(x')).
    """

    x: Tensor
    weight: Tensor | None
    mean: Tensor
    rstd: Tensor
    shape: list[int]
    receives: tuple[bool, bool]  # gamma, x

    recomputes_cotangent: ClassVar[bool] = True

    @classmethod
    def record(
        cls,
        site: Site,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Recorded | Any:
        x, shape = input, list(normalized_shape)
        if (
            site.varies(weight, bias)
            or torch.is_autocast_enabled(x.device.type)
            or not x.numel()
            or any(p is not None and p.dtype != x.dtype for p in (weight, bias))
            or list(x.shape[x.dim() - len(shape) :]) != shape
        ):
            return NotImplemented
        y, mean, rstd = torch.native_layer_norm(site.joined(x), shape, weight, bias, eps)
        receivers = (() if weight is None else site.receives(weight), site.receives(x, 0))
        rule = cls(
            *((site.number(x),), site.keep(x), None if weight is None else site.keep(weight)),
            *(mean.detach(), rstd.detach(), shape, (bool(receivers[0]), bool(receivers[1]))),
        )
        return y, rule, receivers[0] + receivers[1]

    def needs_delta(self) -> bool:
        return any(self.receives)

    def _projected(self, cotangent: Tensor, weight: Tensor | None) -> Tensor:
        """P(gamma c)."""
        return aten.native_layer_norm_backward.default(
            *(cotangent, self.x, self.shape, self.mean, self.rstd, weight, None),
            [True, False, False],
        )[0]

    def vjp(self, delta: Tensor) -> list[Tensor]:
        return [self._projected(delta, self.weight)]

    def jvp(self, tangents: Any, delta: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        (tangent,) = tangents
        pushed = self._projected(tangent, None)
        tangent_y = pushed if self.weight is None else pushed * self.weight.to(pushed.dtype)
        gradients = []
        if delta is not None and self.receives[0]:
            rows = list(range(delta.dim() - len(self.shape)))
            gradients.append((delta * pushed).sum(rows, dtype=compute_type(self.x)))
        if delta is not None and self.receives[1]:
            gradients.append(self._curvature(delta, tangent, pushed))
        return tangent_y, gradients

    def _curvature(self, delta: Tensor, tangent: Tensor, pushed: Tensor) -> Tensor:
        wide, axes = compute_type(self.x), list(range(-len(self.shape), 0))
        rstd = self.rstd.to(wide)

        def slope(a: Tensor, b: Tensor) -> Tensor:
            """-r m(a b)."""
            return (a * b).mean(axes, keepdim=True).mul_(-rstd)

        normal = (self.x.to(wide) - self.mean).mul_(rstd)  # x^
        d = delta.to(wide) if self.weight is None else delta * self.weight.to(wide)
        of_tangent, of_delta = slope(normal, tangent), slope(normal, d)
        out = normal.mul_(slope(d, pushed))
        out.addcmul_(self._projected(delta, self.weight).to(wide), of_tangent)
        return out.addcmul_(pushed.to(wide), of_delta).to(self.x.dtype)

    def input_regions(self, region: Region) -> list[Region]:
        if region.axis != 1 or self.shape != [self.x.shape[-1]]:
            raise NotLocalError("it normalises over the map")
        return [region]

    def crop(self, crops: Crops, region: Region) -> Rule:
        x = crops.gather(self.x, region)
        mean, rstd = (crops.gather(t, region) for t in (self.mean, self.rstd))
        return self.changed(x=x, mean=mean, rstd=rstd)


class OtherLayerNorm(Generic):
    """By autograd, in the types of autocast, say; it has the same crops."""

    def input_regions(self, region: Region) -> list[Region]:
        args, kwargs = self.template
        shape = kwargs["normalized_shape"] if "normalized_shape" in kwargs else args[1]
        over_channels = list(shape) == [self.leaves[0].shape[-1]]
        if region.axis != 1 or not over_channels or len(self.sources) > 1:
            raise NotLocalError("it normalises over the map")
        return [region]

    def crop(self, crops: Crops, region: Region) -> Rule:
        return self.changed(leaves=[crops.gather(self.leaves[0], region), *self.leaves[1:]])


register_alternatives(F.layer_norm, rules=[LayerNorm, OtherLayerNorm])
