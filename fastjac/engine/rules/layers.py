"""Rules of the layers with parameters: convolution, linear, BatchNorm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

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
    axis_geometry,
    compute_type,
    register_rule,
)
from fastjac.errors import FastjacError
from fastjac.fusion.mode import in_checkpoint
from fastjac.ops.convolution import convolution, convolution_input, convolution_weight

if TYPE_CHECKING:
    from fastjac.engine.site import Site

aten = torch.ops.aten


@register_rule(torch.conv1d, torch.conv2d, torch.conv3d)
@dataclass
class Convolution(Rule):
    """y = w * x + b over any number of axes: linear in x, and in w."""

    weight: Tensor
    trains: bool
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    shape: torch.Size
    input_dtype: torch.dtype
    dtype: torch.dtype

    @classmethod
    def record(
        cls,
        site: Site,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Recorded | Any:
        axes = weight.dim() - 2
        given = padding
        stride, dilation = (_sizes(v, axes) for v in (stride, dilation))
        if isinstance(padding, str):
            spans = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            if padding == "same" and any(span % 2 for span in spans):
                return NotImplemented
            padding = [span // 2 if padding == "same" else 0 for span in spans]
        padding = _sizes(padding, axes)
        if site.varies(weight, bias) or input.dim() != axes + 2 or input.is_complex():
            return NotImplemented
        y = site.run(input, weight, bias, stride, given, dilation, groups)
        receivers = site.receives(weight)
        rule = cls(
            *((site.number(input),), site.keep(weight), bool(receivers), stride, padding),
            *(dilation, groups, input.shape, input.dtype, y.dtype),
        )
        return y, rule, receivers

    def needs_delta(self) -> bool:
        return self.trains

    def _geometry(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups

    def vjp(self, delta: Tensor) -> list[Tensor]:
        weight = self.weight.to(delta.dtype)
        return [
            convolution_input(delta, weight, self.shape, *self._geometry()).to(self.input_dtype)
        ]

    def jvp(self, tangents: Any, delta: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        tangent = tangents[0].to(self.dtype)
        weight, geometry = self.weight.to(self.dtype), self._geometry()
        gradients = []
        if self.trains:
            gradients = [convolution_weight(delta, tangent, weight, *geometry)]
        return convolution(tangent, weight, None, *geometry), gradients

    def input_regions(self, region: Region) -> list[Region]:
        kernel = self.weight.shape[2:]
        if region.axis != 2:
            raise NotLocalError("its channels are an axis of the map")
        return [region.through(axis_geometry(kernel, self.stride, self.padding, self.dilation))]

    def crop(self, crops: Crops, region: Region) -> Rule:
        (source,) = self.input_regions(region)
        return self.changed(padding=[0, 0], shape=torch.Size(source.resized(self.shape)))


def _sizes(value: Any, axes: int) -> list[int]:
    sizes = [value] * axes if isinstance(value, int) else list(value)
    return sizes * axes if len(sizes) == 1 else sizes


@register_rule(F.linear)
@dataclass
class Linear(Rule):
    """y = x w^T + b."""

    weight: Tensor
    trains: bool
    input_dtype: torch.dtype
    dtype: torch.dtype

    @classmethod
    def record(
        cls, site: Site, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Recorded | Any:
        if site.varies(weight, bias) or weight.dim() != 2 or weight.is_complex():
            return NotImplemented
        y = site.run(input, weight, bias)
        receivers = site.receives(weight)
        number = site.number(input)
        return (
            y,
            cls((number,), site.keep(weight), bool(receivers), input.dtype, y.dtype),
            receivers,
        )

    def needs_delta(self) -> bool:
        return self.trains

    def vjp(self, delta: Tensor) -> list[Tensor]:
        return [(delta @ self.weight.to(delta.dtype)).to(self.input_dtype)]

    def jvp(self, tangents: Any, delta: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        tangent, gradients = tangents[0].to(self.dtype), []
        if self.trains:
            count = delta.shape[:-1].numel()  # -1 would not do for a layer of no features
            rows = delta.reshape(count, delta.shape[-1])
            gradients = [rows.t() @ tangent.reshape(count, tangent.shape[-1])]
        return aten.linear.default(tangent, self.weight.to(self.dtype)), gradients

    def input_regions(self, region: Region) -> list[Region]:
        if region.axis != 1:
            raise NotLocalError("it sees a whole row of its input")
        return [region]


class SlottedBatchNorm(torch.autograd.Function):
    """Train-mode BatchNorm whose backward adds a curvature cotangent.

    Gives y, the batch mean and 1/sqrt(var + eps) ``[C]``, and two slots whose gradients, if they come,
    are added to the cotangent of the input u: ``coefficient`` ``[C]`` as coefficient * (u - mean) *
    invstd, and ``curvature`` (of u's shape, and without storage of its own) as it is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        y, mean, invstd = torch.native_batch_norm(
            u, weight, bias, running_mean, running_var, True, momentum, eps
        )
        ctx.save_for_backward(u, weight, mean, invstd)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, invstd)
        ctx.set_materialize_grads(False)
        coefficient = torch.zeros_like(mean)
        curvature = u.new_zeros(()).expand(u.shape)
        return y, mean, invstd, coefficient, curvature

    @staticmethod
    def backward(
        ctx: Any,
        gy: Tensor | None,
        _mean: None,
        _invstd: None,
        coefficient: Tensor | None,
        curvature: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise FastjacError(
                "fastjac's BatchNorm differentiates once; got a backward with create_graph=True. "
                "strategy='autograd' differentiates the student's outputs further"
            )
        u, weight, mean, invstd = ctx.saved_tensors
        gu = gw = gb = None
        if gy is not None:
            wanted = [bool(w) for w in ctx.needs_input_grad[:3]]
            gu, gw, gb = aten.native_batch_norm_backward.default(
                gy, u, weight, None, None, mean, invstd, True, ctx.eps, wanted
            )
        gu = with_slots(gu, u, mean, invstd, coefficient, curvature)
        return gu, gw, gb, None, None, None, None


def with_slots(
    gu: Tensor | None,
    u: Tensor,
    mean: Tensor,
    invstd: Tensor,
    coefficient: Tensor | None,
    curvature: Tensor | None,
) -> Tensor | None:
    """The cotangent ``gu`` of u, None for 0, with what has come to the slots added, in its place."""
    if curvature is not None:
        gu = curvature.clone() if gu is None else gu.add_(curvature)
    if coefficient is not None:
        gu = torch.zeros_like(u) if gu is None else gu
        gu.add_(times_xhat(coefficient, u, mean, invstd))
    return gu


def times_xhat(coefficient: Tensor, u: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    """coefficient * x^, in u's dtype."""
    shape = [1, -1] + [1] * (u.dim() - 2)
    scale = coefficient * invstd
    return torch.addcmul((-scale * mean).to(u.dtype).view(shape), u, scale.to(u.dtype).view(shape))


@register_rule(F.batch_norm)
@dataclass
class BatchNorm(Pointwise):
    """y = gamma x^ + beta, x^ = (u - mean) r, with the statistics running, frozen or the batch's.

    With P(delta) = r delta (frozen, running), or r (delta - m(delta) - x^ m(delta x^)) (batch), and
    T = sum(P(delta) u') per channel: the gradient of gamma is T in all three; the curvature is
    -(gamma r T / N) x^, and for batch statistics also
    -r (gamma P(delta) m(x^ u') + y' m(delta x^)).

    ``u`` and ``mean`` are kept where the curvature needs them; ``slots``: whether it goes to the slots
    of :class:`SlottedBatchNorm`, else to u itself.
    """

    weight: Tensor | None
    invstd: Tensor
    u: Tensor | None
    mean: Tensor | None
    eps: float
    training: bool
    batch: bool
    slots: bool
    receives: tuple[bool, bool]  # gamma, u
    count: int | Tensor
    axes: int

    recomputes_cotangent: ClassVar[bool] = True

    @classmethod
    def record(
        cls,
        site: Site,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Recorded:
        u, count = input, input.numel() // max(input.shape[1], 1)
        receivers = () if weight is None else site.receives(weight)
        scales, curves, slots, kept = bool(receivers), False, False, None
        batch = training and site.batch_stats == "batch"
        if not training:
            invstd = (running_var.detach().to(compute_type(u)) + eps).rsqrt()
            y = site.run(u, running_mean, running_var, weight, bias, False, momentum, eps)
            mean = None
        elif in_checkpoint() or not site.trains:
            var, mean = torch.var_mean(
                u.detach().to(compute_type(u)), [d for d in range(u.dim()) if d != 1], correction=0
            )
            invstd = (var + eps).rsqrt()
            y = site.run(u, running_mean, running_var, weight, bias, True, momentum, eps)
            receivers += (mapped := site.receives(u, 0))
            curves, kept = bool(mapped), site.keep(u)
        else:
            if count <= 1:
                raise ValueError(
                    "Expected more than 1 value per channel when training, got input size "
                    f"{u.size()}"
                )
            joined = u if site.tape.trains(u) else u.detach()
            y, mean, invstd, *both = SlottedBatchNorm.apply(
                joined, weight, bias, running_mean, running_var, momentum, eps
            )
            slots = curves = site.tape.trains(u)
            if slots:
                receivers += tuple(r for slot in both[: 1 + batch] for r in site.receives(slot))
            kept = site.keep(u) if batch else None
        rule = cls(
            *((site.number(u),), None if weight is None else site.keep(weight), invstd, kept),
            *(mean if kept is not None else None, eps, training, batch, slots),
            *((scales, curves), count, u.dim()),
        )
        return y, rule, receivers

    def needs_delta(self) -> bool:
        return any(self.receives)

    def _column(self, vector: Tensor, like: Tensor) -> Tensor:
        return vector.to(like.dtype).view([1, -1] + [1] * (self.axes - 2))

    def _scale(self) -> Tensor:
        """gamma r, ``[C]``."""
        return (
            self.invstd if self.weight is None else self.weight.to(self.invstd.dtype) * self.invstd
        )

    def _projected(self, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """r (c - m(c) - x^ m(c x^)) and m(c x^), per channel."""
        projected, sums, _ = aten.native_batch_norm_backward.default(
            *(cotangent, self.u, torch.ones_like(self.invstd), None, None, self.mean, self.invstd),
            *(True, self.eps, [True, True, True]),
        )
        return projected, sums / self.count

    def _joint(self, total: Tensor) -> Tensor:
        """A sum per channel over all that the statistics were taken over."""
        return total

    def vjp(self, delta: Tensor) -> list[Tensor]:
        if not self.batch:
            return [delta * self._column(self._scale(), delta)]
        projected, _ = self._projected(delta)
        return [projected if self.weight is None else projected * self._column(self.weight, delta)]

    def jvp(self, tangents: Any, delta: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        tangent, scale = tangents[0], self._scale()
        scales, curves = self.receives
        tangent_y, mean_xhat_tangent = tangent * self._column(scale, tangent), None
        if self.batch:
            tangent_y, mean_xhat_tangent = self._projected(tangent)
            if self.weight is not None:
                tangent_y = tangent_y * self._column(self.weight, tangent_y)
        if not scales and not curves:
            return tangent_y, []
        mean_delta_xhat = None
        if self.batch:
            projected, mean_delta_xhat = self._projected(delta)
        else:
            projected = delta * self._column(self.invstd, delta)
        dims = [d for d in range(tangent.dim()) if d != 1]
        total = (projected * tangent).sum(dims, dtype=compute_type(projected))
        gradients = [total] if scales else []
        if not curves:
            return tangent_y, gradients
        coefficient, curvature = scale * self._joint(total) * (-1 / self.count), None
        if self.batch:
            left = self._column(-scale * mean_xhat_tangent, projected)
            right = self._column(-self.invstd * mean_delta_xhat, projected)
            curvature = (projected * left).addcmul_(tangent_y, right)
        if self.slots:
            return tangent_y, [*gradients, coefficient, *([curvature] if self.batch else [])]
        whole = times_xhat(coefficient, self.u, self.mean, self.invstd)
        return tangent_y, [*gradients, whole if curvature is None else whole + curvature]

    def input_regions(self, region: Region) -> list[Region]:
        if self.batch:
            raise NotLocalError("BatchNorm in train mode with batch_stats='batch'")
        if region.axis != 2:
            raise NotLocalError("its channels are an axis of the map")
        if self.receives[1] and not self.slots:
            raise NotLocalError("BatchNorm in train mode under torch.utils.checkpoint")
        return [region]
