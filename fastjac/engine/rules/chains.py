"""The rule of a normalise-activate-pool chain that ran as one operator.

Every sweep is one operator that recomputes what it needs from BatchNorm's input, a map or a crop of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fastjac.engine.crops import Crops
from fastjac.engine.receptive_field import Region
from fastjac.engine.rules.base import NotLocalError, Receiver, Rule, axis_geometry
from fastjac.fusion.chains import Chain, as_map
from fastjac.ops.norm_act_pool import backward, pushforward

if TYPE_CHECKING:
    from fastjac.engine.site import Site

_POOLS = {
    "none": None,
    "2x2": axis_geometry(2, 2, 0, 1),
    "3x3": axis_geometry(3, 2, 1, 1),
    "3x3-unpadded": axis_geometry(3, 2, 0, 1),
}


@dataclass
class NormActPool(Rule):
    """BatchNorm, addition, activation and max-pool: u and the residual are its sources.

    ``added``: the residual's shape and dtype, where it depends on x; ``given``: u's shape, and
    ``share``: what part it is of the map that the statistics were taken over.
    """

    u: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    invstd: Tensor
    options: tuple[str, float, str]
    training: bool
    batch: bool
    eps: float
    receives: tuple[bool, bool]  # gamma; u, through the node's slots
    given: torch.Size
    added: tuple[torch.Size, torch.dtype] | None
    shape: torch.Size
    share: float = 1.0

    recomputes_cotangent: ClassVar[bool] = True
    stays_inside: ClassVar[bool] = True

    def with_copies(self, written: Tensor) -> Rule:
        return self  # its autograd node has saved them all, and would raise less clearly

    def needs_delta(self) -> bool:
        return any(self.receives)

    def _operands(self) -> tuple[Any, ...]:
        tensors = (self.u, self.residual, self.weight, self.bias, self.mean, self.invstd)
        return *tensors, *self.options

    def vjp(self, delta: Tensor) -> list[Tensor]:
        mask = (True, self.added is not None, False, False)
        gu, gresidual, _, _ = backward(
            as_map(delta), *self._operands(), self.batch, None, None, mask, False
        )
        cotangents = [_shaped(gu, self.given)]
        if self.added is not None:
            shape, dtype = self.added
            cotangents.append(_shaped(gresidual, self.given).sum_to_size(shape).to(dtype))
        return cotangents

    def jvp(self, tangents: Any, delta: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        dtype = self.u.dtype
        tu, *rest = (as_map(t.to(dtype).expand(self.given)) for t in tangents)
        scales, curves = self.receives
        if delta is None:
            delta = torch.zeros(self.shape, dtype=dtype, device=self.u.device)
        ty, total, coefficient, curvature = pushforward(
            *(tu, rest[0] if rest else None, as_map(delta), *self._operands()),
            *("batch" if self.batch else "fixed", self.batch and curves),
        )
        gradients = [total] if scales else []
        if curves:
            coefficient = coefficient if self.share == 1 else coefficient * self.share
            gradients += [coefficient, curvature] if self.batch else [coefficient]
        return _shaped(ty, self.shape), gradients

    def input_regions(self, region: Region) -> list[Region]:
        if self.batch:
            raise NotLocalError("BatchNorm in train mode with batch_stats='batch'")
        if region.axis != 2:
            raise NotLocalError("its channels are an axis of the map")
        if self.added is not None and self.added[0] != self.given:
            raise NotLocalError("it broadcasts over the map")
        geometry = _POOLS[self.options[2]]
        seen = region if geometry is None else region.through(geometry)
        return [seen] * len(self.sources)

    def crop(self, crops: Crops, region: Region) -> Rule:
        seen = self.input_regions(region)[0]
        u, residual = crops.gather(self.u, seen), self.residual
        activation, slope, pool = self.options
        if pool == "3x3":  # a crop brings its own border: -inf, added to a map of zeros if need be
            pool, outside = "3x3-unpadded", crops.exceeds(seen, self.u)
            if residual is None and outside:
                residual = self.u.new_zeros(()).expand(self.u.shape)
        if residual is not None:
            fill = float("-inf") if pool == "3x3-unpadded" else 0.0
            residual = crops.gather(residual, seen, fill)
        given = torch.Size(seen.resized(self.given))
        return self.changed(
            u=u,
            residual=residual,
            options=(activation, slope, pool),
            given=given,
            added=None if self.added is None else (given, self.added[1]),
            shape=torch.Size(region.resized(self.shape)),
            share=given.numel() / max(self.given.numel(), 1),
        )


def _shaped(map_: Tensor, shape: torch.Size) -> Tensor:
    return map_ if map_.shape == shape else map_.reshape(shape)


def fused_rule(site: Site, chain: Chain) -> tuple[Rule, tuple[Receiver, ...]]:
    """The rule of a chain that has run."""
    number, added = site.number(chain.source), None
    if number is None:
        raise AssertionError("a chain's addition depends on x, but its BatchNorm does not")
    sources = (number,)
    if site.varies(chain.added):
        sources += (site.number(chain.added),)
        added = (chain.added.shape, chain.added.dtype)
    receivers = () if chain.weight is None else site.receives(chain.weight)
    batch = chain.training and site.batch_stats == "batch"
    scales, curves = bool(receivers), False
    if chain.slots and site.tape.trains(chain.source):
        curves = True
        receivers += tuple(map(Receiver, chain.slots))
    tensors = (chain.u, chain.residual, chain.weight, chain.bias, chain.mean, chain.invstd)
    rule = NormActPool(
        *(sources, *(None if t is None else site.keep(t) for t in tensors), chain.steps.options),
        *(
            chain.training,
            batch,
            chain.eps,
            (scales, curves),
            chain.source.shape,
            added,
            chain.shape,
        ),
    )
    return rule, receivers
