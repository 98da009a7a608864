"""SyncBatchNorm in train mode: one BatchNorm over the batches of all processes of a group.

PyTorch's is a custom autograd function, which no mode sees, and runs on GPUs alone. While a tape
records, :func:`synchronised_batch_norms` has ``torch.nn.SyncBatchNorm`` call :func:`sync_batch_norm`
instead: one call, with a rule, on any device.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import wrap_torch_function

from fastjac.engine.rules.base import Recorded, compute_type, register_rule
from fastjac.engine.rules.layers import BatchNorm, times_xhat, with_slots
from fastjac.errors import FastjacError
from fastjac.fusion.mode import active_fusion, in_checkpoint

if TYPE_CHECKING:
    from fastjac.engine.site import Site

aten = torch.ops.aten


@wrap_torch_function(lambda input, *args: (input,))
def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    group: Any,
) -> Tensor:
    """gamma (u - mean) r + beta, with the statistics of the batches ``[B, C, ...]`` of all of ``group``.

    Batches may differ in size, and be empty. The running statistics are updated as BatchNorm's are.
    """
    return SlottedSyncBatchNorm.apply(
        input, weight, bias, running_mean, running_var, momentum, eps, group
    )[0]


class SlottedSyncBatchNorm(torch.autograd.Function):
    """:func:`sync_batch_norm`, with the slots for a curvature of ``layers.SlottedBatchNorm``.

    Gives y, the mean and 1/sqrt(var + eps) ``[C]`` of the joint batch, its count ``[]``, and both slots.
    The gradients of weight and bias are those of this process's samples, which
    DistributedDataParallel averages.
    """

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        group: Any,
    ) -> tuple[Tensor, ...]:
        mean, var, count = _joint_statistics(u, group)
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        if running_var is not None:
            unbiased = var * (count / (count - 1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        affine = (None if p is None else p.to(mean.dtype) for p in (weight, bias))
        y = torch.batch_norm(u, *affine, mean, var, False, 0.0, eps, False)
        invstd = (var + eps).rsqrt()
        ctx.save_for_backward(u, weight, mean, invstd, count)
        ctx.eps, ctx.group = eps, group
        ctx.mark_non_differentiable(mean, invstd, count)
        ctx.set_materialize_grads(False)
        return y, mean, invstd, count, torch.zeros_like(mean), u.new_zeros(()).expand(u.shape)

    @staticmethod
    def backward(
        ctx: Any,
        gy: Tensor | None,
        _mean: None,
        _invstd: None,
        _count: None,
        coefficient: Tensor | None,
        curvature: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise FastjacError(
                "fastjac's SyncBatchNorm differentiates once; got a backward with create_graph=True"
            )
        u, weight, mean, invstd, count = ctx.saved_tensors
        wants_u, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        gu = gw = gb = None
        if gy is not None:
            gw, gb = _sums(gy, u, mean, invstd, ctx.eps)
            if wants_u:
                gu = _projection(gy, u, mean, invstd, _all_reduced(gw, gb, ctx.group) / count)
                gu = gu if weight is None else gu * _column(weight, gu)
        if wants_u:
            gu = with_slots(gu, u, mean, invstd, coefficient, curvature)
        gw, gb = gw if wants_weight else None, gb if wants_bias else None  # autograd casts them
        return gu, gw, gb, None, None, None, None, None


def _joint_statistics(u: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance ``[C]`` over the batches of all processes, and their count ``[]``.

    The squared deviations of each batch from its own mean are added up with those of the means, which
    does not cancel as sums of squares would.
    """
    dims = [d for d in range(u.dim()) if d != 1]
    channels, count = u.shape[1], u.numel() // u.shape[1]
    mine = u.new_zeros(2 * channels + 1, dtype=compute_type(u))
    if count:
        var, mean = torch.var_mean(u.to(mine.dtype), dims, correction=0)
        torch.cat([mean, var * count, mine.new_full((1,), count)], out=mine)
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group)
    means, squares, counts = torch.stack(parts).split([channels, channels, 1], 1)
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    squares = squares.sum(0) + (counts * (means - mean).square()).sum(0)
    return mean, squares / total, total


def _column(vector: Tensor, like: Tensor) -> Tensor:
    return vector.to(like.dtype).view([1, -1] + [1] * (like.dim() - 2))


