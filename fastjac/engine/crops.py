"""Per-sample crops of full maps, at windows that move with the sample."""

from __future__ import annotations

import torch
from torch import Tensor

from fastjac.engine.receptive_field import Region
from fastjac.ops.window_crop import window_crop, window_crop_adjoint


def narrow(value: Tensor, outer: Region, inner: Region) -> Tensor:
    """The part of a crop of ``outer`` that is ``inner``."""
    if inner == outer:
        return value
    top, left = inner.within(outer)
    height, width = inner.shape
    return value.narrow(inner.axis, top, height).narrow(inner.axis + 1, left, width)


def widen(value: Tensor, inner: Region, outer: Region) -> Tensor:
    """The adjoint of :func:`narrow`: a crop of ``inner`` in one of ``outer``, zeros around it."""
    if inner == outer:
        return value
    top, left = inner.within(outer)
    bottom = outer.shape[0] - top - inner.shape[0]
    right = outer.shape[1] - left - inner.shape[1]
    return torch.constant_pad_nd(value, (*[0, 0] * (2 - inner.axis), left, right, top, bottom))


def _channels_second(value: Tensor, region: Region) -> Tensor:
    """``[B, C, H, W]`` of a map whose rows are the region's axis."""
    return value if region.axis == 2 else value.permute(0, 3, 1, 2)


def _as_given(value: Tensor, region: Region) -> Tensor:
    """The inverse of :func:`_channels_second`."""
    return value if region.axis == 2 else value.permute(0, 2, 3, 1)


class Crops:
    """Crops for windows at ``position`` ``[B, 2]``, on a layer with ``positions`` places for one.

    No step waits for the position on the host: crops have one size, and start where the device says.
    """

    def __init__(self, position: Tensor, positions: tuple[int, int]) -> None:
        self.position = position
        self.positions = positions
        self._starts: dict[tuple[int, int, int, int], Tensor] = {}
        self._crops: dict[tuple[int, torch.Size, Region, float], tuple[Tensor, Tensor]] = {}
        self._masks: dict[tuple[Region, tuple[int, int], torch.dtype], Tensor] = {}

    def start(self, region: Region) -> Tensor:
        """The first row and column of ``region`` for each sample, ``[B, 2]``."""
        rows, cols = region.rows, region.cols
        key = (rows.scale, cols.scale, rows.offset, cols.offset)
        if key not in self._starts:
            if rows.scale == cols.scale and rows.offset == cols.offset:
                start = torch.rsub(self.position, rows.offset, alpha=-rows.scale)
            else:
                axes = [
                    self.position[:, 0] * rows.scale + rows.offset,
                    self.position[:, 1] * cols.scale + cols.offset,
                ]
                start = torch.stack(axes, 1)
            self._starts[key] = start
        return self._starts[key]

    def gather(self, full: Tensor, region: Region, fill: float = 0.0) -> Tensor:
        """``region`` of ``full`` ``[B, C, H, W]`` for each sample, ``fill`` outside the map."""
        key = (full.data_ptr(), full.shape, region, fill)
        if key not in self._crops:
            whole = _channels_second(full, region)
            crop = window_crop(whole, self.start(region), region.shape, fill)
            self._crops[key] = full, _as_given(crop, region)  # no other map gets its address
        return self._crops[key][1]

    def exceeds(self, region: Region, full: Tensor) -> bool:
        """Whether ``region`` reaches outside of ``full`` for some position of the window."""
        return region.exceeds(region.map_size(full.shape), self.positions)

    def scatter(self, crop: Tensor, region: Region, size: tuple[int, int]) -> Tensor:
        """The adjoint of :meth:`gather`: ``[B, C, *size]``, zero outside ``region``."""
        crop = _channels_second(crop, region)
        return _as_given(window_crop_adjoint(crop, self.start(region), size), region)

    def inside(self, crop: Tensor, region: Region, size: tuple[int, int]) -> Tensor:
        """``crop`` with zeros where ``region`` reaches outside a map of ``size``."""
        mask = self._inside(crop, region, size)
        return crop if mask is None else crop * mask

    def _inside(self, like: Tensor, region: Region, size: tuple[int, int]) -> Tensor | None:
        """1 inside the map and 0 outside, ``[B, 1, h, w]``; None if nothing can be outside."""
        if not region.exceeds(size, self.positions):
            return None
        key = (region, size, like.dtype)
        if key not in self._masks:
            ones = like.new_ones(()).expand(len(like), 1, *size)
            mask = window_crop(ones, self.start(region), region.shape)
            self._masks[key] = _as_given(mask, region)
        return self._masks[key]

    def forget(self) -> None:
        """Let go of the shared crops; the records hold those that they need."""
        self._crops.clear()
