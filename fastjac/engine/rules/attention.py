"""The rule of scaled dot-product attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjac.engine.rules.base import Recorded, Rule, register_alternatives
from fastjac.engine.rules.generic import Generic
from fastjac.engine.rules.softmax import gradient_of_p, pushed

if TYPE_CHECKING:
    from fastjac.engine.site import Site


@dataclass
class Attention(Rule):
    """o = p v, p = softmax(c q k^T + mask); p is computed anew in each sweep, as autograd does.

    With s the argument of the softmax, a = delta v^T and P of :func:`pushed`: the cotangents are
    P(a) k c, P(a)^T q c and p^T delta; the tangents s' = c (q' k^T + q k'^T), p' = P(s') and o' = p' v +
    p v'; and with b the gradient of <delta, o'> in s, the curvatures are (b k + P(a) k') c,
    (b^T q + P(a)^T q') c, p'^T delta, and b for the mask.
    """

    tensors: list[Tensor]  # q, k and v
    places: list[int]  # of the sources among q, k and v; of one that is several of them, each
    mask: Tensor | None
    causal: bool
    scale: float
    receives: tuple[bool, bool, bool, bool]  # q, k, v, mask

    @classmethod
    def record(
        cls,
        site: Site,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Recorded | Any:
        given = (query, key, value)
        if (
            any(t.is_nested for t in given)
            or dropout_p
            or enable_gqa
            or (is_causal and attn_mask is not None)
            or site.varies(attn_mask)
            or len({t.shape[:-2] for t in given}) > 1
            or query.dim() < 3
            or not all(t.numel() and t.dtype in (torch.float32, torch.float64) for t in given)
            or torch.is_autocast_enabled(query.device.type)
        ):
            return NotImplemented
        places = [i for i, t in enumerate(given) if site.varies(t)]
        receivers = [
            site.receives(t, places.index(i) if i in places else None) for i, t in enumerate(given)
        ]
        receivers.append(() if attn_mask is None else site.receives(attn_mask))
        kept = list(map(site.keep, given))
        mask = None if attn_mask is None else site.keep(attn_mask)
        o = site.run(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
        rule = cls(
            *(tuple(site.number(given[i]) for i in places), kept, places, mask, is_causal),
            *(
                1 / math.sqrt(query.shape[-1]) if scale is None else scale,
                tuple(map(bool, receivers)),
            ),
        )
        return o, rule, tuple(r for group in receivers for r in group)

    def needs_delta(self) -> bool:
        return any(self.receives)

    def _kept(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k and v, contiguous, since each matrix product would copy them, and p."""
        q, k, v = (t.contiguous() for t in self.tensors)
        return q, k, v, self._weights(q, k)

    def _weights(self, q: Tensor, k: Tensor) -> Tensor:
        """p."""
        s = (q * self.scale) @ k.mT
        mask = self.mask
        if self.causal:
            mask = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril()
        if mask is None:
            return torch.ops.aten._softmax.default(s, -1, False)
        s = s.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else s.add_(mask)
        return torch.ops.aten._safe_softmax.default(s, -1)

    def vjp(self, delta: Tensor) -> list[Tensor]:
        (q, k, v, p), delta = self._kept(), delta.contiguous()
        pulled: dict[int, Tensor] = {}
        if {0, 1} & set(self.places):
            of_s = pushed(delta @ v.mT, p, -1).mul_(self.scale)
            pulled = {0: of_s @ k, 1: of_s.mT @ q}
        if 2 in self.places:
            pulled[2] = p.mT @ delta
        return [pulled[place] for place in self.places]

    def jvp(self, tangents: Any, delta: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        q, k, v, p = self._kept()
        delta = None if delta is None else delta.contiguous()
        given = {i: t.contiguous() for i, t in zip(self.places, tangents, strict=True)}
        tangent_q, tangent_k, tangent_v = (given.get(i) for i in range(3))
        tangent_s = _sum_of_products((tangent_q, k.mT), (q, _transposed(tangent_k)))
        tangent_p = None
        if tangent_s is not None:
            tangent_s = tangent_s.mul_(self.scale)
            tangent_p = pushed(tangent_s, p, -1)
        tangent_o = _sum_of_products((tangent_p, v), (p, tangent_v))
        assert tangent_o is not None
        if delta is None:
            return tangent_o, []
        gradients: list[Tensor | None] = [None] * 4
        of_q, of_k, of_v, of_mask = self.receives
        if of_q or of_k or of_mask:
            of_p, of_tangent = _sum_of_products((delta, _transposed(tangent_v))), None
            if tangent_s is not None:
                a = delta @ v.mT
                through_s = gradient_of_p(tangent_s, a, p, -1)
                of_p = through_s if of_p is None else of_p.add_(through_s)
                of_tangent = pushed(a, p, -1).mul_(self.scale)
            assert of_p is not None
            b = pushed(of_p, p, -1)
            if of_mask and self.mask is not None:
                gradients[3] = b.sum_to_size(self.mask.shape)
            b = b * self.scale
            if of_q:
                gradients[0] = _sum_of_products((b, k), (of_tangent, tangent_k))
            if of_k:
                pair = (_transposed(of_tangent), tangent_q)
                gradients[1] = _sum_of_products((b.mT, q), pair)
        if of_v:
            gradients[2] = None if tangent_p is None else tangent_p.mT @ delta
        return tangent_o, [g for g, wanted in zip(gradients, self.receives, strict=True) if wanted]


def _transposed(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.mT


def _sum_of_products(*pairs: tuple[Tensor | None, Tensor | None]) -> Tensor | None:
    """The sum of the matrix products of the pairs that are there; None: of none."""
    total = None
    for a, b in pairs:
        if a is not None and b is not None:
            product = a @ b
            total = product if total is None else total.add_(product)
    return total


register_alternatives(F.scaled_dot_product_attention, rules=[Attention, Generic])
