"""Rules of the layers with parameters: convolution, linear, BatchNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjac.engine import backward
from fastjac.engine.crops import Crops
from fastjac.engine.record import Edges, Record, Sink, Windows, compute_type
from fastjac.engine.rules.base import Pointwise, Rule
from fastjac.ops.winograd import convolution, convolution_input, convolution_weight
from fastjac.support import Region, Window

aten = torch.ops.aten


class Convolution(Rule):
    """y = w * x + b of any number of axes: linear in x, and in w."""

    def __init__(self, bind: Callable[..., tuple[Any, ...]]) -> None:
        self.bind = bind

    def forward(
        self,
        record: Record,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        record.weight, *geometry = self.bind(*args, **kwargs)
        record.stride, record.padding, record.dilation, record.groups = geometry
        record.shape = args[0].shape
        record.input_dtype = args[0].dtype
        return call(*args, **kwargs)

    def needs_delta(self, record: Record) -> bool:
        return record.weight.requires_grad

    def _geometry(self, record: Record) -> tuple[Any, ...]:
        return record.stride, record.padding, record.dilation, record.groups

    def pullback(self, record: Record, delta: Tensor) -> list[Tensor]:
        weight = record.weight.detach().to(delta.dtype)
        cotangent = convolution_input(delta, weight, record.shape, *self._geometry(record))
        return [cotangent.to(record.input_dtype)]

    def pushforward(
        self, record: Record, tangents: list[Tensor], delta: Tensor | None, sink: Sink
    ) -> Tensor:
        tangent = tangents[0].to(record.output_dtype)
        weight = record.weight.detach().to(tangent.dtype)
        geometry = self._geometry(record)
        if record.weight.requires_grad:
            sink.add(record.weight, convolution_weight(delta, tangent, weight, *geometry))
        return convolution(tangent, weight, None, *geometry)

    def windows(self, record: Record) -> Windows:
        """The window of each axis of a 2-D convolution."""
        kernel = record.weight.shape[2:]
        if len(kernel) != 2:
            raise record.not_local(f"a convolution over {len(kernel)} axes has no crops")
        sizes = zip(kernel, record.stride, record.padding, record.dilation, strict=True)
        rows, cols = (Window(*size) for size in sizes)
        return rows, cols

    def edges(self, record: Record, region: Region) -> Edges:
        return [region.through(self.windows(record))]

    def crop(self, record: Record, crops: Crops, region: Region) -> Record:
        (edge,) = self.edges(record, region)
        return record.on_crops(padding=[0, 0], shape=(*record.shape[:2], *edge.shape))


class Linear(Rule):
    """y = x w^T + b."""

    def __init__(self, bind: Callable[..., Tensor]) -> None:
        self.bind = bind

    def forward(
        self,
        record: Record,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        record.weight = self.bind(*args, **kwargs)
        record.input_dtype = args[0].dtype
        return call(*args, **kwargs)

    def needs_delta(self, record: Record) -> bool:
        return record.weight.requires_grad

    def pullback(self, record: Record, delta: Tensor) -> list[Tensor]:
        return [(delta @ record.weight.detach().to(delta.dtype)).to(record.input_dtype)]

    def pushforward(
        self, record: Record, tangents: list[Tensor], delta: Tensor | None, sink: Sink
    ) -> Tensor:
        tangent = tangents[0].to(record.output_dtype)
        if record.weight.requires_grad:
            flat = delta.flatten(0, -2) if delta.dim() > 1 else delta[None]
            sink.add(record.weight, flat.t() @ tangent.reshape(len(flat), -1))
        return F.linear(tangent, record.weight.detach().to(tangent.dtype))


class BatchNorm(Pointwise):
    """y = gamma x^ + beta, x^ = (u - mean) r, with the statistics running, frozen or the batch's.

    Kept between the passes is ``unit``, the cotangent of u over gamma: r delta (frozen, running), or
    r (delta - m(delta) - x^ m(delta x^)) (batch). With T = sum(unit * u') per channel, the gradient of
    gamma is T in all three; the curvature is -(gamma r T / N) x^, and for batch statistics also
    -r (gamma unit m(x^ u') + y' m(delta x^)).
    """

    def __init__(self, arguments: Callable[..., tuple[Any, ...]]) -> None:
        self.arguments = arguments

    def forward(
        self,
        record: Record,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        u = args[0]
        mean, var, weight, bias, training, momentum, eps = self.arguments(*args, **kwargs)
        record.weight, record.training = weight, training
        record.batch = training and record.batch_stats == "batch"
        record.eps, record.channels = eps, u.shape[1]
        record.count = u.numel() // max(u.shape[1], 1)
        record.column = [1, -1] + [1] * (u.dim() - 2)
        if not training:
            record.invstd = (var.detach().to(compute_type(u)) + eps).rsqrt()
            return F.batch_norm(u, mean, var, weight, bias, False, momentum, eps)
        if record.count <= 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {u.size()}"
            )
        y, batch_mean, record.invstd, *record.slots = backward.BatchNorm.apply(
            u, weight, bias, mean, var, momentum, eps
        )
        if record.batch:
            record.u, record.mean = record.keep(u.detach()), batch_mean
        return y

    def _scale(self, record: Record) -> Tensor:
        """gamma r, ``[C]``."""
        if record.weight is None:
            return record.invstd
        return record.weight.detach().to(record.invstd.dtype) * record.invstd

    def _projected(self, record: Record, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """r (c - m(c) - x^ m(c x^)) and m(c x^), per channel."""
        ones = torch.ones_like(record.invstd)
        unit, along, _ = aten.native_batch_norm_backward(
            cotangent,
            record.u,
            ones,
            None,
            None,
            record.mean,
            record.invstd,
            True,
            record.eps,
            [True, True, True],
        )
        return unit, along / record.count

    def pullback(self, record: Record, delta: Tensor) -> list[Tensor]:
        if not record.differentiable and not record.batch:
            return [delta * self._scale(record).to(delta.dtype).view(record.column)]
        if record.batch:
            record.unit, record.along = self._projected(record, delta)
        else:
            record.unit = delta * record.invstd.to(delta.dtype).view(record.column)
        return [self.input_delta(record)]

    def input_delta(self, record: Record) -> Tensor:
        """The cotangent of u again, from ``unit``."""
        if record.weight is None:
            return record.unit
        return record.unit * record.weight.detach().to(record.unit.dtype).view(record.column)

    def pushforward(self, record: Record, tangents: list[Tensor], delta: Any, sink: Sink) -> Tensor:
        tangent, unit = tangents[0], record.unit
        dims = [d for d in range(tangent.dim()) if d != 1]
        total = (unit * tangent).sum(dims, dtype=compute_type(unit))
        if record.weight is not None:
            sink.add(record.weight, total)
        scale = self._scale(record)
        if record.training:
            sink.add(record.slots[0], scale * total * (-1 / record.count))
        if not record.batch:
            return tangent * scale.to(tangent.dtype).view(record.column)
        out, along = self._projected(record, tangent)
        gamma = torch.ones_like(scale) if record.weight is None else record.weight.detach()
        out = out * gamma.to(out.dtype).view(record.column)
        left = (-scale * along).to(out.dtype).view(record.column)
        right = (-record.invstd * record.along).to(out.dtype).view(record.column)
        record.unit = None
        sink.add(record.slots[1], unit.mul_(left).addcmul_(out, right))
        return out

    def edges(self, record: Record, region: Region) -> Edges:
        if record.batch:
            raise record.not_local("BatchNorm in train mode with batch_stats='batch'")
        return [region]
