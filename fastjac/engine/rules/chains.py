"""The rule of a normalise-activate-pool chain that ran as one operator.

On maps, every sweep is one operator that recomputes what it needs from BatchNorm's input. On crops,
the chain is unfused into the rules of its operations, their values recomputed from crops of that input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fastjac.engine.crops import RecomputedMap
from fastjac.engine.rules.base import Receiver, Rule, compute_type
from fastjac.engine.rules.layers import BatchNorm
from fastjac.engine.rules.pointwise import PIECEWISE, Gate, Sum
from fastjac.engine.rules.pools import MaxPool2d
from fastjac.fusion.chains import Chain, as_map
from fastjac.ops import norm_act_pool_backward, norm_act_pool_pushforward

if TYPE_CHECKING:
    from fastjac.engine.tape import Site

_POOLS = {
    "2x2": (2, 2, 0, 1, False),
    "3x3": (3, 2, 1, 1, False),
    "3x3-unpadded": (3, 2, 0, 1, False),
}


@dataclass
class NormActPool(Rule):
    """BatchNorm, addition, activation and max-pool: u and the residual are its sources.

    ``added``: the residual's shape and dtype, where it depends on x; ``given``: u's.
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

    recomputes_cotangent: ClassVar[bool] = True

    def needs_delta(self) -> bool:
        return any(self.receives)

    def _operands(self) -> tuple[Any, ...]:
        tensors = (self.u, self.residual, self.weight, self.bias, self.mean, self.invstd)
        return *tensors, *self.options

    def vjp(self, delta: Tensor) -> list[Tensor]:
        mask = [True, self.added is not None, False, False]
        gu, gresidual, _, _ = norm_act_pool_backward(
            as_map(delta), *self._operands(), training=self.batch, mask=mask
        )
        cotangents = [gu.reshape(self.given)]
        if self.added is not None:
            shape, dtype = self.added
            cotangents.append(gresidual.reshape(self.given).sum_to_size(shape).to(dtype))
        return cotangents

    def jvp(self, tangents: Any, delta: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        dtype = self.u.dtype
        tu, *rest = (as_map(t.to(dtype).expand(self.given)) for t in tangents)
        scales, curves = self.receives
        if delta is None:
            delta = torch.zeros(self.shape, dtype=dtype, device=self.u.device)
        ty, total, coefficient, curvature = norm_act_pool_pushforward(
            *(tu, rest[0] if rest else None, as_map(delta), *self._operands()),
            statistics="batch" if self.batch else "fixed",
            curvature=self.batch and curves,
        )
        gradients = [total] if scales else []
        if curves:
            gradients += [coefficient, curvature] if self.batch else [coefficient]
        return ty.reshape(self.shape), gradients

    def unfuse(
        self, output: int, fresh: Callable[[torch.Size, torch.dtype], int]
    ) -> list[tuple[Rule, int]]:
        activation, slope, pool = self.options
        scale, shift = self._affine()
        kind = PIECEWISE[activation]
        value = RecomputedMap(self.u, self.residual, scale, shift, kind.value(slope))
        count = self.u.numel() // max(self.u.shape[1], 1)
        norm = BatchNorm(
            *(self.sources[:1], self.weight, self.invstd, None, None, self.eps, self.training),
            *(self.batch, True, self.receives, count, len(self.given)),
        )
        rules: list[tuple[Rule, int]] = [(norm, fresh(self.given, self.u.dtype))]
        if self.added is not None:
            terms = [(1, self.given), (1, self.added[0])]
            sources = (rules[-1][1], self.sources[1])
            rules.append((Sum(sources, terms, self.given), fresh(self.given, self.u.dtype)))
        if activation != "none":
            gate = Gate((rules[-1][1],), value, kind.gate(slope))
            rules.append((gate, fresh(self.given, self.u.dtype)))
        if pool != "none":
            geometry = _POOLS[pool]
            rules.append(
                (MaxPool2d((rules[-1][1],), value, None, geometry), fresh(self.shape, self.u.dtype))
            )
        return [*rules[:-1], (rules[-1][0], output)]

    def _affine(self) -> tuple[Tensor, Tensor]:
        """BatchNorm as scale u + shift, ``[1, C, 1, 1]``, in the type that sums have."""
        scale = self.invstd.to(compute_type(self.u))
        if self.weight is not None:
            scale = scale * self.weight
        shift = -self.mean * scale
        if self.bias is not None:
            shift = shift + self.bias
        return scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)


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
    if chain.slots is not None and site.tape.trains(chain.source):
        curves = True
        receivers += tuple(Receiver(slot) for slot in chain.slots[: 1 + batch])
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
