"""Convolutions of the sweeps: PyTorch's, and on a CPU others of the same where those are faster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastjac.ops.winograd import winograd, winograd_is_faster, winograd_weight

aten = torch.ops.aten
_LAST = torch.channels_last
# Where input_by_blocks is faster, by benchmarks/test_convolution.py.
_CHANNELS = 4  # at most, of the input
_ELEMENTS = 1 << 17  # at least, of the output
_DTYPES = (torch.float32, torch.bfloat16)
_ONEDNN = torch.backends.mkldnn.is_available()


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """PyTorch's convolution of any number of axes; by :func:`winograd` where that pays."""
    if winograd_is_faster(x, weight, stride, padding, dilation, groups):
        return winograd(x, weight, bias, padding)
    zeros = [0] * len(stride)
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, zeros, groups)


def convolution_input(
    gy: Tensor,
    weight: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The cotangent of :func:`convolution`'s input, of ``shape``, in gy's layout."""
    if winograd_is_faster(gy, weight, stride, padding, dilation, groups):
        return winograd(gy, weight, None, padding, adjoint=True)
    if _blocks_are_faster(gy, weight, dilation, groups):
        return input_by_blocks(gy, weight, shape, stride, padding)
    # It does not depend on the input: that only tells its shape and layout.
    x = torch.empty(shape, dtype=gy.dtype, device=gy.device, memory_format=_layout(gy))
    return _derivatives(gy, x, weight, stride, padding, dilation, groups, [True, False, False])[0]


def convolution_weight(
    gy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The gradient of :func:`convolution`'s weight."""
    geometry = (stride, padding, dilation, groups)
    if winograd_is_faster(gy, weight, *geometry) and winograd_is_faster(x, weight, *geometry):
        return winograd_weight(gy, x, weight, padding)
    return _derivatives(gy, x, weight, *geometry, [False, True, False])[1]


def _derivatives(
    gy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    mask: list[bool],
) -> Any:
    zeros = [0] * len(stride)
    return aten.convolution_backward.default(
        gy, x, weight, None, stride, padding, dilation, False, zeros, groups, mask
    )


def _layout(gy: Tensor) -> torch.memory_format:
    last = gy.dim() == 4 and gy.is_contiguous(memory_format=_LAST)
    return _LAST if last else torch.contiguous_format


def _blocks_are_faster(gy: Tensor, weight: Tensor, dilation: Sequence[int], groups: int) -> bool:
    """Whether :func:`input_by_blocks` computes the cotangent, and faster than PyTorch does."""
    return (
        _ONEDNN
        and gy.is_cpu
        and gy.dim() == 4
        and gy.dtype in _DTYPES
        and weight.shape[1] <= _CHANNELS
        and min(weight.shape[1:]) > 0
        and min(weight.shape[2:]) > 1
        and list(dilation) == [1, 1]
        and groups == 1
        and gy.numel() >= _ELEMENTS
    )


def input_by_blocks(
    gy: Tensor, weight: Tensor, shape: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    r"""The cotangent of a convolution's input, by a convolution that gives it in blocks.

    PyTorch's kernel fills the processor's vectors with channels of the input, of which an image has
    three. Here every pixel of a block of r x r is a channel of its own, for r = s, the stride, or 2
    where that is 1. With m = r / s, k the kernel's size, n = ceil(k / s), p the padding, and f the
    flipped weight with s (n - 1) + r - k zeros before it and r - s behind it, the cotangent is, along
    each axis and for 0 <= a < r,

    .. math::
        \bar x_{r b + a - s (m - 1) - p} = \sum_{t < n + m - 1} \bar y_{m b + t - n - m + 2} \,
        f_{s t + r - 1 - a}

    Args:
        gy: the output's cotangent, ``[B, K, h, w]``.
        weight: ``[K, C, k, k]``, not dilated, of gy's dtype and device.
        shape: the input's, ``[B, C, H, W]``.
        stride, padding: for rows and columns.

    Returns:
        ``[B, C, H, W]``, in gy's layout. As deterministic as PyTorch's forward convolution.
    """
    filters, channels, *kernel = weight.shape
    blocks = [2 if s == 1 else s for s in stride]
    steps = [r // s for r, s in zip(blocks, stride, strict=True)]
    taps = [-(-k // s) for k, s in zip(kernel, stride, strict=True)]
    zeros: list[int] = []  # around the weight: the last axis stands first
    for k, s, n, r in zip(kernel, stride, taps, blocks, strict=True):
        zeros = [s * (n - 1) + r - k, r - s, *zeros]
    f = torch.constant_pad_nd(weight.flip(2, 3), zeros)
    for axis, (s, n, m) in enumerate(zip(stride, taps, steps, strict=True)):
        f = f.unfold(2 + axis, s * (n + m - 2) + 1, 1)[..., ::s]
    f = f.flip(2, 3).permute(2, 3, 1, 0, 4, 5)  # [r, r, C, K, taps, taps]
    f = f.reshape(-1, filters, *f.shape[4:]).contiguous(memory_format=_layout(gy))
    margins = [n + m - 2 for n, m in zip(taps, steps, strict=True)]
    out = torch.convolution(gy, f, None, steps, margins, [1, 1], False, [0, 0], 1)
    height, width = (r * n for r, n in zip(blocks, out.shape[2:], strict=True))
    out = out.unflatten(1, (*blocks, channels))  # [B, r, r, C, h, w]
    if _layout(gy) is _LAST:
        x = out.permute(0, 4, 1, 5, 2, 3).reshape(-1, height, width, channels).permute(0, 3, 1, 2)
    else:
        x = out.permute(0, 3, 4, 1, 5, 2).reshape(-1, channels, height, width)
    top, left = (p + s * (m - 1) for p, s, m in zip(padding, stride, steps, strict=True))
    rows, columns = shape[2:]
    around = (-left, left + columns - width, -top, top + rows - height)
    return torch.constant_pad_nd(x, around)
