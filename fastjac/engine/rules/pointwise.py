"""Rules of the operations that see one pixel at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjac.engine.crops import Crops
from fastjac.engine.receptive_field import Region
from fastjac.engine.rules.base import (
    NotLocalError,
    Pointwise,
    Recorded,
    Rule,
    register_alternatives,
    register_rule,
)
from fastjac.fusion.mode import in_checkpoint, writes_in_place

if TYPE_CHECKING:
    from fastjac.engine.site import Site

aten = torch.ops.aten


@register_rule(Tensor.contiguous, Tensor.clone, torch.clone)
@dataclass
class Identity(Pointwise):
    """y = x."""

    @classmethod
    def record(cls, site: Site, input: Tensor, *args: Any, **kwargs: Any) -> Recorded:
        return site.run(input, *args, **kwargs), cls((site.number(input),)), ()

    def vjp(self, delta: Tensor) -> list[Tensor]:
        return [delta]

    def jvp(self, tangents: Any, delta: Any) -> tuple[Tensor, tuple[()]]:
        return tangents[0], ()


@register_rule(Tensor.neg, torch.neg, Tensor.__neg__)
@dataclass
class Negative(Identity):
    """y = -x."""

    def vjp(self, delta: Tensor) -> list[Tensor]:
        return [-delta]

    def jvp(self, tangents: Any, delta: Any) -> tuple[Tensor, tuple[()]]:
        return -tangents[0], ()


def clipped_gate(low: float, high: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Hardtanh's: open where low < y < high."""
    low, high = float(low), float(high)  # PyTorch takes tensors of one element, too
    return lambda delta, y: aten.hardtanh_backward.default(delta, y, low, high)


def _relu_gate(delta: Tensor, y: Tensor) -> Tensor:
    return aten.threshold_backward.default(delta, y, 0)


def _leaky_gate(slope: float) -> Callable[[Tensor, Tensor], Tensor]:
    slope = float(slope)
    return lambda delta, y: aten.leaky_relu_backward.default(delta, y, slope, True)


def _hardsigmoid_gate(delta: Tensor, y: Tensor) -> Tensor:
    return aten.hardsigmoid_backward.default(delta, 6 * y - 3)


@dataclass
class Gate(Pointwise):
    """A piecewise linear activation: y' = gate * x', the gate read off the output."""

    y: Tensor
    gate: Callable[[Tensor, Tensor], Tensor]

    @classmethod
    def of(cls, site: Site, gate: Any, input: Tensor, *args: Any, **kwargs: Any) -> Recorded:
        """Record a call whose gate is known."""
        number = site.number(input)
        y = site.run(input, *args, **kwargs)
        return y, cls((number,), site.keep(y), gate), ()

    def vjp(self, delta: Tensor) -> list[Tensor]:
        return [self.gate(delta, self.y)]

    def jvp(self, tangents: Any, delta: Any) -> tuple[Tensor, tuple[()]]:
        return self.gate(tangents[0], self.y), ()

    def crop(self, crops: Crops, region: Region) -> Rule:
        # Filled with -inf as the pool that may follow needs it, so that both share one crop. Outside
        # the map the gate must be shut: LeakyReLU's and a ReLU6's lower side are, times a zero.
        return self.changed(y=crops.gather(self.y, region, float("-inf")))


@register_rule(F.relu, F.relu_, torch.relu, Tensor.relu, Tensor.relu_)
class ReLU(Gate):
    """y = max(x, 0)."""

    @classmethod
    def record(cls, site: Site, input: Tensor, inplace: bool = False) -> Recorded:
        arguments = (inplace,) if inplace else ()  # which F.relu alone takes
        return Gate.of(site, _relu_gate, input, *arguments)


@register_rule(F.relu6)
class ReLU6(Gate):
    """y = min(max(x, 0), 6)."""

    @classmethod
    def record(cls, site: Site, input: Tensor, inplace: bool = False) -> Recorded:
        return Gate.of(site, clipped_gate(0, 6), input, inplace)


