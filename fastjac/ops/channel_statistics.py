"""Mean and variance of each channel: what BatchNorm normalises with in training."""

from __future__ import annotations

import torch
from torch import Tensor

from fastjac.ops._library import call, define, refuse_derivative, refuse_forward_mode
from fastjac.ops._maps import accumulator, channel_zeros, check_map, dense


def channel_statistics(u: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, over batch and map.

    Args:
        u: ``[B, C, H, W]``; float64, float32, bfloat16 or float16; copied if neither contiguous nor
            channels-last.

    Returns:
        ``mean`` and ``var``, ``[C]``, in float64 for float64 and in float32 else; zeros where there are
        no values.

    Raises:
        FastjacError: u is of the wrong kind; or a derivative is asked for.

    u is read once. What is summed is deviations from near the mean, so neither cancels for a large one:
    on a CPU in float64, over 16 in float32 first; on a GPU in float32, merged as means and variances.
    The same from run to run, and on a CPU for any number of threads.
    """
    check_map("channel_statistics", "u", u)
    refuse_forward_mode("channel_statistics", u)
    return call("channel_statistics", dense(u))


def channel_statistics_ref(u: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`channel_statistics` in plain PyTorch."""
    if u.numel() == 0:
        return channel_zeros(u), channel_zeros(u)
    x = u.to(accumulator(u.dtype))
    mean = x.mean((0, 2, 3), keepdim=True)
    return mean.flatten(), (x - mean).square().mean((0, 2, 3))


define("channel_statistics(Tensor u) -> (Tensor mean, Tensor var)", channel_statistics_ref)


@torch.library.register_fake("fastjac::channel_statistics")
def _fake(u):
    return channel_zeros(u), channel_zeros(u)


refuse_derivative("channel_statistics", "NormActPool is differentiable")
