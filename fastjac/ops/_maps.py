"""What operators on feature maps [B, C, H, W] check, and the layouts that their kernels know."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from fastjac.errors import FastjacError

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def layout(u: Tensor) -> torch.memory_format:
    if not u.is_contiguous() and u.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def dense(u: Tensor) -> Tensor:
    """u, or a copy: with the channels last where they are in the map that u is a part of."""
    if u.is_contiguous() or u.is_contiguous(memory_format=torch.channels_last):
        return u
    return u.contiguous(memory_format=suggest_memory_format(u))


def laid_out(u: Tensor, *maps: Tensor | None) -> list[Tensor | None]:
    """Maps in u's layout."""
    form = layout(u)
    return [x if x is None else x.contiguous(memory_format=form) for x in maps]


def vectors(u: Tensor, *given: Tensor | None) -> list[Tensor | None]:
    """Floating vectors ``[C]`` as the kernels read them: dense, in the accumulator dtype."""
    acc = accumulator(u.dtype)
    return [
        x if x is None or (x.dtype == acc and x.is_contiguous()) else x.to(acc).contiguous()
        for x in given
    ]


def empty_map(u: Tensor, shape: Sequence[int]) -> Tensor:
    """Of u's dtype, device and layout."""
    return torch.empty(shape, dtype=u.dtype, device=u.device, memory_format=layout(u))


def channel_zeros(u: Tensor) -> Tensor:
    """``[C]``, in the accumulator dtype."""
    return u.new_zeros(u.shape[1], dtype=accumulator(u.dtype))


def check_strided(op: str, name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise FastjacError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise FastjacError(f"{op}: {name} must be a strided tensor, got {x.layout}")


def check_map(op: str, name: str, x: Tensor) -> None:
    check_strided(op, name, x)
    if x.dtype not in DTYPES:
        expected = ", ".join(str(d) for d in DTYPES)
        raise FastjacError(f"{op}: {name} must be one of {expected}, got {x.dtype}")
    if x.dim() != 4:
        raise FastjacError(f"{op}: {name} must be [B, C, H, W], got {list(x.shape)}")


def check_like(op: str, name: str, x: Tensor, shape: Sequence[int], owner: str, u: Tensor) -> None:
    """Raise unless x has ``owner``'s shape and u's dtype and device."""
    check_strided(op, name, x)
    if x.dtype != u.dtype:
        raise FastjacError(f"{op}: {name} must have u's dtype, {u.dtype}, got {x.dtype}")
    if x.device != u.device:
        raise FastjacError(f"{op}: {name} must have u's device, {u.device}, got {x.device}")
    if x.shape != shape:
        raise FastjacError(
            f"{op}: {name} must have {owner}'s shape, {list(shape)}, got {list(x.shape)}"
        )


def check_channels(op: str, u: Tensor, **given: Tensor | None) -> None:
    """Raise unless these are floating vectors ``[C]``; mean and invstd must be there."""
    shape, device = u.shape[1:2], u.device
    for name, x in given.items():
        if x is None and name not in ("mean", "invstd"):
            continue
        check_strided(op, name, x)
        if x.shape != shape:
            raise FastjacError(f"{op}: {name} must be [{u.shape[1]}], got {list(x.shape)}")
        if x.device != device:
            raise FastjacError(f"{op}: {name} must have u's device, {device}, got {x.device}")
        if not x.is_floating_point():
            raise FastjacError(f"{op}: {name} must be of a floating dtype, got {x.dtype}")