@register_rule(F.hardtanh, F.hardtanh_)
class Hardtanh(Gate):
    """y = min(max(x, low), high)."""

    @classmethod
    def record(
        cls,
        site: Site,
        input: Tensor,
        min_val: float = -1.0,
        max_val: float = 1.0,
        *inplace: bool,
        **keywords: Any,
    ) -> Recorded:
        gate = clipped_gate(min_val, max_val)
        return Gate.of(site, gate, input, min_val, max_val, *inplace, **keywords)


@register_rule(F.leaky_relu, F.leaky_relu_)
class LeakyReLU(Gate):
    """y = x, or slope x where x is negative; of a negative slope, the output does not tell the sign."""

    @classmethod
    def record(
        cls,
        site: Site,
        input: Tensor,
        negative_slope: float = 0.01,
        *inplace: bool,
        **keywords: Any,
    ) -> Recorded | Any:
        if negative_slope < 0:
            return NotImplemented
        gate = _leaky_gate(negative_slope)
        return Gate.of(site, gate, input, negative_slope, *inplace, **keywords)


@register_rule(F.hardsigmoid)
class Hardsigmoid(Gate):
    """y = min(max(x + 3, 0), 6) / 6."""

    @classmethod
    def record(cls, site: Site, input: Tensor, inplace: bool = False) -> Recorded:
        return Gate.of(site, _hardsigmoid_gate, input, inplace)


def _real(*values: Any) -> bool:
    """Whether none of these tensors and numbers is complex."""
    return not any(
        v.is_complex() if isinstance(v, Tensor) else isinstance(v, complex) for v in values
    )


@dataclass
class Sum(Pointwise):
    """a + b or a - b, each times a factor; either may be constant."""

    terms: list[tuple[float, torch.Size]]
    shape: torch.Size

    @classmethod
    def of(
        cls, site: Site, sign: int, a: Any, b: Any, alpha: float, arguments: Any
    ) -> Recorded | Any:
        """Record a call of which ``a`` and ``b`` are the terms."""
        if not _real(a, b, alpha) or isinstance(alpha, Tensor):
            return NotImplemented
        factors = ((a, 1), (b, sign * alpha))
        terms = [(f, t.shape) for t, f in factors if site.varies(t)]
        numbers = tuple(site.number(t) for t, _ in factors if site.varies(t))
        args, kwargs = arguments
        y = site.run(*args, **kwargs)
        return y, cls(numbers, terms, y.shape), ()

    def vjp(self, delta: Tensor) -> list[Tensor]:
        scaled = [delta if f == 1 else delta * f for f, _ in self.terms]
        return [
            s if s.shape == shape else s.sum_to_size(shape)
            for s, (_, shape) in zip(scaled, self.terms, strict=True)
        ]

    def jvp(self, tangents: Any, delta: Any) -> tuple[Tensor, tuple[()]]:
        scaled = [t if f == 1 else t * f for t, (f, _) in zip(tangents, self.terms, strict=True)]
        out = scaled[0] if len(scaled) == 1 else scaled[0] + scaled[1]
        return out if out.shape == self.shape else out.expand(self.shape), ()

    def input_regions(self, region: Region) -> list[Region]:
        if any(shape != self.shape for _, shape in self.terms):
            raise NotLocalError("it broadcasts over the map")
        return super().input_regions(region)

    def crop(self, crops: Crops, region: Region) -> Rule:
        shape = torch.Size(region.resized(self.shape))
        return self.changed(shape=shape, terms=[(f, shape) for f, _ in self.terms])


@register_rule(torch.add, Tensor.add, Tensor.add_, Tensor.__radd__, Tensor.__iadd__, Tensor.__add__)
class Add(Sum):
    """a + alpha b."""

    @classmethod
    def record(cls, site: Site, input: Any, other: Any, *, alpha: float = 1) -> Recorded | Any:
        keywords = {} if alpha == 1 else {"alpha": alpha}
        return Sum.of(site, 1, input, other, alpha, ((input, other), keywords))


