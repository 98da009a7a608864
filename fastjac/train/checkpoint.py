"""The state of a run, as a checkpoint holds it."""

from __future__ import annotations

import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastjac.errors import FastjacError, notice
from fastjac.models import load_weights
from fastjac.models.weights import read_checkpoint
from fastjac.train import ranks
from fastjac.train.build import describe
from fastjac.train.files import RunFolder
from fastjac.train.options import changed
from fastjac.train.randomness import get_states, set_states

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
    path, state = _newest(training.folder)
    _check(training, path, state)
    load_weights(training.model, state["model"], path, ignore_head=False)
    training.heads.load_state_dict(state.get("heads", {}))
    if training.ema is not None:
        load_weights(training.ema.module, state["model_ema"], path, ignore_head=False)
    training.optimizer.load_state_dict(state["optimizer"])
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
    training.source = path


def _restore_random_numbers(training: Training, states: dict[str, Any]) -> None:
    """Each process goes on with its own numbers; one that was not there before begins new ones."""
    rank, others = ranks.rank(), states.get("others", [])
    if rank <= len(others):
        set_states(others[rank - 1] if rank else states, training.device)
    else:
        done = training.epoch * training.batches.steps + training.done
        torch.manual_seed(training.options.seed + rank + ranks.count() * done)


def position(folder: RunFolder) -> str:
    """What the last checkpoint holds, such as ``epoch 3``; empty if there is none."""
    if not folder.last.is_file():
        return ""
    # Mapped: of the tensors, nothing is read.
    state = torch.load(folder.last, "cpu", weights_only=True, mmap=True)
    if (within := state.get("within_epoch")) is not None:
        return f"step {within['steps']} of epoch {state['epoch'] + 1}"
    return f"epoch {state['epoch']}"


def _newest(folder: RunFolder) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint that can be read."""
    paths = folder.checkpoints()
    if not paths:
        raise FastjacError(f"nothing to resume: {folder.last} is missing")
    problem = f"{folder.last} is missing"
    while True:
        path = paths.pop(0)
        try:
            state = read_checkpoint(path)
            _check_sums(path)
        except FastjacError as error:
            if not paths:
                raise
            problem = str(error)
        else:
            break
    if path != folder.last:
        notice(f"{problem}; {path.name}, the one before it, is used")
    return path, state


def _check_sums(path: Path) -> None:
    """Raise if a byte of the file is another than was written, which ``torch.load`` does not see."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise FastjacError(f"{path} is damaged: the checksum of {damaged} in it is wrong")


def _check(training: Training, path: Path, state: dict[str, Any]) -> None:
    """Raise unless ``state`` is of the run that ``training`` is."""
    if "rng" not in state:
        raise FastjacError(f"{path} is not a checkpoint of a run")
    if state["about"] != (mine := describe(training.spec, training.data)):
        parts = [
            f"{k} (was {a}, now {b})"
            for k, a in {**state["about"], **state["about"]["spec"]}.items()
            if a != (b := {**mine, **mine["spec"]}.get(k)) and k not in ("spec", "classes")
        ]
        raise FastjacError(f"{path} is of another model: {'; '.join(parts) or 'other classes'}")
    if (before := state.get("images")) not in (None, now := len(training.data.labels)):
        notice(f"{path} is of a run on {before} training images; now there are {now}")
    if different := changed(state["options"], asdict(training.options)):
        raise FastjacError(f"{path} is of a run with other options: {', '.join(different)}")
