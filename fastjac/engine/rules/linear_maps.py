"""The rule of linear maps without parameters: views, sums, means, resampling, Fourier transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjac.engine.crops import Crops
from fastjac.engine.receptive_field import Region
from fastjac.engine.rules.base import NotLocalError, Recorded, Rule, register_rule
from fastjac.fusion.mode import tensors_in

if TYPE_CHECKING:
    from fastjac.engine.site import Site


@register_rule(
    *(torch.transpose, torch.movedim, torch.moveaxis, torch.swapaxes, torch.swapdims, torch.t),
    *(torch.chunk, torch.split, torch.tensor_split, torch.unbind, torch.narrow, torch.select),
    *(torch.roll, torch.flip, torch.rot90, torch.tile, torch.repeat_interleave, torch.diagonal),
    *(torch.mean, torch.sum, torch.cumsum, torch.index_select, torch.gather, torch.take_along_dim),
    *(torch.tril, torch.triu, torch.trace, torch.real, torch.imag, torch.view_as_real),
    *(torch.view_as_complex, torch.broadcast_to, torch.conj, torch.resolve_conj),
    *(Tensor.transpose, Tensor.t, Tensor.movedim, Tensor.moveaxis, Tensor.swapaxes),
    *(Tensor.swapdims, Tensor.chunk, Tensor.split, Tensor.tensor_split),
    *(Tensor.unbind, Tensor.narrow, Tensor.select, Tensor.expand, Tensor.repeat),
    *(Tensor.roll, Tensor.flip, Tensor.rot90, Tensor.tile, Tensor.repeat_interleave),
    *(Tensor.mean, Tensor.sum, Tensor.cumsum, Tensor.index_select, Tensor.gather, Tensor.diagonal),
    *(Tensor.take_along_dim, Tensor.tril, Tensor.triu, Tensor.trace, Tensor.unfold),
    *(Tensor.__iter__, Tensor.conj, Tensor.broadcast_to),
    *(getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag")),
    *(F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle, F.unfold, F.fold, F.avg_pool1d),
    *(F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    *(torch.fft.fft, torch.fft.ifft, torch.fft.rfft, torch.fft.irfft, torch.fft.fft2),
    *(torch.fft.ifft2, torch.fft.rfft2, torch.fft.irfft2, torch.fft.fftn, torch.fft.ifftn),
    *(torch.fft.rfftn, torch.fft.irfftn, torch.fft.hfft, torch.fft.ihfft),
    *(torch.fft.fftshift, torch.fft.ifftshift),
)
@dataclass
class LinearMap(Rule):
    """y = A x, or several such outputs: A in the forward sweep, its adjoint in the reverse sweep."""

    map: Callable[[Tensor], Any]
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def record(cls, site: Site, input: Any, *args: Any, **kwargs: Any) -> Recorded | Any:
        if not site.varies(input) or site.varies(*args, *kwargs.values()):
            return NotImplemented
        if not isinstance(input, Tensor) or kwargs.get("out") is not None:
            return NotImplemented
        function, number = site.function, site.number(input)
        for constant in tensors_in(args, kwargs):
            site.keep(constant)

        y = site.run(input, *args, **kwargs)
        kind, again = input.device.type, nullcontext
        if isinstance(y, Tensor) and y.dtype != input.dtype and torch.is_autocast_enabled(kind):
            # It has made another type of it, which the function itself may not do, or not take.
            again = partial(torch.autocast, kind, torch.get_autocast_dtype(kind))

        def linear(x: Tensor) -> Any:
            with again():
                return function(x, *args, **kwargs)

        rule = cls((number,), linear, input.shape, input.stride(), input.dtype, input.device)
        return y, rule, ()

    def vjp(self, delta: Any) -> list[Tensor]:
        # Its derivative is the same at every x of this shape and layout.
        x = self._laid_out(torch.zeros((), dtype=self.dtype, device=self.device).expand(self.shape))
        with torch.enable_grad():
            y = self.map(x.requires_grad_())
        pairs = [(y, delta)] if isinstance(y, Tensor) else list(zip(y, delta, strict=True))
        pairs = [(y, d.resolve_conj()) for y, d in pairs if d is not None]
        outputs, deltas = zip(*pairs, strict=True)
        return list(torch.autograd.grad(outputs, x, deltas))

    def jvp(self, tangents: Any, delta: Any) -> tuple[Any, tuple[()]]:
        tangent = tangents[0].to(self.dtype).resolve_conj()
        if tangent.stride() != self.strides:  # a view may need the layout that the forward had
            tangent = self._laid_out(tangent)
        y = self.map(tangent)
        return y if isinstance(y, Tensor) else list(y), ()

    def _laid_out(self, x: Tensor) -> Tensor:
        if 0 in self.strides:  # an expanded tensor, which nothing can be written to
            return x.clone(memory_format=torch.contiguous_format)
        empty = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)
        return empty.copy_(x)


@register_rule(Tensor.__getitem__)
@dataclass
class GetItem(LinearMap):
    """x[index]."""

    index: Any

    @classmethod
    def record(cls, site: Site, input: Tensor, index: Any) -> Recorded | Any:
        recorded = LinearMap.record(site, input, index)
        if recorded is NotImplemented:
            return recorded
        y, rule, receivers = recorded
        return y, cls(**vars(rule), index=index), receivers

    def vjp(self, delta: Tensor) -> list[Tensor]:
        parts = self.index if isinstance(self.index, tuple) else (self.index,)
        if not all(p is None or p is ... or isinstance(p, int | slice) for p in parts):
            return super().vjp(delta)  # places may repeat
        cotangent = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        cotangent[self.index] = delta
        return [cotangent]


@register_rule(
    *(torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, torch.unflatten),
    *(Tensor.flatten, Tensor.reshape, Tensor.squeeze, Tensor.unsqueeze, Tensor.unflatten),
)
@dataclass
class Reshape(Rule):
    """The same elements, in the same order, in another shape."""

    shape: torch.Size
    other: torch.Size

    @classmethod
    def record(cls, site: Site, input: Any, *args: Any, **kwargs: Any) -> Recorded | Any:
        if not site.varies(input) or site.varies(*args, *kwargs.values()):
            return NotImplemented
        number, y = site.number(input), site.run(input, *args, **kwargs)
        return y, cls((number,), input.shape, y.shape), ()

    def vjp(self, delta: Tensor) -> list[Tensor]:
        return [delta.reshape(self.shape)]

    def jvp(self, tangents: Any, delta: Any) -> tuple[Tensor, tuple[()]]:
        return tangents[0].reshape(self.other), ()


@register_rule(Tensor.view)
class View(Reshape):
    """A view of another dtype has no derivative."""

    @classmethod
    def record(cls, site: Site, *args: Any, **kwargs: Any) -> Recorded | Any:
        if any(isinstance(a, torch.dtype) for a in (*args[1:], *kwargs.values())):
            return NotImplemented
        return super().record(site, *args, **kwargs)


_TO_LAST, _TO_SECOND = (0, 2, 3, 1), (0, 3, 1, 2)


@register_rule(torch.permute, Tensor.permute)
@dataclass
class Permute(Rule):
    """The dimensions in another order; between channels second and channels last it has crops."""

    dims: tuple[int, ...]

    @classmethod
    def record(cls, site: Site, input: Tensor, *dims: Any, **kwargs: Any) -> Recorded:
        given = kwargs.get("dims", dims)
        order = given[0] if len(given) == 1 and not isinstance(given[0], int) else given
        order = tuple(d % input.dim() for d in order)
        return site.run(input, order), cls((site.number(input),), order), ()

    def vjp(self, delta: Tensor) -> list[Tensor]:
        return [delta.permute(sorted(range(len(self.dims)), key=self.dims.__getitem__))]

    def jvp(self, tangents: Any, delta: Any) -> tuple[Tensor, tuple[()]]:
        return tangents[0].permute(self.dims), ()

    def input_regions(self, region: Region) -> list[Region]:
        if (self.dims, region.axis) == (_TO_LAST, 1):
            return [region.moved(2)]
        if (self.dims, region.axis) == (_TO_SECOND, 2):
            return [region.moved(1)]
        return super().input_regions(region)


LIKE = {Tensor.to, Tensor.view_as, Tensor.reshape_as, Tensor.expand_as, Tensor.type_as}
"""Methods that take another tensor's shape or type, whose values do not count."""


