"""Rules of pools, and of linear maps without parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjac.engine.crops import Crops
from fastjac.engine.record import Edges, Record, Sink, Windows
from fastjac.engine.rules.base import Rule
from fastjac.support import Region, Window

aten = torch.ops.aten


class MaxPool2d(Rule):
    """y = the largest of each window: a gather at the indices that the forward chose."""

    def __init__(self, bind: Callable[..., tuple[Any, ...]]) -> None:
        self.bind = bind

    def accepts(self, args: tuple[Any, ...], kwargs: dict[str, Any], varying: set[int]) -> bool:
        return varying == {0} and args[0].dim() == 4 and not kwargs.get("return_indices", False)

    def forward(
        self,
        record: Record,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        record.geometry = self.bind(*args, **kwargs)
        y, indices = F.max_pool2d(args[0], *record.geometry, return_indices=True)
        record.x, record.indices = record.keep(args[0].detach()), indices
        return y

    def pullback(self, record: Record, delta: Tensor) -> list[Tensor]:
        delta = delta.contiguous(memory_format=_layout(record.x))
        return [
            aten.max_pool2d_with_indices_backward(delta, record.x, *record.geometry, record.indices)
        ]

    def pushforward(self, record: Record, tangents: list[Tensor], delta: Any, sink: Sink) -> Tensor:
        out = torch.empty_like(record.indices, dtype=tangents[0].dtype)
        flat = (*out.shape[:2], -1)
        torch.gather(tangents[0].flatten(2), 2, record.indices.view(flat), out=out.view(flat))
        return out

    def windows(self, record: Record) -> Windows:
        """The window of each axis."""
        sizes = (_pair(g) for g in record.geometry[:4])
        rows, cols = (Window(*size) for size in zip(*sizes, strict=True))
        return rows, cols

    def edges(self, record: Record, region: Region) -> Edges:
        return [region.through(self.windows(record))]

    def crop(self, record: Record, crops: Crops, region: Region) -> Record:
        (edge,) = self.edges(record, region)
        x = crops.gather(record.x, edge, float("-inf"))
        kernel, stride, _, dilation, _ = record.geometry
        geometry = (kernel, stride, 0, dilation, False)
        return record.on_crops(
            x=x, geometry=geometry, indices=F.max_pool2d(x, *geometry, return_indices=True)[1]
        )


class AvgPool2d(Rule):
    """y = the mean of each window. On crops: the window's sum, times one over its divisor."""

    def __init__(self, bind: Callable[..., tuple[Any, ...]]) -> None:
        self.bind = bind

    def accepts(self, args: tuple[Any, ...], kwargs: dict[str, Any], varying: set[int]) -> bool:
        return varying == {0} and args[0].dim() == 4

    def forward(
        self,
        record: Record,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        record.geometry = self.bind(*args, **kwargs)
        record.shape, record.scale = args[0].shape, None
        record.like = args[0].new_empty(0)
        return call(*args, **kwargs)

    def pullback(self, record: Record, delta: Tensor) -> list[Tensor]:
        if record.scale is not None:
            delta = delta * record.scale
        like = delta.new_empty(record.shape)
        like = like.contiguous(memory_format=_layout(delta))
        return [aten.avg_pool2d_backward(delta, like, *record.geometry)]

    def pushforward(self, record: Record, tangents: list[Tensor], delta: Any, sink: Sink) -> Tensor:
        out = F.avg_pool2d(tangents[0], *record.geometry)
        return out if record.scale is None else out * record.scale

    def windows(self, record: Record) -> Windows:
        """The window of each axis."""
        sizes = (_pair(g) for g in record.geometry[:3])
        rows, cols = (Window(*size) for size in zip(*sizes, strict=True))
        return rows, cols

    def edges(self, record: Record, region: Region) -> Edges:
        return [region.through(self.windows(record))]

    def crop(self, record: Record, crops: Crops, region: Region) -> Record:
        (edge,) = self.edges(record, region)
        kernel, stride, padding, ceil_mode, include, _ = record.geometry
        ones = record.like.new_ones(1, 1, *record.shape[2:])
        mean = F.avg_pool2d(ones, *record.geometry)
        scale = mean / F.avg_pool2d(ones, kernel, stride, padding, ceil_mode, include, 1)
        scale = crops.gather(scale.expand(record.shape[0], -1, -1, -1), region)
        return record.on_crops(
            geometry=(kernel, stride, 0, False, True, 1),
            shape=(*record.shape[:2], *edge.shape),
            scale=scale,
        )


class Map(Rule):
    """A linear map without parameters: flatten, permute, mean, adaptive average pool, a slice."""

    def forward(
        self,
        record: Record,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        record.shape, record.strides = args[0].shape, args[0].stride()
        raw, rest = record.raw, args[1:]  # the record itself would be a reference cycle
        record.map = lambda x: raw(x, *rest, **kwargs)
        return call(*args, **kwargs)

    def pullback(self, record: Record, delta: Tensor) -> list[Tensor]:
        # Linear: its derivative is the same at every x of this shape and layout.
        x = torch.empty_strided(
            record.shape, record.strides, dtype=delta.dtype, device=delta.device
        ).zero_()
        with torch.enable_grad():
            return list(torch.autograd.grad(record.map(x.requires_grad_()), x, delta))

    def pushforward(self, record: Record, tangents: list[Tensor], delta: Any, sink: Sink) -> Tensor:
        tangent = tangents[0]
        if tangent.stride() != record.strides:  # a view may need the layout that the forward had
            like = torch.empty_strided(
                record.shape, record.strides, dtype=tangent.dtype, device=tangent.device
            )
            tangent = like.copy_(tangent)
        return record.map(tangent)


def _layout(tensor: Tensor) -> torch.memory_format:
    nhwc = tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if nhwc and not tensor.is_contiguous() else torch.contiguous_format


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
