"""The state of a run, as a checkpoint holds it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from fastjac.errors import FastjacError, first_line, notice
from fastjac.models import load_weights
from fastjac.models.weights import read_checkpoint
from fastjac.train import ranks
from fastjac.train.build import describe
from fastjac.train.changes import changed
from fastjac.train.files import RunFolder
from fastjac.train.options import StudentOptions
from fastjac.train.randomness import get_states, set_states
from fastjac.train.step import is_out_of_memory

if TYPE_CHECKING:
    from fastjac.train.loop import Training


def capture(training: Training) -> dict[str, Any]:
    """All that it takes to go on with ``training`` at the step where it is."""
    within = None
    if training.done:
        within = {
            "steps": training.done,
            "lr": training.rate,
            "seconds": training.seconds(),
            "tally": training.tally.joint().state_dict(),
        }
    averaged = {} if training.ema is None else {"model_ema": training.ema.module.state_dict()}
    # The order of the epoch that goes on is drawn again from the state at its start.
    order = training.batches.start if training.done else training.batches.order.get_state()
    first, *others = ranks.gather(get_states(training.device))
    return {
        "about": describe(training.spec, training.data),
        "options": asdict(training.options),
        "images": len(training.data.labels),
        **({} if training.teacher is None else {"teacher": training.teacher}),
        "model": training.model.state_dict(),
        "heads": training.heads.state_dict(),
        **averaged,
        "optimizer": training.optimizer.state_dict(),
        "scheduler": training.scheduler.state_dict(),
        "scaler": training.step.scaler.state_dict(),
        "micro_batch": training.step.size,
        "epoch": training.epoch,
        "within_epoch": within,
        "best": training.best,
        "history": training.history,
        "rng": {**first, "order": order, **({"others": others} if others else {})},
    }


def restore(training: Training) -> None:
    """Bring ``training`` to where the newest whole checkpoint of its folder is.

    Raises if there is none, or if it is of another model or of other options.
    """
    folder = training.folder
    paths, problem = folder.checkpoints(), f"{folder.last} is missing"
    if not paths:
        raise FastjacError(f"nothing to resume: {problem}")
    for path in paths:
        try:
            state = _read(path)
            _check(training, path, state)
            _load(training, path, state)
        except _Damaged as error:
            problem = str(error)
            continue
        if path != folder.last:
            notice(f"{problem}; {path.name}, the one before it, is used")
        training.source = path
        return
    raise FastjacError(problem)


class _Damaged(FastjacError):
    """A file that is no whole checkpoint of a run: one before it may be."""


def _load(training: Training, path: Path, state: dict[str, Any]) -> None:
    try:
        _load_parts(training, path, state)
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, FastjacError):
            raise _Damaged(str(error)) from error
        # What the device says comes as another class, but for the host's memory.
        if isinstance(error, RuntimeError) and (
            type(error) is not RuntimeError or is_out_of_memory(error)
        ):
            raise
        missing = "there is no " if isinstance(error, KeyError) else ""
        raise _Damaged(f"{path} is damaged: {missing}{first_line(error)}") from error


def _load_parts(training: Training, path: Path, state: dict[str, Any]) -> None:
    training.done = 0
    load_weights(training.model, state["model"], path, ignore_head=False)
    training.heads.load_state_dict(state.get("heads", {}))
    if training.ema is not None:
        load_weights(training.ema.module, state["model_ema"], path, ignore_head=False)
    _load_optimizer(training.optimizer, state["optimizer"])
    if training.options.cuda_graphs:  # a tensor, which the file gives on the CPU
        for group in training.optimizer.param_groups:
            group["lr"] = group["lr"].to(training.device)
    training.scheduler.load_state_dict(state["scheduler"])
    training.step.scaler.load_state_dict(state["scaler"])
    if training.step.auto:
        training.step.size = state.get("micro_batch")
    training.epoch, training.best = state["epoch"], state["best"]
    training.history = state["history"]
    if (within := state.get("within_epoch")) is not None:
        training.done, training.rate = within["steps"], within["lr"]
        training.seconds_before = within["seconds"]
        if ranks.is_first():
            training.tally.load_state_dict(within["tally"])
        else:  # the sums are those of all processes
            training.tally.load_names(within["tally"])
    _restore_random_numbers(training, state["rng"])
    training.batches.order.set_state(state["rng"]["order"])


def _load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """As ``load_state_dict``, which does not look at what the first step will look for.

    Of the settings, the learning rate is the file's; all others follow from the run's options.
    """
    own = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for settings, group in zip(own, optimizer.param_groups, strict=True):
        if missing := sorted(set(settings) - set(group)):
            raise KeyError(missing[0])
        if not isinstance(group["lr"], (*_NUMBER, torch.Tensor)):
            raise TypeError(f"the learning rate is {group['lr']!r}")
        group |= {k: v for k, v in settings.items() if k not in ("lr", "params")}
    names = {name for values in optimizer.state.values() for name in values}
    for parameter, values in optimizer.state.items():
        if missing := sorted(names - set(values)):
            raise KeyError(missing[0])
        for name, value in values.items():
            absent = value is None and isinstance(optimizer, torch.optim.SGD)  # without momentum
            if not absent and getattr(value, "shape", None) not in ((), parameter.shape):
                raise ValueError(f"{name} of the optimizer is no tensor of the parameter's shape")
            if name == "step" and not (value.numel() == 1 and value.item() >= 0):
                raise ValueError("step of the optimizer is no count")


def _restore_random_numbers(training: Training, states: dict[str, Any]) -> None:
    """Each process goes on with its own numbers; one that was not there before begins new ones."""
    rank, others = ranks.rank(), states.get("others", [])
    if rank <= len(others):
        set_states(others[rank - 1] if rank else states, training.device)
    else:
        done = training.epoch * training.batches.steps + training.done
        torch.manual_seed(training.options.seed + rank + ranks.count() * done)


def position(folder: RunFolder) -> tuple[Path, str]:
    """The newest checkpoint that can be read, and what it holds: ``epoch 3``; empty if there is none."""
    # Each is tried twice: the handler of a signal may raise, that of a loader's death.
    for path in (path for path in folder.checkpoints() for _ in range(2)):
        try:
            # Mapped: of the tensors, nothing is read.
            state = torch.load(path, "cpu", weights_only=True, mmap=True)
            if (within := state.get("within_epoch")) is not None:
                return path, f"step {within['steps']} of epoch {state['epoch'] + 1}"
            return path, f"epoch {state['epoch']}"
        except Exception:  # damaged bytes may raise anything, and an error is being told already
            continue
    return folder.last, ""


def _read(path: Path) -> dict[str, Any]:
    """What the checkpoint holds; raises :class:`_Damaged` if it is not what :func:`capture` gave."""
    try:
        state = read_checkpoint(path)
    except FastjacError as error:
        raise _Damaged(str(error)) from error
    newer = {name: kind for name, kind in _NEWER_PARTS.items() if name in state}
    _check_kinds(path, state, _PARTS | newer)
    _check_kinds(path, state["about"], {"spec": dict})
    _check_kinds(
        path, state["scheduler"], {"last_epoch": int, "_step_count": int, "base_lrs": list}
    )
    rates = state["scheduler"]["base_lrs"]
    _check_kinds(path, dict(enumerate(rates)), {0: (*_NUMBER, torch.Tensor)})
    if len(rates) > 1 or min(state["epoch"], state["scheduler"]["last_epoch"]) < 0:
        raise _Damaged(f"{path} is damaged: its counts of epochs or rates are impossible")
    if (within := state.get("within_epoch")) is not None:
        _check_kinds(path, within, {"steps": int, "lr": _NUMBER, "seconds": _NUMBER, "tally": dict})
        _check_kinds(path, within["tally"], {"images": int, "sums": dict})
    epochs, history = state["epoch"], state["history"]
    if [isinstance(row, dict) and row.get("epoch") for row in history] != [*range(1, epochs + 1)]:
        raise _Damaged(f"{path} is damaged: its history is not of the epochs 1 to {epochs}")
    for row in history:
        _check_kinds(path, row, dict.fromkeys(row, _NUMBER))
    return state


_NUMBER = (int, float)
# What a checkpoint holds, by the type. What newer versions added may be absent.
_PARTS: dict[str, Any] = {
    **dict.fromkeys(("about", "options", "model", "optimizer", "scheduler", "scaler", "rng"), dict),
    "epoch": int,
    "best": _NUMBER,
    "history": list,
}
_NEWER_PARTS: dict[str, Any] = {
    "images": int,
    "teacher": str,
    "heads": dict,
    "micro_batch": (int, NoneType),
    "within_epoch": (dict, NoneType),
}


def _check_kinds(path: Path, state: dict[str, Any], parts: dict[str, Any]) -> None:
    for name, kind in parts.items():
        if name not in state:
            raise _Damaged(f"{path} is not a whole checkpoint of a run: it has no {name!r}")
        if not isinstance(state[name], kind):
            got = type(state[name]).__name__
            raise _Damaged(f"{path} is damaged: {name!r} in it is of the type {got}")


def _check(training: Training, path: Path, state: dict[str, Any]) -> None:
    """Raise unless ``state`` is of the run that ``training`` is."""
    if state["about"] != (mine := describe(training.spec, training.data)):
        parts = [
            f"{k} (was {a}, now {b})"
            for k, a in {**state["about"], **state["about"]["spec"]}.items()
            if a != (b := {**mine, **mine["spec"]}.get(k)) and k not in ("spec", "classes")
        ]
        raise FastjacError(f"{path} is of another model: {'; '.join(parts) or 'other classes'}")
    if (before := state.get("images")) not in (None, now := len(training.data.labels)):
        notice(f"{path} is of a run on {before} training images; now there are {now}")
    if (taught := "teacher" in state["options"]) != isinstance(training.options, StudentOptions):
        kinds = ("teacher", "student") if taught else ("student", "teacher")
        raise FastjacError(
            f"{path} is of a {kinds[1]}, this is a {kinds[0]}; --experiment names another folder"
        )
    before, now = state["options"], asdict(training.options)
    if (teacher := state.get("teacher")) is not None and training.teacher is not None:
        if teacher != training.teacher:
            raise FastjacError(
                f"{path} is of a run with another teacher: the weights of {now['teacher']} are not "
                "those that it began with"
            )
        before = before | {k: now[k] for k in ("teacher", "teacher_weights")}  # it may have moved
    if different := changed(before, now):
        raise FastjacError(f"{path} is of a run with other options: {', '.join(different)}")
