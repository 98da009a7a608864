"""Rules of writes to a part of a tensor: by an index, and through a view of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._autograd import CreationMeta, _get_creation_meta

from fastjac.engine.rules.base import Recorded, Rule, register_rule
from fastjac.engine.rules.linear_maps import LinearMap
from fastjac.errors import FastjacError
from fastjac.fusion.mode import tensors_in

if TYPE_CHECKING:
    from fastjac.engine.site import Site


@register_rule(Tensor.__setitem__)
@dataclass
class SetItem(Rule):
    """x with x[index] = value; either may be constant."""

    index: Any
    varies: tuple[bool, bool]  # x, value
    shapes: tuple[torch.Size, torch.Size | None]
    dtype: torch.dtype

    @classmethod
    def record(cls, site: Site, x: Tensor, index: Any, value: Any) -> Recorded | Any:
        if site.varies(*tensors_in(index)):
            return NotImplemented
        varies = (site.varies(x), site.varies(value))
        sources = tuple(n for n in (site.number(x), site.number(value)) if n is not None)
        dtype = value.dtype if isinstance(value, Tensor) else x.dtype
        shape = value.shape if isinstance(value, Tensor) else None
        for part in tensors_in(index):
            site.keep(part)
        site.run(x, index, value)
        return None, cls(sources, index, varies, (x.shape, shape), dtype), ()

    def vjp(self, delta: Tensor) -> list[Tensor]:
        pulled = []
        if self.varies[0]:
            pulled.append(delta.clone())
            pulled[0][self.index] = 0
        if self.varies[1]:
            shape, part = self.shapes[1], delta[self.index]
            surplus = len(shape) - part.dim()  # leading dimensions of size 1, which a write drops
            part = part.sum_to_size(shape[max(surplus, 0) :]).view(shape)
            pulled.append(part.to(self.dtype))
        return pulled

    def jvp(self, tangents: Any, delta: Any) -> tuple[Tensor, tuple[()]]:
        given = list(tangents)
        out = given.pop(0).clone() if self.varies[0] else given[0].new_zeros(self.shapes[0])
        if not self.varies[1] or not _may_repeat(self.index):
            out[self.index] = given[0].to(out.dtype) if self.varies[1] else 0
            return out, ()
        # The adjoint of vjp: where places repeat, all that is written there counts.
        out[self.index] = 0
        with torch.enable_grad():
            whole = torch.zeros_like(out).requires_grad_()
            part = whole[self.index]
        written = given[0].to(out.dtype)
        written = written.view(written.shape[max(written.dim() - part.dim(), 0) :])
        return out + torch.autograd.grad(part, whole, written.expand_as(part))[0], ()


def _may_repeat(index: Any) -> bool:
    """Whether an index may name a place twice: not by numbers, slices and masks alone."""
    parts = index if isinstance(index, tuple) else (index,)
    masks = (p.dtype in (torch.bool, torch.uint8) for p in parts if isinstance(p, Tensor))
    rest = (p for p in parts if not isinstance(p, Tensor))
    plain = all(p is None or p is ... or isinstance(p, int | slice) for p in rest)
    return not (plain and all(masks))


@dataclass
class ViewWrite(Rule):
    """The base of a view after the view was overwritten.

    Its sources are the base before, unless that was constant, and the view.

    ``layout``: shape and strides of the base; ``view``: offset, shape and strides of the view in it.
    """

    layout: tuple[torch.Size, tuple[int, ...]]
    view: tuple[int, torch.Size, tuple[int, ...]]
    dtypes: tuple[torch.dtype, torch.dtype]  # base, view: the real part of a complex base, say

    @classmethod
    def of(cls, sources: tuple[int, ...], base: Tensor, view: Tensor) -> ViewWrite:
        """The rule for two tensors as they are."""
        if base.is_conj() != view.is_conj() or base.is_neg() != view.is_neg():
            raise FastjacError(
                f"the model writes in place to a conjugated view {list(view.shape)}; use the operation "
                "that is not in place"
            )
        offset = view.storage_offset() - base.storage_offset() * base.itemsize // view.itemsize
        layout, dtypes = (base.shape, base.stride()), (base.dtype, view.dtype)
        return cls(sources, layout, (offset, view.shape, view.stride()), dtypes)

    def _laid_out(self, x: Tensor) -> Tensor:
        """A copy with the strides of the base."""
        return torch.empty_strided(*self.layout, dtype=self.dtypes[0], device=x.device).copy_(x)

    def _view(self, base: Tensor) -> Tensor:
        empty = torch.empty(0, dtype=self.dtypes[1], device=base.device)
        return empty.set_(base.untyped_storage(), *self.view)

    def vjp(self, delta: Tensor) -> list[Tensor]:
        base = self._laid_out(delta)
        view = self._view(base)
        written = view.clone()
        view.zero_()
        return [base, written][-len(self.sources) :]

    def jvp(self, tangents: Any, delta: Any) -> tuple[Tensor, tuple[()]]:
        zero = tangents[-1].new_zeros(()).expand(self.layout[0])
        base = self._laid_out(tangents[0] if len(tangents) > 1 else zero)
        self._view(base).copy_(tangents[-1])
        return base, ()


def is_bound(tensor: Tensor) -> bool:
    """Whether it is a view of which PyTorch takes no gradient once its memory was overwritten.

    That is one of several that a function gives, and one that was made without gradients.
    """
    return tensor._is_view() and _get_creation_meta(tensor) != CreationMeta.DEFAULT


def view_of(number: int, base: Tensor, view: Tensor) -> Rule | None:
    """The rule of a view of the value ``number``, read anew; None: of another dtype."""
    same = base.dtype == view.dtype and base.is_conj() == view.is_conj()
    if not same or base.is_neg() != view.is_neg():
        return None
    geometry = (view.shape, view.stride(), view.storage_offset() - base.storage_offset())

    def read(x: Tensor) -> Tensor:
        return x.as_strided(*geometry)

    return LinearMap((number,), read, base.shape, base.stride(), base.dtype, base.device)