@register_rule(Tensor.view_as, Tensor.reshape_as, Tensor.expand_as)
class Like(LinearMap):
    """In another tensor's shape or type, or in a type that is given."""

    @classmethod
    def record(cls, site: Site, input: Tensor, *args: Any, **kwargs: Any) -> Recorded:
        function, number = site.function, site.number(input)
        y = site.run(input, *args, **kwargs)
        args = tuple(map(_without_values, args))
        kwargs = {name: _without_values(value) for name, value in kwargs.items()}

        def linear(x: Tensor) -> Tensor:
            return function(x, *args, **kwargs)

        return y, cls((number,), linear, input.shape, input.stride(), input.dtype, input.device), ()


@register_rule(
    *(Tensor.to, Tensor.type_as, Tensor.type, Tensor.float, Tensor.half, Tensor.bfloat16),
    *(Tensor.double, Tensor.cpu, Tensor.cuda),
)
class Cast(Like):
    """The same elements in another type, layout or memory: it has crops."""

    def input_regions(self, region: Region) -> list[Region]:
        return [region]

    def crop(self, crops: Crops, region: Region) -> Rule:
        shape = torch.Size(region.resized(self.shape))
        return self.changed(shape=shape, strides=torch.empty(shape, device="meta").stride())


def _without_values(value: Any) -> Any:
    """A tensor's shape and type, in no memory."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().new_empty(()).expand(value.shape)


@register_rule(torch.diff, Tensor.diff)
class Difference(LinearMap):
    """torch.diff, but for what is put before or behind, which is no factor."""

    @classmethod
    def record(cls, site: Site, *args: Any, **kwargs: Any) -> Recorded | Any:
        if tensors_in(args[1:], kwargs):
            return NotImplemented
        return super().record(site, *args, **kwargs)


@dataclass
class ConstantPad(Rule):
    """A constant around the last axes; of negative sizes, less of them. On crops it only moves."""

    pad: list[int]
    axes: int

    @classmethod
    def record(
        cls,
        site: Site,
        input: Tensor,
        pad: Sequence[int],
        mode: str = "constant",
        value: float | None = None,
    ) -> Recorded | Any:
        if mode != "constant" or not isinstance(value, int | float | None):
            return NotImplemented
        y = site.run(input, pad, mode, value)
        return y, cls((site.number(input),), [int(size) for size in pad], input.dim()), ()

    def vjp(self, delta: Tensor) -> list[Tensor]:
        return [self._padded(delta, [-size for size in self.pad])]

    def jvp(self, tangents: Any, delta: Any) -> tuple[Tensor, tuple[()]]:
        return self._padded(tangents[0], self.pad), ()

    @staticmethod
    def _padded(x: Tensor, pad: list[int]) -> Tensor:
        return torch.constant_pad_nd(x, pad) if any(pad) else x

    def input_regions(self, region: Region) -> list[Region]:
        before = [0] * self.axes
        before[self.axes - len(self.pad) // 2 :] = self.pad[-2::-2]
        moved = (region.axis, region.axis + 1)
        if any(size for axis, size in enumerate(before) if axis not in moved):
            raise NotLocalError("it pads the channels")
        rows, cols = region.rows, region.cols
        rows = rows._replace(offset=rows.offset - before[moved[0]])
        return [Region(rows, cols._replace(offset=cols.offset - before[moved[1]]), region.axis)]

    def crop(self, crops: Crops, region: Region) -> Rule:
        return self.changed(pad=[])


class Pad(LinearMap):
    """F.pad, but for constants."""

    @classmethod
    def record(cls, site: Site, *args: Any, **kwargs: Any) -> Recorded | Any:
        linear = args[2:3] or (kwargs.get("mode"),)
        if linear[0] not in ("reflect", "replicate", "circular"):
            return NotImplemented
        return super().record(site, *args, **kwargs)


@register_rule(F.interpolate, F.upsample)
class Interpolate(LinearMap):
    """F.interpolate, every mode of which is linear."""
