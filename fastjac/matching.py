"""Jacobian matching as a training loop calls it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastjac import engine, reference
from fastjac.engine.crops import widen
from fastjac.errors import FastjacError
from fastjac.features import find_layer
from fastjac.jacobian import (
    Forward,
    Output,
    check_input,
    check_options,
    eager,
    ordinary_tensors,
    selector,
)
from fastjac.losses import jacobian_match_loss
from fastjac.targets import LabelLogit, Target, check_targets


@dataclass
class MatchingOutput:
    """What one step of :class:`JacobianMatching` gives.

    ``student_logits``, ``student_features`` and ``jacobian_loss`` (a scalar) carry gradients to the
    student; ``teacher_logits`` and ``teacher_features`` are detached. The logits are what the target
    reads of the networks' outputs, ``student_output`` and ``teacher_output``: the same, where a network
    returns one tensor. The features are those of the target's layer, None for :class:`LabelLogit`.
    """

    student_logits: Tensor
    teacher_logits: Tensor
    student_features: Tensor | None
    teacher_features: Tensor | None
    jacobian_loss: Tensor
    student_output: Any = None
    teacher_output: Any = None


class JacobianMatching(nn.Module):
    """One forward of student and teacher, and the distance of their input Jacobians.

    J = d phi/dx for the ``target``'s scalar phi, of both networks; the loss, averaged over the batch,
    is ``||J_s/||J_s|| - J_t/||J_t||||^2`` (``normalize=True``, eq. 2 of the supplement of Srinivas &
    Fleuret, ICML 2018) or ``||J_s - J_t||^2`` (``normalize=False``, Proposition 1).

    Args:
        student: the network to train. Its mode (train or eval), parameters and state dict are its own.
        teacher: put in eval mode, and kept there; its parameters get no gradient. It may be anything
            that PyTorch differentiates once: scripted, exported, compiled, replicated. It must share
            neither modules nor parameters with the student.
        target: ``LabelLogit()``, ``AttentionWindow(layer, ...)`` or any other :class:`~fastjac.Target`.
        normalize: None takes the target's default (window: True, others: False).
        batch_stats: how a train-mode BatchNorm counts in the student's Jacobian. ``"frozen"``: its
            statistics come from the batch, are constants in d/dx, and functions of the parameters in
            d/dtheta. ``"batch"``: as autograd has it, cross-sample terms included.
        strategy: ``"autograd"`` is the double backward, the reference. ``"dense"`` and ``"local"`` give
            the same gradient without one, on full maps or on the crops that the window sees;
            ``"auto"``: local where the statistics allow it and the support is under half of the
            input, else dense.
        output, teacher_output: which tensor the target reads, where a network returns a structure: a
            key or attribute, an index, or a function. ``teacher_output`` defaults to ``output``.

    Called with ``x`` ``[B, ...]``, raw pixels that both networks see, and labels ``y`` ``[B]`` (int64;
    needed by LabelLogit alone), gives a :class:`MatchingOutput`. It differentiates once: a backward
    with ``create_graph=True`` through ``jacobian_loss`` raises. Under ``torch.no_grad()`` or
    ``torch.inference_mode()`` it evaluates.
    Deterministic where the networks' own operations are. Operations are rounded as those of
    :func:`fastjac.fuse` are; they are fastest on a CPU in channels-last layout.

    The networks' own Python runs, once a step: hooks fire, patched forwards, wrappers, adapters and
    random branches do what they do in PyTorch, and what ran is what is differentiated. Neither changes
    the caller's ``x``. In a loop under ``torch.compile`` the matcher runs as an eager region: it
    records Python, and its sweeps launch few, large operators, so that little is lost.

    Raises :class:`fastjac.FastjacError` for bad input, and where a value that the student's Jacobian
    passes through was computed outside of PyTorch's Python functions, naming the call.

    >>> import torch
    >>> student, teacher = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    >>> matcher = fastjac.JacobianMatching(student, teacher)
    >>> out = matcher(torch.rand(2, 4), torch.tensor([0, 2]))
    >>> out.jacobian_loss.backward()
    >>> student.weight.grad.shape
    torch.Size([3, 4])
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        target: Target = LabelLogit(),
        normalize: bool | None = None,
        batch_stats: str = "frozen",
        strategy: str = "auto",
        output: Output = None,
        teacher_output: Output = None,
    ) -> None:
        super().__init__()
        (self.target,) = check_targets((target,))
        check_options(batch_stats, strategy)
        self.normalize = target.normalize if normalize is None else normalize
        self.batch_stats, self.strategy = batch_stats, strategy
        self.output = output
        self.teacher_output = output if teacher_output is None else teacher_output
        if target.layer is not None:
            find_layer(student, target.layer, "the student")
            find_layer(teacher, target.for_teacher().layer, "the teacher")
        _check_apart(student, teacher)
        self.student = student
        self.teacher = teacher
        for parameter in teacher.parameters():  # a scripted module has no requires_grad_
            parameter.requires_grad_(False)
        self._teacher_by_autograd = False
        self._eval_teacher()

    def _eval_teacher(self) -> None:
        # An exported program has one mode, that of its export.
        with contextlib.suppress(NotImplementedError):
            self.teacher.eval()

    def train(self, mode: bool = True) -> JacobianMatching:
        """Set the student's mode; the teacher stays in eval mode."""
        self.training = mode
        self.student.train(mode)
        self._eval_teacher()
        return self

    @eager
    def forward(self, x: Tensor, y: Any = None) -> MatchingOutput:
        check_input(x, self.student, "student")
        check_input(x, self.teacher, "teacher")
        with ordinary_tensors((x, y), self.student, self.teacher) as (x, y):
            target = self.target.drawn()
            teacher = self._teacher_jacobian(x, y, target.for_teacher())
            paired = target.paired(teacher.target, teacher.features, y)
            if self.strategy == "autograd":
                output, features, js = reference.forward_and_jacobian(
                    *(self.student, x, paired, y),
                    select=(select := selector(self.output, self.student)),
                    batch_stats=self.batch_stats,
                    create_graph=torch.is_grad_enabled(),
                )
                logits, jt = select(output), teacher.whole()
            else:
                run = Forward(self.student, x, (paired,), self.output, (), None, self.batch_stats)
                placed = paired.placed(run.features[0])
                js, jt = _aligned(run, placed, y, self.strategy, teacher)
                output, (features,) = run.finish()
                logits = run.selected(output)
            loss = jacobian_match_loss(js, jt, self.normalize)
            if not torch.is_grad_enabled():
                loss = loss.detach()
        return MatchingOutput(
            *(logits, teacher.logits, features, teacher.features, loss, output, teacher.output)
        )

    def _teacher_jacobian(self, x: Tensor, y: Any, target: Target) -> _Teacher:
        """The teacher's, by the engine where its forward can be recorded, else by plain autograd."""
        strategy = "dense" if self.strategy == "dense" else "auto"
        with torch.no_grad():
            if self.strategy != "autograd" and not self._teacher_by_autograd:
                try:
                    run = Forward(
                        *(self.teacher, x, (target,), self.teacher_output, (), None),
                        self.batch_stats,
                    )
                    placed = target.placed(run.features[0])
                    rows, stacked = run.rows(placed, 0, y, strategy)
                    jacobian = engine.input_jacobian(rows, stacked, whole=False)
                    output, (features,) = run.finish()
                    return _Teacher(placed, run.selected(output), features, output, jacobian)
                except FastjacError:  # if the input is at fault, autograd finds the same
                    self._teacher_by_autograd = True
            select = selector(self.teacher_output, self.teacher)
            try:
                output, features, values = reference.forward_and_jacobian(
                    self.teacher, x, target, y, select=select, batch_stats=self.batch_stats
                )
            except FastjacError:
                self._teacher_by_autograd = False
                raise
        placed = target.placed(features)
        jacobian = engine.InputJacobian(values.detach(), None, True)
        return _Teacher(placed, select(output), features, output, jacobian)


