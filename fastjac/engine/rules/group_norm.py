"""The rule of group normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from fastjac.engine.rules.base import (
    Recorded,
    Rule,
    compute_type,
    register_alternatives,
    register_rule,
)
from fastjac.engine.rules.generic import Generic
from fastjac.fusion.mode import in_checkpoint

if TYPE_CHECKING:
    from fastjac.engine.site import Site

aten = torch.ops.aten


@register_rule(F.group_norm)
@dataclass
class GroupNorm(Rule):
    """y = gamma x^ + beta, x^ = (x - mean) r over each sample's groups of channels.

    With P(c) = r (c - m(c) - x^ m(c x^)), m the mean over a group, and d = gamma delta: the cotangent of
    x is P(d), the tangent of y is gamma P(x'), the gradient of gamma is sum(delta P(x')), and the
    curvature is -(r m(d P(x')) x^ + m(x^ x') P(d) + m(d x^) P(x')) r, its last two terms without the r
    that P has already.
    """

    x: Tensor
    weight: Tensor | None
    mean: Tensor
    rstd: Tensor
    groups: int
    receives: tuple[bool, bool]  # gamma, x

    recomputes_cotangent: ClassVar[bool] = True

    @classmethod
    def record(
        cls,
        site: Site,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Recorded | Any:
        x = input
        if site.varies(weight, bias) or torch.is_autocast_enabled(x.device.type) or not x.numel():
            return NotImplemented
        batch, channels = x.shape[:2]
        size = x.numel() // (batch * channels)
        if channels % num_groups or size * channels // num_groups < 2 or x.dim() < 3:
            return NotImplemented  # PyTorch's own function says what is wrong
        dense = cls.centred(site.joined(x))
        kept, form = site.keep(dense), _layout(dense)
        # Until 2.14, PyTorch's backward crashes on a channels-last map that takes no gradient.
        crashes = not dense.requires_grad and any(
            p is not None and p.requires_grad for p in (weight, bias)
        )
        dense = dense.contiguous(memory_format=torch.contiguous_format if crashes else form)
        y, mean, rstd = torch.native_group_norm(
            dense, weight, bias, batch, channels, size, num_groups, eps
        )
        y = y.contiguous(memory_format=form)
        receivers = (() if weight is None else site.receives(weight), site.receives(x, 0))
        rule = cls(
            *((site.number(x),), kept, None if weight is None else site.keep(weight)),
            *(mean.detach(), rstd.detach(), num_groups, (bool(receivers[0]), bool(receivers[1]))),
        )
        return y, rule, receivers[0] + receivers[1]

    @staticmethod
    def centred(x: Tensor) -> Tensor:
        """x as PyTorch's kernels read it; a kind of norm may take a constant from it."""
        return x

    def needs_delta(self) -> bool:
        return any(self.receives)

    def vjp(self, delta: Tensor) -> list[Tensor]:
        form, (batch, channels) = _layout(self.x), self.x.shape[:2]
        pulled, _, _ = aten.native_group_norm_backward.default(
            *(delta.contiguous(memory_format=form), self.x.contiguous(memory_format=form)),
            *(self.mean, self.rstd, self.weight, batch, channels),
            *(self.x[0, 0].numel(), self.groups, [True, False, False]),
        )
        return [pulled]

    def jvp(self, tangents: Any, delta: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        wide, form = compute_type(self.x), suggest_memory_format(self.x)
        x, tangent, delta = (
            None if a is None else a.to(wide).contiguous(memory_format=form)
            for a in (self.x, *tangents, delta)
        )
        gamma = None if self.weight is None else self._by_group(self.weight.to(wide))
        pushed = self._projection(self._sums(tangent), self._sums(tangent, x), None)
        factor, slope, offset = (a if gamma is None else a * gamma for a in pushed[:3])
        tangent_y = self._combined(offset, (x, slope), (tangent, factor))
        if delta is None:
            return tangent_y, []
        total, with_x = self._sums(delta), self._sums(delta, x)
        product = self._sums(delta, tangent).mul_(pushed.factor)
        product.addcmul_(with_x, pushed.slope).addcmul_(total, pushed.offset)  # delta P(x')
        gradients = [product.sum(0).flatten()] if self.receives[0] else []
        if self.receives[1]:
            mean, rstd = self._statistics()
            pulled = self._projection(total, with_x, gamma)
            p, q, slope = -rstd * pushed.normal, -rstd * pulled.normal, -rstd * rstd
            slope = slope * self._means(product, gamma)  # of x - mean
            offset = p * pulled.offset + q * pushed.offset - mean * slope
            slope = p * pulled.slope + q * pushed.slope + slope
            terms = (x, slope), (delta, p * pulled.factor), (tangent, q * pushed.factor)
            gradients.append(self._combined(offset, *terms))
        return tangent_y, gradients

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and r, ``[B, G, 1]``."""
        wide = compute_type(self.x)
        mean, rstd = (a.to(wide).view(-1, self.groups, 1) for a in (self.mean, self.rstd))
        return mean, rstd

    def _by_group(self, per_channel: Tensor) -> Tensor:
        """``[..., C]`` as ``[B, G, C / G]``."""
        return per_channel.view(-1, self.groups, self.x.shape[1] // self.groups)

    def _sums(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        """The sums of a, or of a b, over each channel of a sample, by group."""
        return self._by_group((a if b is None else a * b).sum(list(range(2, a.dim()))))

    def _means(self, sums: Tensor, gamma: Tensor | None) -> Tensor:
        """m(gamma c), from the sums of c."""
        count = self.x[0].numel() // self.groups
        return (sums if gamma is None else sums * gamma).sum(2, keepdim=True) / count

    def _projection(self, total: Tensor, with_x: Tensor, gamma: Tensor | None) -> _Projection:
        """P(gamma c) from the sums of c and of c x."""
        (mean, rstd), average = self._statistics(), self._means(total, gamma)
        normal = (self._means(with_x, gamma) - mean * average) * rstd
        slope = -rstd * rstd * normal
        factor = rstd if gamma is None else rstd * gamma
        return _Projection(factor, slope, -rstd * average - mean * slope, normal)

    def _combined(self, offset: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
        """The sum of maps, each times a factor for every group or channel, and of an offset."""
        columns = (*self.x.shape[:2], *[1] * (self.x.dim() - 2))

        def column(values: Tensor) -> Tensor:
            size = self.x.shape[1] // self.groups
            return values.expand(self.x.shape[0], -1, size).reshape(columns)

        (first, factor), *others = terms
        out = torch.addcmul(column(offset), first, column(factor))
        for other, factor in others:
            out.addcmul_(other, column(factor))
        return out.to(self.x.dtype)


class _Projection(NamedTuple):
    """P(gamma c) = factor c + slope x + offset; normal = m(gamma c x^). By group, or by channel."""

    factor: Tensor
    slope: Tensor
    offset: Tensor
    normal: Tensor


def _layout(x: Tensor) -> torch.memory_format:
    """The layout that PyTorch's kernels expect, as F.group_norm gives it: channels-last on a CPU."""
    return suggest_memory_format(x) if x.device.type == "cpu" else torch.contiguous_format


class InstanceNorm(GroupNorm):
    """Each channel a group of its own, where there are no running statistics.

    A checkpoint runs PyTorch's function again, which saves other shapes.
    """

    @staticmethod
    def centred(x: Tensor) -> Tensor:
        """Contiguous, as F.instance_norm gives it of any x, and without means far from zero.

        The sums of a group norm's kernels lose digits to those; of x less a constant they are the same.
        """
        if x.dtype != compute_type(x):
            return x.contiguous()
        return (x - x.detach().mean(list(range(2, x.dim())), keepdim=True)).contiguous()

    @classmethod
    def record(
        cls,
        site: Site,
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Recorded | Any:
        tracks = running_mean is not None or running_var is not None
        if tracks or not use_input_stats or in_checkpoint():
            return NotImplemented
        return super().record(site, input, input.shape[1], weight, bias, eps)


class OtherInstanceNorm(Generic):
    """By autograd: of a channels-last cotangent of one sample, PyTorch's backward is wrong on a CPU."""

    def vjp(self, delta: Tensor) -> list[Tensor]:
        return super().vjp(delta.contiguous())

    def jvp(self, tangents: Any, delta: Tensor | None) -> tuple[Any, list[Tensor | None]]:
        return super().jvp(tangents, None if delta is None else delta.contiguous())


register_alternatives(F.instance_norm, rules=[InstanceNorm, OtherInstanceNorm])
