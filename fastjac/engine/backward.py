"""Where the Jacobian term enters the ordinary backward: autograd functions.

The student's forward is recorded by autograd as in any training step. The pushforward's results, a
gradient for each parameter and a curvature cotangent for some intermediates, are handed to autograd
as the derivatives of the loss with respect to those tensors (:class:`Deliver`), and autograd adds them
on its way down. A train-mode BatchNorm takes its curvature through slots of its own, since that
cotangent is affine in the normalised input and need not exist as a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastjac.errors import FastjacError


def _first_order(name: str) -> None:
    if torch.is_grad_enabled():
        raise FastjacError(
            f"{name} differentiates once; got a backward with create_graph=True. "
            "strategy='autograd' differentiates the student's outputs further"
        )


class Deliver(torch.autograd.Function):
    """The loss unchanged; its backward gives ``tensor`` the ``gradient``, or ``spread(gradient)``."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,
        tensor: Tensor,
        gradient: Tensor,
        spread: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.spread = spread
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        _first_order("fastjac.JacobianMatching")
        (gradient,) = ctx.saved_tensors
        # On a CPU it costs nothing to see that a loss has no factor; elsewhere it would be waited for.
        if upstream.device.type == "cpu" and upstream.item() == 1:
            scaled = gradient
        else:
            scaled = gradient * upstream.to(gradient.dtype)
        return upstream, scaled if ctx.spread is None else ctx.spread(scaled), None, None


class BatchNorm(torch.autograd.Function):
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
        _first_order("fastjac's BatchNorm")
        u, weight, mean, invstd = ctx.saved_tensors
        gu = gw = gb = None
        if gy is not None:
            wanted = [bool(w) for w in ctx.needs_input_grad[:3]]
            gu, gw, gb = torch.ops.aten.native_batch_norm_backward(
                gy, u, weight, None, None, mean, invstd, True, ctx.eps, wanted
            )
        if not ctx.needs_input_grad[0]:
            return None, gw, gb, None, None, None, None
        if curvature is not None:
            gu = curvature.clone() if gu is None else gu.add_(curvature)
        if coefficient is not None:
            shape = [1, -1] + [1] * (u.dim() - 2)
            slope = (coefficient * invstd).to(u.dtype)
            gu = torch.zeros_like(u) if gu is None else gu
            gu.addcmul_(u, slope.view(shape)).sub_((slope * mean).to(u.dtype).view(shape))
        return gu, gw, gb, None, None, None, None
