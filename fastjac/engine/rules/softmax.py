"""The rules of softmax and its logarithm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjac.engine.rules.base import Recorded, Rule, register_alternatives
from fastjac.engine.rules.generic import Generic
from fastjac.fusion.mode import in_checkpoint

if TYPE_CHECKING:
    from fastjac.engine.site import Site

aten = torch.ops.aten


def pushed(tangent: Tensor, p: Tensor, axis: int) -> Tensor:
    """p (x' - sum(p x')): the tangent of p = softmax(x), and for a cotangent that of x."""
    return aten._softmax_backward_data.default(tangent, p, axis, p.dtype)


def gradient_of_p(tangent: Tensor, delta: Tensor, p: Tensor, axis: int) -> Tensor:
    """The gradient of <delta, :func:`pushed`> in p."""
    mean = (p * tangent).sum(axis, keepdim=True)
    of_mean = (p * delta).sum(axis, keepdim=True)
    return torch.addcmul(delta * (tangent - mean), tangent, of_mean, value=-1)


@dataclass
class Softmax(Rule):
    """p = softmax(x) along ``axis``; of p, which autograd saves too, all derivatives are functions."""

    y: Tensor
    axis: int
    curved: bool

    recomputes_cotangent: ClassVar[bool] = True

    @classmethod
    def record(
        cls,
        site: Site,
        input: Tensor,
        dim: int | None = None,
        *others: Any,
        **named: Any,
    ) -> Recorded | Any:
        # A type is not covered; a number is the level of the stack that a warning is for.
        plain = all(each is None or type(each) is int for each in (*others, *named.values()))
        if not plain or type(dim) is not int or not input.dim() or in_checkpoint():
            return NotImplemented
        if torch.is_autocast_enabled(input.device.type):
            return NotImplemented
        receivers = site.receives(input, 0)
        y = site.run(input, dim, *others, **named)
        return y, cls((site.number(input),), site.keep(y), dim, bool(receivers)), receivers

    def needs_delta(self) -> bool:
        return self.curved

    def vjp(self, delta: Tensor) -> list[Tensor]:
        return [pushed(delta, self.y, self.axis)]

    def jvp(self, tangents: Any, delta: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        (tangent,) = tangents
        gradients = []
        if self.curved:
            of_p = gradient_of_p(tangent, delta, self.y, self.axis)
            gradients = [pushed(of_p, self.y, self.axis)]
        return pushed(tangent, self.y, self.axis), gradients


class LogSoftmax(Softmax):
    """y = log(softmax(x)): the cotangent is delta - p sum(delta), the tangent x' - sum(p x')."""

    def vjp(self, delta: Tensor) -> list[Tensor]:
        return [aten._log_softmax_backward_data.default(delta, self.y, self.axis, delta.dtype)]

    def jvp(self, tangents: Any, delta: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        (tangent,), p, gradients = tangents, self.y.exp(), []
        if self.curved:
            gradients = [pushed(tangent * -delta.sum(self.axis, keepdim=True), p, self.axis)]
        return tangent - (p * tangent).sum(self.axis, keepdim=True), gradients


register_alternatives(F.softmax, torch.softmax, Tensor.softmax, rules=[Softmax, Generic])
register_alternatives(
    F.log_softmax, torch.log_softmax, Tensor.log_softmax, rules=[LogSoftmax, Generic]
)
