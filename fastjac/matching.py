"""Jacobian matching as a training loop calls it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastjac import engine, reference
from fastjac.engine.crops import widen
from fastjac.engine.sweeps import INPUT
from fastjac.errors import FastjacError
from fastjac.features import find_layer
from fastjac.jacobian import (
    Forward,
    Output,
    check_input,
    check_module,
    check_options,
    eager,
    ordinary_tensors,
    selector,
)
from fastjac.losses import jacobian_match_loss
from fastjac.ops.window_crop import window_crop_adjoint
from fastjac.targets import AttentionWindow, LabelLogit, Target, check_targets


@dataclass
class MatchingOutput:
    """What one step of :class:`JacobianMatching` gives.

    ``student_logits``, ``student_features`` and ``jacobian_loss`` (a scalar) carry gradients to the
    student; ``teacher_logits`` and ``teacher_features`` are detached. The logits are what the target
    reads of the networks' outputs, ``student_output`` and ``teacher_output``: the same, where a network
    returns one tensor. The features are those of the target's layer, None for :class:`LabelLogit`; for
    a tuple of targets, a tuple. ``jacobian_losses`` has each target's loss; ``jacobian_loss``
    is their sum.
    """

    student_logits: Tensor
    teacher_logits: Tensor
    student_features: Any
    teacher_features: Any
    jacobian_loss: Tensor
    student_output: Any = None
    teacher_output: Any = None
    jacobian_losses: tuple[Tensor, ...] = ()


@dataclass
class TeacherResult:
    """What :meth:`JacobianMatching.teacher_forward` gives: the teacher's part of a step, detached.

    Attributes:
        logits: what the target reads of the output.
        output: what the teacher returned.
        features: for each target, its layer's features or None.
        targets: for each target, the teacher's, with its choices (a window's position) fixed.
        labels: y as the targets take it, of student and teacher.
        jacobians: for each target, J, on crops where the teacher's is local.
    """

    logits: Tensor
    output: Any
    features: tuple[Tensor | None, ...]
    targets: tuple[Target, ...]
    labels: Any
    jacobians: tuple[engine.InputJacobian | StoredJacobian, ...]

    def facts(self, reduce: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """All of it as tensors ``[B, ...]``, to be kept and given to ``restore_teacher``.

        ``reduce``: what is kept of a layer's features, ``[B, C, h, w]`` of the same h and w.
        """
        if not isinstance(self.labels, Tensor):
            raise FastjacError(
                f"facts: expected labels y in a tensor, got {type(self.labels).__name__}"
            )
        facts = [self.logits, self.labels]
        for target, features, jacobian in zip(
            self.targets, self.features, self.jacobians, strict=True
        ):
            if isinstance(target, AttentionWindow) and features is not None:
                position, start = target.start(features), jacobian.start()
                start = torch.zeros_like(position) if start is None else start
                facts += [reduce(features), position, start]
            elif features is not None:
                raise FastjacError(
                    f"facts: expected a target of the output, or AttentionWindow; got "
                    f"{type(target).__name__} of layer {target.layer!r}"
                )
            facts.append(jacobian.values)
        return facts


@dataclass
class StoredJacobian:
    """A Jacobian's crop and its first row and column, or (None) all of it; and x's shape."""

    values: Tensor
    first: Tensor | None
    shape: torch.Size
    row: None = None

    def start(self) -> Tensor | None:
        """The first row and column of the crop."""
        return self.first

    def whole(self) -> Tensor:
        """J, of the input's shape."""
        if self.first is None:
            return self.values
        height, width = self.shape[2:]
        return window_crop_adjoint(self.values, self.first, (height, width))


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
        target: ``LabelLogit()``, ``AttentionWindow(layer, ...)`` or any other :class:`~fastjac.Target`;
            or a tuple of them (feature levels, say), all taken from one forward, whose losses are added.
        normalize: None takes the target's default (window: True, others: False).
        batch_stats: how a train-mode BatchNorm counts in the student's Jacobian. ``"frozen"``: its
            statistics come from the batch, are constants in d/dx, and functions of the parameters in
            d/dtheta. ``"batch"``: as autograd has it, cross-sample terms included.
        strategy: ``"autograd"`` is the double backward, the reference. ``"dense"`` and ``"local"`` give
            the same gradient without one, on full maps or on the crops that the window sees;
            ``"auto"``: local where the statistics allow it and the support is under half of the
            input, else dense.
        output: which tensor the target reads, where a network returns a structure: a key or attribute,
            an index, or a function.
        teacher_output: the same of the teacher; None: ``output``.

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
        target: Target | tuple[Target, ...] = LabelLogit(),
        normalize: bool | None = None,
        batch_stats: str = "frozen",
        strategy: str = "auto",
        output: Output = None,
        teacher_output: Output = None,
    ) -> None:
        super().__init__()
        self.target, self.targets = target, check_targets(target)
        check_options(batch_stats, strategy)
        check_module(student, "student")
        check_module(teacher, "teacher")
        self.normalize = normalize
        self.batch_stats, self.strategy = batch_stats, strategy
        self.output = output
        self.teacher_output = output if teacher_output is None else teacher_output
        for each in self.targets:
            if each.layer is not None:
                find_layer(student, each.layer, "the student")
                _find_teacher_layer(teacher, each)
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
    def forward(
        self, x: Tensor, y: Any = None, teacher: TeacherResult | None = None
    ) -> MatchingOutput:
        _check_batch(x, self.student, "student")
        if self.teacher.training:  # the user's loop has put it in train mode
            self._eval_teacher()
        if teacher is None:
            _check_batch(x, self.teacher, "teacher")
        with ordinary_tensors((x, y), self.student, self.teacher) as (x, y):
            if teacher is None:
                targets = tuple(target.drawn() for target in self.targets)
                teacher = self._run_teacher(x, y, targets)
            else:
                targets = self.targets
            y = teacher.labels
            paired = tuple(
                target.paired(theirs, features, y)
                for target, theirs, features in zip(
                    targets, teacher.targets, teacher.features, strict=True
                )
            )
            if self.strategy == "autograd":
                output, features, js = reference.forward_and_jacobian(
                    *(self.student, x, paired, y),
                    select=(select := selector(self.output, self.student)),
                    batch_stats=self.batch_stats,
                    create_graph=torch.is_grad_enabled(),
                )
                logits = select(output)
                pairs = [(j, t.whole()) for j, t in zip(js, teacher.jacobians, strict=True)]
            else:
                run = Forward(self.student, x, paired, self.output, (), None, self.batch_stats)
                pairs = [
                    _aligned(
                        run,
                        target.placed(run.features[i]),
                        i,
                        y,
                        self.strategy,
                        teacher.jacobians[i],
                    )
                    for i, target in enumerate(paired)
                ]
                output, features = run.finish()
                logits = run.selected(output)
            losses = tuple(
                jacobian_match_loss(
                    js, jt, t.normalize if self.normalize is None else self.normalize
                )
                for t, (js, jt) in zip(targets, pairs, strict=True)
            )
            if not torch.is_grad_enabled():
                losses = tuple(loss.detach() for loss in losses)
        each = isinstance(self.target, tuple)
        return MatchingOutput(
            student_logits=logits,
            teacher_logits=teacher.logits,
            student_features=tuple(features) if each else features[0],
            teacher_features=teacher.features if each else teacher.features[0],
            jacobian_loss=sum(losses[1:], losses[0]),
            student_output=output,
            teacher_output=teacher.output,
            jacobian_losses=losses,
        )

    @eager
    def teacher_forward(self, x: Tensor, y: Any = None) -> TeacherResult:
        """The teacher's part of a step, to be kept and given to a later call with the same x and y.

        ``matcher(x, y, teacher=matcher.teacher_forward(x, y))`` is ``matcher(x, y)``. Raises for a
        target with random numbers, which a later call must draw anew.

        >>> import torch
        >>> matcher = fastjac.JacobianMatching(torch.nn.Linear(4, 3), torch.nn.Linear(4, 3))
        >>> x, y = torch.rand(2, 4), torch.tensor([0, 2])
        >>> known = matcher.teacher_forward(x, y)
        >>> torch.equal(matcher(x, y, known).jacobian_loss, matcher(x, y).jacobian_loss)
        True
        """
        _check_batch(x, self.teacher, "teacher")
        for target in self.targets:
            if target.drawn() is not target:
                raise FastjacError(
                    f"teacher_forward: {type(target).__name__} draws random numbers at each step; "
                    "expected a target without any, or one that is drawn()"
                )
        with ordinary_tensors((x, y), self.teacher) as (x, y):
            return self._run_teacher(x, y, self.targets)

    def restore_teacher(self, x: Tensor, facts: Sequence[Tensor]) -> TeacherResult:
        """The teacher's part of a step from :meth:`TeacherResult.facts`.

        The features are what was kept of them, and the output is the logits.
        """
        rest = iter(facts)
        logits, labels = next(rest), next(rest)
        targets, features, jacobians = [], [], []
        for target in (each.for_teacher() for each in self.targets):
            kept = first = None
            if isinstance(target, AttentionWindow):
                kept, start, first = next(rest), next(rest), next(rest)
                target = target.at(start)
            features.append(kept)
            targets.append(target)
            jacobians.append(StoredJacobian(next(rest), first, x.shape))
        return TeacherResult(
            *(logits, logits, tuple(features), tuple(targets), labels, tuple(jacobians))
        )

    def _run_teacher(self, x: Tensor, y: Any, targets: tuple[Target, ...]) -> TeacherResult:
        """By the engine where the teacher's forward can be recorded, else by plain autograd."""
        targets = tuple(target.for_teacher() for target in targets)
        strategy = "dense" if self.strategy == "dense" else "auto"
        with torch.no_grad(), _errors_of_frozen_teacher():
            if self.strategy != "autograd" and not self._teacher_by_autograd:
                try:
                    run = Forward(
                        *(self.teacher, x, targets, self.teacher_output, (), None),
                        self.batch_stats,
                    )
                    placed = _placed(targets, run.features)
                    labels = y
                    if any(target.fills_labels for target in targets):
                        labels = _labels(targets, y, run.read)
                    jacobians = tuple(
                        run.jacobian(target, i, labels, strategy, whole=False)
                        for i, target in enumerate(placed)
                    )
                    output, features = run.finish()
                    logits = run.selected(output)
                    return TeacherResult(logits, output, tuple(features), placed, labels, jacobians)
                except FastjacError:  # if the input is at fault, autograd finds the same
                    self._teacher_by_autograd = True
            select = selector(self.teacher_output, self.teacher)
            try:
                labels = y
                if any(target.fills_labels for target in targets):
                    labels = _labels(targets, y, select(self.teacher(x.clone())))
                output, features, values = reference.forward_and_jacobian(
                    self.teacher, x, targets, labels, select=select, batch_stats=self.batch_stats
                )
            except FastjacError:
                self._teacher_by_autograd = False
                raise
        placed = _placed(targets, features)
        jacobians = tuple(engine.InputJacobian(v.detach(), None, True) for v in values)
        return TeacherResult(select(output), output, tuple(features), placed, labels, jacobians)


