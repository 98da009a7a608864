"""A normalise-activate-pool chain as one autograd node, with its statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastjac.errors import FastjacError
from fastjac.ops.batch_norm_statistics import batch_norm_statistics
from fastjac.ops.norm_act_pool import backward, forward, norm_act_pool, pooled_shape


class NormActPool(torch.autograd.Function):
    """:func:`norm_act_pool` with its statistics, differentiable once; keeps u (and residual) alone.

    ``NormActPool.apply(u, residual, weight, bias, running_mean, running_var, training, momentum, eps,
    activation, slope, pool, recompute_input)`` gives y; the mean and 1/sqrt(var + eps) ``[C]`` that it
    used, not differentiable; and two slots, whose gradients are added to u's cotangent:
    ``coefficient`` ``[C]`` as coefficient · x̂, and ``curvature`` (of u's shape, without storage of
    its own) as it is.

    In training, the statistics are u's own, and the running ones, if given, are updated as
    ``torch.batch_norm`` does. Else, the running ones are used, which must be given.
    ``recompute_input()`` gives u once more, as a tensor of its own, which the backward may overwrite:
    then u is not saved either.
    """

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        activation: str,
        slope: float,
        pool: str,
        recompute_input: Callable[[], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        statistics = (running_mean, running_var, training, momentum, eps)
        mean, invstd = batch_norm_statistics(u, *statistics)
        y = norm_act_pool(u, residual, weight, bias, mean, invstd, activation, slope, pool)
        saved = u if recompute_input is None else None
        ctx.save_for_backward(saved, residual, weight, bias, mean, invstd)
        ctx.options, ctx.training = (activation, slope, pool), training
        ctx.recompute_input = recompute_input
        ctx.mark_non_differentiable(mean, invstd)
        ctx.set_materialize_grads(False)
        return y, mean, invstd, torch.zeros_like(mean), u.new_zeros(()).expand(u.shape)

    @staticmethod
    def backward(
        ctx: Any,
        gy: Tensor | None,
        _mean: None,
        _invstd: None,
        coefficient: Tensor | None,
        curvature: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        return *norm_act_pool_cotangents(ctx, gy, coefficient, curvature), *[None] * 9

    @staticmethod
    def recompute(node: Any) -> Tensor:
        """y once more, bit for bit, from ``y.grad_fn`` and what it saves."""
        return forward(*_saved_inputs(node), *node.options)


def norm_act_pool_cotangents(
    ctx: Any, gy: Tensor | None, coefficient: Tensor | None, curvature: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The cotangents of u, residual, weight and bias, from a chain's autograd node.

    The node saves u (None where ``node.recompute_input()`` gives it), residual, weight, bias, mean and
    invstd, and has ``options`` (activation, slope, pool) and ``training``.
    """
    if torch.is_grad_enabled():
        raise FastjacError(
            "NormActPool differentiates once; got a backward with create_graph=True "
            "(norm_act_pool_ref can be differentiated further)"
        )
    u, residual, weight, bias, mean, invstd = _saved_inputs(ctx)
    if gy is None:  # only the slots have a gradient
        gy = u.new_zeros(pooled_shape("NormActPool", u, ctx.options[2]))
    overwrite = ctx.recompute_input is not None
    return backward(  # autograd casts the cotangents of weight and bias
        *(gy, u, residual, weight, bias, mean, invstd, *ctx.options),
        *(ctx.training, coefficient, curvature, ctx.needs_input_grad[:4], overwrite),
    )


def _saved_inputs(node: Any) -> tuple[Tensor | None, ...]:
    u, *rest = node.saved_tensors
    return u if node.recompute_input is None else node.recompute_input(), *rest
