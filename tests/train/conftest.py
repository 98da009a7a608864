"""A small teacher, and ways to run the trainer: in this process, or as one of its own."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from fastjac.train.__main__ import main

SMALL = ["--dataset", "digits", "--model", "vgg", "--plan", "4 M 8 M", "--lr", "0.01"]
SMALL += ["--batch-size", "10", "--epoch-steps", "4", "--epochs", "2", "--threads", "1"]


@pytest.fixture
def small():
    """Flags of a run of seconds."""
    return list(SMALL)


@pytest.fixture(autouse=True)
def same_everywhere(monkeypatch):
    """Processes say what the trainer says, and not how fastjac was built; this one keeps its threads."""
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def trainer(tmp_path, capfd):
    """Runs a command in this process with ``--output`` in ``tmp_path``; the status and both outputs."""

    def run(*words, output=tmp_path / "runs"):
        capfd.readouterr()
        where = [] if words and words[0] == "evaluate" else ["--output", str(output)]
        status = main([*map(str, words), *where])
        return status, *capfd.readouterr()

    return run


@pytest.fixture
def start(tmp_path):
    """Starts a real process; what still runs at the end is killed."""
    processes = []

    def begin(*words, output=tmp_path / "runs"):
        command = [sys.executable, "-m", "fastjac.train", *map(str, words)]
        process = subprocess.Popen(
            [*command, "--output", str(output)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            # Of what a shell runs in the background, children inherit that Ctrl-C is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        processes.append(process)
        return process

    yield begin
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """The folder of a teacher on the digits, good enough to learn from."""
    output = tmp_path_factory.mktemp("teacher")
    words = ["teacher", *SMALL, "--plan", "8 M 16 M 32 M", "--batch-size", "32"]
    words += ["--epoch-steps", "60", "--output", str(output)]
    assert main([*words, "--experiment", "t"]) == 0
    return output / "t"
