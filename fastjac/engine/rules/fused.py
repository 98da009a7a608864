"""The rule of a normalise-activate-pool chain that is one node.

On maps, every pass is one operator that recomputes what it needs from BatchNorm's input. On crops, the
chain is taken apart into the rules of its parts, their values recomputed from crops of that input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from fastjac.chains import Chain, as_map
from fastjac.engine.crops import Recomputed
from fastjac.engine.record import Record, Sink, compute_type
from fastjac.engine.rules.base import Rule
from fastjac.engine.rules.layers import BatchNorm
from fastjac.engine.rules.pointwise import PIECEWISE, Gate, Sum
from fastjac.engine.rules.pools import MaxPool2d
from fastjac.ops import norm_act_pool_backward, norm_act_pool_pushforward

_POOLS = {
    "2x2": (2, 2, 0, 1, False),
    "3x3": (3, 2, 1, 1, False),
    "3x3-unpadded": (3, 2, 0, 1, False),
}


class Fused(Rule):
    """BatchNorm, addition, activation and max-pool as one node: residual and u are its inputs."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain

    def accepts(self, args: tuple[Any, ...], kwargs: dict[str, Any], varying: set[int]) -> bool:
        return 1 in varying

    def forward(
        self,
        record: Record,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        given = [a for a in args[:2] if a is not None]
        record.given = [(a.shape, a.dtype) for a in given]
        y, record.mean, record.invstd, *record.slots, bound, residual, u = self.chain.run(
            *args, **kwargs
        )
        _, _, record.weight, record.bias, record.training, _, record.eps = bound
        record.batch = record.training and record.batch_stats == "batch"
        record.u = record.keep(u.detach())
        record.residual = None if residual is None else record.keep(residual.detach())
        record.count = u.numel() // max(u.shape[1], 1)
        source = record.node.args[1]
        record.joined = residual is not None and 0 in record.varying
        record.inputs = (source, record.node.args[0]) if record.joined else (source,)
        return self._as_given(record, y)

    def _as_given(self, record: Record, y: Tensor) -> Tensor:
        """A map as the chain's reader sees it."""
        shape = record.given[-1][0]
        return y if len(shape) == 4 else y.reshape(shape)

    def _cotangents(self, record: Record, gu: Tensor, gresidual: Tensor | None) -> list[Tensor]:
        """Those of the inputs, from those of the maps that the chain made of them."""
        shape, dtype = record.given[-1]
        cotangents = [gu.reshape(shape).to(dtype)]
        if gresidual is not None:
            of, dtype = record.given[0]
            cotangents.append(gresidual.reshape(shape).sum_to_size(of).to(dtype))
        return cotangents

    def _tangents(self, record: Record, tangents: list[Tensor]) -> list[Tensor]:
        """Those of the maps, from those of the inputs."""
        shape, dtype = record.given[-1][0], record.u.dtype
        return [as_map(t.to(dtype).expand(shape)) for t in tangents]

    def needs_delta(self, record: Record) -> bool:
        return record.differentiable

    def _options(self, record: Record) -> tuple[Any, ...]:
        detached = (None if p is None else p.detach() for p in (record.weight, record.bias))
        chain = self.chain
        statistics = (record.mean, record.invstd)
        return (
            *(record.u, record.residual, *detached, *statistics),
            *(chain.activation, chain.slope, chain.pool),
        )

    def pullback(self, record: Record, delta: Tensor) -> list[Tensor]:
        mask = [True, record.joined, False, False]
        gu, gresidual, _, _ = norm_act_pool_backward(
            as_map(delta), *self._options(record), training=record.batch, mask=mask
        )
        return self._cotangents(record, gu, gresidual if record.joined else None)

    def input_delta(self, record: Record) -> Tensor:
        """The cotangent of u again, from that of the output."""
        gu = norm_act_pool_backward(
            as_map(record.delta),
            *self._options(record),
            training=record.batch,
            mask=[True, False, False, False],
        )[0]
        return self._cotangents(record, gu, None)[0]

    def pushforward(
        self, record: Record, tangents: list[Tensor], delta: Tensor, sink: Sink
    ) -> Tensor:
        tangents = self._tangents(record, tangents)
        tu, tresidual = tangents if record.joined else (*tangents, None)
        ty, total, coefficient, curvature = norm_act_pool_pushforward(
            tu,
            tresidual,
            as_map(delta),
            *self._options(record),
            statistics="batch" if record.batch else "fixed",
            curvature=record.batch,
        )
        if record.weight is not None:
            sink.add(record.weight, total)
        if record.training:
            sink.add(record.slots[0], coefficient)
        if curvature is not None:
            sink.add(record.slots[1], curvature)
        return self._as_given(record, ty)

    def parts(self, record: Record) -> dict[fx.Node, Record]:
        """The records of the chain's own nodes, the last under the chain's node."""
        norm_node, *later = self.chain.nodes
        count, column = record.count, [1, -1, 1, 1]
        scale, shift = _affine(record)
        norm = self._part(record, norm_node, BatchNorm(self.chain.arguments), record.inputs[:1])
        shared = ("weight", "training", "batch", "eps", "invstd", "slots")
        norm.__dict__.update({name: getattr(record, name) for name in shared})
        norm.count, norm.column = count, column
        found = {norm_node: norm}
        kind = PIECEWISE[self.chain.activation]
        value = Recomputed(record.u, record.residual, scale, shift, kind.value(self.chain.slope))
        add, activation, pool = later
        shape = record.u.shape
        if add is not None and record.joined:
            part = self._part(record, add, Sum(1), (norm_node, record.inputs[1]))
            part.varying, part.shape = [0, 1], shape
            part.terms = [(1, shape), (1, record.given[0][0])]
            found[add] = part
        if activation is not None:
            gate = Gate(kind.gate(self.chain.slope))
            part = self._part(record, activation, gate, (list(found)[-1],))
            part.y = value
            found[activation] = part
        if pool is not None:
            geometry = _POOLS[self.chain.pool]
            rule = MaxPool2d(lambda x: geometry)
            part = self._part(record, pool, rule, (list(found)[-1],))
            part.x, part.geometry = value, geometry
            part.size = record.size
            found[pool] = part
        last = list(found)[-1]
        found[record.node] = found.pop(last)
        return found

    def _part(
        self, record: Record, node: fx.Node, rule: Rule, inputs: tuple[fx.Node, ...]
    ) -> Record:
        part = Record(node, rule, record.batch_stats, record.differentiable)
        shape = record.given[-1][0]
        part.inputs, part.size = inputs, tuple(shape[2:]) if len(shape) == 4 else None
        part.output_dtype = record.output_dtype
        return part


def _affine(record: Record) -> tuple[Tensor, Tensor]:
    """BatchNorm as scale u + shift, ``[1, C, 1, 1]``, in the type that sums have."""
    scale = record.invstd.to(compute_type(record.u))
    if record.weight is not None:
        scale = scale * record.weight.detach()
    shift = -record.mean * scale
    if record.bias is not None:
        shift = shift + record.bias.detach()
    return scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)
