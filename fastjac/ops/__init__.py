"""The native operators, each with its PyTorch reference."""

from fastjac.ops.attention_window import (
    attention_window,
    attention_window_ref,
    attention_window_slope,
    attention_window_slope_ref,
)
from fastjac.ops.batch_norm_statistics import batch_norm_statistics, batch_norm_statistics_ref
from fastjac.ops.channel_statistics import channel_statistics, channel_statistics_ref
from fastjac.ops.jacobian_match import jacobian_match, jacobian_match_ref
from fastjac.ops.norm_act_pool import (
    norm_act_pool,
    norm_act_pool_backward,
    norm_act_pool_backward_ref,
    norm_act_pool_pushforward,
    norm_act_pool_pushforward_ref,
    norm_act_pool_ref,
)
from fastjac.ops.norm_act_pool_autograd import NormActPool
from fastjac.ops.window_crop import (
    window_crop,
    window_crop_adjoint,
    window_crop_adjoint_ref,
    window_crop_ref,
)
from fastjac.ops.winograd import winograd, winograd_ref, winograd_weight, winograd_weight_ref

__all__ = [
    "NormActPool",
    "attention_window",
    "attention_window_ref",
    "attention_window_slope",
    "attention_window_slope_ref",
    "batch_norm_statistics",
    "batch_norm_statistics_ref",
    "channel_statistics",
    "channel_statistics_ref",
    "jacobian_match",
    "jacobian_match_ref",
    "norm_act_pool",
    "norm_act_pool_backward",
    "norm_act_pool_backward_ref",
    "norm_act_pool_pushforward",
    "norm_act_pool_pushforward_ref",
    "norm_act_pool_ref",
    "window_crop",
    "window_crop_adjoint",
    "window_crop_adjoint_ref",
    "window_crop_ref",
    "winograd",
    "winograd_ref",
    "winograd_weight",
    "winograd_weight_ref",
]
