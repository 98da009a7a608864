"""Per-sample crops of a feature map, and their adjoint."""

from __future__ import annotations

import torch
from torch import Tensor


def window_crop(x: Tensor, start: Tensor, size: tuple[int, int], fill: float = 0.0) -> Tensor:
    """``out[b, c, i, j] = x[b, c, start[b, 0] + i, start[b, 1] + j]``, ``fill`` outside of x.

    ``x`` ``[B, C, H, W]``, any dtype and layout; ``start`` ``[B, 2]`` int64, of any sign, on the same
    device; gives ``[B, C, *size]`` in the channels-last layout. Deterministic. No host
    synchronisation. Not differentiable: the result is detached.
    """
    rows, cols, inside = _indices(x.shape, start, size)
    batch = torch.arange(len(x), device=x.device)[:, None, None]
    crop = x.detach().permute(0, 2, 3, 1)[batch, rows[:, :, None], cols[:, None, :]]
    return crop.masked_fill_(~inside[..., None], fill).permute(0, 3, 1, 2)


def window_crop_adjoint(crop: Tensor, start: Tensor, size: tuple[int, int]) -> Tensor:
    """The adjoint of :func:`window_crop`: ``[B, C, *size]``, zero outside of the crops.

    What a crop holds outside of the map is dropped. Deterministic: within a sample no two elements of
    a crop go to one place.
    """
    batch, channels = crop.shape[:2]
    full = crop.new_zeros(batch, *size, channels)
    rows, cols, inside = _indices((batch, channels, *size), start, crop.shape[2:])
    index = torch.arange(batch, device=crop.device)[:, None, None]
    values = crop.detach().permute(0, 2, 3, 1).masked_fill(~inside[..., None], 0)
    full.index_put_((index, rows[:, :, None], cols[:, None, :]), values, accumulate=True)
    return full.permute(0, 3, 1, 2)


def _indices(
    shape: tuple[int, ...], start: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows ``[B, h]`` and columns ``[B, w]``, moved into the map, and whether they were inside."""
    axes, insides = [], []
    for axis in range(2):
        index = start[:, axis, None] + torch.arange(size[axis], device=start.device)
        axes.append(index.clamp(0, shape[2 + axis] - 1))
        insides.append((index >= 0) & (index < shape[2 + axis]))
    return axes[0], axes[1], insides[0][:, :, None] & insides[1][:, None, :]