def _aligned(
    run: Forward,
    target: Target,
    place: int,
    y: Any,
    strategy: str,
    teacher: engine.InputJacobian | StoredJacobian,
) -> tuple[Tensor, Tensor]:
    """Both Jacobians of the ``place``-th target over the same pixels.

    Crops that move together are compared as crops, over their hull; others on the whole input.
    """
    rows, stacked = run.rows(target, place, y, strategy)
    plan, other = rows[0].plan, teacher.row
    if plan is not None and other is not None and other.plan is not None:
        together = plan.crops.position is other.plan.crops.position
        ours, theirs = plan.regions[INPUT], other.plan.regions[INPUT]
        if together and ours.scales == theirs.scales:
            hull = ours.hull(theirs)
            js = engine.input_jacobian(rows, stacked, whole=False).values
            return widen(js, ours, hull), widen(teacher.values, theirs, hull)
    return engine.input_jacobian(rows, stacked).values, teacher.whole()


@contextlib.contextmanager
def _errors_of_frozen_teacher() -> Iterator[None]:
    """Say what PyTorch means where a teacher takes gradients in its own parameters, as MAML does."""
    try:
        yield
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise FastjacError(
            "the teacher takes a gradient in its own parameters, which JacobianMatching freezes; "
            "expected input_jacobian of the teacher, and jacobian_match_loss"
        ) from error


def _placed(targets: tuple[Target, ...], features: Sequence[Any]) -> tuple[Target, ...]:
    """The targets with their choices on their layers' features fixed."""
    return tuple(target.placed(each) for target, each in zip(targets, features, strict=True))


def _labels(targets: tuple[Target, ...], y: Any, logits: Tensor) -> Any:
    """y as the targets take it, once the teacher's logits are known."""
    for target in targets:
        y = target.labels(y, logits)
    return y


def _check_batch(x: Any, model: nn.Module, name: str) -> None:
    check_input(x, model, name)
    if x.requires_grad:
        raise FastjacError(
            "x requires grad, and through the teacher's Jacobian nothing reaches it; expected x.detach()"
        )


def _find_teacher_layer(teacher: nn.Module, target: Target) -> None:
    try:
        find_layer(teacher, target.for_teacher().layer, "the teacher")
    except FastjacError as error:
        if not isinstance(target, AttentionWindow) or target.teacher_layer is not None:
            raise
        raise FastjacError(f"{error}; teacher_layer= names the teacher's") from None


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
