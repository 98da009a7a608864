"""Normalise-activate-pool chains, put together lazily while a network runs.

A BatchNorm's result is a :class:`Chain`: a placeholder tensor with its shape and its autograd node, and
no values. An addition, an activation or a max-pool that reads it gives a longer chain. Once anything
else reads it, :meth:`Chain.compute` runs the fused operator, and gives the placeholder its values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from fastjac.errors import FastjacError
from fastjac.fusion.recompute import Recompute, version_of
from fastjac.ops._maps import DTYPES
from fastjac.ops.batch_norm_statistics import batch_norm_statistics
from fastjac.ops.norm_act_pool import forward, pooled_shape
from fastjac.ops.norm_act_pool_autograd import NormActPool, norm_act_pool_cotangents

PIECEWISE_LINEAR = frozenset({"none", "relu", "relu6", "leaky_relu"})
ALL_ACTIVATIONS = PIECEWISE_LINEAR | {"silu"}
_GEOMETRIES: dict[tuple[int | None, ...], str] = {
    (2, 2, 0, 1): "2x2",
    (3, 2, 1, 1): "3x3",
    (3, 2, 0, 1): "3x3-unpadded",
}


@dataclass
class Steps:
    """What follows a chain's BatchNorm, as the operator takes it; final once the chain is computed."""

    activation: str = "none"
    slope: float = 0.0
    pool: str = "none"

    @property
    def options(self) -> tuple[str, float, str]:
        """The operator's arguments."""
        return self.activation, self.slope, self.pool


@dataclass(eq=False)
class Chain:
    """BatchNorm of ``u``, then an addition, an activation and a max-pool, where they follow.

    ``u`` and ``residual`` are maps ``[B, C, H, W]``; ``shape`` is what the chain's reader sees.
    ``source`` and ``added`` are the tensors that the model passed in, of which those maps were made.
    ``module``: a weak reference to the module that made the BatchNorm, where a tape records.
    """

    u: Tensor
    source: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    invstd: Tensor
    training: bool
    eps: float
    shape: torch.Size
    recompute_input: Recompute | None
    grad_enabled: bool
    residual: Tensor | None = None
    added: Tensor | None = None
    steps: Steps = field(default_factory=Steps)
    slots: Sequence[Tensor] = ()
    versions: list[tuple[Tensor, int]] = field(default_factory=list)
    module: Any = None

    @property
    def takes_addition(self) -> bool:
        """Whether it is a BatchNorm alone."""
        return self.residual is None and self.takes_activation

    @property
    def takes_activation(self) -> bool:
        """Whether nothing but an addition follows the BatchNorm yet."""
        return self.steps.activation == "none" and self.steps.pool == "none"

    @property
    def takes_pool(self) -> bool:
        """Whether it is a map without a pool yet."""
        return self.steps.pool == "none" and len(self.shape) == 4

    @property
    def recomputable(self) -> bool:
        """Whether its output may be recomputed: not a pooled one, small, nor a sum, which saves more."""
        return self.steps.pool == "none" and self.residual is None

    def placeholder(self, slots: int, onto: Tensor | None = None) -> Tensor:
        """A tensor of the chain's shape, with its autograd node, full of NaN that takes no memory.

        ``slots``: how many the node has for a curvature: 1 for its coefficient, 2 with its map.
        ``onto``: the placeholder of the shorter chain, which an in-place operation has continued.
        """
        tensors = (self.u, self.residual, self.weight, self.bias, onto)
        if not self.grad_enabled or not torch._C._any_requires_grad(*tensors):
            if onto is not None:
                return onto
            return _filled("nan", self.u.dtype, self.u.device, self.shape)
        value, *self.slots = _LazyNormActPool.apply(*tensors, self, slots)
        return value

    def compute(self, placeholder: Tensor) -> None:
        """Give the placeholder its values."""
        for tensor, version in self.versions:
            if version_of(tensor) != version:
                raise FastjacError(
                    f"what a BatchNorm reads, {list(tensor.shape)}, was overwritten in place by an "
                    "operation that fastjac cannot see, before the fused operator had read it; "
                    "use the operation that is not in place"
                )
        with torch.no_grad():
            tensors = (self.u, self.residual, self.weight, self.bias, self.mean, self.invstd)
            y = forward(*tensors, *self.steps.options)
            placeholder.data = y if y.shape == self.shape else y.reshape(self.shape)

    def has_layout_of(self, other: Tensor) -> bool:
        """Whether a sum that begins with ``other``, and so has its layout, has the chain's too."""
        strided = other.layout == torch.strided
        if not strided or other.shape != self.u.shape or other.stride() == self.u.stride():
            return True
        return suggest_memory_format(other) == suggest_memory_format(self.u)

    def reads(self, storage: int) -> bool:
        """Whether the operator still has to read the storage at this address."""
        return any(t.untyped_storage()._cdata == storage for t, _ in self.versions)

    def extended(self, **changes: Any) -> Chain:
        """A copy with other fields, whose node is still to be made."""
        copy = object.__new__(Chain)
        copy.__dict__.update(self.__dict__, slots=(), versions=list(self.versions), **changes)
        return copy

    def activated(self, activation: str, slope: float) -> Chain:
        """The chain with an activation."""
        return self.extended(steps=Steps(activation, slope))

    def with_residual(self, other: Tensor, added: Tensor) -> Chain | None:
        """The chain with ``other`` added, of the same values as ``added``.

        None where the sum is larger, or of another dtype, and for a number on another device.
        """
        if other.device != self.u.device or other.layout != torch.strided:
            return None
        if torch.promote_types(other.dtype, self.u.dtype) != self.u.dtype:
            return None
        if other.shape != self.shape:
            try:
                if torch.broadcast_shapes(other.shape, self.shape) != self.shape:
                    return None
            except RuntimeError:  # the addition itself says so
                return None
        residual = other
        if (other.shape, other.dtype) != (self.shape, self.u.dtype):
            residual = other.to(self.u.dtype).expand(self.shape)
        steps = Steps(*self.steps.options)
        chain = self.extended(residual=as_map(residual), added=added, steps=steps)
        chain.versions.append((residual, version_of(residual)))
        return chain

    def pooled(self, pool: str) -> Chain | None:
        """The chain with a max-pool; None for a map too small for it."""
        try:
            shape = torch.Size(pooled_shape("norm_act_pool", self.u, pool))
        except FastjacError:  # the pool itself says so
            return None
        activation, slope, _ = self.steps.options
        return self.extended(steps=Steps(activation, slope, pool), shape=shape)


