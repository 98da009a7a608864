"""Jacobian matching as a training loop calls it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastjac import engine, reference
from fastjac.chains import PIECEWISE_LINEAR
from fastjac.errors import FastjacError, unknown
from fastjac.features import find_layer
from fastjac.fusion import FusedModel
from fastjac.graph import Network
from fastjac.losses import jacobian_match_loss
from fastjac.ops import jacobian_match
from fastjac.ops._library import CPU
from fastjac.targets import AttentionWindow, LabelLogit, Target

STRATEGIES = ("auto", "local", "dense", "autograd")
BATCH_STATS = ("frozen", "batch")
# Chains pay where they are native; elsewhere PyTorch's own operations are faster.
CHAINS = PIECEWISE_LINEAR if CPU.loaded else frozenset()

Place = Callable[[Tensor], Tensor]


@dataclass
class MatchingOutput:
    """What one step of :class:`JacobianMatching` gives.

    ``student_logits``, ``student_features`` and ``jacobian_loss`` (a scalar) carry gradients to the
    student; ``teacher_logits`` and ``teacher_features`` are detached. The features are those of the
    target's layer, None for :class:`LabelLogit`.
    """

    student_logits: Tensor
    teacher_logits: Tensor
    student_features: Tensor | None
    teacher_features: Tensor | None
    jacobian_loss: Tensor


def _check_choice(kind: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise unknown(kind, value, known)
    return value


def _check_target(target: Target) -> Target:
    if not isinstance(target, LabelLogit | AttentionWindow):
        raise FastjacError(
            f"target: expected LabelLogit or AttentionWindow, got {type(target).__name__}"
        )
    return target


def _check_model(model: nn.Module, name: str) -> None:
    if isinstance(model, FusedModel):
        raise FastjacError(
            f"the {name} is fused; expected the model itself, model.unfuse(): its chains are fused "
            "here where that pays"
        )


def _check_input(x: Tensor, model: nn.Module, name: str) -> None:
    if x.dim() < 2 or not x.is_floating_point():
        raise FastjacError(
            f"x: expected a floating-point batch [B, ...], got {x.dtype} {list(x.shape)}"
        )
    if x.requires_grad:
        raise FastjacError(
            "x requires grad; Jacobian matching differentiates in the student's parameters alone: "
            "pass x.detach()"
        )
    parameter = next(model.parameters(), None)
    if parameter is None:
        return
    if parameter.device != x.device:
        raise FastjacError(f"x is on {x.device}; the {name} is on {parameter.device}")
    if parameter.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise FastjacError(f"x is {x.dtype}; the {name} is {parameter.dtype}")


def _outside_inference_mode(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``function`` without a graph but on ordinary tensors, which its passes can differentiate."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            kwargs = {name: _ordinary(value) for name, value in kwargs.items()}
            return function(*map(_ordinary, args), **kwargs)

    return run


def _ordinary(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


class JacobianMatching(nn.Module):
    """One forward of student and teacher, and the distance of their input Jacobians.

    J = d phi/dx for the ``target``'s scalar phi, of both networks; the loss, averaged over the batch,
    is ``||J_s/||J_s|| - J_t/||J_t||||^2`` (``normalize=True``, eq. 2 of the supplement of Srinivas &
    Fleuret, ICML 2018) or ``||J_s - J_t||^2`` (``normalize=False``, Proposition 1).

    Args:
        student: the network to train. Its mode (train or eval), parameters and state dict are its own.
        teacher: put in eval mode, and kept there; its parameters get no gradient.
        target: ``LabelLogit()`` or ``AttentionWindow(layer, ...)``.
        normalize: None takes the target's default (window: True, logit: False).
        batch_stats: how a train-mode BatchNorm counts in the student's Jacobian. ``"frozen"``: its
            statistics come from the batch, are constants in d/dx, and functions of the parameters in
            d/dtheta. ``"batch"``: as autograd has it, cross-sample terms included.
        strategy: ``"autograd"`` is the double backward, the reference. ``"dense"`` and ``"local"`` give
            the same gradient without one, on full maps or on the crops that the window sees;
            ``"auto"``: local where the statistics allow it and the support is under half of the
            input, else dense.

    Called with ``x`` ``[B, ...]``, raw pixels that both networks see, and labels ``y`` ``[B]`` (int64;
    needed by LabelLogit alone), gives a :class:`MatchingOutput`. It differentiates once: a backward
    with ``create_graph=True`` through ``jacobian_loss`` raises. Under ``torch.no_grad()`` or
    ``torch.inference_mode()`` it evaluates.
    Deterministic where the networks' own operations are. Operations are rounded as those of
    :func:`fastjac.fuse` are; they are fastest on a CPU in channels-last layout.

    Hooks on the student: those of the matcher, of parameters and of tensors fire as ever. Forward hooks
    and pre-hooks of the modules that a trace keeps whole (torch.nn's layers, and what it cannot trace)
    fire once a step; those on modules inside such a one, each time that it is run again for its
    derivatives. Raises: a hook that replaces what it sees, a backward hook, and any hook on a module
    that is traced through (a container, the student itself).

    Raises :class:`fastjac.errors.FastjacError` for bad input, and for a network that the engine cannot
    trace, naming the place.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        target: Target = LabelLogit(),
        normalize: bool | None = None,
        batch_stats: str = "frozen",
        strategy: str = "auto",
    ) -> None:
        super().__init__()
        _check_model(student, "student")
        _check_model(teacher, "teacher")
        self.target = _check_target(target)
        self.normalize = target.normalize if normalize is None else normalize
        self.batch_stats = _check_choice("batch_stats", batch_stats, BATCH_STATS)
        self.strategy = _check_choice("strategy", strategy, STRATEGIES)
        if target.layer is not None:
            find_layer(student, target.layer, "the student")
            find_layer(teacher, target.for_teacher().layer, "the teacher")
        self.student = student
        self.teacher = teacher.eval().requires_grad_(False)
        self._student, self._teacher = Network(student, CHAINS), Network(teacher, CHAINS)

    def train(self, mode: bool = True) -> JacobianMatching:
        """Set the student's mode; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    @_outside_inference_mode
    def forward(self, x: Tensor, y: Tensor | None = None) -> MatchingOutput:
        _check_input(x, self.student, "student")
        _check_input(x, self.teacher, "teacher")
        target, teacher_target = self.target, self.target.for_teacher()
        if self.strategy == "autograd":
            return self._by_autograd(x, y, target, teacher_target)
        with torch.no_grad():
            tape = engine.forward(self._teacher, x, teacher_target.layer, self.batch_stats)
            logits_t, features_t = tape.logits, tape.features
            position = None if features_t is None else teacher_target.position(features_t)
            jt = engine.pullback(
                tape, teacher_target, y, position, "dense" if self.strategy == "dense" else "auto"
            )
        tape = engine.forward(self._student, x, target.layer, self.batch_stats)
        with torch.no_grad():
            if tape.features is not None:
                position = self._place(target, position, features_t)(tape.features)
            js = engine.pullback(tape, target, y, position, self.strategy)
            student, teacher, back = engine.in_common(js, jt)
            losses, v = jacobian_match(student, teacher, self.normalize)
            loss = losses.mean()
        if torch.is_grad_enabled():
            loss = engine.pushforward(tape, js, back(v / len(x)), loss)
        return MatchingOutput(tape.logits, logits_t, tape.features, features_t, loss)

    def _by_autograd(
        self, x: Tensor, y: Tensor | None, target: Target, teacher_target: Target
    ) -> MatchingOutput:
        with torch.no_grad():
            logits_t, features_t, jt = reference.forward_and_jacobian(
                self.teacher, x, teacher_target, y, None, self.batch_stats
            )
            position = None if features_t is None else teacher_target.position(features_t)
        logits_s, features_s, js = reference.forward_and_jacobian(
            self.student,
            x,
            target,
            y,
            self._place(target, position, features_t),
            self.batch_stats,
            torch.is_grad_enabled(),
        )
        loss = jacobian_match_loss(js, jt, self.normalize)
        return MatchingOutput(logits_s, logits_t, features_s, features_t, loss)

    @staticmethod
    def _place(target: Target, position: Tensor | None, features_t: Tensor | None) -> Place | None:
        """From the student's features to where its window stands."""
        if isinstance(target, LabelLogit):
            return None
        if target.anchor == "own":
            return target.position
        return lambda features: target.transfer(position, features_t, features)


