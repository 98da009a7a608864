r"""The brightest window of an attention map, and the derivatives of its brightness.

With Z = features ``[B, C, h, w]`` and p the power, A is the mean over channels of :math:`|Z|^p`, and P
the mean of A over k×k windows (stride 1, no padding): ``[B, h - k + 1, w - k + 1]``. (Srinivas &
Fleuret, "Knowledge Transfer with Jacobian Matching", ICML 2018.)

Common to both operators: features are float64, float32, bfloat16 or float16; sums are kept in the
*accumulator* dtype, float64 for float64 and float32 else. Results are the same from run to run, and
on a CPU for any number of threads. Nothing waits for the position on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastjac.errors import FastjacError
from fastjac.ops._library import call, define, refuse_derivative, refuse_forward_mode
from fastjac.ops._maps import accumulator, check_map
from fastjac.ops.window_crop import check_start, empty_crop, window_crop_ref


def attention_window(features: Tensor, k: int, power: float = 2) -> tuple[Tensor, Tensor]:
    """Where P is largest, and P there; the features are read once.

    Args:
        features: ``[B, C, h, w]``; copied if neither contiguous nor channels-last.
        k: the window's height and width.
        power: 1, or at least 2.

    Returns:
        ``position`` ``[B, 2]`` int64, the window's first row and column: the first maximum in row
        order, and a NaN before any number, as ``torch.argmax`` has it; and ``value`` ``[B]``, in the
        accumulator dtype. Of two windows whose P differ by rounding alone, either is found.

    Raises:
        FastjacError: an argument is of the wrong kind; or a derivative is asked for.
    """
    _check("attention_window", features, k, power)
    refuse_forward_mode("attention_window", features)
    return call("attention_window", features, k, float(power))


def attention_window_ref(features: Tensor, k: int, power: float = 2) -> tuple[Tensor, Tensor]:
    """:func:`attention_window` in plain PyTorch."""
    magnitude = features.to(accumulator(features.dtype)).abs().pow(power)
    pooled = torch.ops.aten.avg_pool2d(magnitude.mean(1, True), k, 1)[:, 0]
    value, index = pooled.flatten(1).max(1)
    width = pooled.shape[2]
    return torch.stack([index.div(width, rounding_mode="floor"), index % width], 1), value


def attention_window_slope(
    features: Tensor, position: Tensor, k: int, power: float = 2
) -> tuple[Tensor, Tensor]:
    r"""The first and second derivative of P at ``position``, for each feature in its window.

    .. math::
        slope = \frac{p\,|z|^{p-1}\,\mathrm{sign}(z)}{C k^2}, \qquad
        bend = \frac{p\,(p-1)\,|z|^{p-2}}{C k^2}

    P is a sum over elements, so it has no mixed second derivatives.

    Args:
        features: ``[B, C, h, w]``, of any strides; the window alone is read.
        position: ``[B, 2]`` int64; where its window leaves the map, features count as 0.
        k, power: as above.

    Returns:
        ``slope`` and ``bend`` ``[B, C, k, k]``, of the features' dtype, rounded once.

    Raises:
        FastjacError: an argument is of the wrong kind; or a derivative is asked for.
    """
    op = "attention_window_slope"
    _check(op, features, k, power)
    check_start(op, "position", position, "features", features)
    refuse_forward_mode(op, features)
    return call("attention_window_slope", features, position, k, float(power))


def attention_window_slope_ref(
    features: Tensor, position: Tensor, k: int, power: float = 2
) -> tuple[Tensor, Tensor]:
    """:func:`attention_window_slope` in plain PyTorch."""
    window = window_crop_ref(features, position, (k, k))
    z = window.to(accumulator(features.dtype))
    scale = 1 / max(1, features.shape[1] * k * k)
    slope = power * z.sign() * z.abs().pow(power - 1)
    bend = torch.zeros_like(z) if power == 1 else power * (power - 1) * z.abs().pow(power - 2)
    return (slope * scale).to(window.dtype), (bend * scale).to(window.dtype)


def _check(op: str, features: Tensor, k: int, power: float) -> None:
    check_map(op, "features", features)
    h, w = features.shape[2:]
    if not isinstance(k, int | torch.SymInt):
        raise FastjacError(f"{op}: k must be an integer, got {type(k).__name__}")
    if not 1 <= k <= min(h, w):
        raise FastjacError(
            f"{op}: k must be from 1 to the map's height and width, {h}x{w}, got {k}"
        )
    if not (power == 1 or power >= 2):
        raise FastjacError(f"{op}: power must be 1 or at least 2, got {power}")


define(
    "attention_window(Tensor features, int k, float power) -> (Tensor position, Tensor value)",
    attention_window_ref,
)
define(
    "attention_window_slope(Tensor features, Tensor position, int k, float power) "
    "-> (Tensor slope, Tensor bend)",
    attention_window_slope_ref,
)


@torch.library.register_fake("fastjac::attention_window")
def _fake(features, k, power):
    batch = features.shape[0]
    value = features.new_empty(batch, dtype=accumulator(features.dtype))
    return features.new_empty((batch, 2), dtype=torch.int64), value


@torch.library.register_fake("fastjac::attention_window_slope")
def _slope_fake(features, position, k, power):
    return empty_crop(features, (k, k)), empty_crop(features, (k, k))


refuse_derivative("attention_window", "attention_window_slope gives value's")
refuse_derivative("attention_window_slope", "attention_window_slope_ref can be differentiated")
