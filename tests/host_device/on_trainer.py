"""The trainer on a device: what it gives on a CPU, mixed precision, and a run that goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import host_device
import pytest
import torch

from fastjac.train.__main__ import main
from fastjac.train.commands import prepare
from fastjac.train.options import StudentOptions

SMALL = ["--dataset", "digits", "--model", "vgg", "--plan", "4 M 8 M", "--lr", "0.01"]
SMALL += ["--batch-size", "4", "--epoch-steps", "2", "--threads", "1", "--val-interval", "9"]


def run(
    command: str, output: Path, device: str, *words: str | Path, epochs: int = 2
) -> list[float]:
    """The losses of a run in ``output``, by epoch."""
    where = ["--device", device, "--output", output.parent, "--experiment", output.name]
    assert main([command, *SMALL, "--epochs", *map(str, (epochs, *where, *words))]) == 0
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train_loss"] for line in lines]


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    run("teacher", tmp_path / "teacher", "cpu")
    return tmp_path / "teacher"


@pytest.mark.parametrize("device", ["host", "host:1"])
@pytest.mark.parametrize("target", ["label-logit", "attention-window"])
def test_gives_what_it_gives_on_a_cpu(tmp_path, teacher, device, target):
    words = ("--teacher", teacher, "--jacobians", "1", "--target", target, "--channels-last")
    wanted = run("student", tmp_path / "here", "cpu", *words)
    before = host_device.launches()
    assert run("student", tmp_path / "there", device, *words) == pytest.approx(wanted, rel=1e-4)
    assert host_device.launches() > before


@pytest.mark.parametrize("amp", [False, True], ids=["", "amp"])
def test_a_step_never_waits(tmp_path, teacher, amp):
    """From the loss to the optimiser's end."""
    options = StudentOptions(
        model="vgg",
        plan="4 M 8 M",
        batch_size=4,
        epoch_steps=3,
        epochs=1,
        device="host",
        amp=amp,
        output=str(tmp_path),
        experiment="run",
        teacher=str(teacher),
        jacobians=1.0,
        activations=1.0,
        attention=1.0,
        target="attention-window",
    )
    training = prepare(options)
    finished = []

    def watched(part: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with host_device.no_synchronisation():
                result = part(*args)
            finished.append(part.__name__)
            return result

        return run

    training.step.gradient = watched(training.step.gradient)
    training.step.update = watched(training.step.update)
    training.try_once = lambda: None
    training.run(bar=False)
    assert finished == ["gradient", "update"] * 3


def test_an_evaluation_of_what_was_trained_elsewhere(teacher, capsys):
    assert main(["evaluate", str(teacher), "--device", "cpu"]) == 0
    wanted = capsys.readouterr().out
    assert main(["evaluate", str(teacher), "--device", "host"]) == 0
    assert capsys.readouterr().out == wanted


def test_mixed_precision(tmp_path, teacher):
    words = ("--teacher", teacher, "--jacobians", "1", "--amp")
    wanted = run("student", tmp_path / "here", "cpu", *words)
    assert run("student", tmp_path / "there", "host", *words) == pytest.approx(wanted, rel=0.1)


def test_a_resumed_run_draws_what_the_device_would_have_drawn(tmp_path):
    folder = tmp_path / "run"
    run("teacher", folder, "host", epochs=1)
    state = torch.load(folder / "last.pt")
    states = [torch.Generator("host").manual_seed(n).get_state() for n in (7, 8)]
    assert not torch.equal(states[0], state["rng"]["devices"]["host"][0])
    state["rng"]["devices"]["host"] = states
    torch.save(state, folder / "last.pt")
    assert len(run("teacher", folder, "host", "--resume", epochs=2)) == 2
    assert all(map(torch.equal, torch.host.get_rng_state_all(), states))
    assert len(run("teacher", folder, "cpu", "--resume", epochs=3)) == 3


def test_an_unknown_device_is_bad_input(tmp_path, capsys):
    where = ["--output", str(tmp_path), "--device", "host:2"]
    assert main(["teacher", *SMALL, *where]) == 2
    assert "--device host:2 is not to be had" in capsys.readouterr().err