@_outside_inference_mode
def input_jacobian(
    model: nn.Module,
    x: Tensor,
    target: Target,
    y: Tensor | None = None,
    position: Tensor | None = None,
    batch_stats: str = "frozen",
    strategy: str = "auto",
) -> Tensor:
    """J = d(sum of phi)/dx of ``model`` at ``x``, of ``x``'s shape and dtype, detached.

    ``model`` runs in the mode it is in (a train-mode BatchNorm updates its running statistics).
    ``y``: labels ``[B]``, for LabelLogit. ``position``: the window's first row and column ``[B, 2]``
    (int64), for AttentionWindow; None: the argmax of the model's own pooled attention map.
    ``batch_stats``, ``strategy``, errors and determinism: as in :class:`JacobianMatching`.
    """
    _check_model(model, "model")
    _check_target(target)
    _check_choice("batch_stats", batch_stats, BATCH_STATS)
    _check_choice("strategy", strategy, STRATEGIES)
    _check_input(x, model, "model")
    place = None if position is None else _fixed_position(target, x, position)
    if strategy == "autograd":
        return reference.input_jacobian(model, x, target, y, place, batch_stats)
    with torch.no_grad():
        tape = engine.forward(Network(model, CHAINS), x, target.layer, batch_stats)
        if isinstance(target, AttentionWindow):
            position = (place or target.position)(tape.features)
        return engine.pullback(tape, target, y, position, strategy).full()


def _fixed_position(target: Target, x: Tensor, position: Tensor) -> Place:
    if isinstance(target, LabelLogit):
        raise FastjacError("position is for AttentionWindow; the target is LabelLogit")
    if position.dtype != torch.int64 or position.shape != (len(x), 2):
        raise FastjacError(
            f"position: expected int64 [{len(x)}, 2], got {position.dtype} {list(position.shape)}"
        )

    def place(features: Tensor) -> Tensor:
        k = target.side(features)
        last = [features.shape[2] - k, features.shape[3] - k]
        low, high = position.amin(0).tolist(), position.amax(0).tolist()
        if min(low) < 0 or high[0] > last[0] or high[1] > last[1]:
            raise FastjacError(f"position: expected 0 to {last}, got {low} to {high}")
        return position

    return place