class _LazyNormActPool(torch.autograd.Function):
    """A chain's autograd node: made before its values, and differentiates what the chain became."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        onto: Tensor | None,
        chain: Chain,
        slots: int,
    ) -> tuple[Tensor, ...]:
        saved = u if chain.recompute_input is None else None
        ctx.save_for_backward(saved, residual, weight, bias, chain.mean, chain.invstd)
        ctx.steps, ctx.training = chain.steps, chain.training  # not the chain, which holds u
        ctx.recompute_input = chain.recompute_input
        ctx.set_materialize_grads(False)
        if onto is None:
            value = _filled("nan", u.dtype, u.device, chain.shape)
        else:
            value = onto
            ctx.mark_dirty(onto)
        likes = (chain.mean, u)[:slots]
        return value, *[_filled("0", t.dtype, t.device, t.shape) for t in likes]

    @staticmethod
    def backward(
        ctx: Any,
        gy: Tensor | None,
        coefficient: Tensor | None = None,
        curvature: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise FastjacError(
                "fastjac's fused BatchNorm differentiates once; got a backward with create_graph=True. "
                "A model that is not fused, or strategy='autograd', can be differentiated further"
            )
        if gy is None and coefficient is None and curvature is None:  # its value was overwritten
            return (None,) * 7
        ctx.options = ctx.steps.options
        gy = None if gy is None else as_map(gy)
        return *norm_act_pool_cotangents(ctx, gy, coefficient, curvature), None, None, None


@functools.lru_cache(maxsize=64)
def _scalar(value: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return torch.full((), float(value), dtype=dtype, device=device)


@functools.lru_cache(maxsize=256)
def _expanded(value: str, dtype: torch.dtype, device: torch.device, shape: torch.Size) -> Tensor:
    with torch.inference_mode(False):
        return _scalar(value, dtype, device).expand(shape)


def _filled(value: str, dtype: torch.dtype, device: torch.device, shape: torch.Size) -> Tensor:
    """Of one value everywhere, without storage of its own; by ``.data`` it is no view for autograd."""
    return _expanded(value, dtype, device, shape).data


def recompute_output(value: Tensor) -> Recompute:
    """How to recompute ``value``, a computed chain, bit for bit from its BatchNorm's input."""
    node, shape = value.grad_fn, value.shape

    def recompute() -> Tensor:
        node.options = node.steps.options
        with torch.no_grad():
            return NormActPool.recompute(node).view(shape)

    return recompute


