"""Rules of the operations that see one pixel at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjac.engine.crops import Crops
from fastjac.engine.record import Edges, Record, Sink
from fastjac.engine.rules.base import Pointwise
from fastjac.support import Region

aten = torch.ops.aten


class Same(Pointwise):
    """y = x."""

    def pullback(self, record: Record, delta: Tensor) -> list[Tensor]:
        return [delta]

    def pushforward(self, record: Record, tangents: list[Tensor], delta: Any, sink: Sink) -> Tensor:
        return tangents[0]


class PiecewiseLinear(NamedTuple):
    """An activation by its slope: its value, and a cotangent or tangent through its gate."""

    value: Callable[[float], Callable[[Tensor], Tensor]]
    gate: Callable[[float], Callable[[Tensor, Tensor], Tensor]]  # of (delta, y)


def clipped_gate(low: float, high: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Hardtanh's: open where low < y < high."""
    return lambda delta, y: aten.hardtanh_backward(delta, y, low, high)


PIECEWISE = {
    "none": PiecewiseLinear(lambda slope: lambda z: z, lambda slope: lambda delta, y: delta),
    "relu": PiecewiseLinear(
        lambda slope: F.relu, lambda slope: lambda delta, y: aten.threshold_backward(delta, y, 0)
    ),
    "relu6": PiecewiseLinear(lambda slope: F.relu6, lambda slope: clipped_gate(0, 6)),
    "leaky_relu": PiecewiseLinear(
        lambda slope: lambda z: F.leaky_relu(z, slope),
        lambda slope: lambda delta, y: aten.leaky_relu_backward(delta, y, slope, True),
    ),
}


