"""The Jacobian-matching loss and its gradient in closed form, one value per sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastjac.errors import FastjacError
from fastjac.ops._library import call, define, refuse_forward_mode
from fastjac.ops._maps import check_strided

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_SMALLEST_EPS, _LARGEST_EPS = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def jacobian_match(
    js: Tensor, jt: Tensor, normalize: bool = True, eps: float = 1e-12
) -> tuple[Tensor, Tensor]:
    r"""Match the student's Jacobians with the teacher's, sample by sample.

    Norms are over all of a sample's dimensions: :math:`a = \max(\|J_s\|, ε)`,
    :math:`b = \max(\|J_t\|, ε)`, :math:`u = J_s/a`.

    .. math::
        \text{normalised:}\quad loss &= \|d\|^2,\ d = J_s/a - J_t/b, &
            v &= \tfrac{2}{a}\left(d - [\|J_s\| ≥ ε]\,⟨d, u⟩\,u\right) \\
        \text{raw:}\quad loss &= \|d\|^2,\ d = J_s - J_t, & v &= 2d

    (Srinivas & Fleuret, "Knowledge Transfer with Jacobian Matching", ICML 2018: eq. 2 of the
    supplement, and Proposition 1.) Equal Jacobians give exactly zero; all-zero Jacobians, a finite
    loss and v.

    Args:
        js: the student's Jacobians, ``[B, ...]``; float64, float32, bfloat16 or float16.
        jt: the teacher's, of the same shape, dtype and device.
        normalize: compare directions (the norms are divided out) rather than values.
        eps: lower bound of the norms; a norm below it counts as the constant ``eps``.

    Returns:
        ``loss`` ``[B]``, in float64 for float64 inputs and in float32 else; and
        ``v = ∂loss_i/∂js_i``, like ``js``. Sums are kept in the dtype of ``loss``; a norm that
        overflows it counts as infinite.

    Raises:
        FastjacError: an argument is of the wrong kind; or ``jt`` requires a gradient, which is not
            supported; or a second or a forward-mode derivative is asked for.

    ``loss`` can be differentiated once, in ``js``; ``v`` is not differentiable. The result is the
    same from run to run, and on a CPU for any number of threads. No copy is made where each sample
    is dense and ``jt`` has the strides of ``js`` (both contiguous, or both channels-last); else one
    is.
    """
    _check(js, jt, eps)
    if not isinstance(normalize, bool):
        raise FastjacError(f"jacobian_match: normalize must be True or False, got {normalize!r}")
    refuse_forward_mode("jacobian_match", js, jt)
    return call("jacobian_match", js, jt, normalize, eps)


def jacobian_match_ref(
    js: Tensor, jt: Tensor, normalize: bool = True, eps: float = 1e-12
) -> tuple[Tensor, Tensor]:
    """:func:`jacobian_match` in plain PyTorch: the equation, the tests' truth, the fallback."""
    acc = _accumulator(js.dtype)
    rows = (js.shape[0], math.prod(js.shape[1:]))
    s, t = js.to(acc).reshape(rows), jt.to(acc).reshape(rows)
    if normalize:
        norm = torch.linalg.vector_norm(s, dim=1, keepdim=True)
        a, b = norm.clamp(min=eps), torch.linalg.vector_norm(t, dim=1, keepdim=True).clamp(min=eps)
        u = s / a
        d = u - t / b
        v = (2 / a) * (d - (norm >= eps) * (d * u).sum(1, keepdim=True) * u)
    else:
        d = s - t
        v = 2 * d
    return d.square().sum(1), torch.empty_like(js).copy_(v.view(js.shape))


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(js: Tensor, jt: Tensor, eps: float) -> None:
    for name, x in (("js", js), ("jt", jt)):
        check_strided("jacobian_match", name, x)
    if js.dtype not in _DTYPES:
        expected = ", ".join(str(d) for d in _DTYPES)
        raise FastjacError(f"jacobian_match: js must be one of {expected}, got {js.dtype}")
    if js.dim() == 0:
        raise FastjacError("jacobian_match: js must be [B, ...], got a tensor with no dimensions")
    for what in ("dtype", "device", "shape"):
        expected, came = getattr(js, what), getattr(jt, what)
        if expected != came:
            shown = (list(expected), list(came)) if what == "shape" else (expected, came)
            raise FastjacError(
                f"jacobian_match: jt must have js's {what}, {shown[0]}, got {shown[1]}"
            )
    if not _SMALLEST_EPS <= eps <= _LARGEST_EPS:
        raise FastjacError(
            f"jacobian_match: eps must be positive, and a normal number in float32, got {eps}"
        )


define(
    "jacobian_match(Tensor js, Tensor jt, bool normalize, float eps) -> (Tensor loss, Tensor v)",
    jacobian_match_ref,
)


@torch.library.register_fake("fastjac::jacobian_match")
def _fake(js: Tensor, jt: Tensor, normalize: bool, eps: float) -> tuple[Tensor, Tensor]:
    return js.new_empty(js.shape[:1], dtype=_accumulator(js.dtype)), torch.empty_like(js)


class _Gradient(torch.autograd.Function):
    """``grad_loss_i · v_i``. It depends on js through v, in a way not known: raise, not zero."""

    @staticmethod
    def forward(ctx, grad_loss: Tensor, v: Tensor, js: Tensor) -> Tensor:
        return (grad_loss.reshape(-1, *[1] * (v.dim() - 1)) * v).to(js.dtype)

    @staticmethod
    def backward(ctx, _):
        raise FastjacError(
            "jacobian_match: its second derivative is not supported; loss can be differentiated "
            "once, in js (jacobian_match_ref can be differentiated further)"
        )


def _save(ctx, inputs, output) -> None:
    js, _, _, _ = inputs
    _, v = output
    if ctx.needs_input_grad[1]:
        raise FastjacError(
            "jacobian_match: jt requires a gradient, but the loss can be differentiated in js "
            "only; pass jt.detach()"
        )
    ctx.mark_non_differentiable(v)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(js, v)


def _backward(ctx, grad_loss: Tensor | None, _grad_v: None):
    if grad_loss is None:
        return None, None, None, None
    js, v = ctx.saved_tensors
    return _Gradient.apply(grad_loss, v, js), None, None, None


torch.library.register_autograd("fastjac::jacobian_match", _backward, setup_context=_save)
