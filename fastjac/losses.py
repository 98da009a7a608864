"""Losses of input Jacobians, and the paper's other terms; each averaged over the batch.

Jacobians are ``[B, ...]`` or ``[B, K, ...]``, as :func:`fastjac.with_jacobian` gives them. Norms and
products are over all of a sample's dimensions, K included, in float32 or wider. A norm whose square
overflows there (from 1.8e19 on in float32) counts as infinite. "The paper":
Srinivas & Fleuret, "Knowledge Transfer with Jacobian Matching", ICML 2018. All are deterministic.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastjac.errors import FastjacError, unknown
from fastjac.ops import jacobian_match
from fastjac.targets import LabelLogit

CROSS_ENTROPY_TERMS = ("all", "logarithm", "paper")


def activation_match_loss(ls: Tensor, lt: Tensor) -> Tensor:
    """Squared error over pre-softmax activations, ``mean_i ||ls_i - lt_i||^2``.

    ``ls``, ``lt``: logits ``[B, classes]``. Returns a scalar in float32 or wider, differentiable in
    both, to any order.

    >>> import torch
    >>> activation_match_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]]))
    tensor(5.)
    """
    ls, lt = (_wide("activation_match_loss", name, t) for name, t in (("ls", ls), ("lt", lt)))
    _same_shape("activation_match_loss", ls, lt, 2)
    return (ls - lt).square().sum(1).mean()


def attention_match_loss(fs: Tensor, ft: Tensor) -> Tensor:
    """Squared distance of attention maps scaled to unit norm.

    ``mean_i || A(fs_i)/||A(fs_i)|| - A(ft_i)/||A(ft_i)|| ||^2`` with A(Z) the mean over channels of Z^2
    (Zagoruyko & Komodakis, ICLR 2017). ``fs`` ``[B, Cs, h, w]``, ``ft`` ``[B, Ct, h, w]``.
    Returns a scalar in float32 or wider, differentiable in both, to any order.

    >>> import torch
    >>> fs, ft = torch.zeros(1, 2, 1, 2), torch.zeros(1, 3, 1, 2)
    >>> fs[..., 0], ft[..., 1] = 7.0, 3.0
    >>> attention_match_loss(fs, ft)  # maps without a common pixel
    tensor(2.)
    """
    both = [_wide("attention_match_loss", name, f) for name, f in (("fs", fs), ("ft", ft))]
    maps = [(f * f).sum(1) / f.shape[1] if f.dim() == 4 else f for f in both]
    _same_shape("attention_match_loss (maps over h, w)", maps[0], maps[1], 3)
    unit = [m.flatten(1) for m in maps]
    unit = [m / m.norm(dim=1, keepdim=True).clamp_min(1e-12) for m in unit]
    return (unit[0] - unit[1]).square().sum(1).mean()


def jacobian_match_loss(js: Tensor, jt: Tensor, normalize: bool = True) -> Tensor:
    """Squared distance of input Jacobians.

    normalised (eq. 2 of the paper's supplement): ``mean_i || js_i/||js_i|| - jt_i/||jt_i|| ||^2``; raw
    (Proposition 1): ``mean_i || js_i - jt_i ||^2``.
    A norm below 1e-12 counts as 1e-12 there, so that a Jacobian of zeros gives finite gradients.
    ``js``, ``jt``: ``[B, ...]``, one shape, dtype and device. Returns a scalar in float32 or wider,
    differentiable once, in ``js``.

    >>> import torch
    >>> js, jt = torch.tensor([[3.0, 4.0]]), torch.tensor([[6.0, 8.0]])
    >>> jacobian_match_loss(js, jt), jacobian_match_loss(js, jt, normalize=False)
    (tensor(0.), tensor(25.))
    """
    for name, j in (("js", js), ("jt", jt)):
        _check_tensor("jacobian_match_loss", name, j)
    return jacobian_match(js, jt, normalize)[0].mean()


def jacobian_cosine_loss(js: Tensor, jt: Tensor) -> Tensor:
    """One minus the cosine of the angle between Jacobians, ``mean_i (1 - cos(js_i, jt_i))``.

    Computed as ``|| js/||js|| - jt/||jt|| ||^2 / 2``, the same without cancellation where they agree.
    A Jacobian of zeros stays zero when it is normalised: it costs 1/2 against another one, nothing
    against zeros, and gets no gradient.
    ``js``, ``jt``: ``[B, ...]``, of one shape. Returns a scalar in float32 or wider, differentiable in
    both.

    >>> import torch
    >>> jacobian_cosine_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 5.0]]))
    tensor(1.)
    """
    s, t = _rows("jacobian_cosine_loss", "js", js), _rows("jacobian_cosine_loss", "jt", jt)
    if js.shape != jt.shape:
        raise FastjacError(
            f"jacobian_cosine_loss: jt must have js's shape, {list(js.shape)}, got {list(jt.shape)}"
        )
    return (_unit(s) - _unit(t)).square().sum(1).mean() / 2


def jacobian_norm_penalty(j: Tensor) -> Tensor:
    """Squared norm, ``mean_i ||j_i||^2``.

    R1 for a discriminator's output on real images (Mescheder, Geiger & Nowozin, ICML 2018: theirs is
    half of it); double backpropagation for a loss per sample (Drucker & LeCun, 1992).
    ``j``: ``[B, ...]``. Returns a scalar in float32 or wider, differentiable in ``j``.

    >>> import torch
    >>> jacobian_norm_penalty(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
    tensor(13.)
    """
    return _rows("jacobian_norm_penalty", "j", j).square().sum(1).mean()


def gradient_penalty(j: Tensor, norm: float = 1.0) -> Tensor:
    """Distance of the norm from a given one, ``mean_i (||j_i|| - norm)^2``.

    WGAN-GP for a critic's output between real and generated samples (Gulrajani et al., NeurIPS 2017).
    ``j``: ``[B, ...]``. Returns a scalar in float32 or wider, differentiable in ``j``; a Jacobian of
    zeros gets no gradient.

    >>> import torch
    >>> gradient_penalty(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
    tensor(8.)
    """
    if not (isinstance(norm, Real) and 0 <= norm < math.inf):
        raise FastjacError(f"gradient_penalty: norm must be a number from 0; got {norm!r}")
    rows = _rows("gradient_penalty", "j", j)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return (norms - float(norm)).square().mean()


def masked_jacobian_penalty(j: Tensor, mask: Tensor) -> Tensor:
    """Squared norm where the mask is on, ``mean_i ||mask_i * j_i||^2``.

    "Right for the right reasons" (Ross, Hughes & Doshi-Velez, IJCAI 2017): the mask marks the inputs
    that must not matter.
    ``j``: ``[B, ...]``; ``mask``: bool or numbers, as many dimensions as ``j``, each of its size or 1.
    Returns a scalar in float32 or wider, differentiable in ``j`` (and in a floating-point mask).

    >>> import torch
    >>> masked_jacobian_penalty(torch.tensor([[3.0, 4.0]]), torch.tensor([[False, True]]))
    tensor(16.)
    """
    rows = _rows("masked_jacobian_penalty", "j", j)
    _check_tensor("masked_jacobian_penalty", "mask", mask)
    # As many dimensions: [B, h, w] against [B, C, h, w] would pair samples with channels.
    if mask.dim() != j.dim() or any(
        m not in (1, n) for m, n in zip(mask.shape, j.shape, strict=True)
    ):
        raise FastjacError(
            f"masked_jacobian_penalty: mask must have {j.dim()} dimensions, each of size 1 or j's, "
            f"{list(j.shape)}; got {list(mask.shape)}"
        )
    if mask.is_complex():
        raise FastjacError(
            f"masked_jacobian_penalty: mask must be bool or real numbers; got {mask.dtype}"
        )
    return (rows * mask.to(rows.dtype).expand(j.shape).flatten(1)).square().sum(1).mean()


def cross_entropy_jacobian_loss(
    ls: Tensor, lt: Tensor, js: Tensor, jt: Tensor | None = None, terms: str = "all"
) -> Tensor:
    """What input noise adds to the cross-entropy with a teacher's soft targets, or with labels.

    For noise ``sigma z``, z standard normal, the expected cross-entropy is the one at x plus ``sigma^2``
    times this (Proposition 2; ``docs/theory.md`` derives it). With p and q the softmax of teacher and
    student, ``a_k = grad log p_k``, ``b_k = grad log q_k``, it is the mean over the batch of

    - ``terms="all"``: ``-sum_k p_k <a_k, b_k> + 1/2 sum_k q_k ||b_k||^2
      - 1/2 sum_k p_k log q_k (||a_k||^2 - sum_m p_m ||a_m||^2)``. That is all of order ``sigma^2`` where
      the logits' Laplacians are 0: away from the kinks of piecewise linear networks;
    - ``"logarithm"``: ``-sum_k p_k <a_k, b_k> + 1/2 sum_k p_k ||b_k||^2``, the probabilities expanded
      to first order, the logarithm to second. It is ``1/2 sum_k p_k ||b_k - a_k||^2`` less a constant
      of the teacher's;
    - ``"paper"``: ``-sum_k p_k <a_k, b_k>``, which is ``-sum_k <grad p_k, grad q_k> / q_k``. It is
      linear in the student's Jacobian: by itself it has no minimum.

    For labels, p does not depend on x and a = 0: ``"all"`` is ``1/2 sum_k q_k ||b_k||^2``, and
    ``"logarithm"`` is ``1/2 ||grad log q_y||^2``.

    Args:
        ls: the student's logits ``[B, K]``.
        lt: the teacher's logits ``[B, K]``, or labels ``[B]`` (int64).
        js: the Jacobians of all of the student's logits, ``[B, K, ...]``, as
            :class:`~fastjac.targets.Logits` gives them.
        jt: the teacher's, of js's shape; None for labels.
        terms: ``"all"``, ``"logarithm"`` or ``"paper"``.

    For a temperature, divide logits and Jacobians by it. Returns a scalar in float32 or wider,
    differentiable in all floating-point arguments, to any order. Raises :class:`fastjac.FastjacError`
    for shapes that differ and, on a CPU, for labels out of range and logits that are not finite.

    >>> import torch
    >>> ls, js = torch.zeros(1, 2), torch.tensor([[[3.0, 4.0], [-3.0, -4.0]]])
    >>> cross_entropy_jacobian_loss(ls, ls, js, js)  # q = p: minus half of sum_k p_k ||a_k||^2
    tensor(-12.5000)
    >>> cross_entropy_jacobian_loss(ls, torch.tensor([1]), js, terms="logarithm")
    tensor(12.5000)
    """
    name = "cross_entropy_jacobian_loss"
    if terms not in CROSS_ENTROPY_TERMS:
        raise unknown("terms", terms, CROSS_ENTROPY_TERMS, where=name)
    _check_class_rows(name, "ls", ls, "js", js)
    log_q = ls.to(torch.promote_types(ls.dtype, torch.float32)).log_softmax(1)
    q, b = log_q.exp(), _class_rows(js)
    b = b - (q[:, :, None] * b).sum(1, keepdim=True)
    b_squared = b.square().sum(2)
    if not (isinstance(lt, Tensor) and lt.is_floating_point()):
        if jt is not None or terms == "paper":
            raise FastjacError(
                f"{name}: labels have no Jacobian; expected jt=None and terms 'all' or 'logarithm', "
                f"got {'a jt' if jt is not None else repr(terms)}"
            )
        LabelLogit().check(ls, lt)
        weight = q if terms == "all" else torch.nn.functional.one_hot(lt, ls.shape[1])
        return (weight * b_squared).sum(1).mean() / 2
    if jt is None:
        raise FastjacError(f"{name}: jt is missing; only labels, int64 [B], go without it")
    _check_class_rows(name, "lt", lt, "jt", jt)
    if js.shape != jt.shape:
        raise FastjacError(
            f"{name}: jt must have js's shape, {list(js.shape)}, got {list(jt.shape)}"
        )
    p, a = lt.to(torch.promote_types(lt.dtype, torch.float32)).softmax(1), _class_rows(jt)
    a = a - (p[:, :, None] * a).sum(1, keepdim=True)
    loss = -(p * (a * b).sum(2)).sum(1)
    if terms == "logarithm":
        loss = loss + (p * b_squared).sum(1) / 2
    if terms == "all":
        a_squared = a.square().sum(2)
        excess = a_squared - (p * a_squared).sum(1, keepdim=True)
        loss = loss + ((q * b_squared).sum(1) - (p * log_q * excess).sum(1)) / 2
    return loss.mean()


def _check_tensor(loss: str, name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        return
    advice = ""
    if hasattr(value, "jacobian"):
        advice = "; its .jacobian is a tensor"
    elif isinstance(value, tuple):
        advice = "; of several targets each has its own"
    raise FastjacError(f"{loss}: {name} must be a tensor, got {type(value).__name__}{advice}")


def _wide(loss: str, name: str, value: Tensor) -> Tensor:
    """A floating-point tensor in float32 or wider, so that squares of float16 do not overflow."""
    _check_tensor(loss, name, value)
    if not value.is_floating_point():
        raise FastjacError(
            f"{loss}: {name} must be floating-point; got {value.dtype} {list(value.shape)}"
        )
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _same_shape(name: str, student: Tensor, teacher: Tensor, dims: int) -> None:
    if student.dim() != dims or student.shape != teacher.shape:
        raise FastjacError(
            f"{name}: expected two tensors of one shape with {dims} dimensions, "
            f"got student {list(student.shape)} and teacher {list(teacher.shape)}"
        )


def _rows(loss: str, name: str, j: Tensor) -> Tensor:
    """Jacobians as one row per sample, in float32 or wider."""
    _check_tensor(loss, name, j)
    if j.dim() < 2 or not j.is_floating_point():
        raise FastjacError(
            f"{loss}: {name} must be floating-point [B, ...]; got {j.dtype} {list(j.shape)}"
        )
    return j.flatten(1).to(torch.promote_types(j.dtype, torch.float32))


def _check_class_rows(loss: str, logits_name: str, logits: Tensor, j_name: str, j: Tensor) -> None:
    """Raise unless ``logits`` are ``[B, K]``, finite where that costs no wait, and j ``[B, K, ...]``."""
    _check_tensor(loss, logits_name, logits)
    _check_tensor(loss, j_name, j)
    if logits.dim() != 2 or not logits.is_floating_point():
        raise FastjacError(
            f"{loss}: {logits_name} must be floating-point logits [B, K]; "
            f"got {logits.dtype} {list(logits.shape)}"
        )
    if j.dim() < 3 or j.shape[:2] != logits.shape or not j.is_floating_point():
        raise FastjacError(
            f"{loss}: {j_name} must have a row for each of {logits_name}'s logits, floating-point "
            f"[{logits.shape[0]}, {logits.shape[1]}, ...]; got {j.dtype} {list(j.shape)}"
        )
    if logits.device.type == "cpu" and not (finite := logits.isfinite().all(1)).all():
        sample = int(finite.logical_not().nonzero()[0])
        raise FastjacError(
            f"{loss}: {logits_name} must be finite logits; those of sample {sample} are not, and their "
            "softmax is no distribution"
        )


def _class_rows(j: Tensor) -> Tensor:
    """Jacobians ``[B, K, ...]`` as ``[B, K, n]``, in float32 or wider."""
    return j.flatten(2).to(torch.promote_types(j.dtype, torch.float32))


def _unit(rows: Tensor) -> Tensor:
    """Rows divided by their norms; a row of zeros stays, with a derivative of zero."""
    norm: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / norm.masked_fill(norm == 0, math.inf)