class Gate(Pointwise):
    """ReLU, ReLU6 (Hardtanh), LeakyReLU: y' = gate * x', the gate read off the output."""

    def __init__(self, gate: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.gate = gate

    def forward(
        self,
        record: Record,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        y = call(*args, **kwargs)
        record.y = record.keep(y.detach())
        return y

    def pullback(self, record: Record, delta: Tensor) -> list[Tensor]:
        return [self.gate(delta, record.y)]

    def pushforward(self, record: Record, tangents: list[Tensor], delta: Any, sink: Sink) -> Tensor:
        return self.gate(tangents[0], record.y)

    def crop(self, record: Record, crops: Crops, region: Region) -> Record:
        # Filled with -inf as the pool that may follow needs it, so that both share one crop. Outside
        # the map the gate must be shut: LeakyReLU's and a ReLU6's lower side are, times a zero.
        return record.on_crops(y=crops.gather(record.y, region, float("-inf")))


class Sum(Pointwise):
    """a + alpha b and a - alpha b; either may be constant."""

    def __init__(self, sign: int) -> None:
        self.sign = sign

    def accepts(self, args: tuple[Any, ...], kwargs: dict[str, Any], varying: set[int]) -> bool:
        return varying <= {0, 1} and len(args) == 2 and set(kwargs) <= {"alpha"}

    def forward(
        self,
        record: Record,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        factors = (1, self.sign * kwargs.get("alpha", 1))
        record.terms = [(factors[i], args[i].shape) for i in record.varying]
        y = call(*args, **kwargs)
        record.shape = y.shape
        return y

    def pullback(self, record: Record, delta: Tensor) -> list[Tensor]:
        summed = [delta if f == 1 else delta * f for f, _ in record.terms]
        return [
            s if s.shape == shape else s.sum_to_size(shape)
            for s, (_, shape) in zip(summed, record.terms, strict=True)
        ]

    def pushforward(self, record: Record, tangents: list[Tensor], delta: Any, sink: Sink) -> Tensor:
        scaled = [t if f == 1 else t * f for t, (f, _) in zip(tangents, record.terms, strict=True)]
        out = scaled[0] if len(scaled) == 1 else scaled[0] + scaled[1]
        return out if out.shape == record.shape else out.expand(record.shape)

    def edges(self, record: Record, region: Region) -> Edges:
        if any(shape != record.shape for _, shape in record.terms):
            raise record.not_local("it broadcasts over the map")
        return super().edges(record, region)

    def crop(self, record: Record, crops: Crops, region: Region) -> Record:
        shape = torch.Size((*record.shape[:2], *region.shape))
        return record.on_crops(shape=shape, terms=[(f, shape) for f, _ in record.terms])


class Negative(Same):
    """y = -x."""

    def pullback(self, record: Record, delta: Tensor) -> list[Tensor]:
        return [-delta]

    def pushforward(self, record: Record, tangents: list[Tensor], delta: Any, sink: Sink) -> Tensor:
        return -tangents[0]


class Scale(Pointwise):
    """x b and x / b with b constant in x; a factor b may be a parameter."""

    def __init__(self, divide: bool) -> None:
        self.divide = divide

    def accepts(self, args: tuple[Any, ...], kwargs: dict[str, Any], varying: set[int]) -> bool:
        if len(args) != 2 or kwargs or len(varying) != 1:
            return False
        other = args[1 - min(varying)]
        if self.divide and (1 in varying or getattr(other, "requires_grad", False)):
            return False
        return isinstance(other, Tensor | int | float)

    def forward(
        self,
        record: Record,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        (at,) = record.varying
        record.shape, record.factor = args[at].shape, args[1 - at]
        return call(*args)

    def needs_delta(self, record: Record) -> bool:
        return isinstance(record.factor, Tensor) and record.factor.requires_grad

    def _times(self, record: Record, x: Tensor) -> Tensor:
        factor = record.factor.detach() if isinstance(record.factor, Tensor) else record.factor
        return x / factor if self.divide else x * factor

    def pullback(self, record: Record, delta: Tensor) -> list[Tensor]:
        return [self._times(record, delta).sum_to_size(record.shape)]

    def pushforward(
        self, record: Record, tangents: list[Tensor], delta: Tensor | None, sink: Sink
    ) -> Tensor:
        if delta is not None:
            sink.add(record.factor, (delta * tangents[0]).sum_to_size(record.factor.shape))
        return self._times(record, tangents[0])

    def edges(self, record: Record, region: Region) -> Edges:
        factor = record.factor
        if isinstance(factor, Tensor) and any(n != 1 for n in factor.shape[-2:]):
            raise record.not_local("its factor varies over the map")
        return [region]

    def crop(self, record: Record, crops: Crops, region: Region) -> Record:
        return record.on_crops(shape=torch.Size((*record.shape[:2], *region.shape)))


class Product(Pointwise):
    """a b, both of them functions of x."""

    def accepts(self, args: tuple[Any, ...], kwargs: dict[str, Any], varying: set[int]) -> bool:
        return len(args) == 2 and not kwargs and varying == {0, 1}

    def forward(
        self,
        record: Record,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        record.graphs = args
        record.values = tuple(record.keep(a.detach()) for a in args)
        return torch.mul(*args)

    def needs_delta(self, record: Record) -> bool:
        return record.differentiable

    def pullback(self, record: Record, delta: Tensor) -> list[Tensor]:
        a, b = record.values
        return [(delta * b).sum_to_size(a.shape), (delta * a).sum_to_size(b.shape)]

    def pushforward(
        self, record: Record, tangents: list[Tensor], delta: Tensor, sink: Sink
    ) -> Tensor:
        (a, b), (da, db) = record.values, tangents
        for graph, cotangent, like in zip(
            record.graphs, (delta * db, delta * da), (a, b), strict=True
        ):
            record.curve(sink, graph, cotangent.sum_to_size(like.shape))
        return torch.addcmul(da * b, a, db)

    def edges(self, record: Record, region: Region) -> Edges:
        a, b = record.values
        if a.shape != b.shape:
            raise record.not_local("it broadcasts over the map")
        return [region, region]

    def crop(self, record: Record, crops: Crops, region: Region) -> Record:
        return record.on_crops(values=tuple(crops.gather(v, region) for v in record.values))


def _dimension(tensors: Any, dim: int = 0) -> int:
    return dim


class Concatenation(Pointwise):
    """torch.cat; over the channels it has crops."""

    def accepts(self, args: tuple[Any, ...], kwargs: dict[str, Any], varying: set[int]) -> bool:
        return varying == {0} and all(isinstance(a, Tensor) for a in args[0])

    def forward(
        self,
        record: Record,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        y = call(*args, **kwargs)
        record.dim = _dimension(*args, **kwargs) % y.dim()
        nodes = record.node.args[0] if record.node.args else record.node.kwargs["tensors"]
        record.parts = [
            (n if n in record.varying_nodes else None, t.shape)
            for n, t in zip(nodes, args[0], strict=True)
        ]
        record.inputs = tuple(n for n, _ in record.parts if n is not None)
        return y

    def pullback(self, record: Record, delta: Tensor) -> list[Tensor]:
        pieces = delta.split([shape[record.dim] for _, shape in record.parts], record.dim)
        return [p for p, (node, _) in zip(pieces, record.parts, strict=True) if node is not None]

    def pushforward(self, record: Record, tangents: list[Tensor], delta: Any, sink: Sink) -> Tensor:
        given = iter(tangents)
        parts = [
            tangents[0].new_zeros(shape) if node is None else next(given)
            for node, shape in record.parts
        ]
        return torch.cat(parts, record.dim)

    def edges(self, record: Record, region: Region) -> Edges:
        if record.dim != 1:
            raise record.not_local(f"it concatenates over dimension {record.dim}")
        return super().edges(record, region)

    def crop(self, record: Record, crops: Crops, region: Region) -> Record:
        parts = [(n, torch.Size((*s[:2], *region.shape))) for n, s in record.parts]
        return record.on_crops(parts=parts)


class Dropout(Pointwise):
    """y = x * noise: the noise is drawn once, and is the same in every pass."""

    def __init__(
        self, function: Callable[..., Tensor], bind: Callable[..., tuple[float, bool]]
    ) -> None:
        self.function, self.bind = function, bind

    def forward(
        self,
        record: Record,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        p, training = self.bind(*args, **kwargs)
        record.noise = None
        if not training:
            return args[0]
        record.noise = self.function(torch.ones_like(args[0].detach()), p, True)
        return args[0] * record.noise

    def pullback(self, record: Record, delta: Tensor) -> list[Tensor]:
        return [delta if record.noise is None else delta * record.noise]

    def pushforward(self, record: Record, tangents: list[Tensor], delta: Any, sink: Sink) -> Tensor:
        return tangents[0] if record.noise is None else tangents[0] * record.noise

    def crop(self, record: Record, crops: Crops, region: Region) -> Record:
        noise = None if record.noise is None else crops.gather(record.noise, region)
        return record.on_crops(noise=noise)
