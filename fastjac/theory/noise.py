"""Propositions 1 and 2 and eq. 2: what noise at the input adds to a distillation loss, by sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjac.errors import FastjacError, check_int, unknown
from fastjac.features import forward_with_features
from fastjac.jacobian import check_input, input_jacobian, ordinary_tensors
from fastjac.losses import (
    CROSS_ENTROPY_TERMS,
    cross_entropy_jacobian_loss,
    jacobian_match_loss,
)
from fastjac.targets import LabelLogit, Logits, Target, check_targets

LOSSES = ("squared_error", "cross_entropy")


@dataclass(frozen=True)
class NoiseExpansion:
    """Both sides of an expansion in the noise's scale, averaged over the batch.

    Attributes:
        sigmas: the scales, ``[S]``, float64, as are the next four.
        noisy: the expectation under noise, by sampling (the left side).
        expansion: the terms up to sigma^2 (the right side).
        residual: ``noisy - expansion``.
        standard_error: of the residual, over the pairs of samples.
        slope: of ``log |residual|`` over ``log sigma``, by least squares where the residual is above
            twice its standard error and above rounding; NaN where that leaves fewer than two scales.
    """

    sigmas: Tensor
    noisy: Tensor
    expansion: Tensor
    residual: Tensor
    standard_error: Tensor
    slope: float


@dataclass(frozen=True)
class NormalizedNoise:
    """What :func:`normalized_noise_expansion` gives.

    Attributes:
        loss: the distillation loss under the noise, and eq. 2 as its sigma^2 term.
        student, teacher: each network's expected squared response, and sigma^2.
    """

    loss: NoiseExpansion
    student: NoiseExpansion
    teacher: NoiseExpansion


def noise_expansion(
    student: nn.Module,
    teacher: nn.Module,
    x: Tensor,
    sigmas: Sequence[float],
    loss: Literal["squared_error", "cross_entropy"] = "squared_error",
    *,
    terms: str = "all",
    curvature: bool = False,
    pairs: int = 1000,
    generator: torch.Generator | None = None,
    rows: int = 4096,
) -> NoiseExpansion:
    """Propositions 1 and 2: what noise at the input adds to a distillation loss.

    ``E[l(S(x + sigma z), T(x + sigma z))] = l(S(x), T(x)) + sigma^2 C + O(sigma^4)``, z standard normal.
    For the squared error, ``l = sum_k (T_k - S_k)^2``, C is ``sum_k ||grad T_k - grad S_k||^2``
    (:func:`~fastjac.jacobian_match_loss`, raw). For the cross-entropy of softmax(S) with the targets
    softmax(T) it is :func:`~fastjac.cross_entropy_jacobian_loss` with ``terms``.

    That is all of order sigma^2 if the networks are linear around x. In general half of the Laplacian of
    ``l`` is C plus ``1/2 sum_k (dl/dS_k Laplacian S_k + dl/dT_k Laplacian T_k)``: for the squared error,
    with D = T - S, ``1/2 Laplacian D^2 = ||grad D||^2 + D Laplacian D``, which is 0 for D = 0.
    ``curvature`` includes it, sampled with the same z and by a double backward; the residual of smooth
    networks is then of order 4, and without it of order 2.

    A piecewise linear network is linear around almost every x. There the residual is 0 until the noise
    crosses a kink, of probability ``exp(-r^2 / (2 sigma^2))`` for a kink at the distance r: smaller than
    any power of sigma as sigma falls. It is not uniform in x: at a kink the residual is of order 1, and
    the average over many x, of which a share of order sigma lies within sigma of a kink, of order 2.

    z is the same for every sigma and taken with both signs, so that odd orders cancel; the quadratic
    form of which C is the mean is a control variate. So the residual's slope needs few samples.

    Args:
        student, teacher: networks in eval mode that give logits ``[B, K]``.
        x: ``[B, ...]``; in float64 small residuals are not lost in rounding.
        sigmas: the scales, above 0.
        loss: ``"squared_error"`` or ``"cross_entropy"``.
        terms: for the cross-entropy, ``"all"``, ``"logarithm"`` or ``"paper"``.
        pairs: samples of z, at least 2.
        generator: of x's device; None: PyTorch's global one.
        rows: largest batch that the networks see.

    Deterministic for one state of the generator where the networks are. Raises
    :class:`fastjac.FastjacError` for bad input.

    >>> import torch
    >>> student, teacher = torch.nn.Linear(4, 3).double(), torch.nn.Linear(4, 3).double()
    >>> x = torch.rand(2, 4).double()
    >>> found = noise_expansion(student.eval(), teacher.eval(), x, [0.1, 0.2])  # both are linear
    >>> bool((found.residual.abs() < 1e-12).all())
    True
    """
    if loss not in LOSSES:
        raise unknown("loss", loss, LOSSES)
    if terms not in CROSS_ENTROPY_TERMS:
        raise unknown("terms", terms, CROSS_ENTROPY_TERMS)
    scales, pairs = _check_noise(student, teacher, x, sigmas, pairs)
    value = _squared_error if loss == "squared_error" else _cross_entropy
    with torch.no_grad():
        s, t = _logits(student, x, "student"), _logits(teacher, x, "teacher")
    if s.shape != t.shape:
        raise FastjacError(
            f"noise_expansion: expected as many logits of both, got student {list(s.shape)} and "
            f"teacher {list(t.shape)}"
        )
    js, jt = (input_jacobian(model, x, Logits()) for model in (student, teacher))
    if loss == "squared_error":
        second = complete = jacobian_match_loss(js, jt, normalize=False)
    else:
        second = cross_entropy_jacobian_loss(s, t, js, jt, terms)
        complete = cross_entropy_jacobian_loss(s, t, js, jt)
    joint = torch.cat([s, t], 1)
    half = s.shape[1]

    def of_joint(u: Tensor) -> Tensor:
        return value(u[None, :half], u[None, half:])[0]

    slopes = torch.func.vmap(torch.func.grad(of_joint))(joint)  # [B, 2K]
    hessian = torch.func.vmap(torch.func.hessian(of_joint))(joint)  # [B, 2K, 2K]
    jacobian, at_x = torch.cat([js, jt], 1).flatten(2), value(s, t)

    parts: list[Tensor] = []  # of [n, 1 + S]: the curvature's term, and the residual at each scale
    most = max(1, check_int("rows", rows, 1) // len(x))
    for n in [most] * (pairs // most) + [pairs % most] * (pairs % most > 0):
        z = torch.randn(n, *x.shape, dtype=x.dtype, device=x.device, generator=generator)
        tangent = torch.einsum("bkd,nbd->nbk", jacobian, z.flatten(2))
        control = torch.einsum("nbk,bkl,nbl->nb", tangent, hessian, tangent) / 2
        bend = _second_derivative(student, teacher, slopes, x, z) / 2 if curvature else 0 * control
        columns = [bend.mean(1)]
        for sigma in scales:
            noisy = 0
            with torch.no_grad():
                for sign in (sigma, -sigma):
                    at = (x + sign * z).flatten(0, 1)
                    noisy = noisy + value(student(at), teacher(at)).unflatten(0, z.shape[:2])
            columns.append((noisy / 2 - at_x - sigma**2 * (control + bend)).mean(1))
        parts.append(torch.stack(columns, 1))
    samples = torch.cat(parts).double()
    curved = second + samples[:, 0].mean()
    return _summarise(scales, at_x.mean(), curved, samples[:, 1:], complete - second, x.dtype)


def normalized_noise_expansion(
    student: nn.Module,
    teacher: nn.Module,
    x: Tensor,
    sigmas: Sequence[float],
    target: Target = LabelLogit(),
    y: Any = None,
    *,
    pairs: int = 1000,
    generator: torch.Generator | None = None,
) -> NormalizedNoise:
    """The justification of the normalised loss (eq. 2 of the paper's supplement).

    For a scalar phi of each network and noise ``xi_f = sigma z / ||grad phi_f(x)||``, one z for both:

    - each response has the size sigma, however steep the network:
      ``E[(phi_f(x + xi_f) - phi_f(x))^2] = sigma^2 + O(sigma^4)``;
    - ``E[(phi_T(x + xi_T) - phi_S(x + xi_S))^2] = (phi_T - phi_S)^2
      + sigma^2 || grad phi_T/||grad phi_T|| - grad phi_S/||grad phi_S|| ||^2 + O(sigma^4)``, whose
      sigma^2 term is :func:`~fastjac.jacobian_match_loss`.

    The second holds as it stands where the networks are linear around x, as in :func:`noise_expansion`;
    a smooth network's Laplacian adds ``sigma^2 D (Laplacian phi_T/||grad phi_T||^2 - Laplacian
    phi_S/||grad phi_S||^2)``, D = phi_T - phi_S. The first holds for smooth ones, too.

    ``target``, ``y``: phi, as :func:`~fastjac.with_jacobian` takes them; a window stands where
    :class:`~fastjac.JacobianMatching` puts it at x, and does not move with the noise. With K scalars of
    a sample, squares are summed over them. Everything else as in :func:`noise_expansion`, control
    variates included. Raises :class:`fastjac.FastjacError` for bad input, and where a Jacobian is 0.

    >>> import torch
    >>> student, teacher = torch.nn.Linear(4, 3).double(), torch.nn.Linear(4, 3).double()
    >>> x, y = torch.rand(2, 4).double(), torch.tensor([0, 2])
    >>> found = normalized_noise_expansion(student.eval(), teacher.eval(), x, [0.1, 0.2], y=y)
    >>> found.student.noisy
    tensor([0.0100, 0.0400], dtype=torch.float64)
    """
    scales, pairs = _check_noise(student, teacher, x, sigmas, pairs)
    if len(check_targets(target)) != 1 or isinstance(target, tuple):
        raise FastjacError("normalized_noise_expansion: expected one target, got a tuple")
    drawn = target.drawn()
    of_teacher = drawn.for_teacher()
    with torch.no_grad():
        features = forward_with_features(teacher, x, of_teacher.layer)[1]
        of_teacher = of_teacher.placed(features)
        of_student = drawn.paired(of_teacher, features, y)
        features = forward_with_features(student, x, of_student.layer)[1]
        of_student = of_student.placed(features)
    networks = [(student, of_student, "student"), (teacher, of_teacher, "teacher")]

    @torch.no_grad()
    def phi(model: nn.Module, target: Target, at: Tensor) -> Tensor:
        output, features = forward_with_features(model, at, target.layer)
        return target.check_scalar(target.scalar(output, features, y), len(at)).reshape(len(at), -1)

    jacobians, units, norms, at_x = [], [], [], []
    for model, its, name in networks:
        j = input_jacobian(model, x, its, y)
        at_x.append(phi(model, its, x))
        j = j.reshape(len(x), at_x[-1].shape[1], -1)
        norm = torch.linalg.vector_norm(j, dim=(1, 2))
        if not (norm > 0).all():
            sample = int((norm > 0).logical_not().nonzero()[0])
            raise FastjacError(
                f"normalized_noise_expansion: the {name}'s Jacobian of sample {sample} has the norm "
                f"{norm[sample].item()}; expected above 0, since the noise is sigma / norm"
            )
        jacobians.append(j)
        norms.append(norm.view(-1, *[1] * (x.dim() - 1)))
        units.append(j / norm[:, None, None])
    apart = at_x[1] - at_x[0]

    samples: list[Tensor] = []
    for _ in range(pairs):
        z = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        linear = [torch.einsum("bkd,bd->bk", unit, z.flatten(1)) for unit in units]
        row = []
        for sigma in scales:
            loss, responses = 0, [0, 0]
            for sign in (sigma, -sigma):
                moved = [
                    phi(m, its, x + sign * z / n)
                    for (m, its, _), n in zip(networks, norms, strict=True)
                ]
                loss = loss + (moved[1] - moved[0]).square() / 2
                responses = [
                    r + (m - a).square() / 2 for r, m, a in zip(responses, moved, at_x, strict=True)
                ]
            forms = [linear[1] - linear[0], *linear]
            values = [loss - apart.square(), *responses]
            row.append(
                [
                    (v - (sigma * f).square()).sum(1).mean()
                    for v, f in zip(values, forms, strict=True)
                ]
            )
        samples.append(torch.stack([torch.stack(r) for r in row]))
    left = torch.stack(samples).double()  # [pairs, S, 3]
    second = jacobian_match_loss(*jacobians, normalize=True)
    zero, one = left.new_zeros(()), left.new_ones(())
    firsts = [apart.square().sum(1).mean(), zero, zero]
    seconds = [second, one, one]
    return NormalizedNoise(
        *(
            _summarise(scales, first, coefficient, left[:, :, k], zero, x.dtype)
            for k, (first, coefficient) in enumerate(zip(firsts, seconds, strict=True))
        )
    )


def _check_noise(
    student: nn.Module, teacher: nn.Module, x: Tensor, sigmas: Sequence[float], pairs: int
) -> tuple[list[float], int]:
    """The noise's scales, and the number of pairs."""
    for name, model in (("student", student), ("teacher", teacher)):
        check_input(x, model, name)
        if any(m.training for m in model.modules()):
            raise FastjacError(f"the {name} is in train mode; expected {name}.eval()")
    if not len(x):
        raise FastjacError("x: expected at least one sample, got none")
    if not x.isfinite().all():
        raise FastjacError("x: expected finite numbers, got a NaN or an infinity")
    try:
        scales = [float(s) for s in sigmas]
    except (TypeError, ValueError):
        raise FastjacError(f"sigmas: expected a sequence of numbers, got {sigmas!r}") from None
    if not scales or not all(s > 0 and 0 < s * s < math.inf for s in scales):
        raise FastjacError(f"sigmas: expected numbers above 0, at least one; got {scales}")
    return scales, check_int("pairs", pairs, 2)


