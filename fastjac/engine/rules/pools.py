"""Rules of max-pools and average pools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjac.engine.crops import Crops
from fastjac.engine.receptive_field import Region
from fastjac.engine.rules.base import (
    NotLocalError,
    Recorded,
    Rule,
    axis_geometry,
    register_rule,
)
from fastjac.fusion.mode import in_checkpoint

if TYPE_CHECKING:
    from fastjac.engine.site import Site

aten = torch.ops.aten


@register_rule(F.max_pool2d, torch.max_pool2d)
@dataclass
class MaxPool2d(Rule):
    """y = the largest of each window: a gather at the indices that the forward chose."""

    x: Tensor
    indices: Tensor | None
    geometry: tuple[Any, ...]

    @classmethod
    def record(
        cls,
        site: Site,
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Recorded | Any:
        if input.dim() != 4 or return_indices or in_checkpoint():
            return NotImplemented
        stride = kernel_size if stride is None or stride == [] else stride
        geometry = (kernel_size, stride, padding, dilation, ceil_mode)
        joined = site.joined(input)
        y, indices = aten.max_pool2d_with_indices.default(joined, *geometry)
        return y, cls((site.number(input),), site.keep(input), indices, geometry), ()

    def vjp(self, delta: Tensor) -> list[Tensor]:
        return [
            aten.max_pool2d_with_indices_backward.default(
                delta, self.x, *self.geometry, self.indices
            )
        ]

    def jvp(self, tangents: Any, delta: Any) -> tuple[Tensor, tuple[()]]:
        out = torch.empty_like(self.indices, dtype=tangents[0].dtype)
        flat = (*out.shape[:2], out.shape[2:].numel())  # -1 would not do for an empty batch
        torch.gather(tangents[0].flatten(2), 2, self.indices.view(flat), out=out.view(flat))
        return out, ()

    def input_regions(self, region: Region) -> list[Region]:
        return [_image(region).through(axis_geometry(*self.geometry[:4]))]

    def crop(self, crops: Crops, region: Region) -> Rule:
        (source,) = self.input_regions(region)
        x = crops.gather(self.x, source, float("-inf"))
        kernel, stride, _, dilation, _ = self.geometry
        geometry = (kernel, stride, 0, dilation, False)
        indices = aten.max_pool2d_with_indices.default(x, *geometry)[1]
        return self.changed(x=x, geometry=geometry, indices=indices)


@register_rule(F.avg_pool2d)
@dataclass
class AvgPool2d(Rule):
    """y = the mean of each window. On crops: the window's sum, times one over its divisor."""

    geometry: tuple[Any, ...]
    shape: torch.Size
    like: Tensor
    scale: Tensor | None = None

    @classmethod
    def record(
        cls,
        site: Site,
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Recorded | Any:
        if input.dim() != 4:
            return NotImplemented
        stride = kernel_size if stride is None or stride == [] else stride
        geometry = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
        number, like = site.number(input), input.detach().new_empty(0)
        return site.run(input, *geometry), cls((number,), geometry, input.shape, like), ()

    def vjp(self, delta: Tensor) -> list[Tensor]:
        if self.scale is not None:
            delta = delta * self.scale
        x = delta.new_empty(self.shape).contiguous(memory_format=layout(delta))
        return [aten.avg_pool2d_backward.default(delta, x, *self.geometry)]

    def jvp(self, tangents: Any, delta: Any) -> tuple[Tensor, tuple[()]]:
        out = aten.avg_pool2d.default(tangents[0], *self.geometry)
        return out if self.scale is None else out * self.scale, ()

    def input_regions(self, region: Region) -> list[Region]:
        return [_image(region).through(axis_geometry(*self.geometry[:3], 1))]

    def crop(self, crops: Crops, region: Region) -> Rule:
        (source,) = self.input_regions(region)
        kernel, stride, padding, ceil_mode, include, _ = self.geometry
        ones, pool = self.like.new_ones(1, 1, *self.shape[2:]), aten.avg_pool2d.default
        mean = pool(ones, *self.geometry)
        scale = mean / pool(ones, kernel, stride, padding, ceil_mode, include, 1)
        return self.changed(
            geometry=(kernel, stride, 0, False, True, 1),
            shape=torch.Size(source.resized(self.shape)),
            scale=crops.gather(scale.expand(self.shape[0], -1, -1, -1), region),
        )


def _image(region: Region) -> Region:
    if region.axis != 2:
        raise NotLocalError("it pools over the channels")
    return region


def layout(tensor: Tensor) -> torch.memory_format:
    """Channels-last or contiguous, as the tensor is."""
    nhwc = tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if nhwc and not tensor.is_contiguous() else torch.contiguous_format
