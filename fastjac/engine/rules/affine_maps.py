"""The rule of maps that are affine in all that depends on x: selecting, stacking, scattering."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjac.engine.rules.base import Recorded, register_alternatives, register_rule
from fastjac.engine.rules.generic import Generic, map_tensors
from fastjac.engine.rules.linear_maps import ConstantPad, Difference, Pad
from fastjac.engine.rules.pointwise import Add, Subtract, SubtractFrom
from fastjac.fusion.mode import tensors_in, writes_in_place

if TYPE_CHECKING:
    from fastjac.engine.site import Site


@register_rule(
    *(torch.where, Tensor.where, torch.masked_fill, Tensor.masked_fill, torch.stack, torch.hstack),
    *(torch.vstack, torch.dstack, torch.column_stack, torch.block_diag, torch.meshgrid),
    *(torch.scatter_add, Tensor.scatter_add, torch.index_add, Tensor.index_add, torch.index_copy),
    *(Tensor.index_copy, torch.index_fill, Tensor.index_fill, torch.index_put, Tensor.index_put),
    *(torch.masked_scatter, Tensor.masked_scatter, torch.select_scatter, Tensor.select_scatter),
    *(torch.slice_scatter, Tensor.slice_scatter, torch.diagonal_scatter, Tensor.diagonal_scatter),
    *(torch.complex, torch.atleast_1d, torch.atleast_2d, torch.atleast_3d, Tensor.sum_to_size),
)
class AffineMap(Generic):
    """y = A(x1, x2, ...) + b. A is the same at every x, and so is taken at zeros: none is kept.

    Nor are constants of b. So the model may overwrite them later, as autograd lets it.
    """

    multiplies: ClassVar[bool] = False  # whether a constant may be a factor, not a term

    @classmethod
    def record(cls, site: Site, *args: Any, **kwargs: Any) -> Recorded | Any:
        plain = all(
            type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided
            for t in tensors_in(args, kwargs)
        )
        if not plain or writes_in_place(site.function, args, kwargs):
            return NotImplemented
        y, rule, _ = super().record(site, *args, **kwargs)
        held = set(map(id, rule.leaves))
        if not cls.multiplies:
            held.update(id(t) for t in tensors_in(*rule.template) if _is_term(t))
        site.kept[:] = [entry for entry in site.kept if id(entry[0]) not in held]
        template = map_tensors(lambda t: _zeros(t) if id(t) in held else t, rule.template)
        leaves = [*map(_zeros, rule.leaves)]
        rule = rule.changed(leaves=leaves, template=template, receives=[False] * len(leaves))
        return y, rule, ()


def _is_term(constant: Tensor) -> bool:
    """Whether a constant is neither an index, nor a mask, nor (as a single number) a factor."""
    return constant.dim() > 0 and (constant.is_floating_point() or constant.is_complex())


def _zeros(like: Tensor) -> Tensor:
    """Of a tensor's shape and type, in no memory."""
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(like.shape)


@register_rule(
    *(torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.mm, Tensor.mm),
    *(torch.bmm, Tensor.bmm, torch.einsum, torch.tensordot, torch.scatter, Tensor.scatter),
)
class AffineInOne(AffineMap):
    """A product of which one factor alone is differentiated; a scatter that multiplies nothing."""

    multiplies: ClassVar[bool] = True

    @classmethod
    def record(cls, site: Site, *args: Any, **kwargs: Any) -> Recorded | Any:
        scatters = site.function in (torch.scatter, Tensor.scatter)
        # A tensor that is two factors counts twice.
        leaves = [t for t in tensors_in(args, kwargs) if site.varies(t) or site.receives(t)]
        if kwargs.get("reduce") is not None or (len(leaves) > 1 and not scatters):
            return NotImplemented
        return super().record(site, *args, **kwargs)


# Where these do not cover a call, it is of complex numbers, say, and affine all the same.
for _rule, _functions in {
    Add: (torch.add, Tensor.add, Tensor.__radd__, Tensor.__add__),
    Subtract: (torch.sub, Tensor.sub, Tensor.__sub__),
    SubtractFrom: (Tensor.__rsub__, torch.rsub),
    Difference: (torch.diff, Tensor.diff),
}.items():
    register_alternatives(*_functions, rules=[_rule, AffineMap])
register_alternatives(F.pad, rules=[ConstantPad, Pad, AffineMap])