@dataclass
class _Teacher:
    """What the teacher gave: its target, as placed on its features, and its Jacobian."""

    target: Target
    logits: Tensor
    features: Tensor | None
    output: Any
    jacobian: engine.InputJacobian

    def whole(self) -> Tensor:
        return self.jacobian.whole()


def _aligned(
    run: Forward, target: Target, y: Any, strategy: str, teacher: _Teacher
) -> tuple[Tensor, Tensor]:
    """Both Jacobians over the same pixels.

    Crops that move together are compared as crops, over their hull; others on the whole input.
    """
    rows, stacked = run.rows(target, 0, y, strategy)
    plan, other = rows[0].plan, teacher.jacobian.row
    if plan is not None and other is not None and other.plan is not None:
        together = plan.crops.position is other.plan.crops.position
        ours, theirs = rows[0].region, other.region
        if together and ours.scales == theirs.scales:
            hull = ours.hull(theirs)
            js = engine.input_jacobian(rows, stacked, whole=False).values
            return widen(js, ours, hull), widen(teacher.jacobian.values, theirs, hull)
    return engine.input_jacobian(rows, stacked).values, teacher.whole()


def _check_apart(student: nn.Module, teacher: nn.Module) -> None:
    """Raise if the networks share a parameter, a buffer or a module, which the teacher would freeze."""
    for kind, members in (
        ("module", nn.Module.named_modules),
        ("parameter", nn.Module.named_parameters),
        ("buffer", nn.Module.named_buffers),
    ):
        theirs = {id(member): name for name, member in members(teacher)}
        for name, member in members(student):
            if id(member) in theirs:
                mine, its = name or "the student itself", theirs[id(member)] or "the teacher itself"
                raise FastjacError(
                    f"student and teacher share a {kind}: {mine!r} is {its!r}; the teacher is frozen "
                    "and in eval mode, so expected copy.deepcopy of what they share"
                )