def _logits(model: nn.Module, x: Tensor, name: str) -> Tensor:
    logits = model(x)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        came = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise FastjacError(f"the {name} must return logits [B, K]; got {came}")
    if not logits.isfinite().all():
        raise FastjacError(f"the {name}'s logits must be finite; got a NaN or an infinity")
    return logits


def _squared_error(s: Tensor, t: Tensor) -> Tensor:
    return (t - s).square().sum(1)


def _cross_entropy(s: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(s, t.softmax(1), reduction="none")


def _second_derivative(
    student: nn.Module, teacher: nn.Module, slopes: Tensor, x: Tensor, z: Tensor
) -> Tensor:
    """Along each z, of the logits weighted with ``slopes``: ``[n, B]`` for z ``[n, B, ...]``."""
    with ordinary_tensors((x, slopes, z), student, teacher) as (x, slopes, z), torch.enable_grad():
        leaf = x.expand_as(z).flatten(0, 1).clone().requires_grad_()
        logits = torch.cat([student(leaf), teacher(leaf)], 1)
        weighted = (logits * slopes.repeat(len(z), 1)).sum()
        (first,) = torch.autograd.grad(weighted, leaf, create_graph=True)
        if not first.requires_grad:  # linear networks
            return torch.zeros(z.shape[:2], dtype=x.dtype, device=x.device)
        (second,) = torch.autograd.grad((first * z.flatten(0, 1)).sum(), leaf, allow_unused=True)
    if second is None:
        return torch.zeros(z.shape[:2], dtype=x.dtype, device=x.device)
    return (second.view_as(z) * z).flatten(2).sum(2)


def _summarise(
    scales: list[float],
    first: Tensor,
    second: Tensor,
    samples: Tensor,
    dropped: Tensor,
    dtype: torch.dtype,
) -> NoiseExpansion:
    """From each pair's residual, ``[pairs, S]``, of the expansion with its ``dropped`` terms added."""
    sigmas = torch.tensor(scales, dtype=torch.float64, device=samples.device)
    expansion = first.double() + sigmas.square() * second.double()
    residual = samples.mean(0) + sigmas.square() * dropped.double()
    error = samples.std(0) / math.sqrt(len(samples))
    rounding = 100 * torch.finfo(dtype).eps * expansion.abs().clamp_min(torch.finfo(dtype).tiny)
    seen = residual.abs() > torch.maximum(2 * error, rounding)
    slope = math.nan
    if seen.sum() > 1 and len(set(scales)) > 1:
        u, v = sigmas[seen].log(), residual[seen].abs().log()
        u = u - u.mean()
        slope = ((u * v).sum() / u.square().sum()).item()
    return NoiseExpansion(sigmas, expansion + residual, expansion, residual, error, slope)
