"""The help: complete, by topic, with an example that runs; it and a mistake take no second."""

import os
import subprocess
import sys

import pytest

from fastjac.data import DATASETS
from fastjac.models.vgg import PLANS
from fastjac.train import options
from fastjac.train.__main__ import COMMANDS


def command(*words, **kwargs):
    """The trainer in a process of its own, which lists what it imports on the standard error."""
    interpreter = [sys.executable, "-X", "importtime", "-m", "fastjac.train"]
    return subprocess.run([*interpreter, *words], capture_output=True, text=True, **kwargs)


def imported(done):
    """The packages that a process of `command` has imported."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


def help_of(name):
    done = command(name, "--help")
    assert done.returncode == 0
    return done.stdout


def test_help_names_the_commands():
    done = command("--help")
    assert done.returncode == 0
    for name in COMMANDS:
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("--help", 0),
        ("table --help", 0),
        ("tech", 2),
        ("teacher --batchsize 3", 2),
        ("teacher --epochs many", 2),
        ("teacher --epochs 0", 2),
        ("teacher --mixup 1 --batch-size 3", 2),
        ("teacher --cuda-graphs --micro-batch auto", 2),
        ("teacher --dataset digit", 2),
        ("teacher --model vgg7", 2),
        ("teacher --config no.yaml", 2),
        ("teacher --weights no.pt", 2),
        ("teacher --dataset folder --data-dir no", 2),
        ("student --teacher no", 2),
        ("evaluate no", 2),
    ],
)
def test_help_and_mistakes_import_nothing_slow(words, status):
    done = command(*words.split())
    assert done.returncode == status
    packages = imported(done)
    assert "fastjac" in packages
    slow = {"torch", "torchvision", "timm", "numpy", "sklearn", "torchmetrics", "matplotlib"}
    assert not packages & slow


def test_the_options_stand_under_their_topic():
    said = help_of("table")
    headings = [topic.__doc__ for topic in options.TOPICS]
    at = [said.index(f"\n{heading}:\n") for heading in headings]
    assert at == sorted(at)
    parts = dict(zip(headings, map(said.__getitem__, map(slice, at, [*at[1:], None])), strict=True))
    for heading, flags in {
        "data": ("--dataset", "--samples-per-class", "--config"),
        "network": ("--model", "--pretrained"),
        "optimisation": ("--batch-size", "--decay-milestones", "--seed"),
        "the teacher and the terms of the loss": ("--teacher", "--activations"),
        "the Jacobian term": ("--jacobians", "--window", "--no-normalize"),
        "the table": ("--methods", "--seeds"),
        "precision and device": ("--amp", "--threads"),
        "output": ("--output", "--resume"),
    }.items():
        for flag in flags:
            assert f"\n  {flag}" in parts[heading] or f", {flag}" in parts[heading]
    # None is left over.
    assert said[: at[0]].rstrip().endswith("Show this help message and exit.")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_ends_with_an_example(name):
    example = COMMANDS[name][0].example
    assert help_of(name).endswith(f"\nexample:\n  python -m fastjac.train {example}\n")
    assert example.split()[0] == name


@pytest.mark.check
def test_the_examples_run(trainer, tmp_path, monkeypatch):
    """One after the other, as their text says, then cut short by further options."""
    monkeypatch.chdir(tmp_path)
    few = ["--epochs", 1, "--epoch-steps", 2, "--threads", 1]
    cell = ["--samples", 1, "--seeds", 0, "--jobs", 1]
    cut = {"teacher": few, "student": few, "evaluate": [], "table": few + cell, "demo": few + cell}
    for name, further in cut.items():
        status, said, err = trainer(*COMMANDS[name][0].example.split(), *further)
        assert status == 0, err
        assert "test images right" in said or "images per class" in said


def test_the_names_that_options_check_are_all_there_are():
    assert options.DATASETS == DATASETS
    assert set(options.MODELS) == {"vgg", *PLANS}


def test_without_the_trainers_packages(tmp_path):
    """The core needs torch alone: what else the trainer needs is one line, not a traceback."""
    (tmp_path / "jsonargparse.py").write_text(
        "raise ModuleNotFoundError('No module named jsonargparse', name='jsonargparse')"
    )
    command = [sys.executable, "-m", "fastjac.train", "teacher", "--help"]
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 2
    assert done.stderr == (
        "fastjac: the trainer needs the package jsonargparse, which is not installed; its packages "
        "come with: pip install --no-build-isolation '.[train]'\n"
    )
