"""What BatchNorm normalises with, and its running statistics, in one operator."""

from __future__ import annotations

import torch
from torch import Tensor

from fastjac.errors import FastjacError
from fastjac.ops._library import call, define, refuse_forward_mode
from fastjac.ops._maps import accumulator, channel_zeros, check_channels, check_map, dense, vectors
from fastjac.ops.channel_statistics import channel_statistics_ref


def batch_norm_statistics(
    u: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """μ and r = 1 / sqrt(var + eps) that BatchNorm normalises u with; updates the running ones.

    Args:
        u: ``[B, C, H, W]``; float64, float32, bfloat16 or float16; copied if neither contiguous nor
            channels-last. In training, read once.
        running_mean, running_var: ``[C]``, of any floating dtype. In training, they may be None, and
            become (1 - momentum) times themselves + momentum times u's mean and unbiased variance, in
            place. Else, they are what is normalised with.
        training: whether the statistics are u's own, as :func:`channel_statistics` has them.

    Returns:
        ``mean`` and ``invstd``, ``[C]``, tensors of their own, in float64 for float64 and in float32
        else. Of a u without values: 0 and 1 / sqrt(eps), and nothing is updated.

    Raises:
        FastjacError: an argument is of the wrong kind; training with one value per channel; not training
            without running statistics; or a derivative could be asked for.

    The same from run to run.
    """
    op = "batch_norm_statistics"
    check_map(op, "u", u)
    refuse_forward_mode(op, u)
    if torch.is_grad_enabled() and u.requires_grad:
        raise FastjacError(f"{op}: expected a u without a derivative; use torch.no_grad()")
    if not training and (running_mean is None or running_var is None):
        raise FastjacError(f"{op}: training=False needs running_mean and running_var")
    if training and u.numel() == u.shape[1] > 0:
        raise FastjacError(
            f"{op}: training needs more than 1 value per channel, got u {list(u.shape)}"
        )
    check_channels(op, u, running_mean=running_mean, running_var=running_var)
    kept = vectors(u, running_mean, running_var)
    found = call(op, dense(u), *kept, training, float(momentum), float(eps))
    if training:
        for given, updated in zip((running_mean, running_var), kept, strict=True):
            if given is not updated:  # of another dtype, or strided
                given.copy_(updated)
    return found


def batch_norm_statistics_ref(
    u: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """:func:`batch_norm_statistics` in plain PyTorch."""
    acc = accumulator(u.dtype)
    if not training:
        return running_mean.to(acc, copy=True), (running_var.to(acc) + eps).rsqrt()
    mean, var = channel_statistics_ref(u)
    count = u.numel() // max(u.shape[1], 1)
    if count > 1:
        for running, new, factor in (
            (running_mean, mean, 1),
            (running_var, var, count / (count - 1)),
        ):
            if running is not None:
                running.mul_(1 - momentum).add_(new, alpha=momentum * factor)
    return mean, (var + eps).rsqrt()


define(
    "batch_norm_statistics(Tensor u, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "bool training, float momentum, float eps) -> (Tensor mean, Tensor invstd)",
    batch_norm_statistics_ref,
)


@torch.library.register_fake("fastjac::batch_norm_statistics")
def _fake(u, running_mean, running_var, training, momentum, eps):
    return channel_zeros(u), channel_zeros(u)
