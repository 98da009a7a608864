"""The terms of the loss in Srinivas & Fleuret (ICML 2018), each averaged over the batch."""

from __future__ import annotations

from torch import Tensor

from fastjac.errors import FastjacError
from fastjac.ops import jacobian_match


def _same_shape(name: str, student: Tensor, teacher: Tensor, dims: int) -> None:
    if student.dim() != dims or student.shape != teacher.shape:
        raise FastjacError(
            f"{name}: expected two tensors of one shape with {dims} dimensions, "
            f"got student {list(student.shape)} and teacher {list(teacher.shape)}"
        )


def activation_match_loss(ls: Tensor, lt: Tensor) -> Tensor:
    """Squared error over pre-softmax activations, ``mean_i ||ls_i - lt_i||^2``.

    ``ls``, ``lt``: logits ``[B, classes]``. Differentiable in both, to any order.
    """
    _same_shape("activation_match_loss", ls, lt, 2)
    return (ls - lt).square().sum(1).mean()


def attention_match_loss(fs: Tensor, ft: Tensor) -> Tensor:
    """Squared distance of attention maps scaled to unit norm.

    ``mean_i || A(fs_i)/||A(fs_i)|| - A(ft_i)/||A(ft_i)|| ||^2`` with A(Z) the mean over channels of Z^2
    (Zagoruyko & Komodakis, ICLR 2017). ``fs`` ``[B, Cs, h, w]``, ``ft`` ``[B, Ct, h, w]``.
    Differentiable in both, to any order.
    """
    maps = [(f * f).sum(1) / f.shape[1] if f.dim() == 4 else f for f in (fs, ft)]
    _same_shape("attention_match_loss (maps over h, w)", *maps, dims=3)
    unit = [m.flatten(1) for m in maps]
    unit = [m / m.norm(dim=1, keepdim=True).clamp_min(1e-12) for m in unit]
    return (unit[0] - unit[1]).square().sum(1).mean()


def jacobian_match_loss(js: Tensor, jt: Tensor, normalize: bool = True) -> Tensor:
    """Distance of input Jacobians, averaged over the batch.

    normalised (eq. 2 of the paper's supplement): ``|| js/||js|| - jt/||jt|| ||^2``; raw (Proposition
    1): ``|| js - jt ||^2``; norms over all of a sample's input dimensions.
    ``js``, ``jt``: ``[B, ...]``, one shape, dtype and device. Returns a scalar in fp32 or wider,
    differentiable once, in ``js``.
    """
    return jacobian_match(js, jt, normalize)[0].mean()