@register_rule(torch.sub, Tensor.sub, Tensor.sub_, Tensor.__isub__, Tensor.__sub__)
class Subtract(Sum):
    """a - alpha b."""

    @classmethod
    def record(cls, site: Site, input: Any, other: Any, *, alpha: float = 1) -> Recorded | Any:
        keywords = {} if alpha == 1 else {"alpha": alpha}
        return Sum.of(site, -1, input, other, alpha, ((input, other), keywords))


@register_rule(Tensor.__rsub__, torch.rsub)
class SubtractFrom(Sum):
    """b - a."""

    @classmethod
    def record(cls, site: Site, input: Any, other: Any, *, alpha: float = 1) -> Recorded | Any:
        if alpha != 1:
            return NotImplemented
        return Sum.of(site, -1, other, input, 1, ((input, other), {}))


@dataclass
class Scale(Pointwise):
    """x b or x / b with b constant in x; a factor b may be a parameter."""

    factor: Any
    divides: bool
    trains: bool
    shape: torch.Size

    @classmethod
    def of(cls, site: Site, divides: bool, a: Any, b: Any) -> Recorded | Any:
        """Record a call with two operands, of which one depends on x."""
        first = site.varies(a)
        if (first and site.varies(b)) or not _real(a, b):
            return NotImplemented
        if not first and writes_in_place(site.function, (a, b), {}):  # over the factor
            return NotImplemented
        x, factor = (a, b) if first else (b, a)
        receivers = site.receives(factor) if isinstance(factor, Tensor) else ()
        if divides and (not first or receivers):
            return NotImplemented
        kept = site.keep(factor) if isinstance(factor, Tensor) else factor
        rule = cls((site.number(x),), kept, divides, bool(receivers), x.shape)
        return site.run(a, b), rule, receivers

    def needs_delta(self) -> bool:
        return self.trains

    def _scaled(self, x: Tensor) -> Tensor:
        return x / self.factor if self.divides else x * self.factor

    def vjp(self, delta: Tensor) -> list[Tensor]:
        return [self._scaled(delta).sum_to_size(self.shape)]

    def jvp(self, tangents: Any, delta: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        gradients = []
        if self.trains:
            gradients = [(delta * tangents[0]).sum_to_size(self.factor.shape)]
        return self._scaled(tangents[0]), gradients

    def input_regions(self, region: Region) -> list[Region]:
        factor = self.factor
        if isinstance(factor, Tensor) and region.map_size(_of_a_map(factor.shape)) != (1, 1):
            raise NotLocalError("its factor varies over the map")
        return [region]

    def crop(self, crops: Crops, region: Region) -> Rule:
        return self.changed(shape=torch.Size(region.resized(self.shape)))


def _of_a_map(shape: torch.Size) -> tuple[int, ...]:
    """A shape as it broadcasts to a map."""
    return (1,) * (4 - len(shape)) + tuple(shape)


class Multiply(Scale):
    """x b."""

    @classmethod
    def record(cls, site: Site, input: Any, other: Any) -> Recorded | Any:
        return Scale.of(site, False, input, other)


@register_rule(torch.div, Tensor.div, Tensor.div_, Tensor.__itruediv__, Tensor.__truediv__)
class Divide(Scale):
    """x / b."""

    @classmethod
    def record(
        cls, site: Site, input: Any, other: Any, *, rounding_mode: str | None = None
    ) -> Recorded | Any:
        return NotImplemented if rounding_mode else Scale.of(site, True, input, other)


@dataclass
class Product(Pointwise):
    """a b, both of them functions of x."""

    a: Tensor
    b: Tensor
    receives: tuple[bool, bool]

    @classmethod
    def record(cls, site: Site, input: Any, other: Any) -> Recorded | Any:
        in_place = site.function in _MULTIPLY_IN_PLACE
        if not (site.varies(input) and site.varies(other)) or not _real(input, other) or in_place:
            return NotImplemented
        numbers = (site.number(input), site.number(other))
        receivers = (site.receives(input, 0), site.receives(other, 1))
        a, b = site.keep(input), site.keep(other)
        rule = cls(numbers, a, b, tuple(map(bool, receivers)))
        return site.run(input, other), rule, receivers[0] + receivers[1]

    def needs_delta(self) -> bool:
        return any(self.receives)

    def vjp(self, delta: Tensor) -> list[Tensor]:
        return [
            (delta * self.b).sum_to_size(self.a.shape),
            (delta * self.a).sum_to_size(self.b.shape),
        ]

    def jvp(self, tangents: Any, delta: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        da, db = tangents
        gradients = [
            (delta * tangent).sum_to_size(like.shape)
            for received, tangent, like in zip(
                self.receives, (db, da), (self.a, self.b), strict=True
            )
            if received
        ]
        return torch.addcmul(da * self.b, self.a, db), gradients

    def input_regions(self, region: Region) -> list[Region]:
        if self.a.shape != self.b.shape:
            raise NotLocalError("it broadcasts over the map")
        return [region, region]

    def crop(self, crops: Crops, region: Region) -> Rule:
        return self.changed(a=crops.gather(self.a, region), b=crops.gather(self.b, region))


_MULTIPLY_IN_PLACE = (Tensor.mul_, Tensor.__imul__)
register_alternatives(
    *(torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__rmul__, Tensor.__mul__),
    *_MULTIPLY_IN_PLACE,
    rules=[Multiply, Product],
)


@register_rule(torch.cat, torch.concat)
@dataclass
class Concatenation(Pointwise):
    """torch.cat; over the channels it has crops."""

    parts: list[tuple[bool, torch.Size]]
    dim: int

    @classmethod
    def record(cls, site: Site, tensors: Any, dim: int = 0, **other: Any) -> Recorded | Any:
        dim = other.pop("axis", dim)
        if (
            other
            or len({t.dtype for t in tensors}) > 1
            or any(t.dim() == 1 and not len(t) for t in tensors)
        ):
            return NotImplemented
        varying = [t for t in tensors if site.varies(t)]
        if not _real(*varying):
            return NotImplemented
        parts = [(site.varies(t), t.shape) for t in tensors]
        numbers = tuple(site.number(t) for t in varying)
        y = site.run(tensors, dim)
        return y, cls(numbers, parts, dim % y.dim()), ()

    def vjp(self, delta: Tensor) -> list[Tensor]:
        pieces = delta.split([shape[self.dim] for _, shape in self.parts], self.dim)
        return [piece for piece, (varies, _) in zip(pieces, self.parts, strict=True) if varies]

    def jvp(self, tangents: Any, delta: Any) -> tuple[Tensor, tuple[()]]:
        given = iter(tangents)
        zeros = tangents[0].new_zeros
        return torch.cat([next(given) if v else zeros(s) for v, s in self.parts], self.dim), ()

    def input_regions(self, region: Region) -> list[Region]:
        if self.dim != 5 - 2 * region.axis:
            raise NotLocalError(f"it concatenates over dimension {self.dim}")
        return super().input_regions(region)

    def crop(self, crops: Crops, region: Region) -> Rule:
        parts = [(v, torch.Size(region.resized(s))) for v, s in self.parts]
        return self.changed(parts=parts)


@register_rule(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
@dataclass
class Dropout(Pointwise):
    """y = x * noise: the noise is drawn once, and is the same in every sweep."""

    noise: Tensor

    @classmethod
    def record(
        cls, site: Site, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Recorded | Any:
        if not training or p == 0:
            return site.run(input, p, training, inplace), Identity((site.number(input),)), ()
        if in_checkpoint():
            return NotImplemented
        number = site.number(input)
        noise = site.tape.run(site.function, (torch.ones_like(input.detach()), p, True), {})
        y = site.tape.run(Tensor.mul_ if inplace else torch.mul, (input, noise), {})
        return y, cls((number,), noise), ()

    def vjp(self, delta: Tensor) -> list[Tensor]:
        return [delta * self.noise]

    def jvp(self, tangents: Any, delta: Any) -> tuple[Tensor, tuple[()]]:
        return tangents[0] * self.noise, ()

    def crop(self, crops: Crops, region: Region) -> Rule:
        return self.changed(noise=crops.gather(self.noise, region))