def as_map(x: Tensor) -> Tensor:
    """``[B, C, ...]`` as ``[B, C, H, W]``; else dense, as PyTorch lays out a norm of series."""
    return x if x.dim() == 4 else x.contiguous().view(*x.shape[:2], x.shape[2:].numel(), 1)


def batch_norm_chain(
    u: Tensor,
    source: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    recompute_input: Recompute | None,
) -> Chain:
    """The chain that ``F.batch_norm`` with these arguments begins; updates the running statistics.

    ``u`` is what the chain reads of ``source``, the model's own tensor.
    """
    map_ = as_map(u)
    statistics = (running_mean, running_var, training, momentum, eps)
    mean, invstd = batch_norm_statistics(map_.detach(), *statistics)
    recompute = recompute_input if map_ is u else None
    tensors = (map_, source, weight, bias, mean, invstd)
    read = (source, weight, bias)
    versions = [(t, version_of(t)) for t in read if t is not None]
    grad = torch.is_grad_enabled()
    return Chain(*tensors, training, eps, u.shape, recompute, grad, versions=versions)


def fusable(u: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether a BatchNorm of u can begin a chain."""
    if type(u) not in (Tensor, torch.nn.Parameter) or torch._C._are_functorch_transforms_active():
        return False
    dims, channels = u.dim(), u.shape[1:2]
    if u.dtype not in DTYPES or not 2 <= dims <= 5 or u.layout != torch.strided:
        return False
    for vector in (weight, bias):
        if vector is not None and not (
            vector.is_floating_point() and vector.shape == channels and vector.device == u.device
        ):
            return False
    return dims < 5 or u.is_contiguous()


# Which calls continue a chain: functions of a call's arguments.


def _slope(x: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> float:
    return float(negative_slope)


def _limits(x: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Any:
    return min_val, max_val


ACTIVATIONS: dict[Any, Callable[..., tuple[str, float] | None]] = {
    **dict.fromkeys(
        (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_),
        lambda *args, **kwargs: ("relu", 0.0),
    ),
    F.relu6: lambda *args, **kwargs: ("relu6", 0.0),
    **dict.fromkeys(
        (F.hardtanh, F.hardtanh_),
        lambda *args, **kwargs: ("relu6", 0.0) if _limits(*args, **kwargs) == (0, 6) else None,
    ),
    **dict.fromkeys(
        (F.leaky_relu, F.leaky_relu_),
        lambda *args, **kwargs: ("leaky_relu", s) if (s := _slope(*args, **kwargs)) >= 0 else None,
    ),
    F.silu: lambda *args, **kwargs: ("silu", 0.0),
}
ADDITIONS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__}


def pool_of(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> str | None:
    """A call of ``F.max_pool2d`` as norm_act_pool names it; None for one that it has not."""
    stride = kernel_size if stride is None or stride == [] else stride
    if return_indices or ceil_mode:
        return None
    sizes = (kernel_size, stride, padding, dilation)
    return _GEOMETRIES.get(tuple(map(_square, sizes)))


def _square(size: Any) -> int | None:
    """One size for both axes; None where they differ."""
    if isinstance(size, int):
        return size
    sizes = set(size)
    return sizes.pop() if len(sizes) == 1 else None
