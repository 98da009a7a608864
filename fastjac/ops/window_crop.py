"""Per-sample crops of a feature map, and their adjoint.

Neither waits for ``start`` on the host, and both only move values, so results are exact, and the same
from run to run. Both read their input through its strides, expanded ones included, without a copy;
the result has the channels last where they are closest in the input, and is contiguous else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastjac.errors import FastjacError
from fastjac.ops._library import call, define, refuse_derivative, refuse_forward_mode
from fastjac.ops._maps import check_map, check_strided


def window_crop(x: Tensor, start: Tensor, size: tuple[int, int], fill: float = 0.0) -> Tensor:
    """``out[b, c, i, j] = x[b, c, start[b, 0] + i, start[b, 1] + j]``, ``fill`` outside of x.

    Args:
        x: ``[B, C, H, W]``; float64, float32, bfloat16 or float16, of any strides.
        start: ``[B, 2]`` int64, rows first; of any sign, on x's device.
        size: the crop's height and width.
        fill: any number, -inf and NaN too; rounded to x's dtype.

    Returns:
        ``[B, C, *size]``, of x's dtype.

    Raises:
        FastjacError: an argument is of the wrong kind; or a derivative is asked for.
    """
    return _crop("window_crop", "x", x, start, size, fill, False)


def window_crop_adjoint(crop: Tensor, start: Tensor, size: tuple[int, int]) -> Tensor:
    """The adjoint of :func:`window_crop`: ``[B, C, *size]``, zero outside of the crops.

    What a crop holds outside of the map is dropped.

    Args:
        crop: ``[B, C, h, w]``; float64, float32, bfloat16 or float16, of any strides.
        start: ``[B, 2]`` int64, the map's pixel under the crop's first; of any sign.
        size: the map's height and width.

    Raises:
        FastjacError: an argument is of the wrong kind; or a derivative is asked for.
    """
    return _crop("window_crop_adjoint", "crop", crop, start, size, 0.0, True)


def window_crop_ref(x: Tensor, start: Tensor, size: tuple[int, int], fill: float = 0.0) -> Tensor:
    """:func:`window_crop` in plain PyTorch."""
    if x.numel() == 0:
        return empty_crop(x, size).fill_(fill)
    rows, cols, inside = _indices(x.shape, start, size)
    batch = torch.arange(len(x), device=x.device)[:, None, None]
    crop = x.permute(0, 2, 3, 1)[batch, rows[:, :, None], cols[:, None, :]]
    crop = crop.masked_fill(~inside[..., None], fill).permute(0, 3, 1, 2)
    return empty_crop(x, size).copy_(crop)


def window_crop_adjoint_ref(crop: Tensor, start: Tensor, size: tuple[int, int]) -> Tensor:
    """:func:`window_crop_adjoint` in plain PyTorch: no two elements of a sample go to one place."""
    full = empty_crop(crop, size).zero_()
    if full.numel() == 0:
        return full
    rows, cols, inside = _indices(full.shape, start, crop.shape[2:])
    batch = torch.arange(len(crop), device=crop.device)[:, None, None]
    values = crop.permute(0, 2, 3, 1).masked_fill(~inside[..., None], 0)
    index = (batch, rows[:, :, None], cols[:, None, :])
    full.permute(0, 2, 3, 1).index_put_(index, values, accumulate=True)
    return full


def empty_crop(x: Tensor, size: tuple[int, int]) -> Tensor:
    """What a crop of x is written to: the channels last where they are closest in x."""
    last = not x.is_contiguous() and x.shape[1] > 1 and x.stride(1) == 1
    layout = torch.channels_last if last else torch.contiguous_format
    shape = (*x.shape[:2], *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def check_start(op: str, name: str, start: Tensor, owner: str, x: Tensor) -> None:
    """Raise unless start has one row and one column per sample of x."""
    check_strided(op, name, start)
    if start.dtype != torch.int64:
        raise FastjacError(f"{op}: {name} must be torch.int64, got {start.dtype}")
    if start.shape != (x.shape[0], 2):
        raise FastjacError(f"{op}: {name} must be [{x.shape[0]}, 2], got {list(start.shape)}")
    if start.device != x.device:
        raise FastjacError(
            f"{op}: {name} must have {owner}'s device, {x.device}, got {start.device}"
        )


def _indices(
    shape: tuple[int, ...], start: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows ``[B, h]`` and columns ``[B, w]``, moved into the map, and whether they were inside."""
    axes, insides = [], []
    for axis in range(2):
        limit = shape[2 + axis] + size[axis]  # nothing is inside from here on
        first = start[:, axis, None].clamp(-limit, limit)
        index = first + torch.arange(size[axis], device=start.device)
        axes.append(index.clamp(0, shape[2 + axis] - 1))
        insides.append((index >= 0) & (index < shape[2 + axis]))
    return axes[0], axes[1], insides[0][:, :, None] & insides[1][:, None, :]


def _crop(
    op: str,
    name: str,
    x: Tensor,
    start: Tensor,
    size: tuple[int, int],
    fill: float,
    adjoint: bool,
) -> Tensor:
    check_map(op, name, x)
    check_start(op, "start", start, name, x)
    if len(size) != 2 or not all(isinstance(n, int | torch.SymInt) and n >= 0 for n in size):
        raise FastjacError(f"{op}: size must be two integers, at least 0, got {tuple(size)}")
    refuse_forward_mode(op, x)
    return call("window_crop", x, start, *size, float(fill), adjoint)


def _reference(
    x: Tensor, start: Tensor, height: int, width: int, fill: float, adjoint: bool
) -> Tensor:
    if adjoint:
        return window_crop_adjoint_ref(x, start, (height, width))
    return window_crop_ref(x, start, (height, width), fill)


# One operator: the adjoint reads the crop where the crop reads the map.
define(
    "window_crop(Tensor x, Tensor start, int height, int width, float fill, bool adjoint) "
    "-> Tensor crop",
    _reference,
)


@torch.library.register_fake("fastjac::window_crop")
def _fake(x, start, height, width, fill, adjoint):
    return empty_crop(x, (height, width))


refuse_derivative("window_crop", "detach its input (window_crop_ref can be differentiated)")
