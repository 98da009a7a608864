"""Per-sample crops of full maps, at windows that move with the sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjac.ops.window_crop import window_crop, window_crop_adjoint
from fastjac.support import Region


def narrow(value: Tensor, outer: Region, inner: Region) -> Tensor:
    """The part of a crop of ``outer`` that is ``inner``."""
    if inner == outer:
        return value
    top, left = inner.within(outer)
    height, width = inner.shape
    return value[:, :, top : top + height, left : left + width]


def widen(value: Tensor, inner: Region, outer: Region) -> Tensor:
    """The adjoint of :func:`narrow`: a crop of ``inner`` in one of ``outer``, zeros around it."""
    if inner == outer:
        return value
    top, left = inner.within(outer)
    bottom = outer.shape[0] - top - inner.shape[0]
    right = outer.shape[1] - left - inner.shape[1]
    return F.pad(value, (left, right, top, bottom))


class Crops:
    """Crops for windows at ``position`` ``[B, 2]``, on a layer with ``positions`` places for one.

    No step waits for the position on the host: crops have one size, and start where the device says.
    """

    def __init__(self, position: Tensor, positions: tuple[int, int]) -> None:
        self.position = position
        self.positions = positions
        self._starts: dict[tuple[int, int, int, int], Tensor] = {}
        self._crops: dict[tuple[int, torch.Size, Region, float], Tensor] = {}
        self._masks: dict[tuple[Region, torch.Size], Tensor] = {}

    def start(self, region: Region) -> Tensor:
        """The first row and column of ``region`` for each sample, ``[B, 2]``."""
        rows, cols = region.rows, region.cols
        key = (rows.scale, cols.scale, rows.offset, cols.offset)
        if key not in self._starts:
            axes = [
                self.position[:, 0] * rows.scale + rows.offset,
                self.position[:, 1] * cols.scale + cols.offset,
            ]
            self._starts[key] = torch.stack(axes, 1)
        return self._starts[key]

    def gather(self, full: Tensor, region: Region, fill: float = 0.0) -> Tensor:
        """``region`` of ``full`` ``[B, C, H, W]`` for each sample, ``fill`` outside the map."""
        key = (full.data_ptr(), full.shape, region, fill)
        if key not in self._crops:
            self._crops[key] = window_crop(full, self.start(region), region.shape, fill)
        return self._crops[key]

    def scatter(self, crop: Tensor, region: Region, size: tuple[int, int]) -> Tensor:
        """The adjoint of :meth:`gather`: ``[B, C, *size]``, zero outside ``region``."""
        return window_crop_adjoint(crop, self.start(region), size)

    def inside(self, crop: Tensor, region: Region, size: tuple[int, int]) -> Tensor:
        """``crop`` with zeros where ``region`` reaches outside a map of ``size``."""
        if not region.leaves(size, self.positions):
            return crop
        key = (region, torch.Size(size))
        if key not in self._masks:
            ones = crop.new_ones(()).expand(len(crop), 1, *size)
            self._masks[key] = window_crop(ones, self.start(region), region.shape)
        return crop * self._masks[key]

    def forget(self) -> None:
        """Let go of the shared crops; the records hold those that they need."""
        self._crops.clear()
