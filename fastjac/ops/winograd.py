"""3x3 convolutions on a CPU by Winograd's minimal filtering, with 2.25 times fewer products.

Nine tenths of a step on a CPU are convolutions, so there is no other way to a step with Jacobians that
costs less than PyTorch's without them. (On a GPU, cuDNN has this algorithm and chooses it.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastjac.errors import FastjacError
from fastjac.ops._library import CPU, call, cpu_isa, define, refuse_forward_mode
from fastjac.ops._maps import check_strided

_DTYPES = (torch.float64, torch.float32)
_LAST = torch.channels_last
_FAST = CPU.loaded and cpu_isa() != "portable"
# Where it is the faster one, by benchmarks/test_winograd.py.
_CHANNELS = 32  # and a multiple of it, both in and out
_PIXELS = 512  # of all images


def winograd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: Sequence[int] = (1, 1),
    adjoint: bool = False,
) -> Tensor:
    r"""Convolve maps with 3x3 filters, stride 1.

    A tile of 2x2 outputs y of 4x4 inputs x is

    .. math::
        y = A^T \Big[ \sum_c (B^T x_c B) ∘ (G w_c G^T) \Big] A

    (F(2x2, 3x3) of Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016): 16
    products for a channel and filter where the sum over the window takes 36. Rounding differs from that
    sum's, by about as much as that of another order of summation; an infinite or NaN input reaches every
    output of the tiles that it is in.

    Args:
        x: ``[B, C, H, W]``, float32 or float64; channels-last, else it is copied.
        weight: ``[K, C, 3, 3]``, of x's dtype and device.
        bias: ``[K]`` or None.
        padding: zeros around the map, rows and columns; 0, 1 or 2.
        adjoint: the input's cotangent instead: x is the output's, ``[B, K, h, w]``; no bias then.

    Returns:
        ``[B, K, H + 2 p - 2, W + 2 p - 2]``, channels-last; with ``adjoint``, ``[B, C, ...]``.

    Raises:
        FastjacError: an argument is of the wrong kind, or carries a forward-mode tangent.

    Can be differentiated any number of times. The same from run to run, and for any number of threads.
    """
    op = "winograd"
    _check_map(op, "x", x)
    _check_weight(op, weight, x, padding)
    channels = weight.shape[0 if adjoint else 1]
    if x.shape[1] != channels:
        raise FastjacError(f"{op}: x must have {channels} channels, got {x.shape[1]}")
    if bias is not None:
        filters = weight.shape[0]
        if adjoint:
            raise FastjacError(f"{op}: expected no bias with adjoint=True")
        if not isinstance(bias, Tensor) or tuple(bias.shape) != (filters,):
            came = list(bias.shape) if isinstance(bias, Tensor) else type(bias).__name__
            raise FastjacError(f"{op}: bias must be [{filters}], got {came}")
        _check_kind(op, "bias", bias, x)
        bias = bias.contiguous()
    for side, n, p in zip(("high", "wide"), x.shape[2:], padding, strict=True):
        if n + (2 - 2 * p if adjoint else 2 * p - 2) < 1:
            raise FastjacError(f"{op}: x is {n} {side}, too small for its padding of {p}")
    refuse_forward_mode(op, x, weight, *(() if bias is None else (bias,)))
    return call("winograd", x.contiguous(memory_format=_LAST), weight, bias, *padding, adjoint)


def winograd_weight(
    gy: Tensor, x: Tensor, weight: Tensor, padding: Sequence[int] = (1, 1)
) -> Tensor:
    r"""The gradient of :func:`winograd`'s weight: :math:`G^T [Σ (B^T x B) ∘ (A\,gy\,A^T)] G`.

    Args:
        gy: the output's cotangent, ``[B, K, h, w]``.
        x: the input, ``[B, C, H, W]``, of the same dtype and device; both channels-last, else copied.
        weight: ``[K, C, 3, 3]``: the shape and layout of the result; its values do not matter.
        padding: as :func:`winograd` has it.

    Returns:
        ``[K, C, 3, 3]``, with weight's strides.

    Errors, derivatives and determinism are :func:`winograd`'s.
    """
    op = "winograd_weight"
    _check_map(op, "x", x)
    _check_weight(op, weight, x, padding)
    _check_map(op, "gy", gy)
    _check_kind(op, "gy", gy, x)
    if x.shape[1] != weight.shape[1]:
        raise FastjacError(f"{op}: x must have {weight.shape[1]} channels, got {x.shape[1]}")
    height, width = (n + 2 * p - 2 for n, p in zip(x.shape[2:], padding, strict=True))
    expected = (x.shape[0], weight.shape[0], height, width)
    if tuple(gy.shape) != expected or min(height, width) < 1:
        raise FastjacError(f"{op}: gy must be {list(expected)}, got {list(gy.shape)}")
    refuse_forward_mode(op, gy, x)  # in weight, the derivative is zero
    gy, x = (v.contiguous(memory_format=_LAST) for v in (gy, x))
    return call("winograd_weight", gy, x, weight, *padding)


def _check_map(op: str, name: str, x: Tensor) -> None:
    check_strided(op, name, x)
    if x.dtype not in _DTYPES:
        raise FastjacError(f"{op}: {name} must be float64 or float32, got {x.dtype}")
    if x.dim() != 4:
        raise FastjacError(f"{op}: {name} must be [B, C, H, W], got {list(x.shape)}")


def _check_kind(op: str, name: str, given: Tensor, x: Tensor) -> None:
    check_strided(op, name, given)
    for what in ("dtype", "device"):
        if getattr(given, what) != getattr(x, what):
            raise FastjacError(
                f"{op}: {name} must have x's {what}, {getattr(x, what)}, got {getattr(given, what)}"
            )


def _check_weight(op: str, weight: Tensor, x: Tensor, padding: Sequence[int]) -> None:
    if not isinstance(weight, Tensor) or weight.dim() != 4 or weight.shape[2:] != (3, 3):
        came = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise FastjacError(f"{op}: weight must be [K, C, 3, 3], got {came}")
    _check_kind(op, "weight", weight, x)
    if len(padding) != 2 or not all(isinstance(p, int) and 0 <= p <= 2 for p in padding):
        raise FastjacError(f"{op}: padding must be two of 0, 1, 2, got {padding}")


def winograd_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: Sequence[int] = (1, 1),
    adjoint: bool = False,
) -> Tensor:
    """:func:`winograd` in plain PyTorch: a convolution."""
    if adjoint:
        return torch.conv_transpose2d(x, weight, None, 1, tuple(padding))
    return torch.conv2d(x, weight, bias, 1, tuple(padding))


def winograd_weight_ref(
    gy: Tensor, x: Tensor, weight: Tensor, padding: Sequence[int] = (1, 1)
) -> Tensor:
    """:func:`winograd_weight` in plain PyTorch."""
    return torch.nn.grad.conv2d_weight(x, weight.shape, gy, 1, tuple(padding))


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, adjoint: bool
) -> Tensor:
    y = winograd_ref(x, weight, bias, (height, width), adjoint)
    return torch.empty_like(y, memory_format=_LAST).copy_(y)


def _weight_reference(gy: Tensor, x: Tensor, weight: Tensor, height: int, width: int) -> Tensor:
    return torch.empty_like(weight).copy_(winograd_weight_ref(gy, x, weight, (height, width)))


define(
    "winograd(Tensor x, Tensor weight, Tensor? bias, int pad_height, int pad_width, bool adjoint) "
    "-> Tensor y",
    _reference,
)
define(
    "winograd_weight(Tensor gy, Tensor x, Tensor weight, int pad_height, int pad_width) "
    "-> Tensor gweight",
    _weight_reference,
)


@torch.library.register_fake("fastjac::winograd")
def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, adjoint: bool
) -> Tensor:
    more = [2 - 2 * p if adjoint else 2 * p - 2 for p in (height, width)]
    sizes = [n + m for n, m in zip(x.shape[2:], more, strict=True)]
    shape = (x.shape[0], weight.shape[1 if adjoint else 0], *sizes)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_LAST)


@torch.library.register_fake("fastjac::winograd_weight")
def _fake_weight(gy: Tensor, x: Tensor, weight: Tensor, height: int, width: int) -> Tensor:
    return torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *padding, ctx.adjoint = inputs
    ctx.padding = padding
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    wanted, padding = ctx.needs_input_grad, ctx.padding
    gweight = None
    if wanted[1]:
        both = (x, gy) if ctx.adjoint else (gy, x)
        gweight = winograd_weight(*both, weight, padding)
        del both
    del x  # made again for this alone, perhaps
    gx = winograd(gy, weight, None, padding, not ctx.adjoint) if wanted[0] else None
    return gx, gweight, gy.sum((0, 2, 3)) if wanted[2] else None, None, None, None


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gy, x, _, *ctx.padding = inputs
    ctx.save_for_backward(gy, x)


def _backward_weight(ctx: Any, along: Tensor) -> tuple[Any, ...]:
    gy, x = ctx.saved_tensors
    wanted, padding = ctx.needs_input_grad, ctx.padding
    ggy = winograd(x, along, None, padding) if wanted[0] else None
    gx = winograd(gy, along, None, padding, adjoint=True) if wanted[1] else None
    return ggy, gx, None, None, None


torch.library.register_autograd("fastjac::winograd", _backward, setup_context=_save)
torch.library.register_autograd(
    "fastjac::winograd_weight", _backward_weight, setup_context=_save_weight
)


def winograd_is_faster(
    map_: Tensor,
    weight: Tensor,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> bool:
    """Whether :func:`winograd` computes this convolution, and faster than PyTorch does.

    ``map_``: its input, or its output's cotangent. The geometry is as ``torch.conv2d`` takes it.
    """
    shape = weight.shape
    return (
        _FAST
        and map_.is_cpu
        and shape[2:] == (3, 3)
        and not (shape[0] % _CHANNELS or shape[1] % _CHANNELS)
        and shape.numel() > 0
        and groups == 1
        and both_axes(stride) == both_axes(dilation) == (1, 1)
        and not isinstance(padding, str)
        and all(0 <= p <= 2 for p in both_axes(padding))
        and map_.dtype in _DTYPES
        and map_.dtype == weight.dtype
        and map_.dim() == 4
        and min(map_.shape[2:]) >= 2
        and map_.shape[0] * map_.shape[2] * map_.shape[3] >= _PIXELS
        and map_.is_contiguous(memory_format=_LAST)
        and not torch.is_autocast_enabled("cpu")
    )


def both_axes(size: Any) -> tuple[int, ...]:
    """One size for both axes, or one for each."""
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return sizes * 2 if len(sizes) == 1 else sizes