def _sums(c: Tensor, u: Tensor, mean: Tensor, invstd: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """sum(c x^) and sum(c) per channel, over this process's batch."""
    if not u.numel():
        return torch.zeros_like(mean), torch.zeros_like(mean)
    _, weighted, plain = aten.native_batch_norm_backward.default(
        *(c, u, torch.ones_like(invstd), None, None, mean, invstd, True, eps, [False, True, True])
    )
    return weighted, plain


def _all_reduced(weighted: Tensor, plain: Tensor, group: Any) -> Tensor:
    """The sums of :func:`_sums` over all processes, ``[2, C]``."""
    sums = torch.stack([weighted, plain])
    dist.all_reduce(sums, group=group)
    return sums


def _projection(c: Tensor, u: Tensor, mean: Tensor, invstd: Tensor, means: Tensor) -> Tensor:
    """r (c - m(c) - x^ m(c x^)), from ``means``: m(c x^) and m(c)."""
    weighted, plain = means
    inside = times_xhat(-weighted, u, mean, invstd).add_(c).sub_(_column(plain, c))
    return inside.mul_(_column(invstd, c))


@register_rule(sync_batch_norm)
@dataclass
class SyncBatchNorm(BatchNorm):
    """BatchNorm whose m(.) and T are those of the joint batch.

    Each process gives its own share of the gradient of gamma. With frozen statistics one sum per
    channel goes around, in the forward sweep; with the batch's, two more in each sweep.
    """

    group: Any

    @property
    def recomputes_cotangent(self) -> bool:
        """A cotangent of batch statistics would be sent around once more."""
        return not self.batch

    @classmethod
    def record(
        cls,
        site: Site,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        momentum: float,
        eps: float,
        group: Any,
    ) -> Recorded:
        if in_checkpoint():
            raise FastjacError(
                "SyncBatchNorm in train mode under torch.utils.checkpoint: the backward would run it "
                "again, and differently; expected the module outside of the checkpoint, or in eval mode"
            )
        if site.varies(weight, bias):
            raise FastjacError(
                "SyncBatchNorm whose weight or bias depends on x is not supported; expected "
                "affine=False, and the multiplication and addition as calls of their own"
            )
        u, trains = input, site.tape.trains(input)
        y, mean, invstd, count, *slots = SlottedSyncBatchNorm.apply(
            site.joined(u), weight, bias, running_mean, running_var, momentum, eps, group
        )
        batch = site.batch_stats == "batch"
        receivers = () if weight is None else site.receives(weight)
        scales = bool(receivers)
        if trains:
            receivers += tuple(r for slot in slots[: 1 + batch] for r in site.receives(slot))
        rule = cls(
            *((site.number(u),), None if weight is None else site.keep(weight), invstd),
            *(site.keep(u) if batch else None, mean if batch else None, eps, True, batch, trains),
            *((scales, trains), count, u.dim(), group),
        )
        return y, rule, receivers

    def _projected(self, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        u = self.u
        sums = _sums(cotangent, u, self.mean, self.invstd, self.eps)
        means = _all_reduced(*sums, self.group) / self.count
        return _projection(cotangent, u, self.mean, self.invstd, means), means[0]

    def _joint(self, total: Tensor) -> Tensor:
        total = total.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def processes(self) -> Any:
        return self.group


_torch_forward = nn.SyncBatchNorm.forward
_lock = threading.Lock()
_active = 0


@contextmanager
def synchronised_batch_norms() -> Iterator[None]:
    """Run the train-mode SyncBatchNorms of this thread's tape, and all on CPUs, by our own function."""
    global _active
    if not (dist.is_available() and dist.is_initialized()):
        yield
        return
    with _lock:
        _active += 1
        nn.SyncBatchNorm.forward = _forward
    try:
        yield
    finally:
        with _lock:
            _active -= 1
            if not _active:
                nn.SyncBatchNorm.forward = _torch_forward


def _forward(module: nn.SyncBatchNorm, input: Tensor) -> Tensor:
    """What ``torch.nn.SyncBatchNorm`` does before it calls its autograd function."""
    seen = active_fusion() is not None or input.device.type == "cpu"
    group = module.process_group or dist.group.WORLD
    if not (module.training and seen) or dist.get_world_size(group) < 2:
        return _torch_forward(module, input)
    module._check_input_dim(input)
    module._check_non_zero_input_channels(input)
    momentum, statistics = module.momentum or 0.0, (None, None)
    if module.track_running_stats:
        module.num_batches_tracked.add_(1)
        if module.momentum is None:
            momentum = 1.0 / module.num_batches_tracked.item()
        statistics = module.running_mean, module.running_var
    return sync_batch_norm(
        input, *statistics, module.weight, module.bias, momentum, module.eps, group
    )
