"""The rule of group normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

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

    def _projected(self, cotangent: Tensor, weight: Tensor | None) -> Tensor:
        """P(gamma c)."""
        form = _layout(self.x)
        batch, channels = self.x.shape[:2]
        return aten.native_group_norm_backward.default(
            *(cotangent.contiguous(memory_format=form), self.x.contiguous(memory_format=form)),
            *(self.mean, self.rstd, weight, batch, channels),
            *(self.x.numel() // (batch * channels), self.groups, [True, False, False]),
        )[0]

    def vjp(self, delta: Tensor) -> list[Tensor]:
        return [self._projected(delta, self.weight)]

    def jvp(self, tangents: Any, delta: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        (tangent,) = tangents
        pushed = self._projected(tangent, None)
        column = (1, -1, *[1] * (self.x.dim() - 2))
        gamma = None if self.weight is None else self.weight.to(pushed.dtype).view(column)
        tangent_y = pushed if gamma is None else pushed * gamma
        if delta is None:
            return tangent_y, []
        product = self._sums(delta, pushed)  # [B, C]
        gradients = [product.sum(0)] if self.receives[0] else []
        if self.receives[1]:
            gradients.append(self._curvature(delta, tangent, pushed, product))
        return tangent_y, gradients

    def _sums(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        """The sums of a, or of a b, over each sample's channels, ``[B, C]``, as wide as the mean."""
        dims = list(range(2, a.dim()))
        return (a if b is None else a * b).sum(dims, dtype=self.mean.dtype)

    def _means(self, sums: Tensor, weight: Tensor | None = None) -> Tensor:
        """Means over groups, ``[B, G]``, from sums over channels, weighted."""
        sums = sums if weight is None else sums * weight.to(sums.dtype)
        batch = self.x.shape[0]
        count = self.x.numel() // (batch * self.groups)
        return sums.view(batch, self.groups, -1).sum(2) / count

    def _curvature(self, delta: Tensor, tangent: Tensor, pushed: Tensor, product: Tensor) -> Tensor:
        weight, rstd = self.weight, self.rstd.view(-1, self.groups)
        mean = self.mean.view(-1, self.groups)

        def mean_xhat(c: Tensor, gamma: Tensor | None) -> Tensor:
            with_x, alone = self._sums(c, self.x), self._sums(c)
            return (self._means(with_x, gamma) - mean * self._means(alone, gamma)) * rstd

        of_tangent, of_delta = mean_xhat(tangent, None), mean_xhat(delta, weight)
        slope = -rstd * rstd * self._means(product, weight)  # of x - mean
        pulled = self._projected(delta, weight)
        out = torch.addcmul(self._spread(-mean * slope), self.x, self._spread(slope))
        out.addcmul_(pulled, self._spread(-rstd * of_tangent))
        return out.addcmul_(pushed, self._spread(-rstd * of_delta))

    def _spread(self, per_group: Tensor) -> Tensor:
        """``[B, G]`` as a factor of a map."""
        channels = per_group.repeat_interleave(self.x.shape[1] // self.groups, 1)
        return channels.to(self.x.dtype).view(*channels.shape, *[1] * (self.x.dim() - 2))


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
