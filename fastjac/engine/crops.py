"""Per-sample crops of full maps, at windows that move with the sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
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
    return F.pad(value, (*[0, 0] * (2 - inner.axis), left, right, top, bottom))


def _channels_second(value: Tensor, region: Region) -> Tensor:
    """``[B, C, H, W]`` of a map whose rows are the region's axis."""
    return value if region.axis == 2 else value.permute(0, 3, 1, 2)


def _as_given(value: Tensor, region: Region) -> Tensor:
    """The inverse of :func:`_channels_second`."""
    return value if region.axis == 2 else value.permute(0, 2, 3, 1)


@dataclass(frozen=True, eq=False)
class RecomputedMap:
    """A map that is not kept: act(scale u + shift + residual), of which crops are recomputed."""

    u: Tensor
    residual: Tensor | None
    scale: Tensor
    shift: Tensor
    activation: Callable[[Tensor], Tensor]


class Crops:
    """Crops for windows at ``position`` ``[B, 2]``, on a layer with ``positions`` places for one.

    No step waits for the position on the host: crops have one size, and start where the device says.
    """

    def __init__(self, position: Tensor, positions: tuple[int, int]) -> None:
        self.position = position
        self.positions = positions
        self._starts: dict[tuple[int, int, int, int], Tensor] = {}
        self._crops: dict[tuple[Any, Region, float], Tensor] = {}
        self._masks: dict[tuple[Region, tuple[int, int], torch.dtype], Tensor] = {}

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

    def gather(self, full: Tensor | RecomputedMap, region: Region, fill: float = 0.0) -> Tensor:
        """``region`` of ``full`` ``[B, C, H, W]`` for each sample, ``fill`` outside the map."""
        tensor = isinstance(full, Tensor)
        key = ((full.data_ptr(), full.shape) if tensor else id(full), region, fill)
        if key not in self._crops:
            if tensor:
                whole = _channels_second(full, region)
                crop = window_crop(whole, self.start(region), region.shape, fill)
                crop = _as_given(crop, region)
            else:
                crop = self._recompute(full, region, fill)
            self._crops[key] = crop
        return self._crops[key]

    def _recompute(self, full: RecomputedMap, region: Region, fill: float) -> Tensor:
        z = self.gather(full.u, region) * full.scale + full.shift
        if full.residual is not None:
            z = z + self.gather(full.residual, region)
        a = full.activation(z).to(full.u.dtype)
        inside = self._inside(a, region, tuple(full.u.shape[2:]))
        return a if inside is None else a.masked_fill_(inside == 0, fill)

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
